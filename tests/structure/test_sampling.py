import itertools
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxft.structure.enumeration import Derivation, brute_force
from jaxft.structure.lengths import length_distribution
from jaxft.structure.parses import parse_spans
from jaxft.structure.pcfg import PCFG, SparsePCFG, random_pcfg, to_sparse
from jaxft.structure.sampling import sample_sentences, sampling_tables

DRAWS = 4096
LENGTH = 4


def small() -> PCFG:
    """One nonterminal, two preterminals, two words: 5 x 16 trees of 4 words."""
    return random_pcfg(jax.random.key(2), 1, 2, 2)


def with_unaries() -> PCFG:
    """Two nonterminals, of which the first may become the second, and both a preterminal."""
    grammar = random_pcfg(jax.random.key(3), 2, 1, 1, terminating_frac=0.5)
    unary = jnp.array([[0.0, 0.3, 0.1], [0.0, 0.0, 0.3]])
    log_rule = grammar.log_rule + jnp.log1p(-unary.sum(axis=1)).reshape(2, 1, 1)
    return grammar._replace(log_rule=log_rule, log_unary=jnp.log(unary))


def outcome(derivation: Derivation) -> tuple[tuple[int, int, int, int], ...]:
    """(top symbol, bottom symbol, i, j) of each span of a derivation."""
    spans: dict[tuple[int, int], list[int]] = {}
    for symbol, i, j in derivation.nodes():
        spans.setdefault((i, j), []).append(symbol)
    return tuple((chain[0], chain[-1], i, j) for (i, j), chain in spans.items())


def exact(grammar: PCFG, length: int) -> dict:
    """Probability of each (words, tree), not given the length."""
    masses: dict = defaultdict(float)
    for words in itertools.product(range(grammar.log_emit.shape[1]), repeat=length):
        for derivation in brute_force(grammar, words).derivations:
            masses[words, outcome(derivation)] += float(np.exp(derivation.log_prob))
    return dict(masses)


def drawn(grammar: PCFG, seed: int = 0) -> tuple[Counter, dict]:
    """How often each outcome comes, and the score it comes with."""
    samples = sample_sentences(grammar, key=jax.random.key(seed), num=DRAWS, lengths=LENGTH)
    parses = samples.parses
    bottoms = parses if parses.bottoms is None else parses._replace(labels=parses.bottoms)
    keys = []
    for words, top, bottom in zip(np.asarray(samples.tokens), parse_spans(parses), parse_spans(bottoms), strict=True):
        tree = tuple((a, b, i, j) for (a, i, j), (b, _, _) in zip(top, bottom, strict=True))
        keys.append((tuple(words.tolist()), tree))
    return Counter(keys), dict(zip(keys, np.asarray(parses.score).tolist(), strict=True))


def p_value(counts: Counter, masses: dict) -> float:
    """Of the chi-square test; outcomes that are expected less than 5 times are pooled."""
    total = sum(masses.values())
    pairs = [(counts[key], mass / total * DRAWS) for key, mass in masses.items()]
    observed, expected = np.array(pairs).T
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert observed.sum() == DRAWS, "an impossible outcome was drawn"
    return float(scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("grammar", [small(), with_unaries()], ids=["binary", "unaries"])
def test_sentences_and_trees_have_their_probabilities_given_the_length(grammar):
    masses = exact(grammar, LENGTH)
    counts, scores = drawn(grammar)
    assert p_value(counts, masses) > 1e-3
    for key, score in scores.items():
        assert score == pytest.approx(np.log(masses[key]), abs=1e-4)
    # The control: the same draws are not those of another grammar.
    likeliest = jnp.unravel_index(grammar.log_rule.argmax(), grammar.log_rule.shape)
    changed = grammar._replace(log_rule=grammar.log_rule.at[likeliest].add(-0.5))
    assert p_value(counts, exact(changed, LENGTH)) < 1e-6


def test_lengths_follow_the_law_of_the_grammar_up_to_the_greatest():
    grammar = random_pcfg(jax.random.key(0), 2, 3, 4, terminating_frac=0.5)
    samples = sample_sentences(grammar, key=jax.random.key(1), num=DRAWS, max_length=LENGTH)
    masses = np.exp(np.asarray(length_distribution(grammar, LENGTH), float))[2:]
    counts = np.bincount(samples.lengths, minlength=LENGTH + 1)
    assert counts[:2].sum() == 0
    assert scipy.stats.chisquare(counts[2:], masses / masses.sum() * DRAWS).pvalue > 1e-3
    assert scipy.stats.chisquare(counts[2:], np.full(3, DRAWS / 3)).pvalue < 1e-6


def test_samples_are_trees_of_the_words():
    grammar = random_pcfg(jax.random.key(0), 4, 5, 9, rules_per_nonterminal=6, terminating_frac=0.3)
    samples = sample_sentences(grammar, key=jax.random.key(5), num=50, max_length=12)
    rules, emissions = np.exp(grammar.log_rule), np.exp(grammar.log_emit)
    for words, length, nodes in zip(samples.tokens.tolist(), samples.lengths, parse_spans(samples.parses), strict=True):
        assert len(nodes) == 2 * length - 1
        assert words[length:] == [0] * (12 - int(length))
        assert nodes[0][1:] == (0, length)
        leaves = [(i, label) for label, i, j in nodes if j == i + 1]
        assert [i for i, _ in leaves] == list(range(length))
        assert all(emissions[label - 4, words[i]] > 0 for i, label in leaves)
        for p, (label, i, j) in enumerate(nodes):
            if j > i + 1:
                left = nodes[p + 1]
                right = nodes[p + 2 * (left[2] - left[1])]
                assert (left[1], left[2], right[2]) == (i, right[1], j)
                assert rules[label, left[0], right[0]] > 0


def test_a_corpus_is_the_same_in_parts_and_as_a_whole():
    tables = sampling_tables(random_pcfg(jax.random.key(0), 2, 3, 4, terminating_frac=0.5), 6)
    whole = sample_sentences(tables, key=jax.random.key(7), num=10)
    part = sample_sentences(tables, key=jax.random.key(7), num=4, start=5)
    chunked = sample_sentences(tables, key=jax.random.key(7), num=10, chunk=3)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[5:9], whole), part)
    jax.tree.map(np.testing.assert_array_equal, whole, chunked)


