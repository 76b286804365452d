"""What a user of the charts of ``jaxft.structure`` is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.structure.bracketings import bracketing_chart
from jaxft.structure.chart import Recursion, span_chart
from jaxft.structure.derivations import sample_trees, viterbi
from jaxft.structure.information import tree_kl
from jaxft.structure.inside_outside import inside_outside, log_partition, term_scores
from jaxft.structure.k_best import k_best
from jaxft.structure.learning import em_step, reestimate
from jaxft.structure.pcfg import PCFG, SparsePCFG, to_sparse
from jaxft.structure.routes import explain
from jaxft.structure.rule_trees import rule_trees
from jaxft.structure.semirings import COUNTING, EXPECTATION, as_element, k_best_semiring


def grammar(nonterminals=2, preterminals=2, words=3):
    a = nonterminals + preterminals
    rule = np.full((nonterminals, a, a), -2 * np.log(a))
    root = np.where(np.arange(a) < nonterminals, -np.log(nonterminals), -np.inf)
    return PCFG(*map(jnp.asarray, (root, rule, np.full((preterminals, words), -np.log(words)))))  # pyright: ignore[reportArgumentType]


def large():
    """A list of one rule among 700 nonterminals and as many preterminals."""
    one = jnp.zeros(1, int)
    return SparsePCFG(jnp.zeros(1400), one, one, one, jnp.zeros(1), jnp.zeros((700, 3)))


G, WORDS, LENGTHS = grammar(), jnp.array([[0, 1, 2], [2, 1, 0]]), jnp.array([3, 2])
UNARY = G._replace(log_unary=jnp.full((2, 4), -jnp.inf))

SENTENCES = {
    "word outside the lexicon": (lambda: inside_outside(G, WORDS.at[0, 1].set(3)), r"0\.\.2, got \[3\]. Map unknown"),
    "negative word": (lambda: inside_outside(G, WORDS.at[1, 0].set(-1)), r"0\.\.2, got \[-1\]"),
    "one sentence alone": (lambda: inside_outside(G, WORDS[0]), r"integers \[b, t\], got \(3,\). Pad sentences"),
    "a list": (lambda: term_scores(G, [[0, 1]]), r"integers \[b, t\], got None"),  # pyright: ignore[reportArgumentType]
    "a list of words": (lambda: inside_outside(G, [[0, 1]]), "an array, got list. Wrap it"),  # pyright: ignore[reportArgumentType]
    "scores of other preterminals": (lambda: inside_outside(G, jnp.zeros((2, 3, 4))), r"\[b, t, 2\], got \(2, 3, 4\)"),
    "scores without an axis": (lambda: inside_outside(G, jnp.zeros((2, 3))), r"\[b, t, 2\], got \(2, 3\)"),
    "length beyond the padding": (
        lambda: inside_outside(G, WORDS, jnp.array([4, 2])),
        r"0\.\.3, the padding, got 2\.\.4",
    ),
    "negative length": (lambda: inside_outside(G, WORDS, jnp.array([-1, 2])), r"got -1\.\.2"),
    "length of scores": (lambda: inside_outside(G, jnp.zeros((2, 3, 2)), jnp.array([4, 2])), r"got 2\.\.4. Pad more"),
    "lengths of other sentences": (lambda: inside_outside(G, WORDS, jnp.array([3])), r"must be \[2\], one a sentence"),
    "scores that are no numbers": (
        lambda: log_partition(G, jnp.full((2, 3, 2), jnp.nan)),
        "below infinity, got NaN or infinity",
    ),
    "no sentence": (lambda: inside_outside(G, WORDS[:0], LENGTHS[:0]), r"got \(0, 3\)"),
    "no room for words": (lambda: inside_outside(G, WORDS[:, :0]), r"got \(2, 0\)"),
    "mask of another shape": (
        lambda: inside_outside(G, WORDS, mask=jnp.ones((2, 2), bool)),
        r"shape of tokens, got \(2, 2\)",
    ),
    "mask of scores": (
        lambda: inside_outside(G, jnp.zeros((2, 3, 2)), mask=jnp.ones((2, 3), bool)),
        "a mask goes with word numbers",
    ),
}

ROUTES = {
    "unknown method": (lambda: inside_outside(G, WORDS, method="sparce"), "got 'sparce'. Did you mean sparse?"),  # pyright: ignore[reportArgumentType]
    "half precision": (
        lambda: log_partition(jax.tree.map(lambda x: x.astype(jnp.float16), G), WORDS),
        "got float16. Use float32",
    ),
    "no nonterminal": (
        lambda: log_partition(PCFG(jnp.zeros(1), jnp.zeros((0, 1, 1)), jnp.zeros((1, 1))), jnp.zeros((1, 1), int)),
        "must have a nonterminal, got none. Put one with a unary rule",
    ),
    "low rank of a dense grammar": (
        lambda: inside_outside(G, WORDS, method="low_rank"),
        "needs a LowRankPCFG, got PCFG",
    ),
    "too large for a tensor": (
        lambda: inside_outside(large(), WORDS, method="scaled"),
        r"must fit 2 GiB for method scaled, got 5.1 GiB. Use method='sparse'",
    ),
    "too large for logarithms": (lambda: explain(large(), batch=1, tokens=2, method="log"), "Use method='sparse'"),
    "traced lists of rules": (
        lambda: jax.jit(lambda g: log_partition(g, WORDS, method="sparse"))(to_sparse(G)),
        "lists of rules must be concrete, got traced ones. Pass the rule lists as constants",
    ),
    "listing a traced grammar": (lambda: jax.jit(to_sparse)(G), "must be concrete, got a traced one"),
    "no chunk": (lambda: inside_outside(G, WORDS, chunks=0), "chunks must be positive, got 0"),
    "no chunk of log Z": (lambda: log_partition(G, WORDS, chunks=0), "chunks must be positive, got 0"),
    "batch that does not split": (
        lambda: inside_outside(G, WORDS[:1], mesh=jax.sharding.Mesh(np.array(jax.devices() * 2)[:2], ("data",))),
        "must split over 2 devices, got 1. Pad the batch",
    ),
}

PARTS = {
    "no tree": (lambda: k_best(G, WORDS, k=0), "k must be positive, got 0"),
    "unary rules": (lambda: k_best(UNARY, WORDS, k=2), "no unary rules, got some. Collapse chains"),
    "k best under jit": (lambda: jax.jit(lambda w: k_best(G, w, k=2)[0].score)(WORDS), "Call it outside jit"),
    "scores without an axis in k best": (lambda: k_best(G, jnp.zeros((2, 3)), k=2), r"\[b, t, 2\], got \(2, 3\)"),
    "scores of other preterminals in the best tree": (lambda: viterbi(G, jnp.zeros((2, 3, 4))), r"\[b, t, 2\]"),
    "length beyond the padding in samples": (
        lambda: sample_trees(G, jnp.zeros((2, 3, 2)), jnp.array([4, 1]), key=jax.random.key(0)),
        r"0\.\.3, the padding, got 1\.\.4",
    ),
    "unknown word in k best": (lambda: k_best(G, WORDS + 1, k=2), r"0\.\.2, got \[3, 3\]"),
    "empty semiring": (lambda: k_best_semiring(0), "k must be positive"),
    "values of a semiring without": (lambda: as_element(COUNTING, jnp.zeros(2), jnp.zeros(2)), "Only expectation has"),
    "no values of one with": (lambda: as_element(EXPECTATION, jnp.zeros(2)), "expectation elements, got no values"),
    "unary rules without closure": (
        lambda: rule_trees(k_best_semiring(2), *unary_elements(), chunks=1),
        "need a semiring with a closure, got 2-best",
    ),
    "span scores without ends": (lambda: bracketing_chart(jnp.zeros((1, 3, 3))), r"got \(1, 3, 3\). Give ends"),
    "chart of nothing": (lambda: span_chart(Recursion(lambda *_: (), (0.0,)), None, (jnp.zeros((1, 0)),)), "a token"),
    "negative smoothing": (lambda: em_step(G, WORDS, smoothing=-1), "must not be negative, got -1"),
    "counts of another grammar": (
        lambda: reestimate(G, {"log_root": jnp.zeros(4)}),
        r"arrays of the grammar, got .*Pass .*'log_emit': \(2, 3\)",
    ),
    "other symbols": (lambda: tree_kl(G, grammar(3, 2), WORDS), r"symbols.*got \[\(4, 2, 3\), \(5, 2, 3\)\]"),
    "other lists of many symbols": (
        lambda: tree_kl(large(), large()._replace(left=jnp.ones(1, int)), WORDS),
        "List the same rules in both",
    ),
}


def unary_elements():
    semiring = k_best_semiring(2)
    scores = G.log_rule, term_scores(G, WORDS), jnp.full((2, 4), -1.0)
    return [as_element(semiring, score) for score in scores]


CASES = {**SENTENCES, **ROUTES, **PARTS}


@pytest.mark.parametrize("name", CASES)
def test_message_names_the_rule_what_came_and_the_next_step(name):
    call, expected = CASES[name]
    with pytest.raises(UserError, match=expected):
        call()


def test_shapes_are_checked_under_jit_and_values_are_not():
    with pytest.raises(UserError, match="one a sentence"):
        jax.jit(lambda w, n: log_partition(G, w, n))(WORDS, LENGTHS[:1])
    traced = jax.jit(lambda w, n: log_partition(G, w, n))(WORDS, LENGTHS + 0)
    np.testing.assert_allclose(traced, log_partition(G, WORDS, LENGTHS), rtol=1e-6)


def test_words_behind_the_end_and_under_a_mask_may_be_anything():
    log_z = log_partition(G, WORDS, LENGTHS)
    odd = WORDS.at[1, 2].set(99)
    np.testing.assert_array_equal(log_partition(G, odd, LENGTHS), log_z)
    mask = jnp.zeros((2, 3), bool).at[0, 0].set(True)
    hidden = log_partition(G, odd.at[0, 0].set(-7), LENGTHS, mask=mask)
    np.testing.assert_array_equal(hidden, log_partition(G, WORDS, LENGTHS, mask=mask))
