import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.train import OBJECTIVES, accuracy, cross_entropy, masked_cross_entropy, mse

RNG = np.random.default_rng(1)
LOGITS = RNG.normal(size=(6, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0, 2], np.int32)
SCALAR = RNG.normal(size=6).astype(np.float32)
BINARY = np.array([0, 1, 1, 0, 1, 0], np.int32)


def test_cross_entropy_equals_mean_log_probability():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    expected = -np.mean([np.log(p[k, LABELS[k]]) for k in range(6)])
    np.testing.assert_allclose(cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-6)


def test_scalar_cross_entropy_equals_logistic_loss():
    y = 2 * BINARY - 1
    expected = np.log1p(np.exp(-y * SCALAR)).mean()
    np.testing.assert_allclose(cross_entropy(jnp.asarray(SCALAR), jnp.asarray(BINARY)), expected, rtol=1e-6)


def test_scalar_cross_entropy_equals_two_logits_with_that_difference():
    two = jnp.stack([jnp.zeros(6), jnp.asarray(SCALAR)], axis=1) + 0.7
    scalar = cross_entropy(jnp.asarray(SCALAR), jnp.asarray(BINARY))
    np.testing.assert_allclose(scalar, cross_entropy(two, jnp.asarray(BINARY)), rtol=1e-6)


def test_mse_equals_numpy_sum_over_classes():
    expected = np.mean([0.5 * ((LOGITS[k] - np.eye(3)[LABELS[k]]) ** 2).sum() for k in range(6)])
    np.testing.assert_allclose(mse(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-6)
    expected = np.mean(0.5 * (SCALAR - (2 * BINARY - 1)) ** 2)
    np.testing.assert_allclose(mse(jnp.asarray(SCALAR), jnp.asarray(BINARY)), expected, rtol=1e-6)


def test_output_derivatives_are_softmax_or_output_minus_target():
    onehot = np.eye(3)[LABELS]
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    for name, chi in [("cross_entropy", p - onehot), ("mse", LOGITS - onehot)]:
        grads = jax.grad(OBJECTIVES[name])(jnp.asarray(LOGITS), jnp.asarray(LABELS))
        np.testing.assert_allclose(6 * grads, chi, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objective_keeps_double_precision_and_the_value_under_jit(name, x64):
    logits, labels = jnp.asarray(LOGITS, jnp.float64), jnp.asarray(LABELS)
    value = OBJECTIVES[name](logits, labels)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(jax.jit(OBJECTIVES[name])(logits, labels), value, rtol=1e-14)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_labels_may_be_closed_over_by_jit(name):
    logits, labels = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    closed = jax.jit(lambda u: OBJECTIVES[name](u, labels))(logits)
    np.testing.assert_allclose(closed, OBJECTIVES[name](logits, labels), rtol=1e-6)


def test_cross_entropy_is_finite_at_extreme_logits():
    logits, labels = jnp.array([[1e4, -1e4]]), jnp.array([1])
    value, grads = jax.value_and_grad(cross_entropy)(logits, labels)
    assert float(value) == 2e4
    assert grads.tolist() == [[1.0, -1.0]]


def test_accuracy_counts_agreements():
    expected = np.mean(LOGITS.argmax(1) == LABELS)
    np.testing.assert_allclose(accuracy(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-6)
    expected = np.mean((SCALAR > 0) == BINARY)
    np.testing.assert_allclose(accuracy(jnp.asarray(SCALAR), jnp.asarray(BINARY)), expected, rtol=1e-6)


def test_masked_cross_entropy_averages_over_labelled_positions():
    logits, labels = RNG.normal(size=(2, 3, 5)), np.array([[4, -1, 0], [-1, -1, 2]])
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.mean([log_p[0, 0, 4], log_p[0, 2, 0], log_p[1, 2, 2]])
    measured = masked_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(measured, expected, rtol=1e-6)
