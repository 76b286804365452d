r"""The k likeliest trees of a sentence, lazily.

The best tree over every span is known from a chart; further ones are found from the top down, and only where they are
asked for. A node keeps its trees found so far and a heap of candidates; taking its r-th tree adds the two that differ
from it by the next tree of one child.

Reference:
  Huang and Chiang 2005, Better k-best parsing, algorithm 3.
"""

import heapq
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.structure.derivations import best_scores
from jaxft.structure.inside_outside import Words, word_scores
from jaxft.structure.parses import Parses
from jaxft.structure.pcfg import PCFG, Grammar, SparsePCFG, merge_rules, num_nonterminals, to_dense

Vertex = tuple[int, int, int]
"""(symbol, i, j); above the root stands (-1, 0, n), whose only child is a symbol over the whole sentence."""


def k_best(grammar: Grammar, words: Words, lengths: Int[Array, "b"] | None = None, *, k: int) -> list[Parses]:
    """The k likeliest trees of each sentence, best first; searched on the host.

    Scores are summed in double precision; the order is right to the precision of the grammar. A chart, and about
    n k log k steps for the trees of n words.

    Args:
      grammar: A concrete grammar without unary rules. The components of a low-rank one are summed out.
      words: As ``inside``.
      lengths: As ``inside``.
      k: How many trees.

    Returns:
      For each sentence k parses with their log probabilities; where there are fewer trees the rest is not valid and has
      score minus infinity.

    Raises:
      UserError: ``k`` below 1, unary rules, traced arrays; or as ``inside``.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> found, = k_best(random_pcfg(jax.random.key(0), 1, 1, 2), jnp.array([[0, 1, 1, 0]]), k=6)
      >>> found.valid[:, 0].tolist()  # four words have five bracketings
      [True, True, True, True, True, False]
    """
    where = "k_best"
    require(k >= 1, where, "k must be positive", k, "Pass 1 or more")
    traced = "traced arrays"
    require(is_concrete((grammar, words, lengths)), where, "input must be concrete", traced, "Call it outside jit")
    grammar = merge_rules(grammar) if isinstance(grammar, SparsePCFG) else to_dense(grammar)
    advice = "Collapse chains into labels, or take the single best tree with viterbi"
    require(grammar.log_unary is None, where, "the grammar must have no unary rules", "some", advice)
    log_terms = word_scores(grammar, words, lengths)
    b, t = log_terms.shape[:2]
    best = _with_preterminals(best_scores(grammar, log_terms), log_terms)
    sizes = [t] * b if lengths is None else np.asarray(lengths).tolist()
    rules = _rules_by_parent(grammar)
    root = np.asarray(grammar.log_root, float)
    return [_parses(_Forest(root, rules, scores, n), k, t) for scores, n in zip(best, sizes, strict=True)]


def _with_preterminals(
    nonterminals: Float[Array, "b t ends s"], log_terms: Float[Array, "b t q"]
) -> Float[np.ndarray, "b t ends a"]:
    """Score of the best tree of each symbol over each span."""
    best = np.full((*nonterminals.shape[:3], log_terms.shape[2]), -np.inf)
    start = np.arange(log_terms.shape[1])
    best[:, start, start + 1] = log_terms
    return np.concatenate([np.asarray(nonterminals, float), best], axis=3)


