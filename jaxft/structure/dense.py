r"""Inside recursion of a dense grammar by matrix products, in probabilities scaled span by span.

A value is a pair (p, s): the inside probabilities of a span are $\alpha(A) = p_A e^{s}$ with $\max_A p_A = 1$. The
splits of a span are summed before the rules are applied,

$$ O_{BC} = \sum_k \alpha(B, i, k)\, \alpha(C, k, j), \qquad \alpha(A, i, j) = \sum_{BC} P(A \to BC)\, O_{BC}, $$

which is a matrix product over splits and one over pairs: n² t³ / 3 + n³ t² operations a sentence instead of n³ t³ / 3.
Children that are one word long have preterminals; what a rule makes of them is multiplied out once a position.

Scales are constants of differentiation: $p e^s$ does not depend on how it is split.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.structure.chart import Recursion, padding
from jaxft.structure.pcfg import PCFG
from jaxft.structure.unary import unary_closure

NEVER = -1e30
"""Scale of an impossible span: finite, so that no difference of scales is NaN."""

Scaled = tuple[Array, Array]
"""Values (p, s)."""


class DenseContext(NamedTuple):
    """What every combination of a sentence batch sees; positions are padded behind the sentence."""

    rule: Float[Array, "s s s"]
    """P(A -> B C) of nonterminal children, unary chains above included."""
    word_right: Float[Array, "b t s s"]
    """At [j, A, B]: A -> B X with X the (scaled) word j."""
    word_left: Float[Array, "b t s s"]
    """At [i, A, C]: A -> X C with X the (scaled) word i."""
    pair: Float[Array, "b t s"]
    """At [i, A]: A -> X Y with the words i and i + 1."""
    scale: Float[Array, "b t"]
    """Log scale of each word."""


def prepare(grammar: PCFG, log_terms: Float[Array, "b t q"], *, chunks: int) -> tuple[DenseContext, Scaled]:
    """Context and values of width 1; differentiable in both arguments.

    Args:
      grammar: The grammar.
      log_terms: Log score of each preterminal at each word.
      chunks: Chunks of widths that the chart will have.

    Returns:
      The context, and (p, s) of single words: what nonterminals make of them by unary chains.
    """
    s = grammar.log_rule.shape[0]
    rule, words, scale = jnp.exp(grammar.log_rule), *scaled_words(log_terms)
    leaves = jnp.zeros((*scale.shape, s), words.dtype), jnp.full_like(scale, NEVER)
    if grammar.log_unary is not None:
        closure = unary_closure(grammar.log_unary)
        rule = jnp.einsum("ad,dbc->abc", closure.star, rule, precision="highest")
        leaves = normalized(jnp.einsum("btq,aq->bta", words, closure.to_preterminal, precision="highest"), scale, 2)

    word_right = jnp.einsum("btq,acq->btac", words, rule[:, :s, s:], precision="highest")
    word_left = jnp.einsum("btq,aqc->btac", words, rule[:, s:, :s], precision="highest")
    after = jnp.roll(words, -1, axis=1).at[:, -1].set(0)
    first = jnp.einsum("btq,aqx->btax", words, rule[:, s:, s:], precision="highest")
    pair = jnp.einsum("btax,btx->bta", first, after, precision="highest")
    spare = padding(log_terms.shape[1], chunks)
    word_right, word_left, pair = (_padded(x, spare, 0.0) for x in (word_right, word_left, pair))
    return DenseContext(rule[:, :s, :s], word_right, word_left, pair, _padded(scale, spare, NEVER)), leaves


def scaled_words(log_terms: Float[Array, "b t q"]) -> tuple[Float[Array, "b t q"], Float[Array, "b t"]]:
    """Scores of the preterminals at each word over their largest, and its logarithm; an impossible word is 0."""
    top = jax.lax.stop_gradient(log_terms.max(axis=2))
    possible = top > -jnp.inf
    return jnp.exp(log_terms - jnp.where(possible, top, 0)[..., None]), jnp.where(possible, top, NEVER)


def normalized(values: Array, scale: Array, axis: int) -> Scaled:
    """Values divided by their largest along the axis of symbols, and the scale that belongs to them."""
    top = jax.lax.stop_gradient(values.max(axis=axis))
    possible = (top > 0) & (scale > NEVER / 2)
    divisor = jnp.where(top > 0, top, 1)
    return values / jnp.expand_dims(divisor, axis), jnp.where(possible, scale + jnp.log(divisor), NEVER)


def combine(context: DenseContext, left: Scaled, right: Scaled, width: Int[Array, ""]) -> Scaled:
    """Values of the spans of a width."""
    weights, base = _weights(context, left[1], right[1], width)
    return normalized(_sums(context, left[0], right[0], width, weights), base, 2)


def pull(context, left, right, width, out, cotangent):
    """Cotangents of context and children. The sums are linear in each, so that they need not be formed again."""
    weights, base = _weights(context, left[1], right[1], width)
    possible = out[1] > NEVER / 2
    factor = jnp.where(possible, jnp.exp(jnp.where(possible, base - out[1], 0)), 0)
    _, transpose = jax.vjp(lambda c, x, y: _sums(c, x, y, width, weights), context, left[0], right[0])
    d_context, d_left, d_right = transpose(cotangent[0] * factor[..., None])
    return d_context, (d_left, jnp.zeros_like(left[1])), (d_right, jnp.zeros_like(right[1]))


RECURSION = Recursion(combine, zero=(0.0, NEVER), pull=pull)


def _weights(
    context: DenseContext, left: Float[Array, "b m k"], right: Float[Array, "b m k"], width: Int[Array, ""]
) -> tuple[tuple[Array, ...], Array]:
    """Relative weight of each way to split a span, and the common scale; constants of differentiation."""
    left, right, scale = jax.lax.stop_gradient((left, right, context.scale))
    starts = left.shape[1]
    first, last = scale[:, :starts], jax.lax.dynamic_slice_in_dim(scale, width - 1, starts, 1)
    ways = (
        left + right,
        jnp.take(left, width - 2, axis=2)[..., None] + last[..., None],
        (first + right[:, :, 0])[..., None],
        jnp.where(width == 2, first + last, 2 * NEVER)[..., None],
    )
    base = jnp.concatenate(ways, axis=2).max(axis=2)
    return tuple(jnp.exp(way - base[..., None]) for way in ways), base


def _sums(
    context: DenseContext, left: Float[Array, "b m k s"], right: Float[Array, "b m k s"], width: Array, weights
) -> Float[Array, "b m s"]:
    """Inside probabilities over the common scale."""
    b, m, _, s = left.shape
    split, word_right, word_left, pair = weights
    pairs = jnp.einsum("bmkx,bmky->bmxy", left * split[..., None], right, precision="highest")
    total = jnp.matmul(pairs.reshape(b * m, s * s), context.rule.reshape(s, s * s).T, precision="highest")
    last = jax.lax.dynamic_slice_in_dim(context.word_right, width - 1, m, 1)
    longest = jnp.take(left, width - 2, axis=2) * word_right
    total = total.reshape(b, m, s) + jnp.einsum("bmac,bmc->bma", last, longest, precision="highest")
    first = context.word_left[:, :m]
    total += jnp.einsum("bmac,bmc->bma", first, right[:, :, 0] * word_left, precision="highest")
    return total + context.pair[:, :m] * pair


def _padded(x: Array, spare: int, fill: float) -> Array:
    return jnp.pad(x, [(0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
