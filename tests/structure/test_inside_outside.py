import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.enumeration import Enumeration, brute_force, enumerated_masked_posterior
from jaxft.structure.inside_outside import (
    inside,
    inside_outside,
    log_partition,
    outside,
    span_marginals,
    term_scores,
)
from jaxft.structure.pcfg import PCFG, LowRankPCFG, SparsePCFG, random_pcfg, to_dense, to_sparse
from jaxft.structure.routes import explain

S, Q, V, T = 3, 4, 6, 7
WORDS = np.array([[0, 3, 1, 2, 4, 0, 5], [2, 0, 1, 5, 5, 5, 5], [4, 2, 2, 2, 2, 2, 2]])
LENGTHS = np.array([6, 3, 1])
"""Behind the end stands what must not matter."""
ROUTES = ("scaled", "log", "sparse")


@functools.cache
def tables() -> dict[str, np.ndarray]:
    """Probabilities of a grammar with unary rules (of no cycle) in which most rules are absent."""
    draw = np.random.default_rng(8)
    a = S + Q
    rule = draw.gamma(1.0, size=(S, a * a))
    for row in rule:
        row[draw.permutation(a * a)[:42]] = 0
    unary = np.zeros((S, a))
    unary[0, 1], unary[0, S], unary[1, 2], unary[2, S + 1] = 0.1, 0.1, 0.2, 0.1
    rule *= ((1 - unary.sum(axis=1)) / rule.sum(axis=1))[:, None]
    emit = draw.dirichlet(np.ones(V), Q) * (draw.random((Q, V)) < 0.4)
    emit[np.arange(Q), np.arange(Q)] += 0.1
    emit[:, 5] = 0  # the last word is of no preterminal
    root = np.array([0.5, 0.3, 0, 0.1, 0, 0, 0.1])
    rows = {"log_root": root, "log_rule": rule.reshape(S, a, a), "log_unary": unary}
    return rows | {"log_emit": emit / emit.sum(axis=1, keepdims=True)}


def make_grammar(kind: str = "scaled", *, unary: bool = True, **changed: np.ndarray) -> Any:
    """The grammar in the kind that a route takes, in the precision in force; arrays may be replaced."""
    found = tables() | changed
    if not unary:  # of the same shapes, so that nothing is compiled again
        rule = found["log_rule"]
        found["log_unary"], found["log_rule"] = np.zeros((S, S + Q)), rule / rule.sum(axis=(1, 2), keepdims=True)
    with np.errstate(divide="ignore"):
        arrays: dict[str, Any] = {name: jnp.asarray(np.log(table)) for name, table in found.items()}
    grammar = PCFG(**arrays)
    return to_sparse(grammar) if kind == "sparse" else grammar


@functools.cache
def enumerated() -> list[Enumeration]:
    """All derivations of the sentences, in double precision."""
    with jax.enable_x64(True):
        return [brute_force(make_grammar(), row[:n]) for row, n in zip(WORDS, LENGTHS, strict=True)]


def solve(grammar, words=WORDS, lengths=LENGTHS, *, method: Any = "scaled", mask=None) -> Any:
    """Always with counts and in one shape, so that few programs are compiled."""
    given = None if mask is None else jnp.asarray(mask)
    return inside_outside(
        grammar, jnp.asarray(words), jnp.asarray(lengths), method=method, mask=given, counts=True, chunks=2
    )


