"""Claims on what the library predicts with: exact coefficients, Gram matrices, kernels, tokens that gain."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream
from jaxft.core.types import Params, ResponseBatch
from jaxft.kernels import empirical_ntk
from jaxft.train import adam_preconditioner
from jaxft.tuning.ches import ches_scores, ches_terms
from jaxft.tuning.gains import who_gains
from jaxft.tuning.preference_gram import batch_displacement_rate, displacement_rate, preference_gram
from theory.claims import Evidence
from theory.likelihood_displacement.decoders import (
    EXAMPLES,
    decoder_log_probs,
    decoder_states,
    drawn_decoder,
    plain,
)
from theory.likelihood_displacement.rates import (
    rate_chosen,
    rate_other_token,
    rate_single_token,
    rate_through_unembedding,
    rates_across_examples,
)
from theory.likelihood_displacement.ufm import (
    STANDARD,
    Instance,
    all_slopes,
    compiled,
    drawn_instance,
    flow_rates,
    losses_of,
    make_claim,
    pair_of,
    response_log_probs,
    response_states,
    shifted_by_one,
    stacked,
)

PAIRS = 6
LOSSES = losses_of("margin", "weighted", "outside")
CHUNK = 4
"""Words at a time of exact coefficients."""


def exact_coefficients(seed: int, *, shifted: bool = False) -> Evidence:
    """Scores with exact coefficients against gradients in W, on features and on a decoder with a table of its own.

    The control reads hidden states one token late.
    """
    features, decoder = drawn_instance(seed, examples=PAIRS), drawn_decoder(seed)
    late = jax.tree.map(lambda leaf: leaf[0], shifted_by_one(stacked([features]))) if shifted else features
    later = decoder.batch._replace(source=(decoder.batch.source + 1) * decoder.batch.mask)
    options: dict[str, Any] = {"coefficients": "exact", "chunk": CHUNK}
    table, params = features.params["unembedding"], jax.tree.map(jnp.asarray, features.params)
    with STANDARD():
        of_features = ches_scores(response_states, params, late.batch, table=jnp.asarray(table), **options)
        table = decoder.params["unembedding"]["table"]
        batch = later if shifted else decoder.batch
        of_decoder = ches_scores(decoder_states, decoder.params, batch, table=table, **options)
    by_table = _features_gram(params, features.batch, jnp.asarray(True))
    predicted = [_score(by_table), _score(_table_gram(decoder.params, decoder.batch))]
    setting = {"pairs": [PAIRS, EXAMPLES], "models": ["unconstrained features", "decoder"]}
    return Evidence(np.concatenate([of_features, of_decoder]), np.concatenate(predicted), setting=setting)


def _score(gram: jax.Array) -> np.ndarray:
    """<g+, g-> - <g+, g+>."""
    return np.asarray(gram[:, 0, 1] - gram[:, 0, 0])


@compiled
def _features_gram(params: Params, batch: ResponseBatch, table_alone: jax.Array) -> jax.Array:
    gradients = jax.jacrev(response_log_probs)(params, batch)
    scales = {"hidden": jnp.where(table_alone, 0.0, 1.0), "unembedding": jnp.asarray(1.0)}
    inner = {name: scales[name] * jnp.einsum("nrab,nsab->nrs", g, g) for name, g in gradients.items()}
    return inner["hidden"] + inner["unembedding"]


@compiled
def _table_gram(params: Params, batch: ResponseBatch) -> jax.Array:
    f = plain(decoder_log_probs)
    table = params["unembedding"]["table"]
    gradient = jax.jacrev(lambda w: f({**params, "unembedding": {"table": w}}, batch))(table)
    return jnp.einsum("nrvd,nsvd->nrs", gradient, gradient)


def fixed_states_rate(seed: int, *, several: bool = False) -> Evidence:
    """Rates of ln pi(y+) while W alone is trained, by time of the clock; the control has several tokens."""
    case = drawn_instance(seed, examples=PAIRS)
    params, batch = jax.tree.map(jnp.asarray, (case.params, case.batch))
    batch = batch if several else batch._replace(mask=batch.mask.at[..., 1:].set(0))
    rates = -_score(_features_gram(params, batch, jnp.asarray(True)))
    return Evidence(rates, np.asarray(_through_unembedding(params, batch)), setting={"least": float(rates.min())})


@compiled
def _through_unembedding(params: Params, batch: ResponseBatch) -> jax.Array:
    table, tokens = params["unembedding"], batch.targets[:, :2, 0]
    states = params["hidden"][batch.source[:, 0, 0]]
    of = jax.vmap(rate_through_unembedding, (None, 0, 0, 0, None))
    return of(table, states, tokens[:, 0], tokens[:, 1], jnp.asarray(-1.0, table.dtype))


def terms_of_pairs(seed: int, *, as_theorem: bool = False) -> Evidence:
    """All terms of a pair against the Gram matrix, also where the responses share their first token and prefix.

    The control takes theorem 6 for those, which supposes that they differ.
    """
    measured, predicted, forks = [], [], []
    for same_first in (False, True):
        case = stacked([drawn_instance(seed, examples=PAIRS, same_first=same_first)])
        params, batch = jax.tree.map(lambda leaf: leaf[0], (case.params, case.batch))
        states = response_states(params, batch)
        with STANDARD():
            terms = ches_terms(states, batch.targets, batch.mask, params["unembedding"])
        forks += np.asarray(terms.fork).tolist()
        rate = np.asarray(_as_theorem(params["unembedding"], states, batch)) if as_theorem else terms.rate
        measured.append(np.asarray(rate))
        predicted.append(-_score(_features_gram(params, batch, jnp.asarray(False))))
    setting = {"tokens that both begin with": forks}
    return Evidence(np.concatenate(measured), np.concatenate(predicted), setting=setting)


@compiled
def _as_theorem(table: jax.Array, states: jax.Array, batch: ResponseBatch) -> jax.Array:
    of = jax.vmap(rate_chosen, (None, 0, 0, 0, None))
    return of(table, states[:, :2], batch.targets[:, :2], batch.mask[:, :2], jnp.asarray(-1.0, table.dtype))


def gram_rates(seed: int, *, adam: bool = False, wrong: str = "") -> Evidence:
    """Rates from Gram matrices for every loss of the table, against derivatives along the flow, on a decoder.

    Each example flows alone. The controls take the Gram matrices of other examples, or plain ones for Adam's.
    """
    model, scales = drawn_decoder(seed), _scales(seed, adam and wrong != "plain")
    with STANDARD():
        gram = preference_gram(decoder_log_probs, model.params, model.batch, preconditioner=scales)
    gram = jnp.roll(gram, 1, axis=0) if wrong == "pairs" else gram
    own, _, slopes = _measured(seed, adam)
    rates = jnp.stack([displacement_rate(gram, slope) for slope in slopes])
    return _by_loss(own, rates, losses=[loss.name for loss in LOSSES])


def _scales(seed: int, adam: bool) -> Params:
    """Adam's preconditioner for random moments, or ones, which a program for both takes."""
    params, draw = drawn_decoder(seed).params, host_stream(seed, "second moments")
    moments = jax.tree.map(lambda leaf: jnp.asarray(draw.gamma(0.5, size=leaf.shape)), params)
    return adam_preconditioner(moments, eps=1e-3) if adam else jax.tree.map(jnp.ones_like, params)


