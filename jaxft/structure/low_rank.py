r"""Inside recursion of a grammar of low rank, in its components.

With $P(A \to BC) = \sum_r H_{Ar} L_{rB} R_{rC}$ a chart of the vectors $L \alpha$, $R \alpha$ of each span is enough:

$$ \alpha(A, i, j) = \sum_r H_{Ar} \sum_k (L \alpha_{ik})_r\, (R \alpha_{kj})_r, $$

r t³ / 6 + 3 n r t² / 2 multiplications a sentence. Values are (p, L p, R p, s) with scales as in ``dense``.

Reference:
  Cohen, Satta and Collins 2013, Approximate PCFG parsing using tensor decomposition; Yang, Zhao and Tu 2021,
  arXiv 2104.13727.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.structure.chart import Recursion
from jaxft.structure.dense import NEVER, normalized, scaled_words
from jaxft.structure.pcfg import LowRankPCFG, num_nonterminals

Components = tuple[Array, Array, Array, Array]
"""Values (p, L p, R p, s)."""


class LowRankContext(NamedTuple):
    """The factors, for nonterminals."""

    head: Float[Array, "s r"]
    left: Float[Array, "r s"]
    right: Float[Array, "r s"]


def prepare(grammar: LowRankPCFG, log_terms: Float[Array, "b t q"]) -> tuple[LowRankContext, Components]:
    """Context and values of width 1; differentiable in both arguments."""
    s = num_nonterminals(grammar)
    words, scale = scaled_words(log_terms)
    left, right = jnp.exp(grammar.log_left), jnp.exp(grammar.log_right)
    word_left = jnp.einsum("rq,btq->btr", left[:, s:], words, precision="highest")
    word_right = jnp.einsum("rq,btq->btr", right[:, s:], words, precision="highest")
    none = jnp.zeros((*scale.shape, s), words.dtype)
    return LowRankContext(jnp.exp(grammar.log_head), left[:, :s], right[:, :s]), (none, word_left, word_right, scale)


def combine(context: LowRankContext, left: Components, right: Components, width: Int[Array, ""]) -> Components:
    """Values of the spans of a width."""
    del width
    scales = jax.lax.stop_gradient(left[3] + right[3])
    base = scales.max(axis=2)
    weights = jnp.exp(scales - base[..., None])
    merged = (left[1] * weights[..., None] * right[2]).sum(axis=2)
    p, scale = normalized(jnp.einsum("sr,bmr->bms", context.head, merged, precision="highest"), base, 2)
    to_left = jnp.einsum("rs,bms->bmr", context.left, p, precision="highest")
    to_right = jnp.einsum("rs,bms->bmr", context.right, p, precision="highest")
    return p, to_left, to_right, scale


RECURSION = Recursion(combine, zero=(0.0, 0.0, 0.0, NEVER))


def total_derivative(context: LowRankContext, cotangent: Components) -> Float[Array, "b t widths s"]:
    """Derivative by p of each span through all three of its vectors, from those by each."""
    through_left = jnp.einsum("rs,btwr->btws", context.left, cotangent[1], precision="highest")
    through_right = jnp.einsum("rs,btwr->btws", context.right, cotangent[2], precision="highest")
    return cotangent[0] + through_left + through_right
