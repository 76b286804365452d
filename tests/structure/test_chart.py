from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.chart import Recursion, by_ends, default_chunks, padding, span_chart


def combine_weighted(context, left, right, width):
    """Sums products over splits, by a weight of the width and one of the position of the last word."""
    by_width, by_position = context
    starts = left[0].shape[1]
    last = jax.lax.dynamic_slice_in_dim(by_position, width - 1, starts, 1)
    return ((left[0] * right[0]).sum(axis=2) * by_width[width] * last,)


def combine_two(context, left, right, width):
    """Two leaves: a length, and a sum in which the parts of a split stand in different roles."""
    del width
    values = jnp.where(left[1] * right[1] > 0, context * left[0] - right[0], 0).sum(axis=2)
    return values, (left[1] * right[1]).max(axis=2)


WEIGHTED = Recursion(combine_weighted, zero=(0.0,))
TWO = Recursion(combine_two, zero=(0.0, 0.0))


def arrays(t, chunks=None):
    draw = np.random.default_rng(0)
    by_width, by_position = draw.uniform(0.5, 1, t + 1), draw.uniform(0.5, 1, (2, t))
    spare = padding(t, default_chunks(t) if chunks is None else chunks)
    context = jnp.asarray(by_width), jnp.asarray(np.pad(by_position, ((0, 0), (0, spare))))
    return context, (jnp.asarray(draw.uniform(0.5, 1, (2, t))),)


def looped(context, leaves):
    """Values [b, t, t + 1] of the weighted recursion, span by span."""
    (words,), (by_width, by_position) = leaves, context
    t = words.shape[1]
    spans = {(i, 1): words[:, i] for i in range(t)}
    for width in range(2, t + 1):
        for i in range(t - width + 1):
            inner = sum(spans[i, k] * spans[i + k, width - k] for k in range(1, width))
            spans[i, width] = inner * by_width[width] * by_position[:, i + width - 1]
    none = jnp.zeros_like(words[:, 0])
    rows = [jnp.stack([spans.get((i, width), none) for width in range(t + 1)], axis=1) for i in range(t)]
    return jnp.stack(rows, axis=1)


@pytest.mark.parametrize("t", [1, 2, 3, 6])
def test_chart_equals_a_loop_over_spans(x64, t):
    context, leaves = arrays(t)
    (values,) = span_chart(WEIGHTED, context, leaves)
    np.testing.assert_allclose(values, looped(context, leaves), rtol=1e-12)


def test_values_of_several_leaves_and_unlike_roles_of_the_parts(x64):
    words = np.array([[1.0, 2.0, 4.0, 7.0]])
    sums, there = span_chart(TWO, jnp.array(3.0), (jnp.asarray(words), jnp.ones((1, 4))), chunks=2)
    expected = {(i, 1): words[0, i] for i in range(4)}
    for width in (2, 3, 4):
        for i in range(5 - width):
            expected[i, width] = sum(3 * expected[i, k] - expected[i + k, width - k] for k in range(1, width))
    for i in range(4):
        for width in range(5):
            assert float(sums[0, i, width]) == pytest.approx(expected.get((i, width), 0.0))
            assert float(there[0, i, width]) == float((i, width) in expected)


@pytest.mark.parametrize("chunks", [2, 3, 5, 9])
def test_any_number_of_chunks_gives_one_result(x64, chunks):
    (one,) = span_chart(WEIGHTED, *arrays(6, 1), chunks=1)
    (many,) = span_chart(WEIGHTED, *arrays(6, chunks), chunks=chunks)
    np.testing.assert_allclose(many, one, rtol=1e-12)


def test_tokens_may_stand_on_the_last_axis(x64):
    last = Recursion(lambda c, x, y, w: ((x[0] * y[0]).sum(axis=3) * c,), zero=(0.0,), axis=-1)
    first = Recursion(lambda c, x, y, w: ((x[0] * y[0]).sum(axis=2) * c,), zero=(0.0,))
    words = np.random.default_rng(1).uniform(size=(2, 5))
    three = jnp.asarray(np.stack([words] * 3))
    (values,) = span_chart(last, jnp.array(2.0), (three,))
    (expected,) = span_chart(first, jnp.array(2.0), (jnp.asarray(words),))
    np.testing.assert_allclose(values, np.stack([expected] * 3))


def weighted_sum(chart, context, leaves):
    """A function of every value, with second derivatives."""
    values = chart(context, leaves)
    return (values**2 * jnp.arange(1.0, values.size + 1).reshape(values.shape)).sum()


def of_chart(context, leaves, chunks):
    return span_chart(WEIGHTED, context, leaves, chunks=chunks)[0]


@pytest.mark.parametrize("chunks", [1, 2])
def test_outside_pass_is_the_derivative_of_the_loop(x64, chunks):
    context, leaves = arrays(4, chunks)
    ours, theirs = (
        jax.jit(jax.grad(partial(weighted_sum, chart), argnums=(0, 1)))(context, leaves)
        for chart in (partial(of_chart, chunks=chunks), looped)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), ours, theirs)


def test_second_derivatives_are_those_of_the_loop(x64):
    context, leaves = arrays(3, 1)
    chart = partial(of_chart, chunks=1)
    by_rows = jax.jit(jax.jacrev(jax.grad(lambda x: weighted_sum(chart, context, x))))(leaves)
    forward = jax.jit(jax.hessian(lambda x: weighted_sum(chart, context, x)))(leaves)
    expected = jax.jit(jax.hessian(lambda x: weighted_sum(looped, context, x)))(leaves)
    np.testing.assert_allclose(by_rows[0][0], expected[0][0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(forward[0][0], expected[0][0], rtol=1e-10, atol=1e-12)


def test_indices_in_a_context_have_no_derivative(x64):
    def combine(context, left, right, width):
        weights, pick = context
        return ((left[0] * right[0]).sum(axis=2) * weights[pick],)

    recursion = Recursion(combine, zero=(0.0,))
    words = jnp.asarray(np.random.default_rng(2).uniform(size=(1, 3)))

    def top(weights):
        return span_chart(recursion, (weights, jnp.array(1)), (words,))[0][0, 0, 3]

    gradient = jax.grad(top)(jnp.array([5.0, 3.0]))
    assert gradient[0] == 0
    assert float(gradient[1]) == pytest.approx(2 * float(top(jnp.array([5.0, 3.0]))) / 3)  # two rules: of degree 2


def test_reading_by_ends_moves_every_span_and_nothing_else():
    values = np.arange(12.0).reshape(1, 3, 4)  # [b, start, width]
    found = by_ends(jnp.asarray(values))
    expected = [[values[0, i, j - i] if j > i else 0 for j in range(4)] for i in range(3)]
    assert found[0].tolist() == expected