@functools.cache
def _measured(seed: int, adam: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the decoder: rates of each example's own flow, of the flow of all, and slopes, by loss."""
    model = drawn_decoder(seed)
    return _decoder_rates(model.params, model.batch, jnp.asarray(model.reference), _scales(seed, adam))


@compiled
def _decoder_rates(
    params: Params, batch: ResponseBatch, reference: jax.Array, scales: Params
) -> tuple[jax.Array, jax.Array, jax.Array]:
    f, examples = plain(decoder_log_probs), jnp.eye(EXAMPLES, dtype=reference.dtype)
    scale = functools.partial(jax.tree.map, jnp.multiply, scales)
    weights = jnp.concatenate([EXAMPLES * examples, jnp.ones_like(examples[:1])])
    found = flow_rates(f, LOSSES, params, batch, reference, scale=scale, weights=weights)
    slopes = all_slopes(LOSSES, pair_of(f(params, batch)), reference, batch)
    own = jnp.stack([found[i, :, i] for i in range(EXAMPLES)], axis=1)
    return own, found[EXAMPLES], slopes


def _by_loss(measured: Any, predicted: Any, **setting: Any) -> Evidence:
    """Rates ``[loss, ...]``, each loss in units of the largest."""
    measured, predicted = (np.asarray(x).reshape(len(measured), -1) for x in (measured, predicted))
    scale = np.abs(measured).max(axis=1, keepdims=True)
    scale = np.where(scale > 0, scale, 1)
    return Evidence(measured / scale, predicted / scale, setting=setting)


def batch_rates(seed: int, *, own_only: bool = False) -> Evidence:
    """Rates under the mean loss of a batch from the kernel of all its log-probabilities.

    On a decoder against derivatives along the flow, for every loss; on features with one token against theorems 8 and
    9. The control leaves out what examples do to each other.
    """
    model = drawn_decoder(seed)
    with STANDARD():
        kernel = empirical_ntk(decoder_log_probs, model.params, model.batch)
    _, together, slopes = _measured(seed, False)
    features = drawn_instance(seed, examples=EXAMPLES, length=1, vocabulary=6)
    instance = jax.tree.map(lambda leaf: leaf[0], stacked([features]))
    with STANDARD():
        other = empirical_ntk(response_log_probs, instance.params, instance.batch)
    slope = all_slopes(LOSSES[:1], pair_of(response_log_probs(*instance[:2])), instance.reference, instance.batch)
    kernels = [_own_blocks(k) if own_only else k for k in (kernel, other)]
    of_decoder = jnp.stack([batch_displacement_rate(kernels[0], s) for s in slopes])
    of_features = np.delete(np.asarray(batch_displacement_rate(kernels[1], slope[0])), 1, axis=1)
    by_theorem = np.delete(np.asarray(_theorems_8_and_9(instance, slope[0, :, 0])), 1, axis=1)
    decoder = _by_loss(together, of_decoder)
    scale = np.abs(by_theorem).max()
    predicted = np.concatenate([np.ravel(decoder.measured), np.ravel(by_theorem) / scale])
    measured = np.concatenate([np.ravel(decoder.predicted), np.ravel(of_features) / scale])
    return Evidence(measured, predicted, setting={"losses": [loss.name for loss in LOSSES], "examples": EXAMPLES})


def _own_blocks(kernel: jax.Array) -> jax.Array:
    return jnp.where(jnp.eye(len(kernel), dtype=bool)[:, None, :, None], kernel, 0)


@compiled
def _theorems_8_and_9(instance: Instance, slopes: jax.Array) -> jax.Array:
    tokens = instance.batch.targets[:, :, 0]
    hidden, table = instance.params["hidden"][instance.batch.source[:, 0, 0]], instance.params["unembedding"]
    of = lambda z: rates_across_examples(table, hidden, z, tokens[:, 0], tokens[:, 1], slopes)  # noqa: E731
    return jax.vmap(of, 1, 1)(tokens)


def tokens_that_gain(seed: int, *, swapped: bool = False) -> Evidence:
    """Rates of all tokens but the rejected one, as the library ranks them, against theorems 4 and 5.

    The control has the two tokens of the pair exchanged.
    """
    instance = jax.tree.map(lambda leaf: leaf[0], stacked([drawn_instance(seed, length=1)]))
    params, batch = instance.params, instance.batch
    slopes = all_slopes(LOSSES[:1], pair_of(response_log_probs(params, batch)), instance.reference, batch)[0]
    with STANDARD():
        found = who_gains(first_token_logits, response_log_probs, params, batch, slopes, top=3)
    chosen, rejected = (int(x) for x in np.asarray(batch.targets)[0, :2, 0])
    at = (rejected, chosen) if swapped else (chosen, rejected)
    predicted = np.asarray(_theorems_4_and_5(params, jnp.asarray(at), slopes[0, 0]))
    setting = {"loss": LOSSES[0].name, "gainers": np.asarray(found.gainers)[0].tolist(), "chosen": chosen}
    measured, predicted = (np.delete(np.ravel(x), [rejected]) for x in (found.log_change, predicted))
    return Evidence(measured, predicted, setting=setting)


def first_token_logits(params: Params, batch: ResponseBatch) -> jax.Array:
    """Logits of the first token of the responses."""
    return jnp.einsum("nd,vd->nv", params["hidden"][batch.source[:, 0, 0]], params["unembedding"])


@compiled
def _theorems_4_and_5(params: Params, pair: jax.Array, slope: jax.Array) -> jax.Array:
    table, hidden = params["unembedding"], params["hidden"][0]
    every = jnp.arange(len(table), dtype=pair.dtype)
    of = jax.vmap(rate_other_token, (None, None, 0, None, None, None))
    others = of(table, hidden, every, pair[0], pair[1], slope)
    return others.at[pair[0]].set(rate_single_token(table, hidden, pair[0], pair[1], slope))


CLAIMS = (
    make_claim(
        "exact-coefficients",
        "The weighted inner products of theorem 6 are those of gradients in the unembedding, in any network.",
        "cf. theorem 6",
        "identity",
        exact_coefficients,
        {"shifted": True},
        "hidden states are read one token late",
    ),
    make_claim(
        "fixed-states-rate",
        "With hidden states fixed, the rate of ln pi(y+) of one token is -l' (1 - p+ + p-) |h|^2, never negative.",
        "theorem 4, the term with |h|^2",
        "identity",
        fixed_states_rate,
        {"several": True},
        "responses have several tokens",
        seeds=8,
    ),
    make_claim(
        "terms-of-pairs",
        "Theorem 6 holds of responses that begin alike, with the first place where they differ for its first token.",
        "cf. theorem 6",
        "identity",
        terms_of_pairs,
        {"as_theorem": True},
        "theorem 6 as it stands",
    ),
    make_claim(
        "gram-rates",
        "Any loss moves ln pi(z) of any model at the rate -f+ G(z,+) - f- G(z,-), G the inner products of gradients.",
        "cf. proposition 2",
        "identity",
        gram_rates,
        {"wrong": "pairs"},
        "the Gram matrices are those of other pairs",
    ),
    make_claim(
        "gram-rates-adam",
        "So it does under Adam's preconditioner P, with inner products <g, P g'>.",
        "cf. proposition 2",
        "identity",
        functools.partial(gram_rates, adam=True),
        {"wrong": "plain"},
        "the Gram matrices are without P",
    ),
    make_claim(
        "batch-rates",
        "Under a batch's mean loss the rates are those of the kernel of all its log-probabilities, of which theorems 8 "
        "and 9 are a case.",
        "cf. theorems 8 and 9",
        "identity",
        batch_rates,
        {"own_only": True},
        "what examples do to each other is left out",
    ),
    make_claim(
        "tokens-that-gain",
        "One forward derivative along the flow gives the rates of all tokens, as theorems 4 and 5 have them.",
        "cf. theorems 4 and 5",
        "identity",
        tokens_that_gain,
        {"swapped": True},
        "chosen and rejected are exchanged",
    ),
)
