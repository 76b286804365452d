import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.sparse.linalg import cg

from jaxft.kernels import empirical_ntk, ntk_vector_product, parameter_mask


@pytest.fixture
def v(problem):
    return jnp.asarray(np.random.default_rng(7).normal(size=(5, 3)))


@pytest.mark.parametrize("block_size", [None, 1, 2, 100])
def test_product_equals_kernel_times_vector(problem, v, block_size):
    expected = jnp.tensordot(empirical_ntk(*problem), v, axes=2)
    f, params, x, y = problem
    ours = ntk_vector_product(f, params, x, v, y, block_size=block_size)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)


def test_preconditioned_masked_product_equals_kernel_times_vector(problem, v, preconditioner):
    f, params, x, y = problem
    options = {"preconditioner": preconditioner, "param_mask": parameter_mask(params, without=["^out"])}
    expected = jnp.tensordot(empirical_ntk(*problem, kernel="preconditioned", **options), v, axes=2)
    ours = jax.jit(lambda u: ntk_vector_product(f, params, x, u, y, block_size=2, **options))(v)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)


def test_scalar_outputs_give_one_axis(scalar_problem):
    f, params, x, _ = scalar_problem
    ours = ntk_vector_product(f, params, x, jnp.arange(7.0), block_size=3)
    np.testing.assert_allclose(ours, empirical_ntk(f, params, x) @ jnp.arange(7.0), rtol=1e-11)


def test_product_is_symmetric(problem):
    f, params, x, _ = problem
    u, w = (jnp.asarray(np.random.default_rng(seed).normal(size=(7, 3))) for seed in (1, 2))
    left, right = (jnp.vdot(a, ntk_vector_product(f, params, x, b)) for a, b in ((u, w), (w, u)))
    np.testing.assert_allclose(left, right, rtol=1e-12)


def test_conjugate_gradients_solve_the_ridge_regression(problem):
    f, params, x, _ = problem
    targets = f(params, x)[::-1]
    solved, _ = cg(lambda u: ntk_vector_product(f, params, x, u) + u, targets, tol=1e-12)
    dense = np.linalg.solve(np.asarray(empirical_ntk(f, params, x)).reshape(21, 21) + np.eye(21), targets.ravel())
    np.testing.assert_allclose(solved.ravel(), dense, rtol=1e-8, atol=1e-9)
