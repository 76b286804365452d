import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import TokenBatch
from jaxft.nn.capture import make_layer_outputs
from jaxft.nn.outputs import make_features
from jaxft.nn.transformer import EncoderConfig, _Attention, init_encoder

CONFIG = EncoderConfig("bert", 9, 4, 3, 2, 8, 5, 2, 1e-12, pad_id=0, init_scale=0.5)
IDS = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]])
BATCH = TokenBatch(IDS, (IDS > 0).astype(IDS.dtype), IDS * 0, IDS[:, 0] * 0)


@pytest.fixture(scope="module")
def params():
    return init_encoder(CONFIG, key=jax.random.key(0))


def test_last_states_are_those_of_the_encoder(params):
    hidden = jax.jit(make_layer_outputs(CONFIG))(params, BATCH).hidden
    np.testing.assert_allclose(hidden[-1][:, 0], make_features(CONFIG)(params, BATCH), atol=1e-6)


def test_states_of_a_layer_are_the_last_ones_of_a_shallower_encoder(params):
    hidden = make_layer_outputs(CONFIG)(params, BATCH).hidden
    shallow = EncoderConfig("bert", 9, 4, 1, 2, 8, 5, 2, 1e-12, pad_id=0)
    cut = {"encoder": params["encoder"] | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["encoder"]["layers"])}}
    np.testing.assert_allclose(hidden[1][:, 0], make_features(shallow)(cut, BATCH), atol=1e-6)


def test_attention_is_a_distribution_over_tokens_and_explains_the_layer(params):
    out = make_layer_outputs(CONFIG)(params, BATCH)
    np.testing.assert_allclose(out.attention.sum(axis=-1), 1, atol=1e-6)
    assert float(jnp.abs(out.attention[:, 1, :, :, 2:]).max()) == 0
    layer = jax.tree.map(lambda leaf: leaf[0], params["encoder"]["layers"])["attention"]
    value = (out.hidden[0] @ layer["value"]["kernel"] + layer["value"]["bias"][None, None]).reshape(2, 4, 2, 2)
    mixed = jnp.einsum("bhtu,buhe->bthe", out.attention[0], value).reshape(2, 4, 4)
    expected = jnp.asarray(_Attention(CONFIG, True).apply({"params": layer}, out.hidden[0], BATCH.attention_mask > 0))
    got = mixed @ layer["output"]["kernel"] + layer["output"]["bias"][None, None]
    np.testing.assert_allclose(got[:, :2], expected[:, :2], atol=1e-5)
