"""Measures of how alike responses are, against a table filled in by hand and against plain sums."""

import difflib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.tuning.similarity import edit_distance, last_hidden_similarity, length_difference


def levenshtein(a, b):
    """The table of Wagner and Fischer, entry by entry."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            changed = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, changed)
    return table[-1][-1]


@pytest.fixture(scope="module")
def drawn():
    """60 pairs of sequences of 0 to 9 tokens of 3 kinds, and themselves padded on either side."""
    rng = np.random.default_rng(0)
    pairs = [[rng.integers(3, size=rng.integers(k + 1)).tolist() for k in (7, 9)] for _ in range(60)]
    arrays = []
    for side, k in ((0, 7), (1, 9)):
        ids, mask = rng.integers(3, size=(60, k)), np.zeros((60, k), np.int32)
        for i, pair in enumerate(pairs):
            size = len(pair[side])
            start = 0 if i % 2 else k - size
            ids[i, start : start + size], mask[i, start : start + size] = pair[side], 1
        arrays += [ids, mask]
    return pairs, arrays


def test_edit_distance_equals_the_table_filled_in_by_hand(drawn):
    pairs, arrays = drawn
    expected = [levenshtein(*pair) for pair in pairs]
    np.testing.assert_array_equal(edit_distance(*arrays, normalize=False), expected)
    longer = [max(len(a), len(b), 1) for a, b in pairs]
    np.testing.assert_allclose(jax.jit(edit_distance)(*arrays), np.divide(expected, longer), rtol=1e-6)


def test_edit_distance_is_symmetric_and_bounds_the_common_part(drawn):
    pairs, arrays = drawn
    forth, back = (edit_distance(*arrays[k:], *arrays[:k], normalize=False) for k in (0, 2))
    np.testing.assert_array_equal(forth, back)
    for (a, b), distance in zip(pairs, forth, strict=True):
        common = sum(block.size for block in difflib.SequenceMatcher(None, a, b, False).get_matching_blocks())
        assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b), len(a) + len(b) - 2 * common)


def test_axes_before_the_tokens_are_kept():
    ids = jnp.arange(24).reshape(2, 3, 4)
    assert edit_distance(ids, jnp.ones_like(ids), ids + 1, jnp.ones_like(ids)).shape == (2, 3)


def test_last_hidden_similarity_takes_the_state_that_predicts_the_last_token():
    states = np.random.default_rng(1).normal(size=(3, 3, 4, 5)).astype(np.float32)
    lengths = np.array([[2, 4, 1], [1, 1, 1], [4, 3, 1]])
    mask = (np.arange(4) < lengths[..., None]).astype(np.int32)
    expected = [s[0, a - 1] @ s[1, b - 1] for s, (a, b, _) in zip(states, lengths, strict=True)]
    states[mask == 0] = np.nan
    np.testing.assert_allclose(last_hidden_similarity(states, mask), expected, rtol=1e-6)
    assert length_difference(mask).tolist() == [2, 0, -1]


def test_an_empty_response_has_similarity_zero():
    states, mask = jnp.full((2, 3, 4), jnp.nan), jnp.array([[0, 0, 0], [1, 0, 0]])
    assert float(last_hidden_similarity(states.at[1].set(1.0), mask)) == 0
