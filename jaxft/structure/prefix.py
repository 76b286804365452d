r"""Probabilities of prefixes, and the exact distribution of the next word.

The probability that A derives a string that starts with the words of [i, j) is

$$ \pi(A, i, j) = \sum_{D} K_{AD} \sum_{BC} P(D \to BC) \sum_{k} \alpha(B, i, k)\, \pi(C, k, j), \quad
   \pi(X, i, i + 1) = P(X \to w_i), $$

where $K = (I - P_L)^{-1}$ counts the ways down to a left corner, $P_L(A, B) = \sum_C P(A \to BC) + P(A \to B)$:
whatever stands right of the last word has probability 1. It has the shape of the inside recursion, so it is filled with
it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import UserError, is_concrete, message, require
from jaxft.structure.chart import Recursion, require_lengths, span_chart
from jaxft.structure.dense import NEVER, normalized, scaled_words
from jaxft.structure.lengths import is_consistent, spectral_radius
from jaxft.structure.pcfg import PCFG, Grammar, to_dense

MAX_RULES = 2**26
"""Most entries of the rule tensor that a rule list or a low-rank grammar is spread out to."""


def prefix_log_probability(
    grammar: Grammar,
    tokens: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    lengths: Int[Array, "b"] | Int[np.ndarray, "b"] | None = None,
) -> Float[Array, "b t"]:
    r"""Log-probability that a sentence starts with the first k + 1 words, for every k.

    Of a consistent grammar whose rules sum to one. Rules are used as one tensor of s a² entries. Differentiable in the
    grammar.

    Args:
      grammar: The grammar.
      tokens: Word numbers.
      lengths: Words of each sentence; ``None``: all t.

    Returns:
      The log-probabilities, falling with k; minus infinity beyond the length.

    Raises:
      UserError: A concrete grammar that is not consistent, an unknown word, or a rule tensor that is too large.

    Example:
      >>> rule = jnp.log(jnp.array([[[0.25, 0.0], [0.0, 0.75]]]))  # S -> S S | X X
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.log(jnp.array([[0.5, 0.5]])))
      >>> jnp.exp(prefix_log_probability(grammar, jnp.array([[0, 1, 1]]))).round(5).tolist()
      [[0.5, 0.25, 0.03125]]

    Reference:
      Jelinek and Lafferty 1991, Computation of the probability of initial substring generation by stochastic
      context-free grammars; unary rules as in Stolcke 1995.
    """
    where = "prefix_log_probability"
    return _prefix(*_checked(where, grammar, tokens, lengths))


@jax.jit
def _prefix(grammar: PCFG, tokens: Int[Array, "b t"], lengths: Int[Array, "b"]) -> Float[Array, "b t"]:
    log_terms = jnp.take(grammar.log_emit, tokens, axis=1).transpose(1, 2, 0)
    words, scale = scaled_words(log_terms)
    _, prefix = _root_masses(grammar, log_terms, words, scale)
    return jnp.where(_positions(tokens.shape[1]) < lengths[:, None], prefix, -jnp.inf)


def next_word_log_probs(
    grammar: Grammar,
    tokens: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    lengths: Int[Array, "b"] | Int[np.ndarray, "b"] | None = None,
) -> tuple[Float[Array, "b prefixes v"], Float[Array, "b prefixes"]]:
    """Log-probabilities of the next word, and of the end of the sentence, after each prefix of 0 to t words.

    The Bayes-optimal prediction of a left-to-right language model. One chart for all prefixes: the posterior of the
    next preterminal is the derivative of the logarithm of the mass of longer sentences.

    Args:
      grammar: As in ``prefix_log_probability``.
      tokens: Word numbers.
      lengths: Words of each sentence; ``None``: all t.

    Returns:
      Row k is given the first k words: the words' log-probabilities and that of the end, which sum to one. Minus
      infinity after a prefix that is impossible or longer than the sentence.

    Raises:
      UserError: As in ``prefix_log_probability``.

    Example:
      >>> rule = jnp.log(jnp.array([[[0.25, 0.0], [0.0, 0.75]]]))  # S -> S S | X X
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.log(jnp.array([[0.5, 0.5]])))
      >>> words, end = next_word_log_probs(grammar, jnp.array([[0, 1]]))
      >>> jnp.exp(words[0]).round(4).tolist(), jnp.exp(end[0]).round(4).tolist()
      ([[0.5, 0.5], [0.5, 0.5], [0.125, 0.125]], [0.0, 0.0, 0.75])
    """
    where = "next_word_log_probs"
    return _next_words(*_checked(where, grammar, tokens, lengths))


@jax.jit
def _next_words(
    grammar: PCFG, tokens: Int[Array, "b t"], lengths: Int[Array, "b"]
) -> tuple[Float[Array, "b prefixes v"], Float[Array, "b prefixes"]]:
    b, t = tokens.shape
    log_terms = jnp.take(grammar.log_emit, tokens, axis=1).transpose(1, 2, 0)
    log_terms = jnp.pad(log_terms, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf)
    # What stands at a word when it is the next one: any word of the preterminal.
    unknown = jnp.ones(log_terms.shape, log_terms.dtype)

    def masses(unknown):
        inside, longer = _root_masses(grammar, log_terms, unknown, jnp.zeros((b, t + 1), unknown.dtype))
        return jnp.where(longer > -jnp.inf, longer, 0).sum(), (inside, longer)

    tags, (inside, longer) = jax.grad(masses, has_aux=True)(unknown)
    end = jnp.pad(inside[:, :t], ((0, 0), (1, 0)), constant_values=-jnp.inf)
    total = jnp.logaddexp(longer, end)
    there = (total > -jnp.inf) & (_positions(t + 1) <= lengths[:, None])
    total = jnp.where(there, total, 0)
    words = jnp.matmul(tags, jnp.exp(grammar.log_emit), precision="highest")
    log_words = jnp.where(words > 0, jnp.log(jnp.where(words > 0, words, 1)), -jnp.inf)
    log_words = log_words + jnp.where(there, longer - total, -jnp.inf)[..., None]
    return log_words, jnp.where(there, end - total, -jnp.inf)


def _checked(where: str, grammar: Grammar, tokens, lengths) -> tuple[PCFG, Int[Array, "b t"], Int[Array, "b"]]:
    s, a, v = (
        grammar.log_root.shape[0] - grammar.log_emit.shape[0],
        grammar.log_root.shape[0],
        grammar.log_emit.shape[1],
    )
    rule = f"the rule tensor may have {MAX_RULES} entries"
    require(s * a * a <= MAX_RULES, where, rule, s * a * a, "Use a smaller grammar")
    tokens = jnp.asarray(tokens)
    fits = tokens.ndim == 2 and tokens.shape[1] >= 1
    require(fits, where, "tokens must be (b, t) with t >= 1", tokens.shape, "Add the axis of sentences")
    require_lengths(where, lengths, *tokens.shape)
    tokens = jnp.asarray(tokens, jnp.int32)
    lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    there = _positions(tokens.shape[1]) < lengths[:, None]
    if is_concrete((tokens, lengths, there)):
        unknown = np.asarray(tokens)[np.asarray(there & ((tokens < 0) | (tokens >= v)))]
        require(not unknown.size, where, f"words must lie in 0..{v - 1}", unknown[:10].tolist(), "Map unknown words")
    if is_concrete(grammar) and not is_consistent(grammar):
        radius = f"spectral radius {spectral_radius(grammar):.4g}"
        rule = "the grammar must be consistent"
        raise UserError(message(where, rule, radius, "Give more mass to rules that end"))
    return to_dense(grammar), jnp.where(there, tokens, 0), lengths


def _positions(count: int) -> Int[Array, "1 t"]:
    return jnp.arange(count, dtype=jnp.int32).reshape(1, -1)


def _root_masses(
    grammar: PCFG,
    log_terms: Float[Array, "b t q"],
    last: Float[Array, "b t q"],
    last_scale: Float[Array, "b t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Log-probabilities, for every k, of a sentence of the first k + 1 words and of one that starts with k + 1 words.

    Of the second, the last word has the scores ``last`` (times the exponential of a scale) in place of its own.
    """
    s, a = grammar.log_rule.shape[:2]
    rule, root = jnp.exp(grammar.log_rule), jnp.exp(grammar.log_root)
    unary = jnp.zeros((s, a), rule.dtype) if grammar.log_unary is None else jnp.exp(grammar.log_unary)
    chains = _ways_down(unary)
    corners = _ways_down(rule.sum(axis=2) + unary)
    words, scale = scaled_words(log_terms)
    leaves = (
        *normalized(jnp.einsum("btq,aq->bta", words, chains[:, s:], precision="highest"), scale, 2),
        *normalized(jnp.einsum("btq,aq->bta", last, corners[:, s:], precision="highest"), last_scale, 2),
    )
    values = span_chart(_RECURSION, (rule, chains[:s, :s], corners[:s, :s]), leaves)
    inside, inside_scale, prefix, prefix_scale = (x[:, 0, 1:] for x in values)
    return _log(inside @ root, inside_scale), _log(prefix @ root, prefix_scale)


