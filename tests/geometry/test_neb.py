"""Bands on a landscape of two dimensions whose saddles are found by Newton's method."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.geometry.auto_neb import auto_neb
from jaxft.geometry.neb import fit_neb
from jaxft.geometry.paths import Curve, arc_length, polychain

SCALE = np.array([-2.0, -1.0, -1.7, 0.15])
XX, XY, YY = np.array([-1, -1, -6.5, 0.7]), np.array([0, 0, 11, 0.6]), np.array([-10, -10, -6.5, 0.7])
CENTRES = np.array([[1, 0], [0, 0.5], [-0.5, 1.5], [-1, 1]])
NO_DATA = np.zeros((1, 1), np.float32)


def energy(w):
    """The surface of Müller and Brown 1979, over 100: two deep minima and a curved valley between them."""
    x, y = (w[None] - jnp.asarray(CENTRES, w.dtype)).T
    xx, xy, yy = (jnp.asarray(c, w.dtype) for c in (XX, XY, YY))
    return (jnp.asarray(SCALE, w.dtype) * jnp.exp(xx * x**2 + xy * x * y + yy * y**2)).sum()


def surface(params, batch):
    """Of parameters in two leaves."""
    return energy(jnp.concatenate([params["x"], params["y"]]))


def point(w):
    return {"x": jnp.asarray(w[:1]), "y": jnp.asarray(w[1:])}


@functools.cache
def stationary(*near):
    """The stationary point near a guess, by Newton's method, and the eigenvalues of its Hessian."""
    with jax.enable_x64(True):
        w = jnp.array(near)
        step = jax.jit(lambda w: w - jnp.linalg.solve(jax.hessian(energy)(w), jax.grad(energy)(w)))
        for _ in range(30):
            w = step(w)
        return w, np.linalg.eigvalsh(jax.jit(jax.hessian(energy))(w))


@pytest.fixture
def minima(x64):
    ends = [stationary(-0.56, 1.44), stationary(0.62, 0.03)]
    assert all((values > 0).all() for _, values in ends)
    return tuple(point(w) for w, _ in ends)


@pytest.fixture
def saddle(x64):
    w, values = stationary(-0.82, 0.62)
    assert values[0] < 0 < values[1]
    return float(energy(w))


def band(ends, loss=surface, **options):
    a, b = ends
    return fit_neb(loss, a, b, NO_DATA, **{"tx": optax.sgd(0.02), **options})


@pytest.mark.parametrize("spring", [None, 5.0])
def test_band_finds_the_saddle(minima, saddle, spring):
    line = max(float(surface(polychain(minima)(t), None)) for t in np.linspace(0, 1, 50))
    fit = band(minima, steps=1500, pivots=15, spring=spring)
    assert line > saddle + 0.5
    assert abs(float(fit.saddle) - saddle) < 1e-2
    assert abs(float(fit.losses[-1]) - saddle) < 1e-2


@pytest.mark.parametrize("spring", [None, 5.0])
def test_climbing_pivot_reaches_the_saddle_itself(minima, saddle, spring):
    options = {"steps": 2000, "pivots": 9, "spring": spring}
    fit = band(minima, climb_after=500, **options)
    rough = band(minima, **options)
    assert abs(float(fit.saddle) - saddle) < 1e-6 < abs(float(rough.saddle) - saddle)


def test_ends_stay_bit_exact(minima):
    fit = band(minima, tx=optax.adam(0.01), steps=5)
    for t, end in zip((0.0, 1.0), minima, strict=True):
        found = fit.path(t)
        assert all(np.array_equal(found[k], end[k]) for k in end)


def test_string_has_pivots_at_equal_distances_and_springs_nearly_so(minima):
    def unevenness(**options):
        fit = band(minima, steps=500, pivots=9, **options)
        chords = np.diff(np.asarray(arc_length(fit.path, ts=jnp.linspace(0, 1, 11))))
        return float(np.ptp(chords) / chords.mean())

    # The chords of equal arcs of a bent chain differ in the second order of its bends.
    assert unevenness() < 0.02
    assert unevenness(spring=5.0) < 0.2
    assert unevenness(spring=1e-6) > 0.4


def test_pivots_of_a_start_keep_their_relative_distances(minima):
    line, places = polychain(minima), np.array([0.0, 0.1, 0.2, 0.6, 1.0])
    start = polychain([minima[0], *(line(t) for t in places[1:-1]), minima[1]])
    fit = band(minima, tx=optax.sgd(1e-4), steps=20, start=start)
    lengths = np.asarray(arc_length(fit.path, ts=jnp.linspace(0, 1, 5)))
    np.testing.assert_allclose(lengths / lengths[-1], places, atol=0.01)


def test_gradient_along_the_band_does_not_move_it(x64):
    """On a slope along the line between the ends a pivot stays, whichever the optimiser's step."""

    def slope(params, batch):
        return params["w"][0] + 0.5 * params["w"][1] ** 2

    a, b = ({"w": jnp.array([x, 0.0])} for x in (0.0, 1.0))
    fit = fit_neb(slope, a, b, NO_DATA, tx=optax.sgd(0.1), steps=50, pivots=3, spring=1.0)
    np.testing.assert_allclose(fit.path.control["w"], [[k / 4, 0] for k in range(5)], atol=1e-12)


