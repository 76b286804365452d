"""Claims on curves and bands between trained networks: ends, gradients, speed, and the barriers that they avoid."""

import functools
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream
from jaxft.core.types import Params
from jaxft.geometry.curves import curve_gradient, fit_curve
from jaxft.geometry.minimax_tree import minimax_tree
from jaxft.geometry.neb import fit_neb
from jaxft.geometry.paths import Curve, arc_length, init_curve, linear_path, polychain, reparametrise, unstack_points
from jaxft.train import make_optimizer
from theory.claims import Evidence
from theory.mode_connectivity.networks import (
    CLASSES,
    SETTING,
    Batch,
    batches,
    compiled,
    data,
    flat,
    loss,
    make_claim,
    trained,
)

COPIES, WIDTH, HIDDEN = 3, 16, 2
STEPS, RATE, PIVOTS = 200, 0.02, 5
POINTS = 4 * (PIVOTS + 1) + 1
"""Points of a path that are looked at, all pivots among them."""
NETWORKS = {**SETTING, "network": f"{HIDDEN} hidden layers of {WIDTH}"}


def _networks(seed: int) -> list[Params]:
    return trained(seed, copies=COPIES, width=WIDTH, hidden=HIDDEN)


def _free(seed: int, family: Any, *, n_bends: int) -> Curve:
    """A curve of random control points with two leaves."""
    draw = host_stream(seed, family, n_bends)
    shapes = {"w": (n_bends + 2, 3, 2), "b": (n_bends + 2, 2)}
    return Curve({name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}, family)


def _bent(seed: int) -> Curve:
    """A Bézier curve between two networks whose interior points lie off the line."""
    draw, places = host_stream(seed, "bends"), np.linspace(0, 1, 5)

    def bent(a: Any, b: Any) -> jax.Array:
        t = places.reshape(-1, *[1] * a.ndim)
        return jnp.asarray((1 - t) * np.asarray(a) + t * np.asarray(b) + 0.3 * draw.normal(size=(5, *a.shape)))

    return Curve(jax.tree.map(bent, *_networks(seed)[:2]), "bezier")


@compiled
def _at(curves: tuple[Curve, ...], t: jax.Array) -> list[Params]:
    return [curve(t) for curve in curves]


def ends(seed: int, *, inside: float = 0.0) -> Evidence:
    """Curves at their ends, against their first and last control points; the control stops short of the ends."""
    curves = (_free(seed, "polychain", n_bends=3), *(_free(seed, "bezier", n_bends=n) for n in (1, 3, 6)))
    found = flat(_at(curves, jnp.asarray(inside)), _at(curves, jnp.asarray(1 - inside)))
    control = [[jax.tree.map(lambda c, i=i: c[i], curve.control) for curve in curves] for i in (0, -1)]
    return Evidence(found, flat(control), setting={"degrees": [2, 4, 7], "segments": 4})


def weights(seed: int, *, raised: int = 0) -> Evidence:
    """Weights of the control points of a Bézier curve, against Bernstein polynomials; the control raises the degree."""
    ts, n = host_stream(seed, "t").random(5), 4
    measured = jax.vmap(_free(seed, "bezier", n_bends=n - 1).weights)(jnp.asarray(ts))
    k, t = np.arange(n + 1)[None], ts[:, None]
    binomials = np.array([[comb(n, i) for i in range(n + 1)]], float)
    return Evidence(np.asarray(measured), binomials * t ** (k + raised) * (1 - t) ** (n - k), setting={"degree": n})


@compiled
def _gradients(curve: Curve, batch: Batch, ts: jax.Array) -> tuple[Params, Params, Params]:
    """By differentiation of the curve, by the library's sum, and by a sum with the weights of a chain of segments."""

    def mean_loss(control: Params) -> jax.Array:
        return jax.lax.map(lambda t: loss(Curve(control, curve.family)(t), batch), ts).mean()

    points = jax.lax.map(lambda t: jax.grad(loss)(curve(t), batch), ts)
    wrong = jax.vmap(Curve(curve.control, "polychain").weights)(ts)
    summed = jax.tree.map(lambda g: jnp.tensordot(wrong.T, g, 1) / len(ts), points)
    return jax.grad(mean_loss)(curve.control), curve_gradient(loss, curve, batch, ts)[1], summed


def gradient(seed: int, *, other_weights: bool = False) -> Evidence:
    r"""Gradient of the mean loss on a Bézier curve by its control points, against $\sum_t w_k(t) \nabla L(\theta(t))$.

    The control takes the weights of a chain of segments.
    """
    ts = jnp.asarray(host_stream(seed, "t").random(3))
    found, right, wrong = _gradients(_bent(seed), data(seed), ts)
    return Evidence(flat(found), flat(wrong if other_weights else right), setting=NETWORKS)


def speed(seed: int, *, reparametrised: bool = True) -> Evidence:
    """Length behind each point of a chain at constant speed, as a part of the whole; the control keeps its t."""
    curve = _free(seed, "polychain", n_bends=4)
    path = reparametrise(curve)
    # Knots of both among the values of t: the length of a chain is that of its chords, if these meet its corners.
    assert isinstance(path, Curve)
    assert path.knots is not None
    ts = np.unique(np.concatenate([np.linspace(0, 1, 16), np.asarray(path.knots)]))
    lengths = np.asarray(arc_length(path if reparametrised else curve, ts=jnp.asarray(ts)))
    return Evidence(lengths / lengths[-1], ts, setting={"segments": 5})


