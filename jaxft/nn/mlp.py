"""A plain multilayer perceptron in the standard parametrization, for toy checks."""

from collections.abc import Callable
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import nearest, require
from jaxft.core.types import OutputFn, Params

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "erf": jax.lax.erf,
}


class MLP(nn.Module):
    """Dense layers of ``widths``, the activation between them; kernels of variance 1 / fan-in, biases 0."""

    widths: tuple[int, ...]
    activation: Literal["relu", "tanh", "gelu", "erf"] = "relu"

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """Outputs of the last layer, which is linear."""
        for i, width in enumerate(self.widths):
            x = ACTIVATIONS[self.activation](x) if i else x
            x = nn.Dense(width, kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"))(x)
        return x


def make_mlp(
    widths: tuple[int, ...], *, activation: Literal["relu", "tanh", "gelu", "erf"] = "relu"
) -> tuple[Callable[[Array, int], Params], OutputFn]:
    """An MLP as two pure functions.

    Args:
      widths: Widths of the layers, the last being the number of outputs.
      activation: Between layers; gelu is the exact one.

    Returns:
      ``init(key, input_width) -> params`` and ``f(params, x)``, which takes ``[n, d]`` to ``[n, c]``.

    Raises:
      UserError: No widths, widths that are not positive, or an unknown activation.

    Example:
      >>> init, f = make_mlp((16, 2), activation="tanh")
      >>> f(init(jax.random.key(0), 3), jnp.ones((5, 3))).shape
      (5, 2)
    """
    rule = "widths must be one or more positive integers"
    require(bool(widths) and min(widths) > 0, "make_mlp", rule, widths, "Pass, say, (64, 1)")
    known = activation in ACTIVATIONS
    require(known, "make_mlp", "activation must be known", repr(activation), nearest(activation, ACTIVATIONS))
    module = MLP(tuple(widths), activation)

    def init(key: Array, input_width: int) -> Params:
        return module.init(key, jnp.zeros((1, input_width)))["params"]

    def f(params: Params, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        return cast(Array, module.apply({"params": params}, x))

    return init, f
