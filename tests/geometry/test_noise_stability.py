"""Noise stability: every quantity against its definition, and what it does not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.units import UnitAxis, make_permutation_spec
from jaxft.geometry.noise_stability import chain_weights, noise_stability

WIDTHS = (4, 12, 8, 3)
KEY = jax.random.key(0)


@pytest.fixture
def weights(x64):
    draw = np.random.default_rng(0)
    return [jnp.asarray(draw.normal(size=(i, o)) * np.sqrt(2 / i)) for i, o in itertools.pairwise(WIDTHS)]


@pytest.fixture
def x(x64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTHS[0])))


def upper(weights, i, z):
    """Preactivations of the layers above, from those of layer i."""
    found = []
    for w in weights[i + 1 :]:
        z = jax.nn.relu(z) @ w
        found.append(z)
    return found


def by_definition(weights, x):
    """Cushions by example, from Jacobians that JAX differentiates."""
    norm, cushions, between, c, spread = np.linalg.norm, [], [], [], []
    for example in x:
        pre = [example @ weights[0], *upper(weights, 0, example @ weights[0])]
        act = [example, *map(jax.nn.relu, pre[:-1])]
        cushions.append([norm(p) / (norm(w) * norm(a)) for p, w, a in zip(pre, weights, act, strict=True)])
        row = np.full((3, 3), np.inf)
        np.fill_diagonal(row, 1)
        for i in range(2):
            jacobians = jax.jacobian(lambda z, i=i: upper(weights, i, z))(pre[i])
            for j, jacobian in enumerate(jacobians, i + 1):
                np.testing.assert_allclose(jacobian @ pre[i], pre[j], rtol=1e-10)
                row[i, j] = norm(pre[j]) / (norm(jacobian, 2) * norm(pre[i]))
        between.append(row)
        c.append(max(norm(p) / norm(a) for p, a in zip(pre[:-1], act[1:], strict=True)))
        spread.append(max(a.max() * np.sqrt(a.size) / norm(a) for a in act[1:]))
    return np.min(cushions, axis=0), np.min(between, axis=0), max(c), max(spread)


def test_quantities_are_those_of_the_definitions(weights, x):
    cushions, between, c, spread = by_definition(weights, x)
    found = noise_stability(weights, x, key=KEY)
    np.testing.assert_allclose(found.layer_cushions, cushions, rtol=1e-10)
    np.testing.assert_allclose(found.interlayer_cushions, between, rtol=1e-10)
    np.testing.assert_allclose(found.minimal_cushions, between.min(axis=1), rtol=1e-10)
    np.testing.assert_allclose([found.contraction, found.spread], [c, spread], rtol=1e-10)
    size = np.linalg.norm(upper(weights, 0, x @ weights[0])[-1], axis=1).max()
    epsilon = np.sqrt(2) * c * 3**1.5 * size / (np.sqrt(8) * (cushions * between.min(axis=1)).min())
    np.testing.assert_allclose(found.epsilon, epsilon, rtol=1e-10)


def test_cushions_and_contraction_are_on_their_side_of_one(weights, x):
    found = noise_stability(weights, x, key=KEY)
    assert (found.layer_cushions <= 1).all()
    assert (found.minimal_cushions <= 1).all()
    assert found.contraction >= 1
    assert found.spread >= 1


@pytest.mark.parametrize("noise", ["gaussian", "dropout"])
def test_a_linear_network_is_infinitely_smooth(x64, noise):
    """Positive weights and inputs leave every ReLU open, whatever small noise does."""
    draw = np.random.default_rng(2)
    weights = [jnp.asarray(0.5 + draw.random((i, o))) for i, o in itertools.pairwise(WIDTHS)]
    found = noise_stability(weights, jnp.asarray(1 + draw.random((3, 4))), key=KEY, noise=noise, noise_frac=0.01)
    assert np.isinf(found.smoothness)
    assert found.contraction == 1.0
    assert bool(found.preconditions["smoothness >= 3 d"])


def test_smoothness_is_the_least_ratio_of_its_noise(weights, x):
    """More draws lower it, and noise of another stream at the first layer finds about the same."""
    few = noise_stability(weights, x, key=KEY, draws=1)
    many = noise_stability(weights, x, key=KEY, draws=64)
    assert many.smoothness <= few.smoothness
    ratios = []

    @jax.jit
    def exact_and_linear(z, noise):
        """[[draws, d_j] for each layer above], of the map itself and of its linearisation at z."""
        shifted = z[None] + noise
        linear = jax.vmap(lambda v: jax.jvp(lambda y: upper(weights, 0, y), (z,), (v,))[1])(shifted)
        return jax.vmap(lambda v: upper(weights, 0, v))(shifted), linear

    draw = np.random.default_rng(0)
    for z in x @ weights[0]:
        noise = draw.normal(size=(64, z.size))
        noise *= 0.1 * np.linalg.norm(z) / np.linalg.norm(noise, axis=1, keepdims=True)
        for end, exact, linear in zip(upper(weights, 0, z), *exact_and_linear(z, noise), strict=True):
            gap = np.linalg.norm(exact - linear, axis=1)
            over = np.linalg.norm(noise, axis=1) * np.linalg.norm(end)
            bent = gap > 1e-12
            ratios += (over[bent] / (np.linalg.norm(z) * gap[bent])).tolist()
    assert many.smoothness < 1.3 * min(ratios)
    assert few.smoothness > 0.3 * min(ratios)


def test_scaling_a_layer_scales_epsilon_with_the_outputs_alone(weights, x):
    found = noise_stability(weights, x, key=KEY)
    scaled = noise_stability([weights[0], 4 * weights[1], weights[2]], x, key=KEY)
    for name in ("layer_cushions", "interlayer_cushions", "contraction", "smoothness", "spread"):
        np.testing.assert_allclose(getattr(scaled, name), getattr(found, name), rtol=1e-8)
    np.testing.assert_allclose(scaled.epsilon, 4 * found.epsilon, rtol=1e-10)


def test_an_example_that_leaves_a_layer_dead_makes_the_bound_infinite(weights, x):
    found = noise_stability([weights[0], -jnp.abs(weights[1]), weights[2]], x, key=KEY)
    assert np.isinf(found.contraction)
    assert np.isinf(found.epsilon)
    assert bool(found.vacuous)
    assert np.isfinite(found.layer_cushions[:2]).all()


def test_preconditions_and_vacuity_are_reported(weights, x):
    found = noise_stability(weights, x, key=KEY, dropout_frac=0.9)
    assert not bool(found.preconditions["p <= 3/4"])
    assert bool(found.vacuous) == bool(found.epsilon >= np.log(3))
    assert not bool(noise_stability(weights, x, key=KEY, baseline=1e9).vacuous)
    heavy = [weights[0], weights[1].at[0].mul(100.0), weights[2]]
    name = "no column above sqrt(p) times the kernel"
    assert bool(noise_stability(weights, x, key=KEY).preconditions[name])
    assert not bool(noise_stability(heavy, x, key=KEY).preconditions[name])


def test_integer_inputs_and_narrow_kernels_are_measured_in_float32():
    kernels, inputs = [jnp.eye(3), 2 * jnp.eye(3)], np.array([[1, 2, 3], [4, 0, 1]])
    wanted = noise_stability(kernels, jnp.asarray(inputs, jnp.float32), key=jax.random.key(0))
    for found in (
        noise_stability(kernels, inputs, key=jax.random.key(0)),
        noise_stability([w.astype(jnp.bfloat16) for w in kernels], inputs, key=jax.random.key(0)),
    ):
        np.testing.assert_allclose(found.epsilon, wanted.epsilon, rtol=1e-6)


def test_kernels_of_a_tree_come_in_the_order_of_the_layers():
    spec = make_permutation_spec(
        {
            "z": (UnitAxis("h0", 0),),
            "a": (UnitAxis("h0", 0, reads=True), UnitAxis("h1", 1)),
            "b": (UnitAxis("h1", 0, reads=True),),
        }
    )
    params = {"z": jnp.ones((6, 4)), "a": jnp.ones((6, 5)), "b": jnp.ones((5, 3)), "bias": jnp.zeros(3)}
    kernels = chain_weights(params, spec)
    assert [k.shape for k in kernels] == [(4, 6), (6, 5), (5, 3)]
