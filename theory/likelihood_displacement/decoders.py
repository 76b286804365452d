"""A tiny decoder in float64 with a few examples, for what holds of any model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxft.core.rng import host_stream, stream
from jaxft.core.trees import tree_cast
from jaxft.core.types import OutputFn, Params, ResponseBatch
from jaxft.nn.decoder import decoder_config, init_decoder
from jaxft.nn.decoder_outputs import make_response_log_probs, make_response_states
from jaxft.nn.mlp import make_mlp
from jaxft.tuning.packing import make_response_batch
from theory.likelihood_displacement.ufm import STANDARD, compiled, drawn_instance, response_log_probs

CONFIG = decoder_config(
    "llama",
    vocab_size=9,
    width=6,
    layers=1,
    heads=2,
    kv_heads=1,
    head_width=4,
    mlp_width=8,
    max_positions=16,
    init_scale=0.6,
)
EXAMPLES, RESPONSES = 3, 3
"""The third response is one that is followed only."""
PROMPT_TOKENS, RESPONSE_TOKENS = 3, 3

decoder_log_probs = make_response_log_probs(CONFIG)
decoder_states = make_response_states(CONFIG)


class Model(NamedTuple):
    """A function of log-probabilities, its parameters, and examples."""

    f: Any
    params: Params
    batch: ResponseBatch
    reference: np.ndarray

    def example(self, i: int) -> "Model":
        """One example alone."""
        return self._replace(batch=take(self.batch, slice(i, i + 1)), reference=self.reference[i : i + 1])


def take(batch: ResponseBatch, rows: slice | np.ndarray) -> ResponseBatch:
    """Some of the examples."""
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def plain(f: OutputFn) -> OutputFn:
    """The function with the promotion that it needs, and without factors of its gradients."""

    def g(params: Params, batch: ResponseBatch) -> Array:
        with STANDARD():
            return f(params, batch)

    return g


@functools.cache
def drawn_decoder(seed: int) -> Model:
    """Random parameters, and packed examples whose responses differ in their first token."""
    draw = host_stream(seed, "decoder")
    params = _init(stream(jax.random.key(seed), "decoder"))
    prompts, responses = [], []
    for _ in range(EXAMPLES):
        prompts.append(draw.integers(CONFIG.vocab_size, size=int(draw.integers(1, PROMPT_TOKENS + 1))).tolist())
        first = draw.permutation(CONFIG.vocab_size)[:RESPONSES]
        lengths = draw.integers(RESPONSE_TOKENS, size=RESPONSES)
        responses.append(
            [[int(y), *draw.integers(CONFIG.vocab_size, size=n).tolist()] for y, n in zip(first, lengths, strict=True)]
        )
    tokens = PROMPT_TOKENS + RESPONSES * RESPONSE_TOKENS
    batch = make_response_batch(prompts, responses, tokens=tokens, response_tokens=RESPONSE_TOKENS, multiple=1)
    reference = -6 * draw.random((EXAMPLES, 2))
    return Model(decoder_log_probs, params, jax.tree.map(jnp.asarray, batch), reference)


@compiled
def _init(key: Array) -> Params:
    with STANDARD():  # parameters start in float32
        params = init_decoder(CONFIG, key=key)
    leaves, tree = jax.tree.flatten(tree_cast(params, jnp.float64))
    # Scales that start at 1 would hide a mistake in their gradients.
    noise = [0.1 * jax.random.normal(stream(key, "noise", i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    return tree.unflatten([x + e for x, e in zip(leaves, noise, strict=True)])


_INIT_MLP, _mlp = make_mlp((8, 9), activation="tanh")
MLP_INPUT = np.linspace(-1, 1, 5)[None]


def mlp_log_probs(params: Params, batch: ResponseBatch) -> Array:
    """Log-probabilities of single tokens as answers to one prompt, a vector."""
    return jnp.take_along_axis(jax.nn.log_softmax(_mlp(params, MLP_INPUT)), batch.targets[:, :, 0], axis=-1)


def drawn_mlp(seed: int) -> Model:
    """A multilayer perceptron."""
    batch = drawn_instance(seed, length=1, vocabulary=CONFIG.vocab_size).batch
    reference = -3 * host_stream(seed, "mlp").random((1, 2))
    return Model(mlp_log_probs, _init_mlp(stream(jax.random.key(seed), "mlp")), batch, reference)


@compiled
def _init_mlp(key: Array) -> Params:
    with STANDARD():
        return tree_cast(_INIT_MLP(key, MLP_INPUT.size), jnp.float64)


def drawn_features(seed: int) -> Model:
    """The unconstrained-features model."""
    instance = drawn_instance(seed)
    return Model(response_log_probs, instance.params, instance.batch, np.asarray(instance.reference))


MODELS: dict[str, Callable[[int], Model]] = {
    "unconstrained features": drawn_features,
    "multilayer perceptron": drawn_mlp,
    "decoder": lambda seed: drawn_decoder(seed).example(0),
}
