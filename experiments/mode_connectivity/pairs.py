"""One pair of networks: dropout stability, the path of Theorem 1, and every other path between the two."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.mode_connectivity.config import ModeConnectivityConfig
from experiments.mode_connectivity.networks import Network, leaves_by_name
from experiments.mode_connectivity.prepare import Batches, Prepared, TestBatches
from jaxft.core.checks import UserError
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.geometry.barriers import loss_barrier
from jaxft.geometry.curves import fit_curve
from jaxft.geometry.dropout_path import dropout_path
from jaxft.geometry.dropout_stability import DropoutStability, dropout_stability
from jaxft.geometry.matching import weight_matching
from jaxft.geometry.neb import fit_neb
from jaxft.geometry.path_certificate import path_certificate
from jaxft.geometry.path_loss import PathLoss, eval_path, path_ensemble
from jaxft.geometry.paths import Curve, Path, init_curve, linear_path, polychain
from jaxft.geometry.permutations import apply_permutation, random_permutation
from jaxft.geometry.repair import repair

PATHS = {
    "line": "straight line",
    "theorem": "constructive path",
    "matched": "matched line",
    "repaired": "matched line, REPAIR",
    "bezier": "Bézier curve",
    "polychain": "polychain",
    "band": "elastic band",
    "shuffled": "shuffled line",
}
"""Names of paths in records, and in words. The last is the control of matching."""

POINTS_PER_SEGMENT = 8
"""Of a constructive path: its breakpoints are among the points."""

REPAIRED_POINTS = 9
"""Networks between the ends of a matched line that are repaired, and joined by straight segments."""

ENSEMBLE_POINTS = 5


class PairResult(NamedTuple):
    """What was measured of a pair."""

    facts: dict[str, Any]
    """Stability, certificate and ensembles."""
    paths: list[dict[str, Any]]
    """A row a path."""
    arrays: dict[str, np.ndarray]
    """Losses along every path, and the control point of the Bézier curve, by name."""


def measure_pair(
    network: Network, a: Params, b: Params, prepared: Prepared, config: ModeConnectivityConfig, *, number: int
) -> PairResult:
    """Everything that is measured of two trained networks.

    Args:
      network: The functions of both.
      a: Parameters of the first.
      b: Parameters of the second.
      prepared: Images.
      config: Settings.
      number: Of the pair: random draws are streams of it.
    """
    key = stream(jax.random.key(config.seed), "pair", number)
    facts, rows, arrays = {}, [], {}
    for name, path in _paths(network, a, b, prepared, config, key, facts):
        found = _along(network, name, path, prepared, config)
        rows.append({"path": name, **_summary(found)})
        arrays |= {f"{name}.t": np.asarray(found.t)}
        arrays |= {f"{name}.{value}": np.asarray(x) for value, x in found.values.items()}
        if name == "bezier" and isinstance(path, Curve):
            facts |= _ensembles(network, path, prepared)
            bend = jax.tree.map(lambda x: x[1], path.control)
            arrays |= {f"bend/{leaf}": x for leaf, x in leaves_by_name(bend).items()}
    return PairResult(facts, rows, arrays)


def _paths(
    network: Network,
    a: Params,
    b: Params,
    prepared: Prepared,
    config: ModeConnectivityConfig,
    key: Array,
    facts: dict[str, Any],
) -> Iterator[tuple[str, Path]]:
    """Every path by name; what is found on the way goes into ``facts``."""
    fits, spec = config.paths, network.spec
    yield "line", linear_path(a, b)
    yield "theorem", _theorem(network, a, b, prepared, config, key, facts)
    matching = weight_matching(a, b, spec, key=stream(key, "matching"))
    facts["sweeps"] = int(matching.sweeps)
    yield "matched", linear_path(a, matching.params)
    if network.repairable:
        yield "repaired", _repaired(network, a, matching.params, prepared)
    tx = optimizer(fits.learning_rate, fits.steps)
    for name, bends in (("bezier", 1), ("polychain", fits.bends)):
        start = init_curve(a, b, n_bends=bends, family="bezier" if name == "bezier" else "polychain")
        try:
            fit = fit_curve(
                network.fit_loss,
                start,
                prepared.fit,
                tx=tx,
                steps=fits.steps,
                key=stream(key, name),
                points_per_step=fits.points_per_step,
            )
        except UserError as diverged:
            facts[f"{name}_failed"] = str(diverged)
            continue
        yield name, fit.curve
    try:
        band = fit_neb(network.fit_loss, a, b, prepared.fit, tx=tx, steps=fits.steps, pivots=fits.pivots)
    except UserError as diverged:
        facts["band_failed"] = str(diverged)
    else:
        yield "band", band.path
    shuffle = random_permutation(b, spec, key=stream(key, "shuffle"))
    yield "shuffled", linear_path(a, apply_permutation(b, spec, shuffle))


@functools.cache
def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, whose rate falls to 0 by half a cosine. The same object again meets compiled programs."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def _repaired(network: Network, a: Params, b: Params, prepared: Prepared) -> Path:
    """Through networks of the straight line whose pre-activations have means and deviations between the ends'."""
    line, x = linear_path(a, b), prepared.fit[0][0]
    inner = [k / (REPAIRED_POINTS + 1) for k in range(1, REPAIRED_POINTS + 1)]
    points = [repair(network.units, line(t), a, b, network.spec, x, alpha=t) for t in inner]
    return polychain([a, *points, b])


