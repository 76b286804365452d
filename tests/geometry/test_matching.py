"""Matchings against enumeration of all permutations, planted permutations, and each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from jaxft.core.units import UnitAxis, make_permutation_spec
from jaxft.geometry import assignment
from jaxft.geometry.activation_matching import activation_matching, straight_through_matching
from jaxft.geometry.assignment import auction_prices, solve_assignment
from jaxft.geometry.matching import weight_matching
from jaxft.geometry.permutations import apply_permutation, compose_permutations, random_permutation
from jaxft.geometry.unit_statistics import unit_correlations, unit_moments

MLP = make_permutation_spec(
    {
        "k0": (UnitAxis("h0", 1),),
        "b0": (UnitAxis("h0", 0),),
        "k1": (UnitAxis("h0", 0, reads=True), UnitAxis("h1", 1)),
        "b1": (UnitAxis("h1", 0),),
        "k2": (UnitAxis("h1", 0, reads=True),),
    }
)
STACK = make_permutation_spec(
    {
        "in": (UnitAxis("residual", 1, reads=True), UnitAxis("mlp", 2, stacked=True)),
        "out": (UnitAxis("mlp", 1, reads=True, stacked=True), UnitAxis("residual", 2)),
        "fused": (UnitAxis("residual", 1, reads=True), UnitAxis("heads", 2, outer=3, inner=2, stacked=True)),
        "square": (UnitAxis("residual", 0, reads=True), UnitAxis("residual", 1)),
    }
)
SHAPES = {
    "mlp": {"k0": (3, 4), "b0": (4,), "k1": (4, 5), "b1": (5,), "k2": (5, 2)},
    "stack": {"in": (2, 4, 6), "out": (2, 6, 4), "fused": (2, 4, 18), "square": (4, 4)},
}


def make_tree(name, seed, scale=1):
    draw = np.random.default_rng(seed)
    shapes = {leaf: tuple(scale * size for size in shape) for leaf, shape in SHAPES[name].items()}
    return {leaf: jnp.asarray(draw.normal(size=shape), np.float32) for leaf, shape in shapes.items()}


def inner(a, b):
    return sum(float((np.asarray(a[name], np.float64) * np.asarray(b[name], np.float64)).sum()) for name in a)


def units(params, x):
    h0 = x @ params["k0"] + params["b0"][None]
    h1 = jnp.tanh(h0) @ params["k1"] + params["b1"][None]
    return {"h0": h0, "h1": h1, "output": jnp.tanh(h1) @ params["k2"]}


X = jnp.asarray(np.random.default_rng(9).normal(size=(64, 3)), np.float32)


@pytest.mark.parametrize("solver", ["scipy", "optax"])
def test_assignment_is_the_best_of_all_permutations(solver):
    similarity = np.random.default_rng(0).normal(size=(3, 5, 5)).astype(np.float32)
    found = np.asarray(solve_assignment(similarity, solver=solver))
    for matrix, index in zip(similarity, found, strict=True):
        values = {p: matrix[np.arange(5), list(p)].sum() for p in itertools.permutations(range(5))}
        assert tuple(index) == max(values, key=lambda p: values[p])


@pytest.mark.parametrize("kind", ["random", "planted", "ties", "constant", "rank one", "large offset"])
def test_prices_change_no_optimum(kind, monkeypatch):
    monkeypatch.setattr(assignment, "SMALL", 2)
    n, draw = 150, np.random.default_rng(1)
    noise = draw.normal(size=(n, n))
    similarity = {
        "random": noise,
        "planted": noise + 9 * np.eye(n)[draw.permutation(n)],
        "ties": draw.integers(0, 3, size=(n, n)),
        "constant": np.ones((n, n)),
        "rank one": np.outer(noise[0], noise[1]),
        "large offset": noise + 1000 * noise[:1] + 1000 * noise[:, :1],
    }[kind].astype(np.float32)
    found, rows = solve_assignment(similarity), np.arange(n)
    expected = linear_sum_assignment(similarity.astype(np.float64), maximize=True)[1]
    assert (np.sort(found) == rows).all()
    best, sums = similarity[rows, expected].sum(dtype=np.float64), similarity[rows, found].sum(dtype=np.float64)
    assert abs(sums - best) <= 1e-9 * abs(best)


def test_prices_of_the_auction_bound_the_best_assignment_closely():
    """Linear programming duality: prices p bound every assignment by sum p_j + sum_i max_j (S_ij - p_j)."""
    similarity = np.random.default_rng(1).normal(size=(300, 300)).astype(np.float32)
    prices = auction_prices(similarity)
    best = similarity[linear_sum_assignment(similarity, maximize=True)].sum()
    bound = prices.sum() + (similarity - prices[None]).max(axis=1).sum()
    assert best <= bound < 1.01 * best
    assert similarity.max(axis=1).sum() > 1.05 * best


def test_best_restart_is_the_best_of_all_permutations():
    a, b = make_tree("mlp", 0), make_tree("mlp", 1)
    found = weight_matching(a, b, MLP, key=jax.random.key(0), restarts=12)
    products = np.zeros((24, 120))
    first = [np.array(p) for p in itertools.permutations(range(4))]
    second = [np.array(p) for p in itertools.permutations(range(5))]
    left, right = jax.tree.map(np.asarray, (a, b))
    for i, p in enumerate(first):
        lone = (left["k0"] * right["k0"][:, p]).sum() + (left["b0"] * right["b0"][p]).sum()
        for j, q in enumerate(second):
            rest = (left["b1"] * right["b1"][q]).sum() + (left["k2"] * right["k2"][q]).sum()
            products[i, j] = lone + rest + (left["k1"] * right["k1"][p][:, q]).sum()
    np.testing.assert_allclose(found.objective[-1], products.max(), rtol=1e-5)
    i, j = np.unravel_index(products.argmax(), products.shape)
    np.testing.assert_array_equal(found.permutation["h0"], first[i])
    np.testing.assert_array_equal(found.permutation["h1"], second[j])


def test_stacked_groups_alone_are_the_best_of_each_layer():
    a, b = make_tree("stack", 0), make_tree("stack", 1)
    found = weight_matching(a, b, STACK, key=jax.random.key(0), groups=("mlp", "heads"))
    np.testing.assert_array_equal(found.permutation["residual"], np.arange(4))
    assert found.sweeps == 1
    for layer in range(2):
        similarity = np.asarray(a["in"][layer].T @ b["in"][layer] + a["out"][layer] @ b["out"][layer].T)
        expected = linear_sum_assignment(similarity, maximize=True)[1]
        np.testing.assert_array_equal(found.permutation["mlp"][layer], expected)
        left, right = (np.asarray(side["fused"][layer]).reshape(4, 3, 3, 2) for side in (a, b))
        expected = linear_sum_assignment(np.einsum("dohi,dogi->hg", left, right), maximize=True)[1]
        np.testing.assert_array_equal(found.permutation["heads"][layer], expected)


@pytest.mark.parametrize("solver", ["scipy", "optax"])
@pytest.mark.parametrize("name", ["mlp", "stack"])
def test_permutation_of_itself_is_undone_exactly(name, solver):
    a, spec = make_tree(name, 0, scale=2), {"mlp": MLP, "stack": STACK}[name]
    hidden = random_permutation(a, spec, key=jax.random.key(1))
    if name == "stack":  # what is planted in a residual stream is found from a start that is near
        hidden = {
            **hidden,
            "residual": jnp.roll(jnp.arange(8), 1).at[:6].set(jnp.arange(6)).at[6:].set(jnp.array([7, 6])),
        }
    b = apply_permutation(a, spec, hidden)
    found = weight_matching(a, b, spec, key=jax.random.key(0), solver=solver, restarts=4)
    for leaf in a:
        np.testing.assert_array_equal(found.params[leaf], a[leaf])
    total = compose_permutations(hidden, found.permutation)
    assert all((np.asarray(index) == np.arange(np.shape(index)[-1])).all() for index in total.values())
    np.testing.assert_allclose(found.objective[-1], inner(a, a), rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "stack"])
@pytest.mark.parametrize("seed", range(3))
def test_objective_never_falls_and_is_that_of_the_result(name, seed):
    a, b = make_tree(name, 2 * seed, scale=2), make_tree(name, 2 * seed + 1, scale=2)
    found = weight_matching(a, b, {"mlp": MLP, "stack": STACK}[name], key=jax.random.key(seed))
    assert (np.diff(found.objective) >= 0).all()
    np.testing.assert_allclose(found.objective[0], inner(a, b), atol=1e-3)
    np.testing.assert_allclose(found.objective[-1], inner(a, found.params), rtol=1e-5)
    assert 0 < found.sweeps < 30


def test_result_is_a_maximum_in_every_group():
    a, b = make_tree("mlp", 5), make_tree("mlp", 6)
    found = weight_matching(a, b, MLP, key=jax.random.key(0))
    for group, n in (("h0", 4), ("h1", 5)):
        for p in itertools.permutations(range(n)):
            moved = apply_permutation(b, MLP, {**found.permutation, group: np.array(p)})
            assert inner(a, moved) <= found.objective[-1] + 1e-4


def test_a_group_is_solved_again_only_after_a_neighbour_changed(monkeypatch):
    from jaxft.geometry import matching

    solved = []

    def counted(a, b, spec, group, *rest):
        solved.append(group)
        return best(a, b, spec, group, *rest)

    best = matching._best
    monkeypatch.setattr(matching, "_best", counted)
    a = make_tree("stack", 0)
    b = apply_permutation(
        a, STACK, {g: random_permutation(a, STACK, key=jax.random.key(0))[g] for g in ("mlp", "heads")}
    )
    found = weight_matching(a, b, STACK, key=jax.random.key(0), groups=("mlp", "heads"))
    assert sorted(solved) == ["heads", "mlp"]
    assert found.sweeps == 1


def test_first_sweep_begins_with_what_is_known_without_other_groups():
    leaves = {path: axes for path, axes in STACK.leaves if path != "square"}
    spec = make_permutation_spec({**leaves, "table": (UnitAxis("residual", 1),)})
    draw = np.random.default_rng(0)
    a = {**make_tree("stack", 0, scale=2), "table": jnp.asarray(draw.normal(size=(300, 8)), np.float32)}
    del a["square"]
    for seed in range(3):
        b = apply_permutation(a, spec, random_permutation(a, spec, key=jax.random.key(seed)))
        found = weight_matching(a, b, spec, key=jax.random.key(seed))
        assert all((found.params[leaf] == a[leaf]).all() for leaf in a)
        np.testing.assert_allclose(found.objective[1:], inner(a, a), rtol=1e-6)


def test_start_that_is_right_is_kept():
    a = make_tree("mlp", 0)
    hidden = random_permutation(a, MLP, key=jax.random.key(3))
    b = apply_permutation(a, MLP, hidden)
    undo = {group: np.argsort(index) for group, index in hidden.items()}
    found = weight_matching(a, b, MLP, key=jax.random.key(0), start=undo)
    np.testing.assert_allclose(found.objective, inner(a, a), rtol=1e-6)
    assert all((found.permutation[group] == undo[group]).all() for group in undo)


def test_dead_units_end_the_descent():
    a = jax.tree.map(jnp.zeros_like, make_tree("mlp", 0))
    found = weight_matching(a, a, MLP, key=jax.random.key(0))
    assert found.sweeps == 1
    assert found.objective.tolist() == [0.0, 0.0]


def test_bfloat16_is_matched_in_float32():
    a = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_tree("mlp", 0))
    b = apply_permutation(a, MLP, random_permutation(a, MLP, key=jax.random.key(1)))
    found = weight_matching(a, b, MLP, key=jax.random.key(0), restarts=3)
    assert all((found.params[leaf] == a[leaf]).all() for leaf in a)


@pytest.mark.parametrize("batch_size", [None, 24])
def test_statistics_equal_numpy(batch_size):
    a, b = make_tree("mlp", 0), make_tree("mlp", 1)
    left, right = (np.asarray(units(side, X)["h1"], np.float64) for side in (a, b))
    mean, variance = unit_moments(units, a, X, batch_size=batch_size)["h1"]
    np.testing.assert_allclose(mean, left.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, left.var(axis=0), rtol=1e-4)
    found = unit_correlations(units, a, b, X, eps=0.0, batch_size=batch_size)["h1"]
    np.testing.assert_allclose(found, np.corrcoef(left.T, right.T)[:5, 5:], atol=1e-5)


def test_variance_does_not_cancel_beside_a_large_mean():
    shifted = {**make_tree("mlp", 0), "b0": jnp.full(4, 3000.0)}
    _, variance = unit_moments(units, shifted, X, batch_size=24)["h0"]
    expected = np.asarray(X, np.float64) @ np.asarray(shifted["k0"], np.float64)
    np.testing.assert_allclose(variance, expected.var(axis=0), rtol=1e-3)


def test_activations_recover_a_permutation_with_rescaled_units():
    a = make_tree("mlp", 0, scale=2)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(64, 6)), np.float32)
    hidden = random_permutation(a, MLP, key=jax.random.key(1))
    b = apply_permutation(a, MLP, hidden)
    found = activation_matching(units, a, b, MLP, x, batch_size=24)
    assert all((found.params[leaf] == a[leaf]).all() for leaf in a)
    np.testing.assert_allclose(found.objective[-1], 8 + 10, rtol=1e-4)
    louder = {**b, "k1": 3 * b["k1"], "b1": 3 * b["b1"]}  # correlations do not see the size of a unit
    again = activation_matching(units, a, louder, MLP, x)
    assert all((again.permutation[group] == found.permutation[group]).all() for group in hidden)


def test_dead_units_correlate_with_nothing():
    a = make_tree("mlp", 0)
    dead = {**a, "k0": a["k0"].at[:, 1].set(0)}
    found = unit_correlations(units, dead, a, X, eps=1e-6)["h0"]
    assert np.isfinite(found).all()
    assert float(jnp.abs(found[1]).max()) < 1e-3
    assert activation_matching(units, dead, a, MLP, X).permutation["h0"].tolist() == [0, 1, 2, 3]


def midpoint_problem():
    a = make_tree("mlp", 0, scale=2)
    hidden = random_permutation(a, MLP, key=jax.random.key(1))
    x = jnp.asarray(np.random.default_rng(9).normal(size=(2, 32, 6)), np.float32)
    y = jax.vmap(lambda rows: units(a, rows)["output"])(x)
    return a, apply_permutation(a, MLP, hidden), (x, y)


def squared_error(params, batch):
    return {"loss": jnp.square(units(params, batch[0])["output"] - batch[1]).mean()}


def test_straight_through_finds_the_planted_permutation():
    a, b, batches = midpoint_problem()
    options = {"tx": optax.sgd(0.01), "steps": 3, "key": jax.random.key(0)}
    found = straight_through_matching(squared_error, a, b, MLP, batches, **options)
    assert found.losses.shape == (3,)
    assert found.losses.min() < 1e-10
    assert all((found.params[leaf] == a[leaf]).all() for leaf in a)


def test_straight_through_lowers_the_loss_at_the_midpoint():
    a, b = make_tree("mlp", 0, scale=2), make_tree("mlp", 1, scale=2)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(1, 64, 6)), np.float32)
    batches = (x, units(a, x[0])["output"][None])
    options = {"tx": optax.adam(0.1), "steps": 25, "key": jax.random.key(0)}
    found = straight_through_matching(squared_error, a, b, MLP, batches, **options)

    def at_midpoint(moved):
        middle = jax.tree.map(lambda p, q: (p + q) / 2, a, moved)
        return float(squared_error(middle, jax.tree.map(lambda leaf: leaf[0], batches))["loss"])

    np.testing.assert_allclose(at_midpoint(found.params), found.losses.min(), rtol=1e-4)
    assert found.losses.min() < found.losses[0]
    np.testing.assert_allclose(
        at_midpoint(weight_matching(a, b, MLP, key=jax.random.key(5)).params), found.losses[0], rtol=0.5
    )


def test_free_copy_is_given_the_gradient_of_the_permuted_network():
    a, b = make_tree("mlp", 0, scale=2), make_tree("mlp", 1, scale=2)
    batches = midpoint_problem()[2]
    given = []

    class Recorder:
        def init(self, params):
            return ()

        def update(self, grads, state, params):
            jax.debug.callback(given.append, grads)
            return grads, state

    options = {"tx": Recorder(), "steps": 1, "key": jax.random.key(0)}
    found = straight_through_matching(squared_error, a, b, MLP, batches, **options)
    jax.effects_barrier()
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    middle = jax.tree.map(lambda p, q: (p + q) / 2, a, found.params)
    at_middle = jax.grad(lambda params: squared_error(params, first)["loss"])(middle)
    for leaf, gradient in at_middle.items():
        np.testing.assert_allclose(given[0][leaf], gradient / 2, rtol=1e-4, atol=1e-6)
