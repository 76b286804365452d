"""Linear assignment: which unit goes to which, by scipy on the host or optax on device."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from jaxft.core.checks import is_concrete, nearest, require, require_finite

Solver = Literal["scipy", "optax"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)

SMALL = 512
"""Units below which prices are not worth finding first."""
UNASSIGNED_FRAC = 0.01
"""Rows that the auction may leave to the exact solver."""
ROUNDS = 300
STEP = 0.01
"""Least rise of a price, in standard deviations of the similarity."""


def solve_assignment(
    similarity: Float[Array | np.ndarray, "*l n n"], *, solver: Solver = "scipy"
) -> Int[Array | np.ndarray, "*l n"]:
    r"""Permutation $\sigma$ that maximises $\sum_i S_{i \sigma(i)}$, for one matrix or a stack of them. Exact.

    On the host, the matrix of many units is first shifted by prices of its columns, found by an auction that stops
    early: that changes no optimum, and leaves scipy's shortest paths little to do. On device the Hungarian algorithm of
    optax may be traced; on a CPU it is several times slower than scipy.

    Args:
      similarity: What each pair is worth.
      solver: ``"scipy"`` (host) or ``"optax"`` (device).

    Returns:
      The column of each row; on the device if it was solved there.

    Raises:
      UserError: Not square or empty, an unknown solver, traced input for scipy, or (on concrete input) values that are
        not finite.

    Example:
      >>> solve_assignment(np.array([[1.0, 5.0], [3.0, 6.0]])).tolist()
      [1, 0]

    Reference:
      Crouse 2016, IEEE TAES 52(4), shortest augmenting paths; Bertsekas 1988, auctions.
    """
    where, shape = "solve_assignment", np.shape(similarity)
    square = len(shape) > 1 and shape[-1] == shape[-2]
    require(square, where, "similarity must be square", shape, "Match networks of one width")
    require(0 not in shape, where, "there must be a unit to assign", shape, "Leave out groups without units")
    require(solver in SOLVERS, where, "unknown solver", repr(solver), nearest(str(solver), SOLVERS))
    require_finite(where, similarity, "similarity")
    traced = solver == "scipy" and not is_concrete(similarity)
    require(
        not traced, where, "scipy works on the host", "a traced similarity", 'Pass solver="optax", or call it outside'
    )
    if solver == "optax":
        flat = jnp.asarray(similarity).reshape(-1, *shape[-2:])
        return jax.lax.map(_hungarian, flat).reshape(shape[:-1])
    matrices = np.asarray(similarity).reshape(-1, *shape[-2:])
    return np.stack([_shortest_paths(matrix) for matrix in matrices]).reshape(shape[:-1]).astype(np.int32)


def _hungarian(similarity: Float[Array, "n n"]) -> Int[Array, "n"]:
    from optax.assignment import hungarian_algorithm

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax needs
        rows, columns = hungarian_algorithm(-similarity)
    return jnp.zeros(len(similarity), jnp.int32).at[rows].set(columns.astype(jnp.int32))


def _shortest_paths(similarity: np.ndarray) -> np.ndarray:
    if len(similarity) < SMALL:
        return linear_sum_assignment(similarity, maximize=True)[1]
    # In float64: the shift must not round one assignment's sum differently from another's.
    cost = auction_prices(similarity).astype(np.float64)[None] - similarity
    cost -= cost.min(axis=1, keepdims=True)
    return linear_sum_assignment(cost)[1]


def auction_prices(similarity: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n"]:
    """Prices of the columns after an auction in which all rows without a column bid at once.

    Each bids for its best column what would make it as good as its second best, and the highest bid takes the column.
    It ends when few rows are left: the last rows take most of the rounds.
    """
    n = len(similarity)
    prices, owner, free = np.zeros(n, similarity.dtype), np.full(n, -1), np.arange(n)
    step = similarity.dtype.type(STEP * similarity.std())
    for _ in range(ROUNDS):
        if len(free) <= UNASSIGNED_FRAC * n:
            break
        worth, rows = similarity[free] - prices[None], np.arange(len(free))
        column = worth.argmax(axis=1)
        best = worth[rows, column]
        worth[rows, column] = -np.inf
        bid = best - worth.max(axis=1) + step
        order = np.argsort(bid, kind="stable")
        winner = np.full(n, -1)
        winner[column[order]] = order  # the last to be written is the highest
        taken = np.flatnonzero(winner >= 0)
        won = winner[taken]
        prices[taken] += bid[won]
        outbid, owner[taken] = owner[taken], free[won]
        free = np.concatenate([np.delete(free, won), outbid[outbid >= 0]])
    return prices
