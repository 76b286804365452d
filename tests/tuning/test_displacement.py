"""Displacement as it is measured, on changes made by hand."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxft.tuning.displacement import displacement_kind, likelihood_displacement

BEFORE = np.array([-1.0, -2.0, -3.0, -4.0])


def test_mean_fraction_and_standard_error_are_those_of_the_changes():
    change = np.array([-2.0, 1.0, -0.5, -0.25])
    found = likelihood_displacement(BEFORE, BEFORE + change)
    np.testing.assert_allclose(found.per_sample, change)
    np.testing.assert_allclose(found[:3], [change.mean(), scipy.stats.sem(change), 0.75])
    assert (found.displaced, found.displaced_frac, found.displaced_samples) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "loss", "displaced"),
    [(-1.0, -0.1, True), (-1.0, 0.1, False), (1.0, -0.1, False), (0.0, -0.1, False), (-1.0, 0.0, False)],
)
def test_displacement_needs_a_lower_loss_and_a_lower_probability(change, loss, displaced):
    found = likelihood_displacement(BEFORE, BEFORE + change, loss_before=0.7, loss_after=0.7 + loss)
    assert found.displaced is displaced
    assert found.displaced_samples is None


def test_an_example_is_displaced_by_its_own_loss():
    change, loss = np.array([-1.0, -1.0, 1.0, 4.0]), np.array([-1.0, 1.0, -1.0, -1.0])
    found = likelihood_displacement(BEFORE, BEFORE + change, loss_before=np.ones(4), loss_after=1 + loss)
    assert found.displaced_samples is not None
    assert found.displaced_samples.tolist() == [True, False, False, False]
    assert (found.displaced, found.displaced_frac, found.fell_frac) == (False, 0.25, 0.5)


def test_one_example_has_no_standard_error():
    assert np.isnan(likelihood_displacement(BEFORE[:1], BEFORE[:1] - 1).stderr)


SETS = {"benign": [1, 2], "catastrophic": [3]}
P = np.array([0.6, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("after", "kind", "shares"),
    [
        ([0.1, 0.3, 0.2, 0.2, 0.2], "benign", (0.6, 0.2)),
        ([0.1, 0.1, 0.1, 0.6, 0.1], "catastrophic", (0.0, 1.0)),
        ([0.2, 0.15, 0.1, 0.15, 0.4], "other", (0.125, 0.125)),
        ([0.7, 0.1, 0.1, 0.0, 0.1], "none", (0.0, 0.0)),
        ([0.1, 0.0, 0.4, 0.35, 0.15], "catastrophic", (0.3 / 0.6, 0.25 / 0.6)),
    ],
)
def test_the_set_that_gains_most_names_the_kind(after, kind, shares):
    with np.errstate(divide="ignore"):
        before, after = np.log(P)[None], np.log(np.array(after))[None]
    found = displacement_kind(before, after, np.array([0]), SETS)
    assert found.kind == [kind]
    np.testing.assert_allclose([found.share[name][0] for name in SETS], shares, atol=1e-12)


def test_the_chosen_token_gains_nothing_in_its_own_set():
    before, after = np.log([[0.2, 0.8]]), np.log([[0.6, 0.4]])
    found = displacement_kind(before, after, np.array([0]), {"all": [0, 1]})
    np.testing.assert_allclose([found.chosen_change[0], found.gained["all"][0]], [0.4, -0.4])


def test_changes_of_chosen_sets_and_others_sum_to_zero():
    before, after = scipy.special.log_softmax(np.random.default_rng(0).normal(size=(2, 9, 6)), axis=-1)
    sets = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
    found = displacement_kind(before, after, np.arange(9) % 6, sets)
    np.testing.assert_allclose(found.chosen_change + sum(found.gained.values()), 0, atol=1e-12)
    np.testing.assert_allclose(sum(found.share.values()), 1)


def test_an_id_that_a_set_names_twice_counts_once():
    before, after = np.log([[0.6, 0.2, 0.2]]), np.log([[0.1, 0.3, 0.6]])
    found = displacement_kind(before, after, np.array([0]), {"benign": [1] * 5, "catastrophic": [2]})
    assert found.kind == ["catastrophic"]
    np.testing.assert_allclose(found.share["benign"], 0.2)
