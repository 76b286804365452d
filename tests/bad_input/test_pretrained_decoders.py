"""What a user is told whose decoder checkpoint is damaged, of another kind, or asks for what is not computed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxft import nn
from jaxft.nn.decoder import decoder_config, init_decoder
from jaxft.nn.pretrained_decoders import load_decoder, save_decoder
from jaxft.nn.rope import RopeScaling

SIZES = {"vocab_size": 7, "width": 8, "layers": 2, "heads": 2, "mlp_width": 12, "max_positions": 10}
CONFIGS = {family: decoder_config(family, **SIZES) for family in ("gpt2", "llama", "olmo", "olmo2")}
CONFIGS["gpt_neox"] = decoder_config("gpt_neox", **SIZES, rope_frac=0.5)


def random_params(config):
    """Parameters of the right shapes, without compiling the model."""
    draw = np.random.default_rng(0)
    tree = jax.eval_shape(lambda key: init_decoder(config, key=key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), tree)


PARAMS = {family: random_params(config) for family, config in CONFIGS.items()}
WEIGHTS = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def saved(tmp_path):
    def save(family):
        save_decoder(tmp_path / family, CONFIGS[family], PARAMS[family])
        return tmp_path / family

    return save


@pytest.fixture
def llama(saved):
    return saved("llama")


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def yarn(**fields):
    return {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, **fields}}


FIELDS = {
    "other model": ("llama", {"model_type": "lama"}, "one of gpt2, gpt_neox, .*got 'lama'. Did you mean llama"),
    "encoder": ("llama", {"model_type": "bert"}, "load_decoder: model_type.*got 'bert'. Use load_encoder"),
    "no kind": ("llama", {"model_type": None}, "got None. Known: gpt2, gpt_neox"),
    "sizes": ("llama", {"hidden_size": None, "vocab_size": "7"}, "vocab_size='7', hidden_size=None"),
    "a flag for a number": ("llama", {"num_key_value_heads": True}, "num_key_value_heads=True"),
    "a number for a flag": ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
    "heads that do not divide": ("gpt2", {"n_head": 3}, "n_embd=8 with n_head=3"),
    "groups that do not divide": (
        "llama",
        {"num_key_value_heads": 3},
        "must describe a decoder.*heads=2 with kv_heads=3",
    ),
    "activation": ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
    "activation of gpt2": ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
    "window": ("llama", {"sliding_window": 64}, "sliding_window=64, not None"),
    "window of some layers": (
        "olmo2",
        {"layer_types": ["sliding_attention", "full_attention"]},
        "layer_types with 'sliding_attention'",
    ),
    "norm of queries": ("llama", {"qk_layernorm": True}, "qk_layernorm=True, not False"),
    "unscaled attention": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False, not True"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True, not False"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    "positions": ("llama", yarn(), "rope_type='yarn', not default, linear or llama3"),
    "older positions": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "factor=None of rope_type='linear'"),
    "half of llama3": (
        "llama",
        yarn(rope_type="llama3"),
        "low_freq_factor=None of rope_type='llama3', high_freq_factor",
    ),
    "positions by layer": ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters={'full_attention'"),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, which is GPT-NeoX's alone"),
    "odd part of a head": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_frac=0.25"),
    "all at once": (
        "llama",
        {"sliding_window": 64, "final_logit_softcapping": 30.0, **yarn()},
        "rope_type='yarn'.*, sliding_window=64, not None, final_logit_softcapping=30.0",
    ),
    "more layers than tensors": ("gpt_neox", {"num_hidden_layers": 3}, "missing: layers.2.input_layernorm.*and 4 more"),
    "fewer layers than tensors": ("gpt2", {"n_layer": 1}, "unknown: transformer.h.1"),
    "norms of another kind": ("olmo2", {"model_type": "llama"}, "unknown: .*q_norm.*missing: layers.0.input_layernorm"),
    "tied and another": (
        "llama",
        {"tie_word_embeddings": True},
        "another in lm_head.weight. .*tie_word_embeddings=false",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_wrong_fields(saved, case):
    family, fields, words = FIELDS[case]
    folder = saved(family)
    configure(folder, **fields)
    with pytest.raises(ValueError, match=words):
        load_decoder(folder)


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def pickle_only(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def shard_lost(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {QUERY: "model-2.safetensors"}}))


FILES = {
    "no config": (lambda f: (f / "config.json").unlink(), "load_decoder: needs config.json, got no such file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "neither model.safetensors nor"),
    "pickle alone": (pickle_only, "never a pickle.*AutoModelForCausalLM.from_pretrained"),
    "shard lost": (shard_lost, "needs every shard.*no model-2.safetensors"),
    "truncated": (cut, "must be a whole safetensors file.*Download it again"),
    "pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs"), "Git LFS pointer"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_folder(llama, case):
    damage, words = FILES[case]
    damage(llama)
    with pytest.raises(ValueError, match=words):
        load_decoder(llama)


def many_faults(tensors):
    tensors["model.extra"] = tensors.pop(QUERY)
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(8, np.int32)


def spoil(tensors):
    tensors[QUERY][0, 0] = np.nan


TENSORS = {
    "several faults at once": (
        many_faults,
        r"unknown: model.extra; missing: layers.1.self_attn.q_proj.weight; "
        r"of another shape: model.norm.weight expected \(8,\) got \(9,\); "
        r"not of floats: model.layers.0.input_layernorm.weight I32",
    ),
    "nan": (spoil, f"must be finite, got NaN or infinity in {QUERY}"),
    "twice": (
        lambda t: t.update({QUERY.removeprefix("model."): t[QUERY].copy()}),
        "occur once, got twice.*q_proj.weight",
    ),
    "no unembedding": (
        lambda t: t.pop("lm_head.weight"),
        "missing: lm_head.weight. .*without lm_head.weight, config.json must say tie_word_embeddings=true",
    ),
    "head of a classifier": (lambda t: t.update({"score.weight": t.pop("lm_head.weight")}), "unknown: score.weight"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(llama, case):
    damage, words = TENSORS[case]
    rewrite(llama, damage)
    with pytest.raises(ValueError, match=words):
        load_decoder(llama)


def test_too_large_for_half_precision(llama):
    rewrite(llama, lambda t: t.update({QUERY: np.full((8, 8), 1e6, np.float32)}))
    with pytest.raises(ValueError, match=f"NaN or infinity in {QUERY}"):
        load_decoder(llama, dtype="float16")


def test_the_reader_of_encoders_names_that_of_decoders(llama):
    with pytest.raises(ValueError, match=r"load_encoder: model_type.*got 'llama'. Use load_decoder"):
        nn.load_encoder(llama)


def test_no_folder_and_no_dtype(llama, tmp_path):
    with pytest.raises(ValueError, match=r"load_decoder: needs the folder of a checkpoint, got .*nowhere"):
        load_decoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*got 'int8'"):
        load_decoder(llama, dtype="int8")


def without_layers(params):
    return {**params, "decoder": {k: x for k, x in params["decoder"].items() if k != "layers"}}


SAVE = {
    "a head": ("llama", {}, lambda p: p | {"value": {"bias": jnp.zeros(1)}}, "extra value/bias. Merge adapters first"),
    "no layers": ("olmo", {}, without_layers, "missing decoder/layers/attention/key/kernel"),
    "other shape": ("llama", {"width": 10}, None, r"embeddings/token expected \(7, 10\) got \(7, 8\)"),
    "not finite": ("llama", {}, lambda p: p | {"unembedding": {"table": jnp.full((7, 8), jnp.nan)}}, "in unembedding/"),
    "clip of a llama": ("llama", {"clip_qkv": 1.0}, None, "files of llama can state, got clip_qkv=1.0. Save it in"),
    "part of a head": ("llama", {"rope_frac": 0.5}, None, "partial_rotary_factor=0.5"),
    "two eps": ("olmo", {"norm_eps": 1e-6}, None, "files of olmo can state, got norm_eps=1e-06"),
    "scaled and clipped": (
        "olmo2",
        {"clip_qkv": 1.0, "rope_scaling": RopeScaling("linear", 2.0)},
        None,
        "got clip_qkv=1.0",
    ),
}


@pytest.mark.parametrize("case", SAVE)
def test_what_cannot_be_saved(case, tmp_path):
    family, fields, change, words = SAVE[case]
    params = change(PARAMS[family]) if change else PARAMS[family]
    with pytest.raises(ValueError, match=words):
        save_decoder(tmp_path / "out", dataclasses.replace(CONFIGS[family], **fields), params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_shared_key_value_heads_have_no_place_in_a_fused_file(family, tmp_path):
    config = dataclasses.replace(CONFIGS[family], kv_heads=1)
    with pytest.raises(ValueError, match=f"files of {family} can state, got kv_heads=1"):
        save_decoder(tmp_path / "out", config, random_params(config))


def test_nothing_is_overwritten_and_a_tokenizer_must_be_there(llama, tmp_path):
    with pytest.raises(ValueError, match=r"save_decoder: writes into a new folder, got .*which holds something"):
        save_decoder(llama, CONFIGS["llama"], PARAMS["llama"])
    with pytest.raises(ValueError, match="must be a tokenizer file or its folder"):
        save_decoder(tmp_path / "out", CONFIGS["llama"], PARAMS["llama"], tokenizer=tmp_path)
