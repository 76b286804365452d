r"""Empirical neural tangent kernels of any ``f(params, x)``, in memory.

The kernels are the entries of ``methods.KERNELS``, the loop over blocks is in ``blocks``; ``kernel_blocks`` is for
kernels that outgrow memory.
"""

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.batch_dependence import Changes, output_changes, require_small
from jaxft.kernels.blocks import blocked_kernels
from jaxft.kernels.calls import KernelName, MethodName, prepare, require_finite_kernels
from jaxft.kernels.methods import Point, Settings
from jaxft.kernels.plan import Plan
from jaxft.kernels.sharded import sharded_kernels


@overload
def empirical_ntk(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    kernel: KernelName = "sgd",
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
    explain: Literal[False] = False,
) -> Array: ...


@overload
def empirical_ntk(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    kernel: tuple[KernelName, ...],
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
    explain: Literal[False] = False,
) -> dict[str, Array]: ...


@overload
def empirical_ntk(
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
    explain: Literal[True],
) -> Plan: ...


def empirical_ntk(
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
    explain: bool = False,
) -> Float[Array, "n m"] | Float[Array, "n c m c"] | dict[str, Array] | Plan:
    r"""Kernel of gradient descent (or of a preconditioned or sign-based variant) at ``params``.

    ========================  ==================================================================
    ``sgd``                   $K = J_x J_y^\top$: the NTK
    ``signgd``                $K = \operatorname{sign}(J_x) \operatorname{sign}(J_y)^\top$
    ``asymmetric_signgd``     $K = J_x \operatorname{sign}(J_y)^\top$: the sign is on the columns,
                              the training examples whose steps move the outputs of the rows
    its ``_transposed``       $K = \operatorname{sign}(J_x) J_y^\top$: its transpose with x and y exchanged; solvers of
                              asymmetric kernels need both
    ``preconditioned``        $K = J_x P J_y^\top$, $P$ diagonal and non-negative: the NTK of
                              Adam with a frozen second moment for $P = 1 / (\sqrt{\hat v} + \epsilon)$
    ========================  ==================================================================

    For ``y=None`` all but the asymmetric ones are symmetric and positive semi-definite. A sign step on one example
    moves a single output by ``asymmetric_signgd``; with several outputs, or several examples a step, the sign of a sum
    is not the sum of signs, and no kernel of single gradients describes it. ``signgd`` is its symmetric surrogate, for
    solvers that need one. The mean over outputs that others call the trace is ``jnp.einsum("ncmc->nm", k) / c``.
    Outputs that depend on other examples of the batch are refused where their values show it, and not covered.

    ================  ==================================================================================================
    ``contraction``   The gradients of a block are held whole. For every f and kernel.
    ``tiled``         The gradients of leaves with taps are formed a tile at a time, and never held: factors of
                      tokens * (inputs + c * outputs) numbers a matrix are. For every kernel of a ``FactoredFn``
                      (``jaxft.core.factors``): those of ``jaxft.nn`` are, and ``jaxft.nn.linen_outputs`` makes one of a
                      Linen module. Leaves without taps go as in ``contraction``.
    ``ghost``         As ``tiled``, but the gradients are not formed at all. For kernels without maps, scales of rank
                      one (``RankOne``), and signs of gradients of rank one; pays for short sequences.
    ``ntvp``          NTK-vector products: a forward derivative of the n rows for each of the m * c columns. Not for
                      ``signgd``; pays where c exceeds twice the tokens of an example.
    ``auto``          Leaf by leaf: ``ghost`` where that takes the fewest operations, whole gradients where they are
                      smaller than their factors (biases, small matrices), ``tiled`` otherwise.
    ================  ==================================================================================================

    All give the same kernel, to rounding. ``explain=True`` says what a call would do, and what it costs. A gradient
    that is 0 but for rounding has a sign that is noise: that of attention's key biases is such a gradient. Reverse-mode
    derivatives of the kernel itself need ``contraction``.

    Memory: the features of two blocks, about ``memory_bytes``, and tiles of ``(rows + columns) * c * tile`` numbers,
    whatever n and m are; ``Plan.peak_bytes`` bounds the whole (``ntvp``: the gradients of the columns, and the
    activations of the rows for each of ``columns * c`` directions). The features of the columns are made again for
    every block of rows.

    Args:
      f: Outputs ``[n]`` (kernel ``(n, m)``) or ``[n, c]`` (kernel ``(n, c, m, c)``).
      params: Point of linearisation.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``.
      kernel: Name of the kernel, or several: they share the gradients, which are most of the work.
      preconditioner: The diagonal of P as a tree like ``params``; goes with ``preconditioned``.
      param_mask: The parameters that are trained, a tree of bools (see ``parameter_mask``); ``None`` means all.
      method: How; see the table.
      block_size: Examples in a block, or (rows, columns); blocks are square for ``y=None``, by the first. ``None``
        means as many as ``memory_bytes`` hold.
      tile: Parameters of a tile; ``None`` means 131072 on CPU. Not for ``ntvp``, which has neither tiles nor factors.
      memory_bytes: Of the features of two blocks, where no block size is given; ``None`` means a GiB.
      accum_dtype: Type of the result and of the sums over parameters; ``None`` means that of the outputs, float32 at
        least. Signs are counted in integers, whatever it is.
      factor_dtype: Type in which factors are held; ``None`` means that of the network. With bfloat16 sums are still
        taken in float32.
      precision: Precision of the matrix products.
      mesh: Devices to spread the work over, by the names of its axes: ``rows`` spreads x; ``tiles`` the work on every
        block, for few examples of a large network; all others y (see ``jaxft.kernels.sharded``). The kernel comes whole
        on every device. ``None`` means no placement.
      explain: Whether to return the plan instead of the kernel.

    Returns:
      The kernel, first axes ``x``, last axes ``y``; a dict of them by name where several were asked for; the plan for
      ``explain=True``.

    Raises:
      UserError: An unknown kernel or method, a kernel that the method cannot compute, a missing or ill-fitting or
        (concrete) negative preconditioner, a mask that does not fit, a block size below 1, non-finite parameters or
        gradients (the leaves are named), outputs of another shape or (concrete) that change with the other examples of
        the batch, ``ghost`` for a kernel that needs formed gradients.

    Example:
      >>> f = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> empirical_ntk(f, jnp.ones(2), x).tolist()
      [[5.0, 1.0], [1.0, 10.0]]
      >>> empirical_ntk(f, jnp.ones(2), x, kernel="asymmetric_signgd").tolist()
      [[3.0, -1.0], [2.0, 4.0]]

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 3 (SGD and sign kernels); Jacot et al. 2018, arXiv 1806.07572;
      Novak et al. 2022, arXiv 2206.08720 (contraction and NTK-vector products).
    """
    call = prepare(
        "empirical_ntk",
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
        explain=explain,
    )
    if explain:
        return call.settings.plan
    flat, changes = _kernels_and_changes(mesh, call.settings, call.point, x, y)
    require_small("empirical_ntk", changes)
    flat = [call.shaped(k) for k in flat]
    require_finite_kernels("empirical_ntk", flat, f, params, (x, x if y is None else y), param_mask)
    return flat[0] if isinstance(kernel, str) else dict(zip(call.settings.plan.kernels, flat, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kernels_and_changes(
    mesh: Mesh | None, settings: Settings, point: Point, x: Inputs, y: Inputs | None
) -> tuple[list[Array], Changes]:
    """One program for both: the changes cost a few evaluations of f, and nothing where nobody looks at them."""
    several = y is None or jax.tree.leaves(x)[0].shape[0] > 1
    changes = output_changes(settings.f, tree_combine(point.trained, point.frozen), x if several else y)
    if mesh is None:
        return blocked_kernels(settings, point, x, y), changes
    everywhere = NamedSharding(mesh, PartitionSpec())
    return sharded_kernels(mesh, settings, point, x, y), jax.lax.with_sharding_constraint(changes, everywhere)
