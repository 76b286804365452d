import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxft.core.checks import path_name
from jaxft.nn import init_encoder, load_encoder, save_encoder
from jaxft.nn.name_maps import FAMILIES, tensor_entries

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(small, tmp_path):
    """A folder with encoder and head."""
    save_encoder(tmp_path / "saved", small.config, without_classifier(small.params))
    return tmp_path / "saved"


def without_classifier(params):
    return {k: x for k, x in params.items() if k != "classifier"}


def rewrite(folder, change):
    """Applies ``change`` to the dictionary of tensors in a folder."""
    tensors = change(safetensors.numpy.load_file(folder / WEIGHTS))
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path_name(path))


@pytest.mark.parametrize("mlm", [True, False])
def test_round_trip_is_bitwise(small, tmp_path, mlm):
    params = without_classifier(small.params)
    params = params if mlm else {"encoder": params["encoder"]}
    save_encoder(tmp_path / "a", small.config, params)
    loaded = load_encoder(tmp_path / "a")
    assert loaded.config == small.config
    assert_equal(loaded.params, params)
    save_encoder(tmp_path / "b", loaded.config, loaded.params)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_fill_every_leaf_once(small, family):
    params = jax.eval_shape(lambda key: init_encoder(small.config, key=key, mlm=True), jax.random.key(0))
    leaves = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    entries = tensor_entries(family, 2, mlm=True)
    filled = [(path, entry.layer) for entry in entries.values() for path in entry.paths]
    assert {path for path, _ in filled} == leaves
    assert len(set(filled)) == len(filled)
    assert {layer for path, layer in filled if "/layers/" in path} == {0, 1}


def test_the_head_is_read_as_asked(small, saved):
    assert "mlm" in load_encoder(saved).params
    assert "mlm" in load_encoder(saved, mlm="require").params
    alone = load_encoder(saved, mlm="ignore").params
    assert_equal(alone, {"encoder": small.params["encoder"]})


def test_shards_load_equal(small, saved):
    tensors = safetensors.numpy.load_file(saved / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({k: tensors[k] for k in part}, saved / file)
    index = {"weight_map": {k: file for file, part in shards.items() for k in part}}
    (saved / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (saved / WEIGHTS).unlink()
    assert_equal(load_encoder(saved).params, without_classifier(small.params))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_load_as_float32(small, saved, dtype):
    rewrite(saved, lambda tensors: {k: x.astype(dtype) for k, x in tensors.items()})
    params = load_encoder(saved).params
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), without_classifier(small.params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert_equal(params, rounded)


def test_old_names_and_a_missing_prefix_are_understood(small, saved):
    prefix = FAMILIES[small.config.family].prefix

    def age(name):
        name = re.sub(r"(LayerNorm|layer_norm)\.weight$", r"\1.gamma", name.removeprefix(prefix))
        return re.sub(r"(LayerNorm|layer_norm)\.bias$", r"\1.beta", name)

    rewrite(saved, lambda tensors: {age(k): x for k, x in tensors.items()})
    assert_equal(load_encoder(saved).params, without_classifier(small.params))


def test_pooler_task_heads_and_tied_copies_are_passed_over(small, saved):
    names = FAMILIES[small.config.family]

    def add(tensors):
        copies = {}
        for name, of in names.tied.items():
            copies[name] = tensors.get(of, tensors.get(names.prefix + of))
        extra = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
        extra = {names.prefix + name: np.zeros((1, 3), np.float32) for name in extra}
        return tensors | copies | extra | {"classifier.weight": np.zeros((2, 2), np.int64)}

    rewrite(saved, add)
    assert_equal(load_encoder(saved, mlm="require").params, without_classifier(small.params))


def test_fields_left_out_have_the_defaults_of_transformers(saved):
    raw = json.loads((saved / "config.json").read_text())
    for name in ("layer_norm_eps", "pad_token_id", "hidden_dropout_prob", "hidden_act"):
        del raw[name]
    (saved / "config.json").write_text(json.dumps(raw))
    config = load_encoder(saved).config
    assert (config.norm_eps, config.dropout_frac) == (1e-12, 0.1)
    assert config.pad_id == {"bert": 0, "roberta": 1}[config.family]


def test_the_raw_configuration_is_kept(saved):
    raw = json.loads((saved / "config.json").read_text()) | {"task": "none of ours"}
    (saved / "config.json").write_text(json.dumps(raw))
    assert load_encoder(saved).raw_config == raw


def test_a_failing_save_leaves_nothing(small, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_encoder(tmp_path / "out", small.config, {"encoder": small.params["encoder"]})
    assert not list(tmp_path.iterdir())


def test_tokenizer_files_go_along(small, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "training_args.bin"):
        (source / name).write_text(name)
    params = {"encoder": small.params["encoder"]}
    save_encoder(tmp_path / "a", small.config, params, tokenizer=source)
    save_encoder(tmp_path / "b", small.config, params, tokenizer=source / "tokenizer.json")
    own = {"config.json", WEIGHTS}
    assert {x.name for x in (tmp_path / "a").iterdir()} == own | {"tokenizer.json", "vocab.txt"}
    assert {x.name for x in (tmp_path / "b").iterdir()} == own | {"tokenizer.json"}
