r"""One recursion over the widths of spans, for everything that is computed bottom-up over binary trees.

A chart holds a value for every span $[i, i + w)$ of a sentence. Values of width 1 are given; those of width w come from
their splits, $x_{i,w} = f(c;\ x_{i,k},\ x_{i+k,w-k},\ k = 1 \dots w - 1)$, by a function ``combine`` that sees all
splits of all spans of one width at once. What a value is (scaled probabilities, a semiring's element, coordinates of
low rank) is the business of ``combine``; nothing here knows grammars.

Both children of the spans of one width are slices: left ones of a copy of the chart that is aligned by start, right
ones of a copy aligned by end. Widths are cut into chunks of static shape, each a ``lax.scan``.

The derivative is an explicit outside pass: widths are visited again from the top, and the splits of each are combined
again, so that only the chart itself is kept, O(t²) values, where differentiating the scan would keep the chart of
every step, O(t³).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxft.core.checks import is_concrete, require
from jaxft.core.trees import tree_add

Combine = Callable[[PyTree, PyTree, PyTree, Int[Array, ""]], PyTree]
"""``combine(context, left, right, width)``: from children with an axis of splits after that of starts to values."""

Pull = Callable[[PyTree, PyTree, PyTree, Int[Array, ""], PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]
"""``pull(context, left, right, width, out, cotangent)``: cotangents of context, left and right."""


class Recursion(NamedTuple):
    """How values of spans come from their splits. Hashable: functions that close over no array, and numbers."""

    combine: Combine
    zero: tuple[float, ...]
    """Value of an impossible span, a number for each leaf of a value; a split with an impossible child adds nothing."""
    axis: int = 1
    """Axis of the tokens in the leaves of the values of width 1; the axis of widths stands behind it."""
    pull: Pull | None = None
    """The derivative of ``combine``, where what ``jax.vjp`` makes of it does needless work."""
    finish: Callable[[PyTree, "Chart", PyTree], PyTree] | None = None
    """``finish(context, chart, d_values)``: cotangents of the context that cost less all at once than width by width:
    of these ``pull`` returns zeros, as ``finish`` does of the others."""


class Chart(NamedTuple):
    """Values of all spans, aligned by start: the axis of starts, then that of widths 0 to t (width 0 is impossible)."""

    values: PyTree
    by_end: PyTree
    """The same values by end j and ``t - width``: for the outside pass."""


def default_chunks(t: int) -> int:
    """Chunks of widths: more waste less work on padding, and take longer to compile."""
    return max(1, min(t // 10, 6))


def padding(t: int, chunks: int) -> int:
    """How far beyond the sentence a chunk looks: arrays of a context that are read by position need so many more."""
    return max((high - low for low, high in _bounds(t, chunks)), default=0)


def span_chart(recursion: Recursion, context: PyTree, leaves: PyTree, *, chunks: int | None = None) -> PyTree:
    """Values of all spans; differentiable in ``context`` and ``leaves`` by the outside pass.

    Args:
      recursion: What a value is and how it comes from its splits.
      context: Arrays that every combination sees, such as scores of rules.
      leaves: Values of width 1, with the axis of tokens at ``recursion.axis``.
      chunks: Chunks of widths; ``None`` means ``default_chunks``.

    Returns:
      Values with the axes of starts (t) and widths (t + 1) in place of the axis of tokens. Spans that leave the
      sentence are impossible.

    Raises:
      UserError: There is no token, or ``chunks`` is not positive.

    Example:
      >>> largest = Recursion(lambda c, x, y, w: (jnp.maximum(x[0], y[0]).max(axis=2),), zero=(0.0,))
      >>> values, = span_chart(largest, None, (jnp.array([[2.0, 5.0, 3.0]]),))
      >>> values[0, 0].tolist()  # the largest leaf of the spans that start at 0
      [0.0, 2.0, 5.0, 5.0]
    """
    t = jax.tree.leaves(leaves)[0].shape[recursion.axis]
    require(t >= 1, "span_chart", "there must be a token", "none", "Pass sentences of length 1 or more")
    chunks = default_chunks(t) if chunks is None else chunks
    require(chunks >= 1, "span_chart", "chunks must be positive", chunks, "Pass 1 or more")
    return _differentiable(recursion, chunks, context, leaves)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(recursion: Recursion, chunks: int, context: PyTree, leaves: PyTree) -> PyTree:
    return inside_pass(recursion, chunks, context, leaves).values


def _forward(recursion: Recursion, chunks: int, context: PyTree, leaves: PyTree) -> tuple[PyTree, Any]:
    chart = inside_pass(recursion, chunks, context, leaves)
    return chart.values, (context, chart)


def _backward(recursion: Recursion, chunks: int, residuals: Any, cotangent: PyTree) -> tuple[PyTree, PyTree]:
    context, chart = residuals
    d_context, d_values = outside_pass(recursion, chunks, context, chart, cotangent)
    return d_context, width_one(recursion, d_values)


_differentiable.defvjp(_forward, _backward)


def inside_pass(recursion: Recursion, chunks: int, context: PyTree, leaves: PyTree) -> Chart:
    """Fills a chart, width by width."""
    axis = recursion.axis
    t = jax.tree.leaves(leaves)[0].shape[axis]
    bounds = _bounds(t, chunks)
    spare = padding(t, chunks)
    zero = jax.tree.unflatten(jax.tree.structure(leaves), recursion.zero)

    def by_start(x: Array, fill: float) -> Array:
        empty = _with_axes(x, axis, (t, t + 1), fill)
        return jax.lax.dynamic_update_slice_in_dim(empty, _spread(x, axis), 1, _behind(axis, empty))

    def by_end(x: Array, fill: float) -> Array:
        empty = _with_axes(x, axis, (t + spare + 1, t + spare), fill)
        return _write(empty, _spread(x, axis), axis, 1, t - 1)

    carry = jax.tree.map(by_start, leaves, zero), jax.tree.map(by_end, leaves, zero)
    for low, high in bounds:
        starts, splits = t - low + 1, high - 1

        def step(carry, width, starts=starts, splits=splits):
            left, right = _children(carry, axis, starts, splits, width, t)
            new = recursion.combine(context, left, right, width)
            values = jax.tree.map(lambda x, y: _write(x, _spread(y, axis), axis, 0, width), carry[0], new)
            ends = jax.tree.map(lambda x, y: _write(x, _spread(y, axis), axis, width, t - width), carry[1], new)
            return (values, ends), None

        carry, _ = jax.lax.scan(step, carry, jnp.arange(low, high + 1, dtype=jnp.int32))
    return Chart(*carry)


def outside_pass(
    recursion: Recursion, chunks: int, context: PyTree, chart: Chart, cotangent: PyTree
) -> tuple[PyTree, PyTree]:
    """Propagates derivatives from the top: of a function of the chart's values, by ``context`` and by every value.

    Args:
      recursion: As in the inside pass.
      chunks: As in the inside pass.
      context: As in the inside pass.
      chart: The filled chart.
      cotangent: Direct derivative of the function by each value, as ``chart.values``.

    Returns:
      The derivative by ``context``, and the total derivative by each value (through the spans that contain it), as
      ``chart.values``.
    """
    axis = recursion.axis
    first = jax.tree.leaves(chart.values)[0]
    t = first.shape[_token_axis(axis, first)]
    pull = recursion.pull or partial(_pull_by_autodiff, recursion.combine)

    def total(d_values: PyTree, d_ends: PyTree, starts: int, width: Any) -> PyTree:
        """What the spans of a width received as left children and as right ones."""
        return jax.tree.map(lambda x, y: _received(x, y, axis, starts, width, t), d_values, d_ends)

    d_context = [jnp.zeros_like(x) for x in _floats(context, context)]
    d_values, d_ends = cotangent, jax.tree.map(jnp.zeros_like, chart.by_end)
    totals = []
    for low, high in reversed(_bounds(t, chunks)):
        starts, splits = t - low + 1, high - 1

        def step(carry, width, starts=starts, splits=splits):
            d_context, d_values, d_ends, d_out = carry
            left, right = _children(chart, axis, starts, splits, width, t)
            out = jax.tree.map(lambda x: _column(x, axis, starts, width), chart.values)
            d_more, d_left, d_right = pull(context, left, right, width, out, d_out)
            d_values = jax.tree.map(lambda x, y: _add(x, y, axis, 0, 1), d_values, d_left)
            d_ends = jax.tree.map(lambda x, y: _add(x, y, axis, width, t - width + 1), d_ends, d_right)
            # Read as soon as it is whole, so that nothing reads the arrays of a step before: they are updated in place.
            d_next = total(d_values, d_ends, starts, width - 1)
            return (tree_add(d_context, _floats(d_more, context)), d_values, d_ends, d_next), d_out

        carry = d_context, d_values, d_ends, total(d_values, d_ends, starts, high)
        carry, columns = jax.lax.scan(step, carry, jnp.arange(high, low - 1, -1, dtype=jnp.int32))
        d_context, d_values, d_ends, _ = carry
        totals.append((low, columns))
    totals.append((1, jax.tree.map(lambda x: x[None], total(d_values, d_ends, t, 1))))
    d_values = _from_columns(cotangent, totals, axis)
    if recursion.finish is not None:
        d_context = tree_add(d_context, _floats(recursion.finish(context, chart, d_values), context))
    return _with_floats(context, d_context), d_values


def _from_columns(values: PyTree, columns: list[tuple[int, PyTree]], axis: int) -> PyTree:
    """Values with the columns of widths from each number up; columns are stacked before all axes, the widest first."""

    def put(x: Array, y: Array, low: int) -> Array:
        return _write(x, jnp.moveaxis(y[::-1], 0, axis % (y.ndim - 1) + 1), axis, 0, low)

    for low, stacked in columns:
        values = jax.tree.map(partial(put, low=low), values, stacked)
    return values


def width_one(recursion: Recursion, values: PyTree) -> PyTree:
    """The values of single words: leaves of a chart, or their derivatives."""
    return jax.tree.map(lambda x: jnp.take(x, 1, axis=_behind(recursion.axis, x)), values)


def require_lengths(where: str, lengths: Any, b: int, t: int) -> None:
    """Raises unless there is one length a sentence and, where they are concrete, all fit the padding of t words."""
    if lengths is None:
        return
    shape = np.shape(lengths)
    require(shape == (b,), where, f"lengths must be [{b}], one a sentence", shape, "Count the words")
    if is_concrete(lengths) and b > 0:
        values = np.asarray(lengths)
        low, high = int(values.min()), int(values.max())
        require(low >= 0 and high <= t, where, f"lengths must lie in 0..{t}, the padding", f"{low}..{high}", "Pad more")


def by_ends(values: Array, *, axis: int = 1) -> Array:
    """A chart's array read by start and end: from the axes (start i, width) to (i, end j), with 0 where j <= i.

    Args:
      values: An array of a chart, axes of t starts and t + 1 widths among its own.
      axis: The axis of starts; that of widths stands behind it.

    Returns:
      The array with t + 1 ends in place of the widths.

    Example:
      >>> by_ends(jnp.array([[[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]]])).tolist()
      [[[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]]
    """
    t = values.shape[axis]
    width = jnp.arange(t + 1)[None] - jnp.arange(t)[:, None]
    shape = (1,) * axis + width.shape + (1,) * (values.ndim - axis - 2)
    taken = jnp.take_along_axis(values, jnp.maximum(width, 0).reshape(shape), axis=axis + 1)
    return jnp.where(width.reshape(shape) > 0, taken, jnp.zeros((), values.dtype))


def _bounds(t: int, chunks: int) -> list[tuple[int, int]]:
    """First and last width of each chunk, widths 2 to t."""
    chunks = min(chunks, max(t - 1, 1))
    edges = [2 + round((t - 1) * c / chunks) for c in range(chunks + 1)]
    return [(low, high - 1) for low, high in itertools.pairwise(edges) if high > low]


def _children(chart: Any, axis: int, starts: int, splits: int, width: Array, t: int) -> tuple[PyTree, PyTree]:
    """Left and right children of the spans of a width: the axis of starts, then that of splits."""
    values, ends = chart
    left = jax.tree.map(lambda x: _read(x, axis, 0, 1, starts, splits), values)
    return left, jax.tree.map(lambda x: _read(x, axis, width, t - width + 1, starts, splits), ends)


def _floats(tree: PyTree, context: PyTree) -> list[Array]:
    """The leaves of a tree that stand where the context has floats; indices have no derivative."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(context), strict=True)
    return [x for x, like in pairs if jnp.issubdtype(like.dtype, jnp.inexact)]


def _with_floats(context: PyTree, floats: list[Array]) -> PyTree:
    """A cotangent of the context: ``floats`` where it has floats, jax's empty ``float0`` elsewhere."""
    left = iter(floats)

    def fill(like: Array) -> Any:
        floating = jnp.issubdtype(like.dtype, jnp.inexact)
        return next(left) if floating else np.zeros(like.shape, jax.dtypes.float0)

    return jax.tree.map(fill, context)


def _pull_by_autodiff(combine: Combine, context, left, right, width, out, cotangent):
    del out
    return jax.vjp(lambda c, x, y: combine(c, x, y, width), context, left, right)[1](cotangent)


def _received(x: Array, y: Array, axis: int, starts: int, width: Any, t: int) -> Array:
    """Of one array: the values of a width, by start, and those of the same spans, by end."""
    both = _read(x, axis, 0, width, starts, 1) + _read(y, axis, width, t - width, starts, 1)
    return jnp.squeeze(both, _token_axis(axis, x) + 1)


def _behind(axis: int, x: Array) -> int:
    return axis % x.ndim + 1 if axis >= 0 else x.ndim - 1


def _spread(x: Array, axis: int) -> Array:
    """A new axis of size 1 behind that of tokens."""
    return jnp.expand_dims(x, axis % x.ndim + 1)


def _with_axes(x: Array, axis: int, sizes: tuple[int, int], fill: float) -> Array:
    at = axis % x.ndim
    return jnp.full(x.shape[:at] + sizes + x.shape[at + 1 :], fill, x.dtype)


def _token_axis(axis: int, x: Array) -> int:
    """The axis of starts in an array that has one of widths behind it."""
    return axis if axis >= 0 else x.ndim - 2


def _read(x: Array, axis: int, first: Any, second: Any, starts: int, splits: int) -> Array:
    """A block of the two chart axes."""
    at = _token_axis(axis, x)
    index = [jnp.int32(0)] * x.ndim
    index[at], index[at + 1] = jnp.int32(first), jnp.int32(second)
    sizes = list(x.shape)
    sizes[at], sizes[at + 1] = starts, splits
    return jax.lax.dynamic_slice(x, index, sizes)


def _write(x: Array, block: Array, axis: int, first: Any, second: Any) -> Array:
    at = _token_axis(axis, x)
    index = [jnp.int32(0)] * x.ndim
    index[at], index[at + 1] = jnp.int32(first), jnp.int32(second)
    return jax.lax.dynamic_update_slice(x, block, index)


def _add(x: Array, block: Array, axis: int, first: Any, second: Any) -> Array:
    at = _token_axis(axis, x)
    old = _read(x, axis, first, second, block.shape[at], block.shape[at + 1])
    return _write(x, old + block, axis, first, second)


def _column(x: Array, axis: int, starts: int, width: Any) -> Array:
    """The values of one width."""
    return jnp.squeeze(_read(x, axis, 0, width, starts, 1), _token_axis(axis, x) + 1)
