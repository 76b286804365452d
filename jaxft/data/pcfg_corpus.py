"""Corpora drawn from a grammar on the device, and masked there as BERT and RoBERTa do it.

Everything is a pure function of (seed, position): sentence i of a corpus, and the batch of a step, are the same whether
drawn alone, in order, or after a restart.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxft.core.checks import UserError, message, nearest, require
from jaxft.core.rng import stream
from jaxft.core.types import TokenBatch
from jaxft.structure.chart import require_lengths
from jaxft.structure.pcfg import Grammar
from jaxft.structure.sampling import Samples, SamplingTables, sample_sentences

Masking = Literal["mask", "bert"]
"""What becomes of a chosen word: always the mask, or the mask in 80 %, a random word in 10 %, itself in 10 %."""


@dataclasses.dataclass(frozen=True)
class CorpusLayout:
    """How the words of a grammar become token ids: special ids first, word w is ``w + 4``.

    Example:
      >>> layout = CorpusLayout(words=6)
      >>> layout.vocab_size, layout.max_tokens(10)
      (10, 12)
    """

    words: int
    """Number of words, v."""
    boundaries: bool = True
    """Whether a sentence stands between the ids of beginning and end."""

    pad_id = 0
    mask_id = 1
    begin_id = 2
    end_id = 3
    first_word_id = 4

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.first_word_id + self.words

    def max_tokens(self, max_length: int) -> int:
        """Tokens of a sentence of ``max_length`` words."""
        return max_length + 2 * self.boundaries

    def word_positions(self, x: Array, max_length: int) -> Array:
        """The entries of ``x [b, tokens, ...]`` at the words, ``[b, max_length, ...]``, without the boundaries."""
        return x[:, self.boundaries : self.boundaries + max_length]


class MaskedSentences(NamedTuple):
    """A batch to train a masked model on, and what it was made of."""

    inputs: TokenBatch
    labels: Int[Array, "b tokens"]
    """The hidden id where a word was chosen, -1 elsewhere."""
    samples: Samples


def sample_corpus(
    grammar: Grammar | SamplingTables,
    *,
    seed: int,
    size: int,
    max_length: int | None = None,
    lengths: int | Int[Array, "b"] | Int[np.ndarray, "b"] | None = None,
    name: str = "corpus",
    start: int = 0,
) -> Samples:
    """Sentences ``start, ..., start + size - 1`` of an endless corpus, with their trees.

    Args:
      grammar: The grammar, or its sampling tables.
      seed: Seed.
      size: Number of sentences.
      max_length: Longest sentence; shorter ones come as often as the grammar makes them.
      lengths: Words of each sentence instead.
      name: Name of the corpus: another name, an independent corpus (``"validation"``).
      start: First sentence.

    Returns:
      The sentences.

    Raises:
      UserError: As ``sample_sentences``.

    Example:
      >>> from jaxft.data.english_grammar import english_grammar
      >>> grammar = english_grammar()
      >>> corpus = sample_corpus(grammar, seed=0, size=4, max_length=12)
      >>> [" ".join(grammar.names.words[w] for w in row[:n]) for row, n in zip(corpus.tokens, corpus.lengths)][:1]
      ['...']
      >>> part = sample_corpus(grammar, seed=0, size=1, max_length=12, start=3)
      >>> bool((part.tokens[0] == corpus.tokens[3]).all())
      True
    """
    key = stream(jax.random.key(seed), name)
    return sample_sentences(grammar, key=key, num=size, lengths=lengths, max_length=max_length, start=start)


def encode_corpus(
    tokens: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    lengths: Int[Array, "b"] | Int[np.ndarray, "b"],
    layout: CorpusLayout,
) -> TokenBatch:
    """Word numbers of a grammar as input of an encoder.

    Args:
      tokens: Word numbers; those beyond the length are not looked at.
      lengths: Words of each sentence.
      layout: The ids.

    Returns:
      Ids, padded, with boundaries if the layout has them.

    Raises:
      UserError: Lengths that do not fit the tokens.

    Example:
      >>> batch = encode_corpus(jnp.array([[5, 0, 0]]), jnp.array([2]), CorpusLayout(words=6))
      >>> batch.input_ids.tolist(), batch.attention_mask.tolist()
      ([[2, 9, 4, 3, 0]], [[1, 1, 1, 1, 0]])
    """
    b, t = tokens.shape
    require_lengths("encode_corpus", lengths, b, t)
    position = jax.lax.broadcasted_iota(jnp.int32, (b, layout.max_tokens(t)), 1)
    ends = jnp.asarray(lengths, jnp.int32)[:, None] + layout.boundaries
    words = jnp.pad(jnp.asarray(tokens, jnp.int32) + layout.first_word_id, ((0, 0), (layout.boundaries,) * 2))
    ids = jnp.where(position < ends, words, layout.pad_id)
    if layout.boundaries:
        ids = jnp.where(position == 0, layout.begin_id, jnp.where(position == ends, layout.end_id, ids))
    mask = (position < ends + layout.boundaries).astype(jnp.int32)
    return TokenBatch(ids, mask, jnp.zeros_like(ids), jnp.zeros(b, jnp.int32))


def mask_corpus(
    batch: TokenBatch,
    layout: CorpusLayout,
    *,
    key: Array,
    mask_frac: float = 0.15,
    masking: Masking = "mask",
) -> tuple[TokenBatch, Int[Array, "b tokens"]]:
    """Hides a part of the words, on the device; the rule of ``mask_tokens``.

    Every sentence has at least one chosen word. With ``masking="mask"`` the exact posterior of a hidden word is that of
    ``masked_word_posterior``; with ``"bert"`` the words that stay may be wrong, which is another problem.

    Args:
      batch: Encoded sentences.
      layout: The ids.
      key: Random key.
      mask_frac: Expected part of the words that is chosen.
      masking: What becomes of a chosen word.

    Returns:
      The batch with masks, and the labels: the hidden id where a word was chosen, -1 elsewhere.

    Raises:
      UserError: ``mask_frac`` outside (0, 1], or an unknown masking.

    Example:
      >>> layout = CorpusLayout(words=6)
      >>> batch = encode_corpus(jnp.array([[5, 0, 0]]), jnp.array([3]), layout)
      >>> masked, labels = mask_corpus(batch, layout, key=jax.random.key(0))
      >>> bool((jnp.where(labels >= 0, labels, masked.input_ids) == batch.input_ids).all()), int((labels >= 0).sum())
      (True, 1)

    Reference:
      Devlin et al. 2019, arXiv 1810.04805, section 3.1.
    """
    where = "mask_corpus"
    require(0 < mask_frac <= 1, where, "mask_frac must lie in (0, 1]", mask_frac, "BERT uses 0.15")
    if masking not in ("mask", "bert"):
        raise UserError(message(where, "masking must be known", masking, nearest(masking, ["mask", "bert"])))
    ids = batch.input_ids
    score_key, action_key, word_key = jax.random.split(key, 3)
    ordinary = ids >= layout.first_word_id
    score = jnp.where(ordinary, jax.random.uniform(score_key, ids.shape), jnp.inf)
    # The lowest score of a sentence is always chosen: a sentence without a label would teach nothing.
    chosen = ordinary & ((score < mask_frac) | (score == score.min(axis=1, keepdims=True)))
    hidden = jnp.where(chosen, layout.mask_id, ids)
    if masking == "bert":
        action = jax.random.uniform(action_key, ids.shape)
        other = jax.random.randint(word_key, ids.shape, layout.first_word_id, layout.vocab_size, ids.dtype)
        hidden = jnp.where(chosen & (action >= 0.8), jnp.where(action >= 0.9, other, ids), hidden)
    return batch._replace(input_ids=hidden), jnp.where(chosen, ids, -1)


def corpus_batch(
    tables: SamplingTables,
    layout: CorpusLayout,
    *,
    seed: int,
    step: int | Int[Array, ""],
    batch_size: int,
    mask_frac: float = 0.15,
    masking: Masking = "mask",
    name: str = "corpus",
) -> MaskedSentences:
    """The batch of a step: sentences never seen before, freshly masked, made inside ``jit`` where training needs them.

    Args:
      tables: The sampling tables of the grammar.
      layout: The ids.
      seed: Seed.
      step: The step, which may be traced: sentences ``step * batch_size`` and following of the corpus.
      batch_size: Sentences a batch.
      mask_frac: As in ``mask_corpus``.
      masking: As in ``mask_corpus``.
      name: Name of the corpus.

    Returns:
      Inputs, labels, and the sentences with their trees.

    Example:
      >>> from jaxft.data.english_grammar import english_grammar
      >>> from jaxft.structure.sampling import sampling_tables
      >>> tables = sampling_tables(english_grammar(), 12)
      >>> batch = corpus_batch(tables, CorpusLayout(words=168), seed=0, step=3, batch_size=2)
      >>> batch.inputs.input_ids.shape, bool(((batch.labels >= 0).sum(axis=1) >= 1).all())
      ((2, 14), True)
    """
    base = jax.random.key(seed)
    step = jnp.asarray(step, jnp.int32)
    samples = sample_sentences(tables, key=stream(base, name), num=batch_size, start=step * batch_size)
    key = jax.random.fold_in(stream(base, f"{name} masking"), step)
    inputs = encode_corpus(samples.tokens, samples.lengths, layout)
    inputs, labels = mask_corpus(inputs, layout, key=key, mask_frac=mask_frac, masking=masking)
    return MaskedSentences(inputs, labels, samples)


def hidden_words(labels: Int[Array, "b tokens"], layout: CorpusLayout, max_length: int) -> Bool[Array, "b t"]:
    """Which words of the sentences are to be predicted, in the positions of the grammar.

    Example:
      >>> hidden_words(jnp.array([[-1, 7, -1, -1, -1]]), CorpusLayout(words=6), 3).tolist()
      [[True, False, False]]
    """
    return layout.word_positions(labels, max_length) >= 0
