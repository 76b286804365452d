"""Preference tuning through the compiled loop: objectives of trees of labels, the reference, adapters, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.nn.lora import init_lora, make_adapted_outputs, merge_lora
from jaxft.train import fit, init_fit, init_state, make_segment
from jaxft.tuning.objectives import PreferenceLabels, loss_slopes, make_preference_objective
from jaxft.tuning.packing import make_response_batch
from jaxft.tuning.reference import reference_log_probs

VOCAB, PAIRS = 11, 12


def log_probs_of(params, batch):
    """Log-probabilities of responses under a bigram model: the state of a column is the embedding of its token."""
    n, s, t = batch.tokens.input_ids.shape
    states = params["embedding"][batch.tokens.input_ids.reshape(n, s * t)] @ params["kernel"]
    at = jnp.take_along_axis(states[:, None], batch.source[..., None], axis=2)
    log_p = jax.nn.log_softmax(at @ params["table"], axis=-1)
    chosen = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
    return (chosen * batch.mask).sum(axis=-1)


@pytest.fixture(scope="module")
def pairs():
    draw = np.random.default_rng(0)
    prompts = [draw.integers(VOCAB, size=2).tolist() for _ in range(PAIRS)]
    responses = [[draw.integers(VOCAB, size=k).tolist() for k in draw.integers(1, 5, size=2)] for _ in range(PAIRS)]
    return jax.tree.map(jnp.asarray, make_response_batch(prompts, responses))


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(1)
    shapes = {"embedding": (VOCAB, 6), "kernel": (6, 6), "table": (6, VOCAB)}
    return {name: jnp.asarray(draw.normal(scale=0.6, size=shape), jnp.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def labels(pairs, params):
    reference = reference_log_probs(log_probs_of, params, pairs, batch_size=5)
    return PreferenceLabels(reference, pairs.mask.sum(axis=-1))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def batches(start, stop):
    return np.stack([np.random.default_rng(step).permutation(PAIRS)[:4] for step in range(start, stop)])


def test_reference_is_that_of_one_batch_and_compiles_once(pairs, params):
    traced = []

    def counted(params, batch):
        traced.append(batch.source.shape)
        return log_probs_of(params, batch)

    measured = reference_log_probs(counted, params, pairs, batch_size=5)
    np.testing.assert_allclose(measured, log_probs_of(params, pairs), rtol=1e-6)
    assert traced == [(5, *pairs.source.shape[1:])]
    np.testing.assert_allclose(reference_log_probs(counted, params, pairs, batch_size=64), measured, rtol=1e-6)


def test_reference_of_half_precision_is_returned_in_single(pairs, params):
    def half(params, batch):
        return log_probs_of(params, batch).astype(jnp.bfloat16)

    assert reference_log_probs(half, params, pairs, batch_size=4).dtype == jnp.float32


def test_first_step_follows_the_slopes_of_the_loss(pairs, params, labels):
    tx = optax.sgd(0.1)
    objective = make_preference_objective("simpo", beta=2.0, gamma=0.3)
    segment = make_segment(log_probs_of, objective, tx)
    state, losses = segment(init_state(params, tx), pairs, labels, jnp.arange(PAIRS)[None])
    x = log_probs_of(params, pairs)
    f = loss_slopes("simpo", x, labels.reference, labels.lengths, beta=2.0, gamma=0.3) / PAIRS
    grads = jax.jit(jax.grad(lambda p: (f * log_probs_of(p, pairs)).sum()))(params)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, rtol=1e-5, atol=1e-6),
        state.params,
        params,
        grads,
    )
    np.testing.assert_allclose(losses[0], objective(x, labels), rtol=1e-6)


def test_dpo_starts_at_log_two_and_raises_the_margin(pairs, params, labels):
    tx = optax.adam(3e-2)
    segment = make_segment(log_probs_of, make_preference_objective("dpo", beta=0.5), tx, accumulate=2)
    state, losses = segment(init_state(params, tx), pairs, labels, jnp.asarray(batches(0, 40)))
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-6)
    gained = log_probs_of(state.params, pairs) - labels.reference
    assert losses[-5:].mean() < 0.3
    assert (gained[:, 0] - gained[:, 1]).mean() > 2


def test_an_sft_term_raises_chosen_responses(pairs, params, labels):
    tx = optax.adam(3e-2)
    index = jnp.asarray(batches(0, 40))

    def gained(sft_weight):
        objective = make_preference_objective("dpo", beta=0.5, sft_weight=sft_weight)
        state, _ = make_segment(log_probs_of, objective, tx)(init_state(params, tx), pairs, labels, index)
        return float((log_probs_of(state.params, pairs) - labels.reference)[:, 0].mean())

    assert gained(1.0) > gained(0.0)
    assert gained(1.0) > 0


def test_resume_with_preference_labels_is_bitwise(pairs, params, labels):
    tx = optax.adam(1e-2)
    objective = make_preference_objective("rpo", beta=0.3, alpha=0.2)
    segment = make_segment(log_probs_of, objective, tx, accumulate=2)

    def run(state, **options):
        return fit(segment, state, pairs, labels, batches=batches, steps=6, event_every=3, **options)

    whole = run(init_fit(init_state(params, tx)))
    half = run(init_fit(init_state(params, tx)), on_event=lambda state, *_: int(state.train.step) == 3)
    assert int(half.train.step) == 3
    assert equal(whole, run(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)))


def test_adapters_train_as_the_merged_parameters_would(pairs, params, labels):
    adapters = init_lora(params, {"embedding": False, "kernel": True, "table": True}, rank=2, key=jax.random.key(0))
    f, tx = make_adapted_outputs(log_probs_of, scale=2.0), optax.sgd(0.3)
    objective, index = make_preference_objective("dpo", beta=0.5), jnp.asarray(batches(0, 2))
    segment = make_segment(f, objective, tx, frozen=params, accumulate=2)
    state, losses = segment(init_state(adapters, tx), pairs, labels, index)

    @jax.jit
    def value_and_grad(adapters, rows):
        one, own = jax.tree.map(lambda x: x[rows], (pairs, labels))
        return jax.value_and_grad(lambda a: objective(log_probs_of(merge_lora(params, a, scale=2.0), one), own))(
            adapters
        )

    trained = adapters
    for step, rows in enumerate(index):
        value, grads = value_and_grad(trained, rows)
        trained = jax.tree.map(lambda a, g: a - 0.3 * g, trained, grads)
        np.testing.assert_allclose(losses[step], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, trained)
    merged = merge_lora(params, state.params, scale=2.0)
    np.testing.assert_array_equal(merged["embedding"], params["embedding"])
    np.testing.assert_allclose(log_probs_of(merged, pairs), f(state.params, pairs, frozen=params), rtol=1e-6)
