import numpy as np
import pytest

from jaxft.data.masking import mask_tokens

SPECIAL = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def masked():
    ids = np.random.default_rng(0).integers(4, 50, size=(2000, 20))
    ids[:, 0], ids[:, -1], ids[:, 15:] = 1, 0, 0
    return ids, *mask_tokens(ids, mask_id=3, vocab_size=50, special_ids=SPECIAL, seed=0)


def test_labels_are_the_hidden_words_and_nothing_else_changes(masked):
    ids, out, labels = masked
    assert (out[labels < 0] == ids[labels < 0]).all()
    assert (labels[labels >= 0] == ids[labels >= 0]).all()


def test_special_tokens_are_neither_chosen_nor_drawn(masked):
    ids, out, labels = masked
    assert (labels[np.isin(ids, SPECIAL)] == -1).all()
    assert not np.isin(out[(out != ids) & (out != 3)], SPECIAL).any()


def test_proportions_are_those_of_bert(masked):
    ids, out, labels = masked
    chosen = labels >= 0
    assert abs(chosen[:, 1:15].mean() - 0.165) < 0.01  # 0.15, and one in sequences that would have had none
    assert abs((out[chosen] == 3).mean() - 0.8) < 0.02
    assert abs((out[chosen] == ids[chosen]).mean() - 0.1) < 0.02
    assert chosen.any(axis=1).all()


def test_masks_are_a_function_of_seed_and_name():
    ids = np.arange(4, 24)[None]
    options = {"mask_id": 3, "vocab_size": 50, "special_ids": SPECIAL}
    first = mask_tokens(ids, seed=0, **options)[1]
    assert (first == mask_tokens(ids, seed=0, **options)[1]).all()
    assert (first != mask_tokens(ids, seed=1, **options)[1]).any()
    assert (first != mask_tokens(ids, seed=0, name="other", **options)[1]).any()
