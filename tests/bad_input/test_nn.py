"""What a user of the models of ``jaxft.nn`` is told."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft import nn
from jaxft.core.types import TokenBatch

CONFIG = nn.EncoderConfig("bert", 9, 4, 1, 2, 8, 5, 2, 1e-12, pad_id=0)
PARAMS = nn.init_encoder(CONFIG, key=jax.random.key(0))
IDS = jnp.array([[1, 2, 3], [4, 5, 6]])
BATCH = TokenBatch(IDS, IDS * 0 + 1, IDS * 0, jnp.array([1, 0]))
WIDE = jnp.zeros((2, 6), jnp.int32)
LONG = TokenBatch(WIDE, WIDE, WIDE, BATCH.mask_position)
OTHER: Any = "rel"


def changed(**fields):
    return lambda: dataclasses.replace(CONFIG, **fields)


def features(batch):
    return lambda: nn.make_features(CONFIG)(PARAMS, batch)


CASES = {
    "heads do not divide": (changed(heads=3), "width=4 with heads=3"),
    "several faults at once": (changed(layers=0, dropout_frac=1.0), "layers=0, dropout_frac=1.0"),
    "unknown family": (changed(family="gpt2"), "family='gpt2'"),
    "no room for positions": (changed(family="roberta", pad_id=4), "max_positions=5 with pad_id=4"),
    "no label words": (lambda: nn.make_prompt_logits(CONFIG, []), r"one or more distinct ids in \[0, 9\), got \[\]"),
    "label word twice": (lambda: nn.make_tied_logits(CONFIG, [3, 3]), r"make_tied_logits: .*distinct.*got \[3, 3\]"),
    "label word outside": (lambda: nn.make_prompt_logits(CONFIG, [3, 9]), r"in \[0, 9\), got \[3, 9\]"),
    "unknown pooling": (lambda: nn.make_features(CONFIG, pooling=OTHER), "'first' or 'mean', got 'rel'"),
    "sentence longer than the model": (features(LONG), "must fit the model's 5 tokens, got 6 tokens. Truncate"),
    "ids alone": (features(IDS), "must be a jaxft.core.types.TokenBatch, got ArrayImpl. Pass TokenBatch.input_ids,"),
    "no batch axis": (features(TokenBatch(*(x[0] for x in BATCH))), "leading axis of 1"),
    "masks of another shape": (features(BATCH._replace(attention_mask=IDS[:, :2])), r"\(2, 3\), \(2, 2\)"),
    "ids of another tokenizer": (
        features(BATCH._replace(input_ids=IDS + 7, token_type_ids=IDS * 0 + 2)),
        r"input_ids from 8 to 13, not in \[0, 9\); token_type_ids from 2 to 2, not in \[0, 2\)",
    ),
    "mask outside the sentence": (
        features(BATCH._replace(mask_position=jnp.array([3, 0]))),
        "mask_position from 0 to 3",
    ),
    "no head": (lambda: nn.make_mlm_logits(CONFIG)(PARAMS, BATCH), r"hold 'mlm', got only \['encoder'\].*make_tied"),
    "no classifier": (lambda: nn.make_class_logits(CONFIG)(PARAMS, BATCH), "hold 'classifier'.*init_classifier"),
    "no widths": (lambda: nn.make_mlp(()), r"make_mlp: widths must be one or more positive integers, got \(\)"),
    "unknown activation": (lambda: nn.make_mlp((2,), activation=OTHER), "Did you mean relu"),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, words = CASES[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_long_sentence_is_refused_under_jit():
    with pytest.raises(ValueError, match="must fit the model's 5 tokens"):
        jax.jit(nn.make_features(CONFIG))(PARAMS, LONG)
