r"""Do Transformers Parse while Predicting the Masked Word? (Zhao et al. 2023, arXiv 2303.08117): claims and controls.

Inference is checked against the list of all derivations of short sentences of a small random grammar (``grammars``):
charts and posteriors (``posteriors``), what they do not depend on (``invariances``), trees (``decoding``), what a
grammar generates (``samples``), and the masked objective with its optimum (``objective``), which a model trained
here approaches (``trained``). ``construction`` writes the weights of a transformer that executes Inside-Outside,
``approximation`` makes it smaller, and ``construction_claims`` has the claims on both.
"""

from theory.pcfg_parsing import construction_claims, decoding, invariances, objective, posteriors, samples, trained

__all__ = ["CLAIMS"]

CLAIMS = (
    *posteriors.CLAIMS,
    *invariances.CLAIMS,
    *decoding.CLAIMS,
    *samples.CLAIMS,
    *objective.CLAIMS,
    *construction_claims.CLAIMS,
    *trained.CLAIMS,
)
