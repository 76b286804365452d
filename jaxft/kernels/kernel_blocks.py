"""Empirical kernels that outgrow memory: block by block, kept in a folder, taken up where they were left."""

import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.batch_dependence import require_independent_outputs
from jaxft.kernels.block_layout import Layout
from jaxft.kernels.block_loop import KernelBlock, run_blocks
from jaxft.kernels.calls import KernelName, MethodName, prepare, require_finite_kernels
from jaxft.kernels.digests import problem_digests
from jaxft.kernels.methods import KERNELS, block_of, features_of
from jaxft.kernels.sharded import sharded_kernels
from jaxft.kernels.shared_store import open_store

__all__ = ["KernelBlock", "kernel_blocks"]


ENGINE = 1
"""Version of the arithmetic, in the manifest of a store: to be raised with a change of what blocks contain."""


def kernel_blocks(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    kernel: KernelName | tuple[KernelName, ...] = "sgd",
    preconditioner: PyTree | None = None,
    param_mask: PyTree | None = None,
    method: MethodName = "auto",
    block_size: int | tuple[int, int] | None = None,
    tile: int | None = None,
    memory_bytes: int | None = None,
    accum_dtype: jnp.dtype | type | None = None,
    factor_dtype: jnp.dtype | type | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
    store: str | os.PathLike | None = None,
    resume: bool = True,
) -> Iterator[KernelBlock]:
    """The kernels of ``empirical_ntk`` block by block: never more of them in memory than a few blocks.

    With a store each block is on the disk, under a checksum, before it comes; a call that is stopped or killed at any
    moment goes on from there, and computes no finished block again. A block whose bytes have changed is computed again,
    and a ``StoreWarning`` says so. ``open_kernel_store`` reads the whole back as a memory map. The inputs themselves
    are held in memory.

    Args:
      f: As for ``empirical_ntk``.
      params: Point of linearisation.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``, and blocks below the diagonal of symmetric kernels are then mirror images.
      kernel: Name of the kernel, or several.
      preconditioner: As for ``empirical_ntk``.
      param_mask: As for ``empirical_ntk``.
      method: As for ``empirical_ntk``.
      block_size: Examples in a block, or (rows, columns); ``None`` means as many as ``memory_bytes`` hold.
      tile: Parameters of a tile.
      memory_bytes: Of the features of two blocks.
      accum_dtype: Type of the kernels.
      factor_dtype: Type in which factors are held.
      precision: Precision of the matrix products.
      mesh: Devices to spread each block over, as ``empirical_ntk`` does.
      store: Folder of the kernels, made if absent; several processes share one. ``None`` means that nothing is kept.
      resume: Whether a store with blocks may be continued.

    Yields:
      Blocks ``KernelBlock(rows, columns, kernels)``, which together hold every entry once.

    Raises:
      UserError: As ``empirical_ntk``; a store of another function, parameters, data or settings, with the fields that
        differ; a store that is in use, not resumed, or cannot be written.

    Example:
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])
      >>> for block in kernel_blocks(lambda w, x: x @ w, jnp.ones(2), x, block_size=2):
      ...     print(block.rows, block.columns, block.kernels["sgd"].tolist())
      slice(0, 2, None) slice(0, 2, None) [[5.0, 1.0], [1.0, 10.0]]
      slice(0, 2, None) slice(2, 3, None) [[2.0], [-1.0]]
      slice(2, 3, None) slice(0, 2, None) [[2.0, -1.0]]
      slice(2, 3, None) slice(2, 3, None) [[1.0]]
    """
    call = prepare(
        "kernel_blocks",
        f,
        params,
        x,
        y,
        kernel=kernel,
        preconditioner=preconditioner,
        param_mask=param_mask,
        method=method,
        block_size=block_size,
        tile=tile,
        memory_bytes=memory_bytes,
        accum_dtype=accum_dtype,
        factor_dtype=factor_dtype,
        precision=precision,
    )
    settings, plan = call.settings, call.settings.plan
    layout = Layout(
        plan.kernels,
        (plan.n, plan.m),
        None if call.scalar else plan.c,
        (plan.rows, plan.columns),
        y is None and all(KERNELS[name].symmetric for name in plan.kernels),
        jnp.dtype(settings.arithmetic.accumulate),
    )
    require_independent_outputs("kernel_blocks", f, params, x if y is None or plan.n > 1 else y)
    kept = None
    if store is not None:
        identity = problem_digests(f, params, x, y, preconditioner=preconditioner, param_mask=param_mask)
        factors = None if settings.factor_dtype is None else settings.factor_dtype.name
        identity |= {
            "engine": ENGINE,
            "backend": jax.default_backend(),
            "method": method,
            "tile": plan.tile,
            "precision": precision,
            "factor_dtype": factors,
        }
        kept = open_store(store, layout, identity, resume=resume)

    def check(block: KernelBlock) -> None:
        rows, columns = (
            jax.tree.map(lambda leaf, part=part: leaf[part], side)
            for side, part in ((x, block.rows), (x if y is None else y, block.columns))
        )
        require_finite_kernels("kernel_blocks", list(block.kernels.values()), f, params, (rows, columns), param_mask)

    if mesh is None:
        features = functools.partial(_features, settings, call.point)
        gram = functools.partial(_gram, settings, call.point)
    else:

        def features(block: Inputs) -> Inputs:
            return block

        def gram(rows: Inputs, columns: Inputs) -> Array:
            return jnp.stack(sharded_kernels(mesh, settings, call.point, rows, columns))

    # Work given ahead needs a device of its own, and holds more features.
    ahead = jax.default_backend() != "cpu"
    return run_blocks(features, gram, x, y, layout=layout, store=kept, check=check, ahead=ahead)


_features = jax.jit(features_of, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _gram(settings, point, rows, columns) -> Array:
    return block_of(settings, point, rows)(columns)
