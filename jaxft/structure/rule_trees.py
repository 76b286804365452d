r"""Labelled binary trees weighted by the rules of a grammar, in any semiring.

The reference for the faster routes, and the way to the best tree, to counts and to expectations:

$$ x_A(i, j) = \bigoplus_{B, C} r_{A \to BC} \otimes \bigoplus_k x_B(i, k) \otimes x_C(k, j) $$

with all sums in the semiring: in ``LOG`` nothing underflows, whatever the range of the probabilities.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxft.core.checks import require
from jaxft.structure.chart import Recursion, padding, span_chart
from jaxft.structure.semirings import Element, Semiring, zeros


class RuleContext(NamedTuple):
    """Elements of the rules, and of what they make of single words; positions are padded behind the sentence."""

    rule: Element
    """[s, s, s]: A -> B C of nonterminals, unary chains above included."""
    word_right: Element
    """[b, t, s, s] at [j, A, B]: A -> B X with X the word j."""
    word_left: Element
    """[b, t, s, s] at [i, A, C]: A -> X C with X the word i."""
    pair: Element
    """[b, t, s] at [i, A]: A -> X Y with the words i and i + 1."""


def rule_trees(
    semiring: Semiring, rule: Element, words: Element, unary: Element | None = None, *, chunks: int
) -> Element:
    """Totals of all trees over every span, by its label.

    Args:
      semiring: What is summed.
      rule: Element of each rule A -> B C, ``[s, a, a]``.
      words: Element of each preterminal at each word, ``[b, t, q]``.
      unary: Element of each rule A -> B, ``[s, a]``; chains of any length are closed.
      chunks: Chunks of widths of the chart.

    Returns:
      Elements ``[b, t, t + 1, s]`` by start and width.

    Raises:
      UserError: Unary rules in a semiring without closure.
    """
    context, leaves = prepare(semiring, rule, words, unary, chunks=chunks)
    return span_chart(make_recursion(semiring), context, leaves, chunks=chunks)


def prepare(
    semiring: Semiring, rule: Element, words: Element, unary: Element | None, *, chunks: int
) -> tuple[RuleContext, Element]:
    """Context and values of width 1, as ``rule_trees``."""
    s, (b, t, _) = rule[0].shape[0], words[0].shape[:3]
    leaves = zeros(semiring, (b, t, s), rule[0].dtype)
    if unary is not None:
        star = _star(semiring, _sub(unary, slice(None), slice(0, s)))
        rule = _product(semiring, star, rule)
        chains = _product(semiring, star, _sub(unary, slice(None), slice(s, None)))
        leaves = _apply(semiring, _map(chains, lambda x: x[None, None]), _map(words, lambda x: x[:, :, None]), 3)
    whole, upto, rest = slice(None), slice(0, s), slice(s, None)
    word = _map(words, lambda x: x[:, :, None, None])
    right_rules = _map(_sub(rule, whole, upto, rest), lambda x: x[None, None])
    left_rules = _map(_sub(rule, whole, rest, upto), lambda x: jnp.moveaxis(x, 1, 2)[None, None])
    both_rules = _map(_sub(rule, whole, rest, rest), lambda x: jnp.moveaxis(x, 1, 2)[None, None])
    word_right = _apply(semiring, right_rules, word, 4)
    word_left = _apply(semiring, left_rules, word, 4)
    first = _apply(semiring, both_rules, word, 4)  # [b, t, s, q]: the rules with the left word, for each right one
    gone = zeros(semiring, (b, 1, words[0].shape[2]), rule[0].dtype)
    after = tuple(jnp.concatenate([x[:, 1:], z], axis=1) for x, z in zip(words, gone, strict=True))
    pair = _apply(semiring, first, _map(after, lambda x: x[:, :, None]), 3)
    spare = padding(t, chunks)
    return RuleContext(
        rule=_sub(rule, whole, upto, upto),
        **{
            name: _padded(semiring, x, spare)
            for name, x in {"word_right": word_right, "word_left": word_left, "pair": pair}.items()
        },
    ), leaves


@functools.cache
def make_recursion(semiring: Semiring) -> Recursion:
    """The recursion of a semiring; one object each, so that programs are compiled once."""

    def combine(context: RuleContext, left: Element, right: Element, width: Int[Array, ""]) -> Element:
        starts = left[0].shape[1]
        # The sum over splits first: the rules then see each span once.
        pairs = semiring.total(
            semiring.times(_map(left, lambda x: x[:, :, :, :, None]), _map(right, lambda x: x[:, :, :, None])), 2
        )

        def of_parent(rule: Element) -> Element:
            weighted = semiring.times(_map(rule, lambda x: x[None, None]), pairs)
            return semiring.total(semiring.total(weighted, 3), 2)

        # A parent at a time: all at once would hold s³ numbers a span.
        inner = _map(jax.lax.map(jax.checkpoint(of_parent), context.rule), lambda x: jnp.moveaxis(x, 0, 2))
        last = _map(context.word_right, lambda x: jax.lax.dynamic_slice_in_dim(x, width - 1, starts, 1))
        longest = _map(left, lambda x: jnp.take(x, width - 2, axis=2))
        ends_in_word = _apply(semiring, last, _map(longest, lambda x: x[:, :, None]), 3)
        first = _map(context.word_left, lambda x: x[:, :starts])
        starts_with_word = _apply(semiring, first, _map(right, lambda x: x[:, :, 0][:, :, None]), 3)
        none = zeros(semiring, (1, 1, 1), left[0].dtype)
        pair = tuple(jnp.where(width == 2, x[:, :starts], z) for x, z in zip(context.pair, none, strict=True))
        ways = (inner, ends_in_word, starts_with_word, pair)
        return semiring.total(tuple(jnp.stack(parts, axis=3) for parts in zip(*ways, strict=True)), 3)

    return Recursion(combine, semiring.zero)


def _star(semiring: Semiring, steps: Element) -> Element:
    rule = "unary rules need a semiring with a closure"
    require(semiring.star is not None, "rule_trees", rule, semiring.name, "Collapse unary chains into labels")
    return semiring.star(steps)  # pyright: ignore[reportOptionalCall]


def _product(semiring: Semiring, matrix: Element, other: Element) -> Element:
    """The matrix product [s, s] x [s, ...] in the semiring."""
    extra = other[0].ndim - 1 - (semiring.k is not None)
    wide = _map(matrix, lambda x: x.reshape(x.shape[:2] + (1,) * extra + x.shape[2:]))
    return _apply(semiring, wide, _map(other, lambda x: x[None]), 1)


def _apply(semiring: Semiring, x: Element, y: Element, axis: int) -> Element:
    """The sum along an axis of products."""
    return semiring.total(semiring.times(x, y), axis)


def _sub(x: Element, *index: slice) -> Element:
    return tuple(part[index] for part in x)


def _map(x: Element, change) -> Element:
    return tuple(change(part) for part in x)


def _padded(semiring: Semiring, x: Element, spare: int) -> Element:
    def pad(part: Array, fill: float) -> Array:
        return jnp.pad(part, [(0, 0), (0, spare), *[(0, 0)] * (part.ndim - 2)], constant_values=fill)

    return tuple(pad(part, fill) for part, fill in zip(x, semiring.zero, strict=True))
