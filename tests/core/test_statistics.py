"""The intervals on which every verdict rests: against scipy, and by how often they cover the truth."""

import numpy as np
import pytest
import scipy.stats

from jaxft.core.statistics import bootstrap_mean, log_log_slope, mean_interval, paired_difference, rank_correlation


def coverage(interval, truth, draws=400) -> float:
    hits = 0
    for seed in range(draws):
        found = interval(np.random.default_rng(seed))
        hits += found.low <= truth <= found.high
    return hits / draws


def test_mean_interval_equals_scipy():
    x = np.random.default_rng(0).normal(size=7)
    ours, theirs = mean_interval(x), scipy.stats.ttest_1samp(x, 0.0).confidence_interval()
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high])


def test_paired_difference_equals_scipy_and_ignores_what_pairs_share():
    a, b = np.random.default_rng(1).normal(size=(2, 6))
    shared = 100 * np.random.default_rng(2).normal(size=6)
    ours, theirs = paired_difference(a + shared, b + shared), scipy.stats.ttest_rel(a, b).confidence_interval()
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], rtol=1e-9)


def test_intervals_cover_the_truth_as_often_as_they_say():
    assert 0.92 < coverage(lambda rng: mean_interval(1 + rng.normal(size=5)), 1.0) < 0.98
    assert 0.90 < coverage(lambda rng: bootstrap_mean(1 + rng.normal(size=40)), 1.0) < 0.98

    def slope(rng):
        x = np.logspace(0, 2, 12)
        return log_log_slope(x, x**0.5 * np.exp(0.2 * rng.normal(size=(2, 12))))

    assert 0.88 < coverage(slope, 0.5) < 0.98

    def correlation(rng):
        x, noise = rng.normal(size=(2, 50))
        return rank_correlation(x, x + noise)

    assert 0.90 < coverage(correlation, 6 / np.pi * np.arcsin(0.5**0.5 / 2)) < 0.99


def test_slope_shares_the_exponent_and_not_the_factor():
    x = np.logspace(0, 2, 5)
    fit = log_log_slope(x, np.stack([3 * x**-0.5, 70 * x**-0.5]))
    assert abs(fit.estimate + 0.5) < 1e-12
    assert fit.high - fit.low < 1e-9


def test_rank_correlation_knows_sign_and_ignorance():
    x = np.arange(10.0)
    assert rank_correlation(x, -np.exp(x)).estimate == pytest.approx(-1)
    assert rank_correlation(x, x).excludes_zero()
    assert np.isnan(rank_correlation(x, np.ones(10)).estimate)
    assert not rank_correlation(x, np.ones(10)).excludes_zero()


@pytest.mark.parametrize("call", [lambda: mean_interval([1.0]), lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_too_few_observations_and_unmatched_pairs_are_refused(call):
    with pytest.raises(ValueError):
        call()
