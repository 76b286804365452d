"""Claims on dropout stability and the path that it gives: every move, the certificate, epsilon, the straight line."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.geometry.dropout_line import bernoulli_masks, dropout_output_variance
from jaxft.geometry.dropout_path import DropoutPath, dropout_path, path_to_dropout, permute_live_units
from jaxft.geometry.dropout_stability import (
    DropoutStability,
    complement_masks,
    dropout_params,
    dropout_stability,
)
from jaxft.geometry.path_certificate import Certificate, path_certificate
from jaxft.geometry.paths import stack_points
from theory.claims import Evidence
from theory.mode_connectivity.networks import (
    CLASSES,
    SETTING,
    batches,
    compiled,
    cross_entropy,
    data,
    f,
    initial,
    loss,
    make_claim,
    mlp_units,
    preactivations,
    trained,
)

HIDDEN, WIDTH, DROPOUT, DRAWS = 2, 16, 0.5, 20
PARTS = 4
"""Points on each segment of a path, less one."""
WIDTHS = (8, 24, 72)
MASKS = 4000
ROUNDING = 1e-9
"""Grace of bounds that are attained."""
KEPT = 4
"""Units that the control of the claim on widths keeps, however many there are."""


class Case(NamedTuple):
    """Two networks trained with dropout, and the best masks of some draws for each: they overlap."""

    params_a: Params
    params_b: Params
    stable_a: DropoutStability
    stable_b: DropoutStability


@functools.cache
def _case(seed: int) -> Case:
    a, b = trained(seed, width=WIDTH, hidden=HIDDEN, dropout=DROPOUT)
    keys = jax.random.split(stream(jax.random.key(seed), "masks"), 2)
    found = [_stability(p, batches(seed), key, keep_frac=0.5) for p, key in zip((a, b), keys, strict=True)]
    return Case(a, b, *found)


@functools.partial(compiled, static_argnames="keep_frac")
def _stability(params: Params, batch: Any, key: jax.Array, *, keep_frac: float) -> DropoutStability:
    spec = mlp_units(len(params) - 1)
    return dropout_stability(loss, params, spec, batch, key=key, draws=DRAWS, keep_frac=keep_frac)


@functools.cache
def _path(seed: int) -> DropoutPath:
    case = _case(seed)
    spec = mlp_units(HIDDEN)
    return dropout_path(case.params_a, case.params_b, spec, case.stable_a.masks, case.stable_b.masks)


def _without_relocation(path: DropoutPath) -> DropoutPath:
    """The path whose last two moves of A, off the places of B's units, are left out."""
    return dataclasses.replace(path, moves_a=path.moves_a[:-2])


class Segments(NamedTuple):
    """What is seen on every segment, ``[segments, PARTS + 1, ...]``."""

    outputs: jax.Array
    cross_entropy: jax.Array
    squared: jax.Array


@compiled
def _segments(points: Params, batch: Any) -> Segments:
    labels = jax.nn.one_hot(batch.labels, CLASSES, dtype=batch.x.dtype)

    def at(first: Params, last: Params, u: jax.Array) -> Segments:
        outputs = f(jax.tree.map(lambda p, q: (1 - u) * p + u * q, first, last), batch.x)
        return Segments(outputs, cross_entropy(outputs, batch.labels), jnp.mean((outputs - labels) ** 2))

    us = jnp.linspace(0, 1, PARTS + 1)
    first, last = jax.tree.map(lambda p: p[:-1], points), jax.tree.map(lambda p: p[1:], points)
    return jax.lax.map(lambda pair: jax.lax.map(lambda u: at(pair[0], pair[1], u), us), (first, last))


def _seen(path: DropoutPath | list[Params], seed: int) -> Segments:
    return _segments(stack_points([jax.tree.map(jnp.asarray, p) for p in path]), data(seed))


def _setting(**more: Any) -> dict[str, Any]:
    network = f"{HIDDEN} hidden layers of {WIDTH}, trained with dropout {DROPOUT}"
    return {**SETTING, "network": network, "masks": f"best of {DRAWS}", **more}


