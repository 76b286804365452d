"""Every fault of a grammar is named, and pruning changes no probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.enumeration import brute_force
from jaxft.structure.grammar_text import parse_grammar
from jaxft.structure.pcfg import LowRankPCFG, SparsePCFG, SymbolNames, random_pcfg, to_dense, to_sparse
from jaxft.structure.validate import (
    grammar_faults,
    productive_symbols,
    prune,
    reachable_symbols,
    require_valid,
    unary_spectral_radius,
)

GRAMMAR = parse_grammar(
    "S -> A B [0.5] | S S [0.25] | A [0.25]\nA -> 'a' [1]\nB -> 'b' [0.5] | A B [0.5]\nC -> A C [0.5] | 'c' [0.5]"
)
# S and B and C are nonterminals, A and the words of B and of C preterminals; nothing reaches C.
DEAD = parse_grammar("S -> A B [0.5] | 'x' [0.25] | S D [0.25]\nA -> 'a' [1]\nB -> 'b' [1]\nD -> D S [0.75] | D [0.25]")
# D derives no words.


def low_rank(rank=3):
    """Two nonterminals and three preterminals; the last of these stands in no component."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows = [
        jax.random.dirichlet(key, jnp.ones(size), (count,))
        for key, size, count in zip(keys, (rank, 4, 4, 3), (2, rank, rank, 3), strict=True)
    ]
    head, left, right, emit = map(jnp.log, rows)
    pad = jnp.full((rank, 1), -jnp.inf)
    root = jnp.array([0.0] + [-jnp.inf] * 4)
    return LowRankPCFG(root, head, jnp.concatenate([left, pad], 1), jnp.concatenate([right, pad], 1), emit)


def test_a_random_grammar_has_no_fault():
    grammar = random_pcfg(jax.random.key(0), 3, 4, 5)
    assert grammar_faults(grammar) == grammar_faults(to_sparse(grammar)) == []
    require_valid(grammar)


def test_shapes_are_looked_at_first():
    grammar = random_pcfg(jax.random.key(0), 2, 3, 4)
    faults = grammar_faults(grammar._replace(log_rule=grammar.log_rule[:, :4] * jnp.nan))
    assert faults == ["log_rule must be (2, 5, 5), is (2, 4, 5)"]
    assert "with q <= a" in grammar_faults(grammar._replace(log_root=jnp.zeros(2)))[0]
    names = GRAMMAR.names
    assert names is not None
    assert grammar_faults(grammar._replace(names=names)) == [
        f"{len(names.nonterminals)} names of 2 nonterminals",
        "3 names of 4 words",
    ]
    bad = low_rank()._replace(log_left=jnp.zeros((2, 5)))
    assert grammar_faults(bad) == ["log_left must be (3, 5), is (2, 5)"]


def test_numbers_that_are_no_log_probabilities_are_named():
    grammar = random_pcfg(jax.random.key(0), 2, 3, 4)
    assert grammar_faults(grammar._replace(log_rule=grammar.log_rule.at[1, 2, 3].set(jnp.nan))) == [
        "log_rule holds NaN at (1, 2, 3)"
    ]
    probabilities = grammar._replace(log_emit=jnp.exp(grammar.log_emit))
    assert "log_emit holds a probability of" in grammar_faults(probabilities)[0]


def test_every_sum_that_is_not_one_is_named_with_its_value():
    sparse = GRAMMAR._replace(log_rule=GRAMMAR.log_rule - 0.1, log_root=GRAMMAR.log_root - 1)
    faults = grammar_faults(sparse)
    assert faults[0] == "the roots sum to 0.367879"
    assert [fault.split(" sum")[0] for fault in faults[1:4]] == ["the rules of S", "the rules of B", "the rules of C"]
    assert grammar_faults(to_dense(sparse)) == faults
    assert grammar_faults(sparse, tolerance=1.0)[0].startswith("no root reaches")
    low = low_rank()
    assert (
        grammar_faults(low._replace(log_head=low.log_head - 1))[0] == "the components of nonterminal 0 sum to 0.367879"
    )


def test_rules_of_a_list_must_be_of_symbols_and_stand_there_once():
    twice = GRAMMAR._replace(
        lhs=GRAMMAR.lhs.at[1].set(0), left=GRAMMAR.left.at[1].set(3), right=GRAMMAR.right.at[1].set(1)
    )
    assert "rules listed twice: S -> A B" in grammar_faults(twice)
    outside = GRAMMAR._replace(left=GRAMMAR.left.at[2].set(99), lhs=GRAMMAR.lhs.at[0].set(-1))
    assert grammar_faults(outside) == [
        "lhs of rule 0 is -1, no number below 3",
        "left of rule 2 is 99, no number below 6",
    ]


def test_a_cycle_of_unary_rules_with_mass_one_is_named():
    grammar = parse_grammar("S -> X [0.5] | A A [0.5]\nX -> S [0.5] | Y [0.5]\nY -> X [0.5] | 'y' [0.5]\nA -> 'a' [1]")
    assert unary_spectral_radius(grammar) == pytest.approx(np.sqrt(0.5), rel=1e-6)
    unary = np.full((3, 5), -np.inf, np.float32)
    unary[0, 1] = unary[1, 0] = 0.0
    bad = grammar_faults(grammar._replace(log_unary=jnp.asarray(unary)))
    assert "unary rules form a cycle of mass 1, not below 1, through S, X" in bad


def test_symbols_without_use_are_named():
    assert grammar_faults(GRAMMAR) == ["no root reaches C, C|<words>"]
    assert grammar_faults(DEAD) == ["no words come from D"]
    assert grammar_faults(low_rank()) == ["no root reaches preterminal 2"]
    assert reachable_symbols(low_rank()).tolist() == [True] * 4 + [False]
    assert productive_symbols(to_dense(DEAD)).tolist() == productive_symbols(DEAD).tolist()


@pytest.mark.parametrize("make", [to_sparse, to_dense])
@pytest.mark.parametrize("grammar", [GRAMMAR, DEAD], ids=["unreachable", "unproductive"])
def test_pruning_keeps_every_probability(grammar, make):
    before = make(grammar)
    after = prune(before)
    assert type(after) is type(before)
    assert after.log_root.shape[0] < before.log_root.shape[0]
    assert [fault for fault in grammar_faults(after) if "sum to" not in fault] == []
    tokens = jnp.array([[0, 1, 1], [0, 0, 1], [2, 0, 1], [0, 1, 0]])
    # The cycle of D yields no words, so that short chains are all.
    there, back = ([brute_force(g, row, max_chain=3).log_z for row in tokens] for g in (before, after))
    np.testing.assert_allclose(back, there, rtol=1e-6)


def test_pruning_a_low_rank_grammar_keeps_the_rules_that_are_left():
    before, after = low_rank(), prune(low_rank())
    np.testing.assert_array_equal(to_dense(after).log_rule, to_dense(before).log_rule[:, :4, :4])
    assert grammar_faults(after) == []


def test_pruning_removes_what_only_unproductive_rules_reach():
    pruned = prune(parse_grammar("S -> A A [0.5] | D E [0.5]\nA -> 'a' [1]\nE -> 'e' [1]\nD -> D D [1]"))
    assert isinstance(pruned, SparsePCFG)
    assert pruned.names == SymbolNames(["S"], ["A"], ["a", "e"])
    np.testing.assert_allclose(np.exp(pruned.log_rule), [0.5])
