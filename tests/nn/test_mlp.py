import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.mlp import make_mlp, make_mlp_units

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
ACTIVATIONS = {
    "relu": lambda z: max(z, 0.0),
    "tanh": math.tanh,
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "erf": math.erf,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula(activation):
    init, f = make_mlp((5, 2), activation=activation)
    params = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0), 3))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    first, last = (jax.tree.map(np.asarray, params[name]) for name in ("Dense_0", "Dense_1"))
    hidden = np.vectorize(ACTIVATIONS[activation])(x @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(f(params, jnp.asarray(x)), hidden @ last["kernel"] + last["bias"], atol=2e-6)


def test_kernels_have_variance_one_over_fan_in():
    init, _ = make_mlp((400, 3))
    params = init(jax.random.key(0), 100)
    assert abs(float(params["Dense_0"]["kernel"].var()) * 100 - 1) < 0.05
    assert not params["Dense_0"]["bias"].any()
    assert abs(float(params["Dense_1"]["kernel"].var()) * 400 - 1) < 0.2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_units_are_what_enters_the_activations(activation, use_bias):
    widths = (5, 4, 2)
    init, f = make_mlp(widths, activation=activation, use_bias=use_bias)
    params = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0), 3))
    x = X
    units = make_mlp_units(widths, activation=activation, use_bias=use_bias)(params, jnp.asarray(x))
    assert list(units) == ["hidden_0", "hidden_1", "output"]
    for i, z in enumerate(units.values()):
        layer = params[f"Dense_{i}"]
        expected = x @ layer["kernel"] + (layer["bias"] if use_bias else np.zeros(widths[i], np.float32))[None]
        np.testing.assert_allclose(z, expected, atol=3e-6)
        x = np.vectorize(ACTIVATIONS[activation], otypes=[np.float32])(z)
    np.testing.assert_array_equal(units["output"], f(params, jnp.asarray(X)))


def test_without_biases_a_relu_net_is_homogeneous():
    init, f = make_mlp((5, 4, 2), use_bias=False)
    params, x = init(jax.random.key(0), 3), jnp.asarray(X)
    assert {name: list(layer) for name, layer in params.items()} == {f"Dense_{i}": ["kernel"] for i in range(3)}
    np.testing.assert_allclose(f(jax.tree.map(lambda w: 2 * w, params), x), 8 * f(params, x), rtol=1e-5, atol=1e-6)


def test_dropout_zeroes_hidden_units_and_scales_the_others():
    """Every draw is one of the nets with a subset of its hidden units, and subsets come at their rate."""
    init, f = make_mlp((3, 2), dropout_frac=0.25, activation="tanh")
    params, x = init(jax.random.key(0), 3), jnp.asarray(X[:2])
    draws = np.asarray(jax.vmap(lambda key: f(params, x, key=key))(jax.random.split(jax.random.key(1), 400)))
    masks = np.array(list(itertools.product([0, 1], repeat=3)))
    hidden = np.tanh(x @ params["Dense_0"]["kernel"])
    possible = np.stack([(hidden * mask / 0.75) @ params["Dense_1"]["kernel"] for mask in masks])
    gaps = np.abs(draws[:, None] - possible[None]).max(-1)
    assert gaps.min(1).max() < 1e-5
    kept = masks[gaps.argmin(1)]  # draw, example, unit
    np.testing.assert_allclose(kept.mean((0, 1)), 0.75, atol=5 * np.sqrt(0.1875 / 800))
    assert (kept[:, 0] != kept[:, 1]).any()


def test_without_a_key_nothing_is_dropped_and_layers_have_their_own_fractions():
    init, plain = make_mlp((5, 4, 2))
    _, f = make_mlp((5, 4, 2), dropout_frac=(0.0, 0.5))
    _, none = make_mlp((5, 4, 2), dropout_frac=(0.0, 0.0))
    params, x, key = init(jax.random.key(0), 3), jnp.asarray(X), jax.random.key(1)
    np.testing.assert_array_equal(f(params, x), plain(params, x))
    np.testing.assert_array_equal(none(params, x, key=key), plain(params, x))
    np.testing.assert_array_equal(f(params, x, key=key), f(params, x, key=key))
    assert not np.array_equal(f(params, x, key=key), f(params, x, key=jax.random.key(2)))
