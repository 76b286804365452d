"""Paths against their definitions: ends, Bernstein polynomials, arcs, lengths, the gradient of a curve."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core.trees import tree_norm, tree_sub
from jaxft.geometry import (
    Curve,
    arc_length,
    curve_gradient,
    eval_path,
    fit_curve,
    init_curve,
    linear_path,
    loss_plane,
    path_ensemble,
    polychain,
    reparametrise,
    slerp_path,
    stack_points,
    unstack_points,
)
from jaxft.geometry.feature_connectivity import leafwise_path


def points(count, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), count)
    return [
        {"w": jax.random.normal(k, (3, 2), dtype), "b": {"c": jax.random.normal(jax.random.fold_in(k, 1), (4,), dtype)}}
        for k in keys
    ]


def curves(dtype=jnp.float32):
    four = points(4, dtype=dtype)
    return {
        "line": linear_path(four[0], four[3]),
        "bezier": Curve(stack_points(four), "bezier"),
        "polychain": polychain(four),
        "knots": polychain(four, knots=np.array([0.0, 0.1, 0.7, 1.0])),
        "start": init_curve(four[0], four[3], n_bends=5),
    }


def same(a, b):
    return all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def distance(a, b):
    return float(tree_norm(tree_sub(a, b)))


@pytest.mark.parametrize("name", curves())
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ends_are_exact(name, jit, dtype):
    curve = curves(dtype)[name]
    at = jax.jit(curve) if jit else curve
    a, *_, b = points(4, dtype=dtype)
    assert same(at(0.0), a)
    assert same(at(1.0), b)
    assert curve(0.3)["w"].dtype == dtype


@pytest.mark.parametrize("by_leaf", [False, True])
def test_the_ends_of_an_arc_are_exact(by_leaf):
    a, b = points(2)
    path = slerp_path(a, b, by_leaf=by_leaf)
    assert same(path(0.0), a)
    assert same(path(1.0), b)


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_bezier_weights_are_bernstein_polynomials(degree, x64):
    curve = Curve(stack_points(points(degree + 1, dtype=jnp.float64)), "bezier")
    for t in (0.0, 0.2, 0.9, 1.0):
        bernstein = [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)]
        np.testing.assert_allclose(curve.weights(t), bernstein, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", curves())
def test_a_curve_is_the_weighted_sum_of_its_control_points(name, x64):
    curve = curves(jnp.float64)[name]
    for t in (0.0, 0.05, 0.1, 0.4, 0.7, 0.99):
        expected = jax.tree.map(lambda c, t=t: jnp.tensordot(curve.weights(t), c, 1), curve.control)
        assert distance(curve(t), expected) < 1e-13


def test_a_polychain_meets_its_points_at_its_knots():
    knots = np.array([0.0, 0.1, 0.7, 1.0], np.float32)
    curve = polychain(points(4), knots=knots)
    for t, point in zip(knots, points(4), strict=True):
        assert same(curve(t), point)


def test_the_first_curve_is_the_straight_line(x64):
    a, b = points(2, dtype=jnp.float64)
    for family in ("bezier", "polychain"):
        curve = init_curve(a, b, n_bends=4, family=family)
        assert curve.n_bends == 4
        assert max(distance(curve(t), linear_path(a, b)(t)) for t in (0.1, 0.37, 0.8)) < 1e-13


def test_a_bezier_curve_has_a_derivative_at_its_ends(x64):
    control = stack_points(points(4, dtype=jnp.float64))
    curve = Curve(control, "bezier")
    _, start = jax.jvp(curve, (0.0,), (1.0,))
    assert distance(start, jax.tree.map(lambda c: 3 * (c[1] - c[0]), control)) < 1e-12


def test_an_arc_on_a_sphere_has_constant_speed_and_norm(x64):
    a, b = (jax.tree.map(lambda x, p=p: x / tree_norm(p), p) for p in points(2, dtype=jnp.float64))
    path = slerp_path(a, b)
    lengths = arc_length(path, ts=jnp.linspace(0, 1, 41))
    steps = np.diff(lengths)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)
    assert abs(float(tree_norm(path(0.3))) - 1) < 1e-12


def test_an_arc_between_parallel_points_is_the_line():
    (a,) = points(1)
    twice = jax.tree.map(lambda x: 2 * x, a)
    assert distance(slerp_path(a, twice)(0.5), jax.tree.map(lambda x: 1.5 * x, a)) < 1e-5


def test_length_of_a_chain_is_the_sum_of_its_chords(x64):
    four = points(4, dtype=jnp.float64)
    expected = sum(distance(x, y) for x, y in itertools.pairwise(four))
    assert abs(float(arc_length(polychain(four), ts=jnp.linspace(0, 1, 4))[-1]) - expected) < 1e-12


@pytest.mark.parametrize("name", ["bezier", "knots"])
def test_a_reparametrised_curve_has_constant_speed_and_the_same_image(name, x64):
    curve = curves(jnp.float64)[name]
    path = reparametrise(curve, points=2001)
    fine = np.linspace(0, 1, 2001)
    lengths = np.asarray(arc_length(path, ts=fine))
    # Chords across a corner are shorter than the path.
    np.testing.assert_allclose(lengths / lengths[-1], fine, atol=2e-3)
    image = jax.vmap(curve)(jnp.asarray(fine))
    assert float(jax.vmap(lambda point: tree_norm(tree_sub(path(0.4), point)))(image).min()) < 0.02
    assert same(path(0.0), curve(0.0))


def test_stacking_can_be_undone():
    assert all(same(x, y) for x, y in zip(unstack_points(stack_points(points(3))), points(3), strict=True))


def quartic(params, batch):
    return jnp.mean((params["w"].sum() * batch - params["b"]["c"].sum()) ** 2) + (params["w"] ** 4).sum()


@pytest.mark.parametrize("name", curves())
def test_gradient_of_a_curve_is_that_of_autodiff(name, x64):
    curve, batch = curves(jnp.float64)[name], jnp.arange(3.0)
    ts = jnp.array([0.05, 0.3, 0.62, 0.97])
    loss, gradient = curve_gradient(quartic, curve, batch, ts)

    def mean_loss(control):
        whole = dataclasses.replace(curve, control=control)
        return jnp.mean(jax.vmap(lambda t: quartic(whole(t), batch))(ts))

    expected, by_autodiff = jax.value_and_grad(mean_loss)(curve.control)
    assert abs(float(loss - expected)) < 1e-12 * abs(float(expected))
    assert distance(gradient, by_autodiff) < 1e-10 * float(tree_norm(by_autodiff))


def valley(params, batch):
    """Low on the unit circle."""
    return (jnp.sum(params["w"] ** 2) - 1) ** 2 + 0 * batch.sum()


ENDS = {"w": jnp.array([-1.0, 0.1])}, {"w": jnp.array([1.0, 0.1])}
BATCHES = jnp.zeros((2, 3))


@pytest.mark.parametrize(("family", "n_bends"), [("bezier", 1), ("polychain", 3)])
def test_a_fitted_curve_avoids_the_barrier_and_keeps_its_ends(family, n_bends):
    line = init_curve(*ENDS, n_bends=n_bends, family=family)
    fit = fit_curve(valley, line, BATCHES, tx=optax.adam(0.03), steps=300, key=jax.random.key(0))
    assert fit.losses.shape == (300,)
    before, after = (eval_path(valley, curve, BATCHES).values["loss"].max() for curve in (line, fit.curve))
    assert float(before) > 0.9
    assert float(after) < 0.15
    assert same(fit.curve(0.0), ENDS[0])
    assert same(fit.curve(1.0), ENDS[1])


def test_fitting_is_a_function_of_its_key():
    def fitted(seed):
        line = init_curve(*ENDS)
        return fit_curve(valley, line, BATCHES, tx=SGD, steps=5, key=jax.random.key(seed)).curve.control["w"]

    SGD = optax.sgd(0.1)
    assert bool((fitted(0) == fitted(0)).all())
    assert not bool((fitted(0) == fitted(1)).all())


def with_error(params, batch):
    loss = quartic(params, batch)
    return {"loss": loss, "error": jnp.mean(batch > loss)}


@pytest.mark.parametrize("inner", ["map", "vmap", 3])
def test_a_path_is_evaluated_as_a_loop_would(inner, x64):
    curve, batches = curves(jnp.float64)["bezier"], jnp.arange(6.0).reshape(2, 3)
    found = eval_path(with_error, curve, batches, points=7, inner=inner)
    for k, t in enumerate(found.t):
        each = [with_error(curve(t), batch) for batch in batches]
        for name, values in found.values.items():
            assert abs(float(values[k]) - np.mean([x[name] for x in each])) < 1e-9 * abs(float(values[k]) + 1)
    np.testing.assert_allclose(found.arc_length, arc_length(curve, ts=found.t), rtol=1e-12)
    assert float(found.length_ratio) > 1


def test_a_path_that_is_a_function_is_evaluated_alike():
    curve = curves()["bezier"]
    found = eval_path(quartic, lambda t: curve(t), jnp.ones((1, 3)), points=5)
    expected = eval_path(quartic, curve, jnp.ones((1, 3)), points=5)
    np.testing.assert_allclose(found.values["loss"], expected.values["loss"], rtol=1e-6)


def test_paths_of_the_package_share_a_compiled_program_and_functions_do_not():
    a, b = points(2)
    traces = []

    def loss(params, batch):
        traces.append(None)
        return quartic(params, batch)

    makers = {
        "line": lambda c: linear_path(a, c),
        "arc": lambda c: slerp_path(a, c),
        "leaves": lambda c: leafwise_path(a, c, ["w"]),
        "constant speed": lambda c: reparametrise(init_curve(a, c), points=5),
    }
    for make in makers.values():
        eval_path(loss, make(b), jnp.ones((1, 3)), points=3)
        before = len(traces)
        eval_path(loss, make(jax.tree.map(lambda x: 2 * x, b)), jnp.ones((1, 3)), points=3)
        assert len(traces) == before
    for scale in (1.0, 2.0):
        eval_path(loss, lambda t, s=scale: jax.tree.map(lambda x: s * t * x, b), jnp.ones((1, 3)), points=3)
    assert len(traces) > before + 1


@pytest.mark.parametrize("wrap", [lambda path: path, lambda path: lambda t: path(t)])
def test_any_path_goes_at_constant_speed_through_the_same_points(wrap, x64):
    a, b = points(2, dtype=jnp.float64)
    arc = slerp_path(a, jax.tree.map(lambda x: 3 * x, b))
    even = reparametrise(wrap(arc), points=2001)
    lengths = arc_length(even, ts=jnp.linspace(0, 1, 41))
    np.testing.assert_allclose(np.diff(lengths), lengths[-1] / 40, rtol=5e-3)
    assert np.ptp(np.diff(arc_length(arc, ts=jnp.linspace(0, 1, 41)))) > 0.1 * float(lengths[-1]) / 40
    fine = arc_length(arc, ts=jnp.linspace(0, 1, 2001))
    half = jnp.interp(fine[-1] / 2, fine, jnp.linspace(0, 1, 2001))
    assert distance(even(0.5), arc(half)) < 1e-3


@pytest.mark.parametrize("ends", [(0, 1), (0, 0)])
def test_the_ratio_of_lengths_is_one_on_a_line_in_bfloat16_and_infinite_at_a_point(ends):
    two = [{"w": (1 + 0.1 * jax.random.normal(jax.random.key(s), (500,))).astype(jnp.bfloat16)} for s in (0, 1)]
    line = linear_path(*(two[i] for i in ends))
    found = eval_path(lambda p, _: p["w"].sum(), line, jnp.zeros((1, 1)), points=61)
    np.testing.assert_allclose(found.length_ratio, 1.0 if ends[0] != ends[1] else np.inf, rtol=1e-5)


def test_lengths_of_leaves_of_two_dtypes_need_no_promotion():
    a, b = ({"w": jnp.full(2, x, jnp.bfloat16), "b": jnp.full(2, x)} for x in (0.0, 1.0))
    with jax.numpy_dtype_promotion("strict"):
        for path in (linear_path(a, b), slerp_path(a, b)):
            np.testing.assert_allclose(arc_length(path)[-1], 2.0, rtol=1e-2)


def test_a_dict_of_values_is_fitted_by_its_loss():
    a, b = points(2)
    options = {"tx": optax.sgd(0.1), "steps": 2, "key": jax.random.key(0)}
    alone = fit_curve(quartic, init_curve(a, b), jnp.ones((1, 3)), **options)
    named = fit_curve(
        lambda p, x: {"other": 0 * quartic(p, x), "loss": quartic(p, x)}, init_curve(a, b), jnp.ones((1, 3)), **options
    )
    assert same(alone.curve.control, named.curve.control)


def test_statistics_are_estimated_anew_at_every_point():
    def statistics(params, batches):
        return {**params, "mean": jnp.mean(params["w"] * batches)}

    def loss(params, batch):
        return jnp.mean((params["w"] * batch - params["mean"]) ** 2)

    line = linear_path(*({"w": jnp.array(w), "mean": jnp.array(0.0)} for w in (-1.0, 1.0)))
    batches = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    found = eval_path(loss, line, batches, points=3, statistics=statistics).values["loss"]
    np.testing.assert_allclose(found, np.var([1, 2, 3, 4]) * np.array([1, 0, 1]), rtol=1e-6)


def test_an_ensemble_is_the_mean_of_probabilities():
    curve = curves()["bezier"]
    x = jax.random.normal(jax.random.key(3), (5, 3))
    ts = jnp.array([0.0, 0.4, 1.0])

    def f(params, x):
        return x @ params["w"]

    expected = sum(jax.nn.softmax(f(curve(t), x)) for t in ts) / 3
    np.testing.assert_allclose(jnp.exp(path_ensemble(f, curve, x, ts=ts)), expected, rtol=1e-5)


def test_a_plane_has_the_losses_of_its_points_and_their_distances():
    a, b, c = points(3)
    plane = loss_plane(quartic, a, b, c, jnp.ones((1, 3)), points=5, margin=0.0)
    for point, corner in zip((a, b, c), plane.corners, strict=True):
        np.testing.assert_allclose(plane.coordinates(point), corner, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(plane.corners[2] - plane.corners[1]), distance(b, c), rtol=1e-5)
    assert plane.values["loss"].shape == (5, 5)
    # a is the corner of the grid unless c lies beyond it
    k = int(jnp.argmin(jnp.abs(plane.x)))
    if abs(float(plane.x[k])) < 1e-6:
        np.testing.assert_allclose(plane.values["loss"][0, k], quartic(a, jnp.ones(3)), rtol=1e-4)


def test_a_plane_of_bfloat16_has_the_geometry_of_its_float32_and_its_losses_and_may_be_traced():
    narrow = points(3, dtype=jnp.bfloat16)
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), p) for p in narrow]
    seen = []

    def loss(params, batch):
        seen.append(params["w"].dtype)
        return quartic(params, batch.astype(params["w"].dtype)).astype(jnp.float32)

    def corners(three):
        a, b, c = three
        return loss_plane(loss, a, b, c, jnp.ones((1, 3)), points=2).corners

    np.testing.assert_allclose(jax.jit(corners)(narrow), corners(wide), rtol=1e-5, atol=1e-6)
    assert set(seen) == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}


def test_gradients_through_a_path_are_finite():
    a, b = points(2)

    def loss(a, b):
        return quartic(slerp_path(a, b)(0.5), jnp.ones(3)) + quartic(linear_path(a, b)(0.5), jnp.ones(3))

    grads = jax.jit(jax.grad(loss))(a, b)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))
