import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.enumeration import brute_force, enumerated_masked_posterior
from jaxft.structure.pcfg import PCFG, random_pcfg

CATALAN = (1, 1, 2, 5, 14, 42, 132)


def one_symbol(words: int = 2) -> PCFG:
    """S -> S S | S X | X S | X X, all alike."""
    rule = jnp.full((1, 2, 2), jnp.log(0.25))
    return PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.full((1, words), -jnp.log(words)))


@pytest.mark.parametrize("length", range(2, 8))
def test_one_symbol_has_catalan_many_derivations_of_equal_probability(length):
    found = brute_force(one_symbol(), [0] * length)
    assert len(found.derivations) == CATALAN[length - 1]
    # n - 1 rules of 1/4 and n words of 1/2
    expected = np.log(CATALAN[length - 1]) + (length - 1) * np.log(0.25) + length * np.log(0.5)
    assert found.log_z == pytest.approx(expected, rel=1e-6)
    assert found.entropy() == pytest.approx(np.log(CATALAN[length - 1]), abs=1e-9)


def test_number_of_labelled_derivations_multiplies_symbols():
    grammar = random_pcfg(jax.random.key(0), 2, 3, 4)
    # Root and each inner node below have 2 labels, each of 4 leaves 3.
    assert len(brute_force(grammar, [0, 1, 2, 3]).derivations) == 5 * 2**3 * 3**4


def test_marginals_obey_the_counts_of_a_binary_tree():
    found = brute_force(random_pcfg(jax.random.key(1), 2, 2, 3), [0, 1, 2, 0, 1])
    binary, unary = found.rules()
    assert found.spans().sum() == pytest.approx(4)
    assert found.tags().sum(axis=1) == pytest.approx(np.ones(5))
    assert (binary.sum(), unary.sum()) == (pytest.approx(4), 0)
    assert found.roots().sum() == pytest.approx(1)
    assert found.spans()[0, 5] == pytest.approx(found.roots()[:2])


def test_recall_of_a_derivation_sums_the_marginals_of_its_nodes():
    found = brute_force(random_pcfg(jax.random.key(1), 2, 2, 3), [0, 1, 2, 0])
    nodes = found.derivations[0].nodes()
    marginals = found.symbols()
    assert found.expected_recall(nodes) == pytest.approx(sum(marginals[i, j, symbol] for symbol, i, j in nodes))
    unlabelled = sum(marginals[i, j].sum() for _, i, j in nodes)
    assert found.expected_recall(nodes, labelled=False) == pytest.approx(unlabelled)


def test_derivations_come_likeliest_first():
    found = brute_force(random_pcfg(jax.random.key(1), 2, 2, 3), [0, 1, 2, 0])
    assert (np.diff(found.log_probs) <= 0).all()


def test_a_sentence_without_derivation_has_no_mass():
    grammar = one_symbol()._replace(log_emit=jnp.log(jnp.array([[1.0, 0.0]])))
    found = brute_force(grammar, [0, 1])
    assert (found.derivations, found.log_z, found.spans().sum()) == ((), -np.inf, 0)


def test_unary_chains_are_derivations_of_their_own():
    # S -> A (0.5) | X (0.25) | X X (0.25);  A -> X
    log_unary = jnp.log(jnp.array([[0.0, 0.5, 0.25], [0.0, 0.0, 1.0]]))
    log_rule = jnp.full((2, 3, 3), -jnp.inf).at[0, 2, 2].set(jnp.log(0.25))
    grammar = PCFG(jnp.log(jnp.array([1.0, 0, 0])), log_rule, jnp.zeros((1, 1)), log_unary)
    found = brute_force(grammar, [0])
    assert [d.nodes() for d in found.derivations] == [[(0, 0, 1), (1, 0, 1), (2, 0, 1)], [(0, 0, 1), (2, 0, 1)]]
    assert np.exp(found.log_probs) == pytest.approx([0.5, 0.25])
    assert found.rules()[1].sum() == pytest.approx((2 * 0.5 + 0.25) / 0.75)


def test_a_cycle_converges_to_the_geometric_series():
    log_unary = jnp.log(jnp.array([[0.5, 0.5]]))  # S -> S | X
    grammar = PCFG(jnp.log(jnp.array([1.0, 0])), jnp.full((1, 2, 2), -jnp.inf), jnp.zeros((1, 1)), log_unary)
    masses = [np.exp(brute_force(grammar, [0], max_chain=n).log_z) for n in (1, 2, 3)]
    assert masses == pytest.approx([0.5, 0.75, 0.875])


def test_masked_posterior_without_masks_is_the_sentence_and_with_all_sums_to_one():
    grammar = random_pcfg(jax.random.key(1), 2, 2, 3)
    posterior = enumerated_masked_posterior(grammar, [0, 1, 2], [False] * 3)
    assert posterior == pytest.approx(np.eye(3))
    posterior = enumerated_masked_posterior(grammar, [0, 0, 0], [True] * 3)
    assert posterior.sum(axis=1) == pytest.approx(np.ones(3))
