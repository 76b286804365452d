"""Permutations against loops over units, and the check of a spec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.units import UnitAxis, make_permutation_spec, unit_counts
from jaxft.geometry.permutations import (
    apply_permutation,
    check_spec,
    compose_permutations,
    identity_permutation,
    invert_permutation,
    moving,
    random_permutation,
)

SPEC = make_permutation_spec(
    {
        "fused": (UnitAxis("heads", 2, outer=3, inner=2, stacked=True), UnitAxis("wide", 1, reads=True)),
        "mixed": (UnitAxis("heads", 1, reads=True, inner=2, stacked=True), UnitAxis("wide", 2)),
        "square": (UnitAxis("wide", 0, reads=True), UnitAxis("wide", 1)),
    }
)


def make_tree(dtype: type = np.float32):
    draw = np.random.default_rng(0)
    shapes = {"fused": (2, 5, 3 * 4 * 2), "mixed": (2, 4 * 2, 5), "square": (5, 5), "other": (5,)}
    return {name: jnp.asarray(draw.normal(size=shape), dtype) for name, shape in shapes.items()}


def test_leaves_move_as_a_loop_over_units_moves_them():
    tree = make_tree()
    permutation = random_permutation(tree, SPEC, key=jax.random.key(0))
    heads, wide = (np.asarray(permutation[group]) for group in ("heads", "wide"))
    moved = jax.tree.map(np.asarray, apply_permutation(tree, SPEC, permutation))
    old = jax.tree.map(np.asarray, tree)
    for layer in range(2):
        for unit in range(4):
            source = heads[layer, unit]
            for part in range(3):
                new_at, old_at = ((8 * part + 2 * u, 8 * part + 2 * u + 2) for u in (unit, source))
                expected = old["fused"][layer][wide][:, slice(*old_at)]
                np.testing.assert_array_equal(moved["fused"][layer][:, slice(*new_at)], expected)
            expected = old["mixed"][layer, 2 * source : 2 * source + 2][:, wide]
            np.testing.assert_array_equal(moved["mixed"][layer, 2 * unit : 2 * unit + 2], expected)
    np.testing.assert_array_equal(moved["square"], old["square"][wide][:, wide])
    np.testing.assert_array_equal(moved["other"], old["other"])


def test_random_permutation_differs_between_layers_and_does_not_depend_on_other_groups():
    tree, key = make_tree(), jax.random.key(3)
    permutation = random_permutation(tree, SPEC, key=key)
    assert (np.sort(permutation["heads"], axis=1) == np.arange(4)).all()
    assert (permutation["heads"][0] != permutation["heads"][1]).any()
    alone = make_permutation_spec({"square": SPEC.leaves[2][1]})
    np.testing.assert_array_equal(random_permutation(tree, alone, key=key)["wide"], permutation["wide"])


def test_every_permutation_of_three_is_drawn_equally_often():
    spec = make_permutation_spec({"w": (UnitAxis("hidden", 0),)})
    draw = jax.jit(jax.vmap(lambda key: random_permutation({"w": jnp.zeros(3)}, spec, key=key)["hidden"]))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 6000)))
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_inverse_undoes_and_composition_is_one_after_the_other():
    tree = make_tree()
    first, then = (random_permutation(tree, SPEC, key=jax.random.key(seed)) for seed in (1, 2))
    once = apply_permutation(tree, SPEC, first)
    twice = apply_permutation(once, SPEC, then)
    composed = apply_permutation(tree, SPEC, compose_permutations(first, then))
    undone = apply_permutation(once, SPEC, invert_permutation(first))
    still = apply_permutation(tree, SPEC, identity_permutation(tree, SPEC))
    for name in tree:
        np.testing.assert_array_equal(composed[name], twice[name])
        np.testing.assert_array_equal(undone[name], tree[name])
        np.testing.assert_array_equal(still[name], tree[name])
    assert (composed["square"] != tree["square"]).any()


def test_what_moves_is_known_under_jit_too():
    tree = make_tree()
    still = identity_permutation(tree, SPEC)
    assert moving(still) == {}
    assert list(moving({**still, "wide": jnp.array([1, 0, 2, 3, 4])})) == ["wide"]
    traced = jax.jit(lambda index: apply_permutation(tree, SPEC, index))
    jax.tree.map(np.testing.assert_array_equal, traced(still), tree)
    assert (traced({**still, "wide": jnp.array([1, 0, 2, 3, 4])})["square"] != tree["square"]).any()


def test_composition_keeps_groups_that_one_of_the_two_has():
    first, then = {"a": jnp.array([1, 0]), "b": jnp.array([1, 0])}, {"b": jnp.array([1, 0]), "c": jnp.array([1, 0])}
    composed = compose_permutations(first, then)
    assert {group: index.tolist() for group, index in composed.items()} == {"a": [1, 0], "b": [0, 1], "c": [1, 0]}


def test_permutation_is_the_same_under_jit_and_vmap():
    tree, keys = make_tree(), jax.random.split(jax.random.key(0), 3)

    def moved(key):
        return apply_permutation(tree, SPEC, random_permutation(tree, SPEC, key=key))

    alone = [moved(key) for key in keys]
    batched = jax.jit(jax.vmap(moved))(keys)
    for i, expected in enumerate(alone):
        jax.tree.map(lambda row, one, i=i: np.testing.assert_array_equal(row[i], one), batched, expected)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_gathers_round_nothing(dtype):
    tree = make_tree(dtype)
    moved = apply_permutation(tree, SPEC, random_permutation(tree, SPEC, key=jax.random.key(0)))
    for name in tree:
        assert moved[name].dtype == dtype
        np.testing.assert_array_equal(np.sort(moved[name], axis=None), np.sort(tree[name], axis=None))


def net(params, x):
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
    return hidden @ params["out"]


AXES = {"in": (UnitAxis("hidden", 1),), "bias": (UnitAxis("hidden", 0),), "out": (UnitAxis("hidden", 0, reads=True),)}


def make_net(units, dtype: type = np.float32):
    draw = np.random.default_rng(1)
    shapes = {"in": (3, units), "bias": (units,), "out": (units, 2)}
    return {name: jnp.asarray(draw.normal(size=shape), dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("forgotten", AXES)
def test_spec_that_forgets_a_leaf_is_found_out(forgotten):
    spec = make_permutation_spec({path: axes for path, axes in AXES.items() if path != forgotten})
    with pytest.raises(ValueError, match=rf"got hidden \(relative change .*; {forgotten} has an axis of 7"):
        check_spec(net, make_net(7), spec, jnp.ones((2, 3)), key=jax.random.key(0))


def test_spec_that_joins_two_layers_is_found_out():
    def deep(params, x):
        return jnp.tanh(net(params, x)) @ params["top"]

    params = {**make_net(2), "top": jnp.array([[1.0], [3.0]])}
    spec = make_permutation_spec({**AXES, "top": (UnitAxis("hidden", 0, reads=True),)})
    with pytest.raises(ValueError, match="got hidden"):
        check_spec(deep, params, spec, jnp.ones((2, 3)), key=jax.random.key(0))


@pytest.mark.parametrize("seed", range(4))
def test_even_two_units_are_exchanged(seed):
    spec = make_permutation_spec({path: AXES[path] for path in ("in", "out")})
    with pytest.raises(ValueError, match="bias, out have an axis of 2"):
        check_spec(net, make_net(2), spec, jnp.ones((2, 3)), key=jax.random.key(seed))


def test_right_spec_passes_to_rounding(x64):
    spec, params = make_permutation_spec(AXES), make_net(7, np.float64)
    assert unit_counts(params, spec) == {"hidden": 7}
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)))
    assert 0 <= check_spec(net, params, spec, x, key=jax.random.key(0)) < 1e-14
