r"""Contracting two blocks of features into a block of a kernel, leaf by leaf and by several routes.

========  =================================================================================================
route     what it does
========  =================================================================================================
whole     the gradients are there; they are mapped and multiplied, a tile of parameters at a time
tiled     tiles of the gradients $\sum_r L_r \otimes R_r$ are formed, mapped and multiplied: no gradient is ever held
ghost     inner products of factors, $\sum_{rs} \langle L_r, L'_s \rangle \langle R_r, R'_s \rangle$: nothing is formed
rows      for tables read by row number alone: ``tiled``, over the rows alone that the block's examples read
========  =================================================================================================

All are exact. Signs are multiplied as integers (on CPU as floats that hold them exactly) and summed as such.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft.kernels.features import Features, Matrix, Use, Uses, Whole
from jaxft.kernels.preconditioners import RankOne

Route = Literal["whole", "tiled", "ghost", "rows"]
Map = Callable[[Array, Any], Array]
"""Map of gradients ``(..., p)`` and the preconditioner of their leaf ``(1, p)``."""


class KernelMaps(NamedTuple):
    """The two maps of a kernel; ``None`` is the identity."""

    rows: Map | None
    columns: Map | None
    symmetric: bool = True

    @property
    def linear(self) -> bool:
        """Whether gradients are contracted as they are."""
        return self.rows is None and self.columns is None

    @property
    def multiplicative(self) -> bool:
        """Whether the map of a product is the product of the maps: rank-one gradients then need not be formed."""
        return all(side in (None, sign_map) for side in (self.rows, self.columns))

    @property
    def integer(self) -> bool:
        """Whether what is contracted is -1, 0 and 1."""
        return self.rows is sign_map and self.columns is sign_map


def wide(dtype: Any) -> Any:
    """The type in which products of factors are summed: float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def sign_map(gradient: Array, _: Any) -> Array:
    """The sign, entry by entry."""
    return jnp.sign(gradient)


def scale_map(gradient: Array, p: Any) -> Array:
    """The product with the diagonal of the preconditioner, in float32 at least: scales of half precision overflow."""
    kind = wide(gradient.dtype)
    return gradient.astype(kind) * p.astype(kind)


class Arithmetic(NamedTuple):
    """How products are taken and sums held."""

    accumulate: Any
    precision: Any
    tile: int
    """Parameters of a tile."""
    integers: bool
    """Whether signs are multiplied as int8."""
    axis: str | None = None
    """Axis of a mesh, inside ``shard_map``, whose devices share the work of every block."""


def contract(
    kernels: Sequence[KernelMaps],
    routes: Mapping[str, Route],
    rows: Features,
    columns: Features,
    matrices: Mapping[str, Matrix],
    preconditioner: Mapping[str, Array | RankOne] | None,
    arithmetic: Arithmetic,
) -> Array:
    """The block ``(kernel, rows * c, columns * c)``, (example, output) flattened."""
    by_leaf = [
        _contract_leaf(
            kernels,
            routes[name],
            rows[name],
            columns[name],
            matrices.get(name),
            None if preconditioner is None else preconditioner[name],
            arithmetic,
            share_of(arithmetic, turn),
        )
        for turn, name in enumerate(sorted(rows))
    ]
    sums = [functools.reduce(jnp.add, of_kernel) for of_kernel in zip(*by_leaf, strict=True)]
    if arithmetic.axis is not None:  # before signs become floats: their sums stay exact
        sums = jax.lax.psum(sums, arithmetic.axis)
    sums = [total.astype(arithmetic.accumulate) for total in sums]
    if any(maps.integer for maps in kernels):  # integers have no NaN
        bad = _not_finite(rows)[:, None] | _not_finite(columns)[None]
        sums = [
            jnp.where(bad, jnp.nan, total) if maps.integer else total for maps, total in zip(kernels, sums, strict=True)
        ]
    return jnp.stack(sums)