def _ways_down(step: Float[Array, "s a"]) -> Float[Array, "a a"]:
    """Expected visits of each symbol on the way down from each, the start included."""
    s, a = step.shape
    visits = jnp.linalg.inv(jnp.eye(s, dtype=step.dtype) - step[:, :s])
    right = jnp.concatenate([jnp.matmul(visits, step[:, s:], precision="highest"), jnp.eye(a - s, dtype=step.dtype)])
    return jnp.concatenate([jnp.concatenate([visits, jnp.zeros((a - s, s), step.dtype)]), right], axis=1)


def _combine(context, left, right, width):
    del width
    rule, chains, corners = context
    inside, inside_scale = left[:2]
    return (
        *_branch(rule, chains, inside, inside_scale, *right[:2]),
        *_branch(rule, corners, inside, inside_scale, *right[2:]),
    )


_RECURSION = Recursion(_combine, zero=(0.0, NEVER, 0.0, NEVER))


def _branch(
    rule: Float[Array, "s a a"],
    above: Float[Array, "s s"],
    left: Float[Array, "b m k a"],
    left_scale: Float[Array, "b m k"],
    right: Float[Array, "b m k a"],
    right_scale: Float[Array, "b m k"],
) -> tuple[Float[Array, "b m a"], Float[Array, "b m"]]:
    """Sum over splits, rules and what stands above them. Scales are constants of differentiation."""
    split = jax.lax.stop_gradient(left_scale + right_scale)
    base = split.max(axis=2)
    left = left * jnp.exp(split - base[..., None])[..., None]
    pairs = jnp.einsum("bmkx,bmky->bmxy", left, right, precision="highest")
    total = jnp.einsum("bmxy,axy->bma", pairs, rule, precision="highest")
    total = jnp.einsum("bmd,ad->bma", total, above, precision="highest")
    return normalized(jnp.pad(total, ((0, 0), (0, 0), (0, rule.shape[1] - len(rule)))), base, 2)


def _log(x: Float[Array, "b t"], scale: Float[Array, "b t"]) -> Float[Array, "b t"]:
    possible = (x > 0) & (scale > NEVER / 2)
    return jnp.where(possible, jnp.log(jnp.where(possible, x, 1)) + jax.lax.stop_gradient(scale), -jnp.inf)
