"""From which step on training is stable: children of one checkpoint, and the barrier between them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import require, require_finite, require_matching
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.geometry.barriers import checked_metric, loss_barrier, losses_of_pairs
from jaxft.geometry.path_loss import BatchFn, Statistics
from jaxft.geometry.paths import checked_parameters, stack_points


class InstabilityAnalysis(NamedTuple):
    """Barriers between children, by the step of the checkpoint that they share."""

    steps: Int[np.ndarray, "checkpoints"]
    barriers: dict[str, Float[Array, "checkpoints"]]
    """Mean over pairs of children, of every value that the loss function returned."""
    pair_barriers: dict[str, Float[Array, "checkpoints pairs"]]
    losses: dict[str, Float[Array, "checkpoints pairs points"]]
    onset: int | None
    """First step from which on the barrier of ``metric`` stays within the tolerance; None: it never does."""
    metric: str


def instability_analysis(
    train_fn: Callable[[Params, int, Array], Params],
    loss_fn: BatchFn,
    checkpoints: Sequence[tuple[int, Params]],
    batches: Any,
    *,
    key: Array,
    children: int = 2,
    points: int = 11,
    metric: str = "error",
    tolerance_frac: float = 0.02,
    statistics: Statistics | None = None,
) -> InstabilityAnalysis:
    r"""Trains children of every checkpoint to the end, and measures the lines between them.

    The barrier is $\max_t E(t) - (E(0) + E(1)) / 2$, that of Frankle et al., over the mean of the ends. Children differ
    in their key alone: whatever noise training has (the order of examples, augmentation, dropout) must come from it.
    Hidden units are not matched: children of one checkpoint share its order of them.

    Args:
      train_fn: ``train_fn(params, step, key)``: parameters after the training that is left at a step. Called once a
        child, outside of any compiled program; keys differ between checkpoints, too.
      loss_fn: ``loss_fn(params, batch)``, a dict of scalars with ``metric`` among them (or a scalar, named ``loss``).
      checkpoints: Steps and parameters, in order of steps; step 0 is the initialisation.
      batches: Batches of one size, stacked on axis 0, to measure on.
      key: Source of the children's keys.
      children: Children of each checkpoint; all pairs of them are measured.
      points: Points of each line, both ends included.
      metric: Which value decides the onset.
      tolerance_frac: Highest barrier that counts as none, in units of the metric: 2 % where it is an error.
      statistics: Re-estimates normalisation statistics at every point, as of ``eval_path``.

    Returns:
      Barriers by step, and the onset of stability.

    Raises:
      UserError: No checkpoints, steps that do not rise, fewer than two children, an unknown metric, or children that do
        not match their checkpoint or are not finite.

    Example:
      >>> checkpoints = [(0, {"w": jnp.array(0.0)}), (1, {"w": jnp.array(0.9)})]
      >>> def train_fn(params, step, key):  # to one of two minima: by chance at 0, to the nearer one later
      ...     side = jax.random.rademacher(key, (), float) if step == 0 else jnp.sign(params["w"])
      ...     return {"w": side}
      >>> loss_fn = lambda p, b: ((p["w"] ** 2 - 1) ** 2 * b).mean()
      >>> found = instability_analysis(
      ...     train_fn, loss_fn, checkpoints, jnp.ones((1, 1)), key=jax.random.key(1), children=6, metric="loss"
      ... )
      >>> bool(found.barriers["loss"][0] > 0.3), float(found.barriers["loss"][1]), found.onset
      (True, 0.0, 1)

    Reference:
      Frankle et al. 2020, arXiv 1912.05671, section 2.
    """
    where = "instability_analysis"
    require(len(checkpoints) > 0, where, "there must be a checkpoint", "none", "Pass pairs of step and parameters")
    require(children >= 2, where, "a line needs two children", children, "Raise children")
    steps = [int(step) for step, _ in checkpoints]
    require(all(a < b for a, b in itertools.pairwise(steps)), where, "steps must rise", steps, "Sort them")
    checked_metric(where, loss_fn, checkpoints[0][1], batches, metric)
    ts = checked_parameters(where, None, points)
    firsts, seconds = (jnp.asarray(x) for x in np.triu_indices(children, 1))
    rows = []
    for step, params in checkpoints:
        grown = [train_fn(params, step, stream(key, "children", step, child)) for child in range(children)]
        for child, end in enumerate(grown):
            require_matching(where, params, end, names=(f"checkpoint {step}", f"child {child}"))
        stacked = stack_points(grown)
        require_finite(where, stacked, f"children of step {step}")
        rows.append(losses_of_pairs(loss_fn, stacked, firsts, seconds, ts, batches, statistics=statistics))
    losses = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    by_pair = {name: loss_barrier(x, t=ts, baseline="mean") for name, x in losses.items()}
    means = {name: x.mean(axis=1) for name, x in by_pair.items()}
    onset = stability_onset(steps, means[metric], tolerance=tolerance_frac)
    return InstabilityAnalysis(np.array(steps), means, by_pair, losses, onset, metric)


def stability_onset(
    steps: Sequence[int], barriers: Float[Array | np.ndarray, "checkpoints"], *, tolerance: float
) -> int | None:
    """The first step from which on no barrier exceeds the tolerance; None where the last one does.

    Args:
      steps: Rising steps.
      barriers: One a step.
      tolerance: Highest barrier that counts as none.

    Returns:
      The step.

    Example:
      >>> stability_onset([0, 10, 20, 30], np.array([0.5, 0.01, 0.3, 0.0]), tolerance=0.02)
      30
    """
    unstable = np.flatnonzero(~(np.asarray(barriers) <= tolerance))
    first = int(unstable[-1]) + 1 if len(unstable) else 0
    return steps[first] if first < len(steps) else None
