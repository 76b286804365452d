"""Simplexes against the Cayley-Menger determinant, known volumes, and gradients by autodiff."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import kstest

from jaxft.geometry import simplexes
from jaxft.geometry.paths import stack_points
from jaxft.geometry.simplexes import (
    fit_simplex,
    log_volume,
    sample_simplex,
    simplex_ensemble,
    simplex_point,
    simplex_weights,
)


def tree(rows, dtype=jnp.float32):
    k, j = jax.random.split(jax.random.key(7))
    return {"w": jax.random.normal(k, (rows, 3, 2), dtype), "b": jax.random.normal(j, (rows, 4), dtype)}


def flat(vertices):
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(vertices)], axis=1)


def cayley_menger(points):
    """log of the volume from distances alone."""
    k = len(points) - 1
    square = ((points[:, None] - points[None]) ** 2).sum(-1)
    bordered = np.ones((k + 2, k + 2))
    bordered[0, 0], bordered[1:, 1:] = 0, square
    return 0.5 * np.log(abs(np.linalg.det(bordered)) / 2**k / math.factorial(k) ** 2)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_volume_is_that_of_cayley_and_menger_and_a_segment_its_length(x64, rows):
    vertices = tree(rows, jnp.float64)
    np.testing.assert_allclose(log_volume(vertices), cayley_menger(flat(vertices)), rtol=1e-10)
    if rows == 2:
        np.testing.assert_allclose(jnp.exp(log_volume(vertices)), np.linalg.norm(np.diff(flat(vertices), axis=0)))


def test_volume_survives_sizes_at_which_determinants_overflow():
    vertices = tree(5)
    for scale in (1e-12, 1e12):
        scaled = jax.tree.map(lambda x, s=scale: s * x, vertices)
        np.testing.assert_allclose(log_volume(scaled), log_volume(vertices) + 4 * math.log(scale), rtol=1e-5)


def test_flat_simplex_has_no_volume_and_a_point_has_one():
    assert float(log_volume({"w": jnp.array([[0.0, 1.0], [2.0, 2.0], [0.0, 1.0]])})) == -math.inf
    assert float(log_volume({"w": jnp.ones((1, 3))})) == 0


def test_points_are_weighted_sums_and_vertices_exact():
    vertices = tree(3)
    weights = np.array([0.2, 0.5, 0.3], np.float32)
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda x: x[None], simplex_point(vertices, weights)))[0], weights @ flat(vertices), rtol=1e-5
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[1]), simplex_point(vertices, jnp.eye(3)[1]), vertices)


def test_weights_are_uniform_on_the_simplex():
    weights = np.asarray(simplex_weights(4, key=jax.random.key(0), n=4000), float)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    for column in weights.T:
        assert kstest(column, "beta", args=(1, 3)).pvalue > 1e-3
    # Largest weight of four: P(max <= x) = sum_j (-1)^j C(4, j) (1 - j x)_+^3.
    largest = lambda x: sum((-1) ** j * math.comb(4, j) * np.maximum(1 - j * x, 0) ** 3 for j in range(5))  # noqa: E731
    assert kstest(weights.max(axis=1), largest).pvalue > 1e-3


def test_samples_are_points_of_the_simplex():
    samples = sample_simplex({"w": jnp.eye(3)}, key=jax.random.key(0), n=5)["w"]
    np.testing.assert_array_equal(samples, simplex_weights(3, key=jax.random.key(0), n=5))


def test_gradient_of_the_sampled_loss_is_that_of_autodiff(x64):
    vertices, new = tree(2, jnp.float64), jax.tree.map(lambda x: x[2], tree(3, jnp.float64))
    weights = simplex_weights(3, key=jax.random.key(1), n=4)
    faces = jnp.tile(jnp.array([[0, 1]]), (4, 1))

    def loss_fn(params, x):
        return (jnp.tanh(x @ params["w"]) ** 2).sum() + (params["b"] ** 3).sum()

    def direct(new):
        corners = jax.tree.map(lambda x, v: jnp.concatenate([x, v[None]]), vertices, new)
        return jnp.stack([loss_fn(simplex_point(corners, w), jnp.ones((2, 3))) for w in weights]).mean()

    found = simplexes._sampled_loss(loss_fn, vertices, new, jnp.ones((2, 3)), weights, faces)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), found, jax.value_and_grad(direct)(new))


def ring(params, batch):
    """Lowest at distance 1 from the origin in the first two coordinates, and where the others are 0."""
    w = params["w"]
    return (w[0] ** 2 + w[1] ** 2 - batch.mean()) ** 2 + 0.1 * (w[2:] ** 2).sum()


@functools.cache
def fitted(weight):
    vertices = stack_points([{"w": jnp.array([1.0, 0.0, 0.0])}, {"w": jnp.array([0.0, 1.0, 0.0])}])
    return vertices, fit_simplex(
        ring,
        vertices,
        jnp.ones((2, 3)),
        tx=optax.adam(0.03),
        steps=150,
        key=jax.random.key(0),
        log_volume_weight=weight,
        samples=6,
    )


def test_trained_vertex_keeps_the_others_and_larger_weights_make_larger_simplexes():
    vertices, small = fitted(1e-4)
    _, large = fitted(0.1)
    np.testing.assert_array_equal(small.vertices["w"][:2], vertices["w"])
    assert float(log_volume(small.vertices)) < float(log_volume(large.vertices))
    assert float(large.log_volumes[-1]) > float(large.log_volumes[0])
    assert small.losses.shape == (150,)


def test_a_dict_of_values_is_fitted_by_its_loss():
    vertices, options = {"w": jnp.eye(2)}, {"tx": optax.sgd(0.1), "steps": 2, "key": jax.random.key(0)}

    def loss(params, batch):
        return jnp.sum((params["w"] - batch) ** 2)

    alone = fit_simplex(loss, vertices, jnp.zeros((1, 2)), **options)
    named = fit_simplex(lambda p, x: {"loss": loss(p, x), "other": p["w"][0]}, vertices, jnp.zeros((1, 2)), **options)
    assert bool((alone.vertices["w"] == named.vertices["w"]).all())


def test_two_segments_that_meet_in_the_new_vertex_go_round_a_barrier():
    ends = stack_points([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 0.0])}])
    found = fit_simplex(
        ring,
        ends,
        jnp.ones((1, 3)),
        tx=optax.adam(0.05),
        steps=200,
        key=jax.random.key(3),
        faces=((0,), (1,)),
        samples=8,
        init={"w": jnp.array([0.0, 0.3])},
    )
    line = max(float(ring({"w": jnp.array([x, 0.0])}, jnp.ones(3))) for x in (-0.5, 0.0, 0.5))
    mid = [jax.tree.map(lambda x, i=i: (x[i] + x[2]) / 2, found.vertices) for i in (0, 1)]
    assert line == 1
    assert max(float(ring(p, jnp.ones(3))) for p in mid) < 0.3
    lengths = [np.linalg.norm(found.vertices["w"][i] - found.vertices["w"][2]) for i in (0, 1)]
    assert float(found.log_volumes[-1]) == pytest.approx(math.log(np.mean(lengths)), abs=0.1)


def test_ensemble_is_the_mean_of_probabilities_over_the_samples():
    vertices = tree(3)
    f = lambda p, x: x @ p["w"]  # noqa: E731
    x = jnp.ones((2, 3))
    samples = sample_simplex(vertices, key=jax.random.key(2), n=5)
    expected = jax.nn.softmax(jax.vmap(f, (0, None))(samples, x), axis=-1).mean(axis=0)
    found = jnp.exp(simplex_ensemble(f, vertices, x, key=jax.random.key(2), samples=5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
