"""Gram matrices and rates against dense gradients."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import RankOne, empirical_ntk, parameter_mask
from jaxft.nn.decoder_outputs import make_response_log_probs
from jaxft.tuning.preference_gram import batch_displacement_rate, displacement_rate, preference_gram


def dense_gradients(f, params, batch, keep=None):
    """``[n, r, p]``, every gradient whole; those of frozen leaves are 0."""
    grads = jax.jacobian(f)(params, batch)
    if keep is not None:
        grads = jax.tree.map(lambda g, m: g * m, grads, keep)
    return jnp.concatenate([g.reshape(*g.shape[:2], -1) for g in jax.tree.leaves(grads)], axis=-1)


def positive_like(params, seed):
    draw = np.random.default_rng(seed).uniform
    return jax.tree.map(lambda x: jnp.asarray(draw(0.5, 2.0, size=x.shape)), params)


@pytest.fixture
def problem(means64):
    return means64.log_probs, means64.params, means64.batch


def test_gram_of_a_decoder_equals_products_of_dense_gradients_in_every_layout(tuned64, layouts):
    f, params = make_response_log_probs(tuned64.config), tuned64.params
    grads = jax.jit(lambda p, b: dense_gradients(f, p, b))(params, tuned64.batch)
    expected = jnp.einsum("nrp,nsp->nrs", grads, grads)
    packed, padded = preference_gram(f, params, tuned64.batch), layouts("padded", "left")
    for ours in (packed, preference_gram(f, params, padded, method="ghost")):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_preconditioned_and_masked_gram_equals_dense_products(problem):
    f, params, batch = problem
    mask = parameter_mask(params, without=["words", "bias"])
    grads, scale = dense_gradients(f, params, batch, mask), positive_like(params, 1)
    flat = jax.flatten_util.ravel_pytree(scale)[0]
    expected = jnp.einsum("nrp,p,nsp->nrs", grads, flat, grads)
    ours = preference_gram(f, params, batch, preconditioner=scale, param_mask=mask)
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_preconditioner_of_rank_one_equals_its_dense_form(problem):
    f, params, batch = problem
    scale = positive_like(params, 2)
    v, d = params["table"].shape
    outer = RankOne(jnp.linspace(0.5, 1.5, v), jnp.linspace(1.0, 2.0, d))
    dense, structured = ({**scale, "table": table} for table in (outer.dense(), outer))
    both = [preference_gram(f, params, batch, preconditioner=p) for p in (dense, structured)]
    np.testing.assert_allclose(*both, rtol=1e-11)


def any_loss(log_probs):
    """A loss of both log-probabilities that is no function of their margin."""
    return jnp.logaddexp(0.0, 0.3 * log_probs[..., 1] - 0.7 * log_probs[..., 0]) ** 2


def test_rates_of_all_responses_are_derivatives_along_the_flow_of_their_own_example(problem):
    f, params, batch = problem
    gram, slopes = preference_gram(f, params, batch), jax.vmap(jax.grad(any_loss))(f(params, batch)[:, :2])
    rates = []
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        flow = jax.grad(lambda p, one=one: -any_loss(f(p, one)[0]))(params)
        rates.append(jax.jvp(lambda p, one=one: f(p, one)[0], (params,), (flow,))[1])
    ours = displacement_rate(gram, slopes)
    assert ours.shape == (3, 3)
    np.testing.assert_allclose(ours, jnp.stack(rates), rtol=1e-10)


def test_rates_under_a_preconditioner_are_derivatives_along_its_flow(problem):
    f, params, batch = problem
    scale = positive_like(params, 3)
    gram = preference_gram(f, params, batch, preconditioner=scale)
    slopes = jax.vmap(jax.grad(any_loss))(f(params, batch)[:, :2])
    one = jax.tree.map(lambda leaf: leaf[2:], batch)
    flow = jax.tree.map(lambda g, p: -g * p, jax.grad(lambda p: any_loss(f(p, one)[0]))(params), scale)
    rates = jax.jvp(lambda p: f(p, one)[0], (params,), (flow,))[1]
    np.testing.assert_allclose(displacement_rate(gram, slopes)[2], rates, rtol=1e-10)


def test_rates_under_a_batch_are_derivatives_along_the_flow_of_its_mean_loss(problem):
    f, params, batch = problem
    slopes = jax.vmap(jax.grad(any_loss))(f(params, batch)[:, :2])
    flow = jax.grad(lambda p: -jnp.mean(any_loss(f(p, batch))))(params)
    rates = jax.jvp(lambda p: f(p, batch), (params,), (flow,))[1]
    ours = batch_displacement_rate(empirical_ntk(f, params, batch), slopes)
    np.testing.assert_allclose(ours, rates, rtol=1e-10)


def test_gram_is_the_diagonal_of_the_kernel_and_works_under_jit(problem):
    f, params, batch = problem
    kernel = empirical_ntk(f, params, batch)
    ours = jax.jit(lambda p, b: preference_gram(f, p, b))(params, batch)
    np.testing.assert_allclose(ours, jnp.einsum("nrns->nrs", kernel), rtol=1e-11)
