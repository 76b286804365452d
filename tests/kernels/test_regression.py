import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import empirical_ntk, kernel_ridge_predict, kernel_ridge_regression


@pytest.fixture
def kernels(problem):
    f, params, x, y = problem
    return empirical_ntk(f, params, x), empirical_ntk(f, params, y, x)


@pytest.fixture
def targets(x64):
    return jnp.asarray(np.random.default_rng(2).normal(size=(7, 3)))


def test_solution_equals_dense_solve(kernels, targets):
    ridge = 0.1
    flat = np.asarray(kernels[0].reshape(21, 21))
    dense = np.linalg.solve(flat + ridge * np.linalg.norm(flat, 2) * np.eye(21), np.asarray(targets).ravel())
    solution = kernel_ridge_regression(kernels[0], targets, ridge=ridge)
    np.testing.assert_allclose(solution.dual.ravel(), dense, rtol=1e-9)
    expected = np.asarray(kernels[1].reshape(15, 21)) @ dense
    np.testing.assert_allclose(kernel_ridge_predict(solution, kernels[1]).ravel(), expected, rtol=1e-9)


def test_training_targets_are_reached_without_ridge(kernels, targets):
    f0 = 0.3 * targets[::-1]
    for scale in (1.0, 0.5):
        solution = kernel_ridge_regression(kernels[0], targets, f0=f0, f0_scale=scale)
        np.testing.assert_allclose(kernel_ridge_predict(solution, kernels[0], f0), targets, rtol=1e-7, atol=1e-8)


def test_initial_outputs_shift_the_prediction_as_in_parameter_space(problem, kernels, targets):
    """The prediction is the minimum-norm parameter change of the tangent model."""
    f, params, x, y = problem
    f0, f0_y = f(params, x), f(params, y)
    solution = kernel_ridge_regression(kernels[0], targets, f0=f0)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacobian(lambda p: f(unravel(p), x).ravel())(flat)
    change = np.linalg.lstsq(jacobian, (targets - f0).ravel(), rcond=None)[0]
    moved = f0_y + jax.jvp(lambda p: f(unravel(p), y), (flat,), (jnp.asarray(change),))[1]
    np.testing.assert_allclose(kernel_ridge_predict(solution, kernels[1], f0_y), moved, rtol=1e-6, atol=1e-8)


def test_rank_of_a_singular_kernel_is_reported_and_solved_by_least_squares(x64):
    j = np.random.default_rng(3).normal(size=(6, 2))
    targets = jnp.arange(6.0)
    solution = kernel_ridge_regression(jnp.asarray(j @ j.T), targets)
    assert int(solution.rank) == 2
    projected = j @ np.linalg.lstsq(j, np.arange(6.0), rcond=None)[0]
    np.testing.assert_allclose(kernel_ridge_predict(solution, jnp.asarray(j @ j.T)), projected, rtol=1e-9, atol=1e-9)


def test_scalar_kernel_solves_each_output_alone(x64):
    k = jnp.asarray(np.diag([1.0, 2.0, 4.0]))
    targets = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2)))
    both = kernel_ridge_regression(k, targets, ridge=0.2).dual
    for c in range(2):
        np.testing.assert_allclose(both[:, c], kernel_ridge_regression(k, targets[:, c], ridge=0.2).dual, rtol=1e-12)


def test_shared_kernel_equals_full_kernel_with_identity_outputs(x64):
    base = np.random.default_rng(5).normal(size=(4, 6))
    k = jnp.asarray(base @ base.T)
    full = jnp.einsum("nm,cd->ncmd", k, jnp.eye(3))
    targets = jnp.asarray(np.random.default_rng(6).normal(size=(4, 3)))
    ours = kernel_ridge_regression(full, targets, ridge=0.1).dual
    np.testing.assert_allclose(ours, kernel_ridge_regression(k, targets, ridge=0.1).dual, rtol=1e-9)
    new = jnp.asarray(np.random.default_rng(7).normal(size=(2, 4)))
    shared = kernel_ridge_predict(kernel_ridge_regression(k, targets, ridge=0.1), new)
    assert shared.shape == (2, 3)


def test_larger_ridge_shrinks_and_jit_agrees(kernels, targets):
    solve = jax.jit(lambda k, y: kernel_ridge_regression(k, y, ridge=1.0).dual)
    np.testing.assert_allclose(solve(kernels[0], targets), kernel_ridge_regression(kernels[0], targets, ridge=1.0).dual)
    sizes = [
        float(jnp.linalg.norm(kernel_ridge_regression(kernels[0], targets, ridge=r).dual)) for r in (0.01, 0.1, 1.0)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_regression_and_prediction_run_under_jit_and_vmap(kernels, targets):
    """The solution may be traced, and a kernel may be a constant of the traced function."""
    f0 = 0.3 * targets

    def predicted(t, k):
        return kernel_ridge_predict(kernel_ridge_regression(k, t, ridge=0.1, f0=f0), kernels[1], f0[:5])

    plain = predicted(targets, kernels[0])
    np.testing.assert_allclose(jax.jit(predicted)(targets, kernels[0]), plain, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(lambda t: predicted(t, kernels[0]))(targets), plain, rtol=1e-9)
    solved = jax.jit(lambda t: kernel_ridge_regression(kernels[0], t, ridge=0.1, f0=f0))(targets)
    np.testing.assert_allclose(kernel_ridge_predict(solved, kernels[1], f0[:5]), plain, rtol=1e-9)
    two = jax.vmap(predicted, (0, None))(jnp.stack([targets, 2 * targets]), kernels[0])
    np.testing.assert_allclose(two[0], plain, rtol=1e-9)


def test_integer_targets_keep_the_initial_outputs():
    """A factor of 0.1 must not be rounded to the type of the targets."""
    k, f0 = jnp.eye(2), jnp.array([0.5, 0.5])
    ours = kernel_ridge_regression(k, jnp.array([1, -1]), f0=f0, f0_scale=0.1).dual
    np.testing.assert_allclose(ours, [0.95, -1.05], rtol=1e-6)
