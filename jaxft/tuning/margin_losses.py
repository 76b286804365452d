r"""Losses of a pair that see its two log-probabilities through their difference alone.

The argument is the margin $\Delta = \ln\pi(y^+) - \ln\pi(y^-)$, less the same difference of the reference where the
loss has one. All are finite in float32, and so are their slopes, for margins up to $10^4$.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAST_EXPONENT = 60.0
"""The exponential goes on as its tangent from here: float32 ends at 88, and slopes are multiplied and summed."""

Margins = Float[Array, "n"]


def sigmoid(margin: Margins, beta: Any, label_smoothing: Any) -> Margins:
    r"""$-(1-\epsilon)\ln\sigma(\beta\Delta) - \epsilon\ln\sigma(-\beta\Delta)$: DPO at $\epsilon = 0$, else cDPO."""
    z = beta * margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust(margin: Margins, beta: Any, label_smoothing: Any) -> Margins:
    r"""$[-(1-\epsilon)\ln\sigma(\beta\Delta) + \epsilon\ln\sigma(-\beta\Delta)]/(1-2\epsilon)$, unbiased by flips."""
    z = beta * margin
    kept, flipped = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def ipo(margin: Margins, beta: Any) -> Margins:
    r"""$(\Delta - 1/(2\beta))^2$."""
    return (margin - 1 / (2 * beta)) ** 2


def hinge(margin: Margins, beta: Any) -> Margins:
    r"""$\max(0, 1 - \beta\Delta)$."""
    return jax.nn.relu(1 - beta * margin)


def slic(margin: Margins, beta: Any, delta: Any) -> Margins:
    r"""$\max(0, \delta - \Delta)$, the margin without a reference."""
    del beta
    return jax.nn.relu(delta - margin)


def rebel(margin: Margins, beta: Any, eta: Any, rewards: Any) -> Margins:
    r"""$(\Delta/\eta - (r^+ - r^-))^2$; ``rewards`` is $(r^+, r^-)$ or an array ``[n, 2]``."""
    del beta
    pairs = jnp.broadcast_to(jnp.asarray(rewards, margin.dtype), (*margin.shape, 2))
    return (margin / eta - (pairs[:, 0] - pairs[:, 1])) ** 2


def exo_pair(margin: Margins, beta: Any, label_smoothing: Any) -> Margins:
    r"""$q\ln\frac{q}{1-\epsilon} + (1-q)\ln\frac{1-q}{\epsilon}$ with $q = \sigma(\beta\Delta)$."""
    z = beta * margin
    e = jnp.asarray(label_smoothing, margin.dtype)
    kept = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-e))
    return kept + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(e))


def discopop(margin: Margins, beta: Any, tau: Any) -> Margins:
    r"""$-(1-g)\ln\sigma(z) + g e^{-z}$ with $z = \beta\Delta$, $g = \sigma(z/\tau)$; the product is one exponential."""
    z = beta * margin
    return -jax.nn.sigmoid(-z / tau) * jax.nn.log_sigmoid(z) + jnp.exp(jax.nn.log_sigmoid(z / tau) - z)


def gpo(margin: Margins, beta: Any, f: str) -> Margins:
    r"""$f(\beta\Delta)$, with f a name of ``GPO_FUNCTIONS``."""
    return GPO_FUNCTIONS[f](beta * margin)


def exponential(z: Margins) -> Margins:
    """``exp(-z)``, and its tangent below -60, so that no margin overflows."""
    inside = jnp.exp(-jnp.maximum(z, -LAST_EXPONENT))
    return jnp.where(z < -LAST_EXPONENT, inside * (1 - LAST_EXPONENT - z), inside)


GPO_FUNCTIONS: dict[str, Callable[[Margins], Margins]] = {
    "exponential": exponential,
    "hinge": lambda z: jax.nn.relu(1 - z),
    "logistic": lambda z: -jax.nn.log_sigmoid(z),
    "savage": lambda z: jax.nn.sigmoid(-z) ** 2,
    "squared": lambda z: (1 - z) ** 2,
    "truncated_quadratic": lambda z: jax.nn.relu(1 - z) ** 2,
}
"""All convex but ``savage``."""
