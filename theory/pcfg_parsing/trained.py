"""Claims on a masked language model trained here: how its loss stands to the exact Bayes loss of the grammar.

The model has ten thousand parameters, and sees sentences of seven words with about a fifth of them hidden.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream, stream
from jaxft.core.types import Params, TokenBatch
from jaxft.data.batching import batch_indices
from jaxft.nn import EncoderConfig, init_encoder, make_mlm_logits
from jaxft.structure import excess_loss
from jaxft.train import init_state, make_optimizer, make_schedule, make_segment, masked_cross_entropy
from theory.claims import Evidence
from theory.pcfg_parsing.grammars import PAPER, TOKENS, WORDS, compiled, make_claim, other_grammar, toy
from theory.pcfg_parsing.objective import hidden_words
from theory.pcfg_parsing.samples import DRAWS, sentences

STEPS, BATCH, RATE = 500, 32, 1e-2
HELD_OUT = DRAWS
MASKED_FRAC = 0.2
MODEL = EncoderConfig(
    family="bert",
    vocab_size=WORDS + 1,
    width=32,
    layers=1,
    heads=2,
    mlp_width=64,
    max_positions=TOKENS,
    type_vocab_size=1,
    norm_eps=1e-12,
    pad_id=WORDS,
    init_scale=0.18,
)
"""The word after the last is the mask; there is no padding."""

SETTING = {
    "width": MODEL.width,
    "layers": MODEL.layers,
    "steps": STEPS,
    "held_out": HELD_OUT,
    "precision": "model in float32, matmul highest",
}

_logits = make_mlm_logits(MODEL)


@functools.cache
def _trainer() -> tuple[Any, Any]:
    tx = make_optimizer("adam", make_schedule(RATE, STEPS, kind="linear", warmup_frac=0.1))
    return tx, make_segment(_logits, masked_cross_entropy, tx)


def _masks(seed: int, name: str, rows: int) -> np.ndarray:
    """Every word is hidden with the same chance, and one in any case."""
    draw = host_stream(seed, name)
    sure = draw.integers(TOKENS, size=rows)
    return (draw.random((rows, TOKENS)) < MASKED_FRAC) | (np.arange(TOKENS)[None] == sure[:, None])


def _inputs(tokens: np.ndarray, mask: np.ndarray) -> TokenBatch:
    ids = np.where(mask, WORDS, tokens).astype(np.int32)
    zero = np.zeros_like(ids)
    return TokenBatch(*(jnp.asarray(x) for x in (ids, zero + 1, zero, zero[:, 0])))


@functools.cache
def parameters(seed: int, *, trained: bool = True, renamed: bool = False) -> Params:
    """Of a model before or after training on sentences of the grammar, ``renamed``: of its sentences in other words."""
    tokens = np.asarray(sentences(seed, TOKENS, name="training").tokens)
    tokens = (tokens + renamed) % WORDS
    mask = _masks(seed, "training masks", len(tokens))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as optax needs
        tx, segment = _trainer()
        state = init_state(_init(stream(jax.random.key(seed), "model")), tx)
        if not trained:
            return state.params
        labels = jnp.asarray(np.where(mask, tokens, -1).astype(np.int32))
        index = batch_indices(len(tokens), BATCH, seed=seed, name="training", stop=STEPS)
        return segment(state, _inputs(tokens, mask), labels, jnp.asarray(index))[0].params


@compiled
def _init(key: jax.Array) -> Params:
    return init_encoder(MODEL, key=key, mlm=True)


@compiled
def _log_words(params: Params, inputs: TokenBatch) -> jax.Array:
    return jax.nn.log_softmax(_logits(params, inputs)[..., :WORDS], axis=-1)


class HeldOut(NamedTuple):
    """Held-out sentences, and what posterior and model say of their hidden words."""

    tokens: np.ndarray
    mask: np.ndarray
    posterior: np.ndarray
    log_model: np.ndarray


@functools.cache
def _bayes(seed: int, *, wrong_grammar: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Held-out sentences, which of their words are hidden, and the posterior of these."""
    tokens = np.asarray(sentences(seed, TOKENS, name="held out").tokens)
    mask = _masks(seed, "held-out masks", HELD_OUT)
    grammar = other_grammar(seed) if wrong_grammar else toy(seed).grammar
    return tokens, mask, hidden_words(grammar, tokens, np.full(HELD_OUT, TOKENS), mask)


