"""What a decoder's states depend on, and what they do not."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import path_name
from jaxft.core.trees import tree_cast
from jaxft.core.types import CausalTokens
from jaxft.nn.decoder import Decoder, DecoderConfig, _attended, decoder_config, init_decoder, unembedding_table
from jaxft.nn.rope import RopeScaling, rope_frequencies

SIZES: dict[str, Any] = {"vocab_size": 13}
SIZES |= {"width": 16, "layers": 2, "heads": 2, "mlp_width": 12, "max_positions": 16, "scan_layers": True}
CONFIGS = {
    "gpt2": decoder_config("gpt2", **SIZES),
    "gpt_neox": decoder_config("gpt_neox", **SIZES, rope_frac=0.5),
    "llama": decoder_config("llama", **SIZES, kv_heads=1, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 8)),
    "olmo": decoder_config("olmo", **SIZES, clip_qkv=1.5),
    "olmo2": decoder_config("olmo2", **SIZES, kv_heads=1, head_width=12, tied=True),
}
WITHOUT_POSITIONS = ["gpt_neox", "llama", "olmo", "olmo2"]
SEGMENTS = np.array([[0, 1, 1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 2, 3, 0, 0]])
"""A trunk and two branches, padded on the left in one row and on the right in the other."""
POSITIONS = np.array([[0, 0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 3, 4, 2, 0, 0]])


@cache
def make_params(config: DecoderConfig) -> Any:
    """All parameters random, in float32, so that a bias or a scale that is left out shows."""
    draw = np.random.default_rng(0)
    with jax.enable_x64(False):
        params = init_decoder(config, key=jax.random.key(0))
        return jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype), params)


def make_tokens(**changes) -> CausalTokens:
    ids = np.random.default_rng(1).integers(1, 13, size=SEGMENTS.shape)
    fields = {"input_ids": ids, "segment_ids": SEGMENTS, "positions": POSITIONS, **changes}
    return CausalTokens(**{name: jnp.asarray(x, jnp.int32) for name, x in fields.items()})


@partial(jax.jit, static_argnums=0)
def forward(config, params, tokens) -> Any:
    return Decoder(config).apply({"params": params["decoder"]}, tokens)


def states(family: str, params=None, tokens=None, **changes) -> np.ndarray:
    config = dataclasses.replace(CONFIGS[family], **changes)
    params = make_params(config) if params is None else params
    return np.asarray(forward(config, params, make_tokens() if tokens is None else tokens))


def changed(row: int, column: int) -> CausalTokens:
    """The tokens, one of which is another."""
    tokens = make_tokens()
    return tokens._replace(input_ids=tokens.input_ids.at[row, column].set(0))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_token_is_seen_by_those_after_it_in_its_branch_and_if_it_is_in_the_trunk_by_all(family):
    params, whole = make_params(CONFIGS[family]), states(family)
    for row, column in [(0, 2), (0, 4), (0, 6), (1, 1), (1, 3), (1, 5), (0, 0), (1, 6)]:
        other = states(family, params, changed(row, column))
        differ = np.abs(other - whole).max(axis=-1) > 0
        segment, at = SEGMENTS[row], np.arange(8)
        sees = (at >= column) & (segment > 0) & ((segment[column] == 1) | (segment == segment[column]))
        expected = sees if segment[column] else np.zeros(8, bool)
        # What stands at padding has no meaning.
        np.testing.assert_array_equal(differ[row] & (segment > 0), expected)
        assert not differ[1 - row].any()


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_gradients_are_finite_and_reach_the_rows_of_tokens_alone(family):
    config, tokens = CONFIGS[family], make_tokens()
    used = jnp.asarray(SEGMENTS > 0)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 16)), jnp.float32)

    def loss(params):
        return (jnp.where(used[:, :, None], forward(config, params, tokens), 0) * weights).sum()

    grads = jax.grad(loss)(make_params(config))["decoder"]
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    reached = set(np.flatnonzero(np.abs(grads["embeddings"]["token"]).sum(axis=1)).tolist())
    assert reached == set(np.asarray(tokens.input_ids)[SEGMENTS > 0].tolist())


def test_a_row_of_padding_alone_is_finite():
    tokens = make_tokens(segment_ids=0 * SEGMENTS)
    config = CONFIGS["llama"]
    grads = jax.grad(lambda params: (forward(config, params, tokens) ** 2).sum())(make_params(config))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads["decoder"]))


def test_compilation_changes_nothing():
    tokens, params = make_tokens(), make_params(CONFIGS["llama"])

    @partial(jax.jit, static_argnums=0)
    def value_and_grads(config, params):
        return jax.value_and_grad(lambda p: (forward(config, p, tokens) ** 3).sum())(params)

    scanned, unrolled, again = (
        jax.tree.leaves(value_and_grads(dataclasses.replace(CONFIGS["llama"], **options), params))
        for options in ({}, {"scan_layers": False}, {"remat": True})
    )
    for a, *others in zip(scanned, unrolled, again, strict=True):
        for b in others:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(a).max())))


def test_jit_equals_no_jit():
    params = make_params(CONFIGS["olmo2"])
    plain: Any = Decoder(CONFIGS["olmo2"]).apply({"params": params["decoder"]}, make_tokens())
    np.testing.assert_allclose(states("olmo2", params), plain, atol=5e-6)


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_precisions_agree(family):
    params, used = make_params(CONFIGS[family]), SEGMENTS > 0
    single = states(family, params)
    with jax.enable_x64(True):
        double = forward(CONFIGS[family], tree_cast(params, jnp.float64), make_tokens())
    assert double.dtype == jnp.float64
    np.testing.assert_allclose(single[used], np.asarray(double)[used], atol=2e-5)
    half = forward(CONFIGS[family], tree_cast(params, jnp.bfloat16), make_tokens())
    assert half.dtype == jnp.bfloat16
    error = np.asarray(half, np.float32)[used] - single[used]
    assert 1e-4 < np.sqrt((error**2).mean() / (single[used] ** 2).mean()) < 0.05


def test_computing_in_bfloat16_leaves_the_parameters_as_they_are():
    params = make_params(CONFIGS["llama"])
    config = dataclasses.replace(CONFIGS["llama"], dtype="bfloat16")
    out, grads = jax.value_and_grad(lambda p: forward(config, p, make_tokens()).astype(jnp.float32).sum())(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert np.isfinite(out)
    assert forward(config, params, make_tokens()).dtype == jnp.bfloat16


@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_rotary_positions_count_by_their_differences(family):
    params, used = make_params(CONFIGS[family]), SEGMENTS > 0
    shifted = states(family, params, make_tokens(positions=POSITIONS + 5))
    np.testing.assert_allclose(shifted[used], states(family, params)[used], atol=2e-5)
    stretched = states(family, params, make_tokens(positions=2 * POSITIONS))
    assert np.abs(stretched - states(family, params))[used].max() > 1e-3


def test_learned_positions_are_rows_of_their_table():
    params = make_params(CONFIGS["gpt2"])
    table = params["decoder"]["embeddings"]["position"]
    rolled = {**params["decoder"]["embeddings"], "position": jnp.roll(table, 5, axis=0)}
    moved = {"decoder": {**params["decoder"], "embeddings": rolled}}
    shifted = states("gpt2", moved, make_tokens(positions=POSITIONS + 5))
    np.testing.assert_allclose(shifted, states("gpt2", params), atol=1e-6)


def test_linear_scaling_divides_the_positions():
    params = make_params(CONFIGS["olmo"])
    slowed = states("olmo", params, make_tokens(positions=3 * POSITIONS), rope_scaling=RopeScaling("linear", 3.0))
    np.testing.assert_allclose(slowed, states("olmo", params), atol=1e-5)


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    plain = rope_frequencies(128, theta=500000.0)
    share = rope_frequencies(128, theta=500000.0, scaling=scaling) / plain
    wavelengths = 2 * np.pi / plain
    assert (share[wavelengths < 8192 / 4] == 1).all()
    np.testing.assert_allclose(share[wavelengths > 8192], 1 / 8)
    between = (wavelengths >= 8192 / 4) & (wavelengths <= 8192)
    assert between.sum() > 3
    # As the rule is published: a mix of both by the inverse wavelength.
    mix = (8192 / wavelengths - 1) / (4 - 1)
    np.testing.assert_allclose(share[between], ((1 - mix) / 8 + mix)[between])


def test_shared_keys_are_those_of_heads_with_equal_ones():
    shared = CONFIGS["llama"]
    params = make_params(shared)

    def repeated(path, leaf):
        # Each key and value head stands for the heads that share it.
        if not path_name(path).endswith(("key/kernel", "value/kernel")):
            return leaf
        return jnp.repeat(leaf.reshape(2, 16, 1, 8), 2, axis=2).reshape(2, 16, 16)

    full = jax.tree_util.tree_map_with_path(repeated, params)
    np.testing.assert_allclose(states("llama", full, kv_heads=2), states("llama", params), atol=2e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_and_its_gradients_equal_those_of_jax_nn(heads):
    draw = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(draw.normal(size=(2, 5, h, 3)), jnp.float32) for h in (heads[0], heads[1], heads[1])
    )
    mask = jnp.asarray(draw.random((2, 5, 5)) < 0.5) | jnp.eye(5, dtype=bool)[None]

    def theirs(query, key, value, mask):
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])

    def both(fn):
        def loss(*arrays):
            return (fn(*arrays, mask) ** 3).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

    for ours, other in zip(*(jax.tree.leaves(both(fn)) for fn in (_attended, theirs)), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5)


def test_tight_clipping_changes_the_states_and_loose_clipping_does_not():
    params = make_params(CONFIGS["olmo"])
    free = states("olmo", params, clip_qkv=None)
    np.testing.assert_array_equal(states("olmo", params, clip_qkv=1e3), free)
    assert np.abs(states("olmo", params) - free).max() > 1e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_states_are_those_after_the_final_norm(family):
    config, params = CONFIGS[family], make_params(CONFIGS[family])
    norm = params["decoder"].get("final_norm", {})
    plain = (states(family, params) - np.asarray(norm.get("bias", 0))) / np.asarray(norm.get("scale", 1))
    np.testing.assert_allclose((plain**2).mean(axis=-1), 1, atol=1e-4)
    centred = config.family in ("gpt2", "gpt_neox", "olmo")
    assert (np.abs(plain.mean(axis=-1)).max() < 1e-5) == centred


def shapes(family: str, **changes) -> dict[str, tuple[int, ...]]:
    params = jax.eval_shape(
        lambda: init_decoder(dataclasses.replace(CONFIGS[family], **changes), key=jax.random.key(0))
    )
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_the_parameters_of_a_family_are_those_it_has():
    names = {family: set(shapes(family)) for family in CONFIGS}
    rotary, norms = names["olmo"], {"decoder/layers/attention_norm/scale", "decoder/layers/mlp_norm/scale"}
    norms |= {"decoder/final_norm/scale"}
    query_key = {f"decoder/layers/attention/{name}_norm/scale" for name in ("query", "key")}
    assert not any("norm" in name or "bias" in name for name in rotary)
    assert names["llama"] == rotary | norms
    assert names["olmo2"] == (rotary | norms | query_key) - {"unembedding/table"}
    assert names["gpt2"] - names["gpt_neox"] == {"decoder/embeddings/position"}
    assert names["gpt_neox"] - names["gpt2"] == {"unembedding/table"}
    dense = {name.removesuffix("/kernel") for name in names["gpt2"] if name.endswith("/kernel")}
    assert {f"{name}/bias" for name in dense} < names["gpt2"]
    biased = set(shapes("llama", qkv_bias=True, output_bias=True, mlp_bias=True))
    assert biased - names["llama"] == {f"{name}/bias" for name in dense | {"decoder/layers/mlp/gate"}}


def test_shapes_are_stacked_by_layer():
    sizes = shapes("olmo2")
    assert sizes["decoder/layers/attention/query/kernel"] == (2, 16, 24)
    assert sizes["decoder/layers/attention/key/kernel"] == (2, 16, 12)
    assert sizes["decoder/layers/attention/output/kernel"] == (2, 24, 16)
    assert sizes["decoder/layers/attention/query_norm/scale"] == (2, 24)
    assert sizes["decoder/layers/attention/key_norm/scale"] == (2, 12)
    assert sizes["decoder/layers/mlp/gate/kernel"] == (2, 16, 12)
    assert shapes("llama")["unembedding/table"] == (13, 16)


def test_random_kernels_have_the_deviation_asked_for():
    config = dataclasses.replace(CONFIGS["llama"], width=64, mlp_width=64, init_scale=0.5)
    params = init_decoder(config, key=jax.random.key(1))
    for kernel in (params["decoder"]["layers"]["mlp"]["in"]["kernel"], unembedding_table(config, params)):
        np.testing.assert_allclose(np.std(kernel), 0.5, rtol=0.1)
    assert (params["decoder"]["layers"]["mlp_norm"]["scale"] == 1).all()


def test_the_unembedding_is_a_leaf_of_the_parameters():
    tied, own = make_params(CONFIGS["gpt2"]), make_params(CONFIGS["llama"])
    assert unembedding_table(CONFIGS["gpt2"], tied) is tied["decoder"]["embeddings"]["token"]
    assert unembedding_table(CONFIGS["llama"], own) is own["unembedding"]["table"]
