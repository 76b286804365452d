r"""Inside recursion of a grammar given rule by rule, in probabilities scaled span by span.

Rules that share a pair of children share its sum over splits: with u pairs of nonterminals and R rules a sentence costs
about u t³ / 6 + R t² / 2 multiplications. Symbols are the first axis of the chart, so that taking the symbols of a list
of rules copies whole rows. Pairs with a preterminal have one split each, next to the word, and are kept apart.

Values and scales are those of ``dense``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.structure.chart import Recursion, padding
from jaxft.structure.dense import NEVER, Scaled, normalized, scaled_words
from jaxft.structure.pcfg import SparsePCFG, num_nonterminals
from jaxft.structure.semirings import FLOOR, MAX
from jaxft.structure.unary import unary_closure


class RuleGroup(NamedTuple):
    """The rules whose children are of two given kinds, with each pair of children listed once."""

    parent: Int[Array, "rules"]
    """Rising, so that rules of one parent are summed in a run."""
    pair: Int[Array, "rules"]
    """Which pair of children each rule has."""
    left: Int[Array, "pairs"]
    right: Int[Array, "pairs"]
    """Symbols of the pair, counted within their kind."""
    source: Int[Array, "rules"]
    """Number of the rule in the grammar."""


class SparseRules(NamedTuple):
    """The rules by kind of children: nonterminals (N) and preterminals (X), left one first."""

    nn: RuleGroup
    nx: RuleGroup
    xn: RuleGroup
    xx: RuleGroup


class SparseContext(NamedTuple):
    """What every combination sees; positions are padded behind the sentence."""

    rules: SparseRules
    weights: tuple[Array, ...]
    """Weights of the rules of each group: probabilities, or their logarithms for the best tree."""
    words: Float[Array, "q b t"]
    scale: Float[Array, "b t"]
    star: Float[Array, "s s"] | None
    """Chains of unary rules above a binary one."""


class Algebra(NamedTuple):
    """How weights are multiplied and added along an axis and by parent."""

    times: Callable[[Array, Array], Array]
    total: Callable[..., Array]
    by_parent: Callable[..., Array]


REAL = Algebra(jnp.multiply, jnp.sum, jax.ops.segment_sum)
TROPICAL = Algebra(jnp.add, jnp.max, jax.ops.segment_max)


def group_rules(grammar: SparsePCFG) -> SparseRules:
    """Sorts the rules by the kind of their children, and lists pairs of children once.

    Args:
      grammar: A grammar with concrete rule lists; their scores may be traced.

    Returns:
      The groups.

    Raises:
      UserError: The lists are traced, or of different lengths.
    """
    lists = grammar.lhs, grammar.left, grammar.right
    advice = "Pass the rule lists as constants; differentiate by log_rule alone"
    require(is_concrete(lists), "group_rules", "lists of rules must be concrete", "traced ones", advice)
    lhs, left, right = (np.asarray(x) for x in lists)
    s = num_nonterminals(grammar)

    def group(left_is_word: bool, right_is_word: bool) -> RuleGroup:
        (chosen,) = np.nonzero(((left >= s) == left_is_word) & ((right >= s) == right_is_word))
        chosen = chosen[np.argsort(lhs[chosen], kind="stable")]
        children = np.stack([left[chosen] - s * left_is_word, right[chosen] - s * right_is_word], axis=1)
        pairs, which = np.unique(children, axis=0, return_inverse=True)
        arrays = lhs[chosen], which.reshape(-1), pairs[:, 0], pairs[:, 1], chosen
        return RuleGroup(*(jnp.asarray(np.asarray(x, np.int32)) for x in arrays))

    return SparseRules(group(False, False), group(False, True), group(True, False), group(True, True))


def prepare(
    grammar: SparsePCFG, rules: SparseRules, log_terms: Float[Array, "b t q"], *, chunks: int
) -> tuple[SparseContext, Scaled]:
    """Context and values of width 1; differentiable in the scores of the grammar and in ``log_terms``.

    Args:
      grammar: The grammar.
      rules: Its rules, grouped.
      log_terms: Log score of each preterminal at each word.
      chunks: Chunks of widths that the chart will have.

    Returns:
      The context, and (p, s) of single words, p ``[s, b, t]``: what nonterminals make of them by unary chains.
    """
    words, scale = scaled_words(log_terms)
    words = jnp.moveaxis(words, 2, 0)
    star = None
    leaves = jnp.zeros((num_nonterminals(grammar), *scale.shape), words.dtype), jnp.full_like(scale, NEVER)
    if grammar.log_unary is not None:
        closure = unary_closure(grammar.log_unary)
        star = closure.star
        leaves = normalized(jnp.einsum("sq,qbt->sbt", closure.to_preterminal, words, precision="highest"), scale, 0)
    weights = tuple(jnp.exp(grammar.log_rule[group.source]) for group in rules)
    spare = padding(log_terms.shape[1], chunks)
    words = jnp.pad(words, [(0, 0), (0, 0), (0, spare)])
    scale = jnp.pad(scale, [(0, 0), (0, spare)], constant_values=NEVER)
    return SparseContext(rules, weights, words, scale, star), leaves


def combine(context: SparseContext, left: Scaled, right: Scaled, width: Int[Array, ""]) -> Scaled:
    """Values of the spans of a width."""
    weights, base = _weights(context, left[1], right[1], width)
    return normalized(_sums(context, left[0], right[0], width, weights), base, 0)


def pull(context, left, right, width, out, cotangent):
    """Cotangents of context and children, without forming the sums again."""
    weights, base = _weights(context, left[1], right[1], width)
    possible = out[1] > NEVER / 2
    factor = jnp.where(possible, jnp.exp(jnp.where(possible, base - out[1], 0)), 0)
    _, transpose = jax.vjp(lambda c, x, y: _sums(c, x, y, width, weights), context, left[0], right[0])
    d_context, d_left, d_right = transpose(cotangent[0] * factor[None])
    return d_context, (d_left, jnp.zeros_like(left[1])), (d_right, jnp.zeros_like(right[1]))


RECURSION = Recursion(combine, zero=(0.0, NEVER), axis=-1, pull=pull)


def _weights(
    context: SparseContext, left: Float[Array, "b m k"], right: Float[Array, "b m k"], width: Int[Array, ""]
) -> tuple[tuple[Array, ...], Array]:
    """Relative weight of each way to split a span, and the common scale; constants of differentiation."""
    left, right, scale = jax.lax.stop_gradient((left, right, context.scale))
    starts = left.shape[1]
    first, last = scale[:, :starts], jax.lax.dynamic_slice_in_dim(scale, width - 1, starts, 1)
    ways = (
        left + right,
        (jnp.take(left, width - 2, axis=2) + last)[:, :, None],
        (first + right[:, :, 0])[:, :, None],
        jnp.where(width == 2, first + last, 2 * NEVER)[:, :, None],
    )
    base = jnp.concatenate(ways, axis=2).max(axis=2)
    return tuple(jnp.exp(way - base[:, :, None]) for way in ways), base


def _sums(
    context: SparseContext, left: Float[Array, "s b m k"], right: Float[Array, "s b m k"], width: Array, weights
) -> Float[Array, "s b m"]:
    """Inside probabilities over the common scale."""
    m = left.shape[2]
    split, word_right, word_left, pair = weights
    first, last = context.words[:, :, :m], jax.lax.dynamic_slice_in_dim(context.words, width - 1, m, 2)
    longest, rest = jnp.take(left, width - 2, axis=3), right[..., 0]
    children = (
        (left * split[None], right),
        (longest * word_right[None, ..., 0], last),
        (first, rest * word_left[None, ..., 0]),
        (first * pair[None, ..., 0], last),
    )
    total = sum_rules(context, children, left.shape[0], REAL)
    if context.star is None:
        return total
    return jnp.einsum("sd,dbm->sbm", context.star, total, precision="highest")


def prepare_best(
    grammar: SparsePCFG, rules: SparseRules, log_terms: Float[Array, "b t q"], *, chunks: int
) -> tuple[SparseContext, tuple[Array]]:
    """As ``prepare``, for the scores of best trees: everything in log space, scales 0."""
    floor = jnp.asarray(FLOOR, log_terms.dtype)
    words = jnp.moveaxis(jnp.maximum(log_terms, floor), 2, 0)
    star, leaf = None, jnp.full((num_nonterminals(grammar), *log_terms.shape[:2]), floor)
    if grammar.log_unary is not None:
        s = num_nonterminals(grammar)
        (star,) = MAX.star((jnp.maximum(grammar.log_unary[:, :s], floor),))  # pyright: ignore[reportOptionalCall]
        below = (star[:, :, None] + jnp.maximum(grammar.log_unary[:, s:], floor)[None]).max(axis=1)
        leaf = jnp.maximum((below[:, :, None, None] + words[None]).max(axis=1), floor)
    weights = tuple(jnp.maximum(grammar.log_rule[group.source], floor) for group in rules)
    words = jnp.pad(words, [(0, 0), (0, 0), (0, padding(log_terms.shape[1], chunks))], constant_values=FLOOR)
    return SparseContext(rules, weights, words, jnp.zeros_like(words[0]), star), (leaf,)


def combine_best(
    context: SparseContext, left: tuple[Array], right: tuple[Array], width: Int[Array, ""]
) -> tuple[Array]:
    """Scores of the best trees of the spans of a width."""
    s, _, m, _ = left[0].shape
    first, last = context.words[:, :, :m], jax.lax.dynamic_slice_in_dim(context.words, width - 1, m, 2)
    longest, rest = jnp.take(left[0], width - 2, axis=3), right[0][..., 0]
    pair = jnp.where(width == 2, first, jnp.asarray(FLOOR, first.dtype))
    best = sum_rules(context, ((left[0], right[0]), (longest, last), (first, rest), (pair, last)), s, TROPICAL)
    if context.star is not None:
        best = (context.star[:, :, None, None] + best[None]).max(axis=1)
    return (jnp.maximum(best, jnp.asarray(FLOOR, best.dtype)),)


BEST = Recursion(combine_best, zero=(FLOOR,), axis=-1)


def sum_rules(context: SparseContext, children, parents: int, algebra: Algebra) -> Float[Array, "s b m"]:
    """What all rules make of the children of each kind, by parent; pairs of nonterminals have an axis of splits."""
    found = []
    for group, weights, (left, right) in zip(context.rules, context.weights, children, strict=True):
        pairs = algebra.times(jnp.take(left, group.left, axis=0), jnp.take(right, group.right, axis=0))
        pairs = algebra.total(pairs, axis=3) if pairs.ndim == 4 else pairs
        weighted = algebra.times(weights[:, None, None], jnp.take(pairs, group.pair, axis=0))
        found.append(algebra.by_parent(weighted, group.parent, num_segments=parents, indices_are_sorted=True))
    return algebra.total(jnp.stack(found), axis=0)
