r"""Which route every leaf takes, in what blocks, and what that costs: decided from shapes, before anything is computed.

With n examples of a block against m, c outputs, r tokens of all uses, and a leaf of l matrices k x o:

========  ==================================================  ===================================
route     operations                                          numbers held an example
========  ==================================================  ===================================
whole     $2 n m c^2 lko$                                      $c\,lko$
tiled     $2 n m c^2 lko + 2 (n + m) r c\,lko$                   $l r (k + c o)$
ghost     $2 n m\, l r^2 (k + c^2 o + c^2)$                         $l r (k + c o)$
rows      as tiled, with k the rows read by the block           $l r (1 + c o)$
========  ==================================================  ===================================

each for one kernel; several share what is formed. All need one forward pass of every example, and a backward pass for
each output, which costs as much again (twice as much where gradients are kept whole).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.core.checks import UserError, message
from jaxft.core.factors import Tap
from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.contraction import KernelMaps, Route, scale_map
from jaxft.kernels.features import (
    EXAMPLES_AT_ONCE,
    UNROLLED,
    Matrix,
    first_example,
    leaf_matrix,
    named_leaves,
    taps_of,
)
from jaxft.kernels.preconditioners import RankOne

HELD_BYTES = 2**30
"""Of gradients and factors held at once, where nothing else is asked for."""

CPU_TILE = 2**17
"""Parameters of a tile on CPU: long enough for fast products, short enough that tiles are small beside features."""

ACCELERATOR_TILE = 2**18

ROWS_HELD_WHOLE = 8
"""A table of up to so many rows for every token is smaller whole than it is worth telling its rows apart."""


class LeafPlan(NamedTuple):
    """The route of one leaf."""

    name: str
    shape: tuple[int, ...]
    route: Route
    taps: tuple[tuple[str, Tap], ...]
    matrix: Matrix | None
    """``None`` where the gradient is whole."""
    rank: int
    """Tokens of all uses; 0 where the gradient is whole."""
    contraction_flops: float
    """Of one pair of examples: products of mapped tiles, or inner products of factors."""
    forming_flops: float
    """Of one example, each time that it meets a block."""
    held_bytes: int
    """An example."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call will do; printed, it is a table."""

    method: str
    """The one asked for, or what ``auto`` chose."""
    kernels: tuple[str, ...]
    leaves: tuple[LeafPlan, ...]
    n: int
    m: int
    c: int
    rows: int
    """Examples of a block of rows."""
    columns: int
    tile: int
    square: bool
    """Whether the columns are the rows."""
    symmetric: bool
    """Whether only blocks on and above the diagonal are computed."""
    forward_flops: float
    """Of one example, as XLA counts them (a loop once); 0 where the plan is not to be read."""
    accumulate_bytes: int

    @functools.cached_property
    def passes(self) -> tuple[float, float]:
        """How many examples' features are made: as rows, as columns."""
        if self.method == "ntvp":
            return 0.0, self.pairs / self.rows
        return float(self.n), 0.0 if self._once else self.pairs / self.rows

    @property
    def _once(self) -> bool:
        """Whether one block is contracted with itself."""
        return self.square and self.rows == self.n

    @property
    def pairs(self) -> float:
        """Pairs of examples that meet."""
        blocks = -(-self.n // self.rows)
        return self.n * self.m * ((blocks + 1) / (2 * blocks) if self.symmetric else 1.0)

    @property
    def gradient_flops(self) -> float:
        """Forward and backward passes."""
        whole = sum(math.prod(leaf.shape) for leaf in self.leaves if leaf.route == "whole")
        share = whole / sum(math.prod(leaf.shape) for leaf in self.leaves)
        return sum(self.passes) * self.forward_flops * (1 + self.c * (1 + share))

    @property
    def forming_flops(self) -> float:
        """Making tiles of gradients from factors."""
        each = sum(leaf.forming_flops for leaf in self.leaves)
        return each * self.pairs * (1 / self.rows + (0 if self._once else 1 / self.columns))

    @property
    def contraction_flops(self) -> float:
        """Products of gradients or of their factors; for ``ntvp`` the derivatives of the rows along the columns'."""
        if self.method == "ntvp":
            return self.pairs * 2 * self.c * self.forward_flops
        return self.pairs * sum(leaf.contraction_flops for leaf in self.leaves)

    @property
    def flops(self) -> float:
        """All operations, but for attention's backward pass and elementwise work."""
        return self.gradient_flops + self.forming_flops + self.contraction_flops

    @property
    def held_bytes(self) -> int:
        """Features of two blocks."""
        return (self.rows + self.columns) * sum(leaf.held_bytes for leaf in self.leaves)

    @property
    def tile_bytes(self) -> int:
        """Tiles of both blocks."""
        return (self.rows + self.columns) * self.c * self.tile * self.accumulate_bytes

    def peak_bytes(self, activations: int) -> int:
        """Bound on memory besides the arguments, for all routes but ``ghost``: n and m are in it by the kernels alone.

        Features of two blocks, and of one once more while they are put together; the activations of the examples whose
        gradients are taken at once, and their derivatives; tiles, and the factors that they are made of; the kernels,
        by blocks, by rows of blocks and whole. Factors of more tokens than a tile has rows or columns are not covered.

        Args:
          activations: Bytes that the backward pass of an example needs (``activation_bytes``).
        """
        block = max(self.rows, self.columns)
        features = block * sum(leaf.held_bytes for leaf in self.leaves)
        few = jax.default_backend() == "cpu" and any(leaf.taps for leaf in self.leaves)
        at_once = min(EXAMPLES_AT_ONCE, block) if few else block
        directions = self.c if self.c > UNROLLED else 1
        kernels = len(self.kernels) * self.n * self.m * self.c**2 * self.accumulate_bytes
        making = features + at_once * activations * (1 + directions)
        return self.held_bytes + making + 2 * self.tile_bytes + 3 * kernels

    def __str__(self) -> str:
        """One line a leaf, and the sums."""
        columns = ("leaf", "shape", "route", "FLOP/pair", "FLOP/ex.", "B/ex.")
        lines = [columns] + [
            (leaf.name, "x".join(map(str, leaf.shape)), leaf.route, *map(_si, leaf[6:])) for leaf in self.leaves
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        blocks = f"{self.n} x {self.m} examples in blocks of {self.rows} x {self.columns}, {self.c} outputs"
        work = [
            ("gradients", self.gradient_flops),
            ("forming", self.forming_flops),
            ("contraction", self.contraction_flops),
        ]
        flops = ", ".join(f"{name} {_si(count)}" for name, count in work)
        held = f"features {_si(self.held_bytes)}, tiles of {self.tile} {_si(self.tile_bytes)}"
        return "\n".join(
            [*rows, f"{self.method}: {', '.join(self.kernels)}; {blocks}", f"FLOP: {flops}; bytes: {held}"]
        )


def _si(x: float) -> str:
    """With a prefix of its size."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.3g} "


def activation_bytes(f: OutputFn, params: Params, x: Inputs) -> int:
    """Bytes that the backward pass of one example keeps of the forward pass, from shapes alone.

    Args:
      f: Outputs of a batch.
      params: Its parameters, or their shapes.
      x: A batch, or its shapes.

    Returns:
      Residuals of two examples less those of one: the parameters, kept once, cancel.

    Example:
      >>> activation_bytes(lambda w, x: x @ w, jnp.ones(3), jnp.ones((5, 3)))
      12
    """

    def kept(n: int) -> int:
        some = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), x)
        pull = jax.eval_shape(lambda p, z: jax.vjp(lambda q: f(q, z), p)[1], params, some)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    return kept(2) - kept(1)


def make_plan(
    where: str,
    f: OutputFn,
    trained: Params,
    frozen: Params,
    sides: Sequence[Inputs],
    *,
    kernels: Mapping[str, KernelMaps],
    method: str,
    sizes: tuple[int, int, int],
    symmetric: bool,
    rank_one: Mapping[str, RankOne],
    block_size: int | tuple[int, int] | None,
    tile: int | None,
    memory_bytes: int | None,
    accumulate: Any,
    factor_dtype: Any,
    explain: bool,
) -> Plan:
    """The plan of a call.

    Args:
      where: Whose call it is.
      f: Its function.
      trained: Its trained leaves.
      frozen: The others.
      sides: Its rows, and its columns where they are others.
      kernels: Its kernels.
      method: Its method.
      sizes: Rows, columns, outputs.
      symmetric: Whether only half of the blocks are needed.
      rank_one: Preconditioners of rank one, by leaf.
      block_size: As asked for.
      tile: As asked for.
      memory_bytes: As asked for.
      accumulate: Type of sums.
      factor_dtype: Type of factors.
      explain: Whether the plan is to be read: the forward pass is then counted.

    Raises:
      UserError: ``ghost`` where a gradient of more than rank one meets a map.
    """
    n, m, c = sizes
    tile = tile or (CPU_TILE if jax.default_backend() == "cpu" else ACCELERATOR_TILE)
    plain = method in ("contraction", "ntvp")
    known = [({}, {}) if plain else taps_of(f, trained, frozen, side) for side in sides]
    maps, square = list(kernels.values()), len(sides) == 1
    leaves = []
    for name, leaf in named_leaves(trained).items():
        uses = [_leaf_uses(name, leaf, taps, records, c) for taps, records in known]
        scales = rank_one.get(name)
        leaves.append(_leaf_plan(where, name, leaf, uses, maps, scales, method, c, (n, m), factor_dtype))
    params = tree_combine(trained, frozen)
    held = sum(leaf.held_bytes for leaf in leaves)
    if block_size is None and not (any(leaf.taps for leaf in leaves) and jax.default_backend() == "cpu"):
        held += activation_bytes(f, params, sides[0])  # of all examples of a block at once
    rows, columns = _blocks(n, None if square else m, held, block_size, memory_bytes or HELD_BYTES)
    leaves = [_of_block(leaf, rows) for leaf in leaves]
    forward = _forward_flops(f, params, jax.eval_shape(first_example, sides[0])) if explain else 0.0
    if method == "auto":
        method = " and ".join(sorted({leaf.route for leaf in leaves}))
    return Plan(
        method,
        tuple(kernels),
        tuple(leaves),
        n,
        m,
        c,
        rows,
        columns,
        tile,
        square,
        symmetric,
        forward,
        jnp.dtype(accumulate).itemsize,
    )


def _forward_flops(f: OutputFn, params: Params, one: Inputs) -> float:
    counted = jax.jit(f).lower(params, one).cost_analysis()
    return float(counted.get("flops", 0.0)) if isinstance(counted, dict) else 0.0


class _UseShape(NamedTuple):
    """Of one use: tokens, outputs on which its sides depend, and whether the left one is of row numbers."""

    r: int
    cl: int
    cr: int
    numbers: bool


class _LeafUses(NamedTuple):
    """What one side's examples make of a leaf."""

    taps: tuple[tuple[str, Tap], ...]
    matrix: Matrix | None
    shapes: tuple[_UseShape, ...]


def _leaf_uses(name: str, leaf: Any, taps: Mapping[str, Tap], records: Mapping[str, Any], c: int) -> _LeafUses:
    own = tuple((tap_name, tap) for tap_name, tap in taps.items() if tap.leaf == name)
    if not own:
        return _LeafUses((), None, ())
    matrix = leaf_matrix(leaf, own[0][1], records[own[0][0]].shape)

    def shape(tap: Tap) -> _UseShape:
        turned = tap.kind == "transposed"
        r = math.prod(tap.shape[:-1]) // matrix.l
        return _UseShape(r, c if turned else 1, 1 if turned else c, tap.kind == "rows")

    return _LeafUses(own, matrix, tuple(shape(tap) for _, tap in own))


def _leaf_plan(
    where: str,
    name: str,
    leaf: Any,
    sides: Sequence[_LeafUses],
    maps: Sequence[KernelMaps],
    scales: RankOne | None,
    method: str,
    c: int,
    counts: tuple[int, int],
    factor_dtype: Any,
) -> LeafPlan:
    size, itemsize = leaf.size, leaf.dtype.itemsize
    whole = LeafPlan(name, leaf.shape, "whole", (), None, 0, 2.0 * len(maps) * c**2 * size, 0.0, c * size * itemsize)
    # The side with more tokens counts; a leaf that one side uses otherwise is taken whole.
    taps, matrix, uses = max(sides, key=lambda side: sum(use.r for use in side.shapes))
    if matrix is None or len({tuple(tap_name for tap_name, _ in side.taps) for side in sides}) > 1:
        return whole
    rank = sum(use.r for use in uses)
    width = jnp.dtype(factor_dtype or leaf.dtype).itemsize
    a_use = [use.r * (use.cl * (1 if use.numbers else matrix.k) + use.cr * matrix.o) for use in uses]
    numbers = all(use.numbers for use in uses)
    formed = LeafPlan(
        name,
        leaf.shape,
        "rows" if numbers else "tiled",
        taps,
        matrix,
        rank,
        2.0 * len(maps) * c**2 * size,
        2.0 * rank * c * size,
        matrix.l * width * sum(a_use),
    )
    if numbers:
        small = matrix.k <= ROWS_HELD_WHOLE * rank
        return whole if method == "auto" and small else formed
    products = sum(
        a.r * b.r * ((0 if a.numbers or b.numbers else a.cl * b.cl * matrix.k) + a.cr * b.cr * matrix.o + c**2)
        for a in uses
        for b in uses
    )
    inner = 2.0 * len(maps) * matrix.l * products
    ghost = formed._replace(route="ghost", contraction_flops=inner, forming_flops=0.0)
    unformed = all(_without_forming(map_, rank, matrix, scales) for map_ in maps)
    if method == "ghost" and not unformed:
        rule = "ghost inner products need kernels without maps, or gradients of rank one"
        shown = f"{name}, whose gradients have rank {rank}"
        raise UserError(message(where, rule, shown, 'Use method="tiled" or "auto"'))
    if method != "auto":
        return ghost if method == "ghost" else formed
    (n, m), held_whole = counts, whole.held_bytes <= formed.held_bytes
    cost = formed.contraction_flops + formed.forming_flops * (1 / n + 1 / m)
    if unformed and ghost.contraction_flops < min(cost, whole.contraction_flops):
        return ghost
    return whole if held_whole else formed


def _without_forming(maps: KernelMaps, rank: int, matrix: Matrix, scales: RankOne | None) -> bool:
    """Whether factors give the kernel as they are, scaled, or by their signs."""
    if maps.linear or (maps.multiplicative and rank == 1):
        return True
    fits = scales is not None and (scales.rows.shape[-1], scales.columns.shape[-1]) == (matrix.k, matrix.o)
    return fits and maps.rows is None and maps.columns is scale_map


def _of_block(leaf: LeafPlan, rows: int) -> LeafPlan:
    """A table costs what its rows do that a block reads."""
    if leaf.route != "rows" or leaf.matrix is None:
        return leaf
    read = min(1.0, leaf.rank * rows / (leaf.matrix.l * leaf.matrix.k))
    return leaf._replace(
        contraction_flops=leaf.contraction_flops * read, forming_flops=leaf.forming_flops * read * leaf.matrix.l
    )


def _blocks(
    n: int, m: int | None, example_bytes: int, block_size: int | tuple[int, int] | None, memory_bytes: int
) -> tuple[int, int]:
    if block_size is None:
        return fitting_blocks(n, m, example_bytes, memory_bytes)
    rows, columns = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    rows = min(rows, n)
    return rows, rows if m is None else min(columns, m)


def fitting_blocks(n: int, m: int | None, example_bytes: int, memory_bytes: int = HELD_BYTES) -> tuple[int, int]:
    """Rows and columns of a block whose features take about ``memory_bytes``; square for ``m=None``, that is y = x.

    Rows first, since the features of the columns are made again for every block of rows.
    """
    held = max(2, memory_bytes // max(1, example_bytes))
    columns = held // 2 if m is None else min(m, max(1, held // 4))
    rows = min(n, columns if m is None else held - columns)
    rows = -(-n // -(-n // rows))  # blocks of like size
    return rows, rows if m is None else -(-m // -(-m // min(m, max(1, held - rows))))
