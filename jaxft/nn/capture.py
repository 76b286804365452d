"""What an encoder does inside: hidden states and attention of every layer."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.types import Params, TokenBatch
from jaxft.nn.outputs import _check_batch
from jaxft.nn.transformer import EncoderConfig, _Embeddings, _Layer


class LayerOutputs(NamedTuple):
    """Inside of an encoder; rows at padding have no meaning."""

    hidden: Float[Array, "l1 b t d"]
    """States: the embeddings first, then those of every layer."""
    attention: Float[Array, "l b h t t"]
    """Weights: from the row's token to the column's; padding has none."""


def make_layer_outputs(config: EncoderConfig) -> Callable[[Params, TokenBatch], LayerOutputs]:
    """Hidden states and attention weights of every layer, without dropout.

    Args:
      config: The encoder; ``params`` must hold ``encoder``.

    Returns:
      ``f(params, batch)``. The last states are those of ``Encoder``.

    Raises:
      UserError: From the closure: the batch does not fit the model.

    Example:
      >>> from jaxft.nn.transformer import init_encoder
      >>> config = EncoderConfig("bert", 9, 4, 3, 2, 8, 5, 2, 1e-12, pad_id=0)
      >>> ids = jnp.array([[1, 2]])
      >>> out = make_layer_outputs(config)(
      ...     init_encoder(config, key=jax.random.key(0)), TokenBatch(ids, ids * 0 + 1, ids * 0, jnp.array([0]))
      ... )
      >>> out.hidden.shape, out.attention.shape, round(float(out.attention[0, 0, 0, 0].sum()), 5)
      ((4, 1, 2, 4), (3, 1, 2, 2, 2), 1.0)
    """

    def f(params: Params, batch: TokenBatch) -> LayerOutputs:
        _check_batch("make_layer_outputs", config, batch)
        encoder, mask = params["encoder"], jnp.asarray(batch.attention_mask) > 0
        embeddings = _Embeddings(config, True)
        states = [cast(Array, embeddings.apply({"params": encoder["embeddings"]}, batch))]
        attention = []
        for layer in range(config.layers):
            variables = {"params": jax.tree.map(lambda leaf, k=layer: leaf[k], encoder["layers"])}
            # The layer's own modules say what queries and keys are: nothing of it is written twice but the softmax.
            (state, _), kept = _Layer(config, True).apply(
                variables, states[-1], mask, capture_intermediates=lambda module, _: module.name in ("query", "key")
            )
            inside = cast(Any, kept)["intermediates"]["attention"]
            query, key = (inside[name]["__call__"][0] for name in ("query", "key"))
            attention.append(_weights(config, query, key, mask))
            states.append(state)
        return LayerOutputs(jnp.stack(states), jnp.stack(attention))

    return f


def _weights(config: EncoderConfig, query: Array, key: Array, mask: Array) -> Float[Array, "b h t t"]:
    b, t, d = query.shape
    split = (b, t, config.heads, d // config.heads)
    scores = jnp.einsum("bthe,buhe->bhtu", query.reshape(split), key.reshape(split)) / split[-1] ** 0.5
    return jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min), axis=-1)
