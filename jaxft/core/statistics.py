"""Estimates with intervals: bootstrap, paired differences, rank correlation, pairs of objects, log-log slopes.

Everything here is host arithmetic on small float64 arrays, by numpy and scipy.
"""

from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from jaxft.core.checks import require
from jaxft.core.types import Interval


def bootstrap_mean(x: ArrayLike, *, confidence_frac: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of ``x`` with its percentile bootstrap interval.

    Args:
      x: Independent observations, shape ``(n,)``, n >= 2.
      confidence_frac: Coverage of the interval.
      resamples: Bootstrap resamples.
      seed: Seed of the resampling.

    Returns:
      The interval; its ``stderr`` is the bootstrap one.

    Raises:
      UserError: Fewer than two observations.

    Example:
      >>> bootstrap_mean([1.0, 1.0, 1.0])
      Interval(estimate=1.0, stderr=0.0, low=1.0, high=1.0)

    Reference:
      Efron and Tibshirani 1993, section 13.3.
    """
    x = _observations("bootstrap_mean", x)
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    means = x[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence_frac) / 2, (1 + confidence_frac) / 2])
    return Interval(float(x.mean()), float(means.std()), float(low), float(high))


def paired_difference(a: ArrayLike, b: ArrayLike, *, confidence_frac: float = 0.95) -> Interval:
    """Mean of ``a - b`` over pairs with its Student-t interval.

    Args:
      a: First member of each pair, shape ``(n,)``, n >= 2.
      b: Second member, same shape.
      confidence_frac: Coverage of the interval.

    Returns:
      The interval of the mean difference. Equal differences give an interval of width 0.

    Raises:
      UserError: Shapes differ, or fewer than two pairs.

    Example:
      >>> paired_difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).excludes_zero()
      False
      >>> paired_difference([2.0, 2.1, 2.2], [1.0, 1.0, 1.0]).excludes_zero()
      True
    """
    a, b = _pair("paired_difference", a, b)
    return mean_interval(a - b, confidence_frac=confidence_frac)


def mean_interval(x: ArrayLike, *, confidence_frac: float = 0.95) -> Interval:
    """Mean of ``x``, shape ``(n,)`` with n >= 2, and its Student-t interval.

    Example:
      >>> interval = mean_interval([1.0, 2.0, 3.0])
      >>> round(interval.estimate, 3), round(interval.stderr, 3)
      (2.0, 0.577)
    """
    x = _observations("mean_interval", x)
    stderr = float(x.std(ddof=1) / np.sqrt(len(x)))
    half = float(scipy.stats.t.ppf((1 + confidence_frac) / 2, len(x) - 1)) * stderr
    mean = float(x.mean())
    return Interval(mean, stderr, mean - half, mean + half)


def rank_correlation(x: ArrayLike, y: ArrayLike, *, confidence_frac: float = 0.95) -> Interval:
    """Spearman's rank correlation with Fisher's z interval (standard error 1.06 / sqrt(n - 3)).

    Args:
      x: Shape ``(n,)``, n >= 5.
      y: Same shape.
      confidence_frac: Coverage of the interval.

    Returns:
      The interval. A constant input has no ranks: all NaN.

    Raises:
      UserError: Shapes differ, or fewer than five pairs.

    Reference:
      Fieller, Hartley and Pearson 1957, Tests for rank correlation coefficients, Biometrika 44.
    """
    x, y = _pair("rank_correlation", x, y)
    require(len(x) >= 5, "rank_correlation", "needs at least 5 pairs", len(x), "Measure at more points")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Interval(*[float("nan")] * 4)
    rho = float(np.asarray(scipy.stats.spearmanr(x, y))[0])
    z_stderr = 1.06 / np.sqrt(len(x) - 3)
    z = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    half = float(scipy.stats.norm.ppf((1 + confidence_frac) / 2)) * z_stderr
    return Interval(rho, float(z_stderr * (1 - rho**2)), float(np.tanh(z - half)), float(np.tanh(z + half)))


class Association(NamedTuple):
    """A correlation over pairs of a few objects, and how rare it is when the objects are dealt anew."""

    correlation: float
    """Spearman's, over pairs; NaN where one of the two does not vary."""
    p_value: float
    """Part of the permutations that give as high a correlation; one-sided."""
    permutations: int


