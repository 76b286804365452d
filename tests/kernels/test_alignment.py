"""Alignment against explicit centred features and dense centring matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import empirical_ntk, kernel_alignment, label_complexity

LABELS = np.array([0, 1, 2, 2, 1, 0, 0])
ONE_HOT = np.eye(3)[LABELS]


@pytest.fixture
def features(x64):
    return np.random.default_rng(0).normal(size=(7, 3, 4)) + 2.0


def cosine(a, b):
    return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())


@pytest.mark.parametrize("centered", [True, False])
def test_alignment_equals_dense_centring(features, centered):
    phi = features[:, 0]
    middle = np.eye(7) - centered * np.ones((7, 7)) / 7
    expected = cosine(middle @ phi @ phi.T @ middle, middle @ ONE_HOT @ ONE_HOT.T @ middle)
    ours = kernel_alignment(jnp.asarray(phi @ phi.T), jnp.asarray(LABELS), centered=centered)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("centered", [True, False])
def test_alignment_of_a_full_kernel_equals_centred_features(features, centered):
    kernel = jnp.asarray(np.einsum("ncr,mdr->ncmd", features, features))
    phi = (features - centered * features.mean(axis=0)).reshape(21, 4)
    y = (ONE_HOT - centered * ONE_HOT.mean(axis=0)).ravel()
    expected = y @ phi @ phi.T @ y / (np.linalg.norm(phi @ phi.T) * y @ y)
    np.testing.assert_allclose(kernel_alignment(kernel, jnp.asarray(LABELS), centered=centered), expected, rtol=1e-12)
    ours = kernel_alignment(kernel, jnp.asarray(ONE_HOT), centered=centered)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_kernel_of_the_labels_is_aligned_and_scale_and_offset_do_not_matter(x64):
    shifted = 3 * (ONE_HOT + np.array([[5.0, -1.0, 2.0]]))
    k = jnp.asarray(shifted @ shifted.T)
    np.testing.assert_allclose(kernel_alignment(k, jnp.asarray(LABELS)), 1, rtol=1e-10)
    assert float(kernel_alignment(k, jnp.asarray(LABELS), centered=False)) < 0.99


def test_binary_one_hot_and_signs_agree_only_when_centred(features):
    k, labels = jnp.asarray(features[:, 0] @ features[:, 0].T), LABELS % 2
    signs = jnp.asarray(2.0 * labels - 1)
    ints = kernel_alignment(k, jnp.asarray(labels))
    np.testing.assert_allclose(kernel_alignment(k, signs), ints, rtol=1e-12)
    np.testing.assert_allclose(kernel_alignment(k, signs[:, None]), ints, rtol=1e-12)
    gap = kernel_alignment(k, signs, centered=False) - kernel_alignment(k, jnp.asarray(labels), centered=False)
    assert abs(float(gap)) > 0.1


def test_full_kernel_tells_outputs_apart(x64):
    """Swapping two outputs of the kernel leaves the same-class kernel as it is, but not this alignment."""
    y = ONE_HOT - ONE_HOT.mean(axis=0)
    right = jnp.asarray(np.einsum("nc,md->ncmd", y, y))
    wrong = right[:, ::-1][:, :, :, ::-1]
    np.testing.assert_allclose(kernel_alignment(right, jnp.asarray(LABELS)), 1, rtol=1e-12)
    assert float(kernel_alignment(wrong, jnp.asarray(LABELS))) < 0.5


def test_jit_vmap_and_float32_agree(features):
    k = jnp.asarray(features[:, 0] @ features[:, 0].T)
    labels = jnp.stack([jnp.asarray(LABELS), jnp.asarray(LABELS[::-1])])
    mapped = jax.jit(jax.vmap(lambda y: kernel_alignment(k, y)))(labels)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], kernel_alignment(k, labels[i]), rtol=1e-12)
        np.testing.assert_allclose(kernel_alignment(k.astype(jnp.float32), labels[i]), mapped[i], rtol=1e-4)


def test_complexity_equals_the_dense_quadratic_form(problem):
    labels = jnp.array([0, 1, 2, 0, 1, 2, 0])
    kernel = empirical_ntk(problem.f, problem.params, problem.x)
    flat = np.asarray(kernel).reshape(21, 21)
    y = np.eye(3)[np.asarray(labels)]
    y = (y - y.mean(axis=0)).ravel()
    inverse = np.linalg.inv(flat + 1e-3 * np.linalg.norm(flat, 2) * np.eye(21))
    expected = np.sqrt(y @ inverse @ y * np.trace(flat) / 21) / np.linalg.norm(y)
    np.testing.assert_allclose(label_complexity(kernel, labels), expected, rtol=1e-8)
    np.testing.assert_allclose(label_complexity(7 * kernel, labels), expected, rtol=1e-8)


def test_complexity_of_a_shared_kernel_does_not_depend_on_the_names_of_the_classes(x64):
    base = np.random.default_rng(0).normal(size=(6, 4))
    kernel = jnp.asarray(base @ base.T)
    a, b = (label_complexity(kernel, jnp.array(labels)) for labels in ([0, 1, 1, 0, 2, 0], [7, 90, 90, 7, 3, 7]))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    full = jnp.einsum("nm,cd->ncmd", kernel, jnp.eye(3))
    np.testing.assert_allclose(a, label_complexity(full, jnp.array([0, 1, 1, 0, 2, 0])), rtol=1e-10)
