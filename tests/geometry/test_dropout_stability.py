"""Networks with units dropped: what the masks keep, what the network computes, how much the loss rises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import TokenBatch
from jaxft.core.units import UnitAxis, make_permutation_spec
from jaxft.geometry.dropout_line import (
    bernoulli_masks,
    best_dropout_line,
    dropout_line,
    dropout_output_variance,
)
from jaxft.geometry.dropout_stability import (
    complement_masks,
    dropout_masks,
    dropout_params,
    dropout_stability,
    layer_depths,
)
from jaxft.nn import make_features
from jaxft.nn.transformer import EncoderConfig, init_encoder
from jaxft.nn.unit_specs import encoder_spec

SPEC = make_permutation_spec(
    {
        "in/kernel": (UnitAxis("first", 1),),
        "in/bias": (UnitAxis("first", 0),),
        "mid/kernel": (UnitAxis("first", 0, reads=True), UnitAxis("second", 1)),
        "mid/bias": (UnitAxis("second", 0),),
        "out/kernel": (UnitAxis("second", 0, reads=True),),
    }
)
STACKED = make_permutation_spec(
    {
        "in/kernel": (UnitAxis("mlp", 2, stacked=True),),
        "out/kernel": (UnitAxis("mlp", 1, reads=True, stacked=True),),
    }
)
WIDTHS = {"in": (3, 7), "mid": (7, 8), "out": (8, 2)}


def network(seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    params = {}
    for i, (name, shape) in enumerate(WIDTHS.items()):
        bias = jax.random.normal(keys[2 * i + 1], shape[1:])
        params[name] = {"kernel": jax.random.normal(keys[2 * i], shape), "bias": bias}
    return params


def with_factors(params, x, first, second):
    """GELU, which is not homogeneous, and factors on the units themselves."""
    h = jax.nn.gelu(x @ params["in"]["kernel"] + params["in"]["bias"][None]) * first[None]
    h = jax.nn.gelu(h @ params["mid"]["kernel"] + params["mid"]["bias"][None]) * second[None]
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def f(params, x):
    return with_factors(params, x, jnp.ones(7), jnp.ones(8))


def loss(params, x):
    return jnp.mean((f(params, x) - 1) ** 2)


X = jax.random.normal(jax.random.key(9), (2, 5, 3))


@pytest.mark.parametrize(("keep_frac", "kept"), [(0.5, (3, 4)), (0.3, (2, 2)), (1.0, (7, 8))])
def test_masks_keep_an_exact_count(keep_frac, kept):
    masks = dropout_masks(network(), SPEC, key=jax.random.key(0), keep_frac=keep_frac, draws=50)
    assert masks["first"].shape == (50, 7)
    for group, count in zip(("first", "second"), kept, strict=True):
        assert set(masks[group].sum(axis=1).tolist()) == {count}


def test_every_unit_is_kept_equally_often():
    masks = dropout_masks(network(), SPEC, key=jax.random.key(0), draws=2000)
    for group, fraction in (("first", 3 / 7), ("second", 0.5)):
        assert np.abs(masks[group].mean(axis=0) - fraction).max() < 5 * np.sqrt(0.25 / 2000)


def test_a_mask_depends_on_its_group_and_key_alone():
    key = jax.random.key(3)
    both = dropout_masks(network(), SPEC, key=key)
    one = dropout_masks(network(), SPEC, key=key, groups=["second"])
    assert list(one) == ["second"]
    assert (one["second"] == both["second"]).all()


def test_stacked_masks_differ_by_layer():
    params = {"in": {"kernel": jnp.ones((4, 2, 16))}, "out": {"kernel": jnp.ones((4, 16, 2))}}
    mask = dropout_masks(params, STACKED, key=jax.random.key(0))["mlp"]
    assert mask.shape == (4, 16)
    assert (mask.sum(axis=1) == 8).all()
    assert len({tuple(row) for row in mask.tolist()}) == 4


def test_complement_of_an_odd_layer_keeps_at_most_half():
    masks = dropout_masks(network(), SPEC, key=jax.random.key(1))
    other, whole = complement_masks(masks), complement_masks(masks, at_most_half=False)
    assert [int(other[g].sum()) for g in ("first", "second")] == [3, 4]
    assert [int(whole[g].sum()) for g in ("first", "second")] == [4, 4]
    for group, mask in masks.items():
        assert not (mask & other[group]).any()
        assert (mask ^ whole[group]).all()


@pytest.mark.parametrize("rescale", [True, False, 1.7])
def test_dropped_network_computes_what_factors_on_its_units_do(x64, rescale):
    params = jax.tree.map(lambda a: a.astype(float), network())
    masks = dropout_masks(params, SPEC, key=jax.random.key(2))
    x = X[0].astype(float)
    factor = {True: (7 / 3, 8 / 4), False: (1.0, 1.0), 1.7: (1.7, 1.7)}[rescale]
    factors = [masks[g].astype(float) * c for g, c in zip(("first", "second"), factor, strict=True)]
    got = f(dropout_params(params, SPEC, masks, rescale=rescale), x)
    np.testing.assert_allclose(got, with_factors(params, x, *factors), rtol=1e-10)


def test_dropping_all_of_nothing_changes_nothing():
    params = network()
    masks = {"first": jnp.ones(7, bool), "second": jnp.ones(8, bool)}
    dropped = dropout_params(params, SPEC, masks)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, dropped))


def test_start_layers_drop_the_layers_above(x64):
    params = jax.tree.map(lambda a: a.astype(float), network())
    batches = X.astype(float)
    masks = dropout_masks(params, SPEC, key=jax.random.key(4), draws=5)
    found = dropout_stability(loss, params, SPEC, batches, masks=masks)
    for draw in range(5):
        one = {g: m[draw] for g, m in masks.items()}
        for start, groups in enumerate((["second"], ["first", "second"])):
            dropped = dropout_params(params, SPEC, one, groups=groups)
            want = np.mean([loss(dropped, batch) for batch in batches])
            np.testing.assert_allclose(found.losses[draw, start], want, rtol=1e-10)
    rise = np.maximum(found.losses.max(axis=1) - found.loss, 0)
    np.testing.assert_allclose(found.epsilon, rise, rtol=1e-10)
    np.testing.assert_allclose([found.epsilon_best, found.epsilon_median], [rise.min(), np.median(rise)], rtol=1e-10)
    assert (found.masks["first"] == masks["first"][int(rise.argmin())]).all()


def test_order_of_the_layers_is_that_of_the_spec_and_not_of_the_names():
    """``z`` lies below ``a``, and a traced mapping comes in the order of its names."""
    rename = {"first": "z", "second": "a"}
    leaves = {
        path: tuple(UnitAxis(rename[axis.units], axis.axis, axis.reads) for axis in axes) for path, axes in SPEC.leaves
    }
    other = make_permutation_spec(leaves)
    masks = dropout_masks(network(), SPEC, key=jax.random.key(4), draws=2)
    found = dropout_stability(loss, network(), SPEC, X, masks=masks)
    renamed = dropout_stability(loss, network(), other, X, masks={rename[g]: m for g, m in masks.items()})
    np.testing.assert_allclose(found.losses, renamed.losses, rtol=1e-6)


def test_stability_draws_the_masks_of_its_key_and_works_under_jit():
    key = jax.random.key(5)
    masks = dropout_masks(network(), SPEC, key=key, draws=4)
    drawn = dropout_stability(loss, network(), SPEC, X, key=key, draws=4)
    given = jax.jit(lambda p, m: dropout_stability(loss, p, SPEC, X, masks=m))(network(), masks)
    np.testing.assert_allclose(drawn.losses, given.losses, rtol=1e-5)


def test_a_dropout_network_that_overflows_is_not_the_best():
    def cold(params, _):
        dropped = (params["out"]["kernel"][:, 0] == 0).any() & (params["out"]["kernel"][0, 0] == 0)
        return jnp.where(dropped, jnp.nan, 1.0)

    found = dropout_stability(cold, network(), SPEC, X, key=jax.random.key(0), draws=8)
    assert np.isinf(found.epsilon).any()
    assert float(found.epsilon_best) == 0.0


def stacked_network(params, x):
    for w, v in zip(params["in"]["kernel"], params["out"]["kernel"], strict=True):
        x = x + jnp.tanh(x @ w) @ v
    return x


def test_layers_of_a_stack_are_start_layers():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (3, 2, 4))},
        "out": {"kernel": jax.random.normal(keys[1], (3, 4, 2))},
    }
    x = X[:, :, :2]
    found = dropout_stability(
        lambda p, b: jnp.mean(stacked_network(p, b) ** 2), params, STACKED, x, key=jax.random.key(1), draws=2
    )
    assert found.losses.shape == (2, 3)
    mask = found.masks["mlp"]
    draw = int(found.epsilon.argmin())
    for start in range(3):
        factors = jnp.where(jnp.arange(3)[:, None] >= 2 - start, 2.0 * mask.astype(jnp.float32), jnp.ones((3, 4)))
        scaled = {"in": params["in"], "out": {"kernel": params["out"]["kernel"] * factors[:, :, None]}}
        want = np.mean([jnp.mean(stacked_network(scaled, b) ** 2) for b in x])
        np.testing.assert_allclose(found.losses[draw, start], want, rtol=1e-5)


def test_stacked_groups_that_follow_one_another_share_their_layers():
    spec = make_permutation_spec(
        {"a": (UnitAxis("stem", 0),), "b": (UnitAxis("heads", 1, stacked=True), UnitAxis("mlp", 2, stacked=True))}
    )
    depths, total = layer_depths({"a": np.zeros(4), "b": np.zeros((5, 4, 8))}, spec, ("stem", "heads", "mlp"))
    assert total == 6
    assert depths["stem"].tolist() == 0
    assert depths["heads"].tolist() == depths["mlp"].tolist() == [1, 2, 3, 4, 5]


def test_variance_of_dropout_is_that_of_all_masks(x64):
    """All 2^4 masks of four units, by their probabilities."""
    draw = np.random.default_rng(0)
    hidden, kernel, p = draw.normal(size=(3, 4)), draw.normal(size=(4, 2)), 0.3
    total = np.zeros(3)
    for bits in np.ndindex(2, 2, 2, 2):
        kept = np.array(bits)
        weight = np.prod(np.where(kept, 1 - p, p))
        total += weight * (((hidden * (kept / (1 - p) - 1)) @ kernel) ** 2).sum(axis=1)
    found = dropout_output_variance(jnp.asarray(hidden), jnp.asarray(kernel), dropout_frac=p)
    np.testing.assert_allclose(found, total, rtol=1e-10)


def test_independent_masks_drop_each_unit_with_the_chance_asked_for():
    masks = bernoulli_masks(network(), SPEC, key=jax.random.key(0), dropout_frac=0.25, draws=2000)
    assert masks["second"].shape == (2000, 8)
    assert np.abs(masks["second"].mean(axis=0) - 0.75).max() < 5 * np.sqrt(0.1875 / 2000)
    assert len(set(masks["second"].sum(axis=1).tolist())) > 3


def test_line_ends_at_the_dropout_network_exactly():
    masks = bernoulli_masks(network(), SPEC, key=jax.random.key(1), dropout_frac=0.25)
    line = dropout_line(network(), SPEC, masks, dropout_frac=0.25)
    ends = network(), dropout_params(network(), SPEC, masks, rescale=1 / 0.75)
    for t, end in zip((0.0, 1.0), ends, strict=True):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), line(t), end))


def test_best_line_is_the_best_of_its_draws():
    found = best_dropout_line(loss, network(), SPEC, X, key=jax.random.key(2), dropout_frac=0.25, draws=6)
    masks = bernoulli_masks(network(), SPEC, key=jax.random.key(2), dropout_frac=0.25, draws=6)
    for draw in range(6):
        dropped = dropout_params(network(), SPEC, {g: m[draw] for g, m in masks.items()}, rescale=1 / 0.75)
        np.testing.assert_allclose(found.losses[draw], np.mean([loss(dropped, b) for b in X]), rtol=1e-5)
    end = np.mean([loss(found.line(1.0), b) for b in X])
    np.testing.assert_allclose(end, found.losses.min(), rtol=1e-5)


def test_inner_units_of_a_transformer_are_dropped_layer_by_layer():
    """A unit whose incoming weights and bias are 0 puts out gelu(0) = 0: another way to drop it."""
    config = EncoderConfig("bert", 9, 4, 3, 2, 8, 5, 2, 1e-12, pad_id=0)
    params = init_encoder(config, key=jax.random.key(0))
    spec = encoder_spec(params, config)
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    batch = TokenBatch(ids, jnp.ones_like(ids), jnp.zeros_like(ids), jnp.zeros(2, int))

    features = make_features(config)

    def hidden(params):
        return features(params, batch)

    def mean(params, batch):
        return jnp.mean(features(params, batch)[..., 0])

    masks = dropout_masks(params, spec, key=jax.random.key(1), groups=["mlp"])
    assert masks["mlp"].shape == (3, 8)
    dropped = dropout_params(params, spec, masks, rescale=False)
    factor = masks["mlp"].astype(jnp.float32)
    layer = params["encoder"]["layers"]["mlp"]["in"]
    other = jax.tree.map(lambda x: x, params)
    other["encoder"]["layers"]["mlp"]["in"] = {
        "kernel": layer["kernel"] * factor[:, None, :],
        "bias": layer["bias"] * factor,
    }
    np.testing.assert_allclose(hidden(dropped), hidden(other), atol=1e-5)
    assert np.abs(hidden(dropped) - hidden(params)).max() > 1e-4
    batches = jax.tree.map(lambda x: x[None], batch)
    found = dropout_stability(mean, params, spec, batches, key=jax.random.key(2), groups=["mlp"], draws=3)
    assert found.losses.shape == (3, 3)
