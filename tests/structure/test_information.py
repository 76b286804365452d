from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.enumeration import brute_force
from jaxft.structure.information import tree_cross_entropy, tree_entropy, tree_kl
from jaxft.structure.inside_outside import term_scores
from jaxft.structure.pcfg import PCFG, LowRankPCFG, to_dense, to_sparse
from jaxft.structure.rule_trees import rule_trees
from jaxft.structure.semirings import EXPECTATION, as_element, log_weight

WORDS, LENGTHS = np.array([[0, 1, 2, 0, 1], [2, 1, 0, 0, 0], [1, 1, 1, 1, 1]]), np.array([5, 3, 1])
FREE = np.full((3, 5), 1.0)


def make_grammar(seed: int, support: np.ndarray = FREE) -> Any:
    """Three nonterminals, one of which rewrites to another, two preterminals, three words; most rules are absent."""
    draw = np.random.default_rng(22)
    there = draw.random((3, 25)) < 0.25
    draw = np.random.default_rng(seed)
    rule = (draw.gamma(1.0, size=(3, 25)) * there).reshape(3, 5, 5)
    unary = np.zeros((3, 5))
    unary[0, 1], unary[1, 3], unary[1, 2] = 0.2, 0.1, draw.uniform(0, 0.3)
    root, emit = draw.dirichlet(np.ones(5)), draw.dirichlet(np.ones(3), 2)
    tables = root, rule / 4, emit, unary * support
    with np.errstate(divide="ignore"):
        root, rule, emit, unary = (jnp.asarray(np.log(x)) for x in tables)
    return PCFG(root, rule, emit, unary)


