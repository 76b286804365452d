"""Mathematical parts for finding out whether a theory of language models is true of a network.

Packages, lowest first: ``core`` (types, statistics, checks), ``structure`` (grammars and inference over trees),
``kernels`` (empirical NTKs), ``geometry`` (paths, symmetries, dropout stability) and ``nn`` (Linen models), ``data``
(readers, prompts, batches, corpora), ``train`` (loop, optimisers, checkpoints), ``evaluation`` (probes), ``lab`` (runs,
reports, figures). Nothing is imported here: ``from jaxft import kernels`` costs only what ``kernels`` needs.
"""