def mantel_test(a: ArrayLike, b: ArrayLike, *, permutations: int = 2000, seed: int = 0) -> Association:
    """Mantel's test of two symmetric matrices of what is measured of every pair: do high entries go together?

    Pairs that share an object are not independent, so that the usual p-value is far too small. Here rows and columns
    of one matrix are permuted together.

    Args:
      a: Shape ``(m, m)``, m >= 4; its diagonal is not looked at.
      b: Same shape.
      permutations: Random permutations; the matrix as it is counts besides.
      seed: Seed of the permutations.

    Returns:
      Correlation and p-value.

    Raises:
      UserError: Shapes that do not fit, fewer than four objects, or entries that are not finite.

    Example:
      >>> x = np.array([0.0, 1.0, 2.0, 4.0, 8.0, 16.0])
      >>> distance = np.abs(x[:, None] - x)
      >>> found = mantel_test(distance, distance**2)
      >>> round(found.correlation, 6), found.p_value < 0.01
      (1.0, True)

    Reference:
      Mantel 1967, The detection of disease clustering and a generalized regression approach, Cancer Research 27.
    """
    where, a, b = "mantel_test", np.asarray(a, float), np.asarray(b, float)
    fits = a.ndim == 2 and a.shape == b.shape == (len(a), len(a)) and len(a) >= 4
    shapes = f"{a.shape} and {b.shape}"
    require(fits, where, "matrices must be (m, m) with m of 4 or more", shapes, "Measure more objects")
    above = np.triu_indices(len(a), 1)
    finite = bool(np.isfinite(a[above]).all() and np.isfinite(b[above]).all())
    require(finite, where, "entries must be finite", "NaN or infinity", "Drop those objects")
    x = _standard_ranks(a[above])
    ranks = np.zeros_like(b)
    ranks[above] = _standard_ranks(b[above])
    ranks = ranks + ranks.T
    correlation = float(x @ ranks[above])
    if np.ptp(a[above]) == 0 or np.ptp(b[above]) == 0:
        return Association(float("nan"), float("nan"), permutations)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(a)) for _ in range(permutations)]
    drawn = np.array([x @ ranks[np.ix_(order, order)][above] for order in orders])
    # Equal correlations may differ in the last bit.
    return Association(correlation, float((1 + (drawn >= correlation - 1e-9).sum()) / (1 + permutations)), permutations)


def _standard_ranks(x: np.ndarray) -> np.ndarray:
    ranks = scipy.stats.rankdata(x)
    ranks = ranks - ranks.mean()
    norm = np.sqrt((ranks**2).sum())
    return ranks / norm if norm > 0 else ranks


def log_log_slope(
    x: ArrayLike, y: ArrayLike, *, confidence_frac: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Exponent a of y ~ C_s x^a, with one factor C_s a seed and the exponent in common.

    Least squares on logarithms; the interval resamples the residuals of the fit.

    Args:
      x: Positive abscissae, shape ``(points,)``, at least 3.
      y: Positive ordinates, shape ``(points,)`` or ``(seeds, points)``.
      confidence_frac: Coverage of the interval.
      resamples: Bootstrap resamples.
      seed: Seed of the resampling.

    Returns:
      The slope and its interval.

    Raises:
      UserError: Non-positive or non-finite values, or shapes that do not fit.

    Example:
      >>> round(log_log_slope([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]).estimate, 6)
      1.0
    """
    x, y = np.asarray(x, float), np.atleast_2d(np.asarray(y, float))
    where = "log_log_slope"
    fits = x.ndim == 1 and len(x) >= 3 and y.ndim == 2 and y.shape[1] == len(x)
    require(fits, where, "x must be (points,) with 3 or more, y (seeds, points)", f"{x.shape} and {y.shape}", "Reshape")
    positive = bool((x > 0).all() and (y > 0).all() and np.isfinite(y).all())
    require(positive, where, "values must be positive and finite", "others", "Drop points at the noise floor")
    u = np.log(x) - np.log(x).mean()
    v = np.log(y) - np.log(y).mean(axis=1, keepdims=True)
    slope = float((u * v).sum() / (len(v) * (u**2).sum()))
    residuals = (v - slope * u).ravel()
    draws = np.random.default_rng(seed).integers(residuals.size, size=(resamples, residuals.size))
    noise = residuals[draws].reshape(resamples, *v.shape)
    slopes = slope + (u * noise).sum(axis=(1, 2)) / (len(v) * (u**2).sum())
    low, high = np.quantile(slopes, [(1 - confidence_frac) / 2, (1 + confidence_frac) / 2])
    return Interval(slope, float(slopes.std()), float(low), float(high))


def _observations(where: str, x: ArrayLike) -> np.ndarray:
    x = np.asarray(x, float)
    require(x.ndim == 1 and len(x) >= 2, where, "needs at least 2 observations", f"shape {x.shape}", "Run more seeds")
    return x


def _pair(where: str, a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _observations(where, a), _observations(where, b)
    require(a.shape == b.shape, where, "pairs must match", f"shapes {a.shape} and {b.shape}", "Pair by seed")
    return a, b
