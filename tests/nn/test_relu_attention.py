import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import TokenBatch
from jaxft.nn import AttentionStage, FeedForward, ReluAttentionConfig, make_relu_attention

STEPS = (FeedForward("gated", 3), FeedForward("relu", 2))
CONFIG = ReluAttentionConfig(7, 4, 6, (AttentionStage(2, 3, 2, 2, STEPS), AttentionStage(1, 2, 1, 3)))
LENGTHS = np.array([5, 3])


@functools.cache
def compiled(config):
    return jax.jit(make_relu_attention(config)[1])


def make_batch(padding=0):
    draw = np.random.default_rng(0)
    mask = (np.arange(5)[None] < LENGTHS[:, None]).astype(np.int32)
    ids = np.where(mask, draw.integers(7, size=mask.shape), padding)
    types = np.where(mask, draw.integers(2, size=mask.shape), 0)
    return TokenBatch(*(jnp.asarray(x, jnp.int32) for x in (ids, mask, types, [0, 0])))


def random_params(config):
    draw, (init, _) = np.random.default_rng(1), make_relu_attention(config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.5 * draw.normal(size=x.shape), x.dtype), shapes)


def attend(x, part, bias, offset, attention):
    """One sentence without padding, head by head and pair by pair."""
    out, t = x.copy(), len(x)
    for h in range(len(part["query"])):
        scores = np.array(
            [
                [x[i] @ part["query"][h] @ part["key"][h].T @ x[j] + bias[h, j - i + offset] for j in range(t)]
                for i in range(t)
            ]
        )
        if attention == "hard":
            best = scores.argmax(axis=1)
            weights = np.zeros((t, t))
            weights[np.arange(t), best] = scores[np.arange(t), best] > 0
        else:
            weights = np.maximum(scores, 0)
        out = out + weights @ x @ part["value"][h] @ part["output"][h]
    return out


def reference(config, params, ids, types):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    tables = p["embeddings"]
    states = [tables["token"][ids] + tables["token_type"][types] + tables["position"][: len(ids)]]
    for i, stage in enumerate(config.stages):
        part = p[f"stage_{i}"]
        for layer in range(stage.layers):
            x = attend(states[-1], part, part["offset_bias"][layer], config.max_positions - 1, config.attention)
            for k, step in enumerate(stage.steps):
                up = x @ part[f"step_{k}_up"]
                if step.kind == "gated":
                    up = up * (x @ part[f"step_{k}_gate"])
                else:
                    up = np.maximum(up + part[f"step_{k}_bias"], 0)
                x = x + up @ part[f"step_{k}_down"]
            states.append(x)
    return np.stack(states)


@pytest.mark.parametrize("attention", ["relu", "hard"])
def test_equals_the_formula_pair_by_pair(attention):
    config = dataclasses.replace(CONFIG, attention=attention)
    params, batch = random_params(config), make_batch()
    states = compiled(config)(params, batch)
    for row, n in enumerate(LENGTHS):
        ids, types = (np.asarray(x[row, :n]) for x in (batch.input_ids, batch.token_type_ids))
        wanted = reference(config, params, ids, types)
        np.testing.assert_allclose(states.hidden[:, row, :n], wanted, rtol=2e-4, atol=2e-4 * np.abs(wanted).max())


def test_padding_is_not_seen():
    params, f = random_params(CONFIG), compiled(CONFIG)
    first, other = (f(params, make_batch(padding)).hidden for padding in (0, 6))
    for row, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(first[:, row, :n], other[:, row, :n])


def test_layers_of_a_stage_are_stages_with_the_same_weights():
    params, batch = random_params(CONFIG), make_batch()
    (first, last), shared = CONFIG.stages, params["stage_0"]
    single = dataclasses.replace(first, layers=1)
    apart = dataclasses.replace(CONFIG, stages=(single, single, last))
    unrolled = {"embeddings": params["embeddings"], "stage_2": params["stage_1"]}
    for layer in range(2):
        bias = shared["offset_bias"][layer : layer + 1]
        unrolled[f"stage_{layer}"] = shared | {"offset_bias": bias}
    one = compiled(CONFIG)(params, batch)
    other = compiled(apart)(unrolled, batch)
    np.testing.assert_allclose(one.hidden, other.hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one.weights[0][1:], other.weights[1], rtol=1e-5, atol=1e-5)


def test_hard_attention_gives_one_token_all_weight_or_none():
    config = dataclasses.replace(CONFIG, attention="hard")
    weights = compiled(config)(random_params(config), make_batch()).weights[0]
    assert set(np.unique(weights)) == {0.0, 1.0}
    assert set(np.unique(weights.sum(axis=-1))) == {0.0, 1.0}
    assert not weights[:, 1, :, :, LENGTHS[1] :].any()


def test_gradients_reach_every_parameter_and_are_finite():
    config = dataclasses.replace(CONFIG, stages=CONFIG.stages[:1])
    params, (_, f) = random_params(config), make_relu_attention(config)
    grads = jax.jit(jax.grad(lambda p: (f(p, make_batch()).hidden[-1, :, :3] ** 2).sum()))(params)
    assert all(bool(jnp.isfinite(g).all()) and bool((g != 0).any()) for g in jax.tree.leaves(grads))
