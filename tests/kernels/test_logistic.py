"""Kernel logistic regression against optimisation over the explicit parameters of a linear model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxft.kernels.logistic import kernel_logistic_predict, kernel_logistic_regression

RIDGE = 0.05


class Case(NamedTuple):
    """A kernel with its features: outputs are ``features @ weights``, flattened (example, output)."""

    kernel: jax.Array
    new_kernel: jax.Array
    features: np.ndarray
    new_features: np.ndarray
    labels: jax.Array
    f0: jax.Array
    new_f0: jax.Array
    classes: int | None


@pytest.fixture(params=["one output", "shared", "full"])
def case(request, x64):
    draw = np.random.default_rng(0).normal
    n, m, c, r = 6, 4, 3, 9
    if request.param == "full":
        features, new = draw(size=(n, c, r)), draw(size=(m, c, r))
        kernels = [jnp.asarray(np.einsum("ncr,mdr->ncmd", side, features)) for side in (features, new)]
        flat = features.reshape(n * c, r), new.reshape(m * c, r)
        classes = None
    else:
        features, new = draw(size=(n, r)), draw(size=(m, r))
        kernels = [jnp.asarray(side @ features.T) for side in (features, new)]
        c, classes = (1, None) if request.param == "one output" else (3, 3)
        flat = np.kron(features, np.eye(c)), np.kron(new, np.eye(c))
    labels = jnp.array([0, 1, 1, 0, 1, 0] if c == 1 else [0, 1, 2, 2, 1, 0])
    f0, new_f0 = (jnp.asarray(draw(size=(k,) if c == 1 else (k, c))) for k in (n, m))
    return Case(kernels[0], kernels[1], flat[0], flat[1], labels, f0, new_f0, classes)


def solve(case, **options):
    options = {"ridge": RIDGE, "f0": case.f0, "f0_scale": 0.7} | options
    return kernel_logistic_regression(case.kernel, case.labels, classes=case.classes, **options)


def lam(case, ridge=RIDGE):
    size = int(np.sqrt(case.kernel.size))
    return ridge * np.linalg.norm(np.asarray(case.kernel).reshape(size, size), 2)


def derivative(outputs, labels):
    """Of each example's loss by its outputs."""
    if outputs.ndim == 1:
        return jax.nn.sigmoid(outputs) - labels.astype(outputs.dtype)
    return jax.nn.softmax(outputs) - jax.nn.one_hot(labels, outputs.shape[1])


def weights_by_quasi_newton(case):
    labels, f0 = np.asarray(case.labels), 0.7 * np.asarray(case.f0)

    def objective(w):
        f = f0 + (case.features @ w).reshape(f0.shape)
        logits = np.stack([np.zeros_like(f), f], axis=1) if f.ndim == 1 else f
        loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(f)), labels]
        chi = np.asarray(derivative(jnp.asarray(f), case.labels)).ravel()
        return loss.sum() + lam(case) / 2 * w @ w, case.features.T @ chi + lam(case) * w

    start = np.zeros(case.features.shape[1])
    return minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x


def test_prediction_equals_the_linear_model_on_explicit_features(case):
    solution = solve(case)
    assert bool(solution.converged)
    assert int(solution.iterations) < 15
    w = weights_by_quasi_newton(case)
    for kernel, features, f0 in (
        (case.kernel, case.features, case.f0),
        (case.new_kernel, case.new_features, case.new_f0),
    ):
        expected = 0.7 * np.asarray(f0) + (features @ w).reshape(f0.shape)
        np.testing.assert_allclose(kernel_logistic_predict(solution, kernel, f0), expected, rtol=1e-6, atol=1e-7)


def test_dual_satisfies_the_representer_equation(case):
    solution = solve(case)
    chi = derivative(kernel_logistic_predict(solution, case.kernel, case.f0), case.labels)
    want = -np.asarray(chi).ravel() / lam(case)
    basis = np.linalg.svd(case.features, full_matrices=False)[0][:, : np.linalg.matrix_rank(case.features)]
    np.testing.assert_allclose(np.asarray(solution.dual).ravel(), basis @ (basis.T @ want), rtol=1e-8, atol=1e-10)


def test_scaling_the_kernel_changes_no_prediction(case):
    scaled = case._replace(kernel=1e4 * case.kernel)
    ours = kernel_logistic_predict(solve(scaled), 1e4 * case.new_kernel, case.new_f0)
    np.testing.assert_allclose(ours, kernel_logistic_predict(solve(case), case.new_kernel, case.new_f0), rtol=1e-9)


