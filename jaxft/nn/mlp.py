"""A plain multilayer perceptron in the standard parametrization, for toy checks."""

from collections.abc import Callable
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import nearest, require
from jaxft.core.types import KeyedOutputFn, Params
from jaxft.nn.dropout import drop_fractions, dropout
from jaxft.nn.factored import factored
from jaxft.nn.tape import Tape

Activation = Literal["relu", "tanh", "gelu", "erf"]

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "erf": jax.lax.erf,
}


class MLP(nn.Module):
    """Dense layers of ``widths``, the activation between them; kernels of variance 1 / fan-in, biases 0."""

    widths: tuple[int, ...]
    activation: Activation = "relu"
    use_bias: bool = True
    fractions: tuple[float, ...] | None = None
    """Dropout of each hidden layer; ``None`` is none."""

    @nn.compact
    def pre_activations(self, x: Float[Array | np.ndarray, "*n d"], key: Array | None = None) -> tuple[Array, ...]:
        """What each layer gives before its activation; outputs of the last layer, which is linear, come last."""
        layers, z = [], jnp.asarray(x)
        for i, width in enumerate(self.widths):
            z = ACTIVATIONS[self.activation](z) if i else z
            z = dropout(z, self.fractions[i - 1], key, i - 1) if i and self.fractions else z
            draw = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            z = nn.Dense(width, use_bias=self.use_bias, kernel_init=draw, name=f"Dense_{i}")(z)
            layers.append(z)
        return tuple(layers)

    def __call__(self, x: Float[Array | np.ndarray, "*n d"], key: Array | None = None) -> Float[Array, "*n c"]:
        """Outputs of the last layer."""
        return self.pre_activations(x, key)[-1]


def make_mlp(
    widths: tuple[int, ...],
    *,
    activation: Activation = "relu",
    use_bias: bool = True,
    dropout_frac: float | tuple[float, ...] = 0.0,
) -> tuple[Callable[[Array, int], Params], KeyedOutputFn]:
    """An MLP as two pure functions.

    Args:
      widths: Widths of the layers, the last being the number of outputs.
      activation: Between layers; gelu is the exact one.
      use_bias: Without, the net of relu is positively homogeneous in every layer.
      dropout_frac: Probability with which a hidden unit is dropped, behind the activation: one for all, or one each
        hidden layer.

    Returns:
      ``init(key, input_width) -> params`` and ``f(params, x, *, key=None)``, which takes ``[n, d]`` to ``[n, c]``; it
      drops units only if it is given a key.

    Raises:
      UserError: No widths, widths that are not positive, an unknown activation, or fractions outside [0, 1).

    Example:
      >>> init, f = make_mlp((16, 2), activation="tanh")
      >>> f(init(jax.random.key(0), 3), jnp.ones((5, 3))).shape
      (5, 2)
    """
    module = _module("make_mlp", widths, activation, use_bias, dropout_frac)

    def init(key: Array, input_width: int) -> Params:
        return module.init(key, jnp.zeros((1, input_width), jnp.float32))["params"]

    def f(
        params: Params, x: Float[Array | np.ndarray, "*n d"], tape: Tape, *, key: Array | None = None
    ) -> Float[Array, "*n c"]:
        return tape.apply(module, params, x, key, at="mlp")

    return init, factored(f)


def make_mlp_units(
    widths: tuple[int, ...], *, activation: Activation = "relu", use_bias: bool = True
) -> Callable[[Params, Float[Array | np.ndarray, "*n d"]], dict[str, Array]]:
    """What enters the activations of an MLP of ``make_mlp``, by group of units.

    Args:
      widths: Widths of the layers, the last being the number of outputs.
      activation: Between layers.
      use_bias: As in ``make_mlp``.

    Returns:
      ``units(params, x)``: ``hidden_0``, ``hidden_1``, ..., each ``[n, units]`` before the activation, and the outputs
      of the net as ``output``. Nothing is dropped.

    Raises:
      UserError: As ``make_mlp``.

    Example:
      >>> init, _ = make_mlp((16, 8, 2))
      >>> units = make_mlp_units((16, 8, 2))(init(jax.random.key(0), 3), jnp.ones((5, 3)))
      >>> {group: z.shape for group, z in units.items()}
      {'hidden_0': (5, 16), 'hidden_1': (5, 8), 'output': (5, 2)}
    """
    module = _module("make_mlp_units", widths, activation, use_bias, 0.0)
    names = [*(f"hidden_{i}" for i in range(len(widths) - 1)), "output"]

    def units(params: Params, x: Float[Array | np.ndarray, "*n d"]) -> dict[str, Array]:
        layers = cast(tuple[Array, ...], module.apply({"params": params}, x, method="pre_activations"))
        return dict(zip(names, layers, strict=True))

    return units


def _module(
    where: str, widths: tuple[int, ...], activation: str, use_bias: bool, frac: float | tuple[float, ...]
) -> MLP:
    rule = "widths must be one or more positive integers"
    require(bool(widths) and min(widths) > 0, where, rule, widths, "Pass, say, (64, 1)")
    known = activation in ACTIVATIONS
    require(known, where, "activation must be known", repr(activation), nearest(activation, ACTIVATIONS))
    fractions = drop_fractions(where, frac, len(widths) - 1)
    return MLP(tuple(widths), cast(Activation, activation), use_bias, fractions if any(fractions) else None)
