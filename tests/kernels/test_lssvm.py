"""The asymmetric LS-SVM against its block system and its primal problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import kernel_ridge_predict, kernel_ridge_regression, output_jacobian
from jaxft.kernels.lssvm import asymmetric_lssvm, asymmetric_lssvm_predict

LABELS = np.array([0, 1, 1, 0, 1, 0])
Y = 2.0 * LABELS - 1


@pytest.fixture
def features(x64):
    """Maps phi_s and phi_t of six training and four new points."""
    return np.random.default_rng(0).normal(size=(2, 10, 5))


@pytest.fixture
def kernels(features):
    """Of the training points, of new rows and of new columns."""
    s, t = features
    return tuple(jnp.asarray(a @ b.T) for a, b in ((s[:6], t[:6]), (s[6:], t[:6]), (s[:6], t[6:])))


@pytest.fixture
def f0(x64):
    return jnp.asarray(np.random.default_rng(1).normal(size=10))


def block_system(kernel, gamma, right):
    """Multipliers alpha and beta, from the system as it is printed."""
    k = np.asarray(kernel)
    h = Y[:, None] * k * Y[None, :]
    eye = np.eye(len(k)) * np.linalg.norm(k, 2) / gamma
    system = np.block([[eye, h], [h.T, eye]])
    return system, np.linalg.solve(system, np.concatenate([right, right]))


@pytest.mark.parametrize("gamma", [0.3, 7.0])
def test_multipliers_solve_the_block_system(kernels, f0, gamma):
    right = 1 - Y * 0.4 * np.asarray(f0[:6])
    solution = asymmetric_lssvm(kernels[0], jnp.asarray(LABELS), gamma=gamma, f0=f0[:6], f0_scale=0.4)
    system, expected = block_system(kernels[0], gamma, right)
    ours = np.concatenate([Y * np.asarray(solution.column_dual), Y * np.asarray(solution.row_dual)])
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    smallest = np.linalg.svd(system, compute_uv=False)[-1] / np.linalg.norm(kernels[0], 2)
    np.testing.assert_allclose(solution.smallest_singular_value, smallest, rtol=1e-9)
    assert int(solution.rank) == 12


@pytest.mark.parametrize("gamma", [0.3, 7.0])
def test_each_classifier_is_the_stationary_point_of_the_primal_on_its_own_features(features, kernels, f0, gamma):
    s, t = features
    g = gamma / np.linalg.norm(kernels[0], 2)
    residual = Y - np.asarray(f0[:6])

    def lagrangian(weights):
        """The objective with its errors eliminated: e = 1 - y (f0 + w phi), and y^2 = 1."""
        w, v = weights[:5], weights[5:]
        return w @ v + g / 2 * (jnp.sum((residual - s[:6] @ w) ** 2) + jnp.sum((residual - t[:6] @ v) ** 2))

    zero = jnp.zeros(10)
    w, v = np.split(-np.linalg.solve(jax.hessian(lagrangian)(zero), jax.grad(lagrangian)(zero)), 2)
    solution = asymmetric_lssvm(kernels[0], jnp.asarray(LABELS), gamma=gamma, f0=f0[:6])
    for mix in (1.0, 0.0, 0.3):
        expected = np.asarray(f0[6:]) + mix * s[6:] @ w + (1 - mix) * t[6:] @ v
        ours = asymmetric_lssvm_predict(solution, *kernels[1:], mix=mix, f0=f0[6:])
        np.testing.assert_allclose(ours, expected, rtol=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 20.0])
def test_symmetric_kernel_gives_ridge_regression_twice(features, gamma):
    """Also at a gamma of 1, where the system is singular and its solution set holds the ordinary one."""
    s = features[0]
    k, new = jnp.asarray(s[:6] @ s[:6].T), jnp.asarray(s[6:] @ s[:6].T)
    solution = asymmetric_lssvm(k, jnp.asarray(LABELS), gamma=gamma)
    np.testing.assert_allclose(solution.row_dual, solution.column_dual, rtol=1e-9)
    ridge = kernel_ridge_regression(k, jnp.asarray(Y), ridge=1 / gamma)
    ours = asymmetric_lssvm_predict(solution, new, new.T, mix=0.3)
    np.testing.assert_allclose(ours, kernel_ridge_predict(ridge, new), rtol=1e-9)
    assert int(solution.rank) == (11 if gamma == 1 else 12)


def test_singular_system_is_reported_and_solved_by_least_squares(kernels):
    singular = np.linalg.svd(kernels[0], compute_uv=False)
    gamma = float(singular[0] / singular[2])
    solution = asymmetric_lssvm(kernels[0], jnp.asarray(LABELS), gamma=gamma)
    assert int(solution.rank) == 11
    assert float(solution.smallest_singular_value) < 1e-14
    h = Y[:, None] * np.asarray(kernels[0]) * Y[None, :]
    eye = np.eye(6) * singular[2]
    expected = np.linalg.lstsq(np.block([[eye, h], [h.T, eye]]), np.ones(12), rcond=1e-10)[0]
    ours = np.concatenate([Y * np.asarray(solution.column_dual), Y * np.asarray(solution.row_dual)])
    np.testing.assert_allclose(ours, expected, rtol=1e-7)


def test_scaling_the_kernel_changes_no_prediction(kernels):
    plain, scaled = (
        asymmetric_lssvm_predict(
            asymmetric_lssvm(c * kernels[0], jnp.asarray(LABELS), gamma=0.5), c * kernels[1], c * kernels[2]
        )
        for c in (1.0, 1e4)
    )
    np.testing.assert_allclose(scaled, plain, rtol=1e-10)


def test_transposing_the_kernel_swaps_the_classifiers(kernels):
    ours = asymmetric_lssvm(kernels[0], jnp.asarray(LABELS), gamma=0.5)
    swapped = asymmetric_lssvm(kernels[0].T, jnp.asarray(LABELS), gamma=0.5)
    np.testing.assert_allclose(swapped.row_dual, ours.column_dual, rtol=1e-10)
    np.testing.assert_allclose(swapped.column_dual, ours.row_dual, rtol=1e-10)


def test_asymmetric_sign_kernel_of_a_network_separates_its_training_points(scalar_problem):
    """Rows are gradients, columns their signs: the row classifier moves parameters along signs of gradients."""
    f, params, x, _ = scalar_problem
    j = jnp.concatenate([leaf.reshape(7, -1) for leaf in jax.tree.leaves(output_jacobian(f, params, x))], axis=1)
    kernel, labels = jnp.matmul(j, jnp.sign(j).T), jnp.array([0, 1, 0, 0, 1, 1, 0])
    solution = asymmetric_lssvm(kernel, labels, gamma=1e6)
    for mix in (0.0, 1.0):
        predicted = asymmetric_lssvm_predict(solution, kernel, kernel, mix=mix)
        np.testing.assert_allclose(predicted, 2 * np.asarray(labels) - 1.0, atol=1e-2)
    moved = jnp.matmul(jnp.sign(j).T, solution.row_dual)
    np.testing.assert_allclose(jnp.matmul(j, moved), jnp.matmul(kernel, solution.row_dual), rtol=1e-9)


def test_jit_and_vmap_equal_plain_calls(kernels, f0):
    labels = jnp.stack([jnp.asarray(LABELS), jnp.asarray(LABELS[::-1])])

    def predict(one):
        solution = asymmetric_lssvm(kernels[0], one, gamma=0.5, f0=f0[:6])
        return asymmetric_lssvm_predict(solution, *kernels[1:], f0=f0[6:])

    mapped = jax.jit(jax.vmap(predict))(labels)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], predict(labels[i]), rtol=1e-10)


def test_float32_agrees_with_float64(kernels):
    small = [k.astype(jnp.float32) for k in kernels]
    ours = asymmetric_lssvm_predict(asymmetric_lssvm(small[0], jnp.asarray(LABELS), gamma=0.5), *small[1:])
    exact = asymmetric_lssvm_predict(asymmetric_lssvm(kernels[0], jnp.asarray(LABELS), gamma=0.5), *kernels[1:])
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)
