import itertools

import numpy as np
import pytest
import scipy.stats

from jaxft.core.statistics import mantel_test


def distances(x):
    return np.abs(x[:, None] - x)


def test_p_value_is_the_part_of_all_permutations_that_correlate_as_much():
    rng = np.random.default_rng(0)
    a, b = distances(rng.normal(size=5)), distances(rng.normal(size=5))
    above = np.triu_indices(5, 1)
    orders = [list(order) for order in itertools.permutations(range(5))]
    all_of_them = np.array([scipy.stats.spearmanr(a[above], b[np.ix_(o, o)][above])[0] for o in orders])
    found = mantel_test(a, b, permutations=4000)
    assert found.correlation == pytest.approx(all_of_them[0], abs=1e-12)
    exact = (all_of_them >= all_of_them[0] - 1e-9).mean()
    assert found.p_value == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 4000))


def test_pairs_that_share_an_object_do_not_count_as_evidence():
    """Rates of false findings at 5 %: nominal for permuted objects, several times it for pairs taken as independent."""
    rng = np.random.default_rng(1)
    above = np.triu_indices(8, 1)
    ours, naive = [], []
    for _ in range(200):
        # Both depend on the objects, each on something else of them.
        a, b = (x[:, None] + x for x in rng.normal(size=(2, 8)))
        ours.append(mantel_test(a, b, permutations=99).p_value)
        naive.append(np.asarray(scipy.stats.spearmanr(a[above], b[above], alternative="greater"))[1])
    assert np.mean(np.array(ours) <= 0.05) < 0.1
    assert np.mean(np.array(naive) <= 0.05) > 0.12


def test_what_does_not_vary_has_no_correlation():
    found = mantel_test(np.ones((4, 4)), distances(np.arange(4.0)), permutations=9)
    assert np.isnan(found.correlation)
    assert np.isnan(found.p_value)
