"""What is shown of one kind of network: a plane of losses through a pair, and the barriers between all of them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.mode_connectivity.config import ModeConnectivityConfig
from experiments.mode_connectivity.networks import Network
from experiments.mode_connectivity.prepare import Prepared
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.geometry.barriers import pairwise_barriers
from jaxft.geometry.loss_plane import loss_plane
from jaxft.geometry.matching import weight_matching
from jaxft.geometry.paths import Curve, stack_points

MATRIX_POINTS = 11
"""Points of the straight line between every two networks."""

CURVE_POINTS = 61


def measure_shown(
    network: Network,
    models: Sequence[Params],
    bend: Params | None,
    prepared: Prepared,
    config: ModeConnectivityConfig,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Barriers between all models, as trained and after matching all to the first, and the plane through a pair.

    Args:
      network: The functions of all models.
      models: Trained networks, the pair of the plane first.
      bend: Control point of the Bézier curve between those two, if it could be fitted.
      prepared: Images.
      config: Settings.

    Returns:
      Arrays for the figures, and numbers for the record.
    """
    key = stream(jax.random.key(config.seed), "shown")
    first = models[0]
    matched = [first] + [
        weight_matching(first, model, network.spec, key=stream(key, "matching", i)).params
        for i, model in enumerate(models[1:])
    ]
    arrays, facts = {}, {}
    for name, members in (("trained", models), ("matched", matched)):
        found = pairwise_barriers(
            network.losses, list(members), prepared.train, points=MATRIX_POINTS, statistics=network.statistics
        )
        matrix = np.asarray(found.barriers)
        pairs = matrix[np.triu_indices(len(matrix), 1)]
        arrays[name] = matrix
        facts |= {f"{name}_mean": float(pairs.mean()), f"{name}_max": float(pairs.max())}
    return arrays | _plane(network, first, models[1], bend, prepared, config), facts


def _plane(
    network: Network, a: Params, b: Params, bend: Params | None, prepared: Prepared, config: ModeConnectivityConfig
) -> dict[str, np.ndarray]:
    """Losses on the plane through a, b and the control point, in which the Bézier curve lies."""
    if bend is None:
        return {}
    shown = config.plane
    plane = loss_plane(
        network.losses,
        a,
        b,
        bend,
        prepared.train,
        points=shown.points,
        margin=shown.margin,
        statistics=network.statistics,
    )
    curve = Curve(stack_points([a, bend, b]), "bezier")
    ts = np.linspace(0, 1, CURVE_POINTS, dtype=np.float32)
    drawn = jax.lax.map(lambda t: plane.coordinates(curve(t)), ts)
    return {
        "plane_x": np.asarray(plane.x),
        "plane_y": np.asarray(plane.y),
        "plane_loss": np.asarray(plane.values["loss"]),
        "plane_corners": np.asarray(plane.corners),
        "plane_curve": np.asarray(drawn),
    }
