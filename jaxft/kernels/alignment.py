"""How well a kernel agrees with the labels, before anything is solved."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require, require_finite
from jaxft.kernels.regression import kernel_ridge_regression


def kernel_alignment(
    kernel: Float[Array, "n n"] | Float[Array, "n c n c"],
    labels: Int[Array, "n"] | Float[Array, "n"] | Float[Array, "n c"],
    *,
    centered: bool = True,
) -> Float[Array, ""]:
    r"""Cosine of the angle between a kernel and that of the labels.

    $\langle K_c, T_c \rangle_F / (\lVert K_c \rVert_F \lVert T_c \rVert_F)$ with $T = Y Y^\top$, and the index c for
    kernels of centred features: 1 if K is T up to a positive factor (and, centred, up to an offset of the features).

    ======================  ===============================================================================
    kernel ``(n, n)``       $T_{ij} = \sum_k Y_{ik} Y_{jk}$, Y one-hot labels, or the float targets given
    kernel ``(n, c, n, c)`` $T_{ik,jl} = Y_{ik} Y_{jl}$: targets flattened in the order (example, output)
    ======================  ===============================================================================

    Features are centred over examples, each output on its own. For two classes, one-hot labels and targets of -1 and 1
    have the same centred alignment; without centring they do not: pass the targets that are meant. A high alignment
    promises a good predictor from the kernel; a low one rules nothing out.

    Args:
      kernel: Kernel of the examples; of an asymmetric one the symmetric part alone meets the labels.
      labels: Integer classes, or float targets.
      centered: Whether to centre the features of both kernels.

    Returns:
      The alignment, in [-1, 1]; non-negative for a positive semi-definite kernel. Under tracing NaN where the centred
      labels vanish.

    Raises:
      UserError: Shapes that do not fit, or (on concrete input) values that are not finite, labels that are no output of
        a full kernel, labels that are all one class.

    Example:
      >>> labels = jnp.array([0, 0, 1])
      >>> same_class = (labels[:, None] == labels[None, :]).astype(float)
      >>> kernel_alignment(same_class, labels).round(4).item()
      1.0

    Reference:
      Cortes, Mohri and Rostamizadeh 2012, arXiv 1203.0550, section 2 (centred); Cristianini et al. 2001 (uncentred).
    """
    where = "kernel_alignment"
    _check(where, kernel, labels)
    target = _label_kernel(where, kernel, labels)
    norm = jnp.linalg.norm(target.ravel())
    if centered:
        kernel, target = _center(kernel), _center(target)
    kernel_norm, target_norm = jnp.linalg.norm(kernel.ravel()), jnp.linalg.norm(target.ravel())
    if is_concrete(target):
        varied = bool(target_norm > 10 * jnp.finfo(kernel.dtype).eps * norm)
        rule = "labels must vary over the examples" if centered else "targets must not be 0"
        require(varied, where, rule, "one value alone", "Pass examples of two classes or more")
    return jnp.vdot(kernel, target, precision="highest") / (kernel_norm * target_norm)


def label_complexity(
    kernel: Float[Array, "n n"] | Float[Array, "n c n c"], labels: Int[Array, "n"], *, ridge: float = 1e-3
) -> Float[Array, ""]:
    r"""How large a function of the kernel must be to give the labels.

    $\sqrt{y^\top (K + \lambda I)^{-1} y \cdot \operatorname{tr}(K) / N} / \lVert y \rVert$ with y the centred one-hot
    labels, N the size of K and $\lambda$ ``ridge`` times its operator norm: 1 for a multiple of the identity, which
    relates no two outputs, less for labels that vary along the kernel's leading directions. Scaling K changes nothing.

    Args:
      kernel: Symmetric kernel of the examples.
      labels: Integer classes.
      ridge: Regularisation; without it the smallest eigenvalues, which rounding makes, would decide.

    Returns:
      The complexity, positive.

    Raises:
      UserError: Shapes that do not fit, a negative ridge, or (on concrete input) labels that are all one class or
        beyond the outputs, a kernel that is not finite or not symmetric.

    Example:
      >>> labels = jnp.array([0, 0, 1, 1])
      >>> related = jnp.where(labels[:, None] == labels[None, :], 1.0, 0.0) + 0.1 * jnp.eye(4)
      >>> complexities = [label_complexity(k, labels) for k in (jnp.eye(4), related)]
      >>> [round(float(c), 2) for c in complexities]
      [1.0, 0.72]

    Reference:
      Arora et al. 2019, arXiv 1901.08584, theorem 5.1 (without the ridge and the normalisation).
    """
    where = "label_complexity"
    _check(where, kernel, labels)
    require(jnp.issubdtype(labels.dtype, jnp.integer), where, "labels must be integers", labels.dtype, "Pass classes")
    if kernel.ndim == 2:  # which number names a class does not matter, and there are at most n of them
        labels = jnp.unique(labels, return_inverse=True, size=len(labels))[1]
    targets = jax.nn.one_hot(labels, kernel.shape[1], dtype=kernel.dtype)
    if is_concrete(labels):
        low, high, most = int(np.min(np.asarray(labels))), int(np.max(np.asarray(labels))), kernel.shape[1] - 1
        rule = f"labels must lie in 0 to {most}"
        require(low >= 0 and high <= most, where, rule, f"{low} to {high}", "Number the classes from 0")
        require(low < high, where, "labels must vary over the examples", "one value alone", "Pass two classes or more")
    targets = targets - targets.mean(axis=0, keepdims=True)
    dual = kernel_ridge_regression(kernel, targets, ridge=ridge).dual
    size = kernel.shape[0] * (kernel.shape[1] if kernel.ndim == 4 else 1)
    spread = jnp.trace(kernel.reshape(size, size)) / jnp.asarray(size, kernel.dtype)
    return jnp.sqrt(jnp.vdot(targets, dual, precision="highest") * spread) / jnp.linalg.norm(targets)


def _label_kernel(where: str, kernel: Array, labels: Array) -> Array:
    """The kernel T of the labels, in the shape of ``kernel``."""
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if kernel.ndim == 2:
        if integers:
            return (labels[:, None] == labels[None, :]).astype(kernel.dtype)
        flat = labels.reshape(len(labels), -1).astype(kernel.dtype)
        return jnp.matmul(flat, flat.T, precision="highest")
    c = kernel.shape[1]
    if integers and is_concrete(labels):
        low, high = int(np.asarray(labels).min()), int(np.asarray(labels).max())
        got = f"labels from {low} to {high}"
        require(
            low >= 0 and high < c, where, f"labels must be in 0..{c - 1}", got, "Map them to the outputs of the kernel"
        )
    y = jax.nn.one_hot(labels, c, dtype=kernel.dtype) if integers else labels.astype(kernel.dtype)
    return jnp.tensordot(y, y, axes=0)


def _center(kernel: Array) -> Array:
    """The kernel of features less their mean over examples."""
    for axis in (0, kernel.ndim // 2):
        kernel = kernel - kernel.mean(axis=axis, keepdims=True)
    return kernel


def _check(where: str, kernel: Array, labels: Array) -> None:
    square = kernel.ndim in (2, 4) and kernel.shape[: kernel.ndim // 2] == kernel.shape[kernel.ndim // 2 :]
    require(square, where, "kernel must be (n, n) or (n, c, n, c)", kernel.shape, "Pass the kernel of the examples")
    n, integers = kernel.shape[0], jnp.issubdtype(labels.dtype, jnp.integer)
    classes = integers and labels.shape == (n,)
    targets = not integers and (
        labels.shape == kernel.shape[:2] if kernel.ndim == 4 else labels.ndim in (1, 2) and len(labels) == n
    )
    rule = "labels must be an integer an example, or float targets that match the rows of kernel"
    require(classes or targets, where, rule, f"{labels.dtype} {labels.shape} and {kernel.shape}", "Reshape them")
    require_finite(where, (kernel, labels), "kernel and labels")
