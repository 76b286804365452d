"""Every derivation of a short sentence, one by one: the definition that all charts are held against.

Plain Python in double precision, and no chart: quantities are sums over the list of derivations.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import require
from jaxft.structure.pcfg import PCFG, Grammar, to_dense

Node = tuple[int, int, int, tuple[Any, ...]]
"""(symbol, i, j, children), the children nodes again: 0 at a preterminal, 1 at a unary rule, 2 at a binary one."""


class Derivation(NamedTuple):
    """One derivation of the sentence."""

    log_prob: float
    """Log-probability of derivation and sentence, the root's included."""
    root: Node

    def nodes(self) -> list[tuple[int, int, int]]:
        """(symbol, i, j) of every node, in pre-order; a unary chain has several nodes on one span."""
        return [node[:3] for node in _walk(self.root)]


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node[3]:
        yield from _walk(child)


class Enumeration(NamedTuple):
    """All derivations of a sentence of t words, the likeliest first."""

    derivations: tuple[Derivation, ...]
    tokens: int
    nonterminals: int
    preterminals: int

    @property
    def log_probs(self) -> Float[np.ndarray, "derivations"]:
        """Log-probability of each derivation."""
        return np.array([d.log_prob for d in self.derivations], float)

    @property
    def log_z(self) -> float:
        """Log-probability of the sentence; minus infinity without a derivation."""
        return float(np.logaddexp.reduce(self.log_probs)) if self.derivations else -np.inf

    def posterior(self) -> Float[np.ndarray, "derivations"]:
        """Probability of each derivation given the sentence."""
        return np.exp(self.log_probs - self.log_z) if self.derivations else np.zeros(0)

    def symbols(self) -> Float[np.ndarray, "i j a"]:
        """Expected nodes with each symbol on each span [i, j), j in 0..t."""
        counts = np.zeros((self.tokens, self.tokens + 1, self.nonterminals + self.preterminals))
        for p, derivation in zip(self.posterior(), self.derivations, strict=True):
            for symbol, i, j in derivation.nodes():
                counts[i, j, symbol] += p
        return counts

    def spans(self) -> Float[np.ndarray, "i j s"]:
        """Span marginals: the nonterminals of ``symbols``."""
        return self.symbols()[..., : self.nonterminals]

    def tags(self) -> Float[np.ndarray, "t q"]:
        """Posterior of each word's preterminal."""
        ends = np.arange(self.tokens)
        return self.symbols()[ends, ends + 1, self.nonterminals :]

    def roots(self) -> Float[np.ndarray, "a"]:
        """Posterior of the root symbol."""
        counts = np.zeros(self.nonterminals + self.preterminals)
        for p, derivation in zip(self.posterior(), self.derivations, strict=True):
            counts[derivation.root[0]] += p
        return counts

    def rules(self) -> tuple[Float[np.ndarray, "s a a"], Float[np.ndarray, "s a"]]:
        """Expected uses of the binary and of the unary rules."""
        s, a = self.nonterminals, self.nonterminals + self.preterminals
        binary, unary = np.zeros((s, a, a)), np.zeros((s, a))
        for p, derivation in zip(self.posterior(), self.derivations, strict=True):
            for symbol, _, _, children in _walk(derivation.root):
                if len(children) == 2:
                    binary[symbol, children[0][0], children[1][0]] += p
                elif children:
                    unary[symbol, children[0][0]] += p
        return binary, unary

    def entropy(self) -> float:
        """Entropy of the derivation given the sentence, in nats."""
        p, logs = self.posterior(), self.log_probs
        return float(self.log_z - (p * logs).sum()) if self.derivations else 0.0

    def expected_recall(self, nodes: Sequence[tuple[int, int, int]], *, labelled: bool = True) -> float:
        """Expected number of given nodes (symbol, i, j), each counted once, that the true derivation has.

        Args:
          nodes: The nodes of a guessed tree.
          labelled: Whether the symbol must agree; else the span alone.

        Returns:
          The sum over ``nodes`` of their posterior probabilities.
        """
        total, wanted = 0.0, [node if labelled else node[1:] for node in nodes]
        for p, derivation in zip(self.posterior(), self.derivations, strict=True):
            there = {node if labelled else node[1:] for node in derivation.nodes()}
            total += float(p) * sum(node in there for node in wanted)
        return total


