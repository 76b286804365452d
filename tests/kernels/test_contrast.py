import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import (
    contrast_basis,
    contrast_logits,
    contrast_loss,
    empirical_ntk,
    kernel_gradient_descent,
    logit_difference,
)


def cross_entropy(outputs, labels):
    picked = jnp.take_along_axis(outputs, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(outputs, axis=1) - picked).mean()


LABELS = jnp.array([0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_basis_is_orthonormal_and_sums_to_zero(classes):
    q = contrast_basis(classes)
    np.testing.assert_allclose(q.T @ q, np.eye(classes - 1), atol=1e-14)
    np.testing.assert_allclose(q.sum(axis=0), 0, atol=1e-14)


def test_contrast_kernel_is_the_kernel_in_the_basis(problem):
    q = contrast_basis(3)
    g = contrast_logits(problem.f, 3)
    full = empirical_ntk(*problem)
    np.testing.assert_allclose(
        empirical_ntk(g, *problem[1:]), np.einsum("ca,ncmd,db->namb", q, full, q), rtol=1e-10, atol=1e-12
    )


def test_cross_entropy_sees_the_contrasts_alone(problem):
    f, params, x, _ = problem
    g, loss = contrast_logits(f, 3), contrast_loss(cross_entropy, 3)
    np.testing.assert_allclose(loss(g(params, x), LABELS), cross_entropy(f(params, x), LABELS), rtol=1e-12)


def test_kernel_descent_on_contrasts_is_that_on_logits(problem):
    f, params, x, _ = problem
    g, loss, q = contrast_logits(f, 3), contrast_loss(cross_entropy, 3), contrast_basis(3)
    options = {"learning_rate": 0.3, "steps": 5}
    full = kernel_gradient_descent(empirical_ntk(f, params, x), f(params, x), LABELS, cross_entropy, **options)
    small = kernel_gradient_descent(empirical_ntk(g, params, x), g(params, x), LABELS, loss, **options)
    np.testing.assert_allclose(small.train, full.train @ q, rtol=1e-10, atol=1e-12)


def test_logit_difference_has_the_loss_of_both_logits(problem):
    f, params, x, _ = problem

    def two(p, z):
        return f(p, z)[:, :2]

    u = logit_difference(two)(params, x)
    labels = jnp.minimum(LABELS, 1)
    assert u.shape == (7,)
    np.testing.assert_allclose(
        contrast_loss(cross_entropy, 2)(u, labels), cross_entropy(two(params, x), labels), rtol=1e-12
    )


def test_same_function_is_returned_for_the_same_function(problem):
    assert contrast_logits(problem.f, 3) is contrast_logits(problem.f, 3)
    assert logit_difference(problem.f) is logit_difference(problem.f)
