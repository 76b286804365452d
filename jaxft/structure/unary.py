r"""Chains of unary rules, closed exactly: $U^* = I + U + U^2 + \dots = (I - U)^{-1}$."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class UnaryClosure(NamedTuple):
    """Total probability of the chains from one symbol to another."""

    star: Float[Array, "s s"]
    """Chains between nonterminals; the empty one counts, so the diagonal is at least 1."""
    to_preterminal: Float[Array, "s q"]
    """Chains that end in a preterminal."""


def unary_closure(log_unary: Float[Array, "s a"]) -> UnaryClosure:
    r"""Closes the unary rules $P(A \to B)$.

    The sum converges where the spectral radius of U between nonterminals is below 1.

    Example:
      >>> import numpy as np
      >>> half = jnp.log(jnp.array([[0.5, 0.25]]))  # A -> A with 1/2, A -> X with 1/4
      >>> [np.round(part, 5).tolist() for part in unary_closure(half)]
      [[[2.0]], [[0.5]]]

    Reference:
      Stolcke 1995, An efficient probabilistic context-free parsing algorithm, section 4.7.1.
    """
    s = log_unary.shape[0]
    unary = jnp.exp(log_unary)
    star = closure_matrix(unary[:, :s])
    return UnaryClosure(star, jnp.matmul(star, unary[:, s:], precision="highest"))


def closure_matrix(step: Float[Array, "s s"]) -> Float[Array, "s s"]:
    """Sum of all powers of a matrix of one-step weights; entries that rounding made negative are 0."""
    return jnp.maximum(jnp.linalg.inv(jnp.eye(step.shape[0], dtype=step.dtype) - step), 0)
