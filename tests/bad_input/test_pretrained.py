"""What a user is told whose checkpoint is damaged, incomplete or of another kind."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxft import nn

CONFIG = nn.EncoderConfig("bert", 9, 4, 2, 2, 8, 5, 2, 1e-12, pad_id=0)
PARAMS = nn.init_encoder(CONFIG, key=jax.random.key(0), mlm=True)
WEIGHTS = "model.safetensors"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path):
    nn.save_encoder(tmp_path / "saved", CONFIG, PARAMS)
    return tmp_path / "saved"


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def pickle_only(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def shard_lost(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {QUERY: "model-2.safetensors"}}))


def many_faults(tensors):
    tensors["bert.extra"] = tensors.pop(QUERY)
    tensors["cls.predictions.bias"] = np.zeros(8, np.float32)
    tensors["bert.embeddings.LayerNorm.bias"] = np.zeros(4, np.int32)


def spoil(tensors):
    tensors[QUERY][0, 0] = np.nan


def without_head(tensors):
    for name in [k for k in tensors if k.startswith("cls.")]:
        del tensors[name]


FILES = {
    "no config": (lambda f: (f / "config.json").unlink(), "needs config.json, got no such file in .*saved"),
    "config is no JSON": (lambda f: (f / "config.json").write_text('{\n"a" 1}'), "config.json must be JSON.*line 2"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object, got list"),
    "other model": (lambda f: configure(f, model_type="robert"), "bert or roberta, got 'robert'. Did you mean"),
    "other activation": (lambda f: configure(f, hidden_act="gelu_new"), "hidden_act='gelu_new', not 'gelu'"),
    "relative positions": (lambda f: configure(f, position_embedding_type="relative_key"), "'relative_key'"),
    "decoder": (lambda f: configure(f, is_decoder=True), "is_decoder=True, not False"),
    "sizes missing": (
        lambda f: configure(f, hidden_size=None, vocab_size="9"),
        "vocab_size='9', hidden_size=None",
    ),
    "sizes that do not fit": (lambda f: configure(f, num_attention_heads=3), "config.json must.*width=4 with heads=3"),
    "untied by config": (lambda f: configure(f, tie_word_embeddings=False), "tie_word_embeddings=false.*mlm='ignore'"),
    "more layers than tensors": (lambda f: configure(f, num_hidden_layers=3), "missing: encoder.layer.2.*and 8 more"),
    "fewer layers than tensors": (lambda f: configure(f, num_hidden_layers=1), "unknown: bert.encoder.layer.1"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "neither model.safetensors nor"),
    "pickle alone": (pickle_only, "never a pickle.*pytorch_model.bin.*save_pretrained"),
    "shard lost": (shard_lost, "needs every shard.*no model-2.safetensors"),
    "truncated": (cut, "model.safetensors must be a whole safetensors file.*Download it again"),
    "pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs"), "Git LFS pointer"),
}
TENSORS = {
    "several faults at once": (
        many_faults,
        r"unknown: bert.extra; missing: encoder.layer.1.attention.self.query.weight; "
        r"of another shape: cls.predictions.bias expected \(9,\) got \(8,\); "
        r"not of floats: bert.embeddings.LayerNorm.bias I32",
    ),
    "half a head": (lambda t: t.pop("cls.predictions.bias"), "missing: cls.predictions.bias"),
    "nan": (spoil, f"must be finite, got NaN or infinity in {QUERY}"),
    "twice": (
        lambda t: t.update({QUERY.removeprefix("bert."): t[QUERY].copy()}),
        "occur once, got twice.*query.weight",
    ),
    "untied": (
        lambda t: t.update({"cls.predictions.decoder.weight": np.zeros((9, 4), np.float32)}),
        "another in cls.predictions.decoder.weight.*mlm='ignore'",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_folder(folder, case):
    damage, words = FILES[case]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        nn.load_encoder(folder)


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(folder, case):
    damage, words = TENSORS[case]
    rewrite(folder, damage)
    with pytest.raises(ValueError, match=words):
        nn.load_encoder(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"load_encoder: needs the folder of a checkpoint, got .*nowhere"):
        nn.load_encoder(tmp_path / "nowhere")


def test_required_head(folder):
    rewrite(folder, without_head)
    with pytest.raises(ValueError, match="mlm='require' needs a checkpoint with a masked-word head"):
        nn.load_encoder(folder, mlm="require")


def test_unknown_choice(folder):
    choice: Any = "no"
    with pytest.raises(ValueError, match="mlm must be known, got 'no'"):
        nn.load_encoder(folder, mlm=choice)


SAVE = {
    "classifier": (PARAMS | {"classifier": nn.init_classifier(4, 2, key=jax.random.key(0))}, "extra classifier/bias"),
    "a subtree": (PARAMS["encoder"], "extra embeddings/norm/bias, .* and 34 more. Leave out heads but mlm"),
    "other shape": (
        PARAMS | {"mlm": PARAMS["mlm"] | {"bias": jnp.zeros(3)}},
        r"mlm/bias expected \(9,\) got \(3,\)",
    ),
    "nan": (PARAMS | {"mlm": PARAMS["mlm"] | {"bias": jnp.full(9, jnp.nan)}}, "infinity in mlm/bias"),
}


@pytest.mark.parametrize("case", SAVE)
def test_params_that_cannot_be_saved(case, tmp_path):
    params, words = SAVE[case]
    with pytest.raises(ValueError, match=words):
        nn.save_encoder(tmp_path / "out", CONFIG, params)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder):
    with pytest.raises(ValueError, match=r"save_encoder: writes into a new folder, got .*which holds something"):
        nn.save_encoder(folder, CONFIG, PARAMS)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="must be a tokenizer file or its folder"):
        nn.save_encoder(tmp_path / "out", CONFIG, PARAMS, tokenizer=tmp_path)
