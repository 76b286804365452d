"""Instability analysis on a loss whose children can be written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.geometry.barriers import loss_barrier
from jaxft.geometry.instability import instability_analysis, stability_onset

CHECKPOINTS = [(step, {"w": jnp.array([0.0, float(step)])}) for step in (0, 2, 4)]


def train_fn(params, step, key):
    """Noise that gets less with the step, in the first coordinate."""
    return {"w": params["w"].at[0].set(jax.random.normal(key) / (1 + step))}


def loss_fn(params, batch):
    x = params["w"][0] * batch.mean()
    return {"error": jnp.cos(3 * x), "loss": x**4}


def analysis(**options):
    return instability_analysis(train_fn, loss_fn, CHECKPOINTS, jnp.ones((2, 3)), key=jax.random.key(0), **options)


def test_barriers_are_means_over_pairs_of_the_rise_over_the_mean_of_the_ends():
    found = analysis(children=3, points=9)
    assert found.losses["error"].shape == (3, 3, 9)
    for row, pairs in zip(found.losses["error"], found.pair_barriers["error"], strict=True):
        expected = [max(line) - (line[0] + line[-1]) / 2 for line in np.asarray(row)]
        np.testing.assert_allclose(pairs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.barriers["error"], found.pair_barriers["error"].mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.barriers["loss"], loss_barrier(found.losses["loss"], baseline="mean").mean(axis=1))


def test_children_differ_in_keys_and_the_same_key_gives_the_same_children():
    found = analysis(children=3, points=3)
    ends = np.asarray(found.losses["error"])[:, :, [0, -1]]
    assert len(np.unique(ends.round(5))) == 9
    np.testing.assert_array_equal(found.barriers["error"], analysis(children=3, points=3).barriers["error"])


def test_lines_run_between_the_children():
    seen = []

    def noted(params, step, key):
        seen.append(train_fn(params, step, key))
        return seen[-1]

    found = instability_analysis(noted, loss_fn, CHECKPOINTS, jnp.ones((1, 1)), key=jax.random.key(0), points=3)
    a, b = (child["w"] for child in seen[:2])
    middle = loss_fn({"w": (a + b) / 2}, jnp.ones(1))
    assert float(found.losses["loss"][0, 0, 1]) == pytest.approx(float(middle["loss"]), rel=1e-5)


def test_onset_is_the_first_step_from_which_no_barrier_is_above_the_tolerance():
    steps = [0, 5, 9]
    assert stability_onset(steps, np.array([0.3, 0.02, 0.0]), tolerance=0.02) == 5
    assert stability_onset(steps, np.array([0.0, 0.3, 0.0]), tolerance=0.02) == 9
    assert stability_onset(steps, np.array([0.0, 0.0, 0.3]), tolerance=0.02) is None
    assert stability_onset(steps, np.array([0.0, 0.0, np.nan]), tolerance=0.02) is None
    assert analysis(tolerance_frac=10.0).onset == 0