@functools.cache
def held_out(seed: int, *, wrong_grammar: bool = False, trained: bool = True, renamed: bool = False) -> HeldOut:
    """With ``wrong_grammar`` the posterior is that of another grammar."""
    tokens, mask, posterior = _bayes(seed, wrong_grammar=wrong_grammar)
    params = parameters(seed, trained=trained, renamed=renamed)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        log_model = _log_words(params, _inputs(tokens, mask))
    return HeldOut(tokens, mask, posterior, np.asarray(log_model, float))


def _ahead(case: HeldOut) -> tuple[np.ndarray, float, float]:
    """Loss of the model less that of the posterior: by sentence as sums over hidden words, their mean and error."""
    chosen = case.tokens[..., None]
    with np.errstate(divide="ignore"):  # at words that are seen
        log_bayes = np.log(case.posterior)
    said = (np.take_along_axis(x, chosen, axis=2)[..., 0] for x in (log_bayes, case.log_model))
    bayes, model = (np.where(case.mask, x, 0) for x in said)
    sums, counts = (bayes - model).sum(axis=1), case.mask.sum(axis=1)
    mean = sums.sum() / counts.sum()
    return sums, float(mean), float(np.sqrt(((sums - mean * counts) ** 2).sum()) / counts.sum())


def _excess(case: HeldOut) -> float:
    return float(_mean_divergence(case.posterior, case.log_model, case.mask))


@compiled
def _mean_divergence(posterior: jax.Array, log_model: jax.Array, mask: jax.Array) -> jax.Array:
    return excess_loss(posterior, log_model, mask)[0]


def bayes_loss_is_not_beaten(seed: int, *, wrong_grammar: bool = False) -> Evidence:
    """Bayes loss less the loss of a trained model on held-out hidden words; the control has another grammar's loss."""
    _, ahead, error = _ahead(held_out(seed, wrong_grammar=wrong_grammar))
    return Evidence(-ahead, 0.0, stderr=error, setting=SETTING)


def measured_excess(seed: int, *, wrong_grammar: bool = False) -> Evidence:
    """Loss of a trained model less the Bayes loss on held-out hidden words, against its mean divergence.

    The control takes the posterior of another grammar for the true one.
    """
    case = held_out(seed, wrong_grammar=wrong_grammar)
    _, ahead, error = _ahead(case)
    return Evidence(ahead, _excess(case), stderr=error, setting=SETTING)


def training_approaches_bayes(seed: int, *, renamed: bool = False) -> Evidence:
    """Log excess loss of a trained model against the lesser of those of the model untrained and of word frequencies.

    The control trains on sentences of other words.
    """
    trained, before = held_out(seed, renamed=renamed), held_out(seed, trained=False)
    words = np.asarray(sentences(seed, TOKENS, name="training").tokens)
    log_frequency = np.log(np.bincount(words.ravel(), minlength=WORDS) / words.size)
    frequencies = before._replace(log_model=np.broadcast_to(log_frequency, before.posterior.shape))
    lesser = min(_excess(before), _excess(frequencies))
    # Logarithms, since excesses of different grammars are of different sizes.
    return Evidence(np.log(_excess(trained)), np.log(lesser), setting=SETTING)


CLAIMS = (
    make_claim(
        "bayes-loss-is-not-beaten",
        "A trained masked language model has no lower loss on held-out sentences than the exact Bayes loss.",
        PAPER,
        "bound",
        bayes_loss_is_not_beaten,
        {"wrong_grammar": True},
        "Bayes loss of another grammar",
        seeds=3,
    ),
    make_claim(
        "measured-excess",
        "A trained model's loss exceeds the Bayes loss by its mean divergence from the posterior.",
        f"derived; cf. {PAPER}",
        "equality",
        measured_excess,
        {"wrong_grammar": True},
        "posterior of another grammar",
        tolerance=0.05,
    ),
    make_claim(
        "training-approaches-bayes",
        "Training lowers a model's excess over the Bayes loss, to less than that of the frequencies of words.",
        PAPER,
        "ordering",
        training_approaches_bayes,
        {"renamed": True},
        "trained on sentences of other words",
        seeds=4,
        max_seeds=6,
    ),
)
