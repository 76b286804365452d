"""Probabilistic context-free grammars as arrays: dense, rule by rule, and of low rank; their symbols and conversions.

A grammar has s nonterminals, which rewrite to two symbols (or, by a unary rule, to one), and q preterminals, which
rewrite to a word. Symbols are numbered nonterminals first: preterminal ``x`` is symbol ``s + x``. All scores are log
probabilities in nats; a rule that is absent has score minus infinity.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require


@jax.tree_util.register_static
class SymbolNames:
    """Names of a grammar's symbols and words; no leaf of a pytree, and hashable, so that it passes through ``jit``."""

    def __init__(self, nonterminals: Sequence[str], preterminals: Sequence[str], words: Sequence[str]):
        self.nonterminals = tuple(nonterminals)
        self.preterminals = tuple(preterminals)
        self.words = tuple(words)
        self._hash = hash((self.nonterminals, self.preterminals, self.words))

    @property
    def symbols(self) -> tuple[str, ...]:
        """All symbols in order: nonterminals, then preterminals."""
        return self.nonterminals + self.preterminals

    @functools.cached_property
    def word_ids(self) -> dict[str, int]:
        """Number of each word."""
        return {word: i for i, word in enumerate(self.words)}

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, SymbolNames)
            and self._hash == other._hash
            and (self.nonterminals, self.preterminals, self.words)
            == (other.nonterminals, other.preterminals, other.words)
        )

    def __repr__(self) -> str:
        sizes = f"{len(self.nonterminals)} nonterminals, {len(self.preterminals)} preterminals, {len(self.words)} words"
        return f"SymbolNames({sizes})"


class PCFG(NamedTuple):
    """A grammar with its binary rules as one dense tensor."""

    log_root: Float[Array, "a"]
    """Distribution of the root. Preterminals are roots of sentences of one word."""
    log_rule: Float[Array, "s a a"]
    """P(A -> B C) at ``[A, B, C]``."""
    log_emit: Float[Array, "q v"]
    """P(preterminal -> word)."""
    log_unary: Float[Array, "s a"] | None = None
    """P(A -> B) of unary rules, part of A's total mass; chains of them are closed exactly. ``None``: none."""
    names: SymbolNames | None = None


class SparsePCFG(NamedTuple):
    """A grammar with its binary rules as a list: for treebank grammars, where few of the s a² rules exist."""

    log_root: Float[Array, "a"]
    lhs: Int[Array, "rules"]
    """Parent of each rule, a nonterminal."""
    left: Int[Array, "rules"]
    """Left child of each rule, a symbol."""
    right: Int[Array, "rules"]
    """Right child of each rule, a symbol."""
    log_rule: Float[Array, "rules"]
    log_emit: Float[Array, "q v"]
    log_unary: Float[Array, "s a"] | None = None
    names: SymbolNames | None = None


class LowRankPCFG(NamedTuple):
    r"""A grammar whose rule tensor has a CP decomposition: $P(A \to BC) = \sum_r H_{Ar} L_{rB} R_{rC}$."""

    log_root: Float[Array, "a"]
    log_head: Float[Array, "s r"]
    """log H; a row is a distribution over components."""
    log_left: Float[Array, "r a"]
    """log L; a row is a distribution over left children."""
    log_right: Float[Array, "r a"]
    """log R; a row is a distribution over right children."""
    log_emit: Float[Array, "q v"]
    names: SymbolNames | None = None


Grammar = PCFG | SparsePCFG | LowRankPCFG


def num_nonterminals(grammar: Grammar) -> int:
    """Number of nonterminals, s."""
    return grammar.log_root.shape[0] - grammar.log_emit.shape[0]


def random_pcfg(
    key: Array,
    nonterminals: int,
    preterminals: int,
    words: int,
    *,
    rules_per_nonterminal: int | None = None,
    words_per_preterminal: int | None = None,
    concentration: float = 1.0,
    terminating_frac: float = 0.0,
) -> PCFG:
    """A random grammar: every distribution is drawn from a symmetric Dirichlet over its support.

    Args:
      key: Random key.
      nonterminals: s.
      preterminals: q.
      words: v.
      rules_per_nonterminal: Size of the random support of each nonterminal's rules; ``None`` means all a² pairs.
      words_per_preterminal: Size of the random support of each preterminal's words; ``None`` means all.
      concentration: Parameter of the Dirichlet.
      terminating_frac: Of each nonterminal's mass, the part that goes to pairs of preterminals whatever is drawn. Above
        one half the grammar is consistent: derivations end with probability 1.

    Returns:
      The grammar. Its roots are the nonterminals.

    Raises:
      UserError: A size that is not positive, a support larger than the set, or a fraction outside [0, 1).

    Example:
      >>> grammar = random_pcfg(jax.random.key(0), 3, 4, 6)
      >>> grammar.log_rule.shape, round(float(jnp.exp(grammar.log_rule[0]).sum()), 5)
      ((3, 7, 7), 1.0)
    """
    where = "random_pcfg"
    sizes = {"nonterminals": nonterminals, "preterminals": preterminals, "words": words}
    require(min(sizes.values()) >= 1, where, "sizes must be positive", sizes, "Pass 1 or more of each")
    a = nonterminals + preterminals
    for name, part, whole in (
        ("rules_per_nonterminal", rules_per_nonterminal, a * a),
        ("words_per_preterminal", words_per_preterminal, words),
    ):
        require(part is None or 1 <= part <= whole, where, f"{name} must lie in 1..{whole}", part, "Change it")
    require(0 <= terminating_frac < 1, where, "terminating_frac must lie in [0, 1)", terminating_frac, "Change it")
    root_key, rule_key, end_key, emit_key = jax.random.split(key, 4)
    roots = jax.random.dirichlet(root_key, jnp.full(nonterminals, concentration))
    rules = _random_rows(rule_key, nonterminals, a * a, rules_per_nonterminal, concentration)
    rules = rules.reshape(nonterminals, a, a)
    if terminating_frac > 0:
        ends = _random_rows(end_key, nonterminals, preterminals**2, None, concentration)
        ends = ends.reshape(nonterminals, preterminals, preterminals)
        rules = ((1 - terminating_frac) * rules).at[:, nonterminals:, nonterminals:].add(terminating_frac * ends)
    emissions = _random_rows(emit_key, preterminals, words, words_per_preterminal, concentration)
    roots = jnp.concatenate([roots, jnp.zeros(preterminals, roots.dtype)])
    return PCFG(jnp.log(roots), jnp.log(rules), jnp.log(emissions))


