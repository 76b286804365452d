"""Preconditioners with structure: diagonals that are outer products, which factors of gradients bear as they are."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, PyTree

from jaxft.core.types import Params


class RankOne(NamedTuple):
    r"""The diagonal $P_{ko} = a_k b_o$ of a matrix of parameters, in the place of a leaf of a preconditioner.

    What optimisers with factored second moments have (Adafactor, Shazeer and Stern 2018, arXiv 1804.04235, section 3).

    Example:
      >>> import jax.numpy as jnp
      >>> RankOne(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])).dense().tolist()
      [[3.0, 4.0], [6.0, 8.0]]
    """

    rows: Float[Array, "*l k"]
    """Of the input side; leading axes are those of a stack of matrices."""
    columns: Float[Array, "*l o"]
    """Of the output side."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is the diagonal of a leaf of this shape: the stack, then axes of the rows, then of the columns."""
        stack = self.rows.shape[:-1]
        rest = tuple(shape[len(stack) :])
        splits = [(math.prod(rest[:i]), math.prod(rest[i:])) for i in range(1, len(rest))]
        same = stack == self.columns.shape[:-1] == tuple(shape[: len(stack)])
        return same and (self.rows.shape[-1], self.columns.shape[-1]) in splits

    def dense(self) -> Float[Array, "*l k o"]:
        """The diagonal, entry by entry."""
        return self.rows[..., :, None] * self.columns[..., None, :]


def is_rank_one(node: Any) -> bool:
    """Whether a node of a preconditioner is a whole leaf."""
    return isinstance(node, RankOne)


def dense_diagonal(preconditioner: PyTree | None, params: Params) -> PyTree | None:
    """The preconditioner, if there is one, with every leaf in the shape of its parameters."""
    if preconditioner is None:
        return None
    return jax.tree.map(
        lambda p, leaf: p.dense().reshape(leaf.shape) if is_rank_one(p) else p,
        preconditioner,
        params,
        is_leaf=is_rank_one,
    )
