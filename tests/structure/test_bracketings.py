import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.bracketings import best_bracketing, bracketing_chart
from jaxft.structure.parses import parse_spans
from jaxft.structure.semirings import LOG, log_weight


@functools.cache
def bracketings(i: int, j: int) -> list[frozenset[tuple[int, int]]]:
    """All binary bracketings of [i, j) as sets of spans, those with the shortest left part first."""
    if j - i == 1:
        return [frozenset([(i, j)])]
    return [
        frozenset([(i, j)]) | left | right
        for k in range(i + 1, j)
        for left in bracketings(i, k)
        for right in bracketings(k, j)
    ]


def random_scores(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 6, 7))


def best_by_hand(scores: np.ndarray, length: int) -> tuple[float, frozenset[tuple[int, int]]]:
    totals = [(sum(scores[span] for span in tree), tree) for tree in bracketings(0, length)]
    return max(totals, key=lambda pair: pair[0])


def spans_of(parses, row: int) -> frozenset[tuple[int, int]]:
    return frozenset((i, j) for _, i, j in parse_spans(parses)[row])


def test_best_bracketing_is_the_best_of_all(x64):
    scores = random_scores()
    parses, allowed = best_bracketing(jnp.asarray(scores))
    assert allowed.all()
    for row in range(3):
        total, tree = best_by_hand(scores[row], 6)
        assert spans_of(parses, row) == tree
        assert float(parses.score[row]) == pytest.approx(total)


def test_lengths_bound_the_tree(x64):
    scores = random_scores(1)
    lengths = (0, 1, 2)
    parses, allowed = best_bracketing(jnp.asarray(scores), jnp.array(lengths))
    assert allowed.tolist() == [False, True, True]
    assert parses.valid.sum(axis=1).tolist() == [0, 1, 3]
    assert float(parses.score[1]) == pytest.approx(scores[1, 0, 1])
    assert spans_of(parses, 2) == {(0, 2), (0, 1), (1, 2)}
    parses, allowed = best_bracketing(jnp.asarray(scores), jnp.array([5, 3, 4]))
    for row, length in enumerate((5, 3, 4)):
        assert spans_of(parses, row) == best_by_hand(scores[row], length)[1]


def test_ties_go_to_the_shortest_left_part(x64):
    parses, _ = best_bracketing(jnp.zeros((3, 6, 7)))
    assert spans_of(parses, 0) == {(i, 6) for i in range(6)} | {(i, i + 1) for i in range(6)}


def test_forbidden_spans_are_avoided_and_no_tree_left_is_reported(x64):
    scores = random_scores(2)
    scores[0, 1:5, 6] = -np.inf  # nothing but the last word may end at the end: left-branching at the root
    scores[1, 0, 6] = -np.inf
    scores[2, 2, 3] = -np.inf  # a word
    parses, allowed = best_bracketing(jnp.asarray(scores))
    assert allowed.tolist() == [True, False, False]
    assert spans_of(parses, 0) == best_by_hand(scores[0], 6)[1]
    assert parses.score.tolist()[1:] == [-np.inf, -np.inf]


def test_log_total_is_the_sum_over_all_bracketings(x64):
    scores = random_scores(3)
    log_z = log_weight(LOG, bracketing_chart(jnp.asarray(scores)))
    for length in (1, 3, 6):
        totals = [sum(scores[0][span] for span in tree) for tree in bracketings(0, length)]
        assert float(log_z[0, 0, length]) == pytest.approx(np.logaddexp.reduce(totals))


def test_gradient_of_the_log_total_is_the_posterior_of_spans(x64):
    scores = random_scores(3)
    scores[1, 0, 2] = -np.inf
    gradient = jax.grad(lambda x: bracketing_chart(x)[0][:, 0, 6].sum())(jnp.asarray(scores))
    for row in (0, 1):
        totals = np.array([sum(scores[row][span] for span in tree) for tree in bracketings(0, 6)])
        weights = np.exp(totals - np.logaddexp.reduce(totals))
        for i, j in [(0, 6), (0, 2), (1, 4), (2, 3)]:
            expected = sum(w for w, tree in zip(weights, bracketings(0, 6), strict=True) if (i, j) in tree)
            assert float(gradient[row, i, j]) == pytest.approx(expected, abs=1e-12)
    assert np.isfinite(gradient).all()
