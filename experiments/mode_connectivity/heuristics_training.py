"""Pre-training of the encoder, and its fine-tuning by several seeds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.mode_connectivity.heuristics_config import Heuristics
from experiments.mode_connectivity.heuristics_data import SPLITS, Sentences
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.data.batching import batch_indices
from jaxft.data.pcfg_corpus import CorpusLayout
from jaxft.nn import EncoderConfig, init_classifier, init_encoder, make_class_logits, make_mlm_logits
from jaxft.train import (
    NonFiniteLossError,
    accuracy,
    cross_entropy,
    fit,
    init_fit,
    init_state,
    make_optimizer,
    make_schedule,
    make_segment,
    masked_cross_entropy,
)
from jaxft.train.loop import Segment

CLASSES = 2
WARMUP_FRAC = 0.1
EVENT_EVERY = 250
"""Steps of pre-training between two looks at whether the user asked to stop."""


def encoder_config(config: Heuristics, layout: CorpusLayout) -> EncoderConfig:
    """The network, for the sentences of the corpus."""
    return EncoderConfig(
        family="bert",
        vocab_size=layout.vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        mlp_width=4 * config.width,
        max_positions=layout.max_tokens(config.max_length),
        type_vocab_size=1,
        norm_eps=1e-12,
        pad_id=layout.pad_id,
        init_scale=config.width**-0.5,
    )


def pretrained(
    config: Heuristics, sentences: Sentences, *, seed: int, stopped: Callable[[], bool] = lambda: False
) -> tuple[Params | None, float]:
    """The encoder after pre-training with its masked-word head, and its last loss in nats a hidden word.

    Args:
      config: Settings.
      sentences: Of the run.
      seed: Seed of the start and of the batches.
      stopped: Asked now and then; where it says so, the parameters are ``None``.

    Returns:
      Parameters and loss, the latter a mean over the last steps.

    Raises:
      NonFiniteLossError: The loss diverged.
    """
    encoder = encoder_config(config, sentences.layout)
    tx = _optimizer(config.pretraining_learning_rate, config.pretraining_steps)
    segment = make_segment(make_mlm_logits(encoder), masked_cross_entropy, tx)
    start = init_encoder(encoder, key=stream(jax.random.key(seed), "heuristics pre-training"), mlm=True)
    state, last = init_state(start, tx), float("nan")
    for first in range(0, config.pretraining_steps, EVENT_EVERY):
        if stopped():
            return None, last
        index = batch_indices(
            config.corpus_sentences,
            config.pretraining_batch_size,
            seed=seed,
            name="heuristics pre-training",
            start=first,
            stop=min(first + EVENT_EVERY, config.pretraining_steps),
        )
        state, losses = segment(state, sentences.masked, sentences.hidden, jnp.asarray(index))
        last = float(losses[-100:].mean())
        if not np.isfinite(last):
            raise NonFiniteLossError(first, f"{last}")
    return state.params, last


def start_of_fine_tuning(config: Heuristics, params: Params, *, seed: int) -> Params:
    """The pre-trained encoder with a random head, the same for all networks."""
    key = stream(jax.random.key(seed), "heuristics head")
    return {"encoder": params["encoder"], "classifier": init_classifier(config.width, CLASSES, key=key)}


def fine_tuned(config: Heuristics, sentences: Sentences, start: Params, *, seed: int, number: int) -> Params | None:
    """The network with this number, which orders its batches in its own way; ``None`` where it diverged."""
    encoder = encoder_config(config, sentences.layout)
    tx, segment = _trainer(encoder, config.learning_rate, config.steps)
    n, b, name = config.train_sentences, config.batch_size, f"heuristics {number}"
    try:
        state = fit(
            segment,
            init_fit(init_state(start, tx)),
            *sentences.train,
            batches=lambda first, end: batch_indices(n, b, seed=seed, name=name, start=first, stop=end),
            steps=config.steps,
            event_every=config.steps,
        )
    except NonFiniteLossError:
        return None
    return state.train.params


# Cached, so that all networks share a program.
@functools.cache
def split_losses(encoder: EncoderConfig) -> Callable[[Params, Any], dict[str, Float[Array, ""]]]:
    """``train_loss``, ``train_accuracy`` and the like of one batch of every split: cross-entropy in nats, fraction."""
    f = make_class_logits(encoder, pooling="mean")

    def losses(params: Params, batches: Any) -> dict[str, Float[Array, ""]]:
        found = {}
        for split, (x, y) in zip(SPLITS, batches, strict=True):
            logits = f(params, x)
            found |= {f"{split}_loss": cross_entropy(logits, y), f"{split}_accuracy": accuracy(logits, y)}
        return found

    return losses


@functools.cache
def _trainer(encoder: EncoderConfig, learning_rate: float, steps: int) -> tuple[optax.GradientTransformation, Segment]:
    tx = _optimizer(learning_rate, steps)
    return tx, make_segment(make_class_logits(encoder, pooling="mean"), cross_entropy, tx)


def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return make_optimizer("adam", make_schedule(learning_rate, steps, kind="linear", warmup_frac=WARMUP_FRAC))