@pytest.mark.parametrize("ridge", [1e-6, 1e4])
def test_iteration_converges_at_extreme_ridges_from_outputs_that_are_far_off(case, ridge):
    solution = solve(case, ridge=ridge, f0=40 * case.f0)
    assert bool(solution.converged)
    f = kernel_logistic_predict(solution, case.kernel, 40 * case.f0)
    chi = np.asarray(derivative(f, case.labels)).ravel()
    gradient = case.features.T @ chi + lam(case, ridge) * (case.features.T @ np.asarray(solution.dual).ravel())
    assert np.linalg.norm(gradient) < 1e-8 * np.linalg.norm(case.features, 2)


def test_two_softmax_outputs_of_one_kernel_are_one_output_at_twice_the_ridge(x64):
    """The softmax spreads u over f_1 = u / 2 and f_0 = -u / 2, whose squared norms add to half that of u."""
    base = np.random.default_rng(1).normal(size=(5, 4))
    k, labels = jnp.asarray(base @ base.T), jnp.array([0, 1, 1, 0, 1])
    one = kernel_logistic_predict(kernel_logistic_regression(k, labels, ridge=0.1), k)
    two = kernel_logistic_predict(kernel_logistic_regression(k, labels, ridge=0.2, classes=2), k)
    np.testing.assert_allclose(two[:, 1] - two[:, 0], one, rtol=1e-8)
    np.testing.assert_allclose(two.sum(axis=1), np.zeros(5), atol=1e-10)


def test_rank_counts_the_eigenvalues_above_the_cutoff(x64):
    k, labels = jnp.diag(jnp.array([1.0, 0.5, 1e-3, 0.0])), jnp.array([0, 1, 0, 1])
    assert int(kernel_logistic_regression(k, labels, ridge=0.1).rank) == 3
    cut = kernel_logistic_regression(k, labels, ridge=0.1, cutoff=0.01)
    assert int(cut.rank) == 2
    np.testing.assert_array_equal(cut.dual[2:], [0, 0])


def test_iterations_are_bounded_and_the_failure_is_reported(case):
    stopped = solve(case, max_iterations=1)
    assert int(stopped.iterations) == 1
    assert not bool(stopped.converged)
    assert float(stopped.gradient_norm) > 1e-6


def test_ridge_beyond_the_precision_is_reported_and_gives_no_nan():
    """A common shift of all logits has no curvature but the ridge."""
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(40, 10)) * np.exp(-np.arange(10) / 5)
    k, f0 = (jnp.asarray(a, jnp.float32) for a in (phi @ phi.T, 10 * rng.normal(size=(40, 3))))
    labels = jnp.asarray(rng.integers(0, 3, 40))
    solution = kernel_logistic_regression(k, labels, ridge=1e-12, classes=3, f0=f0)
    assert not bool(solution.converged)
    assert bool(jnp.isfinite(solution.dual).all())


def test_zero_kernel_gives_zero(x64):
    solution = kernel_logistic_regression(jnp.zeros((2, 2)), jnp.array([0, 1]), ridge=0.1)
    np.testing.assert_array_equal(solution.dual, [0, 0])
    assert int(solution.rank) == 0
    assert bool(solution.converged)


def test_jit_and_vmap_equal_plain_calls(case):
    two = jnp.stack([case.labels, (case.labels + 1) % 2])

    def fit(labels):
        return kernel_logistic_regression(case.kernel, labels, ridge=RIDGE, classes=case.classes, f0=case.f0)

    mapped = jax.jit(jax.vmap(fit))(two)
    predicted = jax.jit(jax.vmap(lambda s: kernel_logistic_predict(s, case.new_kernel, case.new_f0)))(mapped)
    for i in range(2):
        plain = kernel_logistic_predict(fit(two[i]), case.new_kernel, case.new_f0)
        np.testing.assert_allclose(predicted[i], plain, rtol=1e-9, atol=1e-11)


def test_float32_converges_to_the_float64_solution():
    draw = np.random.default_rng(2).normal(size=(5, 3))
    k, labels = jnp.asarray(draw @ draw.T, jnp.float32), jnp.array([0, 1, 1, 0, 1])
    ours = kernel_logistic_regression(k, labels, ridge=1e-3)
    assert ours.dual.dtype == jnp.float32
    assert bool(ours.converged)
    with jax.enable_x64(True):
        exact = kernel_logistic_regression(jnp.asarray(draw @ draw.T), labels, ridge=1e-3)
        expected = kernel_logistic_predict(exact, jnp.asarray(draw @ draw.T))
    np.testing.assert_allclose(kernel_logistic_predict(ours, k), expected, rtol=1e-3, atol=1e-3)
