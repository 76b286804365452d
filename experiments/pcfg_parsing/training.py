"""Pre-training of a masked model: the network, its loss, and the compiled segment."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from experiments.pcfg_parsing.config import PcfgParsingConfig, Training, model_sizes
from jaxft.core.rng import stream
from jaxft.core.types import Params, TokenBatch
from jaxft.data.pcfg_corpus import CorpusLayout
from jaxft.nn import EncoderConfig, init_encoder, make_mlm_logits
from jaxft.train import make_schedule, make_segment
from jaxft.train.loop import Segment

MaskedInputs = tuple[TokenBatch, Int[Array, "b t"]]
"""Sentences with hidden words, and the hidden words: -1 where none is hidden."""


def encoder_config(config: PcfgParsingConfig, model: str, layout: CorpusLayout) -> EncoderConfig:
    """The network of a model's name, for the sentences of the corpus."""
    heads, layers = model_sizes(model)
    return EncoderConfig(
        family="bert",
        vocab_size=layout.vocab_size,
        width=config.width,
        layers=layers,
        heads=heads,
        mlp_width=config.mlp_ratio * config.width,
        max_positions=layout.max_tokens(config.corpus.max_length),
        type_vocab_size=1,
        norm_eps=1e-12,
        pad_id=layout.pad_id,
        scan_layers=layers > 4,
    )


def initial_params(encoder: EncoderConfig, seed: int) -> Params:
    """Random parameters: those of an untrained network."""
    return init_encoder(encoder, key=stream(jax.random.key(seed), "pre-training"), mlm=True)


# Cached, so that all seeds of a model share a program.
@functools.cache
def trainer(
    encoder: EncoderConfig, training: Training, mesh: Mesh | None
) -> tuple[optax.GradientTransformation, Segment]:
    """Optimiser and compiled segment."""
    schedule = make_schedule(training.learning_rate, training.steps, kind="linear", warmup_frac=training.warmup_frac)
    tx = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=training.weight_decay)
    return tx, make_segment(sentence_losses(encoder), mean_loss, tx, mesh=mesh)


def sentence_losses(encoder: EncoderConfig) -> Callable[[Params, MaskedInputs], Float[Array, "b"]]:
    """The loss of each sentence, summed over its hidden words, as the output of a network."""
    logits = make_mlm_logits(encoder)

    def f(params: Params, inputs: Any) -> Float[Array, "b"]:
        batch, labels = inputs
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, losses, 0).sum(axis=1)

    return f


def mean_loss(losses: Float[Array, "b"], hidden: Int[Array, "b"]) -> Float[Array, ""]:
    """Nats a hidden word: the losses of sentences over the number of words hidden in them."""
    return losses.sum() / jnp.maximum(hidden.sum(), 1)


@functools.cache
def hidden_word_log_probs(encoder: EncoderConfig, first_word: int) -> Callable[..., Float[Array, "m v"]]:
    """``f(params, batch, rows, columns)``: log-probability of every word at each of m places.

    The distribution is over all tokens, those that are no words included: what it gives to them is lost.
    """
    logits = make_mlm_logits(encoder)

    @jax.jit
    def f(params: Params, batch: TokenBatch, rows: Array, columns: Array) -> Float[Array, "m v"]:
        return jax.nn.log_softmax(logits(params, batch)[rows, columns], axis=1)[:, first_word:]

    return f
