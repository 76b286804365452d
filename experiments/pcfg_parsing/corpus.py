"""Sentences of a grammar for training: where the grammar is from, and which sentences stand in which step."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.pcfg_parsing.config import Corpus, PcfgParsingConfig
from experiments.pcfg_parsing.training import MaskedInputs
from jaxft.core.checks import require
from jaxft.core.rng import stream
from jaxft.data.batching import batch_indices
from jaxft.data.english_grammar import english_grammar
from jaxft.data.pcfg_corpus import CorpusLayout, encode_corpus, mask_corpus, sample_corpus
from jaxft.data.treebank import read_treebank, treebank_grammar
from jaxft.structure.binarize import BinarizationScheme, clean_tree
from jaxft.structure.grammar_text import read_grammar
from jaxft.structure.pcfg import PCFG, SparsePCFG, num_nonterminals
from jaxft.structure.sampling import SamplingTables
from jaxft.structure.trees import Tree


class Source(NamedTuple):
    """A grammar and where it is from."""

    grammar: PCFG | SparsePCFG
    description: str
    """Origin and sizes, in words."""
    held_out: Sequence[Tree] = ()
    """Cleaned trees that the grammar was not read from."""
    scheme: BinarizationScheme | None = None
    """How the trees of the treebank were made binary."""


def load_grammar(corpus: Corpus) -> Source:
    """The grammar that the configuration names.

    Raises:
      UserError: A file cannot be read, with its name and line.
    """
    if corpus.grammar is not None:
        grammar = read_grammar(corpus.grammar)
        return Source(grammar, f"the grammar {corpus.grammar.name} ({describe(grammar)})")
    if corpus.treebank is not None:
        train, held_out = treebank_trees(corpus.treebank, corpus.files, corpus.held_out)
        scheme = BinarizationScheme(h=corpus.markov)
        grammar = treebank_grammar(train, scheme=scheme, min_count=corpus.min_count)
        said = f"a grammar read off {len(train)} trees of {corpus.treebank.name} ({describe(grammar)})"
        return Source(grammar, said, held_out, scheme)
    grammar = english_grammar()
    return Source(grammar, f"the embedded English-like grammar ({describe(grammar)})")


def treebank_trees(folder: Path, files: Sequence[str], held_out: Sequence[str]) -> tuple[list[Tree], list[Tree]]:
    """Cleaned trees of a treebank: those to read a grammar from, and those of the held-out files.

    Raises:
      UserError: No file has such a name, or a file is faulty.
    """
    parts = []
    kept_out = {path for name in held_out for path in folder.rglob(name)}
    for names, wanted in ((files, False), (held_out, True)):
        paths = sorted({path for name in names for path in folder.rglob(name) if (path in kept_out) == wanted})
        found = bool(paths) or (wanted and not held_out)
        rule = f"{folder} must hold files named {' or '.join(names)}"
        require(found, "treebank_trees", rule, "none, or held-out ones alone", "Check corpus.files and corpus.held_out")
        trees = [clean_tree(tree) for tree in read_treebank(paths)] if paths else []
        parts.append([tree for tree in trees if tree is not None])
    require(bool(parts[0]), "treebank_trees", "a treebank must hold a tree with words", "none", "Check the folder")
    return parts[0], parts[1]


def describe(grammar: PCFG | SparsePCFG) -> str:
    """Sizes of a grammar in words."""
    rules = int(np.isfinite(np.asarray(grammar.log_rule)).sum())
    q, v = grammar.log_emit.shape
    return f"{num_nonterminals(grammar)} nonterminals, {q} preterminals, {rules} binary rules, {v} words"


class TrainingSentences:
    """The sentences of training, the same for all networks, as a function of the step.

    Where training needs no more than the distinct sentences of the corpus each is read once, drawn as it is needed;
    beyond, the corpus is drawn once and read in shuffled epochs, with new masks in each.
    """

    def __init__(self, config: PcfgParsingConfig, tables: SamplingTables, layout: CorpusLayout):
        self.config, self.tables, self.layout = config, tables, layout
        self.streamed = config.training.steps * config.training.batch_size <= config.corpus.sentences

    def between(self, start: int, stop: int) -> tuple[MaskedInputs, Int[Array, "n"]]:
        """Those of steps ``start`` to ``stop - 1``, in order, and how many words are hidden in each."""
        config, training = self.config, self.config.training
        b = training.batch_size
        if self.streamed:
            words, lengths = self._drawn(start * b, (stop - start) * b)
        else:
            distinct = config.corpus.sentences
            rows = batch_indices(distinct, b, seed=config.seed, name="training", start=start, stop=stop).ravel()
            words, lengths = (part[rows] for part in self._whole)
        batch, labels = mask_corpus(
            encode_corpus(words, lengths, self.layout),
            self.layout,
            key=stream(jax.random.key(config.seed), "training masks", start),
            mask_frac=training.mask_frac,
            masking=training.masking,
        )
        return (batch, labels), (labels >= 0).sum(axis=1).astype(jnp.int32)

    @functools.cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        return self._drawn(0, self.config.corpus.sentences)

    def _drawn(self, start: int, num: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = sample_corpus(self.tables, seed=self.config.seed, size=num, name="training", start=start)
        return np.asarray(drawn.tokens), np.asarray(drawn.lengths)
