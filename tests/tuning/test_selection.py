"""Subsets by score."""

import numpy as np
import pytest

from jaxft.tuning.selection import filter_by_score, score_percentiles

SCORES = np.array([3.0, 1.0, 2.0, 1.0, 5.0, 4.0, 1.0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 2}, [1, 3]),
        ({"keep": 4}, [1, 2, 3, 6]),
        ({"keep": 2, "lowest": False}, [4, 5]),
        ({"keep_fraction": 0.2}, [1, 3]),
        ({"keep_fraction": 1.0}, list(range(7))),
        ({"threshold": 1.0}, [1, 3, 6]),
        ({"threshold": 0.5}, []),
        ({"threshold": 4.0, "lowest": False}, [4, 5]),
    ],
)
def test_the_lowest_or_highest_scores_are_kept_in_the_order_of_the_data(options, expected):
    assert filter_by_score(SCORES, **options).tolist() == expected


def test_a_fraction_is_rounded_up_but_not_by_rounding_errors():
    counts = {(370, 0.05): 19, (100, 0.07): 7, (3, 0.01): 1}
    assert {key: len(filter_by_score(np.arange(key[0]), keep_fraction=key[1])) for key in counts} == counts


def test_percentiles_are_neighbours_in_rank_around_the_quantile():
    scores = np.random.default_rng(0).permutation(101).astype(float)
    found = score_percentiles(scores, [0, 25, 50, 75, 100], 11)
    assert scores[found].tolist() == [[*range(a, a + 11)] for a in (0, 20, 45, 70, 90)]


def test_equal_scores_are_taken_in_the_order_of_the_data():
    assert score_percentiles(np.zeros(6), [0, 100], 3).tolist() == [[0, 1, 2], [3, 4, 5]]
