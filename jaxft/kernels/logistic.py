"""Kernel logistic regression: cross-entropy minimised over the functions of a kernel, by Newton's method."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import is_concrete, require, require_finite
from jaxft.kernels.regression import predict_from_dual, require_symmetric

STEP_LENGTHS = 20
"""Newton steps are tried at lengths 1, 1/2, 1/4, ... and the first that lowers the objective enough is taken."""


class KernelLogistic(NamedTuple):
    """A solved kernel logistic regression."""

    dual: Float[Array, "n"] | Float[Array, "n c"]
    """Dual coefficients: logits are ``f0 * f0_scale + K(., x) dual``."""
    rank: Int[Array, ""]
    """Eigenvalues kept; below the size of the kernel it was singular to working precision."""
    iterations: Int[Array, ""]
    gradient_norm: Float[Array, ""]
    r"""Norm of the objective's gradient in the function space of $K / \lVert K \rVert_{op}$, over $\sqrt n$."""
    converged: Bool[Array, ""]
    """Whether ``gradient_norm`` is within the tolerance."""
    f0_scale: float | Float[Array, ""]


def kernel_logistic_regression(
    kernel: Float[Array, "n n"] | Float[Array, "n c n c"],
    labels: Int[Array, "n"],
    *,
    ridge: float,
    classes: int | None = None,
    f0: Float[Array, "n"] | Float[Array, "n c"] | None = None,
    f0_scale: float = 1.0,
    cutoff: float | None = None,
    max_iterations: int = 100,
    tolerance: float | None = None,
) -> KernelLogistic:
    r"""Minimises cross-entropy plus the squared norm of the function space of K.

    $J(\alpha) = \sum_i \ell(s f_{0,i} + (K \alpha)_i, y_i) + \tfrac{\lambda}{2}\, \alpha^\top K \alpha$ with $\ell$ the
    cross-entropy in nats and $\lambda =$ ``ridge`` $\cdot \lVert K \rVert_{op}$: the objective of
    ``kernel_ridge_regression`` with its $\tfrac12 (f_i - y_i)^2$ replaced by $\ell$, so that a ridge means the same in
    both and scaling K changes no prediction. (The *mean* loss goes with $\lambda / n$.) The minimiser satisfies
    $\alpha = -\chi / \lambda$ on the range of K, $\chi_i = \partial \ell / \partial f_i$. The penalty is the norm of
    the function, not that of $\alpha$. ``ridge=0`` is not covered: separable examples then have no finite minimiser.

    ========================  ======================================================================
    kernel ``(n, n)``         one output $u = f_1 - f_0$, labels 0 and 1, $\ell = \log(1 + e^{\mp u})$
    the same and ``classes``  ``classes`` outputs, each a function of the same kernel; softmax
    kernel ``(n, c, n, c)``   c outputs, coupled by the kernel; softmax
    ========================  ======================================================================

    A ridge near the machine epsilon (1e-8 in float32) leaves Newton's equations singular to working precision: the
    iteration then stops early and ``converged`` is false.

    Memory: a few squares of the number of unknowns, n, n * classes or n * c; work: its cube an iteration.

    Args:
      kernel: Symmetric positive semi-definite kernel of the training examples.
      labels: Class of each example.
      ridge: Regularisation relative to the operator norm of the kernel, > 0.
      classes: Number of outputs that share a kernel ``(n, n)``; ``None`` means one output.
      f0: Outputs of the network at the point of linearisation; ``None`` means 0.
      f0_scale: Factor s on ``f0``, here and in the prediction; 0 switches the initial outputs off.
      cutoff: Eigenvalues below ``cutoff`` times the largest are treated as 0; ``None`` means the size of the kernel
        times the machine epsilon.
      max_iterations: Newton steps at most.
      tolerance: Bound on ``gradient_norm`` that ends the iteration; ``None`` means 100 times the machine epsilon.

    Returns:
      Dual coefficients, ``(n,)`` for one output, else ``(n, c)``, and how the iteration ended: see ``converged``.

    Raises:
      UserError: Shapes that do not fit, a ridge that is not positive, or (on concrete input) labels that are no class,
        a kernel that is not finite, not symmetric or has a clearly negative eigenvalue.

    Example:
      >>> kernel, labels = jnp.eye(2), jnp.array([0, 1])
      >>> solution = kernel_logistic_regression(kernel, labels, ridge=0.25 / jnp.log(3.0).item())
      >>> jax.nn.sigmoid(kernel_logistic_predict(solution, kernel)).round(4).tolist()
      [0.25, 0.75]

    Reference:
      Zhu and Hastie 2005, Kernel logistic regression and the import vector machine (JCGS 14).
    """
    where = "kernel_logistic_regression"
    _check(where, kernel, labels, ridge, classes, f0)
    n, dtype = kernel.shape[0], kernel.dtype
    size = n if kernel.ndim == 2 else n * kernel.shape[1]
    # Outputs from coordinates: one output u stands for the logits (0, u).
    one_output = kernel.ndim == 2 and classes is None
    spread = jnp.array([[0.0], [1.0]], dtype) if one_output else jnp.eye(classes or kernel.shape[1], dtype=dtype)
    _check_labels(where, labels, spread.shape[0])

    eigenvalues, vectors, largest = _spectrum(where, kernel.reshape(size, size))
    floor = size * jnp.finfo(dtype).eps if cutoff is None else cutoff
    kept = eigenvalues > jnp.asarray(floor, dtype)
    root = jnp.sqrt(jnp.where(kept, eigenvalues, 0))
    features = vectors * root[None]  # K / |K| = features features^T
    if kernel.ndim == 2:
        features = (features[:, None, :, None] * spread[None, :, None, :]).reshape(n, len(spread), -1)
    else:
        features = features.reshape(n, kernel.shape[1], size)

    scale = f0_scale if f0 is not None else 0.0
    start = jnp.zeros((n, spread.shape[1]), dtype) if f0 is None else jnp.asarray(scale, dtype) * f0.reshape(n, -1)
    start = jnp.matmul(start, spread.T, precision="highest")
    tolerance = 100 * float(jnp.finfo(dtype).eps) if tolerance is None else tolerance
    settings = jnp.asarray(ridge, dtype), jnp.asarray(max_iterations), jnp.asarray(tolerance, dtype)
    theta, gradient_norm, iterations = _newton(features, start, labels, *settings)

    inverse_root = jnp.where(kept, 1 / jnp.where(kept, root, 1), 0)
    dual = jnp.matmul(vectors, inverse_root[:, None] * theta.reshape(size, -1), precision="highest") / largest
    dual = dual.reshape(n) if one_output else dual.reshape(n, len(spread))
    return KernelLogistic(dual, kept.sum(), iterations, gradient_norm, gradient_norm <= tolerance, scale)


