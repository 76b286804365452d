"""Claims on what a grammar generates: lengths, prefixes, sentences of a given length, trees of a given sentence."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxft.core.rng import stream
from jaxft.structure import (
    Parses,
    Samples,
    brute_force,
    length_log_probs,
    sample_sentences,
    sample_trees,
    sampling_tables,
)
from jaxft.structure.enumeration import Enumeration
from jaxft.structure.prefix import prefix_log_probability
from theory.claims import Evidence
from theory.pcfg_parsing.grammars import (
    LENGTHS,
    PAPER,
    SETTING,
    TOKENS,
    WORDS,
    compiled,
    make_claim,
    other_grammar,
    posteriors,
    toy,
    unseen_words,
)

SOURCE = f"derived; cf. {PAPER}"
DRAWS = 8192
FALSE_ALARM = 1e-4
"""Chance that an exact sampler is found out."""


@functools.cache
def sentences(seed: int, length: int, *, of_other: bool = False, name: str = "sentences") -> Samples:
    """Sentences of a length drawn from the grammar of a seed, or from another one."""
    grammar = other_grammar(seed) if of_other else toy(seed).grammar
    lengths = jnp.asarray(np.full(DRAWS, length, np.int32))
    return _draw_sentences(sampling_tables(grammar, TOKENS), stream(jax.random.key(seed), name), lengths)


@compiled
def _draw_sentences(tables: Any, key: jax.Array, lengths: jax.Array) -> Samples:
    return sample_sentences(tables, key=key, num=DRAWS, lengths=lengths)


def length_table(seed: int, *, seen: bool = False) -> Evidence:
    """Log probability of every length from 1 to 7 against log Z without the words; the control sees them."""
    case = toy(seed)
    lengths = jnp.asarray(np.append(np.arange(1, TOKENS + 1), TOKENS), jnp.int32)
    terms = case.log_terms if seen else jnp.zeros_like(case.log_terms)
    measured = posteriors(case.grammar, terms, lengths).log_z[:TOKENS]
    table = np.asarray(length_log_probs(case.grammar, TOKENS)) + np.asarray(case.grammar.log_root)
    return Evidence(np.asarray(measured), np.logaddexp.reduce(table[1:], axis=1), setting=SETTING)


def span_frequency(seed: int, *, other: bool = False) -> Evidence:
    """Frequency of a node in sampled sentences of seven words against its posterior with all words summed out.

    The node whose posterior is nearest to one half; the control samples from another grammar.
    """
    case = toy(seed)
    span = np.asarray(posteriors(case.grammar, jnp.zeros_like(case.log_terms), case.lengths).span[0])
    i, j, symbol = np.unravel_index(np.abs(span - 0.5).argmin(), span.shape)
    parses = sentences(seed, TOKENS, of_other=other).parses
    at = np.asarray(parses.spans)
    there = (at[..., 0] == i) & (at[..., 1] == j) & (np.asarray(parses.labels) == symbol) & np.asarray(parses.valid)
    frequency, exact = there.any(axis=1).mean(), span[i, j, symbol]
    error = float(np.sqrt(exact * (1 - exact) / DRAWS))
    return Evidence(frequency, exact, stderr=error, setting={"draws": DRAWS, "node": [int(symbol), int(i), int(j)]})


def sampled_trees(seed: int, *, other: bool = False) -> Evidence:
    """Pearson's statistic of the trees of sampled sentences of five words, of its bound; the control as above."""
    exact = brute_force(unseen_words(toy(seed).grammar), [0] * 5)
    drawn = sentences(seed, 5, of_other=other)
    return Evidence(_misfit(drawn.parses, exact), 1.0, setting={"draws": DRAWS, "trees": len(exact.derivations)})


def sampled_words(seed: int, *, other: bool = False) -> Evidence:
    """Pearson's statistic of the words at each of seven places, the largest, of its bound; the control as above."""
    case = toy(seed)
    tag = np.asarray(posteriors(case.grammar, jnp.zeros_like(case.log_terms), case.lengths).tag[0])
    expected = DRAWS * tag @ np.exp(np.asarray(case.grammar.log_emit))
    tokens = np.asarray(sentences(seed, TOKENS, of_other=other).tokens)
    observed = np.stack([np.bincount(column, minlength=WORDS) for column in tokens.T])
    statistic = ((observed - expected) ** 2 / expected).sum(axis=1)
    bound = stats.chi2.isf(FALSE_ALARM / TOKENS, WORDS - 1)
    return Evidence(statistic.max() / bound, 1.0, setting={"draws": DRAWS})


@compiled
def _draw_trees(grammar: Any, log_terms: jax.Array, lengths: jax.Array, key: jax.Array) -> Parses:
    return sample_trees(grammar, log_terms, lengths, key=key)


