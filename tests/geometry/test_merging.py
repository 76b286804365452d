"""Merged models against the formulas on one leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.geometry.merging import (
    interpolate,
    interpolate_adapters,
    layer_profile,
    task_arithmetic,
    task_vector,
    weighted_average,
)
from jaxft.nn import merge_lora


def model(seed, dtype=jnp.float32):
    k, j = jax.random.split(jax.random.key(seed))
    return {"dense": {"kernel": jax.random.normal(k, (3, 4), dtype)}, "stack": jax.random.normal(j, (2, 5), dtype)}


A, B, C = (model(seed) for seed in range(3))


def assert_close(found, expected, rtol=1e-6):
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)  # allclose alone would broadcast
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), found, expected)


def test_ends_of_an_interpolation_are_exact_and_dtypes_stay():
    for t, end in ((0, A), (1, B), (0.0, A), (jnp.array(1.0), B)):
        jax.tree.map(np.testing.assert_array_equal, interpolate(A, B, t), end)
    halves = interpolate(model(0, jnp.bfloat16), model(1, jnp.bfloat16), jnp.array(0.5))
    assert {x.dtype for x in jax.tree.leaves(halves)} == {jnp.dtype(jnp.bfloat16)}


def test_average_is_the_weighted_sum_and_is_divided_only_on_demand():
    assert_close(weighted_average([A, B, C]), jax.tree.map(lambda *x: sum(x) / 3, A, B, C))
    weights = [0.5, 2.0, -1.0]
    total = jax.tree.map(lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)), A, B, C)
    assert_close(weighted_average([A, B, C], weights, normalize=False), total)
    divided = jax.tree.map(lambda x: x / 1.5, total)
    assert_close(weighted_average([A, B, C], jnp.array(weights), normalize=True), divided)


def test_weights_can_be_traced_and_differentiated():
    total = lambda w: sum(x.sum() for x in jax.tree.leaves(weighted_average([A, B], w)))  # noqa: E731
    expected = [sum(x.sum() for x in jax.tree.leaves(m)) for m in (A, B)]
    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.array([0.2, 0.3])), expected, rtol=1e-5)


def test_task_arithmetic_adds_scaled_task_vectors():
    expected = jax.tree.map(lambda a, b, c: a + 0.5 * b - 2 * c, A, task_vector(A, B), task_vector(A, C))
    assert_close(task_arithmetic(A, [B, C], [0.5, -2.0]), expected, rtol=1e-5)
    assert_close(task_arithmetic(A, [B, C], 0.5), weighted_average([B, C]), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, task_arithmetic(A, [B], 1.0), B)


def test_profile_gives_every_leaf_and_every_stacked_layer_its_own_weight():
    mixed = layer_profile(A, B, {"kernel$": 0.25, "stack": np.array([0.0, 1.0])})
    np.testing.assert_allclose(mixed["dense"]["kernel"], interpolate(A, B, 0.25)["dense"]["kernel"])
    np.testing.assert_array_equal(mixed["stack"], jnp.stack([A["stack"][0], B["stack"][1]]))


def test_first_pattern_that_matches_counts_and_others_fall_to_the_default():
    mixed = layer_profile(A, B, {"dense": 1.0, "kernel": 0.5}, default=0.0)
    assert_close(mixed, {"dense": B["dense"], "stack": A["stack"]})


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_adapters_in_delta_space_are_the_line_of_merged_weights(t):
    base = {"w": jnp.ones((2, 3, 4))}
    a, b = (
        {"w": {"lora_a": jax.random.normal(k, (2, 3, r)), "lora_b": jax.random.normal(k, (2, r, 4))}}
        for k, r in zip(jax.random.split(jax.random.key(0)), (1, 2), strict=True)
    )
    line = interpolate(merge_lora(base, a, scale=0.5), merge_lora(base, b, scale=0.5), t)
    assert_close(merge_lora(base, interpolate_adapters(a, b, t), scale=0.5), line, rtol=1e-5)


def test_adapters_in_factor_space_miss_the_line_by_the_product_of_differences():
    a, b = (
        {"w": {"lora_a": jax.random.normal(k, (3, 2)), "lora_b": jax.random.normal(k, (2, 4))}}
        for k in jax.random.split(jax.random.key(1))
    )
    product = lambda adapters: adapters["w"]["lora_a"] @ adapters["w"]["lora_b"]  # noqa: E731
    delta, factors = (product(interpolate_adapters(a, b, 0.3, space=space)) for space in ("delta", "factors"))
    bent = (a["w"]["lora_a"] - b["w"]["lora_a"]) @ (a["w"]["lora_b"] - b["w"]["lora_b"])
    np.testing.assert_allclose(delta - factors, 0.3 * 0.7 * bent, rtol=1e-4, atol=1e-5)
