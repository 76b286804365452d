import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.enumeration import brute_force
from jaxft.structure.inside_outside import log_partition
from jaxft.structure.lengths import (
    expected_length,
    expected_symbol_counts,
    grammar_entropy,
    is_consistent,
    length_distribution,
    length_log_probs,
    mean_matrix,
    partition_function,
    spectral_radius,
)
from jaxft.structure.pcfg import PCFG, LowRankPCFG, random_pcfg, to_dense, to_sparse


def with_unaries() -> PCFG:
    """A random consistent grammar with a cycle of unary rules, and one straight to a word."""
    grammar = random_pcfg(jax.random.key(3), 2, 2, 2, terminating_frac=0.7)
    unary = jnp.array([[0.1, 0.2, 0.0, 0.0], [0.1, 0.0, 0.1, 0.1]])
    log_rule = grammar.log_rule + jnp.log1p(-unary.sum(axis=1)).reshape(2, 1, 1)
    return grammar._replace(log_rule=log_rule, log_unary=jnp.log(unary))


def low_rank() -> LowRankPCFG:
    keys = jax.random.split(jax.random.key(0), 4)
    head, left, right = (
        jax.nn.log_softmax(jax.random.normal(key, shape))
        for key, shape in zip(keys, [(3, 4), (4, 7), (4, 7)], strict=False)
    )
    root = jnp.log(jnp.array([0.5, 0.5, 0, 0, 0, 0, 0]))
    return LowRankPCFG(root, head, left, right, jax.nn.log_softmax(jax.random.normal(keys[3], (4, 5))))


def critical(p: float) -> PCFG:
    """S -> S S with probability p, else X X."""
    rule = jnp.log(jnp.array([[[p, 0.0], [0.0, 1 - p]]]))
    return PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.zeros((1, 1)))


def test_length_mass_is_the_sum_over_all_strings_of_that_length(x64):
    grammar = random_pcfg(jax.random.key(0), 2, 2, 2)
    masses = np.exp(length_distribution(grammar, 4))
    for length in (1, 2, 3, 4):
        strings = itertools.product(range(2), repeat=length)
        total = sum(np.exp(brute_force(grammar, string).log_z) for string in strings)
        assert masses[length] == pytest.approx(total, abs=1e-7)


@pytest.mark.parametrize("grammar", [with_unaries(), to_sparse(with_unaries())], ids=["dense", "list"])
def test_length_mass_is_the_partition_function_of_a_sentence_of_masks(grammar):
    tokens, lengths = jnp.zeros((5, 6), jnp.int32), jnp.array([1, 2, 3, 4, 6])
    log_z = log_partition(grammar, tokens, lengths, mask=jnp.ones((5, 6), bool))
    np.testing.assert_allclose(log_z, length_distribution(grammar, 6)[lengths], rtol=1e-5)


def test_unary_chains_are_closed_to_the_sum_over_longer_and_longer_ones(x64):
    grammar = with_unaries()
    masses = np.exp(length_distribution(grammar, 2))
    for length in (1, 2):
        strings = list(itertools.product(range(2), repeat=length))
        short, long = (
            sum(np.exp(brute_force(grammar, string, max_chain=n).log_z) for string in strings) for n in (1, 4)
        )
        assert masses[length] == pytest.approx(long, abs=3e-4)
        assert short < long - 1e-3  # so longer chains are there


@pytest.mark.parametrize("other", [to_sparse(random_pcfg(jax.random.key(4), 3, 4, 5)), low_rank()], ids=["list", "CP"])
def test_every_kind_of_grammar_has_the_table_of_the_dense_one(other):
    expected = length_log_probs(to_dense(other), 9)
    np.testing.assert_allclose(length_log_probs(other, 9)[1:], expected[1:], rtol=2e-5)
    np.testing.assert_allclose(mean_matrix(other), mean_matrix(to_dense(other)), rtol=1e-5, atol=1e-6)
    if not isinstance(other, LowRankPCFG):
        np.testing.assert_allclose(partition_function(other), partition_function(to_dense(other)), rtol=1e-6)


def test_long_sentences_do_not_underflow():
    table = length_distribution(critical(0.01), 200)
    assert np.isfinite(table[200])
    # Catalan(99) trees of 99 branching and 100 ending nodes
    log_catalan = sum(np.log((99 + k) / k) for k in range(2, 100))
    assert float(table[200]) == pytest.approx(log_catalan + 99 * np.log(0.01) + 100 * np.log(0.99), rel=1e-4)


def test_table_is_differentiable_with_finite_gradients():
    gradient = jax.jit(jax.grad(lambda g: length_distribution(g, 6)[6], allow_int=True))(with_unaries())
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    # Of log P(length): the expected number of uses; every sentence has one root.
    assert float(gradient.log_root.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("grammar", [with_unaries(), to_sparse(with_unaries())], ids=["dense", "list"])
def test_expected_length_is_the_mean_of_the_length_distribution(grammar):
    masses = np.exp(np.asarray(length_distribution(grammar, 150), float))
    assert masses.sum() == pytest.approx(1, abs=1e-5)
    mean = masses @ np.arange(151)
    assert float(expected_length(grammar)) == pytest.approx(mean, rel=1e-4)
    assert float(expected_symbol_counts(grammar)[2:].sum()) == pytest.approx(mean, rel=1e-4)


def test_entropy_is_the_mean_surprise_of_derivations(x64):
    grammar = random_pcfg(jax.random.key(0), 1, 2, 2, rules_per_nonterminal=None, terminating_frac=0.97)
    strings = [s for n in (2, 3, 4, 5) for s in itertools.product(range(2), repeat=n)]
    logs = np.concatenate([brute_force(grammar, string).log_probs for string in strings])
    missing = 1 - np.exp(logs).sum()
    assert 0 < missing < 1e-4
    assert float(grammar_entropy(grammar)) == pytest.approx(-(np.exp(logs) * logs).sum(), abs=50 * missing)


def test_entropy_counts_unary_choices():
    grammar = with_unaries()
    dense, listed = grammar_entropy(grammar), grammar_entropy(to_sparse(grammar))
    assert float(dense) == pytest.approx(float(listed), rel=1e-5)
    assert float(dense) > float(grammar_entropy(grammar._replace(log_unary=None)))  # the same binary rules alone


@pytest.mark.parametrize(("p", "mass"), [(0.3, 1.0), (0.5, 1.0), (0.75, 1 / 3)])
def test_finite_derivations_have_the_mass_of_the_branching_process(p, mass):
    # At p = 1/2 the mass turns as a square root: half the digits of a probability in single precision.
    assert partition_function(critical(p))[0] == pytest.approx(mass, abs=1e-3 if p == 0.5 else 1e-7)
    assert spectral_radius(critical(p)) == pytest.approx(2 * p)
    assert is_consistent(critical(p)) == (p < 0.5)


def test_length_distribution_sums_to_the_partition_function():
    lengths = np.exp(np.asarray(length_distribution(critical(0.75), 60), float))
    assert lengths.sum() == pytest.approx(1 / 3, abs=1e-3)


def test_symbols_that_no_sentence_has_do_not_make_a_grammar_inconsistent():
    rule = jnp.full((2, 3, 3), -jnp.inf).at[0, 2, 2].set(0).at[1, 1, 1].set(0)  # B -> B B never ends
    grammar = PCFG(jnp.log(jnp.array([1.0, 0, 0])), rule, jnp.zeros((1, 1)))
    assert is_consistent(grammar)
    assert float(expected_length(grammar)) == 2
    assert partition_function(grammar).tolist() == [1, 0, 1]
