"""Trees of given sentences from the top down: the most probable one, and samples from the posterior.

A filled chart says how good each way to split a node is; from the root down, one is taken for each node: the best, or
one drawn in proportion. The chart is the same recursion in two semirings (``semirings``).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.structure import rule_trees, sparse
from jaxft.structure.chart import by_ends, default_chunks, span_chart
from jaxft.structure.inside_outside import Words, inside, word_scores
from jaxft.structure.parses import Parses
from jaxft.structure.pcfg import PCFG, Grammar, SparsePCFG, merge_rules, num_nonterminals, to_dense, to_sparse
from jaxft.structure.routes import explain
from jaxft.structure.semirings import FLOOR, LOG, MAX, Semiring, as_element


class Choices(NamedTuple):
    """Log scores of everything that a node may become."""

    symbols: Float[Array, "b t ends a"]
    """Of each symbol at each span: inside, or of the best tree."""
    log_root: Float[Array, "a"]
    grammar: PCFG | SparsePCFG
    star: Float[Array, "s s"] | None
    """Of chains of unary rules between nonterminals."""
    to_preterminal: Float[Array, "s q"] | None


def viterbi(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
) -> Parses:
    r"""The most probable tree of each sentence, $\operatorname{argmax}_T P(T, w)$.

    Of a closed chain of unary rules the parse holds the top and the bottom symbol; its score is that of the best chain.

    Args:
      grammar: The grammar.
      words: Word numbers ``[b, t]``, or log scores of preterminals ``[b, t, q]``.
      lengths: Words of each sentence; ``None`` means all.
      mask: Positions whose word is summed out.

    Returns:
      The trees, with their log probability as score; without a parse the score is minus infinity and no node is valid.

    Raises:
      UserError: As ``inside``.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> parses = viterbi(random_pcfg(jax.random.key(0), 1, 2, 3), jnp.array([[0, 1, 2]]))
      >>> parses.spans[0, 0].tolist(), int(parses.valid.sum())
      ([0, 3], 5)

    Reference:
      Jelinek, Lafferty and Mercer 1992, Basic methods of probabilistic context free grammars, section 4.
    """
    grammar, log_terms, lengths = _ready(grammar, words, lengths, mask)
    nonterminals = best_scores(grammar, log_terms)
    choices = _choices(grammar, nonterminals, log_terms, MAX)
    keys = jnp.zeros((len(lengths), 2), jnp.uint32)
    return _derive(choices, lengths, keys, False)


def sample_trees(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    key: Array,
    mask: Bool[Array, "b t"] | None = None,
) -> Parses:
    r"""One exact sample of $P(T \mid w)$ for each sentence; repeat a sentence in the batch for more.

    Args:
      grammar: The grammar.
      words: As ``viterbi``.
      lengths: As ``viterbi``.
      key: Random key.
      mask: As ``viterbi``.

    Returns:
      The trees; the score is the log probability of the sentence.

    Raises:
      UserError: As ``inside``.
    """
    grammar, log_terms, lengths = _ready(grammar, words, lengths, mask)
    choices = _choices(grammar, inside(grammar, log_terms, lengths).log_alpha(), log_terms, LOG)
    keys = jax.random.key_data(jax.random.split(key, len(lengths)))
    return _derive(choices, lengths, keys, True)


def best_scores(grammar: PCFG | SparsePCFG, log_terms: Float[Array, "b t q"]) -> Float[Array, "b t ends s"]:
    """Log score of the best tree of each nonterminal over each span, by start and end; minus infinity: none.

    Args:
      grammar: Dense or sparse.
      log_terms: Log score of each preterminal at each word.

    Returns:
      The scores.
    """
    groups = sparse.group_rules(grammar) if isinstance(grammar, SparsePCFG) else None
    return _best_scores(grammar, groups, log_terms)


@jax.jit
def _best_scores(grammar: PCFG | SparsePCFG, groups: sparse.SparseRules | None, log_terms: Array) -> Array:
    chunks = default_chunks(log_terms.shape[1])
    if isinstance(grammar, SparsePCFG) and groups is not None:
        context, leaves = sparse.prepare_best(grammar, groups, log_terms, chunks=chunks)
        (chart,) = span_chart(sparse.BEST, context, leaves, chunks=chunks)
        chart = jnp.moveaxis(chart, 0, 3)
    else:
        grammar = to_dense(grammar)
        rule, words = as_element(MAX, grammar.log_rule), as_element(MAX, log_terms)
        unary = None if grammar.log_unary is None else as_element(MAX, grammar.log_unary)
        (chart,) = rule_trees.rule_trees(MAX, rule, words, unary, chunks=chunks)
    t = chart.shape[1]
    spans = (jnp.arange(t + 1)[None] > jnp.arange(t)[:, None])[None, :, :, None]
    return jnp.where(spans, by_ends(jnp.where(chart > FLOOR / 2, chart, -jnp.inf)), -jnp.inf)


def _ready(
    grammar: Grammar, words: Words, lengths: Array | None, mask: Array | None
) -> tuple[PCFG | SparsePCFG, Array, Array]:
    """The grammar as sparse or dense, whichever is to be taken; log scores of words; lengths."""
    log_terms = word_scores(grammar, words, lengths, mask=mask)
    b, t = log_terms.shape[:2]
    method = explain(grammar, batch=b, tokens=t).method
    grammar = merge_rules(to_sparse(grammar)) if method == "sparse" else to_dense(grammar)
    return grammar, log_terms, jnp.full(b, t, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)


def _choices(grammar: PCFG | SparsePCFG, nonterminals: Array, log_terms: Array, semiring: Semiring) -> Choices:
    s, t = num_nonterminals(grammar), log_terms.shape[1]
    empty = jnp.full((*nonterminals.shape[:3], log_terms.shape[2]), -jnp.inf, log_terms.dtype)
    position = jnp.arange(t)
    preterminals = empty.at[:, position, position + 1].set(log_terms)
    symbols = jnp.maximum(jnp.concatenate([nonterminals, preterminals], axis=3), FLOOR)
    if grammar.log_unary is None:
        return Choices(symbols, grammar.log_root, grammar, None, None)
    (star,) = semiring.star(as_element(semiring, grammar.log_unary[:, :s]))  # pyright: ignore[reportOptionalCall]
    last = as_element(semiring, grammar.log_unary[:, s:])[0]
    (down,) = semiring.total((star[:, :, None] + last[None],), 1)
    return Choices(symbols, grammar.log_root, grammar, star, down)


class _Chooser(NamedTuple):
    """Takes one of several log scores: the best (``MAX``), or one in proportion (``LOG``)."""

    semiring: Semiring
    key: Array

    def __call__(self, scores: Array, index: Array) -> Array:
        if self.semiring is MAX:
            return jnp.argmax(scores.ravel()).astype(jnp.int32)
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key), index)
        return jax.random.categorical(key, scores.ravel()).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="draw")
def _derive(choices: Choices, lengths: Array, keys: Array, draw: bool) -> Parses:
    derive = functools.partial(_derive_one, choices, draw)
    spans, tops, bottoms, valid, score = jax.vmap(derive)(choices.symbols, lengths, keys)
    return Parses(spans, tops, valid, score, bottoms)


def _derive_one(choices: Choices, draw: bool, symbols: Array, length: Array, key: Array):
    """Nodes in pre-order, by a stack of nodes yet to be visited: (symbol, start, end)."""
    t, choose = symbols.shape[0], _Chooser(LOG if draw else MAX, key)
    whole = jnp.where(length > 0, symbols[0, length], FLOOR) + jnp.maximum(choices.log_root, FLOOR)
    (score,) = choose.semiring.total((whole,), 0)
    possible = score > FLOOR / 2
    # Behind the last start there is nothing.
    padded = jnp.concatenate([symbols, jnp.full((1, *symbols.shape[1:]), FLOOR, symbols.dtype)])

    def visit(state, index):
        stack, size = state
        there = size > 0
        symbol, i, j = stack[jnp.maximum(size - 1, 0)]
        k, left, right, bottom = _split(choices, choose, padded, symbol, i, j, 3 * index)
        lowest = _lowest(choices, choose, padded, symbol, i, 3 * index + 2)
        inner = j - i > 1
        grown = stack.at[size - 1].set(jnp.stack([right, k, j])).at[size].set(jnp.stack([left, i, k]))
        stack = jnp.where(there & inner, grown, stack)
        size = jnp.where(there, jnp.where(inner, size + 1, size - 1), 0)
        node = jnp.stack([symbol, jnp.where(inner, bottom, lowest), i, j])
        return (stack, size), (jnp.where(there, node, jnp.array([-1, -1, 0, 0], jnp.int32)), there)

    root = choose(whole, jnp.int32(6 * t))
    stack = jnp.zeros((t + 1, 3), jnp.int32).at[0].set(jnp.stack([root, jnp.int32(0), length]))
    first = stack, jnp.where(possible, 1, 0).astype(jnp.int32)
    _, (nodes, valid) = jax.lax.scan(visit, first, jnp.arange(2 * t - 1, dtype=jnp.int32))
    return nodes[:, 2:], nodes[:, 0], nodes[:, 1], valid, jnp.where(possible, score, -jnp.inf)


def _split(choices: Choices, choose: _Chooser, padded: Array, symbol: Array, i: Array, j: Array, index: Array):
    """Split point, children and lowest symbol of a node of two words or more."""
    grammar, a = choices.grammar, padded.shape[2]
    before, after = padded[i], padded[:, j]  # [ends, a]: what can end, and start, at each k
    s = choices.log_root.shape[0] - grammar.log_emit.shape[0]
    parent = jnp.minimum(symbol, s - 1)
    if choices.star is None:
        chain = jnp.where(jnp.arange(s, dtype=jnp.int32) == parent, 0.0, FLOOR).astype(padded.dtype)
    else:
        chain = choices.star[parent]
    if isinstance(grammar, SparsePCFG):
        if not len(grammar.lhs):  # every sentence is one word: no node is split
            return i, parent, parent, parent
        rule = chain[grammar.lhs] + jnp.maximum(grammar.log_rule, FLOOR)
        scores = rule[None] + before[:, grammar.left] + after[:, grammar.right]
        which = choose(scores, index)
        k, number = which // len(rule), which % len(rule)
        return k, grammar.left[number], grammar.right[number], grammar.lhs[number]
    rules = jnp.maximum(grammar.log_rule, FLOOR)
    if choices.star is None:
        closed = rules[parent]
    else:  # any chain above the rule
        over = chain[:, None, None] + rules
        (closed,) = choose.semiring.total((over,), 0)
    which = choose(closed[None] + before[:, :, None] + after[:, None, :], index)
    k, left, right = which // (a * a), which // a % a, which % a
    bottom = choose(chain + rules[:, left, right], index + 1) if choices.star is not None else parent
    return k, left, right, bottom


def _lowest(choices: Choices, choose: _Chooser, padded: Array, symbol: Array, i: Array, index: Array) -> Array:
    """The preterminal of a node of one word."""
    if choices.to_preterminal is None:
        return symbol
    s = choices.to_preterminal.shape[0]
    words = padded[i, i + 1, s:]
    below = choose(choices.to_preterminal[jnp.minimum(symbol, s - 1)] + words, index)
    return jnp.where(symbol < s, s + below, symbol)
