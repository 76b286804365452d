"""Adapters over a plain function and a nested tree with a stack of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.nn import init_lora, make_lora_outputs, merge_lora
from jaxft.train.checkpoints import Checkpoints

ADAPTED = {"layers": {"kernel": True, "bias": False}, "out": True}


def network(params, x):
    for i in range(2):
        x = jnp.tanh(jnp.matmul(x, params["layers"]["kernel"][i], precision="highest") + params["layers"]["bias"][i])
    return jnp.matmul(x, params["out"], precision="highest")


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0).normal
    shapes = {"layers": {"kernel": (2, 3, 3), "bias": (2, 1, 3)}, "out": (3, 2)}
    return jax.tree.map(
        lambda s: jnp.asarray(draw(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)


@pytest.fixture(scope="module")
def adapters(params):
    return init_lora(params, ADAPTED, rank=2, key=jax.random.key(0))


@pytest.fixture(scope="module")
def moved(adapters):
    return jax.tree.map(lambda a: a + 0.5, adapters)


def test_fresh_adapters_leave_the_function_exactly_as_it_is(params, adapters, x):
    assert set(adapters) == {"layers/kernel", "out"}
    np.testing.assert_array_equal(make_lora_outputs(network, params, scale=4.0)(adapters, x), network(params, x))


def test_merged_weight_is_the_weight_plus_the_scaled_product(params, moved):
    merged = merge_lora(params, moved, scale=0.25)
    a, b = (np.asarray(moved["layers/kernel"][part], np.float64) for part in ("lora_a", "lora_b"))
    for layer in range(2):
        expected = np.asarray(params["layers"]["kernel"][layer], np.float64) + 0.25 * a[layer] @ b[layer]
        np.testing.assert_allclose(merged["layers"]["kernel"][layer], expected, rtol=1e-6)
    np.testing.assert_array_equal(merged["layers"]["bias"], params["layers"]["bias"])
    assert not np.allclose(merged["out"], params["out"])


def test_output_is_the_low_rank_path_beside_the_frozen_one(params, moved, x):
    """y = x W + s (x A) B, without a merged matrix."""
    a, b = moved["out"]["lora_a"], moved["out"]["lora_b"]
    ours = make_lora_outputs(lambda p, z: z @ p["out"], params, scale=2.0)({"out": moved["out"]}, x)
    np.testing.assert_allclose(ours, x @ params["out"] + 2.0 * (x @ a) @ b, rtol=1e-5, atol=1e-5)


def test_gradient_in_a_is_zero_until_b_moves(params, adapters, x):
    f_lora = make_lora_outputs(network, params, scale=0.5)
    grads = jax.grad(lambda a: (f_lora(a, x) ** 2).sum())
    start = grads(adapters)
    of_weights = jax.grad(lambda p: (network(p, x) ** 2).sum())(params)["out"]
    assert not any(part["lora_a"].any() for part in start.values())
    expected = 0.5 * np.asarray(adapters["out"]["lora_a"]).T @ np.asarray(of_weights)
    np.testing.assert_allclose(start["out"]["lora_b"], expected, rtol=1e-4, atol=1e-5)
    stepped = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, start)
    assert all(part["lora_a"].any() for part in grads(stepped).values())


def test_entries_of_a_have_variance_one_over_rank_and_each_layer_its_own():
    shapes = {"w": jax.ShapeDtypeStruct((3, 200, 7), jnp.float32)}
    a = np.asarray(init_lora(shapes, {"w": True}, rank=16, key=jax.random.key(1))["w"]["lora_a"])
    assert a.shape == (3, 200, 16)
    assert a.var() * 16 == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(a.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.1


def test_adapter_of_a_leaf_does_not_depend_on_what_else_is_adapted(params, adapters):
    only = init_lora(params, {"layers": {"kernel": False, "bias": False}, "out": True}, rank=2, key=jax.random.key(0))
    np.testing.assert_array_equal(only["out"]["lora_a"], adapters["out"]["lora_a"])


def test_adapters_take_the_types_of_their_leaves(params):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    adapters = init_lora(half, ADAPTED, rank=1, key=jax.random.key(2))
    assert {a.dtype for a in jax.tree.leaves((adapters, merge_lora(half, adapters)))} == {jnp.dtype(jnp.bfloat16)}


def test_adapters_train_under_optax_and_come_back_from_a_checkpoint(params, adapters, x, tmp_path):
    f_lora = make_lora_outputs(network, params)
    optimizer = optax.adam(0.05)

    def loss(adapters):
        return ((f_lora(adapters, x) - 1) ** 2).mean()

    @jax.jit
    def step(adapters, state):
        updates, state = optimizer.update(jax.grad(loss)(adapters), state)
        return optax.apply_updates(adapters, updates), state

    trained, state = adapters, optimizer.init(adapters)
    for _ in range(20):
        trained, state = step(trained, state)
    assert loss(trained) < 0.5 * loss(adapters)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, trained)
        restored = checkpoints.restore(1, adapters)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
