import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.trees import tree_axpy
from jaxft.kernels import (
    empirical_ntk,
    feature_drift,
    kernel_drift,
    kernel_gradient_descent,
    linearization_gap,
    linearize,
    output_derivative,
)


def cross_entropy(outputs, labels):
    picked = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(outputs, axis=1) - picked).mean()


@pytest.fixture
def labels():
    return jnp.array([0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize("minibatches", [False, True])
def test_kernel_descent_equals_gradient_descent_of_the_tangent_model(problem, labels, minibatches):
    f, params, x, y = problem
    f_lin = linearize(f, params)
    batches = jnp.array([[0, 3], [6, 1], [3, 3], [2, 5]]) if minibatches else None
    rates = jnp.array([0.1, 0.3, 0.2, 0.05])
    path = kernel_gradient_descent(
        empirical_ntk(f, params, x),
        f(params, x),
        labels,
        cross_entropy,
        learning_rate=rates,
        steps=4,
        batches=batches,
        kernel_test=empirical_ntk(f, params, y, x),
        f0_test=f(params, y),
    )
    assert path.test is not None
    theta = params
    for t in range(4):
        index = jnp.arange(7) if batches is None else batches[t]
        theta = tree_axpy(
            -rates[t], jax.grad(lambda p, i=index: cross_entropy(f_lin(p, x[i]), labels[i]))(theta), theta
        )
        np.testing.assert_allclose(path.train[t + 1], f_lin(theta, x), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(path.test[t + 1], f_lin(theta, y), rtol=1e-10, atol=1e-12)


def test_tangent_model_touches_the_model_and_misses_by_the_second_order(problem):
    f, params, x, _ = problem
    direction = jax.tree.map(jnp.ones_like, params)
    f_lin = linearize(f, params)
    np.testing.assert_array_equal(f_lin(params, x), f(params, x))
    errors = []
    for step in (1e-2, 1e-3):
        moved = tree_axpy(step, direction, params)
        errors.append(float(jnp.abs(f_lin(moved, x) - f(moved, x)).max()))
    assert 80 < errors[0] / errors[1] < 120


def test_linearization_gap_is_the_ratio_of_its_definition(problem):
    f, params, x, _ = problem
    moved = jax.tree.map(lambda a: 1.1 * a, params)
    after, before, tangent = f(moved, x), f(params, x), linearize(f, params)(moved, x)
    expected = np.linalg.norm(after - tangent) / np.linalg.norm(after - before)
    np.testing.assert_allclose(linearization_gap(f, params, moved, x), expected, rtol=1e-12)
    linear = linearize(f, params)
    assert float(linearization_gap(linear, params, moved, x)) < 1e-14


@pytest.mark.parametrize("block_size", [1, 3, 7, 50])
def test_feature_drift_equals_dense_gradients(problem, dense, block_size):
    f, params, x, _ = problem
    moved = jax.tree.map(lambda a: 1.1 * a, params)
    before, after = dense(f, params, x), dense(f, moved, x)
    expected = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
    np.testing.assert_allclose(feature_drift(f, params, moved, x, block_size=block_size), expected, rtol=1e-7)


def test_feature_drift_of_scalar_outputs_has_one_axis(scalar_problem):
    f, params, x, _ = scalar_problem
    assert feature_drift(f, params, params, x).shape == (7,)
    assert float(jnp.abs(feature_drift(f, params, params, x)).max()) == 0


def test_kernel_drift_equals_numpy(x64):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 2, 3, 2))
    drift = kernel_drift(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(drift.relative_norm, np.linalg.norm((b - a).ravel()) / np.linalg.norm(a.ravel()))
    np.testing.assert_allclose(drift.cosine, (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def test_output_derivative_of_cross_entropy_is_softmax_minus_one_hot(problem, labels):
    f, params, x, _ = problem
    chi = output_derivative(cross_entropy, f(params, x), labels)
    expected = jax.nn.softmax(f(params, x)) - jax.nn.one_hot(labels, 3)
    np.testing.assert_allclose(chi, expected, rtol=1e-12, atol=1e-12)
