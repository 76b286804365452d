"""A convolution whose gradient is fast on CPU inside compiled loops too."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def same_convolution(
    x: Float[Array, "n height width in"], kernel: Float[Array, "rows columns in out"], *, reverse_only: bool = False
) -> Float[Array, "n height width out"]:
    """Convolution of stride 1 that keeps the size of the map (zeros around it).

    XLA's CPU compiler has no fast code, inside a loop, for the convolutions that transposing one gives: there a step of
    training takes many times as long as outside of it (github.com/jax-ml/jax/issues/12868). So on CPU the derivative is
    a matrix product with the patches, which takes memory for ``rows * columns`` maps. With ``reverse_only`` it is
    written as two convolutions in the layout that is fast, which is faster still, but has no forward mode (``jvp``).
    Values are those of ``lax`` everywhere.

    Args:
      x: Maps.
      kernel: Weights, in the dtype of the maps.
      reverse_only: Whether gradients are all that is asked for.

    Returns:
      Maps, one an output channel.

    Example:
      >>> x, ones = jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1))
      >>> same_convolution(x, ones)[0, :, :, 0].tolist()
      [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    if jax.default_backend() != "cpu":
        return _convolve(x, kernel)
    return _by_convolutions(x, kernel) if reverse_only else _by_patches(x, kernel)


def _convolve(x: Array, kernel: Array, padding: Any = "SAME") -> Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=axes)


def _around(kernel: Array) -> list[tuple[int, int]]:
    """Zeros before and behind rows and columns."""
    return [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]


@jax.custom_vjp
def _by_convolutions(x: Array, kernel: Array) -> Array:
    return _convolve(x, kernel)


def _transposed(saved: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
    x, kernel = saved
    mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    dx = _convolve(dz, mirrored, [(after, before) for before, after in _around(kernel)])
    # Examples and channels change places: the sum over examples is that over channels of a convolution.
    dkernel = _convolve(x.transpose(3, 1, 2, 0), dz.transpose(1, 2, 0, 3), _around(kernel))
    return dx, dkernel.transpose(1, 2, 0, 3)


_by_convolutions.defvjp(lambda x, kernel: (_convolve(x, kernel), (x, kernel)), _transposed)


@jax.custom_jvp
def _by_patches(x: Array, kernel: Array) -> Array:
    return _convolve(x, kernel)


@_by_patches.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    flat, dflat = (k.reshape(-1, k.shape[-1]) for k in (kernel, dkernel))
    moved = _patches(dx, kernel) @ flat + _patches(x, kernel) @ dflat
    return _by_patches(x, kernel), moved


def _patches(x: Array, kernel: Array) -> Array:
    """What each output position sees: ``[n, height, width, rows * columns * in]``."""
    (height, width), (rows, columns) = x.shape[1:3], kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), *_around(kernel), (0, 0)))
    seen = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(seen, axis=-1)
