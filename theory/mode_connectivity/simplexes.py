"""Claims on simplexes of networks: their volume, samples of them, and a vertex trained to go round a barrier."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import kolmogi

from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.geometry import apply_permutation, fit_simplex, log_volume, simplex_point, simplex_weights, stack_points
from jaxft.train import make_optimizer
from theory.claims import Evidence
from theory.mode_connectivity.barriers import three_networks
from theory.mode_connectivity.networks import (
    SETTING,
    Batch,
    batches,
    compiled,
    data,
    flat,
    loss,
    make_claim,
    mlp_units,
    trained,
)

SOURCE = "arXiv 2102.13042"
SAMPLES, VERTICES = 4000, 4
CHANCE = 1e-3
"""Chance that a test of uniform samples fails though they are uniform."""
FIT_STEPS, FIT_RATE = 150, 0.03


def volume(seed: int, *, reordered: bool = False) -> Evidence:
    """Log-volumes of triangles of networks, against those by the distances between vertices alone.

    The control measures the distances after the hidden units of one network were put in another order: the same
    function, and another vertex.
    """
    networks = three_networks(seed)
    measured = [float(log_volume(stack_points(networks[:k]))) for k in (2, 3)]
    if reordered:
        units = networks[0]["Dense_0"]["bias"].shape[0]
        networks[0] = apply_permutation(networks[0], mlp_units(1), {"hidden_0": jnp.arange(units)[::-1]})
    predicted = [_cayley_menger([flat(network) for network in networks[:k]]) for k in (2, 3)]
    return Evidence(np.array(measured), np.array(predicted), setting=SETTING)


def _cayley_menger(points: list[np.ndarray]) -> float:
    """Log-volume of a simplex by the determinant of squared distances, bordered by ones."""
    k = len(points) - 1
    bordered = np.ones((k + 2, k + 2)) - np.eye(k + 2)
    for (i, x), (j, y) in itertools.product(enumerate(points, 1), repeat=2):
        bordered[i, j] = ((x - y) ** 2).sum()
    return 0.5 * math.log(abs(np.linalg.det(bordered)) / 2**k) - math.log(math.factorial(k))


def sampling(seed: int, *, flat_draws: bool = False) -> Evidence:
    r"""Greatest Kolmogorov-Smirnov distance of sampled weights from those of a uniform simplex, against its quantile.

    One weight of k + 1 lies below x with probability $1 - (1 - x)^k$, the largest by inclusion and exclusion. The
    control draws weights uniformly and divides them by their sum.
    """
    key = stream(jax.random.key(seed), "simplex")
    weights = np.asarray(simplex_weights(VERTICES, key=key, n=SAMPLES))
    if flat_draws:
        weights = np.asarray(jax.random.uniform(key, (SAMPLES, VERTICES)))
        weights = weights / weights.sum(axis=1, keepdims=True)
    k = VERTICES - 1
    terms = [(-1) ** j * math.comb(VERTICES, j) for j in range(VERTICES + 1)]
    laws = [
        *((column, lambda x: 1 - (1 - x) ** k) for column in weights.T),
        (weights.max(axis=1), lambda x: sum(c * np.maximum(1 - j * x, 0) ** k for j, c in enumerate(terms))),
    ]
    distance = max(_kolmogorov_smirnov(values, law) for values, law in laws)
    quantile = kolmogi(CHANCE / len(laws)) / math.sqrt(SAMPLES)
    return Evidence(distance, float(quantile), setting={"vertices": VERTICES, "samples": SAMPLES})


def _kolmogorov_smirnov(values: np.ndarray, law) -> float:
    expected, n = law(np.sort(values)), len(values)
    return float(max((np.arange(1, n + 1) / n - expected).max(), (expected - np.arange(n) / n).max()))


@functools.cache
def _optimizer():
    return make_optimizer("adam", FIT_RATE)


@functools.cache
def _fitted(seed: int, volume_weight: float) -> Params:
    """Two networks and a vertex that was trained to be joined to both by a segment of low loss."""
    start = stack_points(trained(seed))
    key = stream(jax.random.key(seed), "vertex")
    options = {"faces": ((0,), (1,)), "samples": 4, "log_volume_weight": volume_weight}
    found = fit_simplex(loss, start, batches(seed), tx=_optimizer(), steps=FIT_STEPS, key=key, **options)
    return found.vertices


def new_vertex(seed: int, *, volume_weight: float = 1e-3) -> Evidence:
    """Log of the mean loss on the line between two networks (the greater), and on the way through a trained vertex.

    In the control nothing counts but the volume.
    """
    vertices = _fitted(seed, volume_weight)
    u = np.linspace(0, 1, 13)[1:-1]
    ways = {
        "line": [np.array([1 - v, v, 0]) for v in u],
        "through": [w for v in u for w in (np.array([1 - v, 0, v]), np.array([0, 1 - v, v]))],
    }
    logs = {name: math.log(_losses(vertices, jnp.asarray(ws), data(seed)).mean()) for name, ws in ways.items()}
    setting = SETTING | {"steps": FIT_STEPS, "log_volume_weight": volume_weight}
    return Evidence(logs["through"], logs["line"], setting=setting)


@compiled
def _losses(vertices: Params, weights: jax.Array, batch: Batch) -> jax.Array:
    return jax.lax.map(lambda w: loss(simplex_point(vertices, w), batch), weights)


CLAIMS = (
    make_claim(
        "simplex-volume",
        "The volume of a simplex of networks by the determinant of its edges is that of Cayley and Menger, which knows "
        "distances alone.",
        f"derived; cf. {SOURCE}",
        "identity",
        volume,
        {"reordered": True},
        "the hidden units of a vertex have another order",
        seeds=2,
    ),
    make_claim(
        "simplex-sampling",
        "Normalised exponential draws are uniform on a simplex: the distance from the laws of one and of the largest "
        "weight stays below its quantile.",
        f"derived; cf. {SOURCE}",
        "bound",
        sampling,
        {"flat_draws": True},
        "uniform draws are normalised",
        seeds=2,
    ),
    make_claim(
        "simplex-vertex",
        "A vertex trained to span low loss and volume connects two networks by a lower way than the straight line.",
        SOURCE,
        "ordering",
        new_vertex,
        {"volume_weight": 1e3},
        "the volume outweighs the loss",
        seeds=3,
        max_seeds=6,
    ),
)
