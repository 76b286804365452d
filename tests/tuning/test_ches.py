"""Scores against their definitions, and the exact ones against gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.decoder import unembedding_table
from jaxft.nn.decoder_outputs import make_response_log_probs, make_response_states
from jaxft.tuning.ches import ches_score, ches_scores, ches_terms
from jaxft.tuning.unembedding import unembedding_decomposition, unembedding_gram

V, D, K = 7, 4, 5
LAYOUTS = list(itertools.product(("packed", "padded"), ("right", "left")))


def by_definition(up, down, *, normalize=False):
    """From the states of each response alone, without padding."""
    s, z = np.sum(up, axis=0), np.sum(down, axis=0)
    if normalize:
        s, z = s / len(up), z / len(down)
    return s @ z - s @ s


@pytest.fixture
def sides(x64):
    draw = np.random.default_rng(0).normal
    return draw(size=(3, 6, D)), [4, 1, 6], draw(size=(3, 5, D)), [2, 5, 3]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_score_equals_its_definition_whatever_stands_at_padding(sides, normalize, side):
    up, up_lengths, down, down_lengths = sides
    expected = [
        by_definition(u[:a], w[:b], normalize=normalize)
        for u, a, w, b in zip(up, up_lengths, down, down_lengths, strict=True)
    ]

    def padded(states, lengths):
        k = states.shape[1]
        places = [[i < n for i in range(k)] for n in lengths]
        states, mask = np.array(states), np.array(places)
        states[~mask] = np.nan
        if side == "left":
            states, mask = (
                np.stack([np.roll(x, k - n, axis=0) for x, n in zip(a, lengths, strict=True)]) for a in (states, mask)
            )
        return states, mask.astype(np.int32)

    ours = ches_score(*padded(up, up_lengths), *padded(down, down_lengths), length_normalize=normalize)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 2e-3), (jnp.bfloat16, 2e-2)])
def test_eight_thousand_tokens_in_half_precision_do_not_overflow(dtype, tolerance):
    states = np.random.default_rng(1).normal(8.0, 1.0, size=(2, 8192, 16)).astype(np.float32)
    states[1] *= 1.5
    up, down = jnp.asarray(states, dtype)
    mask = jnp.ones(8192, jnp.int32)
    assert not np.isfinite(float((up.sum(axis=0) * down.sum(axis=0)).sum())) or dtype == jnp.bfloat16
    for normalize in (False, True):
        expected = by_definition(*np.asarray([up, down], np.float64), normalize=normalize)
        ours = ches_score(up, mask, down, mask, length_normalize=normalize)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(float(ours), expected, rtol=tolerance * 1e-2)


def test_identical_responses_score_exactly_zero(sides):
    up = sides[0].astype(np.float32)
    mask = np.ones(up.shape[:2], np.int32)
    assert (np.asarray(ches_score(up, mask, up, mask)) == 0).all()


def test_every_layout_gives_the_scores_of_the_sequences(tuned64, layouts):
    config, params, _ = tuned64
    f = make_response_states(config)
    found = []
    for layout, side in LAYOUTS:
        batch = layouts(layout, side, responses=2)
        found.append(ches_scores(f, params, batch, batch_size=2))
    states, lengths = np.asarray(f(params, batch)), np.asarray(batch.mask.sum(axis=-1))
    expected = [by_definition(s[0, :a], s[1, :b]) for s, (a, b) in zip(states, lengths, strict=True)]
    np.testing.assert_allclose(found, np.tile(expected, (len(LAYOUTS), 1)), rtol=1e-11)


@pytest.mark.parametrize(("chunk", "normalize"), [(None, False), (4, True)])
def test_exact_scores_are_inner_products_of_gradients_in_the_unembedding(tuned64, layouts, normalize, chunk):
    config, params, _ = tuned64
    batch = layouts(responses=2)
    table = unembedding_table(config, params)

    def log_probs(table):
        out = make_response_log_probs(config)({**params, "unembedding": {"table": table}}, batch)
        return out / batch.mask.sum(axis=-1) if normalize else out

    grads = jax.jacobian(log_probs)(table)
    gram = jnp.einsum("nrvd,nsvd->nrs", grads, grads)
    options = {"coefficients": "exact", "table": table, "chunk": chunk, "length_normalize": normalize}
    ours = ches_scores(make_response_states(config), params, batch, batch_size=2, **options)
    np.testing.assert_allclose(ours, gram[:, 0, 1] - gram[:, 0, 0], rtol=1e-10)


@pytest.mark.parametrize(("k", "chunk"), [(K, None), (K, 3), (1, None), (1, 3)])
def test_exact_gram_sums_coefficients_times_products_of_states(x64, k, chunk):
    """Of more tokens than the states are wide, and of fewer."""
    draw = np.random.default_rng(2)
    states, table = jnp.asarray(draw.normal(size=(2, 3, k, D))), jnp.asarray(draw.normal(size=(V, D)))
    targets, mask = jnp.asarray(draw.integers(V, size=(2, 3, k))), jnp.asarray(draw.integers(2, size=(2, 3, k)))
    errors = (jax.nn.one_hot(targets, V) - jax.nn.softmax(states @ table.T, axis=-1)) * mask[..., None]
    coefficients = jnp.einsum("nrkv,nsjv->nrksj", errors, errors)
    products = jnp.einsum("nrkd,nsjd->nrksj", states, states)
    ours = jax.jit(unembedding_gram, static_argnames="chunk")(states, targets, mask, table, chunk=chunk)
    np.testing.assert_allclose(ours, (coefficients * products).sum(axis=(2, 4)), rtol=1e-10, atol=1e-14)


def test_exact_scores_in_float32_agree_with_float64(tuned64, layouts):
    config, params, _ = tuned64
    batch = layouts(responses=2)
    scores = []
    for dtype in (jnp.float64, jnp.float32):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        table = unembedding_table(config, cast)
        scores.append(
            ches_scores(make_response_states(config), cast, batch, coefficients="exact", table=table, chunk=4)
        )
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-5)


def free_features(up, down, seed):
    """Responses, the number of the prefix that each of their tokens follows, a state a prefix, and a table."""
    prefixes = {(): 0}
    numbers = [[prefixes.setdefault(tuple(y[:k]), len(prefixes)) for k in range(len(y))] for y in (up, down)]
    draw = np.random.default_rng(seed).normal
    return numbers, jnp.asarray(draw(size=(len(prefixes), D))), jnp.asarray(draw(size=(V, D)))


PAIRS = {
    "first tokens differ": ([1, 2, 3], [4, 2]),
    "single tokens": ([1], [2]),
    "a shared beginning": ([1, 2, 3, 5], [1, 2, 6, 3, 0]),
    "rejected is a beginning of chosen": ([1, 2, 3], [1]),
    "chosen is a beginning of rejected": ([1, 2], [1, 2, 3, 3]),
}


@pytest.mark.parametrize(("pair", "chunk"), [(pair, 3 if i % 2 else None) for i, pair in enumerate(PAIRS)])
def test_terms_sum_to_the_rate_of_gradient_flow_on_free_features(x64, pair, chunk):
    up, down = PAIRS[pair]
    numbers, h, table = free_features(up, down, seed=len(pair))

    def log_probs(free):
        out = [jax.nn.log_softmax(free["h"][np.array(of)] @ free["W"].T) for of in numbers]
        return jnp.stack([o[np.arange(len(y)), np.array(y)].sum() for o, y in zip(out, (up, down), strict=True)])

    free = {"h": h, "W": table}
    flow = jax.grad(lambda p: log_probs(p)[0] - log_probs(p)[1])(free)  # of a loss with slope -1 in its margin
    rate = jax.jvp(log_probs, (free,), (flow,))[1][0]
    states, targets, mask = np.full((2, K, D), 7.0), np.zeros((2, K), int), np.zeros((2, K), int)
    for r, (of, y) in enumerate(zip(numbers, (up, down), strict=True)):
        states[r, : len(y)], targets[r, : len(y)], mask[r, : len(y)] = h[np.array(of)], y, 1
    terms = ches_terms(jnp.asarray(states), targets, mask, table, chunk=chunk)
    np.testing.assert_allclose(float(terms.rate), float(rate), rtol=1e-10)
    shared = [a == b for a, b in zip(up, down, strict=False)]
    assert int(terms.fork) == (shared.index(False) if False in shared else len(shared))


def test_terms_are_those_of_the_theorem_where_first_tokens_differ(x64):
    up, down = PAIRS["first tokens differ"]
    numbers, h, table = free_features(up, down, seed=3)
    states, mask = np.zeros((1, 2, 3, D)), np.array([[[1, 1, 1], [1, 1, 0]]])
    states[0, 0], states[0, 1, :2] = h[np.array(numbers[0])], h[np.array(numbers[1])]
    targets = np.array([[up, [*down, 0]]])
    terms = ches_terms(jnp.asarray(states), targets, mask, table)
    p = np.asarray(jax.nn.softmax(states[0, 0] @ table.T, axis=-1))
    w = np.asarray(table)
    norms = (1 - p[0, 1]) * w[1] @ w[1] + p[0, 4] * w[4] @ w[4]
    norms += sum(np.sum((w[up[k]] - p[k] @ w) ** 2) for k in (1, 2))
    others = [z for z in range(V) if z not in (1, 4)]
    words = -(1 - p[0, 1] + p[0, 4]) * w[1] @ w[4] - sum(p[0, z] * w[z] @ (w[1] - w[4]) for z in others)
    np.testing.assert_allclose([terms.norms[0], terms.words[0]], [norms, words], rtol=1e-11)


def test_decomposition_is_orthogonal_and_whole(x64):
    table = np.random.default_rng(4).normal(size=(V, D))
    chosen, rejected = np.array([0, 3, 5]), np.array([1, 2, 6])
    found = unembedding_decomposition(table, chosen, rejected)
    difference = table[chosen] - table[rejected]
    unit = table[chosen] / np.linalg.norm(table[chosen], axis=1, keepdims=True)
    along = np.einsum("nd,nd->n", difference, unit)
    np.testing.assert_allclose(found.parallel, np.abs(along), rtol=1e-12)
    np.testing.assert_allclose(found.orthogonal, np.linalg.norm(difference - along[:, None] * unit, axis=1), rtol=1e-12)
