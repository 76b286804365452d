"""Predicted flows of probability against dense products of gradients, and against steps that are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.kernels import parameter_mask
from jaxft.nn.decoder_outputs import make_first_token_logits, make_response_log_probs
from jaxft.tuning.directions import flow_direction, predicted_changes
from jaxft.tuning.gains import mass_flow, who_gains
from jaxft.tuning.preference_gram import displacement_rate, preference_gram


def mean_loss(f, params, batch):
    log_probs = f(params, batch)
    return jnp.mean(jnp.logaddexp(0.0, log_probs[:, 1] - log_probs[:, 0]))


@pytest.fixture
def problem(means64):
    log_probs = means64.log_probs(means64.params, means64.batch)
    slopes = jax.vmap(jax.grad(lambda z: jnp.logaddexp(0.0, z[1] - z[0])))(log_probs[:, :2])
    return means64.log_probs, means64.first_logits, means64.params, means64.batch, slopes


def assert_trees_close(ours, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), ours, expected)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_direction_is_minus_the_gradient_of_the_mean_loss(problem, batch_size):
    f, _, params, batch, slopes = problem
    expected = jax.grad(lambda p: -mean_loss(f, p, batch))(params)
    assert_trees_close(flow_direction(f, params, batch, slopes, batch_size=batch_size), expected)


def test_direction_of_other_rules_maps_the_gradient_and_leaves_frozen_parameters(problem):
    f, _, params, batch, slopes = problem
    mask = parameter_mask(params, without=["table"])
    grads = jax.grad(lambda p: mean_loss(f, p, batch))(params)
    trained = jax.tree.map(lambda g, m: g * m, grads, mask)
    ours = flow_direction(f, params, batch, slopes, rule="signgd", param_mask=mask)
    assert (np.asarray(ours["table"]) == 0).all()
    agree = jax.tree.map(lambda u, g: bool(jnp.all((jnp.abs(g) < 1e-12) | (u == -jnp.sign(g)))), ours, trained)
    assert all(jax.tree.leaves(agree))
    scale = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)
    ours = flow_direction(f, params, batch, slopes, rule="preconditioned", preconditioner=scale, param_mask=mask)
    assert_trees_close(ours, jax.tree.map(lambda g: -0.5 * g, trained))


def test_direction_of_a_transform_is_the_update_it_makes_next(problem):
    f, _, params, batch, slopes = problem
    tx = optax.adamw(1e-3)
    grads = jax.grad(lambda p: mean_loss(f, p, batch))(params)
    _, state = tx.update(jax.tree.map(lambda g: 2 * g + 0.1, grads), tx.init(params), params)
    expected, _ = tx.update(grads, state, params)
    assert_trees_close(flow_direction(f, params, batch, slopes, transform=tx, opt_state=state), expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "lion"])
def test_predicted_changes_are_those_of_small_steps_of_any_optimiser(problem, name):
    f, _, params, batch, slopes = problem
    tx = {"sgd": optax.sgd(1e-6, momentum=0.9), "adam": optax.adam(1e-7), "lion": optax.lion(1e-7)}[name]
    update = flow_direction(f, params, batch, slopes, transform=tx, opt_state=tx.init(params))
    predicted = predicted_changes(f, params, batch, update, batch_size=2)
    measured = f(optax.apply_updates(params, update), batch) - f(params, batch)
    np.testing.assert_allclose(predicted, measured, rtol=1e-3)


def test_an_example_alone_moves_as_its_gram_says(problem):
    f, _, params, batch, slopes = problem
    one = jax.tree.map(lambda leaf: leaf[1:2], batch)
    changes = predicted_changes(f, params, one, flow_direction(f, params, one, slopes[1:2]))
    np.testing.assert_allclose(changes, displacement_rate(preference_gram(f, params, one), slopes[1:2]), rtol=1e-10)


def test_rates_of_tokens_are_products_of_dense_gradients(problem):
    f, logits, params, batch, slopes = problem
    ours = who_gains(logits, f, params, batch, slopes, top=4)
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    grads = jax.jacobian(lambda p: jax.nn.log_softmax(logits(p, one)[0]))(params)
    mean = jax.grad(lambda p: mean_loss(f, p, batch))(params)
    parts = [
        jnp.tensordot(g, m, axes=m.ndim) for g, m in zip(jax.tree.leaves(grads), jax.tree.leaves(mean), strict=True)
    ]
    expected = -sum(parts)
    np.testing.assert_allclose(ours.log_change[0], expected, rtol=1e-9, atol=1e-11)
    probs = jax.nn.softmax(logits(params, one)[0])
    np.testing.assert_allclose(ours.mass_change[0], probs * expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(ours.mass_change.sum(axis=1), 0, atol=1e-12)
    order = np.argsort(np.asarray(expected), kind="stable")
    assert ours.gainers[0].tolist() == order[::-1][:4].tolist()
    assert ours.losers[0].tolist() == order[:4].tolist()


def test_rates_of_a_decoder_do_not_depend_on_the_layout(tuned64, layouts):
    f, logits = make_response_log_probs(tuned64.config), make_first_token_logits(tuned64.config)
    slopes = np.array([[-0.5, 0.5], [-0.1, 0.2], [-0.3, 0.3]])
    flows = [who_gains(logits, f, tuned64.params, layouts(*of), slopes) for of in (("packed",), ("padded", "left"))]
    np.testing.assert_allclose(flows[0].log_change, flows[1].log_change, rtol=1e-10)
    np.testing.assert_allclose(flows[0].mass_change.sum(axis=1), 0, atol=1e-12)


def test_predicted_mass_flow_is_measured_after_a_small_step(problem):
    f, logits, params, batch, slopes = problem
    followed = jax.tree.map(lambda leaf: leaf[:2], batch)
    tx = optax.sgd(1e-6)
    options = {"transform": tx, "opt_state": tx.init(params)}
    predicted = who_gains(logits, f, params, batch, slopes, followed=followed, by="mass", **options)
    after = optax.apply_updates(params, flow_direction(f, params, batch, slopes, **options))
    measured = mass_flow(logits(params, followed), logits(after, followed))
    assert predicted.log_change.shape == (2, 11)
    for name in ("log_change", "mass_change"):
        np.testing.assert_allclose(getattr(predicted, name), getattr(measured, name), rtol=1e-3, atol=1e-12)
    np.testing.assert_array_equal(predicted.gainers, measured.gainers)


def test_mass_flow_is_the_same_for_logits_and_log_probabilities(x64):
    before, after = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)))
    plain, shifted = mass_flow(before, after), mass_flow(before + 5, jax.nn.log_softmax(after, axis=-1))
    for a, b in zip(plain, shifted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_an_optimiser_that_decays_weights_leaves_frozen_ones():
    params = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}
    batch, slopes = jnp.array([[1.0, 2.0]]), jnp.array([[-0.5, 0.5]])
    tx = optax.adamw(0.1, weight_decay=0.5)
    update = flow_direction(
        lambda p, x: x @ (p["w"] + p["v"]),
        params,
        batch,
        slopes,
        transform=tx,
        opt_state=tx.init(params),
        param_mask={"w": True, "v": False},
    )
    assert not update["v"].any()
    assert update["w"].all()


def test_blocks_of_half_precision_sum_to_what_the_whole_gives():
    batch, slopes = jnp.ones((64, 1), jnp.bfloat16), jnp.full((64, 1), -1.125)
    whole, blocks = (
        flow_direction(lambda w, x: x @ w, jnp.ones((1, 1), jnp.bfloat16), batch, slopes, batch_size=size)
        for size in (None, 1)
    )
    assert whole.item() == blocks.item() == 1.125
