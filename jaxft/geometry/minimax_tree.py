"""Many minima joined by paths: the spanning tree of lowest saddles, and how high one must go between any two."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from jaxft.core.checks import require


class MinimaxTree(NamedTuple):
    """The lowest paths between minima that known saddles allow."""

    edges: tuple[tuple[int, int], ...]
    """Pairs of minima, from the lowest saddle to the highest; fewer than m - 1 where some are not connected."""
    saddles: Float[np.ndarray, "edges"]
    """Saddle of each edge."""
    bottleneck: Float[np.ndarray, "m m"]
    """The least loss that a concatenation of known paths from i to j must reach; inf where there is none.

    An ultrametric off the diagonal: no entry (i, k) exceeds the greater of (i, j) and (j, k).
    """
    suggestion: tuple[int, int] | None
    """A pair without a known path that is the next to connect; None if no such path could lower a bottleneck."""


def minimax_tree(saddles: Float[Array | np.ndarray, "m m"]) -> MinimaxTree:
    """The minimum spanning tree of minima under the losses of their saddles: its paths are the lowest ones known.

    While some minima are not connected, a pair of two components is suggested. Then the highest edge of the tree is to
    be replaced, by a path across the cut that its removal makes, and so on down the tree.

    Args:
      saddles: Highest loss on the known path between each pair, symmetric; inf where none is known. The diagonal has
        the losses of the minima (or anything below the saddles), and is kept.

    Returns:
      The tree, the bottlenecks and the pair to connect next.

    Raises:
      UserError: Not a square matrix, not symmetric, NaN, or a saddle below one of its minima.

    Example:
      >>> tree = minimax_tree(np.array([[0.0, 1.0, 5.0], [1.0, 0.0, 2.0], [5.0, 2.0, 0.0]]))
      >>> tree.edges, float(tree.bottleneck[0, 2])
      (((0, 1), (1, 2)), 2.0)

    Reference:
      Draxler et al. 2018, arXiv 1803.00885, section 3.
    """
    matrix = _checked(np.asarray(saddles, float))
    m = len(matrix)
    first, second = np.triu_indices(m, 1)
    order = np.argsort(matrix[first, second], kind="stable")
    component, bottleneck = np.arange(m), np.full((m, m), np.inf)
    np.fill_diagonal(bottleneck, matrix.diagonal())
    edges: list[tuple[int, int]] = []
    for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if component[i] == component[j] or np.isinf(matrix[i, j]):
            continue
        left, right = component == component[i], component == component[j]
        across = left[:, None] & right[None]
        bottleneck[across | across.T] = matrix[i, j]
        component[right] = component[i]
        edges.append((i, j))
    found = np.array([matrix[edge] for edge in edges])
    return MinimaxTree(tuple(edges), found, bottleneck, _suggestion(matrix, edges))


def _checked(matrix: np.ndarray) -> Float[np.ndarray, "m m"]:
    where = "minimax_tree"
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    require(square, where, "saddles must be a square matrix", f"shape {matrix.shape}", "Pass one row a minimum")
    require(not np.isnan(matrix).any(), where, "saddles must be numbers", "NaN", "Use inf where no path is known")
    require(not np.isneginf(matrix).any(), where, "saddles must be above -inf", "-inf", "Use inf where none is known")
    rule = "saddles must be symmetric"
    require(np.array_equal(matrix, matrix.T), where, rule, "another value for (j, i)", "Fill both halves")
    low = np.maximum(matrix.diagonal()[:, None], matrix.diagonal()[None])
    below = np.argwhere(matrix < low)
    shown = f"pair {tuple(below[0].tolist())}" if len(below) else ""
    require(not len(below), where, "a saddle cannot lie below its minima", shown, "Put their losses on the diagonal")
    return matrix


def _suggestion(matrix: np.ndarray, edges: list[tuple[int, int]]) -> tuple[int, int] | None:
    """An unknown pair between two components, or else across the cut of the highest edge that has one."""
    unknown = np.isinf(matrix)
    np.fill_diagonal(unknown, False)
    if len(edges) < len(matrix) - 1:
        together = _reachable(len(matrix), edges)
        return _first(unknown & ~together)
    for k in reversed(range(len(edges))):
        together = _reachable(len(matrix), edges[:k] + edges[k + 1 :])
        pair = _first(unknown & ~together)
        if pair is not None:
            return pair
    return None


def _reachable(m: int, edges: list[tuple[int, int]]) -> Bool[np.ndarray, "m m"]:
    """Which minima the edges connect."""
    component = np.arange(m)
    for i, j in edges:
        component[component == component[j]] = component[i]
    return component[:, None] == component[None]


def _first(pairs: np.ndarray) -> tuple[int, int] | None:
    found = np.argwhere(np.triu(pairs, 1))
    return (int(found[0, 0]), int(found[0, 1])) if len(found) else None
