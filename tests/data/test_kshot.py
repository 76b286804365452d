from collections import Counter

import numpy as np
import pytest

from jaxft.data.kshot import cap_test, permute_labels, sample_kshot
from jaxft.data.readers import Example

SPLIT = [Example(f"text {i}", None, i % 3) for i in range(90)]


def test_each_part_holds_k_of_each_class_and_they_are_disjoint():
    sample = sample_kshot(SPLIT, classes=3, k=15, seed=1)
    for part in sample:
        assert Counter(example.label for example in part) == {0: 15, 1: 15, 2: 15}
    assert not set(sample.train) & set(sample.dev)
    assert set(sample.train) | set(sample.dev) == set(SPLIT)


def test_the_seed_alone_decides():
    assert sample_kshot(SPLIT, classes=3, k=4, seed=1) == sample_kshot(SPLIT, classes=3, k=4, seed=1)
    assert sample_kshot(SPLIT, classes=3, k=4, seed=1) != sample_kshot(SPLIT, classes=3, k=4, seed=2)


def test_a_smaller_k_trains_on_a_subset():
    small, large = (sample_kshot(SPLIT, classes=3, k=k, seed=1) for k in (2, 8))
    assert set(small.train) < set(large.train)


def test_the_cap_keeps_distinct_examples_in_file_order():
    kept = cap_test(SPLIT, cap=20)
    places = [SPLIT.index(example) for example in kept]
    assert len(set(places)) == 20
    assert places == sorted(places)
    assert kept == cap_test(SPLIT, cap=20)
    assert kept != cap_test(SPLIT, cap=20, seed=1)
    assert cap_test(SPLIT, cap=90) == SPLIT


@pytest.mark.parametrize(("classes", "k"), [(2, 16), (3, 16), (5, 16), (6, 16)])
def test_permuted_labels_are_a_permutation_that_says_nothing_of_the_true_ones(classes, k):
    labels = np.repeat(np.arange(classes), k)
    agree = np.zeros(60)
    for seed in range(60):
        permuted = permute_labels(labels, seed=seed)
        counts = np.stack([np.bincount(permuted[labels == c], minlength=classes) for c in range(classes)])
        assert counts.min() >= k // classes
        assert counts.max() <= -(-k // classes)
        assert (np.sort(permuted) == labels).all()
        agree[seed] = (permuted == labels).mean()
    # Remainders are shared out at random: the true class gets no more than the others.
    assert abs(agree.mean() - 1 / classes) < 3 * agree.std() / np.sqrt(60) + 1e-12
    np.testing.assert_array_equal(permute_labels(labels, seed=3), permute_labels(labels, seed=3))
    assert (permute_labels(labels, seed=3) != permute_labels(labels, seed=4)).any()
