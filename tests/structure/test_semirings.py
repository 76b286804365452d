import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.bracketings import bracketing_chart
from jaxft.structure.rule_trees import rule_trees
from jaxft.structure.semirings import (
    COUNTING,
    EXPECTATION,
    FLOOR,
    LOG,
    MAX,
    Element,
    Semiring,
    as_element,
    k_best_semiring,
    log_weight,
    zeros,
)

CATALAN = (1, 1, 2, 5, 14, 42)
SEMIRINGS = {s.name: s for s in (LOG, MAX, COUNTING, EXPECTATION, k_best_semiring(3))}
CLOSED = {name: s for name, s in SEMIRINGS.items() if s.star is not None}


def random_elements(semiring: Semiring, *shape: int, seed: int = 0) -> Element:
    draw = np.random.default_rng(seed)
    if semiring.name == "counting":
        return (jnp.asarray(draw.integers(0, 4, shape).astype(float)),)
    if semiring.k is not None:
        return (jnp.asarray(np.sort(draw.normal(size=(*shape, semiring.k)), axis=-1)[..., ::-1].copy()),)
    return tuple(jnp.asarray(draw.normal(size=shape)) for _ in semiring.zero)


def ones(semiring: Semiring, *shape: int) -> Element:
    if semiring.k is not None:
        return as_element(semiring, jnp.zeros(shape))
    return tuple(jnp.full(shape, one) for one in semiring.one)


def plus(semiring: Semiring, *parts: Element) -> Element:
    return semiring.total(tuple(jnp.stack(x, axis=1) for x in zip(*parts, strict=True)), 1)


def assert_same(x: Element, y: Element, rtol: float = 1e-10) -> None:
    for one, other in zip(x, y, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("semiring", SEMIRINGS.values(), ids=SEMIRINGS)
def test_axioms_hold_on_random_elements(x64, semiring):
    x, y, z = (random_elements(semiring, 8, seed=i) for i in range(3))
    times = semiring.times
    assert_same(plus(semiring, x, y), plus(semiring, y, x))
    assert_same(plus(semiring, plus(semiring, x, y), z), plus(semiring, x, y, z))
    assert_same(times(times(x, y), z), times(x, times(y, z)))
    assert_same(times(x, plus(semiring, y, z)), plus(semiring, times(x, y), times(x, z)))
    assert_same(times(plus(semiring, y, z), x), plus(semiring, times(y, x), times(z, x)))
    assert_same(times(x, ones(semiring, 8)), x)
    assert_same(plus(semiring, x, zeros(semiring, (8,), jnp.dtype(float))), x)


@pytest.mark.parametrize("semiring", SEMIRINGS.values(), ids=SEMIRINGS)
def test_an_impossible_part_makes_an_impossible_tree(x64, semiring):
    x, none = random_elements(semiring, 8), zeros(semiring, (8,), jnp.dtype(float))
    for product in (semiring.times(x, none), semiring.times(none, semiring.times(none, none))):
        if semiring.name == "counting":
            assert not product[0].any()
        else:
            assert (log_weight(semiring, product) == -jnp.inf).all()
            assert (product[0] >= 2 * FLOOR).all()


@pytest.mark.parametrize("semiring", CLOSED.values(), ids=CLOSED)
def test_star_is_the_sum_of_all_powers(x64, semiring):
    draw = np.random.default_rng(0)
    step = draw.uniform(0, 0.3, (3, 3))
    step[0, 2] = 0  # what is impossible in one step may be possible in two
    value = jnp.asarray(draw.normal(size=(3, 3))) if semiring is EXPECTATION else None
    steps = as_element(semiring, jnp.log(jnp.asarray(step)), value)

    def product(x: Element, y: Element) -> Element:
        wide = semiring.times(tuple(a[:, :, None] for a in x), tuple(b[None] for b in y))
        return semiring.total(wide, 1)

    unit = as_element(semiring, jnp.log(jnp.eye(3)), None if value is None else jnp.zeros((3, 3)))
    total = unit
    for _ in range(60):  # I + U (I + U (...))
        total = tuple(jnp.stack([a, b]) for a, b in zip(unit, product(steps, total), strict=True))
        total = semiring.total(total, 0)
    assert semiring.star is not None
    assert_same(semiring.star(steps), total)


@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_log_count_of_bracketings_is_log_catalan(length):
    scores = jnp.zeros((1, 6, 7))
    (count,) = bracketing_chart(scores, semiring=COUNTING)
    (log_count,) = bracketing_chart(scores)
    assert float(count[0, 0, length]) == CATALAN[length - 1]
    assert float(log_count[0, 0, length]) == pytest.approx(np.log(CATALAN[length - 1]), abs=1e-5)


def test_trees_of_one_symbol_are_counted_by_catalan_numbers():
    rule, words = (jnp.ones((1, 2, 2)),), (jnp.ones((1, 6, 1)),)  # S -> S S | S X | X S | X X
    (count,) = rule_trees(COUNTING, rule, words, chunks=2)
    assert count[0, 0, 2:, 0].tolist() == list(CATALAN[1:])


def test_trees_of_several_symbols_multiply_the_labels():
    rule, words = (jnp.ones((2, 5, 5)),), (jnp.ones((1, 4, 3)),)
    (count,) = rule_trees(COUNTING, rule, words, chunks=1)
    # Below a node given: 5 bracketings, 2 labels of each of 2 inner nodes, 3 of each of 4 leaves.
    assert count[0, 0, 4].tolist() == [5 * 2**2 * 3**4] * 2


def test_mean_number_of_long_spans_over_bracketings():
    # Three words: of two bracketings each has one inner span of two words.
    value = jnp.zeros((1, 3, 4)).at[0, [0, 1], [2, 3]].set(jnp.array([1.0, 10.0]))
    log_z, mean = bracketing_chart(jnp.zeros((1, 3, 4)), semiring=EXPECTATION, values=value)
    assert float(mean[0, 0, 3]) == pytest.approx((1 + 10) / 2)
    assert float(log_z[0, 0, 3]) == pytest.approx(np.log(2))


def test_k_best_bracketings_are_the_largest_of_all(x64):
    scores = np.random.default_rng(0).normal(size=(1, 3, 4))
    (best,) = bracketing_chart(jnp.asarray(scores), semiring=k_best_semiring(3))
    words = scores[0, [0, 1, 2], [1, 2, 3]].sum() + scores[0, 0, 3]
    expected = sorted([words + scores[0, 0, 2], words + scores[0, 1, 3]], reverse=True)
    np.testing.assert_allclose(best[0, 0, 3, :2], expected)
    assert best[0, 0, 3, 2] == FLOOR