def published_force(points, losses, grads, i):
    """Equations 8 to 11 of Henkelman and Jonsson 2000, for one pivot, without its springs."""
    ahead, behind = points[i + 1] - points[i], points[i] - points[i - 1]
    before, here, after = losses[i - 1 : i + 2]
    if after > here > before:
        tangent = ahead
    elif after < here < before:
        tangent = behind
    else:
        high, low = max(abs(after - here), abs(before - here)), min(abs(after - here), abs(before - here))
        tangent = ahead * high + behind * low if after > before else ahead * low + behind * high
    tangent = tangent / np.linalg.norm(tangent)
    return -grads[i] + (grads[i] @ tangent) * tangent


def test_a_step_is_along_the_published_force(x64):
    draw = np.random.default_rng(0)
    points = np.cumsum(draw.normal(size=(9, 3)), axis=0)

    def waves(params, batch):
        return jnp.sin(2 * params["w"]).sum() + 0.1 * params["w"][0] ** 2

    start = polychain([{"w": jnp.asarray(p)} for p in points])
    losses, grads = jax.vmap(jax.value_and_grad(waves), (0, None))(start.control, None)
    losses, grads = np.asarray(losses), np.asarray(grads["w"])
    kinds = np.sign(np.diff(losses))
    assert set(itertools.pairwise(kinds.tolist())) >= {(1, 1), (-1, -1), (1, -1), (-1, 1)}
    # Springs are at rest at the distances of the start.
    fit = fit_neb(waves, start(0.0), start(1.0), NO_DATA, tx=optax.sgd(1e-3), steps=1, start=start, spring=2.0)
    moved = (np.asarray(fit.path.control["w"]) - points)[1:-1] / 1e-3
    np.testing.assert_allclose(moved, [published_force(points, losses, grads, i) for i in range(1, 8)], atol=1e-9)


def test_all_pivots_see_one_batch_and_losses_are_means_over_batches(x64):
    """Of two batches that pull a pivot in opposite directions: a step each, from the gradient of that batch alone."""

    def loss(params, batch):
        return jnp.sum(batch * params["w"][1]) + 0.0 * params["w"][0]

    a, b = ({"w": jnp.array([x, 0.0])} for x in (0.0, 1.0))
    batches = jnp.array([[1.0], [-3.0], [5.0]])
    fits = [fit_neb(loss, a, b, batches, tx=optax.sgd(0.1), steps=n, pivots=1) for n in (1, 2)]
    heights = [float(fit.path.control["w"][1, 1]) for fit in fits]
    np.testing.assert_allclose(heights, [-0.1, 0.2], atol=1e-12)
    np.testing.assert_allclose(fits[1].pivot_losses, [0, 0.2 * 1.0, 0], atol=1e-12)


def test_dict_of_values_gives_its_loss(minima):
    options = {"steps": 5}
    plain = band(minima, **options)
    named = band(minima, lambda p, x: {"loss": surface(p, x), "other": 0.0}, **options)
    np.testing.assert_array_equal(plain.pivot_losses, named.pivot_losses)


def test_auto_neb_comes_nearer_to_the_saddle_than_a_band_of_its_first_pivots(minima, saddle):
    schedule = [(optax.sgd(0.02), 400)] * 3
    fit = auto_neb(surface, minima[0], minima[1], NO_DATA, schedule=schedule, pivots=1, insertions=2)
    coarse = auto_neb(surface, minima[0], minima[1], NO_DATA, schedule=schedule, pivots=1, insertions=0)
    assert coarse.pivots == (1, 1, 1)
    assert fit.pivots[0] == 1 < fit.pivots[1] <= 3 < fit.pivots[2] <= 5
    assert len(fit.losses) == 1200
    assert abs(fit.saddle - saddle) < 0.2 * (coarse.saddle - saddle)
    again = jax.jit(jax.vmap(lambda t: surface(fit.path(t), None)))(jnp.asarray(fit.t))
    np.testing.assert_allclose(fit.path_losses, again, atol=1e-10)


def test_pivots_are_inserted_at_the_greatest_excess(x64):
    """A bump in the second of two gaps, and a threshold that it does or does not exceed."""

    def bump(params, batch):
        return jnp.exp(-(((params["w"][0] - 0.75) / 0.05) ** 2))

    a, b = ({"w": jnp.array([x, 0.0])} for x in (0.0, 1.0))
    frozen = [(optax.sgd(0.0), 1)] * 2
    fit = auto_neb(bump, a, b, NO_DATA, schedule=frozen, pivots=1)
    np.testing.assert_allclose(fit.path.control["w"][:, 0], [0, 0.5, 0.75, 1], atol=1e-12)
    assert auto_neb(bump, a, b, NO_DATA, schedule=frozen, pivots=1, threshold=1.0).pivots == (1, 1)


def test_fit_runs_in_float32_and_bfloat16_without_promotion():
    for dtype in (jnp.float32, jnp.bfloat16):
        a, b = ({"w": jnp.array([x, 0.5], dtype)} for x in (-1.0, 1.0))
        fit = fit_neb(lambda p, x: jnp.square((p["w"] ** 2).sum() - 1), a, b, NO_DATA, tx=optax.sgd(0.1), steps=3)
        assert isinstance(fit.path, Curve)
        assert fit.path.control["w"].dtype == dtype
