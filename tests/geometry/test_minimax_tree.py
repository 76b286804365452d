"""Spanning trees and bottlenecks against scipy and the list of all paths."""

import itertools

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree

from jaxft.geometry.minimax_tree import minimax_tree

INF = np.inf


def random_saddles(seed, m=6, unknown=0.0):
    """Symmetric, above the minima, with some pairs unknown."""
    draw = np.random.default_rng(seed)
    upper = np.triu(1 + draw.random((m, m)), 1)
    upper[np.triu(draw.random((m, m)) < unknown, 1)] = INF
    return upper + upper.T + np.diag(draw.random(m))


def brute_force(saddles):
    """Lowest maximum over all paths without a repeated minimum."""
    m = len(saddles)
    best = np.array(saddles)
    for i, j in itertools.permutations(range(m), 2):
        others = [k for k in range(m) if k not in (i, j)]
        inner = itertools.chain.from_iterable(itertools.permutations(others, n) for n in range(m - 1))
        best[i, j] = min(max(saddles[a, b] for a, b in itertools.pairwise((i, *path, j))) for path in inner)
    return best


@pytest.mark.parametrize("unknown", [0.0, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bottleneck_is_the_lowest_maximum_over_all_paths(seed, unknown):
    saddles = random_saddles(seed, unknown=unknown)
    np.testing.assert_array_equal(minimax_tree(saddles).bottleneck, brute_force(saddles))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tree_is_that_of_scipy(seed):
    saddles = random_saddles(seed, m=9)
    tree = minimax_tree(saddles)
    i, j = minimum_spanning_tree(np.triu(saddles, 1)).nonzero()
    assert sorted(tree.edges) == sorted(zip(i.tolist(), j.tolist(), strict=True))
    assert (np.diff(tree.saddles) >= 0).all()


def test_bottleneck_is_an_ultrametric():
    d = minimax_tree(random_saddles(3, m=10, unknown=0.5)).bottleneck
    assert (d[:, :, None] <= np.maximum(d[:, None, :], d.T[None])).all()


def test_zero_and_negative_saddles_are_edges_too():
    saddles = np.array([[-2.0, 0.0, INF], [0.0, -3.0, -1.0], [INF, -1.0, -2.0]])
    tree = minimax_tree(saddles)
    assert tree.edges == ((1, 2), (0, 1))
    assert tree.bottleneck[0, 2] == 0.0


def test_pairs_of_two_components_are_suggested_first():
    saddles = np.full((4, 4), INF)
    saddles[[0, 1, 2, 3], [1, 0, 3, 2]] = 1.0
    np.fill_diagonal(saddles, 0.0)
    tree = minimax_tree(saddles)
    assert tree.suggestion in {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert np.isinf(tree.bottleneck[0, 2])


def test_highest_edge_is_to_be_replaced():
    # A chain 0 - 1 - 2 - 3 whose middle is the highest, the pairs (0, 2) and (1, 3) known to be higher still.
    saddles = np.array([[0, 1, 9, INF], [1, 0, 5, 9], [9, 5, 0, 2], [INF, 9, 2, 0]])
    assert minimax_tree(saddles).suggestion == (0, 3)
    saddles[[0, 3], [3, 0]] = 7
    assert minimax_tree(saddles).suggestion is None


def test_known_pair_across_the_highest_edge_moves_the_suggestion_down_the_tree():
    # 0 - 1 - 2: the cut of the edge (1, 2) has no unknown pair left but (0, 2); once that is known nothing is.
    saddles = np.array([[0, 3, INF], [3, 0, 4], [INF, 4, 0]])
    assert minimax_tree(saddles).suggestion == (0, 2)


def test_one_minimum_is_a_tree():
    tree = minimax_tree(np.array([[0.5]]))
    assert (tree.edges, tree.suggestion, tree.bottleneck.tolist()) == ((), None, [[0.5]])