_Rules = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""For each nonterminal left children, right children and scores of its rules."""


def _rules_by_parent(grammar: PCFG | SparsePCFG) -> _Rules:
    if isinstance(grammar, SparsePCFG):
        lhs, left, right = (np.asarray(x) for x in (grammar.lhs, grammar.left, grammar.right))
        score = np.asarray(grammar.log_rule, float)
    else:
        dense = np.asarray(grammar.log_rule, float)
        lhs, left, right = np.nonzero(dense > -np.inf)
        score = dense[lhs, left, right]
    chosen = [np.flatnonzero((lhs == parent) & (score > -np.inf)) for parent in range(num_nonterminals(grammar))]
    return [(left[rows], right[rows], score[rows]) for rows in chosen]


_Edge = tuple[float, tuple[Vertex, ...]]
"""Score of a way to expand a vertex, and the children."""


class _Forest:
    """The trees of one sentence, vertex by vertex, as far as they were asked for."""

    def __init__(self, log_root: np.ndarray, rules: _Rules, best: Float[np.ndarray, "t ends a"], length: int):
        self.log_root, self.rules, self.best, self.length = log_root, rules, best, length
        self._edges: dict[Vertex, list[_Edge]] = {}
        self._found: dict[Vertex, list[tuple[float, int, tuple[int, ...]]]] = {}
        self._heap: dict[Vertex, list[tuple[float, int, tuple[int, ...]]]] = {}
        self._seen: dict[Vertex, set[tuple[int, tuple[int, ...]]]] = {}

    def tree(self, vertex: Vertex, rank: int, k: int) -> tuple[float, list[Vertex]] | None:
        """Score and vertices in pre-order of the tree of a rank, 0 for the best; ``None`` if there are fewer."""
        if self._is_leaf(vertex):
            return float(self.best[vertex[1], vertex[2], vertex[0]]), [vertex]
        if not self._reach(vertex, rank, k):
            return None
        _, edge, ranks = self._found[vertex][rank]
        score, children = self._edges[vertex][edge]
        nodes = [vertex]
        for child, of_child in zip(children, ranks, strict=True):
            part = self.tree(child, of_child, k)
            if part is None:
                return None
            score, nodes = score + part[0], nodes + part[1]
        return score, nodes

    def _is_leaf(self, vertex: Vertex) -> bool:
        return vertex[0] >= len(self.rules)

    def _reach(self, vertex: Vertex, rank: int, k: int) -> bool:
        """Finds trees of a vertex up to a rank; whether there are so many."""
        if self._is_leaf(vertex):
            return rank == 0
        if vertex not in self._found:
            self._open(vertex, k)
        found, heap = self._found[vertex], self._heap[vertex]
        while len(found) <= rank:
            if found:
                self._add_successors(vertex, found[-1], k)
            if not heap:
                return False
            found.append(heapq.heappop(heap))
        return True

    def _open(self, vertex: Vertex, k: int) -> None:
        edges, scores = self._expansions(vertex, k)
        self._edges[vertex], self._found[vertex] = edges, []
        first = [(-score, e, (0,) * len(edge[1])) for e, (edge, score) in enumerate(zip(edges, scores, strict=True))]
        heapq.heapify(first)
        self._heap[vertex], self._seen[vertex] = first, {(e, ranks) for _, e, ranks in first}

    def _add_successors(self, vertex: Vertex, last: tuple[float, int, tuple[int, ...]], k: int) -> None:
        """Candidates with the next tree of one child; the key is minus the score, so that the heap gives the best."""
        key, edge, ranks = last
        children = self._edges[vertex][edge][1]
        for c, child in enumerate(children):
            after = (*ranks[:c], ranks[c] + 1, *ranks[c + 1 :])
            if (edge, after) in self._seen[vertex] or not self._reach(child, after[c], k):
                continue
            self._seen[vertex].add((edge, after))
            trees = self._found[child]
            heapq.heappush(self._heap[vertex], (key - trees[ranks[c]][0] + trees[after[c]][0], edge, after))

    def _expansions(self, vertex: Vertex, k: int) -> tuple[list[_Edge], Sequence[float]]:
        """The k best ways to expand a vertex, with the scores of their best trees."""
        symbol, i, j = vertex
        if symbol < 0:
            scores = self.log_root + self.best[i, j]
            top = _largest(scores, k)
            return [(float(self.log_root[a]), ((a, i, j),)) for a in top.tolist()], scores[top].tolist()
        left, right, rule = self.rules[symbol]
        split = np.arange(i + 1, j)
        lefts = self.best[i][split[:, None], left[None]]
        rights = self.best[split[:, None], j, right[None]]
        scores = (rule[None] + lefts + rights).reshape(-1)
        top = _largest(scores, k)
        edges = []
        for at in top.tolist():
            m, r = split[at // len(rule)].item(), at % len(rule)
            edges.append((float(rule[r]), ((int(left[r]), i, m), (int(right[r]), m, j))))
        return edges, scores[top].tolist()


def _largest(scores: Float[np.ndarray, "n"], k: int) -> Int[np.ndarray, "k"]:
    """Positions of the k largest scores above minus infinity, falling; ties by position."""
    possible = np.flatnonzero(scores > -np.inf)
    if len(possible) > k:
        possible = np.sort(possible[np.argpartition(-scores[possible], k - 1)[:k]])
    return possible[np.argsort(-scores[possible], kind="stable")]


def _parses(forest: _Forest, k: int, t: int) -> Parses:
    spans, labels = np.zeros((k, 2 * t - 1, 2), np.int32), np.full((k, 2 * t - 1), -1, np.int32)
    score = np.full(k, -np.inf)
    found = [] if forest.length == 0 else (forest.tree((-1, 0, forest.length), rank, k) for rank in range(k))
    for rank, tree in enumerate(found):
        if tree is None:
            break
        score[rank], (_, *nodes) = tree
        table = np.array(nodes, np.int32)
        labels[rank, : len(nodes)], spans[rank, : len(nodes)] = table[:, 0], table[:, 1:]
    # A symbol of a node is never negative.
    return Parses(
        jnp.asarray(spans), jnp.asarray(labels), jnp.asarray(labels >= 0), jnp.asarray(score, jnp.result_type(float))
    )