def test_a_rule_list_gives_the_sentences_of_the_dense_grammar():
    grammar = with_unaries()
    reversed_list = to_sparse(grammar)
    rules = {name: getattr(reversed_list, name)[::-1] for name in ("lhs", "left", "right", "log_rule")}
    dense = sample_sentences(grammar, key=jax.random.key(7), num=10, max_length=6)
    listed = sample_sentences(reversed_list._replace(**rules), key=jax.random.key(7), num=10, max_length=6)
    jax.tree.map(np.testing.assert_array_equal, dense, listed)


def test_tables_pass_through_jit_and_an_impossible_length_gives_no_sentence():
    tables = sampling_tables(small(), 6)

    @jax.jit
    def draw(tables, lengths):
        return sample_sentences(tables, key=jax.random.key(0), num=3, lengths=lengths)

    samples = draw(tables, jnp.array([4, 1, 9]))
    assert samples.lengths.tolist() == [4, 0, 0]
    assert samples.parses.valid.sum(axis=1).tolist() == [7, 0, 0]
    assert np.isneginf(samples.parses.score[1:]).all()
    eager = sample_sentences(tables, key=jax.random.key(0), num=3, lengths=4)
    assert (samples.tokens[0] == eager.tokens[0]).all()


def test_sentences_of_one_word_come_from_preterminal_roots():
    grammar = PCFG(jnp.log(jnp.array([0.0, 0.0, 1.0])), jnp.full((1, 3, 3), -jnp.inf), jnp.log(jnp.eye(2)))
    samples = sample_sentences(grammar, key=jax.random.key(0), num=3, max_length=4)
    assert (samples.lengths.tolist(), samples.tokens[:, 0].tolist()) == ([1, 1, 1], [1, 1, 1])
    assert samples.parses.labels[:, 0].tolist() == [2, 2, 2]


def test_a_grammar_of_treebank_size_is_sampled_from_its_rule_list():
    s, q, rules = 600, 150, 4600
    rng = np.random.default_rng(0)
    lhs = np.sort(np.concatenate([np.arange(s), rng.integers(s, size=rules - s)]))
    left, right = rng.integers(s + q, size=(2, rules))
    probability = rng.exponential(size=rules)
    probability /= np.bincount(lhs, probability, s)[lhs]
    grammar = SparsePCFG(
        jnp.where(jnp.arange(s + q) == 0, 0.0, -jnp.inf),
        jnp.asarray(lhs, jnp.int32),
        jnp.asarray(left, jnp.int32),
        jnp.asarray(right, jnp.int32),
        log_rule=jnp.log(jnp.asarray(probability, jnp.float32)),
        log_emit=jnp.full((q, 20), -jnp.log(20.0)),
    )
    samples = sample_sentences(grammar, key=jax.random.key(0), num=64, lengths=25)
    existing = set(zip(lhs.tolist(), left.tolist(), right.tolist(), strict=True))
    for nodes in parse_spans(samples.parses):
        for p, (label, i, j) in enumerate(nodes):
            if j > i + 1:
                k = nodes[p + 1][2] - i
                assert (label, nodes[p + 1][0], nodes[p + 2 * k][0]) in existing