def _not_finite(features: Features) -> Array:
    """Which (example, output) have a gradient that is not finite."""

    def of_part(part: Array) -> Array:
        if jnp.issubdtype(part.dtype, jnp.integer):
            return jnp.zeros(part.shape[:2], bool)
        return ~jnp.isfinite(part).all(axis=tuple(range(2, part.ndim)))

    found = [
        functools.reduce(jnp.logical_or, [of_part(part) for use in leaf for part in use])
        if isinstance(leaf, tuple)
        else jnp.concatenate([of_part(part) for part in leaf], axis=1)
        for leaf in features.values()
    ]
    c = max(flags.shape[1] for flags in found)
    return functools.reduce(jnp.logical_or, [jnp.broadcast_to(flags, (len(flags), c)) for flags in found]).reshape(-1)


class Share(NamedTuple):
    """Which part of the work of a leaf a device does; one device does all."""

    device: Array | int
    devices: int

    def cut(self, total: int) -> tuple[Array, Array, int]:
        """Of ``total`` things those of the device: where the first is, which of them are its own, how many come."""
        size = -(-total // self.devices)
        start = jnp.minimum(self.device * size, total - size)
        return start, start + jnp.arange(size) >= self.device * size, size


def share_of(arithmetic: Arithmetic, turn: int = 0) -> Share:
    """The share of this device; turns pass what is left over from one device to the next."""
    if arithmetic.axis is None:
        return Share(0, 1)
    devices = jax.lax.axis_size(arithmetic.axis)
    return Share((jax.lax.axis_index(arithmetic.axis) + turn) % devices, devices)


def _contract_leaf(
    kernels, route: Route, rows, columns, matrix, p: Any, arithmetic: Arithmetic, share: Share
) -> list[Array]:
    if route != "ghost":
        p = p.dense() if isinstance(p, RankOne) else p
    if route == "whole":
        return _whole(kernels, *_own_parameters(rows, columns, p, share), arithmetic)
    if route in ("tiled", "rows"):
        return (_tiled if route == "tiled" else _rows)(kernels, rows, columns, matrix, p, arithmetic, share)
    return [
        _ghost(
            *_mapped_factors(maps, rows, columns, matrix, p),
            _counting(arithmetic) if maps.integer else arithmetic,
            share,
        )
        for maps in kernels
    ]


def _counting(arithmetic: Arithmetic) -> Arithmetic:
    """Inner products of signs: exact in float32, and summed as integers."""
    return arithmetic._replace(accumulate=jnp.int32)


def mapped(feature: Map | None, gradient: Array, p: Any) -> Array:
    """A map applied, or not."""
    return gradient if feature is None else feature(gradient, p)


def _gram(maps: KernelMaps, rows: Array, columns: Array, p: Any, arithmetic: Arithmetic) -> Array:
    """Product of two mapped tiles (row, parameter)."""
    left, right = mapped(maps.rows, rows, p), mapped(maps.columns, columns, p)
    if not maps.integer:
        kind = arithmetic.accumulate
        if left.dtype != right.dtype:  # one side was scaled
            left, right = left.astype(wide(left.dtype)), right.astype(wide(right.dtype))
        return jnp.matmul(left, right.T, precision=arithmetic.precision, preferred_element_type=kind)
    if arithmetic.integers:
        return jnp.matmul(left.astype(jnp.int8), right.astype(jnp.int8).T, preferred_element_type=jnp.int32)
    # Sums of less than 2**24 signs are exact in float32.
    exact = jnp.matmul(left.astype(jnp.float32), right.astype(jnp.float32).T, precision="highest")
    return exact.astype(jnp.int32)


def _zeros(kernels: Sequence[KernelMaps], n: int, m: int, arithmetic: Arithmetic) -> list[Array]:
    return [jnp.zeros((n, m), jnp.int32 if maps.integer else arithmetic.accumulate) for maps in kernels]


def _own_parameters(rows: Whole, columns: Whole, p: Any, share: Share) -> tuple[Whole, Whole, Any]:
    """The columns of the device: 0 where they are another's too."""
    p = None if p is None else p.reshape(1, -1)
    if share.devices == 1:
        return rows, columns, p
    start, own, size = share.cut(rows[0].shape[-1])
    part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=-1)
    rows, columns = ([part(g) * own[None, None].astype(g.dtype) for g in side] for side in (rows, columns))
    return rows, columns, None if p is None else part(p)


