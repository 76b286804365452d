"""States, logits and log-probabilities of responses, whatever their layout."""

import dataclasses
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.factors import FactoredFn
from jaxft.core.trees import tree_cast
from jaxft.core.types import CausalTokens, ResponseBatch
from jaxft.nn.decoder import decoder_config
from jaxft.nn.decoder_outputs import (
    make_first_token_logits,
    make_hidden_states,
    make_next_token_logits,
    make_response_log_probs,
    make_response_states,
    make_response_token_log_probs,
)
from tests.nn.test_decoder import CONFIGS, SIZES, make_params
from tests.nn.test_factored import assert_taps_give_the_gradients

PROMPTS = [[3, 5, 2], [7]]
RESPONSES = [[[4, 9, 4], [11, 6]], [[1], [8, 8, 12, 2]]]
"""A token that comes twice, a prompt of one token, and responses of all lengths from one to four."""
ROW, LONGEST = 12, 4
DENSE = {f"decoder/layers/attention/{name}/kernel" for name in ("query", "key", "value", "output")}
DENSE |= {f"decoder/layers/mlp/{name}/kernel" for name in ("in", "out")}


def packed(prompts=PROMPTS, responses=RESPONSES) -> ResponseBatch:
    """Prompt and responses in one row each, the responses as branches."""
    rows = [([], [], []) for _ in prompts]
    sources = []
    for prompt, those, (ids, segments, positions) in zip(prompts, responses, rows, strict=True):
        ids += prompt
        segments += [1] * len(prompt)
        positions += range(len(prompt))
        sources.append([])
        for branch, response in enumerate(those, 2):
            start = len(ids)
            sources[-1].append([len(prompt) - 1, *range(start, start + len(response) - 1)])
            ids += response
            segments += [branch] * len(response)
            positions += range(len(prompt), len(prompt) + len(response))
    fields = [[[list(row[i]) + [0] * (ROW - len(row[i]))] for row in rows] for i in range(3)]
    return batch_of(fields, sources, responses)


def padded(side: str, prompts=PROMPTS, responses=RESPONSES) -> ResponseBatch:
    """Every response in a row of its own, after a copy of the prompt."""
    fields, sources = ([], [], []), []
    for prompt, those in zip(prompts, responses, strict=True):
        rows, source = ([], [], []), []
        for number, response in enumerate(those):
            text, room = prompt + response, ROW - len(prompt + response)
            before, after = ([0] * room, []) if side == "left" else ([], [0] * room)
            for row, values in zip(rows, (text, [1] * len(text), list(range(len(text)))), strict=True):
                row.append(before + values + after)
            first = number * ROW + len(before) + len(prompt) - 1
            source.append(list(range(first, first + len(response))))
        for field, row in zip(fields, rows, strict=True):
            field.append(row)
        sources.append(source)
    return batch_of(fields, sources, responses)


def batch_of(fields, sources, responses) -> ResponseBatch:
    def filled(nested):
        return [[row + [0] * (LONGEST - len(row)) for row in rows] for rows in nested]

    mask = [[[1] * len(row) for row in rows] for rows in responses]
    arrays = [jnp.asarray(x, jnp.int32) for x in (*fields, *map(filled, (sources, responses, mask)))]
    return ResponseBatch(CausalTokens(*arrays[:3]), *arrays[3:])


LAYOUTS = {"packed": packed(), "left": padded("left"), "right": padded("right")}
COUNTED = np.asarray(LAYOUTS["packed"].mask) > 0


@partial(jax.jit, static_argnums=0)
def call(f, params, batch):
    return f(params, batch)


@pytest.mark.parametrize("family", CONFIGS)
def test_layouts_give_the_same_states_and_log_probs(family, x64):
    config = CONFIGS[family]
    exact = tree_cast(make_params(config), jnp.float64)

    def outputs(params, batch):
        states = make_response_states(config)(params, batch)
        return states, make_response_token_log_probs(config)(params, batch)

    run = jax.jit(outputs)
    for params, atol in ((exact, 1e-12), (make_params(config), 1e-5)):
        first = run(params, LAYOUTS["packed"])
        assert (np.abs(first[1]) > 1e-3).tolist() == COUNTED.tolist()
        assert (np.asarray(first[0])[~COUNTED] == 0).all()
        for name in ("left", "right"):
            for a, b in zip(first, run(params, LAYOUTS[name]), strict=True):
                np.testing.assert_allclose(a, b, atol=atol)


