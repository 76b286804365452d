import numpy as np
import scipy.stats

from jaxft.evaluation.selectivity import agreement, agreement_by_group, control_targets, mean_agreement

RNG = np.random.default_rng(0)
TYPES = RNG.integers(50, size=(4000, 2))
POOL = RNG.random(997)


def test_control_target_is_a_function_of_the_types():
    found = {}
    for pair, target in zip(map(tuple, TYPES.tolist()), control_targets(TYPES, POOL).tolist(), strict=True):
        assert found.setdefault(pair, target) == target
    assert len(set(found.values())) > 500


def test_control_function_is_the_same_for_other_examples_and_another_one_for_another_seed():
    np.testing.assert_array_equal(control_targets(TYPES, POOL)[7:9], control_targets(TYPES[7:9], POOL))
    assert (control_targets(TYPES, POOL, seed=1) != control_targets(TYPES, POOL)).mean() > 0.9
    swapped = control_targets(TYPES[:, ::-1], POOL)
    assert (swapped != control_targets(TYPES, POOL))[TYPES[:, 0] != TYPES[:, 1]].mean() > 0.9


def test_control_targets_have_the_distribution_of_the_pool():
    every = np.stack(np.meshgrid(np.arange(120), np.arange(120)), axis=-1).reshape(-1, 2)
    assert scipy.stats.kstest(control_targets(every, POOL), POOL).pvalue > 0.01
    classes = control_targets(every, np.array([0, 0, 0, 1]))
    assert abs(classes.mean() - 0.25) < 0.02


def test_agreement_equals_scipy():
    x = RNG.normal(size=200).round(1)
    y = x + RNG.normal(size=200)
    found = agreement(x, y)
    np.testing.assert_allclose(found.pearson, np.asarray(scipy.stats.pearsonr(x, y))[0])
    np.testing.assert_allclose(found.spearman, np.asarray(scipy.stats.spearmanr(x, y))[0])
    np.testing.assert_allclose(found.r2, 1 - ((y - x) ** 2).mean() / y.var())


def test_constant_predictions_have_no_correlation_and_are_left_out_of_the_mean():
    groups = np.array([0, 0, 0, 1, 1, 1])
    found = agreement_by_group(np.array([1.0, 1, 1, 0, 1, 2]), np.array([0.0, 1, 2, 0, 1, 2]), groups)
    assert np.isnan(found[0].pearson)
    assert mean_agreement(found)[:2] == (1.0, 1.0)
    assert np.isnan(mean_agreement({0: found[0]}).pearson)


def test_within_groups_what_only_tells_groups_apart_counts_nothing():
    groups = np.repeat(np.arange(4), 500)
    target = groups + 0.1 * RNG.normal(size=2000)
    predicted = groups + 0.1 * RNG.normal(size=2000)
    assert agreement(predicted, target).pearson > 0.95
    assert abs(mean_agreement(agreement_by_group(predicted, target, groups)).pearson) < 0.1
