"""Claims on single trees: the likeliest, the k likeliest, that of greatest expected recall, and how many there are."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.structure import (
    COUNTING,
    LOG,
    Parses,
    bracketing_chart,
    mbr_parse,
    parse_spans,
    viterbi,
)
from jaxft.structure.k_best import k_best
from theory.claims import Evidence
from theory.pcfg_parsing.grammars import (
    LENGTHS,
    PAPER,
    SETTING,
    TOKENS,
    compiled,
    enumerated,
    flat,
    make_claim,
    other_grammar,
    posteriors,
    toy,
)

GOODMAN = "Goodman 1996, section 3"
K = 8


@compiled
def _best(grammar: Any, log_terms: jax.Array, lengths: jax.Array) -> Parses:
    return viterbi(grammar, log_terms, lengths)


@compiled
def _most_recall(span: jax.Array, lengths: jax.Array) -> Parses:
    return mbr_parse(span, lengths)


def best_tree(seed: int, *, unseen: bool = False) -> Evidence:
    """The score of the Viterbi tree, as it says and as enumeration has it, against the greatest of all derivations.

    The control does not see the words.
    """
    case = toy(seed)
    parses = _best(case.grammar, jnp.zeros_like(case.log_terms) if unseen else case.log_terms, case.lengths)
    scores = []
    for nodes, found in zip(parse_spans(parses), enumerated(seed), strict=True):
        (score,) = [d.log_prob for d in found.derivations if d.nodes() == nodes] or [-np.inf]
        scores.append(score)
    greatest = [found.log_probs[0] for found in enumerated(seed)]
    measured = flat(np.maximum(scores, -1e3), parses.score)
    return Evidence(measured, flat(greatest, greatest), setting=SETTING)


def best_trees(seed: int, *, one_root: bool = False) -> Evidence:
    """Scores of the k likeliest trees against enumeration; the control has one root symbol for all of them."""
    case = toy(seed)
    grammar = case.grammar
    if one_root:
        root = np.asarray(grammar.log_root)
        grammar = grammar._replace(log_root=jnp.asarray(np.where(np.arange(len(root)) == 0, root, -np.inf)))
    parses = k_best(grammar, case.log_terms, case.lengths, k=K)
    measured = np.stack([np.asarray(found.score) for found in parses])
    predicted = np.full(measured.shape, -np.inf)
    for row, found in zip(predicted, enumerated(seed), strict=True):
        row[: len(found.derivations)] = found.log_probs[:K]
    present = np.isfinite(predicted), np.isfinite(measured)
    scores = np.where(present[0], predicted, 0), np.where(present[1], measured, 0)
    return Evidence(flat(scores[1], present[1]), flat(scores[0], present[0]), setting=SETTING | {"k": K})


@functools.cache
def bracketings(i: int, j: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every binary tree over [i, j): the spans of two words or more."""
    if j - i < 2:
        return ((),)
    return tuple(
        ((i, j), *left, *right) for k in range(i + 1, j) for left in bracketings(i, k) for right in bracketings(k, j)
    )


def _inner_nodes(parses: Parses) -> Iterator[list[tuple[int, int, int]]]:
    return ([node for node in nodes if node[2] - node[1] > 1] for nodes in parse_spans(parses))


def expected_recall(seed: int, *, likeliest: bool = False) -> Evidence:
    """Expected recall of the labelled-recall parse against the greatest of all labelled binary trees.

    The control takes the likeliest tree in its place.
    """
    case = toy(seed)
    exact = posteriors(case.grammar, case.log_terms, case.lengths)
    best = _best(case.grammar, case.log_terms, case.lengths)
    parses = best if likeliest else _most_recall(exact.span, case.lengths)
    found = enumerated(seed)
    measured = [e.expected_recall(nodes) for e, nodes in zip(found, _inner_nodes(parses), strict=True)]
    labels = [e.spans().max(axis=2) for e in found]  # the best label of a span whatever the rest of the tree
    predicted = [
        max(sum(top[span] for span in spans) for spans in bracketings(0, n))
        for top, n in zip(labels, LENGTHS.tolist(), strict=True)
    ]
    return Evidence(np.array(measured, float), np.array(predicted, float), setting=SETTING)


def recall_of_likeliest(seed: int, *, wrong_grammar: bool = False) -> Evidence:
    """By how much the likeliest tree is ahead in expected recall, at most over the sentences.

    The control reads the labelled-recall parse off the posteriors of another grammar.
    """
    case = toy(seed)
    grammar = other_grammar(seed) if wrong_grammar else case.grammar
    terms = np.moveaxis(np.asarray(grammar.log_emit)[:, np.asarray(case.tokens)], 0, 2)
    most = _most_recall(posteriors(grammar, jnp.asarray(terms), case.lengths).span, case.lengths)
    best = _best(case.grammar, case.log_terms, case.lengths)
    pairs = zip(enumerated(seed), _inner_nodes(best), _inner_nodes(most), strict=True)
    ahead = [found.expected_recall(likely) - found.expected_recall(nodes) for found, likely, nodes in pairs]
    return Evidence(max(ahead), 1e-12, setting=SETTING)


@compiled
def _tree_counts(log_scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    (number,), (log_number,) = (bracketing_chart(log_scores, semiring=kind) for kind in (COUNTING, LOG))
    return number, jnp.exp(log_number)


def catalan_numbers(seed: int, *, forbidden: bool = False) -> Evidence:
    """Trees of 1 to 7 words, counted and from log Z, against Catalan numbers; the control forbids a span."""
    del seed
    scores = np.zeros((1, TOKENS, TOKENS + 1))
    if forbidden:
        scores[0, 0, 2] = -np.inf
    measured = [np.asarray(chart)[0, 0, 1:] for chart in _tree_counts(jnp.asarray(scores))]
    catalan = [math.comb(2 * n, n) / (n + 1) for n in range(TOKENS)]
    return Evidence(np.stack(measured), np.stack([catalan, catalan]), setting={"max_words": TOKENS})


CLAIMS = (
    make_claim(
        "best-tree",
        "The Viterbi tree and its score are those of the likeliest derivation.",
        "Jelinek, Lafferty and Mercer 1992, section 4",
        "identity",
        best_tree,
        {"unseen": True},
        "the words are not seen",
        seeds=3,
    ),
    make_claim(
        "k-best-trees",
        "The scores of the k best trees are the k greatest of all derivations, in order.",
        "Huang and Chiang 2005, algorithm 3",
        "identity",
        best_trees,
        {"one_root": True},
        "one root symbol for all trees",
        seeds=2,
    ),
    make_claim(
        "expected-recall",
        "The labelled-recall parse has the greatest expected recall of all labelled binary trees.",
        f"{PAPER}; {GOODMAN}",
        "identity",
        expected_recall,
        {"likeliest": True},
        "the likeliest tree in its place",
        seeds=3,
    ),
    make_claim(
        "recall-of-the-likeliest",
        "The likeliest tree has no more expected recall than the labelled-recall parse.",
        GOODMAN,
        "bound",
        recall_of_likeliest,
        {"wrong_grammar": True},
        "posteriors of another grammar",
        seeds=3,
    ),
    make_claim(
        "catalan-numbers",
        "A sentence of n words has as many binary trees as the Catalan number of n - 1, and log Z is its logarithm.",
        "derived",
        "identity",
        catalan_numbers,
        {"forbidden": True},
        "a span forbidden",
    ),
)
