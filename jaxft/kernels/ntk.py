r"""Empirical neural tangent kernels of any ``f(params, x)``, in blocks of bounded memory.

The kernels are the entries of ``methods.KERNELS``; the loop over blocks is in ``blocks``.
"""

import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import (
    UserError,
    failing_leaves,
    is_concrete,
    message,
    nearest,
    nonfinite_leaves,
    path_name,
    require,
    require_finite,
)
from jaxft.core.trees import tree_partition
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.blocks import Settings, blocked_kernels, fitting_blocks, sharded_kernels
from jaxft.kernels.jacobian import output_jacobian, output_shape
from jaxft.kernels.masks import split_params
from jaxft.kernels.methods import KERNELS, METHODS

KernelName = Literal["sgd", "signgd", "asymmetric_signgd", "preconditioned"]
MethodName = Literal["contraction", "ntvp"]


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
    method: MethodName = "contraction",
    block_size: int | tuple[int, int] | None = None,
    accum_dtype: jnp.dtype | type | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
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
    method: MethodName = "contraction",
    block_size: int | tuple[int, int] | None = None,
    accum_dtype: jnp.dtype | type | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> dict[str, Array]: ...


def empirical_ntk(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    kernel: KernelName | tuple[KernelName, ...] = "sgd",
    preconditioner: PyTree | None = None,
    param_mask: PyTree | None = None,
    method: MethodName = "contraction",
    block_size: int | tuple[int, int] | None = None,
    accum_dtype: jnp.dtype | type | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> Float[Array, "n m"] | Float[Array, "n c m c"] | dict[str, Array]:
    r"""Kernel of gradient descent (or of a preconditioned or sign-based variant) at ``params``.

    ========================  ==================================================================
    ``sgd``                   $K = J_x J_y^\top$: the NTK
    ``signgd``                $K = \operatorname{sign}(J_x) \operatorname{sign}(J_y)^\top$
    ``asymmetric_signgd``     $K = J_x \operatorname{sign}(J_y)^\top$: the sign is on the columns,
                              the training examples whose steps move the outputs of the rows
    ``preconditioned``        $K = J_x P J_y^\top$, $P$ diagonal and non-negative: the NTK of
                              Adam with a frozen second moment for $P = 1 / (\sqrt{\hat v} + \epsilon)$
    ========================  ==================================================================

    For ``y=None`` all but ``asymmetric_signgd`` are symmetric and positive semi-definite. A sign step on one example
    moves a single output by ``asymmetric_signgd``; with several outputs, or several examples a step, the sign of a sum
    is not the sum of signs, and no kernel of single gradients describes it. ``signgd`` is its symmetric surrogate, for
    solvers that need one. The mean over outputs that others call the trace is ``jnp.einsum("ncmc->nm", k) / c``.
    Outputs that depend on other examples of the batch are not covered.

    Memory: the Jacobians of two blocks, ``(rows + columns) * c * p`` numbers, and their maps, whatever n and m
    (``ntvp``: those of the columns, and the activations of the rows for each of ``columns * c`` directions). Work of
    ``contraction``: n * c gradients for the rows, m * c for the columns of every block of rows, and 2 n m c^2 p
    operations to contract them (half of it for a symmetric kernel with ``y=None``). ``ntvp`` replaces the gradients of
    the rows and the contraction by a forward derivative of n examples for every one of the m * c columns: it pays where
    c exceeds twice the tokens of an example.

    Args:
      f: Outputs ``[n]`` (kernel ``(n, m)``) or ``[n, c]`` (kernel ``(n, c, m, c)``).
      params: Point of linearisation.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``.
      kernel: Name of the kernel, or several: they share the gradients, which are most of the work.
      preconditioner: The diagonal of P as a tree like ``params``; goes with ``preconditioned``.
      param_mask: The parameters that are trained, a tree of bools (see ``parameter_mask``); ``None`` means all.
      method: ``contraction`` of Jacobians, or ``ntvp`` (NTK-vector products, not for ``signgd``).
      block_size: Examples in a block, or (rows, columns); blocks are square for ``y=None``, by the first. ``None``
        means as many as have a GiB of gradients.
      accum_dtype: Type of the result, and for ``contraction`` of the sums over parameters; ``None`` means that of the
        outputs, float32 at least.
      precision: Precision of the matrix products of ``contraction``.
      mesh: Devices to spread the columns over, along all its axes; ``None`` means no placement.

    Returns:
      The kernel, first axes ``x``, last axes ``y``; a dict of them by name where several were asked for.

    Raises:
      UserError: An unknown kernel or method, a kernel that the method cannot compute, a missing or ill-fitting or
        (concrete) negative preconditioner, a mask that does not fit, a block size below 1, non-finite parameters or
        gradients (the leaves are named), outputs of another shape.

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
    where = "empirical_ntk"
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    for name in names:
        require(name in KERNELS, where, "unknown kernel", repr(name), nearest(str(name), KERNELS))
    require(bool(names), where, "needs a kernel", "none", nearest("", KERNELS))
    require(method in METHODS, where, "unknown method", repr(method), nearest(str(method), METHODS))
    beyond = [name for name in names if not METHODS[method].supports(KERNELS[name])]
    rule = f"kernel must be one that {method} can compute"
    require(not beyond, where, rule, ", ".join(beyond), 'Use method="contraction"')
    shape_x = output_shape(where, f, params, x)
    shape_y = shape_x if y is None else output_shape(where, f, params, y)
    same = shape_x[1:] == shape_y[1:]
    require(same, where, "rows and columns must have the same outputs", (shape_x, shape_y), "Use one f for both")
    require_finite(where, params, "params")
    trained, frozen = split_params(where, params, param_mask)
    preconditioner = trained_preconditioner(where, names, params, trained, preconditioner, param_mask)
    outputs = jax.eval_shape(f, params, x).dtype
    accumulate = jnp.dtype(accum_dtype or (outputs if jnp.finfo(outputs).bits >= 32 else jnp.float32))
    if block_size is None:
        each = math.prod(shape_x[1:]) * sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
        block_size = fitting_blocks(shape_x[0], None if y is None else shape_y[0], each)
    rows, columns = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    require(min(rows, columns) >= 1, where, "block_size must be at least 1", block_size, "Use 8, or what memory allows")
    settings = Settings(f, names, method, rows, columns, accumulate, precision)
    flat = (
        blocked_kernels(settings, trained, frozen, x, y, preconditioner)
        if mesh is None
        else sharded_kernels(mesh, settings, trained, frozen, x, x if y is None else y, preconditioner)
    )
    if len(shape_x) == 2:
        n, c = shape_x
        flat = [k.reshape(n, c, -1, c) for k in flat]
    _require_finite_kernels(where, flat, f, params, (x, x if y is None else y), param_mask)
    return flat[0] if isinstance(kernel, str) else dict(zip(names, flat, strict=True))


def trained_preconditioner(
    where: str,
    kernels: tuple[str, ...],
    params: Params,
    trained: Params,
    preconditioner: PyTree | None,
    param_mask: PyTree | None,
) -> PyTree | None:
    """The preconditioner of the trained leaves, from one like ``params`` or like ``trained``.

    Raises:
      UserError: It comes without the preconditioned kernel or not with it, has other leaves, or (concrete) entries that
        are negative or not finite.
    """
    given = preconditioner is not None
    rule = 'preconditioner goes with kernel="preconditioned", and only with it'
    advice = "Pass 1 / (sqrt(second moment) + eps), or choose another kernel"
    require(given == ("preconditioned" in kernels), where, rule, f"{', '.join(kernels)}, given={given}", advice)
    if not given:
        return None
    whole = jax.tree.structure(preconditioner) == jax.tree.structure(params)
    if whole and param_mask is not None:
        preconditioner = tree_partition(preconditioner, param_mask)[0]
    shapes = [
        {path_name(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (trained, preconditioner)
    ]
    other = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    rule = "preconditioner must have the tree and shapes of params"
    require(not other, where, rule, f"others in {', '.join(other[:5])}", "Map it over params")
    if is_concrete(preconditioner):
        bad = failing_leaves(lambda leaf: ((leaf >= 0) & jnp.isfinite(leaf)).all(), preconditioner)
        advice = "Use its magnitude, and an eps above 0 where a second moment is 0"
        shown = f"others in {', '.join(bad[:5])}"
        require(not bad, where, "preconditioner must be finite and non-negative", shown, advice)
    return preconditioner


def _require_finite_kernels(where, kernels: list[Array], f, params: Params, sides, param_mask) -> None:
    """Raises if a concrete kernel is not finite; its gradients are made again to name their leaves."""
    if not is_concrete(kernels) or not nonfinite_leaves(kernels):
        return
    for side in sides:
        for i in range(jax.tree.leaves(side)[0].shape[0]):
            one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], side)
            bad = nonfinite_leaves(output_jacobian(f, params, one, param_mask=param_mask))
            shown = f"NaN or infinity in {', '.join(bad[:5])} at example {i}"
            require(not bad, where, "gradients must be finite", shown, "Look at f and its inputs there")
    raise UserError(message(where, "kernel must be finite", "an overflow of finite gradients", "Scale f down"))
