from typing import Any, NamedTuple

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
    output_jacobian,
    parameter_mask,
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


def logistic(outputs, signs):
    return jnp.mean(jnp.logaddexp(0.0, -signs * outputs))


class SignCase(NamedTuple):
    """A scalar network, its asymmetric sign kernels and the signs of its labels."""

    problem: Any
    kernel: jax.Array
    kernel_test: jax.Array
    signs: jax.Array

    def path(self, batches, **options):
        f, params, x, y = self.problem
        return kernel_gradient_descent(
            self.kernel,
            f(params, x),
            self.signs,
            logistic,
            learning_rate=0.05,
            steps=len(batches),
            batches=jnp.array(batches),
            sign=True,
            kernel_test=self.kernel_test,
            f0_test=f(params, y),
            **options,
        )

    def sign_descent(self, batches):
        """Outputs of the tangent model at train and test points, after each step of sign descent on a batch."""
        f, params, x, y = self.problem
        f_lin = linearize(f, params)
        theta, outputs = params, []
        for batch in batches:
            index = jnp.array(batch)
            g = jax.grad(lambda p, i=index: logistic(f_lin(p, x[i]), self.signs[i]))(theta)
            theta = tree_axpy(-0.05, jax.tree.map(jnp.sign, g), theta)
            outputs.append((f_lin(theta, x), f_lin(theta, y)))
        return outputs


@pytest.fixture
def sign_case(scalar_problem):
    f, params, x, y = scalar_problem
    rows, new = (
        jnp.concatenate([leaf.reshape(len(side), -1) for leaf in jax.tree.leaves(output_jacobian(f, params, side))], 1)
        for side in (x, y)
    )
    kernel, kernel_test = (jnp.matmul(side, jnp.sign(rows).T, precision="highest") for side in (rows, new))
    return SignCase(scalar_problem, kernel, kernel_test, jnp.array([1.0, -1, 1, 1, -1, -1, 1]))


def test_sign_dynamics_are_sign_descent_of_the_tangent_model_on_one_example_a_step(sign_case):
    batches = [[0], [4], [4], [2], [6], [1]]
    path = sign_case.path(batches)
    for t, (train, test) in enumerate(sign_case.sign_descent(batches), 1):
        np.testing.assert_allclose(path.train[t], train, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(path.test[t], test, rtol=1e-10, atol=1e-12)


def test_sign_dynamics_of_two_examples_are_the_mean_of_their_steps_and_not_sign_descent(sign_case):
    pair = sign_case.path([[0, 4]]).train[1]
    alone = [sign_case.path([[i]]).train[1] for i in (0, 4)]
    np.testing.assert_allclose(pair, (alone[0] + alone[1]) / 2, rtol=1e-12)
    assert float(jnp.abs(pair - sign_case.sign_descent([[0, 4]])[0][0]).max()) > 1e-2


def test_sign_dynamics_count_an_example_as_often_as_it_is_drawn(sign_case):
    thrice = sign_case.path([[0, 4, 0]]).train[1]
    alone = [sign_case.path([[i]]).train[1] for i in (0, 4)]
    np.testing.assert_allclose(thrice, (2 * alone[0] + alone[1]) / 3, rtol=1e-12)


def test_sign_dynamics_take_one_output_with_an_axis_of_its_own(sign_case):
    f, params, x, _ = sign_case.problem
    path = kernel_gradient_descent(
        sign_case.kernel[:, None, :, None],
        f(params, x)[:, None],
        sign_case.signs[:, None],
        logistic,
        learning_rate=0.05,
        steps=1,
        batches=jnp.array([[3]]),
        sign=True,
    )
    np.testing.assert_allclose(path.train[1, :, 0], sign_case.path([[3]]).train[1], rtol=1e-12)


def test_masked_feature_drift_equals_dense_gradients_of_the_masked_parameters(problem, dense):
    f, params, x, _ = problem
    mask = parameter_mask(params, only=["^out$"])
    moved = {**params, "in": jax.tree.map(lambda a: 1.1 * a, params["in"])}
    part = np.concatenate(
        [np.full(p.size, keep) for keep, p in zip(*map(jax.tree.leaves, (mask, params)), strict=True)]
    )
    before, after = (dense(f, p, x)[..., part] for p in (params, moved))
    expected = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
    np.testing.assert_allclose(feature_drift(f, params, moved, x, param_mask=mask), expected, rtol=1e-7)
