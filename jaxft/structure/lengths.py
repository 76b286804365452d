r"""How long the sentences of a grammar are, how often it uses its symbols, and how much a derivation tells.

The inside mass of length w, $Z_w(A) = P(A \Rightarrow^* \text{some } w \text{ words})$, is the inside recursion with
the words summed out, so it depends on the number of words alone:
$Z_w(A) = \sum_{D} U^*_{AD} \sum_{BC} P(D \to BC) \sum_{k} Z_k(B)\, Z_{w-k}(C)$.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxft.core.checks import UserError, is_concrete, message, require
from jaxft.structure.pcfg import PCFG, Grammar, LowRankPCFG, SparsePCFG, num_nonterminals, to_dense
from jaxft.structure.unary import unary_closure


def length_log_probs(grammar: Grammar, max_length: int) -> Float[Array, "lengths a"]:
    r"""Log-probability that a symbol derives a string of w words, $\log Z_w(A)$, for w = 0 to ``max_length``.

    O(w² a²) for the splits and O(w s a²) for the rules (the number of rules, of a rule list). Each length has a scale
    of its own, so nothing underflows; within a length, what is below the smallest float of the largest is 0.

    Args:
      grammar: Of any kind; derivations that never end have no length.
      max_length: Longest w.

    Returns:
      The table; row 0 is minus infinity.

    Raises:
      UserError: ``max_length`` below 1.

    Example:
      >>> half = jnp.log(jnp.array([[[0.5, 0.0], [0.0, 0.5]]]))  # S -> S S | X X
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), half, jnp.zeros((1, 1)))
      >>> jnp.exp(length_log_probs(grammar, 4)[:, 0]).round(4).tolist()
      [0.0, 0.0, 0.5, 0.0, 0.125]
    """
    where = "length_log_probs"
    require(max_length >= 1, where, "max_length must be at least 1", max_length, "Pass the longest length of interest")
    return _length_table(grammar, max_length)


@functools.partial(jax.jit, static_argnums=1)
def _length_table(grammar: Grammar, max_length: int) -> Float[Array, "lengths a"]:
    s, dtype = num_nonterminals(grammar), grammar.log_root.dtype
    words = jnp.exp(grammar.log_emit).sum(axis=1)
    log_unary = getattr(grammar, "log_unary", None)
    closure = None if log_unary is None else unary_closure(log_unary)
    one = jnp.zeros(s, dtype) if closure is None else closure.to_preterminal @ words
    first, scale = _scaled(jnp.concatenate([one, words]))
    masses = jnp.zeros((max_length + 1, len(first)), dtype).at[1].set(first)
    scales = jnp.full(max_length + 1, -jnp.inf, dtype).at[1].set(scale)
    number = jnp.arange(max_length + 1, dtype=jnp.int32)

    def step(carry, width):
        masses, scales = carry
        right = jnp.where((number >= 1) & (number < width), width - number, 0)  # length 0 has no mass
        base = scales + scales[right]
        top = base.max()
        weights = jnp.where(base > -jnp.inf, jnp.exp(base - jnp.where(top > -jnp.inf, top, 0)), 0)
        branch = _branch(grammar, masses * weights[:, None], masses[right])
        value, scale = _scaled(branch if closure is None else closure.star @ branch)
        value = jnp.concatenate([value, jnp.zeros(len(first) - s, dtype)])
        return (masses.at[width].set(value), scales.at[width].set(scale + top)), None

    if max_length > 1:
        (masses, scales), _ = jax.lax.scan(step, (masses, scales), jnp.arange(2, max_length + 1, dtype=jnp.int32))
    known = masses > 0
    return jnp.where(known, jnp.log(jnp.where(known, masses, 1)) + scales[:, None], -jnp.inf)


def _scaled(x: Float[Array, "a"]) -> tuple[Float[Array, "a"], Float[Array, ""]]:
    """Values of maximum 1, and the logarithm of their scale."""
    top = jax.lax.stop_gradient(x.max())
    safe = jnp.where(top > 0, top, 1)
    return x / safe, jnp.where(top > 0, jnp.log(safe), -jnp.inf)


def _branch(grammar: Grammar, left: Float[Array, "lengths a"], right: Float[Array, "lengths a"]) -> Float[Array, "s"]:
    """Sum over splits and binary rules."""
    with jax.default_matmul_precision("highest"):
        if isinstance(grammar, PCFG):
            return jnp.tensordot(jnp.exp(grammar.log_rule), left.T @ right, axes=2)
        if isinstance(grammar, LowRankPCFG):
            pairs = (left @ jnp.exp(grammar.log_left).T) * (right @ jnp.exp(grammar.log_right).T)
            return jnp.exp(grammar.log_head) @ pairs.sum(axis=0)
        uses = jnp.exp(grammar.log_rule) * (left[:, grammar.left] * right[:, grammar.right]).sum(axis=0)
        return jax.ops.segment_sum(uses, grammar.lhs, num_nonterminals(grammar))


def length_distribution(grammar: Grammar, max_length: int) -> Float[Array, "lengths"]:
    """Log-probability that a sentence has w words, for w = 0 to ``max_length``.

    Args:
      grammar: Of any kind.
      max_length: Longest w.

    Returns:
      The log-probabilities; what they lack to one is the mass of longer sentences and of derivations without end.

    Example:
      >>> half = jnp.log(jnp.array([[[0.5, 0.0], [0.0, 0.5]]]))  # S -> S S | X X
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), half, jnp.zeros((1, 1)))
      >>> jnp.exp(length_distribution(grammar, 6)).round(4).tolist()
      [0.0, 0.0, 0.5, 0.0, 0.125, 0.0, 0.0625]
    """
    scores = length_log_probs(grammar, max_length) + grammar.log_root.reshape(1, -1)
    top = jax.lax.stop_gradient(scores.max(axis=1))
    possible = top > -jnp.inf
    # A length without a sentence must not make a gradient NaN.
    total = jnp.exp(scores - jnp.where(possible, top, 0)[:, None]).sum(axis=1)
    return jnp.where(possible, jnp.log(jnp.where(possible, total, 1)) + top, -jnp.inf)


def mean_matrix(grammar: Grammar) -> Float[Array, "s a"]:
    r"""Expected number of children B of one A, $M_{AB} = \sum_C P(A \to BC) + P(A \to CB)$ and $P(A \to B)$.

    Example:
      >>> half = jnp.log(jnp.array([[[0.5, 0.0], [0.0, 0.5]]]))  # S -> S S | X X
      >>> mean_matrix(PCFG(jnp.log(jnp.array([1.0, 0.0])), half, jnp.zeros((1, 1)))).tolist()
      [[1.0, 1.0]]
    """
    s, a = num_nonterminals(grammar), len(grammar.log_root)
    if isinstance(grammar, LowRankPCFG):
        left, right = jnp.exp(grammar.log_left), jnp.exp(grammar.log_right)
        children = left * right.sum(axis=1, keepdims=True) + right * left.sum(axis=1, keepdims=True)
        return jnp.matmul(jnp.exp(grammar.log_head), children, precision="highest")
    rule = jnp.exp(grammar.log_rule)
    if isinstance(grammar, SparsePCFG):
        binary = jnp.zeros((s, a), rule.dtype).at[grammar.lhs, grammar.left].add(rule)
        binary = binary.at[grammar.lhs, grammar.right].add(rule)
    else:
        binary = rule.sum(axis=2) + rule.sum(axis=1)
    return binary if grammar.log_unary is None else binary + jnp.exp(grammar.log_unary)


def spectral_radius(grammar: Grammar) -> float:
    """Largest growth rate of the nonterminals that a sentence can have: the spectral radius of their mean matrix.

    Example:
      >>> rule = jnp.log(jnp.array([[[0.3, 0.0], [0.0, 0.7]]]))  # S -> S S | X X
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.zeros((1, 1)))
      >>> round(spectral_radius(grammar), 5), is_consistent(grammar)
      (0.6, True)
    """
    means = _nonterminal_means("spectral_radius", grammar)
    return float(np.abs(np.linalg.eigvals(means)).max(initial=0.0))


def is_consistent(grammar: Grammar) -> bool:
    """Whether derivations end with probability 1 after a finite expected number of words: spectral radius below 1.

    At 1 exactly they may still end, but their expected length is infinite; ``partition_function`` then tells.

    Reference:
      Booth and Thompson 1973, Applying probability measures to abstract languages.
    """
    means = _nonterminal_means("is_consistent", grammar)
    # M >= 0 has spectral radius below 1 exactly where x = 1 + M x has a solution x >= 1: no eigenvalues needed.
    try:
        visits = np.linalg.solve(np.eye(len(means)) - means, np.ones(len(means)))
    except np.linalg.LinAlgError:
        return False
    return bool((visits >= 1 - 1e-9).all())


def _nonterminal_means(where: str, grammar: Grammar) -> Float[np.ndarray, "s s"]:
    """Mean matrix between the nonterminals that a sentence can have."""
    _require_concrete(where, grammar)
    with jax.ensure_compile_time_eval():
        means = np.asarray(mean_matrix(grammar), float)[:, : num_nonterminals(grammar)]
    used = _reachable(grammar, means)
    return means[np.ix_(used, used)]


def _reachable(grammar: Grammar, means: Float[np.ndarray, "s s"]) -> Bool[np.ndarray, "s"]:
    used = np.isfinite(np.asarray(grammar.log_root))[: len(means)]
    for _ in range(len(means)):
        more = used | (used.astype(float) @ (means > 0) > 0)
        if (more == used).all():
            break
        used = more
    return used


def _require_concrete(where: str, grammar: Grammar) -> None:
    require(is_concrete(grammar), where, "the grammar must be concrete", "a traced one", "Call it outside jit")


def _require_consistent(where: str, grammar: Grammar) -> None:
    if is_concrete(grammar) and not is_consistent(grammar):
        radius = f"spectral radius {spectral_radius(grammar):.4g}"
        advice = "The expectation is infinite; give more mass to rules that end, or condition on a length"
        raise UserError(message(where, "the grammar must be consistent", radius, advice))


def expected_symbol_counts(grammar: Grammar) -> Float[Array, "a"]:
    r"""Expected number of nodes with each symbol in a derivation, $n = \pi (I - M)^{-1}$.

    Args:
      grammar: A consistent grammar whose rules sum to one.

    Returns:
      The counts; those of preterminals count words.

    Raises:
      UserError: A concrete grammar that is not consistent: the expectation is infinite.

    Example:
      >>> rule = jnp.log(jnp.array([[[0.25, 0.0], [0.0, 0.75]]]))  # S -> S S | X X
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.zeros((1, 1)))
      >>> expected_symbol_counts(grammar).round(4).tolist()
      [2.0, 3.0]

    Reference:
      Booth and Thompson 1973; Grenander 1976, Pattern synthesis.
    """
    _require_consistent("expected_symbol_counts", grammar)
    return _symbol_counts(grammar)


def _symbol_counts(grammar: Grammar) -> Float[Array, "a"]:
    s, root, means = num_nonterminals(grammar), jnp.exp(grammar.log_root), mean_matrix(grammar)
    inner = jnp.linalg.solve((jnp.eye(s, dtype=means.dtype) - means[:, :s]).T, root[:s])
    return jnp.concatenate([inner, root[s:] + jnp.matmul(inner, means[:, s:], precision="highest")])


def expected_length(grammar: Grammar) -> Float[Array, ""]:
    """Expected number of words of a sentence of a consistent grammar (of an inconsistent one: an error)."""
    _require_consistent("expected_length", grammar)
    return _symbol_counts(grammar)[num_nonterminals(grammar) :].sum()


def grammar_entropy(grammar: Grammar) -> Float[Array, ""]:
    r"""Entropy of a derivation with its sentence, in nats: $H(\pi) + \sum_A n(A) H(A)$.

    n(A) is the expected number of nodes with A, and H(A) the entropy of the choice of its rule or word. The entropy of
    the sentence alone is smaller by that of the derivation given the sentence.

    Args:
      grammar: A consistent grammar whose rules sum to one. A low-rank grammar is made dense.

    Returns:
      The entropy.

    Raises:
      UserError: A concrete grammar that is not consistent.

    Example:
      >>> rule = jnp.log(jnp.array([[[0.25, 0.0], [0.0, 0.75]]]))  # S -> S S | X X: 2 choices of 0.5623 nats
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.zeros((1, 1)))
      >>> round(float(grammar_entropy(grammar)), 4)
      1.1247

    Reference:
      Grenander 1976, Pattern synthesis; Chi 1999, Statistical properties of probabilistic context-free grammars.
    """
    _require_consistent("grammar_entropy", grammar)
    if isinstance(grammar, LowRankPCFG):
        grammar = to_dense(grammar)
    s = num_nonterminals(grammar)
    if isinstance(grammar, SparsePCFG):
        local = jax.ops.segment_sum(_surprise(grammar.log_rule), grammar.lhs, s)
    else:
        local = _surprise(grammar.log_rule).sum(axis=(1, 2))
    if grammar.log_unary is not None:
        local = local + _surprise(grammar.log_unary).sum(axis=1)
    local = jnp.concatenate([local, _surprise(grammar.log_emit).sum(axis=1)])
    return _surprise(grammar.log_root).sum() + (_symbol_counts(grammar) * local).sum()


def _surprise(log_p: Float[Array, "..."]) -> Float[Array, "..."]:
    """-p log p, 0 at p = 0."""
    return -jnp.exp(log_p) * jnp.where(log_p > -jnp.inf, log_p, 0)


def partition_function(grammar: Grammar, *, max_steps: int = 500) -> Float[np.ndarray, "a"]:
    r"""Total mass of the finite derivations of each symbol: the least $z_A = \sum P(A \to BC) z_B z_C + \dots$.

    1 everywhere in a consistent grammar whose rules sum to one; below 1, the rest is lost to derivations that never
    end. Newton's method from 0 on the host, in double precision: it rises to the least solution, quadratically unless
    the grammar is critical (spectral radius 1), where about half the digits are right.

    Args:
      grammar: A concrete grammar. A low-rank one is made dense.
      max_steps: Most steps.

    Returns:
      The masses; the total of a sentence is their mean under the root distribution.

    Raises:
      UserError: The grammar is traced.

    Example:
      >>> rule = jnp.log(jnp.array([[[0.75, 0.0], [0.0, 0.25]]]))  # S -> S S | X X: ends with probability 1/3
      >>> grammar = PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.zeros((1, 1)))
      >>> partition_function(grammar).round(5).tolist()
      [0.33333, 1.0]

    Reference:
      Etessami and Yannakakis 2009, Recursive Markov chains, stochastic grammars, and monotone systems, section 6.
    """
    _require_concrete("partition_function", grammar)
    if isinstance(grammar, LowRankPCFG):
        grammar = to_dense(grammar)
    s, a = num_nonterminals(grammar), len(grammar.log_root)
    rule = np.exp(np.asarray(grammar.log_rule, float))
    unary = np.zeros((s, a)) if grammar.log_unary is None else np.exp(np.asarray(grammar.log_unary, float))
    if isinstance(grammar, SparsePCFG):
        lhs, left, right = np.asarray(grammar.lhs), np.asarray(grammar.left), np.asarray(grammar.right)
    else:
        lhs, left, right = np.nonzero(rule)
        rule = rule[lhs, left, right]
    words = np.exp(np.asarray(grammar.log_emit, float)).sum(axis=1)
    z = np.concatenate([np.zeros(s), words])
    for _ in range(max_steps):
        value = np.bincount(lhs, rule * z[left] * z[right], s) + unary @ z
        slope = unary.copy()
        np.add.at(slope, (lhs, left), rule * z[right])
        np.add.at(slope, (lhs, right), rule * z[left])
        try:
            change = np.linalg.solve(np.eye(s) - slope[:, :s], value - z[:s])
        except np.linalg.LinAlgError:  # at the solution of a critical grammar
            break
        z[:s] += np.maximum(change, 0)
        if change.max(initial=0) <= 1e-15:
            break
    return z
