"""The loop over blocks of rows and columns."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft.core.types import Inputs
from jaxft.kernels.methods import Point, Settings, block_of, features_of


@functools.partial(jax.jit, static_argnums=0)
def blocked_kernels(settings: Settings, point: Point, x: Inputs, y: Inputs | None) -> list[Array]:
    """The kernels with (example, output) flattened on both sides.

    For ``y=None`` and symmetric kernels only blocks on or above the diagonal are computed.
    """
    plan = settings.plan
    symmetric = [y is None and maps.symmetric for maps in settings.maps]
    half, names, c = all(symmetric), len(plan.kernels), plan.c
    square, y = y is None, x if y is None else y
    n, m = (jax.tree.leaves(side)[0].shape[0] for side in (x, y))
    rows, columns = min(plan.rows, n), min(plan.columns, m)

    def row_of_blocks(i):
        against = block_of(settings, point, features_of(settings, point, _block(x, i, rows, n)))

        def one_block(j):
            def compute():
                return against(features_of(settings, point, _block(y, j, columns, m)))

            if not half:
                return compute()
            empty = jnp.zeros((names, rows * c, columns * c), settings.arithmetic.accumulate)
            return jax.lax.cond(j >= i, compute, lambda: empty)

        blocks = jax.lax.map(one_block, jnp.arange(-(-m // columns)))
        return jnp.moveaxis(blocks, 0, 2).reshape(names, rows * c, -1)[..., : m * c]

    if rows == n and columns == m:  # no loop: its buffers would be copied
        left = features_of(settings, point, x)
        full = block_of(settings, point, left)(left if square else features_of(settings, point, y))
    else:
        full = jnp.moveaxis(jax.lax.map(row_of_blocks, jnp.arange(-(-n // rows))), 0, 1)
        full = full.reshape(names, -1, m * c)[:, : n * c]
    return [mirrored(k) if twin else k for k, twin in zip(full, symmetric, strict=True)]


def mirrored(kernel: Array) -> Array:
    """The square matrix of the entries on and above the diagonal, and their mirror image."""
    return jnp.triu(kernel) + jnp.triu(kernel, 1).T


def _block(side: Inputs, index: Array, size: int, total: int) -> Inputs:
    """Examples of a block; the last one repeats the final example, whose copies are cut off afterwards."""
    rows = jnp.minimum(index * size + jnp.arange(size), total - 1)
    return jax.tree.map(lambda leaf: leaf[rows], side)
