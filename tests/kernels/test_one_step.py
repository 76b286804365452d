"""First-order predictions of one step against kernels, a hand-made step and the second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.trees import tree_axpy
from jaxft.kernels import empirical_ntk, linearize, output_derivative, output_jacobian, parameter_mask
from jaxft.kernels.one_step import DIRECTIONS, one_step_prediction

LABELS = jnp.array([0, 1, 2, 0, 1, 2, 0])


def cross_entropy(outputs, labels):
    picked = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(outputs, axis=1) - picked).mean()


def logistic(outputs, signs):
    return jnp.mean(jnp.logaddexp(0.0, -signs * outputs))


@pytest.fixture(params=DIRECTIONS)
def options(request, preconditioner):
    return {"rule": request.param, "preconditioner": preconditioner if request.param == "preconditioned" else None}


def step_of(problem, options, rate):
    f, params, x, y = problem
    return one_step_prediction(f, params, x, LABELS, y, cross_entropy, learning_rate=rate, **options)


def direction_of(problem, options):
    g = jax.grad(lambda p: cross_entropy(problem.f(p, problem.x), LABELS))(problem.params)
    if options["rule"] == "preconditioned":
        return jax.tree.map(jnp.multiply, g, options["preconditioner"])
    return jax.tree.map(jnp.sign, g) if options["rule"] == "signgd" else g


@pytest.mark.parametrize("kernel", ["sgd", "preconditioned"])
def test_prediction_equals_that_of_the_kernel(problem, preconditioner, kernel):
    f, params, x, y = problem
    p = preconditioner if kernel == "preconditioned" else None
    k = empirical_ntk(f, params, y, x, kernel=kernel, preconditioner=p)
    chi = output_derivative(cross_entropy, f(params, x), LABELS)
    ours = step_of(problem, {"rule": kernel, "preconditioner": p}, 0.1).predicted
    np.testing.assert_allclose(ours, -0.1 / 7 * jnp.tensordot(k, chi, axes=2), rtol=1e-10, atol=1e-13)


def test_sign_step_on_one_example_follows_the_asymmetric_kernel(scalar_problem):
    f, params, x, y = scalar_problem
    rows, columns = (
        jnp.concatenate([leaf.reshape(len(side), -1) for leaf in jax.tree.leaves(output_jacobian(f, params, side))], 1)
        for side in (y, x[:1])
    )
    sign = jnp.array([-1.0])
    chi = output_derivative(logistic, f(params, x[:1]), sign)
    expected = -0.1 * (rows @ jnp.sign(columns).T) @ jnp.sign(chi)
    ours = one_step_prediction(f, params, x[:1], sign, y, logistic, learning_rate=0.1, rule="signgd")
    np.testing.assert_allclose(ours.predicted, expected, rtol=1e-10)
    swapped = -0.1 * (jnp.sign(rows) @ columns.T) @ jnp.sign(chi)
    assert float(jnp.abs(ours.predicted - swapped).max()) > 1e-3


def test_measured_change_is_that_of_the_step_taken(problem, options):
    f, params, _, y = problem
    moved = tree_axpy(-0.3, direction_of(problem, options), params)
    expected = f(moved, y) - f(params, y)
    np.testing.assert_allclose(step_of(problem, options, 0.3).measured, expected, rtol=1e-12, atol=1e-14)


def test_error_of_the_prediction_is_of_second_order(problem, options):
    errors = []
    for rate in (1e-2, 1e-3):
        step = step_of(problem, options, rate)
        errors.append(float(jnp.linalg.norm(step.measured - step.predicted)))
    assert 80 < errors[0] / errors[1] < 120


def test_both_agree_for_the_tangent_model(problem, options):
    tangent = linearize(problem.f, problem.params)
    step = step_of(problem._replace(f=tangent), options, 0.5)
    np.testing.assert_allclose(step.measured, step.predicted, rtol=1e-10, atol=1e-13)


def test_jit_vmap_over_rates_and_float32_agree(problem, problem32):
    plain = {"rule": "sgd", "preconditioner": None}
    mapped = jax.jit(jax.vmap(lambda rate: step_of(problem, plain, rate)))(jnp.array([0.1, 0.2]))
    for i, rate in enumerate((0.1, 0.2)):
        np.testing.assert_allclose(mapped.measured[i], step_of(problem, plain, rate).measured, rtol=1e-10, atol=1e-13)
    ours = step_of(problem32, plain, 0.1)
    assert ours.measured.dtype == jnp.float32
    np.testing.assert_allclose(ours.predicted, mapped.predicted[0], rtol=1e-3, atol=1e-5)


def test_masked_step_moves_the_outputs_by_the_masked_kernel(problem):
    f, params, x, y = problem
    labels, mask = LABELS, parameter_mask(params, only=["^in/b$"])
    step = one_step_prediction(f, params, x, labels, y, cross_entropy, learning_rate=0.1, param_mask=mask)
    chi = output_derivative(cross_entropy, f(params, x), labels)
    kernel = empirical_ntk(f, params, y, x, param_mask=mask)
    np.testing.assert_allclose(step.predicted, -0.1 * jnp.tensordot(kernel, chi, axes=2) / 7, rtol=1e-10)
