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
from jaxft.kernels.features import Matrix, first_example, leaf_matrix, named_leaves, taps_of

HELD_BYTES = 2**30
"""Of gradients and factors held at once, where nothing else is asked for."""

CPU_TILE = 2**15
"""Parameters of a tile on CPU: both sides stay in the cache instead of being written to memory."""

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
    symmetric: bool
    """Whether only blocks on and above the diagonal are computed."""
    forward_flops: float
    """Of one example, as XLA counts them."""
    accumulate_bytes: int

    @functools.cached_property
    def passes(self) -> tuple[float, float]:
        """How many examples' features are made: as rows, as columns."""
        blocks = -(-self.n // self.rows)
        share = (blocks + 1) / (2 * blocks) if self.symmetric else 1.0
        return float(self.n), self.m * blocks * share

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
        return each * self.pairs * (1 / self.rows + 1 / self.columns)

    @property
    def contraction_flops(self) -> float:
        """Products of gradients or of their factors."""
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


def make_plan(
    where: str,
    f: OutputFn,
    trained: Params,
    frozen: Params,
    x: Inputs,
    *,
    kernels: Mapping[str, KernelMaps],
    method: str,
    sizes: tuple[int, int, int],
    square: bool,
    symmetric: bool,
    rank_one: frozenset[str],
    block_size: int | tuple[int, int] | None,
    tile: int | None,
    memory_bytes: int | None,
    accumulate: Any,
    factor_dtype: Any,
) -> Plan:
    """The plan of a call.

    Args:
      where: Whose call it is.
      f: Its function.
      trained: Its trained leaves.
      frozen: The others.
      x: Its rows.
      kernels: Its kernels.
      method: Its method.
      sizes: Rows, columns, outputs.
      square: Whether rows and columns are the same examples, and blocks therefore square.
      symmetric: Whether only half of the blocks are needed.
      rank_one: Leaves whose preconditioner has rank one.
      block_size: As asked for.
      tile: As asked for.
      memory_bytes: As asked for.
      accumulate: Type of sums.
      factor_dtype: Type of factors.

    Raises:
      UserError: ``ghost`` where a gradient of more than rank one meets a map.
    """
    n, m, c = sizes
    tile = tile or (CPU_TILE if jax.default_backend() == "cpu" else ACCELERATOR_TILE)
    taps, records = ({}, {}) if method in ("contraction", "ntvp") else taps_of(f, trained, frozen, x)
    maps = list(kernels.values())
    leaves = []
    for name, leaf in named_leaves(trained).items():
        own = tuple((tap_name, tap) for tap_name, tap in taps.items() if tap.leaf == name)
        linear = [_without_maps(map_, name in rank_one) for map_ in maps]
        leaves.append(_leaf_plan(where, name, leaf, own, records, maps, linear, method, c, (n, m), factor_dtype))
    held = sum(leaf.held_bytes for leaf in leaves)
    rows, columns = _blocks(n, None if square else m, held, block_size, memory_bytes or HELD_BYTES)
    one = jax.eval_shape(first_example, x)
    counted = jax.jit(f).lower(tree_combine(trained, frozen), one).cost_analysis()
    forward = float(counted.get("flops", 0.0)) if isinstance(counted, dict) else 0.0
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
        symmetric,
        forward,
        jnp.dtype(accumulate).itemsize,
    )


def _leaf_plan(
    where, name, leaf, taps, records, maps: Sequence[KernelMaps], linear: list[bool], method, c, counts, factor_dtype
) -> LeafPlan:
    size, itemsize = leaf.size, leaf.dtype.itemsize
    whole = LeafPlan(name, leaf.shape, "whole", (), None, 0, 2.0 * len(maps) * c**2 * size, 0.0, c * size * itemsize)
    if not taps:
        return whole
    matrix = leaf_matrix(leaf, taps[0][1], records[taps[0][0]].shape)
    uses = [_use_shape(tap, records[tap_name].shape, matrix, c) for tap_name, tap in taps]
    rank = sum(use.r for use in uses)
    width = jnp.dtype(factor_dtype or leaf.dtype).itemsize
    held = (
        matrix.l * width * sum(use.r * (use.cl * (1 if use.numbers else matrix.k) + use.cr * matrix.o) for use in uses)
    )
    numbers = all(use.numbers for use in uses)
    k = min(matrix.k, rank * counts[0]) if numbers else matrix.k
    formed = LeafPlan(
        name,
        leaf.shape,
        "rows" if numbers else "tiled",
        taps,
        matrix,
        rank,
        2.0 * len(maps) * c**2 * matrix.l * k * matrix.o,
        2.0 * rank * c * matrix.l * k * matrix.o,
        held,
    )
    products = sum(
        a.r * b.r * ((0 if a.numbers or b.numbers else a.cl * b.cl * matrix.k) + a.cr * b.cr * matrix.o + c**2)
        for a in uses
        for b in uses
    )
    ghost = formed._replace(route="ghost", contraction_flops=2.0 * len(maps) * matrix.l * products, forming_flops=0.0)
    unformed = all(plain or (map_.multiplicative and rank == 1) for plain, map_ in zip(linear, maps, strict=True))
    if numbers:
        small = matrix.k <= ROWS_HELD_WHOLE * rank
        return whole if method == "auto" and small else formed
    if method == "ghost" and not unformed:
        rule = "ghost inner products need kernels without maps, or gradients of rank one"
        shown = f"{name}, whose gradients have rank {rank}"
        raise UserError(message(where, rule, shown, 'Use method="tiled" or "auto"'))
    if method != "auto":
        return ghost if method == "ghost" else formed
    pairs, (n, m) = counts[0] * counts[1], counts
    cost = formed.contraction_flops + formed.forming_flops * (n + m) / pairs
    if unformed and ghost.contraction_flops < min(cost, whole.contraction_flops):
        return ghost
    return whole if whole.held_bytes <= formed.held_bytes else formed


def _without_maps(maps: KernelMaps, rank_one: bool) -> bool:
    """Whether factors give the kernel as they are, or scaled."""
    return maps.linear or (rank_one and maps.rows is None and maps.columns is scale_map)


class _UseShape(NamedTuple):
    r: int
    cl: int
    cr: int
    numbers: bool


def _use_shape(tap: Tap, record: tuple[int, ...], matrix: Matrix, c: int) -> _UseShape:
    r = math.prod(tap.shape[:-1]) // matrix.l
    return _UseShape(r, c if tap.kind == "transposed" else 1, 1 if tap.kind == "transposed" else c, tap.kind == "rows")


def _blocks(
    n: int, m: int | None, example_bytes: int, block_size: int | tuple[int, int] | None, memory_bytes: int
) -> tuple[int, int]:
    if block_size is None:
        return fitting_blocks(n, m, example_bytes, memory_bytes)
    rows, columns = block_size if isinstance(block_size, tuple) else (block_size, block_size)
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
