"""Is it the representation or the probe? Control tasks, selectivity, and correlations by group.

A probe that is strong enough learns anything, so that its score alone says little of the representation. Its score on
a control task, which no representation can have been trained for, says how much of it is the probe's own doing.
"""

from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, Shaped

from jaxft.core.checks import require


def control_targets(
    types: Int[np.ndarray, "n k"], pool: Shaped[np.ndarray, "m *c"], *, seed: int = 0
) -> Shaped[np.ndarray, "n *c"]:
    """Targets of a control task: a random, but fixed, function of the types of an example.

    Each tuple of types (the word of a token, the two words at the ends of a span) is given one row of ``pool`` for
    good, whatever else is true of the example. The function depends on ``seed`` and ``pool`` alone, so that training
    and test examples share it. A probe solves the task by memorising types, never by structure.

    Args:
      types: What identifies the type of each example, as non-negative numbers.
      pool: True targets, numbers or classes, whose distribution the control takes over.
      seed: Another seed is another function.

    Returns:
      A row of ``pool`` an example.

    Raises:
      UserError: No types, or an empty pool.

    Example:
      >>> targets = control_targets(np.array([[3, 5], [4, 5], [3, 5]]), np.arange(10.0))
      >>> bool(targets[0] == targets[2])
      True

    Reference:
      Hewitt and Liang 2019, arXiv 1909.03368, section 2.
    """
    where = "control_targets"
    require(types.ndim == 2 and types.shape[1] > 0, where, "types must be [n, k]", f"shape {types.shape}", "Stack them")
    counts = np.issubdtype(types.dtype, np.integer) and bool((types >= 0).all())
    require(counts, where, "types must be non-negative integers", types.dtype, "Pass word numbers")
    require(len(pool) > 0, where, "the pool must not be empty", "no targets", "Pass the true targets")
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        state = np.full(len(types), _mixed(np.uint64(seed & (2**64 - 1)) + _STEP), np.uint64)
        for column in types.T:
            state = _mixed((state ^ column.astype(np.uint64)) + _STEP)
    return pool[(state % np.uint64(len(pool))).astype(np.int64)]


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(state: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): equal on every platform, unlike ``hash``."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class Agreement(NamedTuple):
    """How well predictions follow their targets; NaN where either is constant."""

    pearson: float
    spearman: float
    r2: float
    """1 - residual over variance: at most 1, and negative where the mean would predict better."""
    count: int


def agreement(predicted: Float[np.ndarray, "n"], target: Float[np.ndarray, "n"]) -> Agreement:
    """Correlations and R² of predictions with their targets.

    Args:
      predicted: What a probe says.
      target: What it should say.

    Returns:
      Pearson's and Spearman's correlation, R², and the number of pairs.

    Raises:
      UserError: Lengths differ, or there is nothing to compare.

    Example:
      >>> agreement(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 4.0]))
      Agreement(pearson=1.0, spearman=1.0, r2=0.375, count=3)
    """
    fits = predicted.ndim == 1 and predicted.shape == target.shape and len(target) > 0
    shapes = f"shapes {predicted.shape} and {target.shape}"
    require(fits, "agreement", "predictions and targets must be [n], n the same", shapes, "Flatten both")
    x, y = predicted.astype(np.float64), target.astype(np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(float("nan"), float("nan"), float("nan"), len(x))
    u, v = x - x.mean(), y - y.mean()
    pearson = float(u @ v / np.sqrt((u @ u) * (v @ v)))
    u, v = (scipy.stats.rankdata(values) - (len(x) + 1) / 2 for values in (x, y))
    spearman = float(u @ v / np.sqrt((u @ u) * (v @ v)))
    return Agreement(pearson, spearman, float(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum()), len(x))


def agreement_by_group(
    predicted: Float[np.ndarray, "n"], target: Float[np.ndarray, "n"], groups: Int[np.ndarray, "n"]
) -> dict[int, Agreement]:
    """Agreement within each group, as spans of one width: short spans would else make up most of a correlation.

    Args:
      predicted: What a probe says.
      target: What it should say.
      groups: Number of the group of each pair.

    Returns:
      Group -> its agreement, in the order of the groups.

    Raises:
      UserError: Lengths differ.
    """
    fits = groups.shape == target.shape
    shapes = f"shapes {groups.shape} and {target.shape}"
    require(fits, "agreement_by_group", "there must be a group a target", shapes, "Flatten both")
    return {int(g): agreement(predicted[groups == g], target[groups == g]) for g in np.unique(groups)}


def mean_agreement(groups: dict[int, Agreement]) -> Agreement:
    """Mean over groups, each weighed by its count; groups in which nothing varies are left out.

    Example:
      >>> halves = {2: Agreement(0.5, 0.25, 0.0, 10), 3: Agreement(1.0, 0.75, 0.5, 10)}
      >>> mean_agreement(halves)
      Agreement(pearson=0.75, spearman=0.5, r2=0.25, count=20)
    """
    kept = [found for found in groups.values() if np.isfinite(found.pearson)]
    if not kept:
        return Agreement(float("nan"), float("nan"), float("nan"), 0)
    weights = np.array([found.count for found in kept], float)
    pearson, spearman, r2 = (float(np.average([found[i] for found in kept], weights=weights)) for i in range(3))
    return Agreement(pearson, spearman, r2, int(weights.sum()))
