"""What a user of the decoders of ``jaxft.nn`` is told."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft.core.types import CausalTokens, ResponseBatch, TokenBatch
from jaxft.nn.decoder import decoder_config, init_decoder
from jaxft.nn.decoder_outputs import (
    make_first_token_logits,
    make_hidden_states,
    make_next_token_logits,
    make_response_log_probs,
    make_response_token_log_probs,
)
from jaxft.nn.generation import generate
from jaxft.nn.rope import RopeScaling

SIZES: dict[str, Any] = {"vocab_size": 9, "width": 8, "layers": 1, "heads": 2, "mlp_width": 8, "max_positions": 5}
CONFIG = decoder_config("gpt2", **SIZES)
ROTARY = decoder_config("llama", **SIZES)
PARAMS = init_decoder(CONFIG, key=jax.random.key(0))
IDS = jnp.array([[1, 2, 3, 4]])
TOKENS = CausalTokens(IDS, IDS * 0 + 1, jnp.arange(4)[None])
ROWS = CausalTokens(*(x[:, None] for x in TOKENS))
ONE = jnp.array([[[1, 2]]])
BATCH = ResponseBatch(ROWS, ONE, ONE, ONE * 0 + 1)
OTHER: Any = "rel"


def changed(config=CONFIG, **fields):
    return lambda: dataclasses.replace(config, **fields)


def states(config=CONFIG, params=PARAMS, tokens: Any = TOKENS, **fields):
    return lambda: make_hidden_states(config)(params, tokens._replace(**fields) if fields else tokens)


def log_probs(batch: Any = BATCH, **fields):
    return lambda: make_response_log_probs(CONFIG)(PARAMS, batch._replace(**fields) if fields else batch)


def continued(config=CONFIG, prompts=TOKENS, **options):
    return lambda: generate(config, PARAMS, prompts, **{"max_new_tokens": 1, **options})


CASES = {
    "sizes that are not positive": (changed(layers=0, mlp_width=-1), "DecoderConfig: .* got layers=0, mlp_width=-1"),
    "heads that do not share": (changed(ROTARY, heads=3), "kv_heads divide heads.*got heads=3 with kv_heads=2"),
    "an odd part of a head": (changed(ROTARY, rope_frac=0.3), "rotary part.*even.*rope_frac=0.3 with head_width=4"),
    "no part of a head": (changed(ROTARY, rope_frac=0.0), "rope_frac=0.0"),
    "unknown family": (changed(family="bert"), "gpt2, gpt_neox, llama, olmo, olmo2.*family='bert'"),
    "several faults at once": (
        changed(activation="relu", dtype="int8", clip_qkv=0.0, norm_eps=0.0),
        "norm_eps=0.0, activation='relu', dtype='int8', clip_qkv=0.0",
    ),
    "scaled rope without rope": (changed(rope_scaling=RopeScaling("linear", 2.0)), "rope_scaling with learned"),
    "parallel branches elsewhere": (changed(ROTARY, parallel_residual=True), "parallel_residual with family='llama'"),
    "unknown field": (lambda: decoder_config("gpt2", **SIZES, dropout=0.1), "decoder_config: .*got dropout"),
    "head width of no width": (lambda: decoder_config("gpt2", **{**SIZES, "heads": 3}), "heads=3 with width=8"),
    "unknown scaling": (lambda: RopeScaling(OTHER, 2.0), "RopeScaling: kind must be linear or llama3.*kind='rel'"),
    "scaling by nothing": (lambda: RopeScaling("llama3", 0.0, 4.0, 1.0), "factor=0.0, low_freq_factor=4.0 with high"),
    "parameters of an encoder": (states(params={"encoder": {}}), r"hold 'decoder', got only \['encoder'\]"),
    "parameters of a tied model": (
        states(config=dataclasses.replace(CONFIG, tied=False)),
        r"hold 'unembedding' where config.tied is False, got only \['decoder'\]",
    ),
    "a table in parameters of a tied model": (
        states(params={**PARAMS, "unembedding": {}}),
        "no 'unembedding' where config.tied is True",
    ),
    "tokens of an encoder": (
        states(tokens=TokenBatch(IDS, IDS, IDS, IDS[:, 0])),
        "must be a jaxft.core.types.CausalTokens, got TokenBatch. Pass CausalTokens.input_ids, segment_ids",
    ),
    "no batch axis": (states(tokens=CausalTokens(*(x[0] for x in TOKENS))), r"must be \[b, t\] alike.*leading axis"),
    "segments of another shape": (states(segment_ids=IDS[:, :2]), r"shapes \[\(1, 4\), \(1, 2\), \(1, 4\)\]"),
    "ids of another tokenizer": (
        states(input_ids=IDS + 6),
        r"input_ids must lie in \[0, 9\), got from 7 to 10. Use the",
    ),
    "segments below 0": (states(segment_ids=IDS - 2), "segment_ids must be 0 or more, got from -1 to 2. Mark padding"),
    "text longer than the table": (
        states(positions=IDS + 1),
        r"positions must lie in \[0, 5\), got from 2 to 5. Trunc",
    ),
    "positions below 0": (
        states(ROTARY, {**PARAMS, "unembedding": {}}, positions=IDS - 2),
        "positions must be 0 or more",
    ),
    "tokens where responses are wanted": (
        log_probs(TOKENS),
        "must be a jaxft.core.types.ResponseBatch, got CausalTokens",
    ),
    "rows without an axis of examples": (log_probs(tokens=TOKENS), r"must be \[n, s, t\] alike"),
    "masks of another shape": (
        log_probs(mask=ONE[:, :, :1]),
        r"n = 1 as in the tokens.*\(1, 1, 2\), \(1, 1, 2\), \(1, 1, 1",
    ),
    "another number of examples": (
        log_probs(**dict.fromkeys(("source", "targets", "mask"), jnp.tile(ONE, (2, 1, 1)))),
        "n = 1",
    ),
    "no response": (log_probs(source=ONE[:, :0], targets=ONE[:, :0], mask=ONE[:, :0]), "one response or more"),
    "source outside the rows": (
        log_probs(source=ONE + 2),
        r"source must lie in \[0, 4\), got from 3 to 4. Count columns",
    ),
    "targets of another tokenizer": (log_probs(targets=ONE + 8), r"targets must lie in \[0, 9\), got from 9 to 10"),
    "no chunk": (lambda: make_response_token_log_probs(CONFIG, chunk=0), "chunk must be None or a positive.*got 0"),
    "negative temperature": (continued(temperature=-1.0), "generate: temperature must be 0 or more.*got -1.0"),
    "a temperature that is no number": (
        continued(temperature=float("nan"), key=jax.random.key(0)),
        "temperature.*got nan",
    ),
    "no key": (continued(temperature=1.0), "a key is needed to draw tokens, got none. Pass key=jax.random.key"),
    "no tokens to draw from": (continued(top_k=0), "top_k must be None or from 1 to 9, got 0"),
    "no probability": (continued(top_p=0.0), r"top_p must be None or in \(0, 1\], got 0.0"),
    "ends of another tokenizer": (continued(eos_ids=(9,)), r"eos_ids and pad_id must lie in \[0, 9\), got \[9, 0\]"),
    "nothing to generate": (continued(max_new_tokens=0), "max_new_tokens must be positive, got 0"),
    "no room": (continued(max_new_tokens=2), "fit the model's 5 positions, got 4 and 2 tokens. Truncate"),
    "an empty prompt": (
        continued(prompts=TOKENS._replace(segment_ids=IDS * 0)),
        r"have a token, got none in rows \[0\]",
    ),
    "a prompt that branches": (continued(prompts=TOKENS._replace(segment_ids=IDS)), "must not branch, got segment 4"),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, words = CASES[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_shapes_are_refused_under_jit():
    with pytest.raises(ValueError, match=r"must be \[b, t\] alike"):
        jax.jit(make_next_token_logits(CONFIG))(PARAMS, TOKENS._replace(positions=IDS[:, :1]))
    with pytest.raises(ValueError, match="one response or more"):
        jax.jit(make_first_token_logits(CONFIG))(PARAMS, BATCH._replace(source=ONE[:, :0]))


def test_values_are_looked_at_while_parameters_are_traced():
    tokens = TOKENS._replace(input_ids=IDS + 6)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        jax.jit(lambda params: make_hidden_states(CONFIG)(params, tokens))(PARAMS)
