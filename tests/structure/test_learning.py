from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.inside_outside import inside_outside, log_partition
from jaxft.structure.learning import em_step, expected_counts, log_likelihood_loss, normalize_scores, reestimate
from jaxft.structure.pcfg import PCFG, LowRankPCFG, to_dense, to_sparse
from jaxft.structure.validate import grammar_faults

WORDS = jnp.array([[0, 1, 2, 0, 1], [2, 1, 0, 0, 0], [1, 1, 2, 1, 1]])
LENGTHS = jnp.array([5, 3, 4])


def rows(draw, n, m, share=1.0):
    table = draw.gamma(1.0, size=(n, m)) * (draw.random((n, m)) < share)
    return table / table.sum(axis=1, keepdims=True)


def make_grammar(kind: str) -> Any:
    draw = np.random.default_rng(0)
    root, emit = [0.4, 0.3, 0.3, 0, 0], rows(draw, 2, 3)
    if kind == "low rank":
        tables = (root, rows(draw, 3, 4), rows(draw, 4, 5, 0.7), rows(draw, 4, 5, 0.7), emit)
        return LowRankPCFG(*log(tables))  # pyright: ignore[reportArgumentType]
    rule, unary = rows(draw, 3, 25, 0.5), np.zeros((3, 5))
    unary[0, 1], unary[1, 3], unary[1, 2] = 0.2, 0.1, 0.1
    rule *= 1 - unary.sum(axis=1, keepdims=True)
    root, rule, emit, unary = log((root, rule.reshape(3, 5, 5), emit, unary))
    grammar = PCFG(root, rule, emit, unary)
    return to_sparse(grammar) if kind == "sparse" else grammar


def log(tables):
    with np.errstate(divide="ignore"):
        return [jnp.asarray(np.log(x)) for x in tables]


KINDS: dict[str, Any] = {"dense": "scaled", "sparse": "sparse", "low rank": "low_rank"}
"""Kind of grammar and its route."""


@pytest.mark.parametrize("kind", KINDS)
def test_em_never_decreases_the_likelihood(x64, kind):
    grammar, scores = make_grammar(kind), []
    for _ in range(12):
        grammar, log_z = em_step(grammar, WORDS, LENGTHS, method=KINDS[kind])
        scores.append(float(log_z.sum()))
    assert (np.diff(scores) > -1e-10).all()
    assert scores[-1] > scores[0] + 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_distributions(x64, kind):
    grammar = em_step(make_grammar(kind), WORDS, LENGTHS, method=KINDS[kind])[0]
    assert not [fault for fault in grammar_faults(grammar) if "sum" in fault]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_wrong_direction_loses_likelihood(x64, kind):
    # The control of the monotone rise: against the expected counts it falls.
    grammar, method = make_grammar(kind), KINDS[kind]
    uses, before = expected_counts(grammar, WORDS, LENGTHS, method=method)
    scores = {name: getattr(grammar, name) for name in uses}
    against = {name: jnp.where(x > -jnp.inf, jnp.exp(x) / (0.05 + uses[name]), 0) for name, x in scores.items()}
    wrong = reestimate(grammar, against)
    assert float(log_partition(wrong, WORDS, LENGTHS, method=method).sum()) < float(before.sum()) - 0.5


def test_kinds_of_grammar_learn_alike(x64):
    dense = em_step(make_grammar("dense"), WORDS, LENGTHS)[0]
    for method in ("sparse", "scaled"):  # where the rule list is made a tensor, counts come back to the list
        listed = em_step(make_grammar("sparse"), WORDS, LENGTHS, method=method)[0]
        for ours, theirs in zip(jax.tree.leaves(to_dense(listed)), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(np.exp(ours), np.exp(theirs), atol=1e-12)


def test_components_learn_alike_whatever_the_route(x64):
    grammar = make_grammar("low rank")  # most of the rules that its components make are absent
    ours, theirs = (em_step(grammar, WORDS, LENGTHS, method=method)[0] for method in ("low_rank", "scaled"))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.exp(one), np.exp(other), atol=1e-12)


def test_counts_are_those_of_inside_outside(x64):
    grammar = make_grammar("dense")
    uses, log_z = expected_counts(grammar, WORDS, LENGTHS)
    found = inside_outside(grammar, WORDS, LENGTHS, counts=True)
    np.testing.assert_allclose(log_z, found.log_z)
    for name, count in uses.items():
        np.testing.assert_allclose(count, getattr(found.counts, name), atol=1e-12)


