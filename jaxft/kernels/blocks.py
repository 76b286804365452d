"""The loop over blocks of rows and columns, on one device or with the columns spread over a mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.methods import KERNELS, METHODS, Problem

HELD_BYTES = 2**30
"""Of the gradients held at once, where no block size is given."""


class Settings(NamedTuple):
    """What is known when the loop is compiled."""

    f: OutputFn
    names: tuple[str, ...]
    method: str
    rows: int
    columns: int
    accumulate: Any
    precision: str


@functools.partial(jax.jit, static_argnums=0)
def blocked_kernels(
    settings: Settings, trained: Params, frozen: Params, x: Inputs, y: Inputs | None, preconditioner: PyTree | None
) -> list[Array]:
    """The kernels with (example, output) flattened on both sides.

    For ``y=None`` and symmetric kernels only blocks on or above the diagonal are computed.
    """
    problem = Problem(
        settings.f, settings.names, settings.accumulate, settings.precision, trained, frozen, preconditioner
    )
    mirrored = [y is None and KERNELS[name].symmetric for name in settings.names]
    half = all(mirrored)
    columns = settings.columns
    if y is None:
        y, columns = x, settings.rows
    n, m = (jax.tree.leaves(side)[0].shape[0] for side in (x, y))
    rows, columns = min(settings.rows, n), min(columns, m)
    c = max(jax.eval_shape(problem.outputs, trained, x).shape[1:], default=1)
    method = METHODS[settings.method].rows

    def row_of_blocks(i):
        against = method(problem, _block(x, i, rows, n))

        def one_block(j):
            def compute():
                return against(_block(y, j, columns, m))

            if not half:
                return compute()
            empty = jnp.zeros((len(settings.names), rows * c, columns * c), settings.accumulate)
            return jax.lax.cond(j >= i, compute, lambda: empty)

        blocks = jax.lax.map(one_block, jnp.arange(-(-m // columns)))
        return jnp.moveaxis(blocks, 0, 2).reshape(len(settings.names), rows * c, -1)[..., : m * c]

    if rows == n and columns == m:  # no loop: its buffers would be copied
        full = method(problem, x)(y)
    else:
        full = jnp.moveaxis(jax.lax.map(row_of_blocks, jnp.arange(-(-n // rows))), 0, 1)
        full = full.reshape(len(settings.names), -1, m * c)[:, : n * c]
    return [jnp.triu(k) + jnp.triu(k, 1).T if mirror else k for k, mirror in zip(full, mirrored, strict=True)]


def fitting_blocks(n: int, m: int | None, gradient_bytes: int) -> tuple[int, int]:
    """Rows and columns of a block whose gradients take about ``HELD_BYTES``; square for ``m=None``, that is y = x.

    Rows first, since the gradients of the columns are made again for every block of rows.
    """
    held = max(2, HELD_BYTES // gradient_bytes)
    columns = held // 2 if m is None else min(m, max(1, held // 4))
    rows = min(n, columns if m is None else held - columns)
    return -(-n // -(-n // rows)), columns  # blocks of rows of like size


@functools.partial(jax.jit, static_argnums=(0, 1))
def sharded_kernels(
    mesh: Mesh,
    settings: Settings,
    trained: Params,
    frozen: Params,
    x: Inputs,
    y: Inputs,
    preconditioner: PyTree | None,
) -> list[Array]:
    """Each device computes the columns of its share of ``y``."""
    m = jax.tree.leaves(y)[0].shape[0]
    share = jnp.minimum(jnp.arange(-(-m // mesh.size) * mesh.size), m - 1)
    columns, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    run = jax.shard_map(
        functools.partial(blocked_kernels, settings),
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, columns, everywhere),
        out_specs=PartitionSpec(None, mesh.axis_names),
        check_vma=False,
    )
    flat = run(trained, frozen, x, jax.tree.map(lambda leaf: leaf[share], y), preconditioner)
    # Gathered on every device, so that every process can read the whole.
    whole = NamedSharding(mesh, PartitionSpec())
    return [jax.lax.with_sharding_constraint(k[:, : k.shape[1] // share.size * m], whole) for k in flat]


def _block(side: Inputs, index: Array, size: int, total: int) -> Inputs:
    """Examples of a block; the last one repeats the final example, whose copies are cut off afterwards."""
    rows = jnp.minimum(index * size + jnp.arange(size), total - 1)
    return jax.tree.map(lambda leaf: leaf[rows], side)
