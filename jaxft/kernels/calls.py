"""What a call for kernels must satisfy, and what it comes down to: settings, a point, and a plan."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

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
from jaxft.core.trees import tree_partition, tree_size
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.contraction import Arithmetic
from jaxft.kernels.features import named_leaves
from jaxft.kernels.jacobian import output_jacobian, output_shape
from jaxft.kernels.masks import split_params
from jaxft.kernels.methods import KERNELS, METHODS, Point, Settings
from jaxft.kernels.plan import make_plan
from jaxft.kernels.preconditioners import is_rank_one

KernelName = Literal["sgd", "signgd", "asymmetric_signgd", "asymmetric_signgd_transposed", "preconditioned"]
MethodName = Literal["auto", "contraction", "ntvp", "ghost", "tiled"]


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked call: what is computed, and where."""

    settings: Settings
    point: Point
    scalar: bool
    """Whether an example has one output, and the kernel no axes for them."""

    def shaped(self, flat: Array) -> Array:
        """Axes of examples and outputs apart."""
        c = self.settings.plan.c
        return flat if self.scalar else flat.reshape(flat.shape[0] // c, c, -1, c)


def prepare(
    where: str,
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None,
    *,
    kernel: str | tuple[str, ...],
    preconditioner: PyTree | None,
    param_mask: PyTree | None,
    method: str,
    block_size: int | tuple[int, int] | None,
    tile: int | None,
    memory_bytes: int | None,
    accum_dtype: Any,
    factor_dtype: Any,
    precision: str,
    explain: bool = False,
) -> Call:
    """Checks the arguments of ``empirical_ntk`` and makes the plan."""
    given = isinstance(kernel, str) or (isinstance(kernel, tuple | list) and bool(kernel))
    require(given, where, "needs a kernel, or a tuple of them", repr(kernel), nearest("", KERNELS))
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    for name in names:
        require(name in KERNELS, where, "unknown kernel", repr(name), nearest(str(name), KERNELS))
    require(method in METHODS, where, "unknown method", repr(method), nearest(str(method), METHODS))
    beyond = [name for name in names if not METHODS[method](KERNELS[name])]
    rule = f"kernel must be one that {method} can compute"
    require(not beyond, where, rule, ", ".join(beyond), 'Use method="contraction"')
    shape_x = output_shape(where, f, params, x)
    shape_y = shape_x if y is None else output_shape(where, f, params, y)
    same = shape_x[1:] == shape_y[1:]
    require(same, where, "rows and columns must have the same outputs", (shape_x, shape_y), "Use one f for both")
    _require_sizes(where, block_size, tile, memory_bytes)
    _require_types(where, jax.eval_shape(f, params, x).dtype, accum_dtype, factor_dtype, precision)
    require_finite(where, params, "params")
    trained, frozen = split_params(where, params, param_mask)
    leaves = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    require(bool(leaves), where, "params must have a leaf", "none", "Pass the parameters of f")
    twice = sorted({name for name in leaves if leaves.count(name) > 1})
    require(not twice, where, "leaves of params must differ in their paths", twice, "Rename one of them")
    counted = any(KERNELS[name].integer for name in names)
    rule = f"kernels of signs on both sides are counted in int32, for fewer than {MOST_SIGNS} parameters"
    fits = not counted or tree_size(trained) < MOST_SIGNS
    require(fits, where, rule, tree_size(trained), "Sum the kernels of two param_masks")
    preconditioner = trained_preconditioner(where, names, params, trained, preconditioner, param_mask)
    outputs = jax.eval_shape(f, params, x).dtype
    accumulate = jnp.dtype(accum_dtype or (outputs if jnp.finfo(outputs).bits >= 32 else jnp.float32))
    scales = named_leaves(preconditioner, is_leaf=is_rank_one)
    plan = make_plan(
        where,
        f,
        trained,
        frozen,
        (x,) if y is None else (x, y),
        kernels={name: KERNELS[name] for name in names},
        method=method,
        sizes=(shape_x[0], shape_y[0], shape_x[1] if len(shape_x) == 2 else 1),
        symmetric=y is None and all(KERNELS[name].symmetric for name in names),
        rank_one={name: p for name, p in scales.items() if is_rank_one(p)},
        block_size=block_size,
        tile=tile,
        memory_bytes=memory_bytes,
        accumulate=accumulate,
        factor_dtype=factor_dtype,
        explain=explain,
    )
    arithmetic = Arithmetic(accumulate, precision, plan.tile, jax.default_backend() != "cpu")
    settings = Settings(f, plan, arithmetic, None if factor_dtype is None else jnp.dtype(factor_dtype))
    return Call(settings, Point(trained, frozen, preconditioner), len(shape_x) == 1)


MOST_TILE = 2**24
"""Parameters of a tile: sums of more signs than that are not exact in float32."""


MOST_SIGNS = 2**31


def _require_types(where: str, outputs: Any, accumulate: Any, factors: Any, precision: Any) -> None:
    """Outputs and sums must be floats that this process has, factors floats, the precision one of JAX's."""
    isfloat = jnp.issubdtype(outputs, jnp.floating)
    require(isfloat, where, "f must return floats", outputs, "Cast its outputs")
    for name, dtype in (("accum_dtype", accumulate), ("factor_dtype", factors)):
        known = dtype is None or (
            jnp.issubdtype(dtype, jnp.floating) and jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(dtype)
        )
        advice = "Use jnp.float32, or jax.enable_x64 for jnp.float64"
        require(known, where, f"{name} must be a float type that is switched on", dtype, advice)
    known = precision is None or isinstance(precision, jax.lax.Precision) or precision in PRECISIONS
    require(known, where, "unknown precision", repr(precision), nearest(str(precision), PRECISIONS))


PRECISIONS = ("default", "high", "highest", "fastest", "bfloat16", "bfloat16_3x", "tensorfloat32", "float32")


def _require_sizes(where: str, block_size: int | tuple[int, int] | None, tile: int | None, memory: int | None) -> None:
    sides = tuple(block_size) if isinstance(block_size, tuple | list) else (block_size,)
    pair = len(sides) in (1, 2) and all(side is None or isinstance(side, int | np.integer) for side in sides)
    require(pair, where, "block_size must be a number, or one of rows and one of columns", block_size, "Use (32, 32)")
    smallest = min(1 if side is None else side for side in sides)
    require(smallest >= 1, where, "block_size must be at least 1", block_size, "Use 8, or what memory allows")
    fits = tile is None or 1 <= tile <= MOST_TILE
    require(fits, where, f"tile must lie in [1, {MOST_TILE}]", tile, "Leave it out, or use 131072")
    require(memory is None or memory >= 1, where, "memory_bytes must be at least 1", memory, "Use 2**30, say")


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
    whole = jax.tree.structure(preconditioner, is_leaf=is_rank_one) == jax.tree.structure(params)
    if whole and param_mask is not None:
        preconditioner = tree_partition(preconditioner, param_mask)[0]
    leaves = named_leaves(trained)
    shapes = [
        {
            name: _diagonal_shape(leaf, leaves.get(name))
            for name, leaf in named_leaves(tree, is_leaf=is_rank_one).items()
        }
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


def _diagonal_shape(p: Any, leaf: Any) -> tuple[int, ...]:
    """Shape of the diagonal; that of an outer product is its leaf's if they fit."""
    if not is_rank_one(p):
        return jnp.shape(p)
    return leaf.shape if leaf is not None and p.fits(leaf.shape) else (-1,)


def require_finite_kernels(where, kernels: Sequence[Array | np.ndarray], f, params: Params, sides, param_mask) -> None:
    """Raises if a concrete kernel is not finite; its gradients are made again to name their leaves."""
    if not is_concrete(kernels) or not nonfinite_leaves(kernels):
        return
    for side in sides:
        for i in range(jax.tree.leaves(side)[0].shape[0]):
            one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], side)
            bad = nonfinite_leaves(output_jacobian(f, params, one, param_mask=param_mask))
            shown = f"NaN or infinity in {', '.join(name or 'params' for name in bad[:5])} at example {i}"
            require(not bad, where, "gradients must be finite", shown, "Look at f and its inputs there")
    raise UserError(message(where, "kernel must be finite", "an overflow of finite gradients", "Scale f down"))
