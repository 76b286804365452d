import numpy as np

from jaxft.evaluation.span_probes import (
    at_spans,
    branching,
    fill_chart,
    gap_depths,
    span_f1,
    span_features,
    span_index,
    split_by_depth,
    token_depths,
    token_index,
)

RNG = np.random.default_rng(0)
LENGTHS = np.array([6, 2, 1, 4, 5])


def random_trees(lengths, tokens):
    """A uniform split at every span."""
    tree = np.zeros((len(lengths), tokens, tokens + 1), bool)
    for b, n in enumerate(lengths):
        stack = [(0, int(n))]
        while stack:
            i, j = stack.pop()
            if j - i >= 2:
                tree[b, i, j] = True
                middle = int(RNG.integers(i + 1, j))
                stack += [(i, middle), (middle, j)]
    return tree


TREES = random_trees(LENGTHS, 6)


def test_depths_of_common_ancestors_give_the_tree_back():
    np.testing.assert_array_equal(split_by_depth(gap_depths(TREES), LENGTHS), TREES)


def test_depths_are_those_of_walking_up_the_tree():
    depths = token_depths(TREES)
    for b, n in enumerate(LENGTHS):
        for k in range(n):
            holding = [(i, j) for i, j in np.argwhere(TREES[b]) if i <= k < j]
            assert depths[b, k] == len(holding)
    assert depths[1].tolist() == [1, 1, 0, 0, 0, 0]


def test_depth_is_linear_in_the_probabilities():
    other = random_trees(LENGTHS, 6)
    mixed = token_depths(0.25 * TREES + 0.75 * other)
    np.testing.assert_allclose(mixed, 0.25 * token_depths(TREES) + 0.75 * token_depths(other))


def test_index_holds_every_proper_span_once():
    index = span_index(LENGTHS)
    expected = {(b, i, j) for b, n in enumerate(LENGTHS) for i in range(n) for j in range(i + 2, n + 1) if j - i < n}
    assert set(zip(*index, strict=True)) == expected
    assert len(index.sentence) == len(expected)
    gaps = span_index(LENGTHS, proper=False, width=2)
    assert len(gaps.sentence) == (LENGTHS - 1).sum()
    assert len(token_index(LENGTHS).sentence) == LENGTHS.sum()


def test_features_are_both_ends_and_their_product():
    hidden = RNG.normal(size=(2, 5, 6, 3)).astype(np.float32)
    index = span_index(LENGTHS)
    features = np.asarray(span_features(hidden, index))
    b, i, j = (axis[4] for axis in index)
    first, last = hidden[1, b, i], hidden[1, b, j - 1]
    np.testing.assert_allclose(features[1, 4], np.concatenate([first, last, first * last]))
    words = token_index(LENGTHS)
    np.testing.assert_allclose(span_features(hidden, words)[0, 6], hidden[0, 1, 0])


def test_chart_is_filled_and_read_at_the_same_spans():
    index = span_index(LENGTHS)
    values = RNG.random(len(index.sentence))
    chart = fill_chart(values, index, sentences=5, tokens=6)
    np.testing.assert_array_equal(at_spans(chart, index), values)
    assert np.count_nonzero(chart) == len(values)


def test_f1_of_a_tree_with_itself_is_one_and_branching_trees_are_binary():
    scores = span_f1(TREES, TREES, LENGTHS)
    assert scores[[0, 3, 4]].tolist() == [1, 1, 1]
    assert np.isnan(scores[[1, 2]]).all()
    for right in (True, False):
        assert (branching(LENGTHS, tokens=6, right=right).sum(axis=(1, 2)) == np.maximum(LENGTHS - 1, 0)).all()


def test_f1_is_counted_by_hand():
    lengths = np.array([4])
    gold, predicted = np.zeros((1, 4, 5), bool), np.zeros((1, 4, 5), bool)
    gold[0, [0, 0, 2], [4, 2, 4]] = True
    predicted[0, [0, 1, 2], [4, 4, 4]] = True
    assert span_f1(predicted, gold, lengths).tolist() == [0.5]
