"""Decoders against transformers: by committed files everywhere, live where torch and transformers are installed."""

import dataclasses
import json
import os
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxft.nn.decoder
from jaxft.core.checks import path_name
from jaxft.core.types import CausalTokens
from jaxft.nn.decoder_names import decoder_entries
from jaxft.nn.decoder_outputs import make_hidden_states, make_next_token_logits
from jaxft.nn.name_maps import Entry
from jaxft.nn.pretrained_decoders import load_decoder, save_decoder
from jaxft.nn.rope import rope_frequencies

HERE = Path(__file__).parent
FAMILIES = ("gpt2", "gpt_neox", "llama", "olmo", "olmo2")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def oracle_of(family: str) -> dict:
    with np.load(HERE / f"decoder_{family}.npz") as file:
        return dict(file)


def write_oracle(oracle, folder: Path) -> Path:
    (folder / "config.json").write_text(str(oracle["config"]))
    tensors = {k.removeprefix("file/"): x for k, x in oracle.items() if k.startswith("file/")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request):
    return oracle_of(request.param)


@pytest.fixture(scope="module")
def loaded(oracle, tmp_path_factory):
    return load_decoder(write_oracle(oracle, tmp_path_factory.mktemp("checkpoint")))


def tokens_of(inputs) -> CausalTokens:
    mask = np.asarray(inputs["attention_mask"])
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return CausalTokens(*(jnp.asarray(x, jnp.int32) for x in (inputs["input_ids"], mask, positions)))


def logits_of(config, params, inputs) -> np.ndarray:
    # Built anew, so that a patched function is not hidden by a compiled one.
    return np.asarray(jax.jit(make_next_token_logits(config))(params, tokens_of(inputs)))


def logit_error(oracle, config, params) -> float:
    """Largest difference at tokens."""
    difference = np.abs(logits_of(config, params, oracle) - oracle["logits"])
    return float(difference[oracle["attention_mask"] == 1].max())


def test_logits_equal_transformers(oracle, loaded):
    assert oracle["logits"].std() > 0.15
    assert logit_error(oracle, loaded.config, loaded.params) < TOLERANCE


def test_hidden_states_equal_transformers(oracle, loaded):
    hidden = jax.jit(make_hidden_states(loaded.config))(loaded.params, tokens_of(oracle))
    tokens = oracle["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(hidden)[tokens], oracle["hidden"][tokens], rtol=0, atol=TOLERANCE)


def test_any_wrong_tensor_would_show(oracle, loaded):
    leaves, tree = jax.tree.flatten(loaded.params)
    draw = np.random.default_rng(0)
    logits = jax.jit(make_next_token_logits(loaded.config))
    right, tokens = logits(loaded.params, tokens_of(oracle)), oracle["attention_mask"] == 1
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(loaded.params)):
        # Not all alike: a norm after a linear map takes out its scale.
        slip = x * jnp.asarray(1 + 0.1 * draw.random(x.shape), x.dtype)
        wrong = jax.tree.unflatten(tree, [*leaves[:i], slip, *leaves[i + 1 :]])
        error = float(jnp.abs(logits(wrong, tokens_of(oracle)) - right)[tokens].max())
        # Without rotation a bias of keys shifts all scores of a query alike, and softmax does not see it.
        silent = loaded.config.family == "gpt2" and path_name(path).endswith("key/bias")
        assert (error < TOLERANCE) if silent else (error > 2 * TOLERANCE), path_name(path)


def field(**fields):
    """A mistake in a field of the configuration."""
    return lambda config, params, patch: (dataclasses.replace(config, **fields), params)


def split_wrongly(groups):
    """A mistake in the order of fused queries, keys and values."""

    def apply(config, params, patch):
        attention = params["decoder"]["layers"]["attention"]
        names = ("query", "key", "value")
        entry = next(e for e in decoder_entries(config).values() if len(e.paths) == 3)
        for leaf in ("kernel", "bias"):
            for layer in range(config.layers):
                parts = [np.asarray(attention[name][leaf][layer]) for name in names]
                fused = Entry(entry.paths, None, groups=entry.groups).join(parts)
                for name, part in zip(names, Entry(entry.paths, None, groups=groups).split(fused), strict=True):
                    attention[name][leaf] = attention[name][leaf].at[layer].set(part)
        return config, params

    return apply


def transposed(config, params, patch):
    output = params["decoder"]["layers"]["attention"]["output"]
    output["kernel"] = output["kernel"].swapaxes(1, 2)
    return config, params


