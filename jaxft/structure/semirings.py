r"""Semirings: what is summed over trees, and how.

A semiring says how alternatives are added and parts multiplied; one recursion (``bracketings``, ``rule_trees``) then
gives the total weight of all trees, the best one, their number, their entropy, the k best. An element is a tuple of
arrays of one shape (``k_best_semiring`` has a trailing axis of length k).

===================  =====================================  ==================================================
semiring             element                                total over trees
===================  =====================================  ==================================================
``LOG``              log weight                             log partition function
``MAX``              log weight                             score of the best tree
``COUNTING``         number                                 number of trees (weights 0 or 1), or any real sum
``EXPECTATION``      log weight, mean of an additive value  the same for all trees: entropy and cross-entropy
``k_best_semiring``  the k largest log weights              scores of the k best trees
===================  =====================================  ==================================================

Trees themselves are drawn, or the best taken, from the top down (``derivations``).

Reference:
  Goodman 1999, Semiring parsing, Computational Linguistics 25(4); Li and Eisner 2009, First- and second-order
  expectation semirings.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import require
from jaxft.structure.unary import closure_matrix

Element = tuple[Array, ...]

FLOOR = -1e30
"""Log weight of what is impossible, inside a chart: finite, so that its gradients are 0 rather than NaN."""


class Semiring(NamedTuple):
    """Sums and products of elements; hashable, so that it can be a static argument of ``jit``."""

    name: str
    zero: tuple[float, ...]
    """What adds nothing: an impossible tree."""
    one: tuple[float, ...]
    """What multiplies nothing: the empty tree."""
    times: Callable[[Element, Element], Element]
    total: Callable[[Element, int], Element]
    """``total(x, axis)``: the sum along one axis, given from the front."""
    star: Callable[[Element], Element] | None = None
    """``star(x)`` of a matrix of one-step weights: the sum over chains of any length, the empty one included."""
    k: int | None = None
    """Length of the trailing axis, where elements have one."""


def zeros(semiring: Semiring, shape: tuple[int, ...], dtype: jnp.dtype) -> Element:
    """Elements of value zero."""
    tail = () if semiring.k is None else (semiring.k,)
    return tuple(jnp.full(shape + tail, fill, dtype) for fill in semiring.zero)


def as_element(semiring: Semiring, log_weight: Array, value: Array | None = None) -> Element:
    """The element of one part: its log weight, and for ``EXPECTATION`` its additive value.

    For ``COUNTING`` the weight itself; minus infinity becomes the semiring's zero.

    Args:
      semiring: The semiring.
      log_weight: Log weights of any shape.
      value: Additive values of the same shape; ``EXPECTATION`` alone has them.

    Returns:
      An element of the shape of ``log_weight``.

    Raises:
      UserError: ``value`` is missing, or not wanted.
    """
    wanted = semiring.name == "expectation"
    given = "values" if value is not None else "no values"
    require(
        wanted == (value is not None), "as_element", f"{semiring.name} elements", given, "Only expectation has them"
    )
    floored = jnp.maximum(log_weight, jnp.asarray(FLOOR, log_weight.dtype))
    if semiring.name == "counting":
        return (jnp.exp(log_weight),)
    if value is not None:
        return floored, jnp.where(log_weight > FLOOR, value, jnp.zeros_like(value))
    if semiring.k is not None:
        rest = jnp.full((*log_weight.shape, semiring.k - 1), FLOOR, log_weight.dtype)
        return (jnp.concatenate([floored[..., None], rest], axis=-1),)
    return (floored,)


def _log_total(x: Element, axis: int) -> Element:
    return (jax.nn.logsumexp(x[0], axis=axis),)


def _max_total(x: Element, axis: int) -> Element:
    return (x[0].max(axis=axis),)


def _plus_times(x: Element, y: Element) -> Element:
    # Two impossible parts must not overflow over many products.
    return (jnp.maximum(x[0] + y[0], jnp.asarray(FLOOR, x[0].dtype)),)


def _log_star(x: Element) -> Element:
    return (_floored_log(closure_matrix(jnp.exp(x[0]))),)


def _max_star(x: Element) -> Element:
    """Best chains, by repeated squaring; a cycle never helps, since log probabilities are not positive."""
    size = x[0].shape[0]
    best = jnp.where(jnp.eye(size, dtype=bool), jnp.zeros_like(x[0]), x[0])
    for _ in range(max(1, (size - 1).bit_length())):
        best = (best[:, :, None] + best[None, :, :]).max(axis=1)
    return (jnp.maximum(best, jnp.asarray(FLOOR, best.dtype)),)


def _number_star(x: Element) -> Element:
    return (closure_matrix(x[0]),)


def _expectation_times(x: Element, y: Element) -> Element:
    return jnp.maximum(x[0] + y[0], jnp.asarray(FLOOR, x[0].dtype)), x[1] + y[1]


def _expectation_total(x: Element, axis: int) -> Element:
    weights = jax.nn.softmax(x[0], axis=axis)
    return jax.nn.logsumexp(x[0], axis=axis), (weights * x[1]).sum(axis=axis)


def _expectation_star(x: Element) -> Element:
    """Means of sums along chains: every step counts wherever it stands in the chain."""
    step = jnp.exp(x[0])
    star = closure_matrix(step)
    product = functools.partial(jnp.matmul, precision="highest")
    summed = product(product(star, step * x[1]), star)
    return _floored_log(star), jnp.where(star > 0, summed / jnp.where(star > 0, star, 1), 0)


def _floored_log(x: Array) -> Array:
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), jnp.asarray(FLOOR, x.dtype))


LOG = Semiring("log", (FLOOR,), (0.0,), _plus_times, _log_total, _log_star)
MAX = Semiring("max", (FLOOR,), (0.0,), _plus_times, _max_total, _max_star)
COUNTING = Semiring(
    "counting", (0.0,), (1.0,), lambda x, y: (x[0] * y[0],), lambda x, axis: (x[0].sum(axis=axis),), _number_star
)
EXPECTATION = Semiring(
    "expectation", (FLOOR, 0.0), (0.0, 0.0), _expectation_times, _expectation_total, _expectation_star
)


@functools.cache
def k_best_semiring(k: int) -> Semiring:
    """The semiring of the k largest log weights, in falling order.

    Example:
      >>> semiring = k_best_semiring(2)
      >>> semiring.total((jnp.array([[0.0, -3.0], [-1.0, -2.0]]),), 0)[0].tolist()
      [0.0, -1.0]
    """
    require(k >= 1, "k_best_semiring", "k must be positive", k, "Pass 1 or more")

    def total(x: Element, axis: int) -> Element:
        merged = jnp.moveaxis(x[0], axis, -2)
        return (jax.lax.top_k(merged.reshape(*merged.shape[:-2], -1), k)[0],)

    def times(x: Element, y: Element) -> Element:
        sums = jnp.maximum(x[0][..., :, None] + y[0][..., None, :], jnp.asarray(FLOOR, x[0].dtype))
        return (jax.lax.top_k(sums.reshape(*sums.shape[:-2], k * k), k)[0],)

    return Semiring(f"{k}-best", (FLOOR,), (0.0,), times, total, None, k)


def log_weight(semiring: Semiring, element: Element) -> Float[Array, "..."]:
    """The first part of an element with the floor put back to minus infinity."""
    return jnp.where(element[0] <= FLOOR / 2, -jnp.inf, element[0])