def _whole(kernels, rows: Whole, columns: Whole, p: Any, arithmetic: Arithmetic) -> list[Array]:
    parts, (n, q, width), m = len(rows), rows[0].shape, len(columns[0])
    tile = min(arithmetic.tile, width)

    def cut(start, size):
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=-1)
        a, b = (jnp.concatenate([part(g).reshape(-1, size) for g in side]) for side in (rows, columns))
        return [_gram(maps, a, b, None if p is None else part(p), arithmetic) for maps in kernels]

    if width == tile:
        total = cut(0, width)
    else:
        tiles, zeros = width // tile, _zeros(kernels, parts * n * q, parts * m * q, arithmetic)
        add = functools.partial(jax.tree.map, jnp.add)
        total = jax.lax.fori_loop(0, tiles, lambda k, sums: add(sums, cut(k * tile, tile)), zeros)
        total = add(total, cut(tiles * tile, width - tiles * tile)) if width % tile else total
    # From (part, example, output) to (example, part, output).
    split, order = (parts, n, q, parts, m, q), (1, 0, 2, 4, 3, 5)
    return [jnp.transpose(k.reshape(split), order).reshape(n * parts * q, m * parts * q) for k in total]


def _tiled(
    kernels,
    rows: Uses,
    columns: Uses,
    matrix: Matrix,
    p: Any,
    arithmetic: Arithmetic,
    share: Share,
    *,
    occupied: Array | None = None,
) -> list[Array]:
    """Tile by tile; of one layer only the first ``occupied`` rows where that is given.

    Of a block of examples against itself every tile is formed once.
    """
    same = rows is columns
    c = max(part.shape[1] for use in rows for part in use)
    n, m = rows[0].right.shape[0], columns[0].right.shape[0]
    across, down = tile_sides(matrix, min(arithmetic.tile, -(-math.prod(matrix) // share.devices)))
    steps = (matrix.l, -(-matrix.k // down), -(-matrix.o // across))
    padded = (steps[1] * down, steps[2] * across)
    rows, columns = (tuple(_pad(use, padded) for use in side) for side in (rows, columns))
    if p is not None:
        p = jnp.pad(p.reshape(matrix), ((0, 0), (0, padded[0] - matrix.k), (0, padded[1] - matrix.o)))

    def step(index, sums):
        layer, rest = index // (steps[1] * steps[2]), index % (steps[1] * steps[2])
        corner = layer, rest // steps[2] * down, rest % steps[2] * across
        a = _formed(rows, c, corner, (down, across), arithmetic.precision)
        b = a if same else _formed(columns, c, corner, (down, across), arithmetic.precision)
        piece = None if p is None else jax.lax.dynamic_slice(p, corner, (1, down, across)).reshape(1, -1)
        return [total + _gram(maps, a, b, piece, arithmetic) for maps, total in zip(kernels, sums, strict=True)]

    count = math.prod(steps) if occupied is None else -(-occupied // down) * steps[2]
    zeros = _zeros(kernels, n * c, m * c, arithmetic)
    if share.devices == 1:
        return jax.lax.fori_loop(0, count, step, zeros)
    turns = (count - share.device + share.devices - 1) // share.devices
    return jax.lax.fori_loop(0, turns, lambda k, sums: step(share.device + k * share.devices, sums), zeros)


MOST_ACROSS = 512
"""Columns of a tile: products with longer rows do not stay in the cache."""


def tile_sides(matrix: Matrix, tile: int) -> tuple[int, int]:
    """Columns and rows of a tile of about so many parameters; edges are filled up with zeros."""
    across = -(-matrix.o // -(-matrix.o // max(1, min(tile, MOST_ACROSS))))
    down = max(1, min(matrix.k, tile // across))
    return across, -(-matrix.k // -(-matrix.k // down))


def _pad(use: Use, to: tuple[int, int]) -> Use:
    def fill(a: Array, width: int) -> Array:
        return a if a.shape[-1] == width else jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])])

    return Use(use.left if _numbers(use) else fill(use.left, to[0]), fill(use.right, to[1]))


def _numbers(use: Use) -> bool:
    return jnp.issubdtype(use.left.dtype, jnp.integer)


def _formed(uses: Uses, c: int, corner, shape: tuple[int, int], precision: Any) -> Array:
    """A tile of the gradients, (example and output, parameter)."""
    (layer, k, o), (down, across) = corner, shape

    def cut(a: Array, start, size: int) -> Array:
        """``[n * c, r, size]`` of one layer."""
        n, d, r = a.shape[0], a.shape[1], a.shape[3]
        first = [jnp.asarray(i, jnp.int32) for i in (0, 0, layer, 0, start)]
        part = jax.lax.dynamic_slice(a, first, (n, d, 1, r, size))
        return jnp.broadcast_to(part.reshape(n, d, r, size), (n, c, r, size)).reshape(n * c, r, size)

    def left(use: Use) -> Array:
        if not _numbers(use):
            return cut(use.left, k, down)
        numbers = cut(use.left[..., None], 0, 1)
        return (numbers - k.astype(numbers.dtype) == jnp.arange(down, dtype=numbers.dtype)[None, None]).astype(
            use.right.dtype
        )

    lefts, rights = [left(use) for use in uses], [cut(use.right, o, across) for use in uses]
    formed = jnp.einsum(
        "brk,bro->bko",
        jnp.concatenate(lefts, axis=1) if len(uses) > 1 else lefts[0],
        jnp.concatenate(rights, axis=1) if len(uses) > 1 else rights[0],
        precision=precision,
        preferred_element_type=wide(rights[0].dtype),
    )
    return formed.reshape(len(formed), -1)


def _rows(
    kernels, rows: Uses, columns: Uses, matrix: Matrix, p: Any, arithmetic: Arithmetic, share: Share
) -> list[Array]:
    """The gradients' rows that any example of the block of rows reads: all others meet a 0 there."""
    a, b = (jnp.concatenate([_row_numbers(use, matrix) for use in side], axis=1) for side in (rows, columns))
    read = jnp.unique(a, size=a.size, fill_value=matrix.l * matrix.k)

    def compact(numbers: Array, uses: Uses) -> Uses:
        place = jnp.minimum(jnp.searchsorted(read, numbers), a.size - 1)
        known = (read[place] == numbers) & (numbers < matrix.l * matrix.k)
        grads = [jnp.reshape(use.right, (*use.right.shape[:2], 1, -1, matrix.o)) for use in uses]
        return (Use(jnp.where(known, place, a.size)[:, None, None], jnp.concatenate(grads, axis=3)),)

    p = None if p is None else p.reshape(-1, matrix.o).at[read].get(mode="clip")
    count = (read < matrix.l * matrix.k).sum(dtype=jnp.int32)
    left = compact(a, rows)
    right = left if rows is columns else compact(b, columns)
    return _tiled(kernels, left, right, Matrix(1, a.size, matrix.o), p, arithmetic, share, occupied=count)


def _row_numbers(use: Use, matrix: Matrix) -> Array:
    """``[n, l * r]``: numbers of rows of all layers, counted through."""
    layer = jnp.arange(matrix.l, dtype=use.left.dtype)[None, None, :, None] * matrix.k
    return (use.left + layer).reshape(len(use.left), -1)


def _mapped_factors(maps: KernelMaps, rows: Uses, columns: Uses, matrix: Matrix, p: Any) -> tuple[Uses, Uses]:
    """Maps that factors bear: signs of gradients of rank one, scales of rank one."""
    if maps.columns is scale_map:
        return rows, tuple(_scaled(use, matrix, p) for use in columns)
    ranks = [sum(use.right.shape[3] for use in uses) for uses in (rows, columns)]
    assert maps.linear or ranks == [1, 1], ranks  # the plan saw to it

    def of(side: Map | None, uses: Uses) -> Uses:
        return uses if side is None else tuple(Use(jnp.sign(use.left), jnp.sign(use.right)) for use in uses)

    return of(maps.rows, rows), of(maps.columns, columns)


def _scaled(use: Use, matrix: Matrix, p: RankOne) -> Use:
    """``left`` times the scales of rows, ``right`` times those of columns."""
    k, o = p.rows.reshape(1, 1, matrix.l, 1, -1), p.columns.reshape(1, 1, matrix.l, 1, -1)
    if not _numbers(use):
        kind = wide(use.left.dtype)
        return Use(use.left.astype(kind) * k.astype(kind), use.right.astype(kind) * o.astype(kind))
    layer = jnp.arange(matrix.l)[None, None, :, None]
    picked = p.rows.reshape(matrix.l, -1)[layer, use.left]
    kind = wide(use.right.dtype)
    return Use(use.left, use.right.astype(kind) * (picked[..., None] * o).astype(kind))


MOST_PRODUCTS = 2**21
"""Inner products held at a time by the ghost route."""


def _ghost(rows: Uses, columns: Uses, arithmetic: Arithmetic, share: Share) -> Array:
    """The sum over pairs of uses, layers and pairs of tokens; of several devices each does some of the rows."""
    c = max(part.shape[1] for use in rows for part in use)
    if share.devices > 1:
        count = rows[0].right.shape[0]
        start, own, size = share.cut(count)
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        mine = _ghost(jax.tree.map(part, rows), columns, arithmetic, Share(0, 1))
        mine = mine * jnp.repeat(own, c)[:, None].astype(mine.dtype)
        whole = jnp.zeros((count * c, mine.shape[1]), mine.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, mine, start * c, axis=0)
    n, m = rows[0].right.shape[0], columns[0].right.shape[0]
    total = jnp.zeros((n, c, m, c), arithmetic.accumulate)
    for a, b in itertools.product(rows, columns):
        products = c * a.right.shape[3] * m * c * b.right.shape[3]
        at_once = min(n, max(1, MOST_PRODUCTS // products))

        def of_layer(parts: tuple[Use, Use], at_once=at_once) -> Array:
            u, v = parts

            def of_row(one: Use) -> Array:
                product = _left_products(one, v, arithmetic) * _right_products(one.right, v.right, arithmetic)
                return jnp.broadcast_to(product.sum(axis=(1, 4), dtype=product.dtype), (c, m, c))

            return jax.lax.map(of_row, u, batch_size=at_once)

        layers = [Use(*[jnp.moveaxis(part, 2, 0) for part in use]) for use in (a, b)]
        total = total + jax.lax.map(of_layer, tuple(layers)).sum(axis=0, dtype=total.dtype)
    return total.reshape(n * c, m * c)


def _right_products(a: Array, b: Array, arithmetic: Arithmetic) -> Array:
    """``[c, r, o]`` and ``[m, c, s, o]`` to ``[c, r, m, c, s]``."""
    counting = arithmetic.accumulate == jnp.int32
    kind = jnp.float32 if counting else arithmetic.accumulate
    if counting or a.dtype != b.dtype:  # one side was scaled
        a, b = (side.astype(jnp.float32 if counting else wide(side.dtype)) for side in (a, b))
    product = jnp.einsum("cro,mdso->crmds", a, b, precision=arithmetic.precision, preferred_element_type=kind)
    return product.astype(arithmetic.accumulate)


def _left_products(a: Use, b: Use, arithmetic: Arithmetic) -> Array:
    """Of row numbers, 1 where they are equal; of a number and a vector, the vector's entry."""
    kind = arithmetic.accumulate
    if _numbers(a) and _numbers(b):
        return (a.left[:, :, None, None, None] == b.left[None, None]).astype(kind)
    if _numbers(a):
        return jnp.moveaxis(b.left[..., a.left[0]], -1, 0)[None].astype(kind)
    if _numbers(b):
        picked = a.left[:, :, b.left[:, 0]]
        return picked[:, :, :, None].astype(kind)
    return _right_products(a.left, b.left, arithmetic)
