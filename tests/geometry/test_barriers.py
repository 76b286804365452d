"""Barriers against loops over their definitions, and matrices of them against one line at a time."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import ConvexHull

from jaxft.geometry.barriers import Baseline, cluster_barriers, convexity_gap, loss_barrier, pairwise_barriers
from jaxft.geometry.path_loss import eval_path
from jaxft.geometry.paths import linear_path, stack_points

T = np.sort(np.concatenate([[0.0, 1.0], np.random.default_rng(0).random(7)]))
LOSSES = np.random.default_rng(1).normal(size=(4, 9))
X = jax.random.normal(jax.random.key(5), (2, 6, 3))


def loss_fn(params, x):
    h = jnp.tanh(x @ params["w"])
    return {"loss": ((h @ params["v"]) ** 2).mean(), "error": (h[:, 0] > 0).mean()}


def model(seed):
    k, j = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(k, (3, 4)), "v": jax.random.normal(j, (4,))}


MODELS = [model(seed) for seed in range(3)]


def chord_barrier(losses, t):
    return max(
        y - ((t[-1] - u) * losses[0] + (u - t[0]) * losses[-1]) / (t[-1] - t[0]) for y, u in zip(losses, t, strict=True)
    )


@pytest.mark.parametrize("t", [None, T], ids=["even", "uneven"])
def test_barriers_are_rises_over_their_baselines(x64, t):
    at = np.linspace(0, 1, 9) if t is None else t
    expected = {
        "chord": [chord_barrier(row, at) for row in LOSSES],
        "mean": [row.max() - (row[0] + row[-1]) / 2 for row in LOSSES],
        "max": [row.max() - max(row[0], row[-1]) for row in LOSSES],
    }
    for name in get_args(Baseline):
        found = loss_barrier(LOSSES, t=t, baseline=name)
        np.testing.assert_allclose(found, expected[name], rtol=1e-10, atol=1e-12)


def test_chord_barrier_does_not_depend_on_where_t_starts(x64):
    np.testing.assert_allclose(loss_barrier(LOSSES, t=3 + 2 * T), loss_barrier(LOSSES, t=T), rtol=1e-10)


@pytest.mark.parametrize("t", [None, T], ids=["even", "uneven"])
def test_convexity_gap_is_the_highest_chord_barrier_of_all_parts(x64, t):
    at = np.linspace(0, 1, 9) if t is None else t
    parts = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    expected = [max(chord_barrier(row[i : j + 1], at[i : j + 1]) for i, j in parts) for row in LOSSES]
    np.testing.assert_allclose(convexity_gap(LOSSES, t=t), expected, rtol=1e-10)


def test_convexity_gap_is_the_distance_to_the_convex_hull_from_below(x64):
    for row in LOSSES:
        hull = ConvexHull(np.stack([T, row], axis=1))
        slopes = hull.equations[hull.equations[:, 1] < 0]  # facets that look down
        envelope = (-(slopes[:, :1] * T[None] + slopes[:, 2:]) / slopes[:, 1:2]).max(axis=0)
        np.testing.assert_allclose(convexity_gap(row, t=T), (row - envelope).max(), rtol=1e-10)


def test_convex_losses_have_no_gap_and_a_nan_is_not_hidden():
    assert float(convexity_gap(jnp.linspace(-1, 2, 12) ** 2)) < 1e-6
    for measure in (loss_barrier, convexity_gap):
        assert np.isnan(measure(np.array([0.0, np.nan, 1.0])))


@pytest.mark.parametrize("dtype", [np.int32, np.float16, jnp.bfloat16])
def test_integers_and_halves_have_the_chord_of_their_numbers(dtype):
    losses = np.array([0, 3, 1, 2, 16])
    np.testing.assert_allclose(loss_barrier(jnp.asarray(losses, dtype)), loss_barrier(losses.astype(np.float32)))
    np.testing.assert_allclose(convexity_gap(jnp.asarray(losses, dtype)), convexity_gap(losses.astype(np.float32)))


def test_a_model_has_no_barrier_to_itself_not_even_by_rounding():
    constant = np.repeat(np.random.default_rng(3).random((50, 1), np.float32), 11, axis=1)
    assert not loss_barrier(constant).any()
    assert not convexity_gap(constant).any()


def test_barriers_pass_through_jit_and_vmap():
    rows = jnp.asarray(LOSSES, jnp.float32)
    for measure in (loss_barrier, convexity_gap):
        np.testing.assert_array_equal(jax.jit(measure)(rows), jax.vmap(measure)(rows))


def test_matrix_equals_one_line_at_a_time():
    found = pairwise_barriers(loss_fn, MODELS, X, points=7)
    for i, j in [(0, 1), (1, 0), (2, 1), (0, 0)]:
        line = eval_path(loss_fn, linear_path(MODELS[i], MODELS[j]), X, points=7)
        for name in ("loss", "error"):
            np.testing.assert_allclose(found.losses[name][i, j], line.values[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.barriers[i, j], loss_barrier(line.values["loss"]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.gaps[i, j], convexity_gap(line.values["loss"]), rtol=1e-5, atol=1e-6)


def test_matrix_is_symmetric_and_takes_lists_and_stacks_and_any_metric():
    found = pairwise_barriers(loss_fn, MODELS, X, points=7, baseline="mean", metric="error")
    assert (found.barriers == found.barriers.T).all()
    assert (jnp.diagonal(found.barriers) == 0).all()
    again = pairwise_barriers(loss_fn, stack_points(MODELS), X, points=7, baseline="mean", metric="error")
    jax.tree.map(np.testing.assert_array_equal, found.losses, again.losses)
    expected = loss_barrier(found.losses["error"], baseline="mean")
    np.testing.assert_allclose(found.barriers, jnp.maximum(expected, expected.T))


def test_aligned_models_are_those_the_lines_end_in():
    shuffled = jax.tree.map(lambda x: x[..., ::-1], MODELS[0])  # the hidden units in another order
    naive = pairwise_barriers(loss_fn, [MODELS[0], shuffled], X, points=7)
    matched = pairwise_barriers(
        loss_fn, [MODELS[0], shuffled], X, points=7, align=lambda a, b: jax.tree.map(lambda x: x[..., ::-1], b)
    )
    assert float(naive.losses["loss"][0, 1, 3]) != pytest.approx(float(naive.losses["loss"][0, 1, 0]), rel=1e-3)
    np.testing.assert_allclose(matched.losses["loss"][0, 1], naive.losses["loss"][0, 1, 0], rtol=1e-5)


@pytest.mark.parametrize("align", [None, lambda a, b: b], ids=["as they are", "aligned"])
def test_statistics_are_estimated_anew_on_every_line(align):
    def statistics(params, batches):
        return {**params, "v": params["v"] + batches.mean()}

    found = pairwise_barriers(loss_fn, MODELS, X, points=5, align=align, statistics=statistics).losses["loss"]
    line = eval_path(loss_fn, linear_path(MODELS[0], MODELS[2]), X, points=5, statistics=statistics).values["loss"]
    np.testing.assert_allclose(found[0, 2], line, rtol=1e-5)
    np.testing.assert_allclose(found[2, 2], found[0, 2, -1], rtol=1e-5)


BARRIERS = np.array([[0, 0.1, 0.5, 2], [0.1, 0, 0.1, 2], [0.5, 0.1, 0, 2], [2, 2, 2, 0]])


def test_no_group_exceeds_its_threshold_even_through_a_chain_of_low_lines():
    labels = cluster_barriers(BARRIERS, threshold=0.2)
    assert labels[3] not in labels[:3]
    assert len(set(labels[:3])) == 2
    for label in set(labels):
        members = np.flatnonzero(labels == label)
        assert BARRIERS[np.ix_(members, members)].max() <= 0.2


def test_groups_are_as_many_as_asked_for_and_numbered_in_order():
    assert cluster_barriers(BARRIERS, clusters=2).tolist() == [0, 0, 0, 1]
    assert cluster_barriers(BARRIERS[::-1, ::-1], clusters=2).tolist() == [0, 1, 1, 1]
    assert cluster_barriers(BARRIERS, clusters=4).tolist() == [0, 1, 2, 3]
    assert cluster_barriers(np.zeros((1, 1)), clusters=1).tolist() == [0]
