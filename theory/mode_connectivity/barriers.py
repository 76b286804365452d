"""Claims on barriers: what concatenation, convexity and linear features say of the loss between two networks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream, stream
from jaxft.core.types import Params
from jaxft.geometry import (
    Curve,
    convexity_gap,
    eval_path,
    feature_connectivity,
    fit_curve,
    init_curve,
    interpolate,
    leafwise_path,
    linear_path,
    loss_barrier,
)
from jaxft.geometry.barriers import Baseline
from jaxft.train import make_optimizer
from theory.claims import Evidence
from theory.mode_connectivity.networks import (
    CLASSES,
    INPUTS,
    SETTING,
    Batch,
    accuracy,
    batches,
    data,
    f,
    loss,
    make_claim,
    trained,
)

POINTS = 21
FIT_STEPS, FIT_RATE = 150, 0.03
LAYERS = 3
"""Matrices of the linear networks."""


def measures(params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Loss and error of a batch."""
    return {"loss": loss(params, batch), "error": 1 - accuracy(params, batch)}


@functools.cache
def _optimizer():
    return make_optimizer("adam", FIT_RATE)


def three_networks(seed: int) -> list[Params]:
    """Two networks from one initial point, by other examples, and a third from another one."""
    a, c = trained(seed)
    return [a, trained(seed, start=0)[1], c]


@functools.cache
def _curve(seed: int, i: int, j: int) -> Curve:
    """A quadratic Bézier curve of low loss from network i of the seed to network j."""
    networks = three_networks(seed)
    key = stream(jax.random.key(seed), "curve", i, j)
    start = init_curve(networks[i], networks[j])
    return fit_curve(loss, start, batches(seed), tx=_optimizer(), steps=FIT_STEPS, key=key).curve


def _highest(seed: int, path: Curve) -> float:
    return float(eval_path(measures, path, batches(seed), points=POINTS).values["loss"].max())


def concatenation(seed: int, *, direct: bool = False) -> Evidence:
    """The greatest loss on a path from A to C, against that on the paths found from A to B and from B to C.

    The path runs along both; the control takes the straight line.
    """
    first, second = _curve(seed, 0, 1), _curve(seed, 1, 2)
    bound = max(_highest(seed, first), _highest(seed, second))
    t = np.linspace(0, 1, POINTS)
    a, _, c = three_networks(seed)
    line = linear_path(a, c)
    paths = [line] if direct else [first, second]
    points = [jax.tree.map(np.asarray, jax.vmap(path)(jnp.asarray(t))) for path in paths]
    batch = data(seed)
    losses = [_host_loss(jax.tree.map(lambda x, i=i: x[i], p), batch) for p in points for i in range(POINTS)]
    return Evidence(max(losses), bound * (1 + 1e-9), setting=SETTING)


def _host_loss(params: Params, batch: Batch) -> float:
    """Cross-entropy by numpy alone."""
    x = np.asarray(batch.x)
    for i in range(len(params)):
        layer = params[f"Dense_{i}"]
        x = (np.maximum(x, 0) if i else x) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    top = x.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(x - top).sum(axis=1)) + top[:, 0]
    return float((log_sum - np.take_along_axis(x, np.asarray(batch.labels)[:, None], axis=1)[:, 0]).mean())


@functools.cache
def _profiles(seed: int) -> np.ndarray:
    """Losses on the line between two networks, on lines that move one layer alone, and made-up ones."""
    a, b = trained(seed)
    paths = [linear_path(a, b), *(linear_path(a, leafwise_path(a, b, [name])(1.0)) for name in a)]
    lines = [np.asarray(eval_path(measures, path, batches(seed), points=POINTS).values["loss"]) for path in paths]
    return np.stack([*lines, *host_stream(seed, "losses").normal(size=(5, POINTS)).cumsum(axis=1)])


def gap_bounds_barrier(seed: int, *, baseline: Baseline = "chord") -> Evidence:
    """The greatest excess of a barrier over the convexity gap of the same losses.

    Among the losses is a line that moves the last layer alone, on which they are convex. The control measures from the
    mean of the ends.
    """
    losses = _profiles(seed)
    excess = loss_barrier(losses, baseline=baseline) - convexity_gap(losses)
    return Evidence(float(excess.max()), 1e-12, setting=SETTING | {"profiles": len(losses)})


def gap_is_distance_to_envelope(seed: int, *, whole: bool = False) -> Evidence:
    """Convexity gaps against distances from the lower convex hull, by a scan; the control has one chord alone."""
    losses = _profiles(seed)
    measured = loss_barrier(losses) if whole else convexity_gap(losses)
    t = np.linspace(0, 1, POINTS)
    return Evidence(np.asarray(measured), np.array([(row - _lower_hull(t, row)).max() for row in losses]))