def kernel_logistic_predict(
    solution: KernelLogistic,
    kernel: Float[Array, "m n"] | Float[Array, "m c n c"],
    f0: Float[Array, "m"] | Float[Array, "m c"] | None = None,
) -> Float[Array, "m"] | Float[Array, "m c"]:
    """Logits at new points; one output is the logit of class 1 against class 0.

    Args:
      solution: A solved regression.
      kernel: Kernel of new points (rows) against training points (columns).
      f0: Outputs at the new points; needed where the regression was solved with them.

    Returns:
      Predicted logits.

    Raises:
      UserError: Shapes that do not fit, or (on a concrete solution) ``f0`` missing.

    Example:
      >>> solution = kernel_logistic_regression(jnp.eye(2), jnp.array([0, 1]), ridge=1.0)
      >>> (kernel_logistic_predict(solution, jnp.array([[1.0, 1.0], [0.0, 2.0]])) > 0).tolist()
      [False, True]
    """
    return predict_from_dual("kernel_logistic_predict", solution.dual, solution.f0_scale, kernel, f0)


def _check(where: str, kernel: Array, labels: Array, ridge: float, classes: int | None, f0: Array | None) -> None:
    square = kernel.ndim in (2, 4) and kernel.shape[: kernel.ndim // 2] == kernel.shape[kernel.ndim // 2 :]
    require(square, where, "kernel must be (n, n) or (n, c, n, c)", kernel.shape, "Pass the kernel of the train set")
    several = kernel.ndim == 2 or kernel.shape[1] > 1
    require(several, where, "a full kernel must have two outputs or more", kernel.shape, "Reshape it to (n, n)")
    integers = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == kernel.shape[:1]
    got = f"{labels.dtype} of shape {labels.shape} for {kernel.shape[0]} examples"
    require(integers, where, "labels must be one integer an example", got, "Pass class indices, not targets")
    require(ridge > 0, where, "ridge must be positive", ridge, "Separable examples have no finite minimiser at 0")
    alone = classes is None or kernel.ndim == 2
    require(alone, where, "classes goes with a kernel (n, n)", f"{classes} and {kernel.shape}", "Leave it out")
    require(
        classes is None or classes >= 2, where, "classes must be at least 2", classes, "Leave it out for one output"
    )
    outputs = kernel.shape[1:2] if kernel.ndim == 4 else () if classes is None else (classes,)
    expected = (kernel.shape[0], *outputs)
    fits = f0 is None or f0.shape == expected
    require(fits, where, f"f0 must have shape {expected}", getattr(f0, "shape", None), "Reshape it, or pass classes")
    require_finite(where, (kernel, f0), "kernel and f0")


def _check_labels(where: str, labels: Array, classes: int) -> None:
    if is_concrete(labels):
        low, high = int(np.asarray(labels).min()), int(np.asarray(labels).max())
        inside, shown = low >= 0 and high < classes, f"labels from {low} to {high}"
        require(inside, where, f"labels must be in 0..{classes - 1}", shown, "Map them, or pass classes")


def _spectrum(where: str, flat: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues relative to the largest, eigenvectors, the largest (1 for the zero kernel)."""
    require_symmetric(where, flat)
    eigenvalues, vectors = jnp.linalg.eigh((flat + flat.T) / 2)
    largest = jnp.where(eigenvalues[-1] > 0, eigenvalues[-1], 1)
    eigenvalues = eigenvalues / largest
    if is_concrete(eigenvalues):
        lowest = float(eigenvalues[0])
        got = f"an eigenvalue {lowest:.1e} times the largest"
        require(lowest > -1e-4, where, "kernel must be positive semi-definite", got, "Without it there is no norm")
    return eigenvalues, vectors, largest


@jax.jit
def _newton(
    features: Array, start: Array, labels: Array, ridge: Array, max_iterations: Array, tolerance: Array
) -> tuple[Array, Array, Array]:
    r"""Minimises $\sum_i \ell(f_i, y_i) + \frac{\rho}{2} \lVert\theta\rVert^2$ for $f = f_0 + \Phi \theta$, from 0."""
    n, c, size = features.shape
    flat, dtype = features.reshape(n * c, size), features.dtype
    one_hot = jax.nn.one_hot(labels, c, dtype=dtype)
    lengths = 0.5 ** jnp.arange(STEP_LENGTHS, dtype=dtype)

    def logits(theta):
        return start + jnp.matmul(flat, theta, precision="highest").reshape(n, c)

    def objective(theta):
        f = logits(theta)
        return jnp.sum(jax.nn.logsumexp(f, axis=1) - jnp.sum(one_hot * f, axis=1)) + ridge / 2 * jnp.sum(theta**2)

    def gradient_at(theta):
        chi = jax.nn.softmax(logits(theta)) - one_hot
        return jnp.matmul(flat.T, chi.reshape(-1), precision="highest") + ridge * theta

    def hessian_at(theta):
        p = jax.nn.softmax(logits(theta))
        curvature = p[:, :, None] * jnp.eye(c, dtype=dtype)[None] - p[:, :, None] * p[:, None, :]
        bent = jnp.matmul(curvature, features, precision="highest").reshape(n * c, size)
        return jnp.matmul(flat.T, bent, precision="highest") + ridge * jnp.eye(size, dtype=dtype)

    def norm(gradient):
        return jnp.linalg.norm(gradient) / jnp.sqrt(jnp.asarray(n, dtype))

    def unfinished(state):
        _, gradient, iterations, lowered = state
        return (norm(gradient) > tolerance) & (iterations < max_iterations) & lowered

    def step(state):
        theta, gradient, iterations, _ = state
        direction = -jax.scipy.linalg.solve(hessian_at(theta), gradient, assume_a="pos")
        value, slope = objective(theta), jnp.vdot(gradient, direction, precision="highest")
        reached = jax.vmap(lambda length: objective(theta + length * direction))(lengths)
        # Near the minimum the gain of a good step drowns in the rounding of the objective.
        rounding = 10 * jnp.finfo(dtype).eps * (1 + jnp.abs(value))
        enough = reached <= value + 1e-4 * lengths * slope + rounding
        lowered = enough.any()
        theta = jnp.where(lowered, theta + lengths[jnp.argmax(enough)] * direction, theta)
        return theta, gradient_at(theta), iterations + 1, lowered

    zero = jnp.zeros(size, dtype)
    first = (zero, gradient_at(zero), jnp.zeros_like(max_iterations), jnp.ones((), bool))
    theta, gradient, iterations, _ = jax.lax.while_loop(unfinished, step, first)
    return theta, norm(gradient), iterations