def _theorem(
    network: Network,
    a: Params,
    b: Params,
    prepared: Prepared,
    config: ModeConnectivityConfig,
    key: Array,
    facts: dict[str, Any],
) -> Path:
    """The path of Theorem 1 through the best half of the units of each network, and its certificate."""
    spec, found = network.spec, []
    for side, params in (("a", a), ("b", b)):
        stability: DropoutStability = dropout_stability(
            network.losses, params, spec, prepared.train, key=stream(key, f"masks {side}"), draws=config.stability.draws
        )
        found.append(stability)
        facts |= {
            f"loss_{side}": float(stability.loss),
            f"epsilon_{side}": float(stability.epsilon_best),
            f"epsilon_median_{side}": float(stability.epsilon_median),
        }
    masks_a, masks_b = (stability.masks for stability in found)
    certificate = path_certificate(network.losses, a, b, spec, masks_a, masks_b, prepared.train)
    path = dropout_path(a, b, spec, masks_a, masks_b)
    facts |= {
        "certificate": float(certificate.maximum),
        "bound": float(certificate.bound),
        "evaluations": 2 + len(certificate.losses_a) + len(certificate.losses_b),
        "segments": len(path),
    }
    return path.curve()


def _along(network: Network, name: str, path: Path, prepared: Prepared, config: ModeConnectivityConfig) -> PathLoss:
    """Losses on both splits. The constructive path moves the statistics of norms with their units."""
    segments = path.n_points - 1 if name == "theorem" and isinstance(path, Curve) else 0
    points = POINTS_PER_SEGMENT * segments + 1 if segments else config.paths.points
    statistics = None if segments else network.statistics
    return eval_path(network.split_losses, path, prepared.splits, points=points, statistics=statistics)


def _summary(found: PathLoss) -> dict[str, Any]:
    """A row of numbers: largest loss and error of a path, and barriers over the chord of its ends."""
    values = {name: np.asarray(x, np.float64) for name, x in found.values.items()}
    t = np.asarray(found.t, np.float64)
    rows = {f"{name}_max": float(x.max()) for name, x in values.items()}
    return {
        **rows,
        "train_barrier": float(loss_barrier(values["train_loss"], t=t)),
        "test_barrier": float(loss_barrier(values["test_loss"], t=t)),
        "error_barrier": float(loss_barrier(values["test_error"], t=t)),
        "length_ratio": float(found.length_ratio),
        "points": len(t),
    }


def _ensembles(network: Network, curve: Curve, prepared: Prepared) -> dict[str, float]:
    """Test errors of one end, of both together, and of points along the fitted curve together."""
    members = {"error_single": jnp.array([0.0]), "error_ends": jnp.array([0.0, 1.0])}
    members |= {"error_ensemble": jnp.linspace(0, 1, ENSEMBLE_POINTS)}
    return {name: float(_ensemble_error(network, curve, prepared.splits, ts)) for name, ts in members.items()}


@functools.partial(jax.jit, static_argnums=0)
def _ensemble_error(network: Network, curve: Curve, splits: tuple[Batches, TestBatches], ts: Array) -> Array:
    (x, _), (x_test, y_test) = splits
    images, labels = x_test.reshape(-1, *x_test.shape[2:]), y_test.reshape(-1)
    log_p = path_ensemble(network.f, curve, images, ts=ts, batches=x, statistics=network.statistics)
    return (log_p.argmax(axis=1) != labels).mean()