def _lower_hull(t: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of the lower convex hull at t, by Andrew's monotone chain."""
    kept: list[int] = []
    for k in range(len(t)):
        while len(kept) >= 2:
            i, j = kept[-2:]
            if (y[j] - y[i]) * (t[k] - t[i]) < (y[k] - y[i]) * (t[j] - t[i]):
                break
            kept.pop()
        kept.append(k)
    return np.interp(t, t[kept], y[kept])


def error_bound(seed: int, *, other_features: bool = False) -> Evidence:
    """The greatest error on the line between two networks, against the sum of the errors of its ends.

    They differ in their last layer: outputs are linear between them, so an example that both classify rightly is right
    on the whole line. The control is two networks trained from initial points of their own.
    """
    a, b = trained(seed)
    if not other_features:
        top = a[f"Dense_{len(a) - 1}"]
        noise = host_stream(seed, "last layer").normal(size=(2, *top["kernel"].shape))
        scale = 0.5 * float(jnp.std(top["kernel"]))
        a, b = (a | {f"Dense_{len(a) - 1}": top | {"kernel": top["kernel"] + scale * z}} for z in noise)
    errors = np.asarray(eval_path(measures, linear_path(a, b), batches(seed), points=POINTS).values["error"])
    outputs = feature_connectivity(_outputs, a, b, data(seed).x, ts=np.array([0.5]))
    distance = float(outputs.distance["outputs"][0])
    ends = float(errors[0] + errors[-1])
    return Evidence(float(errors.max()), ends + 1e-12, setting=SETTING | {"distance": distance})


def _outputs(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    return {"outputs": f(params, x)}


def _linear_outputs(params: Params, x: jax.Array) -> np.ndarray:
    for layer in params.values():
        x = x @ layer
    return np.asarray(x)


def centaurs(seed: int, *, cross: bool = True) -> Evidence:
    r"""Outputs of a deep linear network on a line, against those of all that take each layer from one end.

    $f_{(1 - t) A + t B} = \sum_S t^{|S|} (1 - t)^{d - |S|} f_S$, over sets S of layers that are those of B. The control
    leaves out the networks with layers of both.
    """
    draw, widths = host_stream(seed, "deep linear"), (INPUTS, *[5] * (LAYERS - 1), CLASSES)
    shapes = {f"layer_{i}": shape for i, shape in enumerate(itertools.pairwise(widths))}
    a, b = ({name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()} for _ in range(2))
    x, measured, predicted = data(seed).x, [], []
    for t in (0.2, 0.5, 0.9):
        measured.append(_linear_outputs(interpolate(a, b, t), x))
        sets = [s for k in range(LAYERS + 1) for s in itertools.combinations(shapes, k) if cross or k in (0, LAYERS)]
        outputs = [_linear_outputs(a | {name: b[name] for name in s}, x) for s in sets]
        weights = [t ** len(s) * (1 - t) ** (LAYERS - len(s)) for s in sets]
        predicted.append(sum(w * y for w, y in zip(weights, outputs, strict=True)))
    return Evidence(np.stack(measured), np.stack(predicted), setting={"layers": LAYERS})


CLAIMS = (
    make_claim(
        "concatenation",
        "Barriers of paths are ultrametric: a path from A to C through B is nowhere higher than the higher of the two "
        "paths found from A to B and from B to C.",
        "derived; cf. arXiv 1803.00885",
        "bound",
        concatenation,
        {"direct": True},
        "the path does not lead through B",
        seeds=2,
    ),
    make_claim(
        "convexity-gap-bound",
        "The convexity gap of losses along a path is at least their barrier over the chord.",
        "derived; cf. arXiv 2205.12411",
        "bound",
        gap_bounds_barrier,
        {"baseline": "mean"},
        "the barrier is taken over the mean of the ends",
        seeds=2,
    ),
    make_claim(
        "convexity-gap-envelope",
        "The convexity gap is the greatest distance of the losses from their lower convex hull.",
        "derived; cf. arXiv 2205.12411",
        "identity",
        gap_is_distance_to_envelope,
        {"whole": True},
        "only the chord of the whole path counts",
        seeds=2,
    ),
    make_claim(
        "feature-connectivity",
        "Where outputs are linear between two networks, the error on their line is at most the sum of their errors.",
        "arXiv 2307.08286, lemma 1",
        "bound",
        error_bound,
        {"other_features": True},
        "the networks have other features",
        seeds=2,
    ),
    make_claim(
        "deep-linear",
        "Outputs of a deep linear network on a line are those of all networks that take each layer from either end, "
        "weighted by t^k (1 - t)^(d - k).",
        "derived",
        "identity",
        centaurs,
        {"cross": False},
        "networks with layers of both ends are left out",
        seeds=2,
    ),
)
