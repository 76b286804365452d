import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.derivations import viterbi
from jaxft.structure.enumeration import brute_force
from jaxft.structure.information import tree_entropy
from jaxft.structure.inside_outside import term_scores
from jaxft.structure.k_best import k_best
from jaxft.structure.parses import parse_spans
from jaxft.structure.pcfg import PCFG, random_pcfg, to_sparse
from jaxft.structure.rule_trees import rule_trees
from jaxft.structure.semirings import as_element, k_best_semiring, log_weight

WORDS, LENGTHS = np.array([[0, 1, 2, 0, 1], [2, 1, 0, 0, 0], [1, 1, 1, 1, 1]]), np.array([5, 3, 1])


def make_grammar(kind: str = "dense"):
    """Three nonterminals, two preterminals and three words; half of the rules; preterminals may be roots."""
    draw = np.random.default_rng(0)
    rule = draw.gamma(1.0, size=(3, 25)) * (draw.random((3, 25)) < 0.4)
    emit = draw.dirichlet(np.ones(3), 2)
    root = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    with np.errstate(divide="ignore"):
        root, rule, emit = (jnp.asarray(np.log(x)) for x in (root, (rule / 4).reshape(3, 5, 5), emit))
    grammar = PCFG(root, rule, emit)
    return to_sparse(grammar) if kind == "sparse" else grammar


def k_best_trees(grammar, k):
    return k_best(grammar, jnp.asarray(WORDS), jnp.asarray(LENGTHS), k=k)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_trees_and_scores_are_the_first_of_all_derivations(x64, kind):
    grammar = make_grammar(kind)
    for row, found in enumerate(k_best_trees(grammar, 40)):
        expected = brute_force(grammar, WORDS[row, : LENGTHS[row]])
        scores = expected.log_probs[:40]
        np.testing.assert_allclose(found.score[: len(scores)], scores, rtol=1e-12)
        assert found.valid[:, 0].tolist() == [rank < len(scores) for rank in range(40)]
        trees = [[tuple(node) for node in d.nodes()] for d in expected.derivations]
        ours = parse_spans(found)[: len(scores)]
        assert len({tuple(tree) for tree in ours}) == len(ours)
        for score, tree in zip(scores, ours, strict=True):  # of equal scores any order
            same = [other for other, s in zip(trees, expected.log_probs, strict=True) if abs(s - score) < 1e-9]
            assert tree in same


def test_search_from_the_top_and_semiring_from_the_bottom_agree(x64):
    grammar, semiring = make_grammar(), k_best_semiring(5)

    @jax.jit
    def from_the_bottom(rule, words):
        return rule_trees(semiring, as_element(semiring, rule), as_element(semiring, words), chunks=1)

    chart = log_weight(semiring, from_the_bottom(grammar.log_rule, term_scores(grammar, jnp.asarray(WORDS))))
    roots = np.asarray(grammar.log_root)[:3].reshape(3, 1)
    for row, found in enumerate(k_best(grammar, jnp.asarray(WORDS), k=5)):
        totals = (np.asarray(chart)[row, 0, 5] + roots).ravel()
        np.testing.assert_allclose(found.score, np.sort(totals)[::-1][:5], rtol=1e-12)


def test_first_tree_is_that_of_viterbi(x64):
    best = viterbi(make_grammar(), jnp.asarray(WORDS), jnp.asarray(LENGTHS))
    for row, found in enumerate(k_best_trees(make_grammar(), 1)):
        assert parse_spans(found)[0] == parse_spans(best)[row]
        assert float(found.score[0]) == pytest.approx(float(best.score[row]))


def test_single_precision_finds_the_same_scores():
    single = k_best_trees(make_grammar(), 5)[0]
    expected = brute_force(make_grammar(), WORDS[0])
    np.testing.assert_allclose(single.score, expected.log_probs[:5], rtol=1e-6)


def test_no_words_and_no_parse_give_no_tree(x64):
    grammar = make_grammar()
    grammar = grammar._replace(log_emit=grammar.log_emit.at[:, 2].set(-jnp.inf))
    unknown, empty, _ = k_best(grammar, jnp.asarray(WORDS), jnp.array([5, 0, 1]), k=2)
    for found in (unknown, empty):
        assert not found.valid.any()
        assert found.score.tolist() == [-np.inf] * 2


def test_all_trees_together_are_the_sentence(x64):
    expected = brute_force(make_grammar(), WORDS[1, :3])
    found = k_best_trees(make_grammar(), len(expected.derivations) + 3)[1]
    assert np.logaddexp.reduce(np.asarray(found.score)) == pytest.approx(expected.log_z)


def test_a_rule_listed_twice_is_one_rule():
    grammar = to_sparse(random_pcfg(jax.random.key(1), 3, 4, 6, rules_per_nonterminal=20))
    lists = {name: jnp.concatenate([getattr(grammar, name)] * 2) for name in ("lhs", "left", "right")}
    half = grammar.log_rule - jnp.log(jnp.float32(2))
    twice = grammar._replace(**lists, log_rule=jnp.concatenate([half, half]))
    words = jnp.array([[0, 1, 2, 3, 4]])
    (once,), (merged,) = (k_best(g, words, k=3) for g in (grammar, twice))
    np.testing.assert_allclose(merged.score, once.score, rtol=1e-5)
    np.testing.assert_allclose(tree_entropy(twice, words), tree_entropy(grammar, words), rtol=1e-4)