def brute_force(
    grammar: Grammar,
    tokens: Int[Array, "t"] | Int[np.ndarray, "t"] | Sequence[int],
    *,
    max_chain: int | None = None,
    limit: int = 300_000,
) -> Enumeration:
    r"""All derivations of a sentence with their log-probabilities, $\log P(T, x)$.

    Rules of probability 0 make no derivation. Unary rules may follow one another; where they form a cycle a sentence
    has infinitely many derivations, and the enumeration stops at chains of ``max_chain`` unary rules.

    Args:
      grammar: A concrete grammar.
      tokens: Word numbers.
      max_chain: Most unary rules in a row; ``None``: as many as there are nonterminals, complete without cycles.
      limit: Most derivations; they are counted before the first is made.

    Returns:
      The derivations, sorted by falling probability, and what follows from them.

    Raises:
      UserError: No word or an unknown one, a cycle of unary rules without ``max_chain``, or too many derivations.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> found = brute_force(random_pcfg(jax.random.key(0), 1, 1, 2), [0, 1, 1, 0])
      >>> len(found.derivations), round(float(found.posterior().sum()), 6)  # Catalan(3) = 5 bracketings
      (5, 1.0)
    """
    where = "brute_force"
    dense = to_dense(grammar)
    words = tuple(int(word) for word in np.asarray(tokens))
    q, v = dense.log_emit.shape
    s = len(dense.log_rule)
    known = len(words) > 0 and min(words, default=0) >= 0 and max(words, default=0) < v
    require(known, where, f"tokens must be one or more of 0..{v - 1}", list(words), "Pass word numbers")
    rules = _Rules(dense)
    require(
        max_chain is not None or not rules.cyclic(),
        where,
        "unary rules must not form a cycle",
        "infinitely many derivations",
        "Pass max_chain, and expect an error that falls with it",
    )
    chain = s if max_chain is None else max_chain
    count = sum(rules.count(symbol, words, chain) for symbol in rules.roots)
    advice = f"Shorten the sentence, or raise limit above {count}"
    require(count <= limit, where, f"there must be at most {limit} derivations", count, advice)
    found = [
        Derivation(score + float(rules.log_root[symbol]), node)
        for symbol in rules.roots
        for score, node in rules.derive(symbol, 0, words, chain)
    ]
    found.sort(key=lambda derivation: -derivation.log_prob)
    return Enumeration(tuple(found), len(words), s, q)


def enumerated_masked_posterior(
    grammar: Grammar,
    tokens: Int[Array, "t"] | Int[np.ndarray, "t"] | Sequence[int],
    mask: Bool[Array, "t"] | Bool[np.ndarray, "t"] | Sequence[bool],
    *,
    max_chain: int | None = None,
    limit: int = 300_000,
) -> Float[np.ndarray, "t v"]:
    """Posterior of each masked word given the words that are not masked, by summing over all fillings of the masks.

    Args:
      grammar: A concrete grammar.
      tokens: Word numbers; those of masked words are not looked at.
      mask: Which words are hidden, m of them.
      max_chain: As in ``brute_force``.
      limit: As in ``brute_force``, for each of the v^m fillings.

    Returns:
      The posterior at masked positions, one word with probability 1 at the others; all 0 where no filling is a
      sentence.

    Raises:
      UserError: As in ``brute_force``, or more than 10,000 fillings.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> grammar = random_pcfg(jax.random.key(0), 1, 1, 3)
      >>> posterior = enumerated_masked_posterior(grammar, [0, 0], [False, True])
      >>> bool(np.allclose(posterior[1], np.exp(grammar.log_emit[0]), atol=1e-6))  # one tag: no context
      True
    """
    v = grammar.log_emit.shape[1]
    words, hidden = np.array(tokens), np.flatnonzero(np.asarray(mask))
    fillings = v ** len(hidden)
    where, rule = "enumerated_masked_posterior", "there must be at most 10000 fillings of the masks"
    require(fillings <= 10_000, where, rule, fillings, "Mask fewer words")
    posterior = np.zeros((len(words), v))
    for filling in itertools.product(range(v), repeat=len(hidden)):
        words[hidden] = filling
        mass = np.exp(brute_force(grammar, words, max_chain=max_chain, limit=limit).log_z)
        posterior[np.arange(len(words)), words] += mass
    total = posterior.sum(axis=1, keepdims=True)
    return np.divide(posterior, total, out=np.zeros_like(posterior), where=total > 0)