def _batches(seed: int, shift: int) -> Batch:
    """The training set, every class called by another name where ``shift`` is not 0."""
    whole = batches(seed)
    return Batch(whole.x, (whole.labels + shift) % CLASSES)


@functools.cache
def _transform() -> Any:
    return make_optimizer("adam", RATE)


@compiled
def _points(path: Curve, ts: jax.Array) -> Params:
    return jax.vmap(path)(ts)


@compiled
def _losses(points: Params, batch: Batch) -> jax.Array:
    return jax.lax.map(lambda p: loss(p, batch), points)


def _maximum(seed: int, path: Curve, start: float = 0.0, stop: float = 1.0) -> float:
    """The greatest loss on a part of a path."""
    return float(_losses(_points(path, jnp.linspace(start, stop, POINTS)), data(seed)).max())


def bezier(seed: int, *, shift: int = 0) -> Evidence:
    """Greatest loss on the line between two networks, and on a curve with one bend; the control fits other labels."""
    a, b = _networks(seed)[:2]
    options = {"tx": _transform(), "steps": STEPS, "key": jax.random.key(seed)}
    fit = fit_curve(loss, init_curve(a, b), _batches(seed, shift), **options)
    return Evidence(_maximum(seed, fit.curve), _maximum(seed, linear_path(a, b)), setting=NETWORKS)


@functools.cache
def _band(seed: int, i: int, j: int, shift: int = 0) -> Curve:
    points = _networks(seed)
    options = {"tx": _transform(), "steps": STEPS, "pivots": PIVOTS}
    return fit_neb(loss, points[i], points[j], _batches(seed, shift), **options).path


def band(seed: int, *, shift: int = 0) -> Evidence:
    """Greatest loss on the line between two networks, and on an elastic band; the control fits other labels."""
    line = _maximum(seed, linear_path(*_networks(seed)[:2]))
    return Evidence(_maximum(seed, _band(seed, 0, 1, shift)), line, setting=NETWORKS)


def ultrametric(seed: int, *, reverse: bool = False) -> Evidence:
    """Greatest loss on two bands in a row, against the bottleneck of a tree of three minima that knows these two.

    The control runs through the second band from its wrong end, so that a straight jump joins them.
    """
    first, second = _band(seed, 0, 1), _band(seed, 1, 2)
    saddles = np.full((3, 3), np.inf)
    for (i, j), path in (((0, 1), first), ((1, 2), second)):
        saddles[i, j] = saddles[j, i] = _maximum(seed, path)
    np.fill_diagonal(saddles, 0.0)
    after = unstack_points(second.control)
    joined = polychain([*unstack_points(first.control), *(after[::-1] if reverse else after[1:])])
    middle = (PIVOTS + 1) / (joined.n_points - 1)
    found = max(_maximum(seed, joined, 0.0, middle), _maximum(seed, joined, middle, 1.0))
    bottleneck = minimax_tree(saddles).bottleneck[0, 2]
    return Evidence(np.array([found]), np.array([bottleneck]), setting=NETWORKS)


CLAIMS = (
    make_claim(
        "curve-ends",
        "At t = 0 and t = 1 chains and Bézier curves of any degree are the networks at their ends, bit by bit.",
        "cf. arXiv 1802.10026, section 3.2",
        "identity",
        ends,
        {"inside": 1e-9},
        "t is next to the ends",
        tolerance=0.0,
    ),
    make_claim(
        "bezier-weights",
        "The control points of a Bézier curve weigh as much as the Bernstein polynomials say.",
        "arXiv 1802.10026, section 3.2",
        "identity",
        weights,
        {"raised": 1},
        "polynomials of another degree",
    ),
    make_claim(
        "curve-gradient",
        "The gradient by a control point is the sum of the gradients of the points of the curve, times its weights.",
        "arXiv 1802.10026, equation 2",
        "identity",
        gradient,
        {"other_weights": True},
        "weights of another family of curves",
    ),
    make_claim(
        "constant-speed",
        "Behind the point at s of a reparametrised chain lies the part s of its length.",
        "cf. arXiv 1802.10026, section 3.2",
        "identity",
        speed,
        {"reparametrised": False},
        "the chain keeps its own t",
    ),
    make_claim(
        "bezier-connects",
        "A Bézier curve with one bend passes below the barrier of the straight line between trained networks.",
        "arXiv 1802.10026, section 4",
        "ordering",
        bezier,
        {"shift": 1},
        "the curve is fitted to other labels",
        seeds=3,
        max_seeds=6,
    ),
    make_claim(
        "band-connects",
        "An elastic band passes below the barrier of the straight line between trained networks.",
        "arXiv 1803.00885, section 4",
        "ordering",
        band,
        {"shift": 1},
        "the band is fitted to other labels",
        seeds=3,
        max_seeds=6,
    ),
    make_claim(
        "saddles-are-ultrametric",
        "Two paths in a row rise as high as the higher of them, which is the bottleneck of the tree of minima.",
        "arXiv 1803.00885, section 3",
        "identity",
        ultrametric,
        {"reverse": True},
        "the paths do not meet",
        tolerance=1e-6,
    ),
)
