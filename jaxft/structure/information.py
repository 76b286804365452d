r"""Entropy of the trees of a sentence, and divergence between what two grammars say of them; in nats.

With $p(T \mid x) = p(T, x) / Z$ all of them are $\log Z$ and an expectation of a sum over the rules of a tree. Such an
expectation is the derivative of log Z where every log score moves along the summand, one sentence at a time:

$$ \mathbb{E}_{p(T \mid x)} \sum_{\rho \in T} f_\rho = \frac{d}{d\varepsilon} \log Z(\log p + \varepsilon f). $$

It is the outside pass transposed, so that it costs about what that pass costs and keeps O(t²) values.

Reference:
  Hwa 2004, Sample selection for statistical parsing, Computational Linguistics 30(3), section 3.3.1 (tree entropy); Li
  and Eisner 2009, First- and second-order expectation semirings, section 6.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.structure.inside_outside import Words, log_partition
from jaxft.structure.pcfg import Grammar, LowRankPCFG, SparsePCFG, merge_rules, num_nonterminals, to_dense
from jaxft.structure.routes import DENSE_BYTES, Method


def tree_entropy(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
) -> Float[Array, "b"]:
    r"""Entropy of the tree of each sentence given its words, $H(T \mid x) = \log Z - \mathbb{E} \log p(T, x)$.

    Chains of unary rules are part of the tree, and so are the words at masked positions: then it is the entropy of
    trees and masked words together. The components of a low-rank grammar are not: it is made dense.

    Args:
      grammar: The grammar.
      words: As ``inside``; scores of preterminals count as if they were log probabilities of words.
      lengths: As ``inside``.
      mask: As ``inside``.
      method: As ``inside``.

    Returns:
      The entropies; 0 where there is no parse.

    Raises:
      UserError: As ``inside``.

    Example:
      >>> from jaxft.structure.pcfg import PCFG
      >>> rule = jnp.full((1, 2, 2), jnp.log(0.25))  # S -> S S | S X | X S | X X
      >>> grammar = PCFG(jnp.array([0.0, -jnp.inf]), rule, jnp.zeros((1, 1)))
      >>> round(float(jnp.exp(tree_entropy(grammar, jnp.zeros((1, 4), int)))[0]), 4)  # five bracketings, all alike
      5.0
    """
    grammar = _plain(grammar)
    scores = _scores(grammar, words)
    log_z, (expected,) = _expectations(grammar, words, lengths, mask, method, [_finite(scores)])
    return jnp.where(log_z > -jnp.inf, log_z - expected, 0)


def tree_cross_entropy(
    p: Grammar,
    q: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
) -> Float[Array, "b"]:
    r"""Cross-entropy of the trees of each sentence, $-\mathbb{E}_{p(T \mid x)} \log q(T \mid x)$.

    Args:
      p: The grammar whose trees are averaged over.
      q: The grammar that scores them; of the same symbols and words.
      words: As ``tree_entropy``.
      lengths: As ``inside``.
      mask: As ``inside``; trees with the words that they put there.
      method: As ``inside``.

    Returns:
      The cross-entropies: infinite where p has a tree that q has not, 0 where p has none.

    Raises:
      UserError: As ``inside``; or the grammars are of other symbols or words.
    """
    p, q = _aligned("tree_cross_entropy", p, q)
    theirs = _finite(_scores(q, words))
    log_z, (expected, forbidden) = _expectations(p, words, lengths, mask, method, [theirs, _missing(p, q, words)])
    surprise = log_partition(q, words, lengths, mask=mask, method=method) - expected
    return _where_possible(log_z, forbidden, surprise)


def tree_kl(
    p: Grammar,
    q: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
) -> Float[Array, "b"]:
    r"""Divergence of the trees of each sentence, $\mathrm{KL}(p(T \mid x) \,\|\, q(T \mid x))$.

    How unlike the two grammars parse, whatever they say of the probability of the sentence.

    Args:
      p: The grammar whose trees are averaged over.
      q: The other; of the same symbols and words.
      words: As ``inside``.
      lengths: As ``inside``.
      mask: As ``inside``; trees with the words that they put there.
      method: As ``inside``.

    Returns:
      The divergences: infinite where p has a tree that q has not, 0 where p has none.

    Raises:
      UserError: As ``inside``; or the grammars are of other symbols or words.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> p, q = (random_pcfg(jax.random.key(i), 2, 2, 3) for i in (0, 1))
      >>> words = jnp.array([[0, 1, 2]])
      >>> bool(tree_kl(p, q, words)[0] > 0.1), abs(round(float(tree_kl(p, p, words)[0]), 5))
      (True, 0.0)
    """
    p, q = _aligned("tree_kl", p, q)
    ours, theirs = _finite(_scores(p, words)), _finite(_scores(q, words))
    ratio = jax.tree.map(jnp.subtract, ours, theirs)
    log_z, (expected, forbidden) = _expectations(p, words, lengths, mask, method, [ratio, _missing(p, q, words)])
    other = log_partition(q, words, lengths, mask=mask, method=method)
    return _where_possible(log_z, forbidden, expected - log_z + other)


def _plain(grammar: Grammar) -> Grammar:
    """A grammar in which a rule is one choice: no components, and no rule listed twice."""
    if isinstance(grammar, LowRankPCFG):
        return to_dense(grammar)
    if isinstance(grammar, SparsePCFG) and is_concrete((grammar.lhs, grammar.left, grammar.right)):
        return merge_rules(grammar)
    return grammar


_Scores = dict[str, Array]
"""The scores that a tree sums: those of the grammar by name, and of the words where they are not numbers."""


def _scores(grammar: Grammar, words: Words) -> _Scores:
    found = {name: x for name, x in grammar._asdict().items() if name.startswith("log_") and x is not None}
    return found | ({"words": words} if jnp.issubdtype(words.dtype, jnp.floating) else {})


def _finite(scores: _Scores) -> _Scores:
    """Scores with 0 for what no tree uses."""
    return {name: jnp.where(x > -jnp.inf, x, 0) for name, x in scores.items()}


def _missing(p: Grammar, q: Grammar, words: Words) -> _Scores:
    """1 for what p has and q has not."""
    ours, theirs = _scores(p, words), _scores(q, words)
    return {name: jnp.asarray((x > -jnp.inf) & (theirs[name] == -jnp.inf), x.dtype) for name, x in ours.items()}


def _expectations(
    grammar: Grammar, words: Words, lengths: Array | None, mask: Array | None, method: Method, summands: list[_Scores]
) -> tuple[Float[Array, "b"], list[Float[Array, "b"]]]:
    """Log Z, and the expected sum of each kind of summand over the tree of each sentence."""

    def log_z(scores: _Scores) -> Array:
        rules = {name: x for name, x in scores.items() if name != "words"}
        observed = scores.get("words", words)
        return log_partition(grammar._replace(**rules), observed, lengths, mask=mask, method=method)

    value, pull = jax.vjp(log_z, _scores(grammar, words))
    # The pull of a cotangent is linear in it; its transpose maps a direction of the scores to a derivative a sentence.
    push = jax.linear_transpose(pull, value)
    return value, [push((direction,))[0] for direction in summands]


def _where_possible(log_z: Array, forbidden: Array, value: Array) -> Float[Array, "b"]:
    """``value`` where there is a tree; infinite where a forbidden rule is used, beyond what is rounding."""
    value = jnp.where(forbidden > jnp.finfo(forbidden.dtype).eps, jnp.inf, value)
    return jnp.where(log_z > -jnp.inf, value, 0)


def _aligned(where: str, p: Grammar, q: Grammar) -> tuple[Grammar, Grammar]:
    """The two grammars with the same arrays of the same shapes."""
    shapes = [(g.log_root.shape[0], *g.log_emit.shape) for g in (p, q)]
    rule = "both grammars must have the same numbers of symbols, preterminals and words"
    require(shapes[0] == shapes[1], where, rule, shapes, "Read both off one set of symbols")
    p, q = _plain(p), _plain(q)
    if not _same_list(p, q):
        rule = f"grammars with other lists of rules must fit {DENSE_BYTES / 2**30:.0f} GiB as tensors"
        size = num_nonterminals(p) * p.log_root.shape[0] ** 2 * p.log_root.dtype.itemsize
        advice = "List the same rules in both, with score minus infinity for those that one lacks"
        require(size <= DENSE_BYTES, where, rule, f"{size / 2**30:.1f} GiB", advice)
        p, q = to_dense(p), to_dense(q)
    unary = getattr(p, "log_unary", None)
    if unary is not None and getattr(q, "log_unary", None) is None:
        q = q._replace(log_unary=jnp.full_like(unary, -jnp.inf))
    return p, q


def _same_list(p: Grammar, q: Grammar) -> bool:
    if not (isinstance(p, SparsePCFG) and isinstance(q, SparsePCFG)):
        return False
    lists = [(g.lhs, g.left, g.right) for g in (p, q)]
    return is_concrete(lists) and all(np.array_equal(x, y) for x, y in zip(*lists, strict=True))
