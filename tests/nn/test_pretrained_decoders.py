import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxft.core.checks import path_name
from jaxft.nn.checkpoint_files import leaf_shapes
from jaxft.nn.decoder import decoder_config, init_decoder
from jaxft.nn.decoder_names import DECODERS, decoder_entries
from jaxft.nn.pretrained_decoders import load_decoder, save_decoder
from jaxft.nn.rope import RopeScaling

WEIGHTS = "model.safetensors"
SIZES = {"vocab_size": 7, "width": 8, "layers": 2, "heads": 2, "mlp_width": 12, "max_positions": 10}
LLAMA3 = RopeScaling("llama3", 4.0, 1.0, 4.0, 5)
CONFIGS = {
    "gpt2": decoder_config("gpt2", **SIZES),
    "gpt2 untied": decoder_config("gpt2", **SIZES, tied=False, activation="silu"),
    "gpt_neox": decoder_config("gpt_neox", **SIZES, rope_frac=0.5),
    "gpt_neox other": decoder_config(
        "gpt_neox",
        **SIZES,
        tied=True,
        rope_theta=500.0,
        rope_frac=1.0,
        rope_scaling=RopeScaling("linear", 2.0),
        parallel_residual=False,
        qkv_bias=False,
        output_bias=False,
        activation="gelu_tanh",
    ),
    "llama": decoder_config("llama", **SIZES, kv_heads=1, head_width=6, rope_scaling=LLAMA3),
    "llama other": decoder_config(
        "llama", **SIZES, tied=True, norm_eps=1e-5, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "olmo": decoder_config("olmo", **SIZES, clip_qkv=0.5, tied=True),
    "olmo2": decoder_config("olmo2", **SIZES, kv_heads=1, norm_eps=1e-6),
}


@functools.cache
def random_params(config):
    """Parameters no two of which are alike, without compiling the model."""
    draw = np.random.default_rng(0)
    tree = jax.eval_shape(lambda key: init_decoder(config, key=key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), tree)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def folder(config, tmp_path):
    save_decoder(tmp_path / "saved", config, random_params(config))
    return tmp_path / "saved"


def rewrite(folder, change):
    """Applies ``change`` to the dictionary of tensors in a folder."""
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(folder / WEIGHTS)), folder / WEIGHTS)


def configure(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=path_name(path))


