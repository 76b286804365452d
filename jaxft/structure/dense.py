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

from jaxft.structure.chart import Chart, Recursion, padding
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
    """Cotangents of the rules and of the children.

    The sums are linear in each, so that they need not be formed again. Written out for the layouts of the products;
    cotangents of the word tables are left to ``finish``.
    """
    (p_left, p_right), (b, m, k, s) = (left[0], right[0]), left[0].shape
    weights, base = _weights(context, left[1], right[1], width)
    split, word_right, word_left, _ = weights
    sums = cotangent[0] * _exp_where(out[1] > NEVER / 2, base - out[1])[..., None]
    rows = sums.reshape(b * m, s)
    d_pairs = jnp.matmul(rows, context.rule.reshape(s, s * s), precision="highest").reshape(b, m, s, s)
    pairs = _pairs(p_left, p_right, split).reshape(b * m, s * s)
    d_rule = jnp.matmul(rows.T, pairs, precision="highest").reshape(s, s, s)
    d_left = jnp.einsum("bmky,bmxy->bmkx", p_right, d_pairs, precision="highest") * split[..., None]
    d_right = jnp.matmul(p_left * split[..., None], d_pairs, precision="highest")

    last = jax.lax.dynamic_slice_in_dim(context.word_right, width - 1, m, 1)
    d_longest = jnp.einsum("bmac,bma->bmc", last, sums, precision="highest") * word_right
    d_rest = jnp.einsum("bmac,bma->bmc", context.word_left[:, :m], sums, precision="highest") * word_left
    at = jnp.arange(k, dtype=width.dtype)[None, None, :, None]
    d_left += jnp.where(at == width - 2, d_longest[:, :, None], 0)
    d_right += jnp.where(at == 0, d_rest[:, :, None], 0)
    d_context = jax.tree.map(jnp.zeros_like, context)._replace(rule=d_rule)
    return d_context, (d_left, jnp.zeros_like(left[1])), (d_right, jnp.zeros_like(right[1]))


def finish(context: DenseContext, chart: Chart, d_values: Scaled) -> DenseContext:
    """Cotangents of what words make of their neighbours: a product a position, over all spans that it borders."""
    (p, scale), (p_end, scale_end), d_p = chart.values, chart.by_end, d_values[0]
    t = p.shape[1]
    word, spare = context.scale[:, :t], context.scale.shape[1] - t

    def sums(d_parent: Array, parent: Array, rest: Array, word: Array) -> Array:
        possible = (parent > NEVER / 2) & (rest > NEVER / 2)
        return d_parent * _exp_where(possible, rest + word[..., None] - parent)[..., None]

    # Widths 2 to t that start with word i; the rest, of one word less, starts at i + 1.
    first = sums(d_p[:, :-1, 2:], scale[:, :-1, 2:], scale[:, 1:, 1:t], word[:, :-1])
    word_left = jnp.einsum("btwa,btwc->btac", first, p[:, 1:, 1:t], precision="highest")
    # The same widths, the widest first, that end with word j; the rest ends before it.
    last = sums(_by_end(d_p)[:, 1:], scale_end[:, 2 : t + 1, : t - 1], scale_end[:, 1:t, 1:t], word[:, 1:])
    word_right = jnp.einsum("btwa,btwc->btac", last, p_end[:, 1:t, 1:t], precision="highest")
    two = scale[:, :-1, min(t, 2)]  # a sentence of one word has no pair
    pair = d_p[:, :-1, min(t, 2)] * _exp_where(two > NEVER / 2, word[:, :-1] + word[:, 1:] - two)[..., None]
    return DenseContext(
        jnp.zeros_like(context.rule),
        jnp.pad(word_right, [(0, 0), (1, spare), (0, 0), (0, 0)]),
        jnp.pad(word_left, [(0, 0), (0, spare + 1), (0, 0), (0, 0)]),
        jnp.pad(pair, [(0, 0), (0, spare + 1), (0, 0)]),
        jnp.zeros_like(context.scale),
    )


def _by_end(values: Float[Array, "b t widths s"]) -> Float[Array, "b t splits s"]:
    """From starts and widths 0 to t to last words and widths t down to 2; 0 where no span is."""
    t = values.shape[1]
    width = jnp.arange(t, 1, -1)[None]
    start = jnp.arange(t)[:, None] + 1 - width
    taken = values[:, jnp.maximum(start, 0), jnp.broadcast_to(width, start.shape)]
    return jnp.where((start >= 0)[None, :, :, None], taken, 0)


def _exp_where(possible: Array, x: Array) -> Array:
    """The exponential where it is possible, 0 elsewhere; no overflow in either."""
    return jnp.where(possible, jnp.exp(jnp.where(possible, x, 0)), 0)


RECURSION = Recursion(combine, zero=(0.0, NEVER), pull=pull, finish=finish)


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
    pairs = _pairs(left, right, split)
    total = jnp.matmul(pairs.reshape(b * m, s * s), context.rule.reshape(s, s * s).T, precision="highest")
    last = jax.lax.dynamic_slice_in_dim(context.word_right, width - 1, m, 1)
    longest = jnp.take(left, width - 2, axis=2) * word_right
    total = total.reshape(b, m, s) + jnp.einsum("bmac,bmc->bma", last, longest, precision="highest")
    first = context.word_left[:, :m]
    total += jnp.einsum("bmac,bmc->bma", first, right[:, :, 0] * word_left, precision="highest")
    return total + context.pair[:, :m] * pair


def _pairs(
    left: Float[Array, "b m k s"], right: Float[Array, "b m k s"], split: Float[Array, "b m k"]
) -> Float[Array, "b m s s"]:
    """Sums over splits of each pair of children."""
    # Splits last, as the product reads fastest; without the barrier XLA would take the transpose back.
    weighted = jax.lax.optimization_barrier(jnp.swapaxes(left * split[..., None], 2, 3))
    return jnp.matmul(weighted, right, precision="highest")


def _padded(x: Array, spare: int, fill: float) -> Array:
    return jnp.pad(x, [(0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