def assert_close(x, y, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def scattered(counts) -> np.ndarray:
    """Expected rule counts [s, a, a] of either kind of grammar."""
    if isinstance(counts, PCFG):
        return np.asarray(counts.log_rule)
    table = np.zeros((S, S + Q, S + Q))
    np.add.at(table, (np.asarray(counts.lhs), np.asarray(counts.left), np.asarray(counts.right)), counts.log_rule)
    return table


@pytest.mark.parametrize("method", ROUTES)
def test_everything_equals_enumeration(x64, method):
    found = solve(make_grammar(method), method=method)
    assert found.parsable.all()
    rules, unaries, words = np.zeros((S, S + Q, S + Q)), np.zeros((S, S + Q)), np.zeros((Q, V))
    for row, (expected, n) in enumerate(zip(enumerated(), LENGTHS, strict=True)):
        assert float(found.log_z[row]) == pytest.approx(expected.log_z, rel=1e-10)
        assert_close(found.span[row, :n, : n + 1], expected.spans())
        assert_close(found.tag[row, :n], expected.tags())
        assert_close(found.root[row], expected.roots())
        assert not found.span[row, n:].any()
        assert not found.span[row, :, n + 1 :].any()
        assert not found.tag[row, n:].any()
        binary, unary = expected.rules()
        rules, unaries = rules + binary, unaries + unary
        np.add.at(words.T, WORDS[row, :n], expected.tags())
    assert_close(scattered(found.counts), rules)
    assert_close(found.counts.log_unary, unaries)
    assert_close(found.counts.log_emit, words)
    assert_close(found.counts.log_root, sum(e.roots() for e in enumerated()))


@pytest.mark.parametrize("method", ROUTES)
def test_gradient_of_the_log_partition_is_the_expected_counts(x64, method):
    grammar = make_grammar(method)
    found = solve(grammar, method=method)
    scores = term_scores(grammar, jnp.asarray(WORDS), jnp.asarray(LENGTHS))

    def total(log_rule, log_unary, log_root, words):
        changed = grammar._replace(log_rule=log_rule, log_unary=log_unary, log_root=log_root)
        return log_partition(changed, words, jnp.asarray(LENGTHS), method=method, chunks=2).sum()

    gradient = jax.grad(total, argnums=(0, 1, 2, 3))(grammar.log_rule, grammar.log_unary, grammar.log_root, scores)
    assert_close(gradient[0], found.counts.log_rule)
    assert_close(gradient[1], found.counts.log_unary)
    assert_close(gradient[2], found.counts.log_root)
    assert_close(gradient[3], found.tag)


def test_masked_words_are_summed_out(x64):
    grammar, mask = make_grammar(), np.zeros((3, T), bool)
    mask[1, [0, 2, 5]] = True  # one behind the end
    found = solve(grammar, mask=mask)
    spans, mass, sentence = 0, 0.0, WORDS[1, :3].copy()
    for filling in itertools.product(range(V), repeat=2):
        sentence[[0, 2]] = filling
        one = brute_force(grammar, sentence)
        spans, mass = spans + np.exp(one.log_z) * one.spans(), mass + np.exp(one.log_z)
    assert float(found.log_z[1]) == pytest.approx(np.log(mass), rel=1e-10)
    assert_close(found.span[1, :3, :4], spans / mass)
    words = np.asarray(found.tag)[1, :3] @ np.exp(np.asarray(grammar.log_emit))
    assert_close(words[[0, 2]], enumerated_masked_posterior(grammar, WORDS[1, :3], mask[1, :3])[[0, 2]])


def low_rank(rank: int = 3) -> LowRankPCFG:
    draw, a = np.random.default_rng(5), S + Q

    def rows(n, m, zeros):
        table = draw.gamma(1.0, size=(n, m))
        for row in table:
            row[draw.permutation(m)[:zeros]] = 0
        return table / table.sum(axis=1, keepdims=True)

    factors = rows(S, rank, 0), rows(rank, a, 4), rows(rank, a, 4)
    with np.errstate(divide="ignore"):
        arrays = [jnp.asarray(np.log(x)) for x in (tables()["log_root"], *factors, tables()["log_emit"])]
    return LowRankPCFG(*arrays)  # pyright: ignore[reportArgumentType]


def test_a_preterminal_without_words_has_a_gradient_of_zero_under_a_mask():
    grammar, words = make_grammar(), jnp.asarray(WORDS)
    silent = grammar._replace(log_emit=grammar.log_emit.at[2].set(-jnp.inf))
    mask, lengths = jnp.zeros(words.shape, bool).at[:, 0].set(True), jnp.asarray(LENGTHS)
    parsable = log_partition(silent, words, lengths, mask=mask) > -jnp.inf
    assert parsable.any()
    gradient = jax.grad(lambda g: log_partition(g, words, lengths, mask=mask).sum())(silent)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert float(gradient.log_emit.sum()) == pytest.approx(float(LENGTHS[parsable].sum()), rel=1e-5)
    assert not gradient.log_emit[2].any()


def test_low_rank_route_equals_enumeration_and_the_dense_route(x64):
    grammar, lengths = low_rank(), np.array([6, 3, 1])
    found = solve(grammar, lengths=lengths, method="low_rank")
    dense = solve(to_dense(grammar)._replace(log_unary=make_grammar(unary=False).log_unary))
    for name in ("log_z", "span", "tag", "root"):
        assert_close(getattr(found, name), getattr(dense, name))
    expected = brute_force(grammar, WORDS[1, :3])
    assert float(found.log_z[1]) == pytest.approx(expected.log_z, rel=1e-10)
    assert_close(found.span[1, :3, :4], expected.spans())
    words = jnp.asarray(WORDS)
    factored, full = (outside(g, words, jnp.asarray(lengths)) for g in (grammar, to_dense(grammar)))
    # Without unary rules no nonterminal is one word.
    np.testing.assert_array_equal(np.isfinite(factored), np.isfinite(full))
    # Each binary rule uses a component, and that a left and a right child.
    for name in ("log_head", "log_left", "log_right"):
        assert float(getattr(found.counts, name).sum()) == pytest.approx(5 + 2)


@pytest.mark.parametrize("method", ROUTES)
def test_no_parse_is_minus_infinity_and_a_flag_with_gradients_of_zero(x64, method):
    grammar = make_grammar(method)
    words = WORDS.copy()
    words[0, 2] = 5
    lengths = np.array([6, 0, 1])
    found = solve(grammar, words, lengths, method=method)
    assert found.log_z[:2].tolist() == [-np.inf, -np.inf]
    assert found.parsable.tolist() == [False, False, True]
    leaves = jax.tree.leaves((found.span, found.tag, found.root, found.counts))
    assert all(np.isfinite(x).all() for x in leaves if x is not grammar.log_rule)
    assert not any(np.asarray(x[:2]).any() for x in (found.span, found.tag, found.root))
    assert float(found.counts.log_root.sum()) == pytest.approx(1)


@pytest.mark.parametrize("method", ["scaled", "log"])
def test_inside_times_outside_is_the_posterior(x64, method):
    grammar, words, lengths = make_grammar(), jnp.asarray(WORDS), jnp.asarray(LENGTHS)
    chart = inside(grammar, words, lengths, method=method)
    product = chart.log_alpha() + outside(grammar, words, lengths, method=method) - chart.log_z.reshape(3, 1, 1, 1)
    # A span behind the end of its sentence has no outside.
    assert_close(np.exp(product), solve(grammar).span)
    root = np.logaddexp.reduce(np.asarray(chart.log_alpha()[0, 0, 6] + grammar.log_root[:S]))
    assert float(chart.log_z[0]) == pytest.approx(root)


def test_a_binary_tree_has_one_rule_less_than_words(x64):
    found = solve(make_grammar(unary=False), lengths=np.array([6, 3, 2]))
    np.testing.assert_allclose(found.span.sum(axis=(1, 2, 3)), [5, 2, 1], atol=1e-10)
    np.testing.assert_allclose(found.tag.sum(axis=(1, 2)), [6, 3, 2], atol=1e-10)
    assert float(found.counts.log_rule.sum()) == pytest.approx(5 + 2 + 1)


def test_crossing_spans_exclude_each_other(x64):
    spans = np.asarray(solve(make_grammar(unary=False)).span[0].sum(axis=2))
    assert (spans <= 1 + 1e-12).all()
    for i, k, j, m in itertools.combinations(range(7), 4):
        assert spans[i, j] + spans[k, m] <= 1 + 1e-12


def test_tilting_words_shifts_the_log_partition_alone(x64):
    tilt = np.exp(np.random.default_rng(0).normal(size=V) * 3)
    plain, tilted = (solve(make_grammar(log_emit=tables()["log_emit"] * factor)) for factor in (np.ones(V), tilt))
    shift = [np.log(tilt)[row[:n]].sum() for row, n in zip(WORDS, LENGTHS, strict=True)]
    assert_close(tilted.log_z, plain.log_z + np.array(shift))
    assert_close(tilted.span, plain.span)
    assert_close(tilted.tag, plain.tag)


def test_renaming_symbols_renames_the_posteriors(x64):
    ours, terms = np.array([2, 0, 1]), np.array([1, 3, 0, 2])
    both = np.concatenate([ours, S + terms])
    found = tables()
    renamed = make_grammar(
        log_root=found["log_root"][both],
        log_rule=found["log_rule"][np.ix_(ours, both, both)],
        log_unary=found["log_unary"][np.ix_(ours, both)],
        log_emit=found["log_emit"][terms],
    )
    plain, other = solve(make_grammar()), solve(renamed)
    assert_close(other.log_z, plain.log_z)
    assert_close(other.span, np.asarray(plain.span)[..., ours])
    assert_close(other.tag, np.asarray(plain.tag)[..., terms])


def test_mirrored_sentences_under_the_mirrored_grammar_have_mirrored_posteriors(x64):
    mirrored = make_grammar(log_rule=tables()["log_rule"].transpose(0, 2, 1))
    words = WORDS.copy()
    words[0, :6] = words[0, 5::-1]
    plain, other = solve(make_grammar()), solve(mirrored, words)
    assert float(other.log_z[0]) == pytest.approx(float(plain.log_z[0]), rel=1e-12)
    for i, j in itertools.combinations(range(7), 2):
        assert_close(other.span[0, 6 - j, 7 - i - 1], plain.span[0, i, j])


@pytest.mark.parametrize("method", ROUTES)
def test_a_sentence_is_alone_in_its_batch(x64, method):
    grammar = make_grammar(method)
    together = solve(grammar, method=method)
    for row in range(3):
        alone = solve(grammar, WORDS[[row] * 3], LENGTHS[[row] * 3], method=method)
        np.testing.assert_array_equal(alone.log_z, np.full(3, together.log_z[row]))
        np.testing.assert_array_equal(alone.span[1], together.span[row])


def test_a_rule_listed_twice_is_one_rule_with_both_masses(x64):
    grammar = make_grammar("sparse")
    twice = grammar._replace(
        **{name: jnp.concatenate([getattr(grammar, name)] * 2) for name in ("lhs", "left", "right")},
        log_rule=jnp.concatenate([grammar.log_rule + np.log(0.25), grammar.log_rule + np.log(0.75)]),
    )
    words, lengths = jnp.asarray(WORDS), jnp.asarray(LENGTHS)
    assert_close(log_partition(twice, words, lengths, method="sparse"), solve(grammar, method="sparse").log_z)
    assert_close(to_dense(twice).log_rule, to_dense(grammar).log_rule)


def test_jit_changes_nothing(x64):
    grammar, words, lengths = make_grammar(), jnp.asarray(WORDS), jnp.asarray(LENGTHS)
    plain = span_marginals(grammar, words, lengths)
    traced = jax.jit(span_marginals)(grammar, words, lengths)
    assert_close(traced, plain, 1e-13)


def test_single_precision_agrees_with_double():
    single = solve(make_grammar())
    assert single.span.dtype == jnp.float32
    with jax.enable_x64(True):
        double = solve(make_grammar())
    for name in ("log_z", "span", "tag", "root"):
        np.testing.assert_allclose(getattr(single, name), getattr(double, name), rtol=1e-5, atol=1e-6)
    assert_close(single.counts.log_rule, double.counts.log_rule, 1e-5)


def test_log_route_bears_a_range_at_which_scaled_probabilities_underflow():
    # S -> A A; over two words A is 1e-30 as likely as B, which no root has.
    rule = np.zeros((S, S + Q, S + Q))
    rule[0, 1, 1], rule[1, S, S], rule[2, S, S] = 1, 1e-30, 1
    grammar = make_grammar(log_rule=rule, log_unary=np.zeros((S, S + Q)), log_root=np.eye(S + Q)[0])
    words, lengths = np.zeros((3, T), int), np.array([4, 4, 4])
    scaled, log = (solve(grammar, words, lengths, method=method) for method in ("scaled", "log"))
    assert scaled.log_z[0] == -jnp.inf
    expected = 2 * np.log(1e-30) + 4 * np.log(tables()["log_emit"][0, 0])
    assert float(log.log_z[0]) == pytest.approx(expected, rel=1e-6)
    assert log.span[0, 0, 2].tolist() == [0, 1, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((scaled.span, scaled.counts)))


def test_explain_says_which_route_and_why():
    grammar = random_pcfg(jax.random.key(0), S, Q, V)
    assert str(explain(grammar, batch=3, tokens=T)).startswith("scaled: the grammar is dense;")
    assert explain(low_rank(), batch=3, tokens=T).method == "low_rank"
    lhs, child = jnp.arange(700), jnp.zeros(700, int)
    listed = SparsePCFG(jnp.zeros(1400), lhs, child, child, jnp.zeros(700), jnp.zeros((700, 9)))
    plan = explain(listed, batch=3, tokens=T)
    assert (plan.method, plan.reason) == ("sparse", "its rules as a tensor would take 5.1 GiB")
    few = listed._replace(log_root=jnp.zeros(800), log_emit=jnp.zeros((100, 9)))
    assert "rule by rule takes" in explain(few, batch=3, tokens=T).reason
    assert "rule by rule would take" in explain(to_sparse(grammar), batch=3, tokens=T).reason
    assert explain(grammar, batch=3, tokens=T, method="log").reason == "asked for"


def test_operations_grow_as_the_stated_powers():
    grammar = random_pcfg(jax.random.key(0), S, Q, V)
    short, long = (explain(grammar, batch=1, tokens=t).flops for t in (1000, 2000))
    assert long / short == pytest.approx(8, rel=0.02)
    assert explain(grammar, batch=5, tokens=9).flops == 5 * explain(grammar, batch=1, tokens=9).flops
