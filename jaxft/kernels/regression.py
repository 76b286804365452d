"""Kernel ridge regression on empirical kernels, with the rank it had."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jaxft.core.checks import UserError, is_concrete, message, require, require_finite


class KernelRidge(NamedTuple):
    """A solved kernel ridge regression."""

    dual: Float[Array, "n"] | Float[Array, "n c"]
    """Dual coefficients: prediction is ``f0 * f0_scale + K(., x) dual``."""
    rank: Int[Array, ""]
    """Eigenvalues kept; below the size of the system the kernel was singular to working precision."""
    f0_scale: float | Float[Array, ""]


def kernel_ridge_regression(
    kernel: Float[Array, "n n"] | Float[Array, "n c n c"],
    targets: Num[Array, "n"] | Num[Array, "n c"],
    *,
    ridge: float = 0.0,
    f0: Float[Array, "n"] | Float[Array, "n c"] | None = None,
    f0_scale: float = 1.0,
    cutoff: float | None = None,
) -> KernelRidge:
    r"""Solves $(K + \lambda \lVert K \rVert_{op} I)\, \alpha = y - s f_0$ on the range of K, by its eigendecomposition.

    For ``ridge=0`` and $s = 1$ the solution is where gradient descent on the squared loss takes the linearised network
    (the minimum-norm one where K is singular). For a kernel ``(n, n)`` and targets ``(n, c)`` every output is solved
    by the same kernel; a full kernel ``(n, c, n, c)`` couples the outputs.

    Args:
      kernel: Symmetric kernel of the training examples.
      targets: Values to reach, e.g. one-hot labels or +-1.
      ridge: Regularisation relative to the operator norm of the kernel, >= 0.
      f0: Outputs of the network at the point of linearisation; ``None`` means 0.
      f0_scale: Factor s on ``f0``, here and in the prediction; 0 switches the initial outputs off.
      cutoff: Eigenvalues below ``cutoff`` times the largest are treated as 0; ``None`` means the size of the system
        times the machine epsilon.

    Returns:
      Dual coefficients in the shape of ``targets``, and the rank.

    Raises:
      UserError: Shapes that do not fit, negative ridge, or (on concrete input) a kernel that is not finite or not
        symmetric.

    Example:
      >>> solution = kernel_ridge_regression(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 1.0]))
      >>> solution.dual.tolist(), int(solution.rank)
      ([0.5, 1.0], 2)

    Reference:
      Malladi et al. 2023, arXiv 2210.05643 (solving the kernel); Saunders et al. 1998.
    """
    where = "kernel_ridge_regression"
    square = kernel.ndim in (2, 4) and kernel.shape[: kernel.ndim // 2] == kernel.shape[kernel.ndim // 2 :]
    require(square, where, "kernel must be (n, n) or (n, c, n, c)", kernel.shape, "Pass the kernel of the train set")
    fits = targets.shape[: kernel.ndim // 2] == kernel.shape[: kernel.ndim // 2] and targets.ndim <= 2
    advice = "Pass one target an output, such as one-hot labels, or the kernel of one output, as of logit_difference(f)"
    require(fits, where, "targets must match the rows of kernel", f"{targets.shape} and {kernel.shape}", advice)
    targets = targets.astype(kernel.dtype)
    require(ridge >= 0, where, "ridge must be non-negative", ridge, "Use 0 for the unregularised solution")
    fits = f0 is None or f0.shape == targets.shape
    require(fits, where, "f0 must have the shape of targets", getattr(f0, "shape", None), "Pass the outputs there")
    require_finite(where, (kernel, targets, f0), "kernel, targets and f0")

    size = targets.size if kernel.ndim == 4 else kernel.shape[0]
    flat = kernel.reshape(size, size)
    require_symmetric(where, flat)
    residual = targets if f0 is None else targets - jnp.asarray(f0_scale, targets.dtype) * f0
    eigenvalues, vectors = jnp.linalg.eigh((flat + flat.T) / 2)
    largest = eigenvalues[-1]
    floor = size * jnp.finfo(flat.dtype).eps if cutoff is None else cutoff
    kept = eigenvalues > jnp.asarray(floor, flat.dtype) * largest
    inverse = jnp.where(kept, 1 / jnp.where(kept, eigenvalues + jnp.asarray(ridge, flat.dtype) * largest, 1), 0)
    right = residual.reshape(size, -1)
    inner = jnp.matmul(vectors.T, right, precision="highest")
    dual = jnp.matmul(vectors, inverse[:, None] * inner, precision="highest")
    return KernelRidge(dual.reshape(targets.shape), kept.sum(), f0_scale if f0 is not None else 0.0)


def require_symmetric(where: str, flat: Float[Array, "n n"]) -> None:
    """Raises if a concrete matrix is not symmetric to four digits."""
    if not is_concrete(flat):
        return
    with jax.ensure_compile_time_eval():
        gap = float(jnp.abs(flat - flat.T).max() / jnp.maximum(jnp.abs(flat).max(), jnp.finfo(flat.dtype).tiny))
    advice = "Use asymmetric_lssvm for an asymmetric kernel"
    require(gap < 1e-4, where, "kernel must be symmetric", f"relative asymmetry {gap:.1e}", advice)


def kernel_ridge_predict(
    solution: KernelRidge,
    kernel: Float[Array, "m n"] | Float[Array, "m c n c"],
    f0: Float[Array, "m"] | Float[Array, "m c"] | None = None,
) -> Float[Array, "m"] | Float[Array, "m c"]:
    """Predictions at new points.

    Args:
      solution: A solved regression.
      kernel: Kernel of new points (rows) against training points (columns).
      f0: Outputs at the new points; needed where the regression was solved with them.

    Returns:
      Predicted outputs.

    Raises:
      UserError: ``f0`` missing or shapes that do not fit.

    Example:
      >>> solution = kernel_ridge_regression(jnp.eye(2), jnp.array([1.0, -1.0]))
      >>> kernel_ridge_predict(solution, jnp.array([[0.5, 0.0]])).tolist()
      [0.5]
    """
    return predict_from_dual("kernel_ridge_predict", solution.dual, solution.f0_scale, kernel, f0)


def predict_from_dual(
    where: str, dual: Array, f0_scale: float | Array, kernel: Array, f0: Array | None
) -> Float[Array, "m"] | Float[Array, "m c"]:
    """``K dual`` with the initial outputs of the solution."""
    half = kernel.ndim // 2
    fits = kernel.shape[half:] == dual.shape[:half]
    require(fits, where, "columns must be the training points", kernel.shape, "Rows are new points, columns train")
    return add_initial_outputs(where, jnp.tensordot(kernel, dual, axes=half, precision="highest"), f0_scale, f0)


def add_initial_outputs(
    where: str, change: Float[Array, "m *c"], f0_scale: float | Array, f0: Array | None
) -> Float[Array, "m *c"]:
    """``change + f0_scale * f0``; without ``f0`` the change, unless the solution was made with initial outputs."""
    if f0 is None:
        if is_concrete(f0_scale) and np.asarray(f0_scale).any():
            raise UserError(message(where, "f0 was used in the solution", None, "Pass f0 at the new points"))
        return change
    require(f0.shape == change.shape, where, "f0 must be the outputs at the new points", f0.shape, "Use the rows")
    return change + jnp.asarray(f0_scale, change.dtype) * f0
