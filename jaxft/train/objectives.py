"""Objectives of a batch of logits and integer labels: a mean over examples, in nats where it is a likelihood.

Logits ``[b, c]`` are scored against labels in ``0..c-1``. Logits ``[b]`` are the scalar-logit convention of two
classes: ``u`` is the logit of class 1 minus that of class 0, and labels {0, 1} stand for y = -1, +1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require

Objective = Callable[[Float[Array, "b *c"], Any], Float[Array, ""]]
"""``objective(outputs, labels)``: a scalar to minimise; labels are an array or a tree of arrays."""


def cross_entropy(logits: Float[Array, "b *c"], labels: Int[Array, "b"]) -> Float[Array, ""]:
    r"""Mean negative log-likelihood in nats.

    $-\log \operatorname{softmax}(f)_y$ for logits ``[b, c]``, $\log(1 + e^{-y u})$ for scalar logits ``[b]``.

    Args:
      logits: ``[b, c]``, or ``[b]`` for the scalar-logit convention.
      labels: Class of each example.

    Returns:
      The mean over examples.

    Raises:
      UserError: The shapes do not fit, or a concrete label is no class.

    Example:
      >>> round(float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 3]))), 4)  # log 4
      1.3863
    """
    _check("cross_entropy", logits, labels)
    if logits.ndim == 1:
        return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mse(logits: Float[Array, "b *c"], labels: Int[Array, "b"]) -> Float[Array, ""]:
    r"""Mean over examples of $\tfrac12 \lVert f - e_y \rVert^2$ ($\tfrac12 (u - y)^2$ for scalar logits).

    The sum, not the mean, is taken over classes: the output derivative of one example is $f - e_y$.

    Args:
      logits: ``[b, c]``, or ``[b]`` for the scalar-logit convention.
      labels: Class of each example.

    Returns:
      The mean over examples.

    Raises:
      UserError: The shapes do not fit, or a concrete label is no class.

    Example:
      >>> float(mse(jnp.array([[1.0, 2.0]]), jnp.array([0])))
      2.0
      >>> float(mse(jnp.array([1.0]), jnp.array([0])))
      2.0
    """
    _check("mse", logits, labels)
    if logits.ndim == 1:
        return optax.l2_loss(logits, 2 * labels.astype(logits.dtype) - 1).mean()
    return optax.l2_loss(logits, jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)).sum(axis=1).mean()


def masked_cross_entropy(logits: Float[Array, "b t v"], labels: Int[Array, "b t"]) -> Float[Array, ""]:
    r"""Mean negative log-likelihood of the hidden words, in nats.

    Args:
      logits: Over the vocabulary, at every token.
      labels: The hidden word where one is to be predicted, a negative number elsewhere.

    Returns:
      The mean over hidden words of the batch; 0 where there is none.

    Example:
      >>> round(float(masked_cross_entropy(jnp.zeros((1, 2, 4)), jnp.array([[3, -1]]))), 4)  # log 4
      1.3863
    """
    hidden = (labels >= 0).astype(logits.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return (losses * hidden).sum() / jnp.maximum(hidden.sum(), 1)


def accuracy(logits: Float[Array, "b *c"], labels: Int[Array, "b"]) -> Float[Array, ""]:
    """Fraction of examples whose largest logit is that of the label; the first class wins a tie.

    Args:
      logits: ``[b, c]``, or ``[b]`` for the scalar-logit convention (class 1 where positive).
      labels: Class of each example.

    Returns:
      A number in [0, 1].

    Raises:
      UserError: The shapes do not fit, or a concrete label is no class.

    Example:
      >>> float(accuracy(jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([1, 1])))
      0.5
    """
    _check("accuracy", logits, labels)
    predicted = logits.argmax(axis=1) if logits.ndim == 2 else (logits > 0).astype(labels.dtype)
    return (predicted == labels).mean()


def _check(where: str, logits: Array, labels: Array) -> None:
    fits = logits.ndim in (1, 2) and labels.shape == logits.shape[:1] and labels.shape != (0,)
    shapes = f"logits {logits.shape} and labels {labels.shape}"
    require(fits, where, "logits must be [b, c] or [b] and labels [b]", shapes, "Keep one row an example")
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    require(integer, where, "labels must be integers", labels.dtype, "Pass class indices")
    classes = 2 if logits.ndim == 1 else logits.shape[1]
    require_within(where, "labels", labels, classes, "Map label words to class indices")


def require_within(where: str, name: str, indices: Array, count: int, next_step: str) -> None:
    """Raises unless all ``indices`` lie in 0..count-1; silent where their values are traced or on other processes.

    Example:
      >>> require_within("take", "rows", jnp.array([0, 3]), 3, "Drop them")
      Traceback (most recent call last):
      ...
      jaxft.core.checks.UserError: take: rows must lie in 0..2, got 0..3. Drop them.
    """
    if not is_concrete(indices):
        return
    if not isinstance(indices, jax.Array) or indices.is_fully_addressable or indices.is_fully_replicated:
        values = np.asarray(indices)  # numpy: under an outer jit, operations of jax would be traced
        low, high = int(values.min()), int(values.max())
        require(low >= 0 and high < count, where, f"{name} must lie in 0..{count - 1}", f"{low}..{high}", next_step)


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "mse": mse}