def test_counts_of_batches_add_up_to_one_step(x64):
    grammar = make_grammar("dense")
    thrice = [jnp.full(3, i) for i in range(3)]
    parts = [expected_counts(grammar, WORDS[i], LENGTHS[i]).uses for i in thrice]
    total = jax.tree.map(lambda *counts: sum(counts) / 3, *parts)
    expected = em_step(grammar, WORDS, LENGTHS)[0]
    for ours, theirs in zip(jax.tree.leaves(reestimate(grammar, total)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.exp(ours), np.exp(theirs), atol=1e-12)


def test_unused_symbols_and_unparsable_sentences_change_nothing(x64):
    grammar = make_grammar("dense")
    grammar = grammar._replace(
        log_root=jnp.asarray(log([[1.0, 0, 0, 0, 0]])[0]),
        log_rule=grammar.log_rule.at[:, 2].set(-jnp.inf).at[:, :, 2].set(-jnp.inf),
        log_unary=grammar.log_unary.at[:, 2].set(-jnp.inf),
        log_emit=grammar.log_emit.at[:, 2].set(-jnp.inf),
    )
    words = WORDS.at[1].set(0).at[2].set(0)
    new: Any
    alone: Any
    new, log_z = em_step(grammar, words, LENGTHS)
    assert (log_z > -jnp.inf).tolist() == [False, True, True]
    np.testing.assert_array_equal(new.log_rule[2], grammar.log_rule[2])  # no tree has the third symbol
    alone, _ = em_step(grammar, jnp.zeros((3, 5), int), jnp.array([0, 3, 4]))
    np.testing.assert_allclose(np.exp(new.log_rule), np.exp(alone.log_rule), atol=1e-12)
    assert not any(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(new))


def test_smoothing_keeps_what_exists_and_invents_nothing(x64):
    grammar = make_grammar("dense")
    smoothed = em_step(grammar, WORDS, LENGTHS, smoothing=0.1)[0]
    for old, new in zip(jax.tree.leaves(grammar), jax.tree.leaves(smoothed), strict=True):
        np.testing.assert_array_equal(new > -np.inf, old > -np.inf)
    uniform = em_step(grammar, WORDS, LENGTHS, smoothing=1e9)[0]
    np.testing.assert_allclose(np.exp(uniform.log_emit), np.full((2, 3), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_free_scores_become_distributions_whatever_their_level(x64, kind):
    grammar = make_grammar(kind)
    fields = {name: x + 3.0 for name, x in grammar._asdict().items() if name.startswith("log_") and x is not None}
    normalised = normalize_scores(grammar._replace(**fields))
    for name in fields:
        np.testing.assert_allclose(getattr(normalised, name), getattr(grammar, name), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_free_scores_is_counts_less_their_expectation(x64, kind):
    # d log Z / d score = count - (count of its row) * probability
    grammar, method = make_grammar(kind), KINDS[kind]
    uses, _ = expected_counts(grammar, WORDS, LENGTHS, method=method)

    def total(emit, root):
        changed = normalize_scores(grammar._replace(log_emit=emit, log_root=root))
        return log_partition(changed, WORDS, LENGTHS, method=method).sum()

    by_emit, by_root = jax.grad(total, argnums=(0, 1))(grammar.log_emit, grammar.log_root)
    emit, root = uses["log_emit"], uses["log_root"]
    np.testing.assert_allclose(by_emit, emit - emit.sum(axis=1, keepdims=True) * jnp.exp(grammar.log_emit), atol=1e-12)
    np.testing.assert_allclose(by_root, root - root.sum() * jnp.exp(grammar.log_root), atol=1e-12)


def test_loss_is_nats_a_word_of_the_sentences_with_a_parse(x64):
    grammar = make_grammar("dense")
    log_z = log_partition(grammar, WORDS, LENGTHS)
    loss, parsable = log_likelihood_loss(grammar, WORDS, LENGTHS)
    assert parsable.all()
    assert float(loss) == pytest.approx(-float(log_z.sum()) / 12)
    unknown = grammar._replace(log_emit=grammar.log_emit.at[:, 0].set(-jnp.inf))
    loss, parsable = log_likelihood_loss(unknown, WORDS, LENGTHS)
    assert parsable.tolist() == [False, False, True]
    assert float(loss) == pytest.approx(-float(log_partition(unknown, WORDS, LENGTHS)[2]) / 4)
    gradient = jax.grad(lambda g: log_likelihood_loss(normalize_scores(g), WORDS, LENGTHS)[0])(unknown)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gradient_descent_on_free_scores_lowers_the_loss(x64):
    scores = make_grammar("dense")
    step = jax.jit(jax.value_and_grad(lambda g: log_likelihood_loss(normalize_scores(g), WORDS, LENGTHS)[0]))
    losses = []
    for _ in range(8):
        loss, gradient = step(scores)
        scores = jax.tree.map(lambda x, d: x - 2 * d, scores, gradient)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
