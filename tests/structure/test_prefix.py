import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.enumeration import brute_force
from jaxft.structure.lengths import length_distribution
from jaxft.structure.pcfg import PCFG, random_pcfg, to_sparse
from jaxft.structure.prefix import next_word_log_probs, prefix_log_probability

V = 2


def bounded(unaries: bool) -> PCFG:
    """Sentences of 1 to 4 words: the second nonterminal branches to preterminals alone."""
    random = random_pcfg(jax.random.key(0), 2, 2, V)
    allowed = jnp.ones((2, 4, 4)).at[:, 0].set(0).at[:, :, 0].set(0)
    allowed = allowed.at[1, 1].set(0).at[1, :, 1].set(0)
    rule = jnp.exp(random.log_rule) * allowed
    rule = rule / rule.sum(axis=(1, 2), keepdims=True)
    root = jnp.log(jnp.array([0.8, 0.1, 0.0, 0.1]))
    if not unaries:
        return random._replace(log_root=root, log_rule=jnp.log(rule))
    unary = jnp.array([[0.0, 0.3, 0.1, 0.0], [0.0, 0.0, 0.2, 0.2]])
    rule = rule * (1 - unary.sum(axis=1)).reshape(2, 1, 1)
    return random._replace(log_root=root, log_rule=jnp.log(rule), log_unary=jnp.log(unary))


def sentence_masses(grammar: PCFG) -> dict[tuple[int, ...], float]:
    strings = [s for n in range(1, 5) for s in itertools.product(range(V), repeat=n)]
    masses = {string: float(np.exp(brute_force(grammar, string).log_z)) for string in strings}
    assert sum(masses.values()) == pytest.approx(1, abs=1e-6)
    return masses


def double(grammar: PCFG) -> PCFG:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), grammar)


@pytest.mark.parametrize("unaries", [False, True])
def test_prefixes_and_next_words_sum_over_all_sentences_that_continue(x64, unaries):
    grammar = double(bounded(unaries))
    masses = sentence_masses(grammar)
    strings = [string for string in masses if len(string) == 4]
    tokens = np.array(strings)
    prefix = np.exp(prefix_log_probability(grammar, tokens))
    words, end = next_word_log_probs(grammar, tokens)
    for b, string in enumerate(strings):
        for k in range(5):
            start = string[:k]
            total = sum(mass for s, mass in masses.items() if s[:k] == start)
            if k:
                assert prefix[b, k - 1] == pytest.approx(total, rel=1e-6)
            assert np.exp(end[b, k]) == pytest.approx(masses.get(start, 0) / total, rel=1e-6)
            for word in range(V):
                longer = sum(mass for s, mass in masses.items() if s[: k + 1] == (*start, word))
                assert np.exp(words[b, k, word]) == pytest.approx(longer / total, rel=1e-6)


def test_left_recursion_is_summed_to_all_lengths(x64):
    # With one preterminal the words are independent of the tree: P(prefix) = P(length >= k) prod P(word).
    grammar = double(random_pcfg(jax.random.key(5), 3, 1, 3, terminating_frac=0.7))
    tokens = np.array([[0, 2, 1, 1, 0]])
    tail = 1 - np.exp(length_distribution(grammar, 5)).cumsum()[:-1]
    expected = np.log(tail) + np.asarray(grammar.log_emit)[0, tokens[0]].cumsum()
    # The rules sum to one to single precision.
    np.testing.assert_allclose(prefix_log_probability(grammar, tokens)[0], expected, atol=1e-6)


def test_next_words_are_the_ratios_of_prefixes():
    grammar = random_pcfg(jax.random.key(6), 3, 4, 5, terminating_frac=0.6)
    tokens = jnp.array([[0, 3, 2, 1, 4, 4, 0]])
    prefix = prefix_log_probability(grammar, tokens)[0]
    words, end = next_word_log_probs(grammar, tokens)
    ratios = jnp.diff(prefix, prepend=jnp.zeros(1))
    np.testing.assert_allclose(words[0, jnp.arange(7), tokens[0]], ratios, atol=2e-5)
    total = jnp.exp(words[0]).sum(axis=1) + jnp.exp(end[0])
    np.testing.assert_allclose(total, jnp.ones(8), atol=1e-5)


def test_padding_changes_nothing_and_a_rule_list_is_the_dense_grammar():
    grammar = random_pcfg(jax.random.key(6), 3, 4, 5, terminating_frac=0.6)
    tokens = jnp.array([[0, 3, 2, 9, -1], [0, 3, 2, 1, 0]])
    lengths = jnp.array([3, 5])
    padded, full = prefix_log_probability(to_sparse(grammar), tokens, lengths)
    np.testing.assert_allclose(padded[:3], full[:3], rtol=1e-6)
    assert np.isneginf(padded[3:]).all()
    words, end = next_word_log_probs(grammar, tokens, lengths)
    np.testing.assert_allclose(words[0, :4], words[1, :4], rtol=1e-5)
    assert np.isneginf(words[0, 4:]).all()
    assert np.isneginf(end[0, 4:]).all()


def test_an_impossible_prefix_has_no_mass_and_finite_gradients():
    grammar = random_pcfg(jax.random.key(6), 2, 2, 3, words_per_preterminal=1, terminating_frac=0.6)
    unused = int(np.flatnonzero(np.isneginf(grammar.log_emit).all(axis=0))[0])
    tokens = jnp.array([[unused, 0, 1]])
    assert np.isneginf(prefix_log_probability(grammar, tokens)).all()
    words, end = next_word_log_probs(grammar, tokens)
    assert np.isneginf(words[0, 1:]).all()
    assert np.isneginf(end[0, 1:]).all()

    def loss(grammar):
        prefix = prefix_log_probability(grammar, tokens)
        return jnp.where(prefix > -jnp.inf, prefix, 0).sum()

    gradient = jax.grad(loss)(grammar)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))


def test_long_prefixes_do_not_underflow():
    grammar = random_pcfg(jax.random.key(6), 2, 2, 50, terminating_frac=0.55)
    prefix = prefix_log_probability(grammar, jnp.arange(40).reshape(1, -1))
    assert float(prefix[0, -1]) < -100
    assert bool((jnp.diff(prefix[0]) < 0).all())
