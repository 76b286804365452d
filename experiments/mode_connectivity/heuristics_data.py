"""Sentences of the language-model part: for pre-training, for fine-tuning, and in batches of evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from experiments.mode_connectivity.heuristics_config import EVALUATION_BATCHES, SYMBOLS, Heuristics
from jaxft.core.rng import stream
from jaxft.core.types import TokenBatch
from jaxft.data.english_grammar import english_grammar
from jaxft.data.heuristic_rules import LabelledRows, contains_symbol, main_subject_number, two_rule_splits
from jaxft.data.pcfg_corpus import CorpusLayout, encode_corpus, mask_corpus, sample_corpus

Labelled = tuple[TokenBatch, Int[Array, "*b"]]

SPLITS = ("train", "held_out", "challenge")


class Sentences(NamedTuple):
    """All sentences of a run of this part."""

    layout: CorpusLayout
    masked: TokenBatch
    """Sentences to pre-train on, with hidden words."""
    hidden: Int[Array, "n t"]
    """The hidden words, -1 elsewhere."""
    train: Labelled
    """Sentences to fine-tune on."""
    evaluation: tuple[Labelled, Labelled, Labelled]
    """Train, held-out and challenge sentences, each in as many batches."""


def heuristic_sentences(config: Heuristics, *, seed: int) -> Sentences:
    """Draws a corpus from the embedded grammar, masks it, and samples from it where two heuristics agree or not.

    Args:
      config: Settings.
      seed: Seed of all draws.

    Returns:
      The sentences.

    Raises:
      UserError: The corpus has too few sentences of a kind.
    """
    grammar = english_grammar()
    corpus = sample_corpus(grammar, seed=seed, size=config.corpus_sentences, max_length=config.max_length)
    assert grammar.names is not None  # of the embedded grammar
    layout = CorpusLayout(words=len(grammar.names.words))
    encoded = encode_corpus(corpus.tokens, corpus.lengths, layout)
    key = stream(jax.random.key(seed), "heuristics masking")
    masked, hidden = mask_corpus(encoded, layout, key=key, masking="bert")
    splits = two_rule_splits(
        main_subject_number(corpus.parses, grammar.names),
        contains_symbol(corpus.parses, grammar.names, SYMBOLS[config.lexical]),
        train=config.train_sentences,
        held_out=config.evaluation_sentences,
        challenge=config.evaluation_sentences,
        telling_frac=config.telling_frac,
        seed=seed,
    )
    train, held_out, challenge = (_examples(encoded, split) for split in splits)
    return Sentences(layout, masked, hidden, train, (_batches(train), _batches(held_out), _batches(challenge)))


def _examples(encoded: TokenBatch, split: LabelledRows) -> Labelled:
    return jax.tree.map(lambda x: x[split.rows], encoded), jnp.asarray(split.labels, jnp.int32)


def _batches(examples: Any) -> Any:
    """Examples of every class in each batch, whichever order they come in."""

    def dealt(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // EVALUATION_BATCHES, EVALUATION_BATCHES, *x.shape[1:]), 1, 0)

    return jax.tree.map(dealt, examples)
