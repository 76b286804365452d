r"""Outputs without their common part: C - 1 contrasts of C logits, all that cross-entropy sees.

Softmax is unchanged when a number is added to every logit, so a loss of the softmax depends on $Q^\top f$ alone, with
the columns of Q an orthonormal basis of the vectors that sum to 0; a kernel of the contrasts has
$(C-1)^2 / C^2$ of the entries.
"""

import functools

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from jaxft.core.checks import require
from jaxft.core.factors import map_outputs
from jaxft.core.types import OutputFn
from jaxft.kernels.dynamics import LossFn


def contrast_basis(classes: int) -> Float[np.ndarray, "c contrasts"]:
    r"""Orthonormal basis Q of the vectors that sum to 0 (Helmert), a contrast a column.

    Raises:
      UserError: Fewer than two classes.

    Example:
      >>> contrast_basis(3).round(3).tolist()
      [[0.707, 0.408], [-0.707, 0.408], [0.0, -0.816]]
    """
    require(classes >= 2, "contrast_basis", "classes must be at least 2", classes, "One output has no contrast")
    return scipy.linalg.helmert(classes).T


@functools.lru_cache(maxsize=64)
def contrast_logits(f: OutputFn, classes: int) -> OutputFn:
    r"""The contrasts $Q^\top f$ of a function of C logits: ``[n, c]`` becomes ``[n, c - 1]``.

    Gradient descent on a cross-entropy of f is that of ``contrast_loss`` on the contrasts, and so are the kernel
    dynamics of the contrasts: since $\sum_c \chi_c = 0$, $Q^\top K \chi = (Q^\top K Q)\, Q^\top \chi$. Not covered:
    losses that see the common part, such as squared error on one-hot targets, and sign kernels, which are not
    equivariant to a change of basis. The functions made here are remembered, with what ``f`` holds on to.

    Args:
      f: Logits ``[n, c]``.
      classes: Their number C.

    Returns:
      A function ``(params, x)``, with the taps of ``f`` where it has any; the same one for the same ``f``, so that
      nothing is compiled twice.

    Raises:
      UserError: Fewer than two classes, or (when called) another number of logits.

    Example:
      >>> g = contrast_logits(lambda w, x: x * w[None], 2)
      >>> round(float(g(jnp.array([1.0, 3.0]), jnp.ones((1, 1)))[0, 0]), 3)
      -1.414
    """
    basis = contrast_basis(classes)

    def contrasts(logits: Array) -> Float[Array, "n contrasts"]:
        _require_classes("contrast_logits", logits, classes)
        return jnp.matmul(logits, jnp.asarray(basis, logits.dtype), precision="highest")

    return map_outputs(f, contrasts)


@functools.lru_cache(maxsize=64)
def logit_difference(f: OutputFn) -> OutputFn:
    r"""The one logit $u = f_1 - f_0$ of a function of two classes: ``[n, 2]`` becomes ``[n]``.

    What sign dynamics and solvers of scalar kernels need; $\operatorname{softmax}(f)_1$ is the sigmoid of u.

    Args:
      f: Logits ``[n, 2]``.

    Returns:
      A function ``(params, x)``, with the taps of ``f`` where it has any; the same one for the same ``f``.

    Raises:
      UserError: When called: another number of logits.

    Example:
      >>> logit_difference(lambda w, x: x * w[None])(jnp.array([1.0, 3.0]), jnp.ones((2, 1))).tolist()
      [2.0, 2.0]

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 3 (the scalar logit of A-SignGD).
    """

    def difference(logits: Array) -> Float[Array, "n"]:
        _require_classes("logit_difference", logits, 2)
        return logits[:, 1] - logits[:, 0]

    return map_outputs(f, difference)


@functools.lru_cache(maxsize=64)
def contrast_loss(loss: LossFn, classes: int) -> LossFn:
    """A softmax loss as a function of contrasts ``[n, c - 1]``, or of the logit difference ``[n]`` of two classes.

    Args:
      loss: ``loss(logits, labels)``, unchanged by a number added to all logits of an example.
      classes: Number of logits C.

    Returns:
      ``loss`` of logits that have these contrasts, and sum to 0.

    Raises:
      UserError: When called: outputs that are no contrasts of so many classes.

    Example:
      >>> first = lambda logits, labels: jnp.mean(logits[:, 1] - logits[:, 0])
      >>> float(contrast_loss(first, 2)(jnp.array([2.0]), jnp.array([1])))
      2.0
    """
    basis = contrast_basis(classes)

    def of_contrasts(outputs: Array, labels: Array) -> Array:
        scalar = outputs.ndim == 1 and classes == 2
        fits = scalar or (outputs.ndim == 2 and outputs.shape[1] == classes - 1)
        rule = f"outputs must be contrasts (n, {classes - 1})"
        require(fits, "contrast_loss", rule, outputs.shape, "Use contrast_logits, or logit_difference for two classes")
        if scalar:
            logits = jnp.stack([-outputs, outputs], axis=1) / 2
        else:
            logits = jnp.matmul(outputs, jnp.asarray(basis.T, outputs.dtype), precision="highest")
        return loss(logits, labels)

    return of_contrasts


def _require_classes(where: str, logits: Array, classes: int) -> None:
    fits = logits.ndim == 2 and logits.shape[1] == classes
    require(fits, where, f"f must return {classes} logits an example", logits.shape, "Pass the number of its outputs")
