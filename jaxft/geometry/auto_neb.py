"""AutoNEB: a band of few pivots that gets more of them where the loss between two exceeds what they say."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import require
from jaxft.core.types import Params, Transform
from jaxft.geometry.neb import fit_neb
from jaxft.geometry.path_loss import BatchFn, eval_path
from jaxft.geometry.paths import Curve


class AutoNEBFit(NamedTuple):
    """A band that was fitted in cycles."""

    path: Curve
    """A polychain through the pivots, the ends exactly as passed."""
    t: Float[np.ndarray, "points"]
    """Where the loss was looked at in the end: every pivot, and the points between."""
    path_losses: Float[np.ndarray, "points"]
    """Loss over all batches at each of these points."""
    saddle: float
    """The highest of them."""
    pivots: tuple[int, ...]
    """Number of pivots in each cycle."""
    losses: Float[Array, "steps"]
    """Highest loss of a pivot in each step of all cycles, on the batch of the step."""


def auto_neb(
    loss_fn: BatchFn,
    a: Params,
    b: Params,
    batches: Any,
    *,
    schedule: Sequence[tuple[Transform, int]],
    pivots: int = 3,
    insertions: int = 2,
    threshold: float = 0.1,
    samples: int = 9,
    spring: float | None = None,
) -> AutoNEBFit:
    r"""Fits a band in cycles; after each of them pivots are inserted where the band is too coarse.

    The loss is looked at between all neighbours. Where its excess over their chord is the greatest of the gap, and more
    than ``threshold`` times the range of the loss along the path, a pivot is inserted: at most ``insertions`` a cycle,
    the greatest excesses first. The pivots keep their relative distances from then on. Every number of pivots is
    compiled once. Statistics of norms are not re-estimated.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar or a dict that has ``loss``.
      a: Point at t = 0.
      b: Point at t = 1.
      batches: Pytree whose leaves have a leading axis of batches.
      schedule: Optimiser and number of steps of each cycle, such as ``[(optax.sgd(0.1), 500)] * 4``.
      pivots: Pivots of the first cycle.
      insertions: Most pivots that are inserted after a cycle.
      threshold: Excess, as a part of the range of the loss, from which a pivot is inserted.
      samples: Points that are looked at between two neighbours.
      spring: As of ``fit_neb``.

    Returns:
      The path, the losses along it and the course of the fit.

    Raises:
      UserError: As of ``fit_neb``; no cycles; options out of range.

    Example:
      >>> import optax
      >>> def ring(p, batch):  # a valley around the origin, with a ridge inside it
      ...     return jnp.square(jnp.sum(p["w"] ** 2) - 1)
      >>> ends = {"w": jnp.array([-1.0, 0.1])}, {"w": jnp.array([1.0, 0.1])}
      >>> fit = auto_neb(ring, *ends, jnp.zeros((1, 1)), schedule=[(optax.sgd(0.1), 100)] * 3, pivots=2)
      >>> fit.pivots[:2], fit.saddle < 0.01
      ((2, 4), True)

    Reference:
      Draxler et al. 2018, arXiv 1803.00885, section 3; Kolsbjerg, Groves and Hammer 2016, doi 10.1063/1.4961868.
    """
    where = "auto_neb"
    require(len(schedule) > 0, where, "schedule must have a cycle", "none", "Pass [(tx, steps)]")
    require(insertions >= 0, where, "insertions must not be negative", insertions, "Pass 0 or more")
    require(threshold >= 0, where, "threshold must not be negative", threshold, "Pass a part of the range, such as 0.1")
    require(samples >= 1, where, "samples must be positive", samples, "Pass the points between two pivots")
    start, counts, losses, along = None, list[int](), list[Array](), np.zeros(0)
    for tx, steps in schedule:
        if start is not None:
            start = _refined(start, along, insertions=insertions, threshold=threshold)
        count = pivots if start is None else start.n_bends
        fit = fit_neb(loss_fn, a, b, batches, tx=tx, steps=steps, pivots=count, spring=spring, start=start)
        start, points = fit.path, (count + 1) * (samples + 1) + 1
        looked = eval_path(loss_fn, start, batches, points=points)
        along = np.asarray(looked.values["loss"], float)
        counts.append(count)
        losses.append(fit.losses)
    assert start is not None
    t = np.linspace(0, 1, len(along))
    return AutoNEBFit(start, t, along, float(along.max()), tuple(counts), jnp.concatenate(losses))


def _refined(path: Curve, along: np.ndarray, *, insertions: int, threshold: float) -> Curve:
    """The path with pivots where the loss exceeds the chord of its neighbours the most; ``along`` starts at a pivot."""
    gaps = along[:-1].reshape(path.n_points - 1, -1)
    ends = np.append(gaps[1:, 0], along[-1])
    u = np.arange(gaps.shape[1]) / gaps.shape[1]
    excess = gaps - ((1 - u) * gaps[:, :1] + u * ends[:, None])
    size, place = excess.max(axis=1), u[excess.argmax(axis=1)].tolist()
    chosen = [g for g in sorted(np.argsort(-size)[:insertions].tolist()) if size[g] > threshold * np.ptp(along)]
    if not chosen:
        return path

    def refined(x: Array) -> Array:
        new = jnp.stack([(1 - place[g]) * x[g] + place[g] * x[g + 1] for g in chosen])
        return jnp.insert(x, np.array(chosen) + 1, new, axis=0)

    return Curve(jax.tree.map(refined, path.control), "polychain")