def _random_rows(key: Array, rows: int, size: int, support: int | None, concentration: float) -> Array:
    """Dirichlet rows, each on a random support."""
    weight_key, choice_key = jax.random.split(key)
    weights = jax.random.gamma(weight_key, concentration, (rows, size))
    if support is not None:
        score = jax.random.uniform(choice_key, (rows, size))
        weights = jnp.where(score >= jnp.sort(score, axis=1)[:, size - support][:, None], weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def to_dense(grammar: Grammar) -> PCFG:
    """The same grammar with its rules as one tensor of s a² entries.

    Example:
      >>> grammar = random_pcfg(jax.random.key(0), 2, 2, 3, rules_per_nonterminal=3)
      >>> bool((to_dense(to_sparse(grammar)).log_rule == grammar.log_rule).all())
      True
    """
    if isinstance(grammar, PCFG):
        return grammar
    if isinstance(grammar, LowRankPCFG):
        head, left, right = jnp.exp(grammar.log_head), jnp.exp(grammar.log_left), jnp.exp(grammar.log_right)
        rule = jnp.einsum("sr,rb,rc->sbc", head, left, right, precision="highest")
        return PCFG(grammar.log_root, _log(rule), grammar.log_emit, None, grammar.names)
    s, a = num_nonterminals(grammar), grammar.log_root.shape[0]
    empty = jnp.full((s, a, a), -jnp.inf, grammar.log_rule.dtype)
    # A rule listed twice is one rule with the sum of the masses.
    rule = _log(jnp.exp(empty).at[grammar.lhs, grammar.left, grammar.right].add(jnp.exp(grammar.log_rule)))
    exact = empty.at[grammar.lhs, grammar.left, grammar.right].set(grammar.log_rule)
    once = jnp.zeros((s, a, a), jnp.int32).at[grammar.lhs, grammar.left, grammar.right].add(1) == 1
    return PCFG(grammar.log_root, jnp.where(once, exact, rule), grammar.log_emit, grammar.log_unary, grammar.names)


def _log(mass: Array) -> Array:
    """Logarithm whose derivative is 0 at 0."""
    return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1)), -jnp.inf)


def merge_rules(grammar: SparsePCFG) -> SparsePCFG:
    """The same grammar with each rule listed once: one that was listed twice has the sum of the masses.

    Sums over trees do not mind a rule that is listed twice, single trees do.

    Args:
      grammar: A grammar with concrete lists.

    Returns:
      The grammar; the very same where no rule is listed twice.

    Raises:
      UserError: The lists are traced.
    """
    lists = grammar.lhs, grammar.left, grammar.right
    advice = "Close over the grammar, or call without jit"
    require(is_concrete(lists), "merge_rules", "lists of rules must be concrete", "traced ones", advice)
    rows, which = np.unique(np.stack([np.asarray(x) for x in lists], axis=1), axis=0, return_inverse=True)
    if len(rows) == grammar.lhs.shape[0]:
        return grammar
    lhs, left, right = (jnp.asarray(column, jnp.int32) for column in rows.T)
    mass = jax.ops.segment_sum(jnp.exp(grammar.log_rule), jnp.asarray(which.reshape(-1)), num_segments=len(rows))
    return grammar._replace(lhs=lhs, left=left, right=right, log_rule=_log(mass))


def to_sparse(grammar: Grammar) -> SparsePCFG:
    """The same grammar as a list of the rules of positive probability, ordered by parent, left and right child.

    Args:
      grammar: A concrete grammar (how many rules there are must be known).

    Returns:
      The grammar with its rules listed.

    Raises:
      UserError: The grammar is traced.
    """
    if isinstance(grammar, SparsePCFG):
        return grammar
    require(is_concrete(grammar), "to_sparse", "the grammar must be concrete", "a traced one", "Convert it before jit")
    dense = to_dense(grammar)
    lhs, left, right = (np.asarray(axis, np.int32) for axis in np.nonzero(np.isfinite(np.asarray(dense.log_rule))))
    scores = dense.log_rule[lhs, left, right]
    rules = (jnp.asarray(lhs), jnp.asarray(left), jnp.asarray(right), scores)
    return SparsePCFG(dense.log_root, *rules, dense.log_emit, dense.log_unary, dense.names)
