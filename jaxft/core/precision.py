"""In which type sums are taken."""

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> jnp.dtype:
    """The dtype of sums over numbers of this one: itself, and float32 for anything narrower.

    Unlike ``jnp.promote_types`` it holds under every rule of promotion.

    Args:
      dtype: Of the numbers.

    Returns:
      float32 at least.

    Example:
      >>> accumulator(jnp.bfloat16), accumulator(jnp.float64)
      (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