def trees_of_a_sentence(seed: int, *, unseen: bool = False) -> Evidence:
    """Pearson's statistic of trees drawn for a sentence of five words, of its bound; the control sees no words."""
    case, row, draws = toy(seed), 2, DRAWS // 4
    n = LENGTHS[row]
    terms = np.zeros_like(case.log_terms[row]) if unseen else np.asarray(case.log_terms[row])
    repeated = np.broadcast_to(terms[None, :n], (draws, n, terms.shape[1]))
    lengths = jnp.asarray(np.full(draws, n, np.int32))
    parses = _draw_trees(case.grammar, jnp.asarray(repeated), lengths, stream(jax.random.key(seed), "trees"))
    exact = brute_force(case.grammar, np.asarray(case.tokens[row, :n]))
    return Evidence(_misfit(parses, exact), 1.0, setting={"draws": draws, "trees": len(exact.derivations)})


def _misfit(parses: Parses, exact: Enumeration) -> float:
    """Pearson's statistic of drawn trees over the value that an exact sampler exceeds once in 10,000 times.

    Trees expected fewer than five times are one cell, and so are trees that the grammar has not.
    """
    nodes = np.concatenate([np.asarray(parses.labels)[..., None], np.asarray(parses.spans)], axis=2)
    rows, counts = np.unique(nodes[:, : 2 * exact.tokens - 1].reshape(len(nodes), -1), axis=0, return_counts=True)
    drawn = dict(zip(map(tuple, rows.tolist()), counts.tolist(), strict=True))
    expected = len(nodes) * exact.posterior()
    observed = np.array([drawn.get(tuple(np.ravel(d.nodes()).tolist()), 0) for d in exact.derivations], float)
    common = expected >= 5
    cells = np.append(expected[common], expected[~common].sum())
    found = np.append(observed[common], len(nodes) - observed[common].sum())
    statistic = ((found - cells) ** 2 / np.maximum(cells, 1e-9)).sum()
    return float(statistic / stats.chi2.isf(FALSE_ALARM, max(len(cells) - 1, 1)))


@compiled
def _prefixes(grammar: Any, tokens: jax.Array) -> jax.Array:
    return prefix_log_probability(grammar, tokens)


def prefix_probability(seed: int, *, unending: bool = False) -> Evidence:
    """Probability of each prefix against that of the sentence that ends there and of all prefixes longer by a word.

    The control leaves out the sentences that end.
    """
    case = toy(seed)
    words = np.asarray(case.tokens[0])
    # Row (k, w): the first k words, then w.
    extended = np.tile(words, (TOKENS, WORDS, 1))
    extended[np.arange(TOKENS), :, np.arange(TOKENS)] = np.arange(WORDS)
    found = np.exp(np.asarray(_prefixes(case.grammar, jnp.asarray(extended.reshape(-1, TOKENS)))))
    found = found.reshape(extended.shape)
    longer = found[np.arange(TOKENS), :, np.arange(TOKENS)].sum(axis=1)
    lengths = jnp.asarray(np.append(np.arange(1, TOKENS + 1), TOKENS), jnp.int32)
    terms = np.broadcast_to(np.asarray(case.log_terms[:1]), case.log_terms.shape)
    ending = np.exp(np.asarray(posteriors(case.grammar, jnp.asarray(terms), lengths).log_z[: TOKENS - 1]))
    ending = np.append(0, 0 * ending if unending else ending)
    prefix = np.append(1, found[-1, 0, : TOKENS - 1])
    # Each divided by the prefix, since long ones are improbable.
    return Evidence((longer + ending) / prefix, np.ones(TOKENS), setting=SETTING)


CLAIMS = (
    make_claim(
        "length-table",
        "The probability of a length is Z of a sentence of so many words, all of them summed out.",
        SOURCE,
        "identity",
        length_table,
        {"seen": True},
        "the words are seen",
        seeds=3,
    ),
    make_claim(
        "prefix-probability",
        "A prefix is as probable as the sentence that ends there and all prefixes longer by a word.",
        "Jelinek and Lafferty 1991",
        "identity",
        prefix_probability,
        {"unending": True},
        "no sentence ends",
        seeds=3,
    ),
    make_claim(
        "span-frequency",
        "A node is as frequent in sentences sampled of a given length as its posterior with all words summed out.",
        SOURCE,
        "equality",
        span_frequency,
        {"other": True},
        "sampled from another grammar",
        tolerance=0.02,
    ),
    make_claim(
        "sampled-trees",
        "Trees of sentences sampled of a given length have the probabilities of the derivations of that length.",
        SOURCE,
        "bound",
        sampled_trees,
        {"other": True},
        "sampled from another grammar",
        seeds=3,
    ),
    make_claim(
        "sampled-words",
        "Words of sentences sampled of a given length have the posteriors with all words summed out.",
        SOURCE,
        "bound",
        sampled_words,
        {"other": True},
        "sampled from another grammar",
        seeds=3,
    ),
    make_claim(
        "trees-of-a-sentence",
        "Trees drawn for a sentence have the probabilities of its derivations.",
        SOURCE,
        "bound",
        trees_of_a_sentence,
        {"unseen": True},
        "the words are not seen",
        seeds=2,
    ),
)
