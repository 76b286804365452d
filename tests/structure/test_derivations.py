"""Best, sampled and least-risk trees, and hidden words, against all derivations."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.decode import mbr_parse
from jaxft.structure.derivations import sample_trees, viterbi
from jaxft.structure.enumeration import Derivation, brute_force, enumerated_masked_posterior
from jaxft.structure.inside_outside import inside_outside
from jaxft.structure.masked_words import bayes_loss, excess_loss, masked_word_posterior
from jaxft.structure.parses import Parses, parse_spans
from jaxft.structure.pcfg import PCFG, SparsePCFG, to_sparse
from jaxft.structure.routes import explain

WORDS, LENGTHS = np.array([[0, 1, 2, 0, 1], [2, 1, 0, 0, 0], [1, 1, 1, 1, 1]]), np.array([5, 3, 1])


def make_grammar(seed: int = 1, *, unary: bool = True) -> Any:
    """Three nonterminals, two preterminals, three words; most rules are absent, two nonterminals rewrite to others."""
    there = np.random.default_rng(22).random((3, 25)) < 0.25
    draw = np.random.default_rng(seed)
    rule = (draw.gamma(1.0, size=(3, 25)) * there).reshape(3, 5, 5)
    chains = np.zeros((3, 5))
    if unary:
        chains[0, 1], chains[1, 3], chains[1, 2] = 0.3, 0.2, 0.3
    with np.errstate(divide="ignore"):
        tables = draw.dirichlet(np.ones(5)), rule / 4, draw.dirichlet(np.ones(3), 2), chains
        root, rule, emit, chains = (jnp.asarray(np.log(x)) for x in tables)
    return PCFG(root, rule, emit, chains)


EXTRA = 60
"""Nonterminals that nothing uses: among them it is cheaper to go rule by rule."""


def listed(grammar: PCFG) -> SparsePCFG:
    """The grammar as a list of rules, with the extra nonterminals behind its own."""
    found = to_sparse(grammar)
    return found._replace(
        log_root=jnp.insert(found.log_root, jnp.full(EXTRA, 3), -jnp.inf),
        left=jnp.where(found.left < 3, found.left, found.left + EXTRA),
        right=jnp.where(found.right < 3, found.right, found.right + EXTRA),
        log_unary=jnp.full((3 + EXTRA, 5 + EXTRA), -jnp.inf)
        .at[:3, jnp.array([0, 1, 2, 63, 64])]
        .set(grammar.log_unary),
    )


def shape_of(derivation: Derivation) -> tuple[tuple[int, ...], ...]:
    """Spans in pre-order with their top and bottom symbols."""
    ends: dict[tuple[int, int], list[int]] = {}
    for symbol, i, j in derivation.nodes():
        ends.setdefault((i, j), []).append(symbol)
    return tuple((i, j, symbols[0], symbols[-1]) for (i, j), symbols in ends.items())


def shapes_of(parses: Parses) -> list[tuple[tuple[int, ...], ...]]:
    bottoms = parses.labels if parses.bottoms is None else parses.bottoms
    table = np.concatenate([parses.spans, np.asarray(parses.labels)[..., None], np.asarray(bottoms)[..., None]], axis=2)
    table[..., 2:] -= EXTRA * (table[..., 2:] > EXTRA)
    return [tuple(map(tuple, row[keep].tolist())) for row, keep in zip(table, np.asarray(parses.valid), strict=True)]


@pytest.mark.parametrize(("unary", "kind"), [(True, "dense"), (False, "dense"), (True, "list")])
def test_viterbi_is_the_first_of_all_derivations(x64, unary, kind):
    grammar = make_grammar(unary=unary)
    given = listed(grammar) if kind == "list" else grammar
    assert explain(given, batch=3, tokens=5).method == {"list": "sparse", "dense": "scaled"}[kind]
    found = viterbi(given, jnp.asarray(WORDS), jnp.asarray(LENGTHS))
    for row, length in enumerate(LENGTHS):
        best = brute_force(grammar, WORDS[row, :length]).derivations[0]
        assert float(found.score[row]) == pytest.approx(best.log_prob)
        assert shapes_of(found)[row] == shape_of(best)


def test_without_a_parse_no_node_is_valid(x64):
    grammar = make_grammar()
    grammar = grammar._replace(log_emit=grammar.log_emit.at[:, 2].set(-jnp.inf))
    lengths = jnp.array([5, 0, 1])
    for found in (
        viterbi(grammar, jnp.asarray(WORDS), lengths),
        sample_trees(grammar, jnp.asarray(WORDS), lengths, key=jax.random.key(0)),
    ):
        assert found.score.tolist()[:2] == [-np.inf, -np.inf]
        assert found.valid.sum(axis=1).tolist() == [0, 0, 1]


@functools.cache
def sampled(kind: str) -> Counter:
    words = jnp.asarray(np.tile(WORDS[0], (3000, 1)))
    grammar = make_grammar() if kind == "dense" else listed(make_grammar())
    return Counter(shapes_of(sample_trees(grammar, words, key=jax.random.key(0))))


def largest_deviation(kind: str, grammar: PCFG) -> float:
    """Largest z of the sampled frequencies against the posterior of a grammar, over trees that are not rare."""
    found = brute_force(grammar, WORDS[0])
    posterior: Counter = Counter()
    for p, derivation in zip(found.posterior(), found.derivations, strict=True):
        posterior[shape_of(derivation)] += p
    counts = sampled(kind)
    n = sum(counts.values())
    common = {tree: p for tree, p in posterior.items() if n * p >= 10}
    assert len(common) > 5
    return max(abs(counts[tree] - n * p) / np.sqrt(n * p * (1 - p)) for tree, p in common.items())


@pytest.mark.parametrize("kind", ["dense", "list"])
def test_samples_have_the_posterior_of_trees(kind):
    assert largest_deviation(kind, make_grammar()) < 4.5


def test_samples_do_not_have_the_posterior_of_another_grammar():
    assert largest_deviation("dense", make_grammar(2)) > 10


def test_labelled_recall_parse_has_the_greatest_expected_recall(x64):
    grammar = make_grammar(unary=False)
    found = inside_outside(grammar, jnp.asarray(WORDS), jnp.asarray(LENGTHS))
    parses = mbr_parse(found.span, jnp.asarray(LENGTHS), tag=found.tag)
    for row, length in enumerate(LENGTHS):
        every = brute_force(grammar, WORDS[row, :length])
        ours = parse_spans(parses)[row]
        inner = [node for node in ours if node[2] - node[1] >= 2]
        assert every.expected_recall(inner) == pytest.approx(float(parses.score[row]), abs=1e-10)
        recalls = [
            every.expected_recall([node for node in d.nodes() if node[2] - node[1] >= 2]) for d in every.derivations
        ]
        assert float(parses.score[row]) >= max(recalls) - 1e-10
        for label, i, j in ours:
            assert j - i > 1 or label == 3 + int(np.argmax(every.tags()[i]))


def test_unlabelled_recall_counts_any_label(x64):
    grammar = make_grammar(unary=False)
    span = inside_outside(grammar, jnp.asarray(WORDS), jnp.asarray(LENGTHS)).span
    parses = mbr_parse(span, jnp.asarray(LENGTHS), labelled=False)
    every = brute_force(grammar, WORDS[0])
    inner = [node for node in parse_spans(parses)[0] if node[2] - node[1] >= 2]
    assert every.expected_recall(inner, labelled=False) == pytest.approx(float(parses.score[0]))
    trees = [[node for node in d.nodes() if node[2] - node[1] >= 2] for d in every.derivations]
    assert float(parses.score[0]) >= max(every.expected_recall(tree, labelled=False) for tree in trees) - 1e-10


MASK = np.array([[0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]], bool)


def test_posterior_of_hidden_words_is_the_sum_over_all_fillings(x64):
    grammar = make_grammar()
    found = masked_word_posterior(grammar, jnp.asarray(WORDS), jnp.asarray(LENGTHS), mask=jnp.asarray(MASK))
    for row, length in enumerate(LENGTHS):
        expected = enumerated_masked_posterior(grammar, WORDS[row, :length], MASK[row, :length])
        np.testing.assert_allclose(found[row, :length], expected, rtol=1e-9, atol=1e-12)
        assert not found[row, length:].any()


def test_no_other_grammar_has_less_loss_than_the_bayes_loss(x64):
    arguments = jnp.asarray(WORDS), jnp.asarray(LENGTHS)
    right, wrong = (masked_word_posterior(make_grammar(seed), *arguments, mask=jnp.asarray(MASK)) for seed in (1, 2))
    mask = jnp.asarray(MASK)
    bayes, _ = bayes_loss(right, mask)
    entropies = [-(row * np.log(row)).sum() for row in np.asarray(right)[MASK]]
    assert float(bayes) == pytest.approx(np.mean(entropies))
    assert float(excess_loss(right, jnp.log(right), mask)[0]) == pytest.approx(0, abs=1e-12)
    assert float(excess_loss(right, jnp.log(wrong), mask)[0]) > 0.01
