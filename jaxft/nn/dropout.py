"""Dropout as a pure function of a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import require
from jaxft.core.rng import stream


def dropout(
    x: Float[Array, "*n"], frac: float, key: Array | None, layer: int, *, shape: tuple[int, ...] | None = None
) -> Float[Array, "*n"]:
    r"""Each entry is set to 0 with probability p = ``frac``, and otherwise multiplied by $1/(1-p)$.

    Args:
      x: Outputs of a layer.
      frac: Probability p, in [0, 1).
      key: Of the step; without one nothing is dropped.
      layer: Number of the layer: its draw is a stream of its own.
      shape: Of the draw, if entries share theirs: 1 on the axes along which they do.

    Returns:
      An array of the shape and dtype of ``x``, of mean ``x`` over keys.

    Example:
      >>> dropout(jnp.ones((2, 4)), 0.5, jax.random.key(1), 0, shape=(1, 4)).tolist()
      [[0.0, 2.0, 2.0, 2.0], [0.0, 2.0, 2.0, 2.0]]

    Reference:
      Srivastava et al. 2014, JMLR 15, section 4.
    """
    if key is None or frac == 0:
        return x
    keep = jax.random.bernoulli(stream(key, "dropout", layer), 1 - frac, x.shape if shape is None else shape)
    return x * jnp.where(keep, 1 / (1 - frac), 0).astype(x.dtype)


def drop_fractions(where: str, frac: float | tuple[float, ...], layers: int) -> tuple[float, ...]:
    """The fraction of each of ``layers`` hidden layers; one number is for all of them.

    Raises:
      UserError: Not in [0, 1), or not one a layer.

    Example:
      >>> drop_fractions("make_mlp", 0.5, 2)
      (0.5, 0.5)
    """
    each = (frac,) * layers if isinstance(frac, int | float) else tuple(frac)
    rule = f"dropout_frac must be in [0, 1): one number, or one each of the {layers} hidden layers"
    inside = len(each) == layers and all(0 <= f < 1 for f in ((frac,) if isinstance(frac, int | float) else each))
    require(inside, where, rule, frac, "Use 0 for no dropout")
    return each
