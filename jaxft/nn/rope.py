r"""Rotary positions: queries and keys turned by angles that grow with their position."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import UserError, message
from jaxft.core.precision import accumulator


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model of a short context was stretched to a longer one.

    Raises:
      UserError: An unknown kind, or numbers that are not positive; all faults in one message.

    Reference:
      ``linear``: Chen et al. 2023, arXiv 2306.15595, section 2.3; ``llama3``: Llama 3.1.
    """

    kind: Literal["linear", "llama3"]
    """``linear`` slows every frequency by ``factor``; ``llama3`` the low ones alone, with a ramp between."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        faults = [f"kind={self.kind!r}"] if self.kind not in ("linear", "llama3") else []
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
        faults += [f"{name}={getattr(self, name)}" for name in names if not getattr(self, name) > 0]
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            faults.append(f"low_freq_factor={self.low_freq_factor} with high_freq_factor={self.high_freq_factor}")
        if faults:
            rule = "kind must be linear or llama3, numbers positive, low_freq_factor below high_freq_factor"
            raise UserError(message("RopeScaling", rule, ", ".join(faults), "Correct these fields"))


def rope_frequencies(width: int, *, theta: float = 10000.0, scaling: RopeScaling | None = None) -> np.ndarray:
    r"""Angle per position of every pair of coordinates, $\theta^{-2i/w}$ for $i < w/2$, scaled where asked for.

    Under ``llama3`` a frequency whose wavelength exceeds ``original_max_positions / low_freq_factor`` is divided by
    ``factor``, one whose wavelength is below ``original_max_positions / high_freq_factor`` is kept, and between the two
    the inverse wavelength mixes them linearly.

    Args:
      width: Coordinates that are turned, an even number w.
      theta: Base.
      scaling: How the context was stretched.

    Returns:
      Frequencies ``[w / 2]`` in float64.

    Example:
      >>> rope_frequencies(4, theta=100.0).tolist()
      [1.0, 0.1]
      >>> rope_frequencies(4, theta=100.0, scaling=RopeScaling("linear", 2.0)).tolist()
      [0.5, 0.05]

    Reference:
      Su et al. 2021, arXiv 2104.09864, section 3.2.2.
    """
    frequencies = theta ** -(np.arange(0, width, 2) / width)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept + (1 - kept) / scaling.factor) * frequencies


def rope_turns(
    positions: Int[Array, "b t"], frequencies: np.ndarray, dtype: jnp.dtype
) -> tuple[Float[Array, "b t 1 f"], Float[Array, "b t 1 f"]]:
    """Cosines and sines of the angles at the positions, in float32 at least.

    Args:
      positions: Positions of the tokens.
      frequencies: Angles per position, ``[f]``.
      dtype: That of the states that will be turned.

    Returns:
      Cosines and sines, with an axis for the heads.
    """
    dtype = accumulator(dtype)
    angles = positions[:, :, None, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def turned(
    x: Float[Array, "b t h e"], cos: Float[Array, "b t 1 f"], sin: Float[Array, "b t 1 f"]
) -> Float[Array, "b t h e"]:
    """The first 2f coordinates of every head turned, coordinate i with i + f; the others as they are.

    Args:
      x: Queries or keys.
      cos: Cosines.
      sin: Sines.

    Returns:
      The turned ones, in the dtype of ``x``.
    """
    f = cos.shape[-1]
    a, b = x[..., :f].astype(cos.dtype), x[..., f : 2 * f].astype(cos.dtype)
    halves = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return halves if 2 * f == x.shape[-1] else jnp.concatenate([halves, x[..., 2 * f :]], axis=-1)