def interleaved(config, params, patch):
    """The rotation of neighbours, as the original of Llama has it."""

    def turned(x, cos, sin):
        f = cos.shape[-1]
        a, b = x[..., : 2 * f : 2], x[..., 1 : 2 * f : 2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(*x.shape[:-1], 2 * f)
        return jnp.concatenate([pairs, x[..., 2 * f :]], axis=-1)

    patch.setattr(jaxft.nn.decoder, "turned", turned)
    return config, params


def tiled(config, params, patch):
    """Key-value heads dealt out in turn rather than in blocks: the heads of queries in another order."""
    attention = params["decoder"]["layers"]["attention"]
    heads, shared = config.heads, config.kv_heads
    order = np.arange(heads).reshape(shared, heads // shared).T.reshape(-1)
    columns = np.arange(heads * config.head_width).reshape(heads, -1)[order].reshape(-1)
    attention["query"]["kernel"] = attention["query"]["kernel"][:, :, columns]
    attention["output"]["kernel"] = attention["output"]["kernel"][:, columns]
    if "query_norm" in attention:
        attention["query_norm"]["scale"] = attention["query_norm"]["scale"][:, columns]
    return config, params


def swapped_branches(config, params, patch):
    mlp = params["decoder"]["layers"]["mlp"]
    mlp["in"], mlp["gate"] = mlp["gate"], mlp["in"]
    return config, params


# Those that change no field share compiled functions with the tests above.
MISTAKES = {
    ("gpt2", "heads fused one by one"): split_wrongly(4),
    ("gpt2", "linear map transposed"): transposed,
    ("gpt2", "exact gelu"): field(activation="gelu"),
    ("gpt2", "eps"): field(norm_eps=1e-6),
    ("gpt_neox", "heads fused in blocks"): split_wrongly(1),
    ("gpt_neox", "sequential residual"): field(parallel_residual=False),
    ("gpt_neox", "all of a head turned"): field(rope_frac=1.0),
    ("gpt_neox", "approximate gelu"): field(activation="gelu_tanh"),
    ("gpt_neox", "eps"): field(norm_eps=1e-6),
    ("llama", "neighbours turned"): interleaved,
    ("llama", "key-value heads tiled"): tiled,
    ("llama", "gate and up exchanged"): swapped_branches,
    ("llama", "scaling of positions ignored"): field(rope_scaling=None),
    ("llama", "eps"): field(norm_eps=1e-6),
    ("olmo", "no clip"): field(clip_qkv=None),
    ("olmo", "eps"): field(norm_eps=1e-6),
    ("olmo", "neighbours turned"): interleaved,
    ("olmo2", "norms before the block"): field(family="llama"),
    ("olmo2", "other base of positions"): field(rope_theta=500000.0),
    ("olmo2", "eps"): field(norm_eps=1e-6),
}


QUICK = (split_wrongly, transposed, tiled, swapped_branches)


def is_quick(mistake) -> bool:
    return any(mistake.__qualname__.split(".")[0] == f.__name__ for f in QUICK)


CASES = [pytest.param(*k, marks=() if is_quick(f) else pytest.mark.slow) for k, f in MISTAKES.items()]


@pytest.mark.parametrize(("family", "mistake"), CASES)
def test_a_typical_mistake_would_show(family, mistake, tmp_path, monkeypatch):
    oracle = oracle_of(family)
    loaded = load_decoder(write_oracle(oracle, tmp_path))
    config, params = MISTAKES[family, mistake](loaded.config, loaded.params, monkeypatch)
    assert logit_error(oracle, config, params) > 2 * TOLERANCE


@pytest.fixture(scope="module")
def live():
    reason = "the live comparison needs torch and transformers (pip install torch 'jaxft[oracle]')"
    pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    return runpy.run_path(str(HERE / "make_decoders.py"))


@pytest.mark.oracle
def test_committed_file_is_what_transformers_gives_today(oracle, live):
    family = json.loads(str(oracle["config"]))["model_type"]
    today = live["make"](family, live["CASES"][family])
    assert {k for k in today if k.startswith("file/")} == {k for k in oracle if k.startswith("file/")}
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(today[name], oracle[name], rtol=0, atol=TOLERANCE)


def assert_transformers_loads(folder, oracle, live):
    """Strictly, bitwise the same tensors, and the same logits."""
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = {k.replace("embed_out.", "lm_head."): x for k, x in model.state_dict().items()}
    for name, x in oracle.items():
        if name.startswith("file/"):
            ours = name.removeprefix("file/").replace("embed_out.", "lm_head.")
            assert torch.equal(state[ours], torch.tensor(x)), name
    inputs = {k: oracle[k] for k in ("input_ids", "attention_mask")}
    tokens = inputs["attention_mask"] == 1
    theirs = live["outputs"](model.eval(), inputs)["logits"]
    np.testing.assert_allclose(theirs[tokens], oracle["logits"][tokens], rtol=0, atol=TOLERANCE)


@pytest.mark.oracle
def test_transformers_loads_what_we_save(oracle, loaded, live, tmp_path):
    save_decoder(tmp_path / "out", loaded.config, loaded.params)
    assert_transformers_loads(tmp_path / "out", oracle, live)


LIVE_CASES = runpy.run_path(str(HERE / "make_decoders.py"))["LIVE_CASES"]


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("case", LIVE_CASES)
def test_variants_of_a_family_equal_transformers_both_ways(case, live, tmp_path):
    oracle = live["make"](case.split()[0], LIVE_CASES[case])
    (tmp_path / "in").mkdir()
    loaded = load_decoder(write_oracle(oracle, tmp_path / "in"))
    assert logit_error(oracle, loaded.config, loaded.params) < TOLERANCE
    save_decoder(tmp_path / "out", loaded.config, loaded.params)
    assert_transformers_loads(tmp_path / "out", oracle, live)


OLD_LLAMA3 = {k: x for k, x in runpy.run_path(str(HERE / "make_decoders.py"))["LLAMA3"].items() if k != "rope_theta"}
OLD_FIELDS = {
    "pythia": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5000}),
    "neox without any": ("gpt_neox", {}),
    "llama 1": ("llama", {}),
    "llama 2": ("llama", {"rope_theta": 5000.0, "rope_scaling": None}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama 3": ("llama", {"rope_theta": 5e5, "rope_scaling": OLD_LLAMA3}),
    "olmo": ("olmo", {"rope_theta": 5000.0}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", OLD_FIELDS)
def test_older_fields_of_positions_mean_what_transformers_reads(case, live, tmp_path):
    import transformers

    family, fields = OLD_FIELDS[case]
    oracle = oracle_of(family)
    raw = {k: x for k, x in json.loads(str(oracle["config"])).items() if k != "rope_parameters"}
    config = load_decoder(write_oracle(oracle | {"config": json.dumps(raw | fields)}, tmp_path)).config
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    ours = rope_frequencies(config.rope_width, theta=config.rope_theta, scaling=config.rope_scaling)
    np.testing.assert_allclose(ours, model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


@pytest.fixture(scope="module")
def decoder_folder() -> Path:
    folder = os.environ.get("JAXFT_DECODER")
    if not folder:
        pytest.skip("no real checkpoint: set JAXFT_DECODER to the folder of one")
    return Path(folder)


@pytest.mark.oracle
@pytest.mark.slow
def test_real_checkpoint_equals_transformers(decoder_folder, live):
    import torch
    import transformers

    loaded = load_decoder(decoder_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder_folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder_folder)
    rows = [tokenizer(text)["input_ids"] for text in ("The river that runs through Paris is", "Why does it fall?")]
    mask = np.arange(max(map(len, rows)))[None] < np.array(list(map(len, rows)))[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    inputs = {"input_ids": ids, "attention_mask": mask.astype(np.int32)}
    theirs = live["outputs"](model, inputs)["logits"][mask]
    exact = live["outputs"](model.double(), inputs)["logits"][mask]
    ours = logits_of(loaded.config, loaded.params, inputs)[mask]
    # In float32 transformers itself is about this far from float64.
    assert np.abs(ours - exact).max() < 3 * np.abs(theirs - exact).max()
    assert (ours.argmax(axis=-1) == exact.argmax(axis=-1)).all()


@pytest.mark.slow
def test_real_checkpoint_survives_a_round_trip_bitwise(decoder_folder, tmp_path):
    loaded = load_decoder(decoder_folder, dtype="as_stored")
    save_decoder(tmp_path / "out", loaded.config, loaded.params, tokenizer=decoder_folder, raw_config=loaded.raw_config)
    again = load_decoder(tmp_path / "out", dtype="as_stored")
    assert again.config == loaded.config
    for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    ids = ("bos_token_id", "eos_token_id")
    assert [again.raw_config.get(k) for k in ids] == [loaded.raw_config.get(k) for k in ids]
