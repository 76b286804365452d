import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import TokenBatch
from jaxft.nn import (
    Encoder,
    make_class_logits,
    make_features,
    make_mlm_logits,
    make_prompt_logits,
    make_tied_logits,
)

LABELS = (7, 3, 20)
BUILDERS = {
    "mlm": make_mlm_logits,
    "prompt": lambda config: make_prompt_logits(config, LABELS),
    "tied": lambda config: make_tied_logits(config, LABELS),
    "features": lambda config: make_features(config, pooling="mean"),
    "class": make_class_logits,
}


@pytest.fixture
def hidden(small):
    return np.asarray(Encoder(small.config).apply({"params": small.params["encoder"]}, small.batch))


def test_prompt_logits_are_the_gathered_mlm_logits(small):
    everywhere = np.asarray(make_mlm_logits(small.config)(small.params, small.batch))
    gathered = everywhere[np.arange(3), small.batch.mask_position][:, LABELS]
    np.testing.assert_allclose(make_prompt_logits(small.config, LABELS)(small.params, small.batch), gathered, atol=2e-6)


def test_tied_logits_are_inner_products_with_the_token_table(small, hidden):
    table = np.asarray(small.params["encoder"]["embeddings"]["token"])
    expected = [[hidden[n, p] @ table[k] for k in LABELS] for n, p in enumerate(np.asarray(small.batch.mask_position))]
    np.testing.assert_allclose(make_tied_logits(small.config, LABELS)(small.params, small.batch), expected, atol=2e-6)


def test_pooling_is_the_first_token_or_the_mean_over_tokens(small, hidden):
    first = make_features(small.config)(small.params, small.batch)
    np.testing.assert_array_equal(first, hidden[:, 0])
    mean = make_features(small.config, pooling="mean")(small.params, small.batch)
    expected = [hidden[n, :length].mean(axis=0) for n, length in enumerate((6, 4, 1))]
    np.testing.assert_allclose(mean, expected, atol=2e-6)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_class_logits_are_affine_in_the_features(small, pooling):
    features = np.asarray(make_features(small.config, pooling=pooling)(small.params, small.batch))
    head = small.params["classifier"]
    expected = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    logits = make_class_logits(small.config, pooling=pooling)(small.params, small.batch)
    np.testing.assert_allclose(logits, expected, atol=2e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_jit_and_vmap_equal_a_loop(bert, name):
    f = BUILDERS[name](bert.config)
    compiled = jax.jit(f)
    loop = [np.asarray(compiled(bert.params, TokenBatch(*(x[n : n + 1] for x in bert.batch))))[0] for n in range(3)]
    mapped = jax.vmap(lambda one: f(bert.params, jax.tree.map(lambda x: x[None], one))[0])(bert.batch)
    np.testing.assert_allclose(mapped, loop, atol=3e-6)
    np.testing.assert_allclose(f(bert.params, bert.batch), loop, atol=3e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_dropout_is_on_with_a_key_and_fixed_by_it(bert, name):
    f = jax.jit(BUILDERS[name](bert.config))
    plain = f(bert.params, bert.batch)
    one, again, other = (f(bert.params, bert.batch, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3
    assert float(jnp.abs(one - plain).max()) > 1e-3


def test_dropout_of_frac_0_changes_nothing(bert):
    f = make_features(dataclasses.replace(bert.config, dropout_frac=0.0))
    dropped = f(bert.params, bert.batch, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(dropped, f(bert.params, bert.batch), atol=2e-6)