def flat_moves(seed: int, *, relocated: bool = True) -> Evidence:
    """Outputs along the moves of dead units and of switches, against those at the start of each.

    The control writes B's units over live units of A.
    """
    path = _path(seed) if relocated else _without_relocation(_path(seed))
    flat = np.array([kind != "top" for kind in path.kinds])
    outputs = np.asarray(_seen(path, seed).outputs)[flat]
    return Evidence(outputs, np.broadcast_to(outputs[:, :1], outputs.shape), setting=_setting(moves=int(flat.sum())))


def convex_moves(seed: int, *, straight: bool = False) -> Evidence:
    """Largest excess of a loss over its chord on moves of the top layer; the control moves all layers at once."""
    path, case = _path(seed), _case(seed)
    seen = _seen([case.params_a, case.params_b] if straight else path, seed)
    top = np.array([straight or kind == "top" for kind in (path.kinds[:1] if straight else path.kinds)])
    excess = -np.inf
    for values in (np.asarray(x)[top] for x in (seen.cross_entropy, seen.squared)):
        chord = values[:, :1] + np.linspace(0, 1, PARTS + 1) * (values[:, -1:] - values[:, :1])
        excess = max(excess, float((values - chord).max()))
    return Evidence(excess, ROUNDING, setting=_setting(losses="cross-entropy, squared"))


@compiled
def _certificate(case: Case, masks_a: Any, masks_b: Any, batch: Any) -> Certificate:
    spec = mlp_units(HIDDEN)
    return path_certificate(loss, case.params_a, case.params_b, spec, masks_a, masks_b, batch)


def _certified(seed: int, masks_a: Any = None) -> Certificate:
    case = _case(seed)
    return _certificate(case, case.stable_a.masks if masks_a is None else masks_a, case.stable_b.masks, batches(seed))


def theorem_1(seed: int, *, straight: bool = False) -> Evidence:
    r"""Largest loss on the path against $\max L + \max \epsilon$; the control takes the straight line."""
    case = _case(seed)
    seen = _seen([case.params_a, case.params_b] if straight else _path(seed), seed)
    bound = float(_certified(seed).bound) + ROUNDING
    return Evidence(float(seen.cross_entropy.max()), bound, setting=_setting(segments=len(_path(seed))))


def certificate(seed: int, *, other: bool = False) -> Evidence:
    """The certificate against the largest loss on a grid over the path; the control certifies with other masks of A."""
    masks = complement_masks(_case(seed).stable_a.masks) if other else None
    grid = np.asarray(_seen(_path(seed), seed).cross_entropy)
    return Evidence(np.asarray(_certified(seed, masks).maximum), grid.max(), setting=_setting(points=grid.size))


def segments(seed: int, *, overlapping: bool = False) -> Evidence:
    """Numbers of segments for 1, 2 and 3 hidden layers; the control gives overlapping masks to the first count.

    Counted: both halves disjoint (4 H + 1); overlapping (4 H + 3); lemma 1 in short (2 H - 1) and as in the paper
    (4 H - 2, which is 6 for three layers of weights); lemma 4 (5); lemma 2, which is what the paper's path has between
    two of lemma 1 (8).
    """
    measured, predicted = [], []
    for hidden in (1, 2, 3):
        spec = mlp_units(hidden)
        a, b = (initial(seed, name, width=6, hidden=hidden) for name in ("a", "b"))
        left = {g: np.arange(6) < 3 for g in spec.groups}
        right = {g: ~mask for g, mask in left.items()}
        across = {g: np.arange(6) % 2 == 0 for g in spec.groups}
        half = path_to_dropout(a, spec, left, variant="paper")
        units = {g: np.arange(3) for g in spec.groups}
        moved = permute_live_units(half.breakpoint(len(half)), spec, units, {g: u + 2 for g, u in units.items()})
        paper = dropout_path(a, b, spec, left, across, variant="paper")
        measured.append(
            [
                len(dropout_path(a, b, spec, left, across if overlapping else right)),
                len(dropout_path(a, b, spec, left, across)),
                len(path_to_dropout(a, spec, left)),
                len(half),
                len(moved),
                len(paper) - 2 * len(half),
            ]
        )
        predicted.append([4 * hidden + 1, 4 * hidden + 3, 2 * hidden - 1, 4 * hidden - 2, 5, 8])
    return Evidence(np.array(measured, float), np.array(predicted, float), setting={"hidden": [1, 2, 3], "width": 6})


