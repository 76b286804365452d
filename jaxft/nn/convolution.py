"""A convolution whose gradient is fast on CPU inside compiled loops too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def same_convolution(
    x: Float[Array, "n height width in"], kernel: Float[Array, "rows columns in out"]
) -> Float[Array, "n height width out"]:
    """Convolution of stride 1 that keeps the size of the map (zeros around it).

    XLA's CPU compiler has no fast code, inside a loop, for the convolutions that transposing one gives: there a step of
    training takes a hundred times as long (github.com/jax-ml/jax/issues/12868). So on CPU the derivative is a matrix
    product with the patches, which takes memory for ``rows * columns`` maps. Values are those of ``lax`` everywhere.

    Args:
      x: Maps.
      kernel: Weights, in the dtype of the maps.

    Returns:
      Maps, one an output channel.

    Example:
      >>> x, ones = jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1))
      >>> same_convolution(x, ones)[0, :, :, 0].tolist()
      [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    return _by_patches(x, kernel) if jax.default_backend() == "cpu" else _convolve(x, kernel)


def _convolve(x: Array, kernel: Array) -> Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)


@jax.custom_jvp
def _by_patches(x: Array, kernel: Array) -> Array:
    return _convolve(x, kernel)


@_by_patches.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    flat, dflat = (k.reshape(-1, k.shape[-1]) for k in (kernel, dkernel))
    rows, columns = kernel.shape[:2]
    moved = _patches(dx, rows, columns) @ flat + _patches(x, rows, columns) @ dflat
    return _by_patches(x, kernel), moved


def _patches(x: Array, rows: int, columns: int) -> Array:
    """What each output position sees: ``[n, height, width, rows * columns * in]``."""
    height, width = x.shape[1:3]
    around = [((k - 1) // 2, k // 2) for k in (rows, columns)]
    padded = jnp.pad(x, ((0, 0), *around, (0, 0)))
    seen = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(seen, axis=-1)
