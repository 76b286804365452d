"""Moves in the space of parameters that edit whole hidden units: rows (incoming) and columns (outgoing weights)."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.types import Params
from jaxft.core.units import UnitAxis, map_named_leaves, named_leaves
from jaxft.geometry.unit_chain import ChainLeaf, UnitChain

MoveKind = Literal["top", "dead", "switch"]
"""``top``: the outputs are linear in what moves, so that a convex loss stays below its chord. ``dead``: the rows of
units that no live unit reads change. ``switch``: outgoing weights go from a unit to its copy. The last two leave the
function as it is."""

Positions = Int[np.ndarray, "_"]
"""Indices of units of a group."""

NOTHING = -1
"""Source of a row or column that becomes 0."""


class Rows(NamedTuple):
    """Rows of a layer that are written, and the row that each is taken from (``NOTHING`` for 0)."""

    write: Bool[np.ndarray, "units"]
    source: Int[np.ndarray, "units"]


class Columns(NamedTuple):
    """The column that each column is taken from (``NOTHING`` for 0), and a factor on all."""

    source: Int[np.ndarray, "units"]
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Move:
    """One straight segment: what is written at its end, by group of units."""

    kind: MoveKind
    rows: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, Columns] = dataclasses.field(default_factory=dict)
    from_start: bool = False
    """Whether values are those of the first point of the sequence rather than those of the point before the move."""


def take_to(count: int, target: Positions, source: Positions) -> Int[np.ndarray, "units"]:
    """Sources by unit: ``source[l]`` at ``target[l]``, ``NOTHING`` elsewhere.

    Example:
      >>> take_to(4, np.array([2, 3]), np.array([0, 1])).tolist()
      [-1, -1, 0, 1]
    """
    found = np.full(count, NOTHING)
    found[target] = source
    return found


def rows_to(count: int, target: Positions, source: Positions) -> Rows:
    """Rows ``target[l]`` become rows ``source[l]``; the others stay."""
    return Rows(np.isin(np.arange(count), target), take_to(count, target, source))


def zero_rows(count: int, kept: Positions) -> Rows:
    """All rows but ``kept`` become 0."""
    return Rows(~np.isin(np.arange(count), kept), np.full(count, NOTHING))


def moved_columns(count: int, target: Positions, source: Positions) -> Columns:
    """Columns ``source`` go to ``target``, whose own are lost; the others stay."""
    found = np.arange(count)
    found[source] = NOTHING
    found[target] = source
    return Columns(found)


def apply_move(params: Params, move: Move, chain: UnitChain, *, start: Params) -> Params:
    """The point at the end of a move.

    Args:
      params: The point before it.
      move: The move.
      chain: Layers of the network.
      start: First point of the sequence, of which a move with ``from_start`` takes its values.

    Returns:
      The point; leaves that the move does not touch are the same arrays.
    """
    origin = named_leaves(start if move.from_start else params)
    edits = {leaf.path: leaf for leaf in _touched(move, chain)}

    def edit(path: str, leaf: Any) -> Any:
        if path not in edits:
            return leaf
        produces, reads = edits[path].produces, edits[path].reads
        rows = move.rows.get(produces.units) if produces and move.kind == "dead" else None
        columns = move.columns.get(reads.units) if reads else None
        return _edit(leaf, origin[path], rows, columns, produces if rows else None, reads if columns else None)

    return map_named_leaves(edit, params)


def replay(params: Params, moves: Sequence[Move], chain: UnitChain) -> Iterator[Params]:
    """The points at the ends of moves that follow one another, one at a time; the first is ``params`` itself."""
    point = params
    yield point
    for move in moves:
        point = apply_move(point, move, chain, start=params)
        yield point


def _touched(move: Move, chain: UnitChain) -> list[ChainLeaf]:
    if move.kind == "dead":
        return [leaf for group in move.rows for leaf in chain.layers[group]]
    if move.kind == "top":
        return list(chain.top)
    return [leaf for group in move.columns for leaf in chain.readers[group]]


@functools.partial(jax.jit, static_argnames=("row_axis", "column_axis"))
def _edit(
    leaf: Array,
    origin: Array,
    rows: Rows | None,
    columns: Columns | None,
    row_axis: UnitAxis | None,
    column_axis: UnitAxis | None,
) -> Array:
    values = origin
    if columns is not None and column_axis is not None:
        values = _gather(values, columns.source, column_axis) * jnp.asarray(columns.scale, leaf.dtype)
    if rows is not None and row_axis is not None:
        write = along(rows.write, leaf.shape, row_axis)
        values = jnp.where(write, _gather(values, rows.source, row_axis), leaf)
    return values


def _gather(leaf: Array, source: Array | np.ndarray, axis: UnitAxis) -> Array:
    """Units of a leaf by their sources, 0 where there is none."""
    shape = leaf.shape
    units = leaf.reshape(*shape[: axis.axis], axis.outer, len(source), axis.inner, *shape[axis.axis + 1 :])
    taken = jnp.take(units, jnp.maximum(source, 0), axis=axis.axis + 1).reshape(shape)
    return jnp.where(along(source != NOTHING, shape, axis), taken, jnp.zeros((), leaf.dtype))


def along(
    values: Bool[Array | np.ndarray, "*l units"] | Float[Array | np.ndarray, "*l units"],
    shape: tuple[int, ...],
    axis: UnitAxis,
) -> Array:
    """Numbers of units laid along their axis of a leaf of ``shape``, and of size 1 along the axes that have no units.

    Example:
      >>> along(jnp.array([1.0, 2.0]), (3, 4), UnitAxis("hidden", 1, inner=2)).tolist()
      [[1.0, 1.0, 2.0, 2.0]]
    """
    values = jnp.asarray(values)
    stack = values.shape[:-1]
    block = jnp.broadcast_to(values[..., None, :, None], (*stack, axis.outer, values.shape[-1], axis.inner))
    sizes = [1] * len(shape)
    sizes[axis.axis] = shape[axis.axis]
    if axis.stacked:
        sizes[0] = shape[0]
    return block.reshape(sizes)
