"""The specs of our models leave outputs as they are, and name every unit there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.units import make_permutation_spec, unit_counts
from jaxft.geometry.permutations import check_spec
from jaxft.nn import make_class_logits, make_mlm_logits, make_mlp
from jaxft.nn.conv import ConvConfig, make_convnet
from jaxft.nn.unit_specs import conv_spec, encoder_spec, mlp_spec


def shaken(params, seed=0):
    """Random values everywhere, so that no leaf is constant; positive ones stay positive."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw.uniform(size=x.shape), x.dtype), params)


@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp(use_bias):
    init, f = make_mlp((7, 5, 6, 3), activation="gelu", use_bias=use_bias)
    params = shaken(init(jax.random.key(0), 4))
    spec = mlp_spec(params)
    assert unit_counts(params, spec) == {"hidden_0": 7, "hidden_1": 5, "hidden_2": 6}
    assert {path for path, _ in spec.leaves} == {
        f"Dense_{i}/{leaf}" for i in range(4) for leaf in ("kernel", *["bias"] * use_bias) if (i, leaf) != (3, "bias")
    }
    x = jax.random.normal(jax.random.key(1), (5, 4))
    assert check_spec(f, params, spec, x, key=jax.random.key(2)) < 1e-5


def test_mlp_of_eleven_layers_is_read_in_order():
    init, _ = make_mlp(tuple(range(2, 14)))
    params = jax.eval_shape(lambda: init(jax.random.key(0), 4))
    assert list(unit_counts(params, mlp_spec(params)).values()) == list(range(2, 13))


CONVS = {
    "paper": ConvConfig((4, 5, 6), 3),
    "vgg": ConvConfig((4, "pool", 5, 6, "pool"), 3, hidden=(7, 5), use_bias=True, norm=True),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name):
    net = make_convnet(CONVS[name])
    params = shaken(net.init(jax.random.key(0), (6, 8, 2)))
    spec = conv_spec(params)
    counts = {"channels_0": 4, "channels_1": 5, "channels_2": 6}
    assert unit_counts(params, spec) == (counts if name == "paper" else {**counts, "hidden_0": 7, "hidden_1": 5})
    (after_flatten,) = [axis for _, axis in spec.of_group("channels_2", reads=True)]
    assert after_flatten.outer == (48 if name == "paper" else 2)
    x = jax.random.normal(jax.random.key(1), (3, 6, 8, 2))
    assert check_spec(net.f, params, spec, x, key=jax.random.key(2)) < 1e-5


def test_units_of_a_convnet_are_named_as_its_groups():
    net = make_convnet(CONVS["vgg"])
    params = net.init(jax.random.key(0), (6, 8, 2))
    units = net.units(params, jnp.ones((1, 6, 8, 2)))
    counts = unit_counts(params, conv_spec(params))
    assert {group: units[group].shape[-1] for group in counts} == counts


@pytest.mark.parametrize("make", [make_mlm_logits, make_class_logits])
def test_encoder(small, make):
    spec = encoder_spec(small.params, small.config)
    assert unit_counts(small.params, spec) == {"heads": 2, "residual": 8, "mlp": 12}
    assert spec.normalized == {"residual"}
    f, mask = make(small.config), small.batch.attention_mask
    shown = (lambda p, x: f(p, x) * mask[:, :, None]) if make is make_mlm_logits else f
    assert check_spec(shown, small.params, spec, small.batch, key=jax.random.key(0)) < 1e-5


def test_encoder_spec_without_heads_and_from_shapes_alone(small):
    encoder = {"encoder": small.params["encoder"]}
    spec = encoder_spec(jax.eval_shape(lambda: encoder), small.config)
    assert unit_counts(encoder, spec) == {"heads": 2, "residual": 8, "mlp": 12}


@pytest.mark.parametrize("forgotten", ["encoder/layers/mlp/in/bias", "mlm/dense/kernel", "encoder/embeddings/token"])
def test_encoder_without_one_leaf_is_found_out(small, forgotten):
    axes = {p: a for p, a in encoder_spec(small.params, small.config).leaves if p != forgotten}
    spec = make_permutation_spec(axes)
    with pytest.raises(ValueError, match="permuting a group must leave the outputs as they are"):
        check_spec(make_mlm_logits(small.config), small.params, spec, small.batch, key=jax.random.key(0))
