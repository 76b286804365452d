r"""Two global minima that no path of low loss connects, and the barrier that one more hidden unit removes.

A two-layer ReLU network $f(x) = \sum_{j \le h} a_j \operatorname{relu}(w_j \cdot x)$ sees $n = 3h$ examples
$x = (s, \tau, 1)$: the vertices of a regular h-gon at $\tau = 0$, labelled 1, and the midpoints of its edges lifted to
$\tau = \pm 1$, labelled 0. Teacher A uses two units of both signs; B uses h units, all with $a_j > 0$, one a vertex.

On a path from B to A there is a first time when some $a_j$ is 0 and none is negative: a sum of h - 1 convex units.
A linear function on the vertices of a polygon rises and falls once around it, so a unit is bounded by its value at an
adjacent midpoint at every vertex but the one where it is largest. Some vertex is where no unit is largest, and there
$s = f(p) \le f(m_L) + f(m_R)$, which is at most half the sum over the four lifted midpoints. So the sum of squared
errors is at least $(1 - s)^2 + s^2 \ge 1/2$, and every path reaches a mean squared error of $1 / (6h)$. This is our
example for the theorem, with a barrier that is proved; the authors' data is another.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import relu

from jaxft.core.rng import host_stream
from jaxft.core.types import Params
from jaxft.train import make_optimizer
from theory.claims import Evidence
from theory.mode_connectivity.networks import make_claim

SIDES = (3, 4)
UNITS = 5
"""Networks and data of all polygons are padded to one size: what is compiled is compiled once."""
STARTS, BENDS, STEPS, RATE = 4, 9, 1500, 0.03
SAMPLES, FINE = 6, 7
"""Points of a segment that are descended on, and how many times as many are looked at in the end."""
RESTARTS, RESTART_STEPS = 64, 1000
CONNECTED = 0.01
"""A barrier below this is none: a fifth of the least that is proved for a triangle."""


class Polygon(NamedTuple):
    """The data, and two networks without error on it."""

    x: np.ndarray
    y: np.ndarray
    a: Params
    b: Params


def polygon_counterexample(h: int, *, offset: float | None = None) -> Polygon:
    """The data of the h-gon with the networks of h hidden units, ``w`` of ``[h, 4]`` and ``a`` of ``[h]``.

    ``offset`` is that of the units of B, the squared cosine of half the angle of a side by default.
    """
    angle = 2 * np.pi * np.arange(h) / h
    vertices = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    middles = (vertices + np.roll(vertices, -1, axis=0)) / 2
    places = np.concatenate([vertices, middles, middles])
    lift = np.repeat([0.0, 1.0, -1.0], h)
    x = np.column_stack([places, lift, np.ones(3 * h)])
    teacher = np.zeros((h, 4))
    teacher[0], teacher[1] = (0, 0, 1, 1), (0, 0, 2, 0)
    c = np.cos(np.pi / h) ** 2 if offset is None else offset
    student = np.column_stack([vertices, np.zeros(h), np.full(h, -c)]) / (1 - c)
    return Polygon(
        x,
        np.repeat([1.0, 0.0, 0.0], h),
        {"w": teacher, "a": np.array([1.0, -1.0] + [0.0] * (h - 2))},
        {"w": student, "a": np.ones(h)},
    )


def f(params: Params, x: Any) -> jax.Array:
    """Outputs ``[n]``."""
    return relu(x @ params["w"].T) @ params["a"]


class Case(NamedTuple):
    """A polygon padded to the common size: examples by weights, units by the ``present``."""

    x: Any
    y: Any
    weights: Any
    present: Any


def mean_squared_error(params: Params, case: Case) -> jax.Array:
    """Of the examples of the polygon, by the units that are present."""
    errors = f({"w": params["w"], "a": params["a"] * case.present}, case.x) - case.y
    return case.weights @ errors**2


@functools.cache
def _case(h: int, units: int) -> tuple[Case, Params, Params]:
    polygon, rows = polygon_counterexample(h), 3 * max(SIDES)
    pad = lambda array, size: np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))  # noqa: E731
    ends = (jax.tree.map(lambda leaf: pad(leaf, UNITS), end) for end in (polygon.a, polygon.b))
    weights = pad(np.full(3 * h, 1 / (3 * h)), rows)
    present = (np.arange(UNITS) < units).astype(float)
    return (Case(pad(polygon.x, rows), pad(polygon.y, rows), weights, present), *ends)


@functools.cache
def path_maximum(seed: int, h: int, *, spare: int = 0) -> float:
    """The least maximum of the loss that was found on a path from A to B in networks of ``h + spare`` units.

    The best of a few chains of segments, each fitted by descent on a smooth maximum over its points.
    """
    case, a, b = _case(h, h + spare)
    t = np.linspace(0, 1, BENDS + 2)
    draw = host_stream(seed, "polygon", h)
    noise = jax.tree.map(lambda leaf: draw.normal(size=(STARTS, BENDS + 2, *leaf.shape)), a)

    def start(x: np.ndarray, y: np.ndarray, e: np.ndarray) -> np.ndarray:
        u, wave = (v.reshape(-1, *[1] * x.ndim) for v in (t, np.sin(np.pi * t)))
        return (1 - u) * x + u * y + 0.5 * wave * e

    return float(np.min(_fit_paths(jax.tree.map(start, a, b, noise), case)))


@jax.jit
def _fit_paths(starts: Params, case: Case) -> jax.Array:
    """The maximum of the loss on each path after its fit."""
    tx = make_optimizer("adam", RATE)

    def losses(control: Params, samples: int = SAMPLES) -> jax.Array:
        def along(x: jax.Array) -> jax.Array:
            v = (jnp.arange(samples) / samples).reshape(1, -1, *[1] * (x.ndim - 1))
            return ((1 - v) * x[:-1, None] + v * x[1:, None]).reshape(-1, *x.shape[1:])

        return jax.vmap(mean_squared_error, (0, None))(jax.tree.map(along, control), case)

    def fit(control: Params) -> jax.Array:
        def step(carry: Any, count: jax.Array) -> tuple[Any, None]:
            control, state = carry
            sharpness = 30 * 20 ** (count / STEPS)
            smooth = lambda c: jax.nn.logsumexp(sharpness * losses(c)) / sharpness  # noqa: E731
            grads = jax.tree.map(lambda g: g.at[0].set(0).at[-1].set(0), jax.grad(smooth)(control))
            updates, state = tx.update(grads, state, control)
            rate = 1 - count / STEPS
            return (jax.tree.map(lambda p, g: p + rate * g, control, updates), state), None

        (control, _), _ = jax.lax.scan(step, (control, tx.init(control)), jnp.arange(STEPS))
        return losses(control, FINE * SAMPLES).max()

    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        return jax.vmap(fit)(starts)


@functools.cache
def least_error(seed: int, h: int, units: int) -> float:
    """The least mean squared error that was found of a sum of so many units with positive coefficients."""
    case, _, _ = _case(h, units)
    starts = host_stream(seed, "restarts", h).normal(size=(RESTARTS, UNITS, 4))
    return float(np.min(_fit_sums(starts, case)))


@jax.jit
def _fit_sums(starts: jax.Array, case: Case) -> jax.Array:
    """Errors after descent; positive coefficients are taken into the weights, as a ReLU allows."""
    tx = make_optimizer("adam", RATE)
    error = lambda w: mean_squared_error({"w": w, "a": jnp.ones(UNITS, w.dtype)}, case)  # noqa: E731

    def fit(w: jax.Array) -> jax.Array:
        def step(carry: Any, count: jax.Array) -> tuple[Any, None]:
            w, state = carry
            updates, state = tx.update(jax.grad(error)(w), state, w)
            rate = 1 - count / RESTART_STEPS
            return (jax.tree.map(lambda p, g: p + rate * g, w, updates), state), None

        return error(jax.lax.scan(step, (w, tx.init(w)), jnp.arange(RESTART_STEPS))[0][0])

    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        return jax.vmap(fit)(starts)


def ends_fit(seed: int, *, offset: float | None = None) -> Evidence:
    """Outputs of both networks on the data; the control puts the units of B nearer to the centre."""
    cases = [polygon_counterexample(h, offset=offset) for h in (*SIDES, 7)]
    measured = np.concatenate([np.asarray(f(end, case.x)) for case in cases for end in (case.a, case.b)])
    labels = np.concatenate([case.y for case in cases for _ in range(2)])
    return Evidence(measured, labels, setting={"sides": [*SIDES, 7]})


def barrier(seed: int, *, spare: int = 0) -> Evidence:
    """The loss that every path is proved to reach, over the greatest of the path found: 1 bounds the ratio.

    The control has a unit more than the polygon has sides.
    """
    ratios = [1 / (6 * h) / path_maximum(seed, h, spare=spare) for h in SIDES]
    setting = {"sides": SIDES, "path_maxima": [path_maximum(seed, h, spare=spare) for h in SIDES]}
    return Evidence(max(ratios), 1.0, setting=setting)


def spare_unit(seed: int, *, spare: int = 1) -> Evidence:
    """The greatest loss on the best path found with a spare unit; the control has none."""
    maxima = [path_maximum(seed, h, spare=spare) for h in SIDES]
    return Evidence(max(maxima), CONNECTED, setting={"sides": SIDES, "path_maxima": maxima})


def fewer_units(seed: int, *, missing: int = 1) -> Evidence:
    """Least error of positive sums of one unit fewer than sides, times 3h; the control misses none."""
    return Evidence(float(np.mean([3 * h * least_error(seed, h, h - missing) for h in SIDES])), 1.0)


CLAIMS = (
    make_claim(
        "polygon-minima",
        "Two units of both signs, and one positive unit a vertex, both fit the polygon without error.",
        "cf. theorem 4",
        "identity",
        ends_fit,
        {"offset": 0.2},
        "the units of B do not vanish on the midpoints",
    ),
    make_claim(
        "polygon-barrier",
        "In networks of h units every path between the two minima reaches a loss of 1 / (6h): the ratio of this to the "
        "greatest loss on the best path found stays below 1.",
        "cf. theorem 4",
        "bound",
        barrier,
        {"spare": 1},
        "a hidden unit to spare",
        seeds=3,
    ),
    make_claim(
        "polygon-spare-unit",
        "With one hidden unit more, a path of a loss below 0.01 connects the two minima.",
        "cf. theorem 4",
        "bound",
        spare_unit,
        {"spare": 0},
        "no hidden unit to spare",
        seeds=3,
    ),
    make_claim(
        "polygon-fewer-units",
        "The least loss of h - 1 units with positive coefficients is 1 / (3h), which every path reaches too.",
        "cf. theorem 4",
        "equality",
        fewer_units,
        {"missing": 0},
        "as many units as vertices",
        tolerance=1e-3,
    ),
)
