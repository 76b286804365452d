"""A small decoder and a smaller causal network over three prompts with three responses each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.trees import tree_cast
from jaxft.core.types import ResponseBatch
from jaxft.data.causal_rows import Side
from jaxft.nn.decoder import DecoderConfig, decoder_config, init_decoder
from jaxft.tuning.packing import Layout, make_response_batch

VOCABULARY = 11
PROMPTS = [[3, 4, 5], [6], [7, 8]]
RESPONSES = [[[9, 3], [4, 5, 6], [1]], [[7], [8], [9, 9]], [[9, 9, 9, 4], [5, 1], [10, 2]]]


class Tuned(NamedTuple):
    """A decoder at a point, and what it is tuned on."""

    config: DecoderConfig
    params: Any
    batch: ResponseBatch


def laid_out(layout: Layout = "packed", side: Side = "right", *, responses: int = 3) -> ResponseBatch:
    """The examples with their first responses."""
    batch = make_response_batch(PROMPTS, [each[:responses] for each in RESPONSES], layout=layout, side=side)
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture
def layouts():
    """The function that lays the examples out."""
    return laid_out


@pytest.fixture
def tuned64(x64) -> Tuned:
    """In float64."""
    config = decoder_config(
        "llama", vocab_size=VOCABULARY, width=8, layers=1, heads=2, mlp_width=12, max_positions=16, init_scale=0.4
    )
    return Tuned(config, tree_cast(init_decoder(config, key=jax.random.key(0)), jnp.float64), laid_out())


class MeanOfWords(NamedTuple):
    """A causal network that compiles in no time: a layer on the mean of what a token sees."""

    params: Any
    batch: ResponseBatch

    @staticmethod
    @jax.jit
    def states(params, batch):
        """``[n, r, k, d]``."""
        ids, segments, _ = batch.tokens
        n, s, t = ids.shape
        key, query = segments[..., None, :], segments[..., None]
        sees = jnp.tril(jnp.ones((1, 1, t, t), bool)) & ((key == 1) | ((key == query) & (key > 0)))
        weights = sees / jnp.maximum(sees.sum(axis=-1, keepdims=True), 1)
        means = jnp.einsum("nstu,nsud->nstd", weights, params["words"][ids])
        hidden = jnp.tanh(means @ params["layer"] + params["bias"][None, None, None]).reshape(n, s * t, -1)
        return jnp.take_along_axis(hidden[:, None], batch.source[..., None], axis=2) * batch.mask[..., None]

    @staticmethod
    @jax.jit
    def log_probs(params, batch):
        """``[n, r]``."""
        logs = jax.nn.log_softmax(MeanOfWords.states(params, batch) @ params["table"].T, axis=-1)
        return jnp.sum(jnp.take_along_axis(logs, batch.targets[..., None], axis=-1)[..., 0] * batch.mask, axis=-1)

    @staticmethod
    @jax.jit
    def first_logits(params, batch):
        """``[n, v]``."""
        return MeanOfWords.states(params, batch)[:, 0, 0] @ params["table"].T


@pytest.fixture
def means64(x64) -> MeanOfWords:
    """In float64."""
    shapes = {"words": (VOCABULARY, 5), "layer": (5, 6), "bias": (6,), "table": (VOCABULARY, 6)}
    draw = np.random.default_rng(0).normal
    return MeanOfWords({name: jnp.asarray(draw(size=shape)) for name, shape in shapes.items()}, laid_out())
