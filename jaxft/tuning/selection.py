"""Subsets of a set of examples by a score: the lowest, and those around a percentile."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxft.core.checks import require


def filter_by_score(
    scores: Shaped[Array | np.ndarray, "n"],
    *,
    keep_fraction: float | None = None,
    keep: int | None = None,
    threshold: float | int | None = None,
    lowest: bool = True,
) -> Int[np.ndarray, "m"]:
    """The examples with the lowest scores (or the highest), as indices in the order of the data.

    Of equal scores at the cut the examples that come first are kept.

    Args:
      scores: One score an example.
      keep_fraction: Fraction of the examples to keep; a part of an example counts as one.
      keep: Number to keep.
      threshold: Keep every score up to this one, itself included.
      lowest: Whether low scores are kept; else high ones (with a threshold: from it up).

    Returns:
      Indices into ``scores``; with a threshold there may be none.

    Raises:
      UserError: Not exactly one way to cut, one out of range, or scores that are not finite.

    Example:
      >>> filter_by_score(np.array([3.0, 1.0, 2.0, 1.0]), keep=2).tolist()
      [1, 3]
      >>> filter_by_score(np.array([3.0, 1.0, 2.0, 1.0]), threshold=2.0, lowest=False).tolist()
      [0, 2]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, section 6 (the 5% of lowest length-normalised CHES score are kept).
    """
    where, values = "filter_by_score", _finite("filter_by_score", scores)
    given = [name for name, x in zip(CUTS, (keep_fraction, keep, threshold), strict=True) if x is not None]
    rule = "needs exactly one of keep_fraction, keep and threshold"
    require(len(given) == 1, where, rule, " and ".join(given) or "none", "Pass keep_fraction=0.05, say")
    signed = values if lowest else -values
    if threshold is not None:
        return np.flatnonzero(signed <= (threshold if lowest else -threshold))
    if keep_fraction is not None:
        within = 0 < keep_fraction <= 1
        require(within, where, "keep_fraction must lie in (0, 1]", keep_fraction, "Pass 0.05 for 5%")
        keep = math.ceil(keep_fraction * len(values) - 1e-9)  # 0.07 * 100 is above 7
    assert keep is not None
    within = 1 <= keep <= len(values)
    require(within, where, f"keep must lie in 1..{len(values)}", keep, "Pass a number of examples, or keep_fraction")
    return np.sort(np.argsort(signed, kind="stable")[:keep])


CUTS = ("keep_fraction", "keep", "threshold")


def score_percentiles(
    scores: Shaped[Array | np.ndarray, "n"], percentiles: Sequence[float | int], size: int
) -> Int[np.ndarray, "c m"]:
    """Subsets of ``size`` neighbours in rank, centred on percentiles of the score where the ends allow it.

    Args:
      scores: One score an example.
      percentiles: From 0 (the lowest scores) to 100.
      size: Examples of a subset; those of near percentiles overlap where the set is too small.

    Returns:
      A row of indices a percentile, in the order of their scores.

    Raises:
      UserError: A percentile or a size out of range, or scores that are not finite.

    Example:
      >>> score_percentiles(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), [0, 50, 100], 2).tolist()
      [[1, 3], [3, 4], [2, 0]]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, section 5 (512 samples around the 0th to the 100th percentile).
    """
    where, values = "score_percentiles", _finite("score_percentiles", scores)
    n = len(values)
    require(1 <= size <= n, where, f"size must lie in 1..{n}", size, "Score more examples, or take smaller subsets")
    within = len(percentiles) > 0 and all(0 <= p <= 100 for p in percentiles)
    require(within, where, "percentiles must be one or more in [0, 100]", list(percentiles), "Pass [0, 50, 100], say")
    order = np.argsort(values, kind="stable")
    starts = [min(max(round(p / 100 * (n - 1)) - size // 2, 0), n - size) for p in percentiles]
    return np.stack([order[start : start + size] for start in starts])


def _finite(where: str, scores: Array | np.ndarray) -> Float[np.ndarray, "n"]:
    values = np.asarray(scores, np.float64)
    fits = values.ndim == 1 and len(values) > 0
    require(fits, where, "scores must be [n], n positive", values.shape, "Pass one an example")
    bad = np.flatnonzero(~np.isfinite(values))
    shown = f"{len(bad)} that are not, the first at {bad[:1].tolist()}"
    require(
        not len(bad), where, "scores must be finite", shown, "Look at those examples: overflow, or an empty response"
    )
    return values
