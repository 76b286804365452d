r"""Kernels over a mesh of devices: rows, columns and parameters spread along its axes, by their names.

==========  ==========================================================================================================
axis        what each of its devices has
==========  ==========================================================================================================
``rows``    a share of the rows x
``tiles``   all rows and columns of its place in the mesh, and of every block of them a share of the work: the gradients
            of some of the examples, which are then exchanged, and some of the tiles of parameters, whose sums are added
any other   a share of the columns y
==========  ==========================================================================================================

Symmetric kernels of rows with themselves are computed once where no axis is ``rows``: of D shares of the examples, the
device that has the columns of share j pairs them with the rows of the D // 2 + 1 shares from j on, going round, and the
rest is their mirror image.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxft.core.types import Inputs
from jaxft.kernels.blocks import blocked_kernels, mirrored
from jaxft.kernels.methods import Point, Settings

ROWS, TILES = "rows", "tiles"
"""Names of the axes that do not spread the columns."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def sharded_kernels(mesh: Mesh, settings: Settings, point: Point, x: Inputs, y: Inputs | None = None) -> list[Array]:
    """The kernels with (example, output) flattened on both sides, whole on every device: every process can read them.

    Memory of a device: the kernels, and what ``empirical_ntk`` holds for its share of the rows and columns. An axis
    ``tiles`` makes none of that smaller: a device holds the features of all examples of two blocks.
    """
    mesh = Mesh(mesh.devices, mesh.axis_names)  # axes of type Auto, whatever they are
    by_name = dict(mesh.shape)
    spread = settings.plan.method != "ntvp"  # which has no tiles: it pushes whole gradients
    tiles = TILES if spread and by_name.get(TILES, 1) > 1 else None
    rows = (ROWS,) if ROWS in by_name else ()
    columns = tuple(name for name in by_name if name != ROWS and not (spread and name == TILES))
    settings = settings._replace(arithmetic=settings.arithmetic._replace(axis=tiles))
    across, down = (math.prod(by_name[name] for name in axes) for axes in (columns, rows))
    if y is None and across * down == 1:
        flat = _on(mesh, functools.partial(blocked_kernels, settings, y=None), (None, None), (None, None))(point, x)
    elif y is None and down == 1 and all(maps.symmetric for maps in settings.maps):
        return _half(mesh, columns, settings, point, x)
    else:
        shares = _shared(x, down), _shared(x if y is None else y, across)
        run = _on(mesh, functools.partial(blocked_kernels, settings), (None, rows, columns), (rows, columns))
        flat = run(point, *shares)
    n, m = (_count(side) * settings.plan.c for side in (x, x if y is None else y))
    whole = NamedSharding(mesh, PartitionSpec())
    flat = [jax.lax.with_sharding_constraint(k[:n, :m], whole) for k in flat]
    return [mirrored(k) if y is None and maps.symmetric else k for k, maps in zip(flat, settings.maps, strict=True)]


def _half(mesh: Mesh, axes: tuple[str, ...], settings: Settings, point: Point, x: Inputs) -> list[Array]:
    """Symmetric kernels of x with itself, each pair of shares once (twice those that lie half a round apart)."""
    n, c = _count(x), settings.plan.c
    devices = math.prod(mesh.shape[name] for name in axes)
    size, near = -(-n // devices), devices // 2 + 1

    def of_device(point: Point, x: Inputs) -> list[Array]:
        start = jax.lax.axis_index(axes) * size
        turned = (start + jnp.arange(near * size)) % (devices * size)
        rows, columns = (
            jax.tree.map(lambda leaf, taken=taken: leaf[jnp.minimum(taken, n - 1)], x)
            for taken in (turned, start + jnp.arange(size))
        )
        return blocked_kernels(settings, point, rows, columns)

    def placed(k: Array) -> Array:
        k = jax.lax.with_sharding_constraint(k, NamedSharding(mesh, PartitionSpec()))
        k = k.reshape(near, size * c, devices, size * c)
        i, j = jnp.arange(devices)[:, None], jnp.arange(devices)[None]
        known = (i - j) % devices < near
        own = k[jnp.where(known, (i - j) % devices, 0), :, j]
        of_mirror = jnp.transpose(own, (1, 0, 3, 2))
        both = jnp.where(known[:, :, None, None], own, of_mirror)
        return mirrored(jnp.transpose(both, (0, 2, 1, 3)).reshape(devices * size * c, -1)[: n * c, : n * c])

    return [placed(k) for k in _on(mesh, of_device, (None, None), (None, axes))(point, x)]


def _on(mesh: Mesh, run, inputs: tuple, outputs: tuple):
    """``shard_map`` with the first axis of inputs, and both of outputs, along axes of the mesh (or on every device)."""
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(PartitionSpec(axes or None) for axes in inputs),
        out_specs=PartitionSpec(*[axes or None for axes in outputs]),
        check_vma=False,
    )


def _shared(side: Inputs, devices: int) -> Inputs:
    """The last example repeated until the devices have equally many."""
    n = _count(side)
    taken = jnp.minimum(jnp.arange(-(-n // devices) * devices), n - 1)
    return side if len(taken) == n else jax.tree.map(lambda leaf: leaf[taken], side)


def _count(side: Inputs) -> int:
    return jax.tree.leaves(side)[0].shape[0]
