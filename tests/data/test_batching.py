import numpy as np
import pytest

from jaxft.data.batching import batch_indices, length_buckets


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (5, 5), (3, 8), (1, 1)])
def test_segments_join_to_the_whole(n, batch_size):
    whole = batch_indices(n, batch_size, seed=3, stop=20)
    parts = [batch_indices(n, batch_size, seed=3, start=a, stop=b) for a, b in ((0, 10), (10, 10), (10, 13), (13, 20))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_every_epoch_is_a_permutation():
    flat = batch_indices(7, 4, seed=0, stop=7).ravel()
    epochs = flat.reshape(4, 7)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(7), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_seed_and_name_choose_the_shuffle():
    base = batch_indices(50, 10, seed=0, stop=5)
    assert (base != batch_indices(50, 10, seed=1, stop=5)).any()
    assert (base != batch_indices(50, 10, seed=0, name="other", stop=5)).any()


def test_buckets_hold_each_example_once_and_fit_tightly():
    lengths = np.random.default_rng(0).integers(1, 60, size=101)
    buckets = length_buckets(lengths, batch_size=8, multiple=16)
    assert sorted(int(i) for batch, _ in buckets for i in batch) == list(range(101))
    assert [len(batch) for batch, _ in buckets] == [8] * 12 + [5]
    for batch, padded in buckets:
        assert padded % 16 == 0
        assert padded - 16 < lengths[batch].max() <= padded
    assert len({padded for _, padded in buckets}) <= 4


def test_buckets_are_deterministic_and_stable_in_ties():
    (batch, padded), *_ = length_buckets([5, 5, 5, 5], batch_size=4)
    assert (batch.tolist(), padded) == ([0, 1, 2, 3], 8)
