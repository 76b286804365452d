"""Least-squares classification with a kernel that is not symmetric, such as that of sign descent."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require, require_finite
from jaxft.kernels.regression import add_initial_outputs

ONE_OUTPUT = "For two classes take the kernel of logit_difference(f), which has one output"


class AsymmetricLSSVM(NamedTuple):
    """A solved asymmetric LS-SVM, two classifiers."""

    row_dual: Float[Array, "n"]
    r"""$\beta_j y_j$: weights of the training columns, for new points in the row slot."""
    column_dual: Float[Array, "n"]
    r"""$\alpha_i y_i$: weights of the training rows, for new points in the column slot."""
    rank: Int[Array, ""]
    """Rank of the system of 2n equations; below 2n it was singular and solved by least squares."""
    smallest_singular_value: Float[Array, ""]
    r"""That of the system over $\lVert K \rVert_{op}$; the largest is $1/\gamma + 1$."""
    f0_scale: float | Float[Array, ""]


def asymmetric_lssvm(
    kernel: Float[Array, "n n"],
    labels: Int[Array, "n"],
    *,
    gamma: float,
    f0: Float[Array, "n"] | None = None,
    f0_scale: float = 1.0,
) -> AsymmetricLSSVM:
    r"""Two least-squares classifiers from $K(x, z) = \langle \phi_s(x), \phi_t(z) \rangle$, one a feature map.

    A stationary point of $w^\top v + \tfrac{g}{2} \sum_i (e_i^2 + h_i^2)$ under
    $y_i (s f_{0,i} + w^\top \phi_s(x_i)) = 1 - e_i$ and $y_i (s f_{0,i} + v^\top \phi_t(x_i)) = 1 - h_i$, with
    $y_i = \pm 1$. For multipliers $\alpha$ of the first and $\beta$ of the second, $v = \sum_i \alpha_i y_i
    \phi_s(x_i)$ and $w = \sum_i \beta_i y_i \phi_t(x_i)$; with $H_{ij} = y_i K(x_i, x_j) y_j$

    $$\begin{pmatrix} I/g & H \\ H^\top & I/g \end{pmatrix} \begin{pmatrix} \alpha \\ \beta \end{pmatrix} =
    \begin{pmatrix} 1 - s\, y f_0 \\ 1 - s\, y f_0 \end{pmatrix}.$$

    So $f_s(x) = w^\top \phi_s(x) = \sum_j \beta_j y_j K(x, x_j)$ takes new points in the row slot, and
    $f_t(x) = v^\top \phi_t(x) = \sum_i \alpha_i y_i K(x_i, x)$ in the column slot. For a symmetric kernel both are the
    ordinary LS-SVM, which is ridge regression on $\pm 1$ with ridge $1/\gamma$. There is no bias term. Kernels of
    several outputs are not covered.

    ``gamma`` is relative: $g = \gamma / \lVert K \rVert_{op}$, so scaling K changes no prediction. The singular values
    of the system, over $\lVert K \rVert_{op}$, are $|1/\gamma \pm \sigma_k / \sigma_1|$ with $\sigma_k$ those of K: it
    is positive definite for $\gamma < 1$, has a saddle for its stationary point above that, and is singular wherever
    $1/\gamma = \sigma_k / \sigma_1$ ($\gamma = 1$ always is). Where it is, to working precision, the least-squares
    solution of least norm is returned and ``rank`` says so; a symmetric positive semi-definite kernel loses nothing.

    Args:
      kernel: Kernel of the training examples, rows $\phi_s$, columns $\phi_t$: for the asymmetric sign kernel the sign
        is on the column side.
      labels: 0 or 1, for $y_i = -1$ or $+1$.
      gamma: Weight of the errors relative to the operator norm of the kernel, > 0; the larger, the closer the fit.
      f0: Outputs of the network at the point of linearisation; ``None`` means 0.
      f0_scale: Factor s on ``f0``, here and in the prediction; 0 switches the initial outputs off.

    Returns:
      The weights of both classifiers, and how well the system could be solved.

    Raises:
      UserError: A kernel of several outputs, shapes that do not fit, a gamma that is not positive, or (on concrete
        input) other labels or a kernel that is not finite.

    Example:
      >>> solution = asymmetric_lssvm(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1]), gamma=0.5)
      >>> jnp.round(3 * solution.row_dual, 4).tolist(), int(solution.rank)
      ([-1.0, 1.0], 4)

    Reference:
      He, He, Shi, Huang and Suykens 2022, arXiv 2202.01397 (AsK-LS); Malladi et al. 2023, arXiv 2210.05643, appendix A.
    """
    where = "asymmetric_lssvm"
    _check(where, kernel, labels, gamma, f0)
    n, dtype = kernel.shape[0], kernel.dtype
    left, singular, right = jnp.linalg.svd(kernel)
    largest = jnp.where(singular[0] > 0, singular[0], 1)
    singular = singular / largest

    # H = diag(y) K diag(y), so for a = alpha y and b = beta y: a/g + K b = t and b/g + K^T a = t. With K = U S V^T the
    # sum and the difference of U^T a and V^T b decouple.
    scale = f0_scale if f0 is not None else 0.0
    t = 2 * labels.astype(dtype) - 1
    t = t if f0 is None else t - jnp.asarray(scale, dtype) * f0
    from_left = jnp.matmul(left.T, t, precision="highest")
    from_right = jnp.matmul(right, t, precision="highest")
    inverse_gamma = jnp.asarray(1 / gamma, dtype)
    distance = jnp.abs(inverse_gamma - singular)
    solvable = distance > 2 * n * jnp.finfo(dtype).eps * (inverse_gamma + 1)
    total = (from_left + from_right) / (inverse_gamma + singular)
    split = jnp.where(solvable, (from_left - from_right) / jnp.where(solvable, inverse_gamma - singular, 1), 0)
    a = jnp.matmul(left, (total + split) / 2, precision="highest") / largest
    b = jnp.matmul(right.T, (total - split) / 2, precision="highest") / largest
    return AsymmetricLSSVM(b, a, n + solvable.sum(), distance.min(), scale)


def asymmetric_lssvm_predict(
    solution: AsymmetricLSSVM,
    kernel_rows: Float[Array, "m n"],
    kernel_columns: Float[Array, "n m"],
    *,
    mix: float = 0.5,
    f0: Float[Array, "m"] | None = None,
) -> Float[Array, "m"]:
    r"""Outputs $s f_0 + \mu f_s + (1 - \mu) f_t$ at new points; class 1 where they are positive.

    Args:
      solution: A solved LS-SVM.
      kernel_rows: New points in the row slot against training points in the column slot.
      kernel_columns: Training points in the row slot against the same new points in the column slot.
      mix: Share $\mu$ of the row classifier, in [0, 1].
      f0: Outputs at the new points; needed where the LS-SVM was solved with them.

    Returns:
      The outputs.

    Raises:
      UserError: Shapes that do not fit, a mix outside [0, 1], or (on a concrete solution) ``f0`` missing.

    Example:
      >>> kernel = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
      >>> solution = asymmetric_lssvm(kernel, jnp.array([0, 1]), gamma=0.5)
      >>> (asymmetric_lssvm_predict(solution, kernel, kernel) > 0).tolist()
      [False, True]
    """
    where = "asymmetric_lssvm_predict"
    n = solution.row_dual.shape[0]
    fits = kernel_rows.ndim == 2 and kernel_rows.shape[1] == n and kernel_columns.shape == kernel_rows.shape[::-1]
    got = f"{kernel_rows.shape} and {kernel_columns.shape}"
    require(fits, where, f"kernels must be (m, {n}) and ({n}, m)", got, "Pass k(new, train) and k(train, new)")
    require(0 <= mix <= 1, where, "mix must be in [0, 1]", mix, "Use 0.5 for the mean of both classifiers")
    share = jnp.asarray(mix, kernel_rows.dtype)
    f_s = jnp.matmul(kernel_rows, solution.row_dual, precision="highest")
    f_t = jnp.matmul(kernel_columns.T, solution.column_dual, precision="highest")
    change = share * f_s + (1 - share) * f_t
    return add_initial_outputs(where, change, solution.f0_scale, f0)


def _check(where: str, kernel: Array, labels: Array, gamma: float, f0: Array | None) -> None:
    advice = "Reshape it to (n, n)" if kernel.ndim == 4 and kernel.shape[1] == 1 else ONE_OUTPUT
    require(kernel.ndim != 4, where, "kernel must be (n, n), of one output", f"shape {kernel.shape}", advice)
    square = kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1]
    require(square, where, "kernel must be (n, n)", kernel.shape, "Pass the kernel of the train set")
    integers = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == kernel.shape[:1]
    got = f"{labels.dtype} of shape {labels.shape} for {kernel.shape[0]} examples"
    require(integers, where, "labels must be one integer an example", got, "Pass 0 or 1, for y = -1 or +1")
    require(gamma > 0, where, "gamma must be positive", gamma, "Larger values fit the examples closer")
    fits = f0 is None or f0.shape == labels.shape
    require(fits, where, "f0 must have the shape of labels", getattr(f0, "shape", None), "Reshape it")
    require_finite(where, (kernel, f0), "kernel and f0")
    if is_concrete(labels):
        low, high = int(np.asarray(labels).min()), int(np.asarray(labels).max())
        require(low >= 0 and high <= 1, where, "labels must be 0 or 1", f"labels from {low} to {high}", "Map -1 to 0")