def epsilon_by_width(seed: int, *, fixed: bool = False) -> Evidence:
    """Median epsilon of networks of one hidden layer against their width; the control keeps as many units of each."""
    key, found = stream(jax.random.key(seed), "masks of widths"), []
    for width in WIDTHS:
        (params,) = trained(seed, copies=1, width=width)
        kept = KEPT / width if fixed else 0.5
        found.append(float(_stability(params, batches(seed), key, keep_frac=kept).epsilon_median))
    setting = {**SETTING, "kept": f"{KEPT} units" if fixed else "half of the units", "draws": DRAWS}
    return Evidence(np.array(found), x=np.array(WIDTHS, float), setting=setting)


def epsilon_by_training(seed: int, *, kept: float = 0.5, other: float = 0.0) -> Evidence:
    """Median epsilon with dropout in training (lesser) and without.

    The control has dropout in the training of both, and keeps fewer units of the first.
    """
    key, found = stream(jax.random.key(seed), "masks of training"), []
    for dropout, frac in ((DROPOUT, kept), (other, 0.5)):
        params = trained(seed, width=WIDTH, hidden=HIDDEN, dropout=dropout)[0]
        found.append(float(_stability(params, batches(seed), key, keep_frac=frac).epsilon_median))
    network = f"{HIDDEN} hidden layers of {WIDTH}"
    return Evidence(found[0], found[1], setting={**SETTING, "network": network, "kept": kept, "draws": DRAWS})


class Deviation(NamedTuple):
    """What random dropout does to the outputs of every example: mean square and mean norm over masks."""

    square: jax.Array
    square_stderr: jax.Array
    norm: jax.Array


@compiled
def deviation(params: Params, x: jax.Array, key: jax.Array, dropout_frac: jax.Array, layers: jax.Array) -> Deviation:
    """Dropout of the last ``layers`` hidden layers."""
    hidden = len(params) - 1
    outputs = f(params, x)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        masks = []
        for i in range(hidden):
            width = params[f"Dense_{i}"]["kernel"].shape[1]
            kept = jax.random.uniform(jax.random.fold_in(key, i), (1, width)) >= dropout_frac
            factor = jnp.where(kept, 1 / (1 - dropout_frac), 0.0)
            masks.append(jnp.where(i >= hidden - layers, factor, jnp.ones_like(factor)))
        square = ((preactivations(params, x, masks=masks)[-1] - outputs) ** 2).sum(axis=1)
        return square, jnp.sqrt(square)

    square, norm = jax.lax.map(draw, jax.random.split(key, MASKS), batch_size=100)
    # Examples share their masks: the error is that of the mean over examples.
    stderr = square.mean(axis=1).std() / np.sqrt(MASKS)
    return Deviation(square.mean(axis=0), stderr, norm.mean(axis=0))


def dropout_variance(seed: int, *, layers: int = 1) -> Evidence:
    """Mean square that dropout of the last hidden layer adds to the outputs, over the formula; or of two layers."""
    params = trained(seed, width=WIDTH, hidden=HIDDEN, dropout=DROPOUT)[0]
    x, frac = data(seed).x, 0.3
    found = deviation(params, x, stream(jax.random.key(seed), "variance"), jnp.asarray(frac), jnp.int32(layers))
    hidden = jax.nn.relu(preactivations(params, x)[-2])
    exact = dropout_output_variance(hidden, params[f"Dense_{HIDDEN}"]["kernel"], dropout_frac=frac).mean()
    setting = _setting(masks=MASKS, dropout=frac, dropped_layers=layers)
    return Evidence(float(found.square.mean() / exact), 1.0, stderr=float(found.square_stderr / exact), setting=setting)


def dropout_scale(seed: int, *, power: float = 0.5) -> Evidence:
    r"""Mean norm of the change of the outputs over $(p / (1 - p))^{1/2}$, at p = 0.5 over that at p = 0.1.

    The control takes another power.
    """
    params = trained(seed, width=WIDTH, hidden=HIDDEN, dropout=DROPOUT)[0]
    key, scaled = stream(jax.random.key(seed), "scale"), []
    for p in (0.1, 0.5):
        found = deviation(params, data(seed).x, key, jnp.asarray(p), jnp.int32(HIDDEN))
        scaled.append(float(found.norm.mean()) / (p / (1 - p)) ** power)
    return Evidence(scaled[1] / scaled[0], 1.0, setting=_setting(masks=MASKS, dropped_layers=HIDDEN))


