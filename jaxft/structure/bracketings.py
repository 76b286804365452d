"""Binary bracketings of a sentence weighted span by span, without symbols: in any semiring, and the best of them."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import require
from jaxft.structure.chart import Recursion, by_ends, require_lengths, span_chart
from jaxft.structure.parses import Parses
from jaxft.structure.semirings import LOG, MAX, Element, Semiring, as_element, log_weight, zeros


def bracketing_chart(
    log_scores: Float[Array, "b t ends"], *, semiring: Semiring = LOG, values: Float[Array, "b t ends"] | None = None
) -> Element:
    r"""Totals over all binary bracketings of every span: $x_{ij} = s_{ij} \otimes \bigoplus_k x_{ik} \otimes x_{kj}$.

    The weight of a tree is the product over its spans, single words and the whole included.

    Args:
      log_scores: Log weight of the span [i, j) at ``[b, i, j]``, with j from 0 to t.
      semiring: What is summed.
      values: Additive value of each span, for ``EXPECTATION``.

    Returns:
      Elements of the shape of ``log_scores``; zero where j <= i.

    Raises:
      UserError: The last axis is not one longer than that of starts.

    Example:
      >>> (log_z,) = bracketing_chart(jnp.zeros((1, 4, 5)))  # five trees of four words
      >>> round(float(jnp.exp(log_z[0, 0, 4])), 4)
      5.0

    Reference:
      The tree CRF of Zhang, Zhou and Li 2020, Fast and accurate neural CRF constituency parsing, section 3.
    """
    t, ends = log_scores.shape[1:]
    rule = "scores must be [b, t, t + 1], by start and end"
    require(ends == t + 1, "bracketing_chart", rule, log_scores.shape, "Give ends an axis of t + 1")
    # The floor is finite inside a chart, so that what is impossible has gradient 0.
    element = as_element(semiring, log_scores, values)
    by_width = tuple(_by_width(x) for x in element)
    leaves = tuple(x[:, :, 1] for x in by_width)
    chart = span_chart(_recursion(semiring), by_width, leaves)
    empty = zeros(semiring, (1,) * log_scores.ndim, log_scores.dtype)
    inside = (jnp.arange(t + 1)[None] > jnp.arange(t)[:, None])[None]
    inside = inside if semiring.k is None else inside[..., None]
    return tuple(jnp.where(inside, by_ends(x), z) for x, z in zip(chart, empty, strict=True))


def _by_width(scores: Array) -> Array:
    """From ends to widths; spans that leave the sentence get any score, since their children are impossible."""
    t = scores.shape[1]
    ends = jnp.minimum(jnp.arange(t)[:, None] + jnp.arange(t + 1)[None], t)
    return jnp.take_along_axis(scores, ends.reshape(1, t, t + 1, *(1,) * (scores.ndim - 3)), axis=2)


@functools.cache
def _recursion(semiring: Semiring) -> Recursion:
    """One a semiring, so that programs are compiled once."""

    def combine(scores: Element, left: Element, right: Element, width: Int[Array, ""]) -> Element:
        merged = semiring.total(semiring.times(left, right), 2)
        starts = left[0].shape[1]
        here = tuple(jnp.take(x[:, :starts], width, axis=2) for x in scores)
        return semiring.times(here, merged)

    return Recursion(combine, semiring.zero)


def best_bracketing(
    scores: Float[Array, "b t ends"], lengths: Int[Array, "b"] | None = None
) -> tuple[Parses, Bool[Array, "b"]]:
    """The binary tree of greatest summed span score; with ties, the one whose left parts are shortest.

    Args:
      scores: Score of each span, added over the spans of a tree: any finite numbers, or minus infinity for a span that
        is forbidden.
      lengths: Words of each sentence; ``None`` means all.

    Returns:
      The trees, with label 0 everywhere, and whether there is one that is allowed.

    Raises:
      UserError: The scores have another shape, or lengths do not fit them.

    Example:
      >>> scores = jnp.zeros((1, 3, 4)).at[0, 1, 3].set(1.0)
      >>> best_bracketing(scores)[0].spans[0].tolist()
      [[0, 3], [0, 1], [1, 3], [1, 2], [2, 3]]
    """
    where, shape = "best_bracketing", scores.shape
    fits = scores.ndim == 3 and shape[2] == shape[1] + 1
    require(fits, where, "scores must be [b, t, t + 1], by start and end", shape, "Give ends an axis of t + 1")
    b, t, _ = shape
    require_lengths(where, lengths, b, t)
    lengths = jnp.full(b, t, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    return _best_bracketing(scores, lengths)


@jax.jit
def _best_bracketing(scores: Array, lengths: Array) -> tuple[Parses, Array]:
    (best,) = bracketing_chart(scores, semiring=MAX)
    total = jnp.take_along_axis(best[:, 0], lengths[:, None], axis=1)[:, 0]
    spans, valid = jax.vmap(_trace)(best, lengths)
    score = log_weight(MAX, (total,))
    return Parses(spans, jnp.where(valid, 0, -1), valid, score), score > -jnp.inf


def _trace(best: Float[Array, "t ends"], length: Int[Array, ""]) -> tuple[Int[Array, "nodes 2"], Bool[Array, "nodes"]]:
    """Splits from the root down, in pre-order, by a stack of spans yet to be visited."""
    t = best.shape[0]
    after = jnp.concatenate([best, jnp.full((1, t + 1), 2 * MAX.zero[0], best.dtype)])

    def visit(stack, _):
        nodes, size = stack
        i, j = nodes[jnp.maximum(size - 1, 0)]
        later = jnp.arange(t + 1, dtype=jnp.int32) > i
        k = jnp.argmax(jnp.where(later, best[i] + after[:, j], 2 * MAX.zero[0])).astype(jnp.int32)
        inner, there = j - i > 1, size > 0
        pushed = nodes.at[size - 1].set(jnp.stack([k, j])).at[size].set(jnp.stack([i, k]))
        nodes = jnp.where(there & inner, pushed, nodes)
        size = jnp.where(there, jnp.where(inner, size + 1, size - 1), 0)
        return (nodes, size), (jnp.where(there, jnp.stack([i, j]), 0), there)

    first = jnp.zeros((t + 1, 2), jnp.int32).at[0, 1].set(length)
    _, (spans, valid) = jax.lax.scan(visit, (first, (length > 0).astype(jnp.int32)), None, length=2 * t - 1)
    return spans, valid
