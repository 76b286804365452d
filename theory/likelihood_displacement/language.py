"""A small decoder trained here on a random Markov chain, with pairs of responses drawn from the chain."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxft.core.rng import host_stream, stream
from jaxft.core.types import CausalTokens, Params, ResponseBatch
from jaxft.data.batching import batch_indices
from jaxft.nn.decoder import decoder_config, init_decoder
from jaxft.nn.decoder_outputs import make_next_token_logits, make_response_log_probs, make_response_states
from jaxft.train import init_state, make_optimizer, make_schedule, make_segment, masked_cross_entropy
from jaxft.tuning.packing import make_response_batch

WORDS, CONCENTRATION = 24, 0.1
SEQUENCES, TOKENS = 1024, 16
STEPS, BATCH, RATE = 200, 16, 1e-2
PAIRS, PROMPT_TOKENS = 192, 3
LENGTHS = (2, 8)
MODEL = decoder_config(
    "llama",
    vocab_size=WORDS,
    width=24,
    layers=1,
    heads=2,
    mlp_width=48,
    max_positions=32,
    init_scale=0.2,
)
log_probs = make_response_log_probs(MODEL)
states = make_response_states(MODEL)
_logits = make_next_token_logits(MODEL)


class Trained(NamedTuple):
    """A decoder, and how well it knows the chain."""

    params: Params
    loss: float
    """Mean of its last steps, in nats a token."""
    entropy: float
    """Of the chain, the least loss there is."""


def _chain(seed: int) -> Float[np.ndarray, "v v"]:
    return host_stream(seed, "chain").dirichlet(np.full(WORDS, CONCENTRATION), WORDS)


def _walk(draw: np.random.Generator, chain: np.ndarray, start: np.ndarray, steps: int) -> Int[np.ndarray, "n steps"]:
    cumulative, words = chain.cumsum(axis=1), [start]
    for _ in range(steps):
        words.append((cumulative[words[-1]] < draw.random((len(start), 1))).sum(axis=1).clip(max=WORDS - 1))
    return np.stack(words[1:], axis=1)


def drawn_pairs(seed: int, *, equal: bool = False) -> ResponseBatch:
    """Prompts of the chain, and two ways to go on with different first words, of random lengths or all of one."""
    chain, draw = _chain(seed), host_stream(seed, "pairs")
    prompts = _walk(draw, chain, draw.integers(WORDS, size=PAIRS), PROMPT_TOKENS)
    first = prompts[:, -1]
    chosen = _walk(draw, chain, first, LENGTHS[1])
    # The rejected response's first word is drawn from what the chain leaves beside the chosen one's.
    rest = chain[first] + 1e-6
    rest[np.arange(PAIRS), chosen[:, 0]] = 0
    other = ((rest / rest.sum(axis=1, keepdims=True)).cumsum(axis=1) < draw.random((PAIRS, 1))).sum(axis=1)
    rejected = np.concatenate([other[:, None], _walk(draw, chain, other, LENGTHS[1] - 1)], axis=1)
    lengths = draw.integers(LENGTHS[0], LENGTHS[1] + 1, size=(PAIRS, 2))
    lengths = np.full_like(lengths, sum(LENGTHS) // 2) if equal else lengths
    responses = [[c[: n[0]].tolist(), r[: n[1]].tolist()] for c, r, n in zip(chosen, rejected, lengths, strict=True)]
    columns = PROMPT_TOKENS + 2 * LENGTHS[1]
    return make_response_batch(prompts.tolist(), responses, tokens=columns, response_tokens=LENGTHS[1], multiple=1)


@functools.cache
def _trainer() -> tuple[Any, Any]:
    tx = make_optimizer("adam", make_schedule(RATE, STEPS, kind="linear", warmup_frac=0.1))
    return tx, make_segment(_logits, masked_cross_entropy, tx)


@functools.cache
def trained_decoder(seed: int) -> Trained:
    """The decoder after training on the chain of this seed, in float32."""
    chain, draw = _chain(seed), host_stream(seed, "sequences")
    words = _walk(draw, chain, draw.integers(WORDS, size=SEQUENCES), TOKENS + 1).astype(np.int32)
    ids, places = words[:, :-1], np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (SEQUENCES, TOKENS))
    tokens = CausalTokens(*map(jnp.asarray, (ids, np.ones_like(ids), places)))
    index = batch_indices(SEQUENCES, BATCH, seed=seed, name="training", stop=STEPS)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as optax needs
        tx, segment = _trainer()
        state = init_state(init_decoder(MODEL, key=stream(jax.random.key(seed), "model")), tx)
        state, losses = segment(state, tokens, jnp.asarray(words[:, 1:]), jnp.asarray(index))
    loss = float(np.asarray(losses)[-STEPS // 10 :].mean())
    # The start of a sequence is uniform, and the chain forgets it: the mean over rows is near enough.
    entropy = -(chain * np.log(np.maximum(chain, 1e-300))).sum(axis=1).mean()
    return Trained(state.params, loss, float(entropy))