def test_round_trip_is_bitwise(config, folder, tmp_path):
    loaded = load_decoder(folder)
    assert loaded.config == config
    assert_equal(loaded.params, random_params(config))
    save_decoder(tmp_path / "again", loaded.config, loaded.params)
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    assert (folder / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


def test_rules_fill_every_leaf_once(config):
    leaves = leaf_shapes(lambda key: init_decoder(config, key=key))
    filled = [(path, entry.layer) for entry in decoder_entries(config).values() for path in entry.paths]
    assert {path for path, _ in filled} == set(leaves)
    assert len(set(filled)) == len(filled)
    assert {path for path, layer in filled if layer is None} == {path for path in leaves if "/layers/" not in path}
    assert {layer for _, layer in filled} == {None, 0, 1}


def test_the_prefix_may_be_missing_and_constants_there(config, folder):
    names = DECODERS[config.family]
    layer = {"gpt2": "h.1.attn.", "gpt_neox": "layers.1.attention."}.get(
        config.family, "layers.1.self_attn.rotary_emb."
    )
    buffers = {"gpt2": ("bias", "masked_bias"), "gpt_neox": ("bias", "masked_bias", "rotary_emb.inv_freq")}
    extra = {layer + name: np.zeros((1, 2), np.uint8) for name in buffers.get(config.family, ("inv_freq",))}

    rewrite(folder, lambda tensors: tensors | {names.prefix + name: x for name, x in extra.items()})
    assert_equal(load_decoder(folder).params, random_params(config))
    rewrite(folder, lambda tensors: {name.removeprefix(names.prefix): x for name, x in tensors.items()})
    assert_equal(load_decoder(folder).params, random_params(config))


@pytest.fixture
def llama(tmp_path):
    """A folder of an untied Llama."""
    save_decoder(tmp_path / "llama", CONFIGS["llama"], random_params(CONFIGS["llama"]))
    return tmp_path / "llama"


@pytest.fixture
def gpt2(tmp_path):
    """A folder of a tied GPT-2."""
    save_decoder(tmp_path / "gpt2", CONFIGS["gpt2"], random_params(CONFIGS["gpt2"]))
    return tmp_path / "gpt2"


def test_fused_tensors_are_laid_out_as_the_families_say(tmp_path):
    for name in ("gpt2", "gpt_neox"):
        save_decoder(tmp_path / name, CONFIGS[name], random_params(CONFIGS[name]))
    block = safetensors.numpy.load_file(tmp_path / "gpt2" / WEIGHTS)["transformer.h.1.attn.c_attn.weight"]
    by_head = safetensors.numpy.load_file(tmp_path / "gpt_neox" / WEIGHTS)
    by_head = by_head["gpt_neox.layers.1.attention.query_key_value.weight"]
    for i, name in enumerate(("query", "key", "value")):
        kernels = [random_params(CONFIGS[k])["decoder"]["layers"]["attention"][name]["kernel"][1] for k in CONFIGS]
        gpt2, gpt_neox = kernels[0], kernels[list(CONFIGS).index("gpt_neox")]
        np.testing.assert_array_equal(block[:, 8 * i : 8 * (i + 1)], gpt2)
        for head in range(2):
            rows = by_head[12 * head + 4 * i : 12 * head + 4 * (i + 1)]
            np.testing.assert_array_equal(rows.T, gpt_neox[:, 4 * head : 4 * (head + 1)])


def test_shards_load_equal(llama):
    tensors = safetensors.numpy.load_file(llama / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({k: tensors[k] for k in part}, llama / file)
    index = {"weight_map": {k: file for file, part in shards.items() for k in part}}
    (llama / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (llama / WEIGHTS).unlink()
    assert_equal(load_decoder(llama).params, random_params(CONFIGS["llama"]))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_precisions_are_widened_or_kept(llama, dtype):
    rewrite(llama, lambda tensors: {k: x.astype(dtype) for k, x in tensors.items()})
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype), random_params(CONFIGS["llama"]))
    assert_equal(load_decoder(llama).params, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    kept = jnp.float32 if dtype == np.float64 else dtype
    assert_equal(load_decoder(llama, dtype="as_stored").params, jax.tree.map(lambda x: x.astype(kept), rounded))
    halved = load_decoder(llama, dtype="bfloat16").params
    assert_equal(halved, jax.tree.map(lambda x: x.astype(jnp.bfloat16), rounded))


def test_a_leaf_stored_in_two_precisions_takes_the_wider(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(llama, lambda tensors: tensors | {name: tensors[name].astype(ml_dtypes.bfloat16)})
    mlp = load_decoder(llama, dtype="as_stored").params["decoder"]["layers"]["mlp"]
    right = random_params(CONFIGS["llama"])["decoder"]["layers"]["mlp"]["in"]["kernel"]
    assert mlp["in"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(mlp["in"]["kernel"][0], right[0])
    np.testing.assert_array_equal(mlp["in"]["kernel"][1], right[1].astype(jnp.bfloat16).astype(jnp.float32))


def test_half_precision_survives_a_round_trip_bitwise(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(CONFIGS["gpt_neox"]))
    save_decoder(tmp_path / "a", CONFIGS["gpt_neox"], params)
    loaded = load_decoder(tmp_path / "a", dtype="as_stored")
    assert_equal(loaded.params, params)
    assert loaded.raw_config["torch_dtype"] == "bfloat16"


def test_a_copy_of_a_tied_table_is_accepted_and_a_newer_name_of_the_unembedding(gpt2, tmp_path):
    rewrite(gpt2, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].copy()})
    assert_equal(load_decoder(gpt2).params, random_params(CONFIGS["gpt2"]))
    save_decoder(tmp_path / "neox", CONFIGS["gpt_neox"], random_params(CONFIGS["gpt_neox"]))
    rewrite(tmp_path / "neox", lambda t: {k.replace("embed_out", "lm_head"): x for k, x in t.items()})
    assert_equal(load_decoder(tmp_path / "neox").params, random_params(CONFIGS["gpt_neox"]))


def test_fields_left_out_have_the_defaults_of_transformers(gpt2, llama):
    sizes = ("model_type", "vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner")
    configure(gpt2, lambda raw: {k: raw[k] for k in sizes})
    assert load_decoder(gpt2).config == CONFIGS["gpt2"]
    kept = ("model_type", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size")
    shared = ("max_position_embeddings", "num_key_value_heads", "head_dim")
    configure(llama, lambda raw: {k: raw[k] for k in (*kept, *shared)} | {"attention_dropout": 0.1, "use_cache": True})
    assert load_decoder(llama).config == dataclasses.replace(CONFIGS["llama"], rope_scaling=None)


def test_old_and_new_fields_of_positions_say_the_same(llama):
    new = load_decoder(llama).config
    configure(llama, lambda raw: {k: x for k, x in raw.items() if k not in ("rope_scaling", "rope_theta")})
    assert load_decoder(llama).config == new
    old = {"type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4}
    old |= {"original_max_position_embeddings": 5}
    configure(llama, lambda raw: raw | {"rope_parameters": None, "rope_scaling": old, "rope_theta": 10000})
    assert load_decoder(llama).config == new


def test_further_fields_of_the_old_configuration_are_carried_along(llama, tmp_path):
    loaded = load_decoder(llama)
    raw = loaded.raw_config | {"eos_token_id": [2, 5], "dtype": "float16", "rope_theta": 1.0, "hidden_size": 99}
    save_decoder(tmp_path / "b", loaded.config, loaded.params, raw_config=raw)
    again = load_decoder(tmp_path / "b")
    assert again.config == loaded.config
    assert again.raw_config["eos_token_id"] == [2, 5]
    assert "dtype" not in again.raw_config
    assert loaded.raw_config["eos_token_id"] is None


def test_fields_that_are_no_property_of_a_checkpoint_are_not_stored(tmp_path):
    config = dataclasses.replace(CONFIGS["olmo"], scan_layers=True, remat=True, init_scale=0.5, dtype="bfloat16")
    save_decoder(tmp_path / "a", config, random_params(config))
    assert load_decoder(tmp_path / "a").config == CONFIGS["olmo"]


def test_double_precision_is_written_as_single(tmp_path, x64):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(CONFIGS["gpt2"]))
    save_decoder(tmp_path / "a", CONFIGS["gpt2"], params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(load_decoder(tmp_path / "a", dtype="as_stored").params))


def test_tokenizer_files_go_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "training_args.bin"):
        (source / name).write_text(name)
    save_decoder(tmp_path / "a", CONFIGS["olmo2"], random_params(CONFIGS["olmo2"]), tokenizer=source)
    files = {"config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja"}
    assert {x.name for x in (tmp_path / "a").iterdir()} == files


def test_a_failing_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_decoder(tmp_path / "out", CONFIGS["olmo"], random_params(CONFIGS["olmo"]))
    assert not list(tmp_path.iterdir())