def test_states_and_log_probs_are_those_of_plain_text():
    config, params = CONFIGS["llama"], make_params(CONFIGS["llama"])
    states = call(make_response_states(config), params, LAYOUTS["packed"])
    log_probs = call(make_response_token_log_probs(config), params, LAYOUTS["packed"])
    sums = call(make_response_log_probs(config), params, LAYOUTS["packed"])
    first = call(make_first_token_logits(config), params, LAYOUTS["packed"])
    texts = [(i, j) for i in range(2) for j in range(2)]
    for i, j in texts:
        prompt, response = PROMPTS[i], RESPONSES[i][j]
        # Right padding of ordinary text changes nothing: one shape for all.
        text = (prompt + response + [0] * ROW)[:ROW]
        ids = jnp.array([text])
        tokens = CausalTokens(ids, ids * 0 + 1, jnp.arange(ROW)[None])
        hidden = call(make_hidden_states(config), params, tokens)[0]
        logits = call(make_next_token_logits(config), params, tokens)[0]
        at = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        own = jax.nn.log_softmax(logits, axis=-1)[at, jnp.array(response)]
        np.testing.assert_allclose(states[i, j, : len(response)], hidden[at], atol=1e-5)
        np.testing.assert_allclose(log_probs[i, j, : len(response)], own, atol=1e-5)
        np.testing.assert_allclose(sums[i, j], own.sum(), atol=1e-5)
        np.testing.assert_allclose(first[i], logits[len(prompt) - 1], atol=1e-5)


def test_probabilities_of_all_responses_of_a_length_sum_to_one(x64):
    config = decoder_config("olmo2", **{**SIZES, "vocab_size": 3, "layers": 1})
    params = tree_cast(make_params(config), jnp.float64)
    every = [list(y) for y in product(range(3), repeat=2)]
    ids = jnp.array([[[0, 2, *(token for y in every for token in y)]]])
    branches = np.repeat(np.arange(len(every)), 2)
    segments = jnp.array([[[1, 1, *(2 + branches)]]])
    positions = jnp.array([[[0, 1, *([2, 3] * len(every))]]])
    sources = jnp.array([[[1, 2 + 2 * i] for i in range(len(every))]])
    targets = jnp.array([every])
    batch = ResponseBatch(CausalTokens(ids, segments, positions), sources, targets, targets * 0 + 1)
    log_probs = call(make_response_log_probs(config), params, batch)
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1, rtol=1e-12)


@pytest.mark.parametrize(("chunk", "changes"), [(3, {}), (8, {"remat": True})])
def test_chunks_change_neither_values_nor_gradients(chunk, changes):
    params, batch = make_params(CONFIGS["gpt2"]), LAYOUTS["packed"]
    config = dataclasses.replace(CONFIGS["gpt2"], **changes)

    @partial(jax.jit, static_argnums=0)
    def value_and_grads(f, params):
        return jax.value_and_grad(lambda p: (f(p, batch) ** 2).sum())(params)

    whole = value_and_grads(make_response_log_probs(CONFIGS["gpt2"]), params)
    parts = value_and_grads(make_response_log_probs(config, chunk=chunk), params)
    for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def test_no_logits_of_all_tokens_are_held_where_there_are_chunks():
    one: Any = jax.tree.map(lambda leaf: leaf[:1], LAYOUTS["packed"])
    params = make_params(CONFIGS["gpt2"])

    def holds_all(chunk):
        f = make_response_log_probs(CONFIGS["gpt2"], chunk=chunk)
        lowered = jax.jit(jax.grad(lambda p: f(p, one).sum())).lower(params).as_text()
        # Two responses of four tokens, a vocabulary of 13.
        return "tensor<8x13xf32>" in lowered or "tensor<2x4x13xf32>" in lowered

    assert holds_all(None)
    assert not holds_all(4)


def test_derivatives_along_a_gradient_are_products_of_gradients(x64):
    config = dataclasses.replace(CONFIGS["gpt_neox"], remat=True)
    params, batch = tree_cast(make_params(config), jnp.float64), LAYOUTS["packed"]
    f = make_response_log_probs(config, chunk=3)

    @jax.jit
    def both(params):
        grads = jax.jacrev(lambda p: f(p, batch)[0])(params)
        chosen, rejected = (jax.tree.map(lambda leaf, i=i: leaf[i], grads) for i in range(2))
        _, rates = jax.jvp(lambda p: f(p, batch)[0], (params,), (chosen,))
        dots = [sum(map(jnp.vdot, jax.tree.leaves(chosen), jax.tree.leaves(g))) for g in (chosen, rejected)]
        return rates, jnp.stack(dots)

    rates, dots = both(params)
    np.testing.assert_allclose(rates, dots, rtol=1e-10)