def by_enumeration(p: PCFG, q: PCFG) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy and divergence of each sentence, derivation by derivation."""
    cross, kl = [], []
    for row, length in zip(WORDS, LENGTHS, strict=True):
        ours, theirs = (brute_force(g, row[:length]) for g in (p, q))
        logs = {d.root: d.log_prob - theirs.log_z for d in theirs.derivations}
        other = np.array([logs.get(d.root, -np.inf) for d in ours.derivations])
        weights = ours.posterior()
        cross.append(-(weights * other).sum())
        kl.append((weights * (ours.log_probs - ours.log_z - other)).sum())
    return np.array(cross), np.array(kl)


def arguments():
    return jnp.asarray(WORDS), jnp.asarray(LENGTHS)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_entropy_is_that_of_all_derivations(x64, kind):
    grammar = make_grammar(1)
    expected = [brute_force(grammar, row[:n]).entropy() for row, n in zip(WORDS, LENGTHS, strict=True)]
    given, method = (to_sparse(grammar), "sparse") if kind == "sparse" else (grammar, "scaled")
    np.testing.assert_allclose(tree_entropy(given, *arguments(), method=method), expected, rtol=1e-9)


def test_entropy_equals_that_of_the_expectation_semiring(x64):
    grammar = make_grammar(1)
    words = term_scores(grammar, jnp.asarray(WORDS))
    elements = [
        as_element(EXPECTATION, score, score)
        for score in (grammar.log_rule, words, grammar.log_unary, grammar.log_root)
    ]
    chart = rule_trees(EXPECTATION, *elements[:3], chunks=1)
    top = tuple(x[:, 0, 5] for x in chart)
    root = tuple(x[:3].reshape(1, 3) for x in elements[3])
    total = EXPECTATION.total(EXPECTATION.times(top, root), 1)
    entropy = log_weight(EXPECTATION, total) - total[1]
    np.testing.assert_allclose(tree_entropy(grammar, jnp.asarray(WORDS)), entropy, rtol=1e-9)


def test_cross_entropy_and_divergence_are_those_of_all_derivations(x64):
    p, q = make_grammar(1), make_grammar(2)
    cross, kl = by_enumeration(p, q)
    np.testing.assert_allclose(tree_cross_entropy(p, q, *arguments()), cross, rtol=1e-9)
    np.testing.assert_allclose(tree_kl(p, q, *arguments()), kl, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(tree_kl(p, p, *arguments()), np.zeros(3), atol=1e-10)
    entropy = tree_entropy(p, *arguments())
    np.testing.assert_allclose(tree_cross_entropy(p, p, *arguments()), entropy, rtol=1e-10)


def test_grammars_of_two_kinds_are_compared(x64):
    p, q = make_grammar(1), make_grammar(2)
    expected = tree_kl(p, q, *arguments())
    np.testing.assert_allclose(tree_kl(to_sparse(p), q, *arguments()), expected, rtol=1e-8, atol=1e-10)
    both = tree_kl(to_sparse(p), to_sparse(q), *arguments())
    np.testing.assert_allclose(both, expected, rtol=1e-8, atol=1e-10)


def test_a_tree_that_the_other_grammar_lacks_makes_the_divergence_infinite(x64):
    p, q = make_grammar(1), make_grammar(2, support=np.array([[0.0], [1], [1]]) * FREE)
    cross, _ = by_enumeration(p, q)
    found = tree_cross_entropy(p, q, *arguments())
    assert found.tolist() == pytest.approx(cross.tolist())
    assert np.isinf(tree_kl(p, q, *arguments())).tolist() == np.isinf(cross).tolist()
    assert np.isfinite(tree_kl(q, p, *arguments())).all()
    without = q._replace(log_unary=None)
    assert np.isinf(tree_kl(p, without, *arguments())).any()


def test_without_a_parse_there_is_nothing_to_know(x64):
    p, q = make_grammar(1), make_grammar(2)
    p = p._replace(log_emit=p.log_emit.at[:, 2].set(-jnp.inf))
    for found in (tree_entropy(p, *arguments()), tree_cross_entropy(p, q, *arguments()), tree_kl(p, q, *arguments())):
        assert found[:2].tolist() == [0, 0]
        assert np.isfinite(found).all()


def test_components_of_low_rank_are_no_part_of_the_tree(x64):
    draw = np.random.default_rng(0)
    tables = (
        [0.5, 0.5, 0],
        draw.dirichlet(np.ones(2), 2),
        *(draw.dirichlet(np.ones(3), 2) for _ in range(2)),
        [[0.3, 0.7]],
    )
    with np.errstate(divide="ignore"):
        root, *factors = (jnp.asarray(np.log(x)) for x in tables)
    grammar = LowRankPCFG(root, *factors)  # pyright: ignore[reportArgumentType]
    words = jnp.array([[0, 1, 1, 0]])
    expected = brute_force(to_dense(grammar), words[0]).entropy()
    assert float(tree_entropy(grammar, words)[0]) == pytest.approx(expected)


def test_entropy_of_a_masked_sentence_counts_the_words_too(x64):
    grammar = make_grammar(1)
    words = np.array([[0, 1, 2, 0, 1]] * 3)
    mask = np.zeros((3, 5), bool)
    mask[:, 1] = True
    fillings = [brute_force(grammar, [0, word, 2, 0, 1]) for word in range(3)]
    logs = np.concatenate([found.log_probs for found in fillings])
    log_z = np.logaddexp.reduce(logs)
    expected = log_z - (np.exp(logs - log_z) * logs).sum()
    found = tree_entropy(grammar, jnp.asarray(words), jnp.array([5] * 3), mask=jnp.asarray(mask))
    assert float(found[0]) == pytest.approx(expected)


def test_works_under_jit(x64):
    grammar = make_grammar(1)
    np.testing.assert_allclose(jax.jit(tree_entropy)(grammar, *arguments()), tree_entropy(grammar, *arguments()))


def test_scores_of_words_do_as_well_as_words(x64):
    p, q = make_grammar(1), make_grammar(2)
    tokens, lengths = arguments()
    scores = term_scores(p, tokens, lengths)
    np.testing.assert_allclose(tree_entropy(p, scores, lengths), tree_entropy(p, tokens, lengths), atol=1e-12)
    assert np.isfinite(np.asarray(tree_kl(p, q, scores, lengths))).all()