class _Rules:
    """The rules of positive probability by parent, in double precision."""

    def __init__(self, grammar: PCFG):
        self.log_root = np.asarray(grammar.log_root, float)
        self.log_emit = np.asarray(grammar.log_emit, float)
        binary = np.asarray(grammar.log_rule, float)
        unary = np.full(binary.shape[:2], -np.inf)
        if grammar.log_unary is not None:
            unary = np.asarray(grammar.log_unary, float)
        self.nonterminals = len(binary)
        self.roots = np.flatnonzero(np.isfinite(self.log_root)).tolist()
        self.binary = [
            [(b, c, float(rows[b, c])) for b, c in np.argwhere(np.isfinite(rows)).tolist()] for rows in binary
        ]
        self.unary = [[(b, float(row[b])) for b in np.flatnonzero(np.isfinite(row)).tolist()] for row in unary]

    def cyclic(self) -> bool:
        s = self.nonterminals
        step = np.array([[b in dict(self.unary[a]) for b in range(s)] for a in range(s)], bool)
        reach = step
        for _ in range(s):
            reach = step | ((reach.astype(int) @ step.astype(int)) > 0)
        return bool(reach.diagonal().any())

    def count(self, symbol: int, words: tuple[int, ...], max_chain: int) -> int:
        """Derivations of the words from ``symbol``."""

        @functools.cache
        def count(symbol: int, words: tuple[int, ...], chain: int) -> int:
            if symbol >= self.nonterminals:
                return int(len(words) == 1 and np.isfinite(self.log_emit[symbol - self.nonterminals, words[0]]))
            total = sum(
                left * count(c, words[k:], max_chain)
                for b, c, _ in self.binary[symbol]
                for k in range(1, len(words))
                if (left := count(b, words[:k], max_chain))
            )
            return total + (sum(count(b, words, chain - 1) for b, _ in self.unary[symbol]) if chain else 0)

        return count(symbol, words, max_chain)

    def derive(self, symbol: int, start: int, words: tuple[int, ...], max_chain: int) -> list[tuple[float, Node]]:
        """Score and tree of every derivation."""

        @functools.cache
        def derive(symbol: int, i: int, j: int, chain: int) -> list[tuple[float, Node]]:
            if symbol >= self.nonterminals:
                score = self.log_emit[symbol - self.nonterminals, words[i - start]]
                return [(float(score), (symbol, i, j, ()))] if j == i + 1 and np.isfinite(score) else []
            found = [
                (rule + x + y, (symbol, i, j, (left, right)))
                for b, c, rule in self.binary[symbol]
                for k in range(i + 1, j)
                for x, left in derive(b, i, k, max_chain)
                for y, right in derive(c, k, j, max_chain)
            ]
            if chain:
                found += [
                    (rule + x, (symbol, i, j, (child,)))
                    for b, rule in self.unary[symbol]
                    for x, child in derive(b, i, j, chain - 1)
                ]
            return found

        return derive(symbol, start, start + len(words), max_chain)