def test_tokens_beyond_the_mask_have_no_say():
    config, params, batch = CONFIGS["olmo"], make_params(CONFIGS["olmo"]), LAYOUTS["packed"]
    mask = batch.mask.at[0, 0, 2].set(0)

    @jax.jit
    def value_and_grads(params, batch):
        return jax.value_and_grad(lambda p: make_response_log_probs(config)(p, batch).sum())(params)

    shorter = value_and_grads(params, batch._replace(mask=mask))
    other = value_and_grads(params, batch._replace(mask=mask, targets=batch.targets.at[0, 0, 2].set(7)))
    jax.tree.map(np.testing.assert_array_equal, shorter, other)
    assert abs(shorter[0] - value_and_grads(params, batch)[0]) > 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_every_matrix_of_a_decoder_has_its_gradient(family, x64):
    config, params = CONFIGS[family], tree_cast(make_params(CONFIGS[family]), jnp.float64)
    one: Any = jax.tree.map(lambda leaf: leaf[:1], LAYOUTS["packed"])
    f = make_response_log_probs(config, chunk=2)
    assert isinstance(f, FactoredFn)
    table = "decoder/embeddings/token"
    tapped = DENSE | {table} | ({"decoder/layers/mlp/gate/kernel"} if "olmo" in family or family == "llama" else set())
    tapped |= {"decoder/embeddings/position"} if family == "gpt2" else set()
    tapped |= set() if config.tied else {"unembedding/table"}
    taps = assert_taps_give_the_gradients(f, params, one, tapped=tapped)
    uses = sorted(tap.kind for tap in taps.values() if tap.leaf == table)
    assert uses == (["rows", "transposed"] if config.tied else ["rows"])


@pytest.mark.parametrize("make", [make_response_states, make_first_token_logits])
def test_other_outputs_have_the_gradients_of_their_matrices(make, x64):
    config = dataclasses.replace(CONFIGS["gpt2"], scan_layers=False, remat=True)
    params = tree_cast(make_params(CONFIGS["gpt2"]), jnp.float64)
    one: Any = jax.tree.map(lambda leaf: leaf[:1], LAYOUTS["left"])
    tapped = DENSE | {f"decoder/embeddings/{name}" for name in ("token", "position")}
    assert_taps_give_the_gradients(make(config), params, one, tapped=tapped)


def test_examples_are_independent_and_may_be_mapped():
    config, params, batch = CONFIGS["olmo2"], make_params(CONFIGS["olmo2"]), LAYOUTS["packed"]
    f = make_response_token_log_probs(config, chunk=3)

    def of_one(example):
        return f(params, jax.tree.map(lambda leaf: leaf[None], example))[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(of_one))(batch), call(f, params, batch), atol=5e-6)


def test_bfloat16_parameters_give_sums_in_float32():
    config, params, batch = CONFIGS["llama"], make_params(CONFIGS["llama"]), LAYOUTS["packed"]
    f = make_response_log_probs(config)
    half, exact = call(f, tree_cast(params, jnp.bfloat16), batch), call(f, params, batch)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, rtol=0.05)
    assert np.abs(half - exact).max() > 1e-4
    assert call(make_next_token_logits(config), tree_cast(params, jnp.bfloat16), tokens_of(batch)).dtype == jnp.float32
    mixed = call(make_response_log_probs(dataclasses.replace(config, dtype="bfloat16")), params, batch)
    np.testing.assert_allclose(mixed, exact, rtol=0.05)


def tokens_of(batch: ResponseBatch) -> CausalTokens:
    return CausalTokens(*(x[:, 0] for x in batch.tokens))


def test_gradients_of_chunks_are_not_summed_in_half_precision():
    # Many chunks add to the same rows of the table.
    params = tree_cast(make_params(CONFIGS["llama"]), jnp.bfloat16)
    one: Any = jax.tree.map(lambda leaf: leaf[:1], LAYOUTS["packed"])
    many: Any = jax.tree.map(lambda leaf: jnp.repeat(leaf, 64, axis=0), one)

    @partial(jax.jit, static_argnums=0)
    def table_gradient(chunk, params):
        f = make_response_log_probs(CONFIGS["llama"], chunk=chunk)
        return jax.grad(lambda p: f(p, many).sum())(params)["unembedding"]["table"].astype(jnp.float32)

    whole, parts = table_gradient(None, params), table_gradient(4, params)
    assert jnp.linalg.norm(parts - whole) < 0.01 * jnp.linalg.norm(whole)


@pytest.mark.parametrize(("field", "beyond"), [("targets", 50), ("source", 100)])
def test_under_jit_what_names_no_token_gives_nan_and_so_does_its_gradient(field, beyond):
    f, params = make_response_log_probs(CONFIGS["gpt2"]), make_params(CONFIGS["gpt2"])
    batch = LAYOUTS["packed"]
    wrong = batch._replace(**{field: jnp.asarray(getattr(batch, field)) + beyond})
    value, grads = jax.jit(jax.value_and_grad(lambda p, x: f(p, x).sum()))(params, wrong)
    assert jnp.isnan(value)
    assert jnp.isnan(grads["decoder"]["embeddings"]["token"]).any()
