import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_cast
from jaxft.core.types import TokenBatch
from jaxft.nn import Encoder, init_classifier, init_encoder


@partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    return Encoder(config).apply({"params": params["encoder"]}, batch)


def hidden(small, params=None, batch=None, **changes) -> Any:
    config = dataclasses.replace(small.config, **changes)
    return forward(config, small.params if params is None else params, small.batch if batch is None else batch)


def padded(batch: TokenBatch, extra: int, pad_id: int) -> TokenBatch:
    def widen(x, value):
        return jnp.pad(x, ((0, 0), (0, extra)), constant_values=value)

    ids, mask, types, position = batch
    return TokenBatch(widen(ids, pad_id), widen(mask, 0), widen(types, 0), position)


def test_scan_equals_unrolled(small, tokens):
    def loss(params, scan_layers):
        return (hidden(small, params, scan_layers=scan_layers)[tokens] ** 3).sum()

    unrolled, scanned = (jax.value_and_grad(loss)(small.params, scan) for scan in (False, True))
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_jit_equals_no_jit(small):
    plain: Any = Encoder(small.config).apply({"params": small.params["encoder"]}, small.batch)
    np.testing.assert_allclose(hidden(small), plain, atol=2e-6)


def test_float64_agrees_with_float32(small):
    with jax.enable_x64(True):
        exact = hidden(small, tree_cast(small.params, jnp.float64))
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(np.asarray(exact), np.asarray(hidden(small)), atol=1e-5)


def test_extra_padding_changes_nothing(small, tokens):
    wider = hidden(small, batch=padded(small.batch, 2, small.config.pad_id))
    np.testing.assert_allclose(wider[:, :6][tokens], hidden(small)[tokens], atol=2e-6)


def test_ids_under_the_mask_change_nothing(small, tokens):
    other = small.batch._replace(input_ids=jnp.where(tokens, small.batch.input_ids, 2))
    np.testing.assert_array_equal(hidden(small, batch=other)[tokens], hidden(small)[tokens])


def test_a_row_depends_on_its_example_alone(small):
    alone = hidden(small, batch=TokenBatch(*(x[1:2] for x in small.batch)))
    np.testing.assert_allclose(alone[0, :4], hidden(small)[1, :4], atol=2e-6)


def test_gradients_reach_the_rows_of_tokens_alone(small, tokens):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 8)), jnp.float32)

    def loss(params):
        return (hidden(small, params) * weights)[tokens].sum()

    grads = jax.grad(loss)(small.params)["encoder"]["embeddings"]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))
    reached = {name: set(np.flatnonzero(np.abs(grads[name]).sum(axis=1)).tolist()) for name in ("token", "position")}
    assert reached["token"] == set(np.asarray(small.batch.input_ids)[tokens].tolist())
    first = small.config.pad_id + 1 if small.config.family == "roberta" else 0
    assert reached["position"] == set(range(first, first + 6))


def test_an_example_of_padding_alone_is_finite(small):
    empty = small.batch._replace(attention_mask=jnp.zeros_like(small.batch.attention_mask))
    grads = jax.grad(lambda params: (hidden(small, params, empty) ** 3).sum())(small.params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(grads))


def test_the_longest_sentence_uses_the_last_position(small):
    def loss(params, t):
        ids = jnp.full((1, t), 5)
        return (hidden(small, params, TokenBatch(ids, ids * 0 + 1, ids * 0, ids[:, 0] * 0)) ** 3).sum()

    grads = jax.grad(loss)(small.params, small.config.max_tokens)["encoder"]["embeddings"]["position"]
    assert float(jnp.abs(grads[-1]).max()) > 0
    assert bool(jnp.isnan(loss(small.params, small.config.max_tokens + 1)))


def test_tokens_are_exchangeable_without_positions(small):
    embeddings = small.params["encoder"]["embeddings"]
    flat = embeddings | {"position": jnp.zeros_like(embeddings["position"])}
    params = {"encoder": small.params["encoder"] | {"embeddings": flat}}
    order = jnp.array([2, 0, 1, 5, 4, 3])
    first = TokenBatch(*(x[:1] for x in small.batch))
    ids, mask, types, position = first
    shuffled = TokenBatch(ids[:, order], mask[:, order], types[:, order], position)
    np.testing.assert_allclose(hidden(small, params, shuffled), hidden(small, params, first)[:, order], atol=5e-6)


def test_initial_values_have_the_stated_deviations(small):
    params = init_encoder(dataclasses.replace(small.config, width=32), key=jax.random.key(0), mlm=True)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name in ("bias", "scale"):
            assert bool((x == (name == "scale")).all()), path
        elif x.size > 500:
            assert abs(float(x.std()) - 0.02) < 0.002, path
    layers = params["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert float(jnp.abs(layers[0] - layers[1]).min()) > 0


def test_the_head_leaves_the_encoder_as_it_is(small):
    both = [init_encoder(small.config, key=jax.random.key(3), mlm=mlm)["encoder"] for mlm in (False, True)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *both))


def test_classifier_has_the_scale_asked_for():
    head = init_classifier(64, 10, key=jax.random.key(0), scale=0.5)
    assert abs(float(head["kernel"].std()) - 0.5) < 0.05
    assert not head["bias"].any()