def dropout_line_shape(seed: int, *, other: bool = False) -> Evidence:
    """Largest loss within the straight line to a dropout network, against its ends and 5 % of their difference.

    The median of the draws. The control goes to another network instead.
    """
    case, spec = _case(seed), mlp_units(HIDDEN)
    masks = bernoulli_masks(case.params_a, spec, key=stream(jax.random.key(seed), "line"), dropout_frac=0.25, draws=9)
    excess = []
    for i in range(9):
        draw = {g: m[i] for g, m in masks.items()}
        end = case.params_b if other else dropout_params(case.params_a, spec, draw, rescale=1 / 0.75)
        values = np.asarray(_seen([case.params_a, end], seed).cross_entropy)[0]
        rise = abs(values[-1] - values[0])
        excess.append((values[1:-1].max() - max(values[0], values[-1])) / rise)
    return Evidence(float(np.median(excess)), 0.05, setting=_setting(dropout=0.25, draws=9, unit="of the rise"))


CLAIMS = (
    make_claim(
        "flat-moves",
        "Rewriting rows of dead units, or switching outgoing weights to a copy of a unit, leaves all outputs as is.",
        "theorem 1, lemma 4",
        "identity",
        flat_moves,
        {"relocated": False},
        "B's units are written over live units of A",
        seeds=2,
    ),
    make_claim(
        "convex-moves",
        "While the top layer alone moves, cross-entropy and squared loss lie below their chord.",
        "lemma 1",
        "bound",
        convex_moves,
        {"straight": True},
        "all layers move at once",
        seeds=2,
    ),
    make_claim(
        "theorem-1",
        "The loss on the path is at most the larger loss of its ends plus epsilon.",
        "theorem 1",
        "bound",
        theorem_1,
        {"straight": True},
        "the straight line in place of the path",
        seeds=3,
    ),
    make_claim(
        "certificate",
        "The largest loss on the path is the largest of 2 H + 2: of both ends and of their dropout networks.",
        "theorem 1",
        "identity",
        certificate,
        {"other": True},
        "the dropout networks keep other units than the path",
        seeds=2,
    ),
    make_claim(
        "segments",
        "Paths have as many segments as the constructions say: linear in depth.",
        "theorem 1, lemmas 1, 2 and 4",
        "identity",
        segments,
        {"overlapping": True},
        "kept units of A and B overlap",
    ),
    make_claim(
        "epsilon-by-width",
        "Epsilon of networks trained without dropout falls with their width.",
        "section 5; cf. arXiv 1912.10095",
        "association",
        epsilon_by_width,
        {"fixed": True},
        "as many units are kept, whatever the width",
        sign=-1.0,
        seeds=3,
        max_seeds=6,
    ),
    make_claim(
        "epsilon-by-training",
        "Epsilon of networks trained with dropout is less than without.",
        "section 5",
        "ordering",
        epsilon_by_training,
        {"kept": 0.125, "other": DROPOUT},
        "both are trained with dropout; an eighth of the units is kept, and half",
        seeds=3,
        max_seeds=6,
    ),
    make_claim(
        "dropout-variance",
        "Dropout of one hidden layer adds p / (1 - p) sum_j phi_j^2 |W_j|^2 to the mean square of the outputs.",
        "cf. lemma 3",
        "equality",
        dropout_variance,
        {"layers": 2},
        "two layers are dropped",
        tolerance=0.1,
    ),
    make_claim(
        "dropout-scale",
        "The change of the outputs of a deeper network grows as sqrt(p / (1 - p)), to 15 %.",
        "lemma 3",
        "equality",
        dropout_scale,
        {"power": 1.0},
        "growth as p / (1 - p)",
        tolerance=0.15,
        seeds=3,
    ),
    make_claim(
        "dropout-line",
        "On the straight line to a dropout network the loss rises without a bump.",
        "lemma 3",
        "bound",
        dropout_line_shape,
        {"other": True},
        "the line leads to another network",
        seeds=2,
    ),
)
