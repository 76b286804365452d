"""Pretrained encoders: a Hugging Face folder to parameters, and back.

Reading is strict: every tensor of the file is used exactly once or stands in the list of what is passed over, every
leaf of the tree is filled, shapes and values are checked, and all faults are named in one message.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxft.core.checks import UserError, message, nearest, path_name, require, require_finite
from jaxft.core.types import Params
from jaxft.nn.name_maps import FAMILIES, IGNORED, Entry, file_name, plain_name, tensor_entries
from jaxft.nn.transformer import EncoderConfig, init_encoder

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
"""Fields that config.json must state; those of ``DEFAULTS`` it may leave out."""
DEFAULTS = {
    "type_vocab_size": ("type_vocab_size", {"bert": 2, "roberta": 2}),
    "norm_eps": ("layer_norm_eps", {"bert": 1e-12, "roberta": 1e-12}),
    "pad_id": ("pad_token_id", {"bert": 0, "roberta": 1}),
    "dropout_frac": ("hidden_dropout_prob", {"bert": 0.1, "roberta": 0.1}),
}
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
"""What the encoder computes, and config.json must not contradict."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
WHERE = "load_encoder"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An encoder read from a folder."""

    config: EncoderConfig
    params: Params
    """``{"encoder": ...}``, with ``"mlm"`` where the file holds it."""
    raw_config: dict[str, Any]
    """config.json as it stands."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What the header of a file says of one tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_encoder(folder: str | Path, *, mlm: Literal["require", "if_present", "ignore"] = "if_present") -> Pretrained:
    """Reads ``config.json`` and ``model.safetensors`` (or its shards) of a BERT or RoBERTa checkpoint.

    Parameters are float32 whatever the file holds. Pooler, next-sentence and task heads are passed over; pickles are
    never opened. The one dropout rate of the configuration is ``hidden_dropout_prob``.

    Args:
      folder: The checkpoint.
      mlm: Whether to read the masked-word head.

    Returns:
      Configuration, parameters, and config.json as it stands.

    Raises:
      UserError: A file is missing or damaged, the model is of another kind, a tensor is unknown, missing, of another
        shape or not finite, or the masked-word head is required and absent or has a decoder of its own.

    Example:
      >>> import tempfile
      >>> config = EncoderConfig("bert", 9, 4, 1, 2, 8, 5, 2, 1e-12, pad_id=0)
      >>> params = init_encoder(config, key=jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_encoder(folder, config, params)
      ...     load_encoder(folder).config == config
      True
    """
    folder = Path(folder)
    require(mlm in ("require", "if_present", "ignore"), WHERE, "mlm must be known", repr(mlm), "Pass 'if_present'")
    require(folder.is_dir(), WHERE, "needs the folder of a checkpoint", folder, "Download it first")
    raw, config = _read_config(folder / CONFIG)
    tensors = _read_headers(folder, config.family)
    head = {rule.name for rule in FAMILIES[config.family].mlm}
    has_mlm = mlm != "ignore" and not head.isdisjoint(tensors)
    rule = "mlm='require' needs a checkpoint with a masked-word head"
    got = f"{folder}, which has none"
    require(has_mlm or mlm != "require", WHERE, rule, got, "Take the checkpoint of the masked language model")
    tied = raw.get("tie_word_embeddings", True) or not has_mlm
    require(
        tied, WHERE, "the decoder must be the token table", f"tie_word_embeddings=false in {folder / CONFIG}", UNTIED
    )

    entries = tensor_entries(config.family, config.layers, mlm=has_mlm)
    expected = _leaf_shapes(config, mlm=has_mlm)
    _check_headers(folder, config, tensors, entries, expected)
    copies = {name: of for name, of in FAMILIES[config.family].tied.items() if has_mlm and name in tensors}
    arrays = _read_arrays({name: tensors[name] for name in (*entries, *copies)})
    untied = [name for name, of in copies.items() if not np.array_equal(arrays[name], arrays[of])]
    require(not untied, WHERE, "the decoder must be the token table", f"another in {', '.join(untied)}", UNTIED)
    return Pretrained(config, _to_tree(entries, arrays), raw)


UNTIED = "Pass mlm='ignore' to load the encoder alone"


def save_encoder(folder: str | Path, config: EncoderConfig, params: Params, *, tokenizer: Path | None = None) -> None:
    """Writes a folder that ``load_encoder`` and transformers read: config.json and model.safetensors.

    The folder appears whole or not at all. Parameters are written in float32. ``scan_layers`` is no property of a
    checkpoint and is not stored.

    Args:
      folder: To be made; must not exist, or be empty.
      config: The encoder.
      params: ``{"encoder": ...}``, with or without ``"mlm"``.
      tokenizer: A tokenizer file, or a folder whose tokenizer files are copied along.

    Raises:
      UserError: The folder holds something, the parameters do not fit ``config`` or are not finite, or there is no
        tokenizer where one was named.
    """
    where, folder = "save_encoder", Path(folder).resolve()
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, where, "writes into a new folder", f"{folder}, which holds something", "Name another, or remove it")
    _check_params(where, config, params)
    copied = [] if tokenizer is None else _tokenizer_files(where, Path(tokenizer))
    names, mlm = FAMILIES[config.family], "mlm" in params
    leaves = {path_name(path): np.asarray(x, np.float32) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {}
    for name, entry in tensor_entries(config.family, config.layers, mlm=mlm).items():
        x = leaves[entry.path] if entry.layer is None else leaves[entry.path][entry.layer]
        # The writer stores memory as it lies, so that a transposed view must be copied first.
        tensors[file_name(config.family, name, mlm=mlm)] = np.ascontiguousarray(x.T if entry.transpose else x)
    raw = {"architectures": [names.mlm_class if mlm else names.encoder_class], "model_type": config.family, **FIXED}
    raw |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    raw |= {theirs: getattr(config, ours) for ours, (theirs, _) in DEFAULTS.items()}
    raw |= {"attention_probs_dropout_prob": config.dropout_frac, "tie_word_embeddings": True}

    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        safetensors.numpy.save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
        for file in copied:
            shutil.copy(file, part / file.name)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _read_json(path: Path) -> dict[str, Any]:
    require(path.is_file(), WHERE, f"needs {path.name}", f"no such file in {path.parent}", "Download the whole folder")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(message(WHERE, f"{path} must be JSON", error, "Download the file again")) from error
    require(isinstance(value, dict), WHERE, f"{path} must be a JSON object", type(value).__name__, "Download it again")
    return value


def _read_config(path: Path) -> tuple[dict[str, Any], EncoderConfig]:
    raw = _read_json(path)
    family: Any = raw.get("model_type")
    hint = f"{nearest(str(family), FAMILIES)} Load a checkpoint of one of these families"
    require(family in FAMILIES, WHERE, f"model_type in {path} must be bert or roberta", repr(family), hint)
    values: dict[str, Any] = {ours: raw.get(theirs) for ours, theirs in SIZES.items()}
    for ours, (theirs, defaults) in DEFAULTS.items():
        values[ours] = defaults[family] if raw.get(theirs) is None else raw[theirs]
    theirs = SIZES | {ours: name for ours, (name, _) in DEFAULTS.items()}
    faults = [
        f"{theirs[k]}={x!r}"
        for k, x in values.items()
        if not _is_number(x, whole=k not in ("norm_eps", "dropout_frac"))
    ]
    faults += [f"{k}={raw[k]!r}, not {x!r}" for k, x in FIXED.items() if raw.get(k, x) != x]
    rule = f"{path} must state sizes as integers, and an encoder with exact gelu and absolute positions"
    require(not faults, WHERE, rule, ", ".join(faults), "Load another checkpoint, or mend the file")
    try:
        return raw, EncoderConfig(family=family, **values)
    except UserError as error:
        raise UserError(message(WHERE, f"{path} must describe an encoder", f"[{error}]", "Mend the file")) from error


def _is_number(x: Any, *, whole: bool) -> bool:
    return isinstance(x, int if whole else (int, float)) and not isinstance(x, bool)


def _read_headers(folder: Path, family: str) -> dict[str, _Tensor]:
    """Every tensor of the folder's weight files by plain name, from the headers alone."""
    tensors, twice = {}, []
    for file in _weight_files(folder):
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    part = handle.get_slice(name)
                    plain = plain_name(family, name)
                    twice += [name] if plain in tensors else []
                    tensors[plain] = _Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            hint = "Download it again; a file of a few hundred bytes is a Git LFS pointer"
            raise UserError(message(WHERE, f"{file} must be a whole safetensors file", error, hint)) from error
    require(not twice, WHERE, "a tensor must occur once", f"twice {_some(twice)}", f"Remove stale files from {folder}")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards: Any = _read_json(folder / INDEX).get("weight_map")
        require(isinstance(shards, dict), WHERE, f"{folder / INDEX} must hold weight_map", "none", "Download it again")
        files = [folder / name for name in sorted(set(shards.values()))]
        absent = [file.name for file in files if not file.is_file()]
        require(not absent, WHERE, f"needs every shard of {folder / INDEX}", f"no {_some(absent)}", "Download them")
        return files
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickles:
        hint = "Convert it once by transformers: AutoModelForMaskedLM.from_pretrained(old).save_pretrained(new)"
        rule = "reads safetensors and never a pickle, which can run code"
        raise UserError(message(WHERE, rule, f"{_some(pickles)} in {folder}", hint))
    got = f"neither {WEIGHTS} nor {INDEX} in {folder}"
    raise UserError(message(WHERE, "needs a weight file", got, "Download the whole folder"))


def _check_headers(
    folder: Path,
    config: EncoderConfig,
    tensors: dict[str, _Tensor],
    entries: dict[str, Entry],
    expected: dict[str, tuple[int, ...]],
) -> None:
    names = FAMILIES[config.family]
    passed_over = {rule.name for rule in names.mlm} | set(names.tied)
    unknown = [
        x.name for k, x in tensors.items() if k not in entries and k not in passed_over and not IGNORED.fullmatch(k)
    ]
    missing = [name for name in entries if name not in tensors]
    shapes, kinds = [], []
    for name, entry in entries.items():
        if name in tensors:
            shape = expected[entry.path] if entry.layer is None else expected[entry.path][1:]
            shape = shape[::-1] if entry.transpose else shape
            got = tensors[name]
            shapes += [f"{got.name} expected {shape} got {got.shape}"] if shape != got.shape else []
            kinds += [f"{got.name} {got.dtype}"] if got.dtype not in ("F64", "F32", "F16", "BF16") else []
    groups = {"unknown": unknown, "missing": missing, "of another shape": shapes, "not of floats": kinds}
    faults = [f"{label}: {_some(found)}" for label, found in groups.items() if found]
    rule = f"the tensors of {folder} must be those of its config.json"
    require(not faults, WHERE, rule, "; ".join(faults), "Check that the files belong together")


def _read_arrays(tensors: dict[str, _Tensor]) -> dict[str, np.ndarray]:
    arrays = {}
    for file, is_brain in sorted({(x.file, x.dtype == "BF16") for x in tensors.values()}):
        # The reader for numpy does not know bfloat16, and the one for jax would round float64 with a warning.
        with safetensors.safe_open(file, framework="flax" if is_brain else "numpy") as handle:
            for plain, x in tensors.items():
                if (x.file, x.dtype == "BF16") == (file, is_brain):
                    arrays[plain] = np.asarray(handle.get_tensor(x.name)).astype(np.float32)
    bad = [tensors[name].name for name, x in arrays.items() if not np.isfinite(x).all()]
    got = f"NaN or infinity in {_some(bad)}"
    require(not bad, WHERE, "parameters must be finite", got, "Download the file again, or train with a smaller step")
    return arrays


def _to_tree(entries: dict[str, Entry], arrays: dict[str, np.ndarray]) -> Params:
    leaves: dict[str, list[np.ndarray]] = {}
    for name, entry in entries.items():
        leaves.setdefault(entry.path, []).append(arrays[name].T if entry.transpose else arrays[name])
    stacked = {entry.path for entry in entries.values() if entry.layer is not None}
    tree: dict[str, Any] = {}
    for path, parts in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(np.stack(parts) if path in stacked else parts[0])
    return tree


def _leaf_shapes(config: EncoderConfig, *, mlm: bool) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda key: init_encoder(config, key=key, mlm=mlm), jax.random.key(0))
    return {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _check_params(where: str, config: EncoderConfig, params: Params) -> None:
    got = {path_name(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    expected = _leaf_shapes(config, mlm="mlm" in params)
    faults = [f"extra {path}" for path in got.keys() - expected.keys()]
    faults += [f"missing {path}" for path in expected.keys() - got.keys()]
    faults += [f"{k} expected {s} got {got[k]}" for k, s in expected.items() if k in got and got[k] != s]
    hint = "Leave out heads but mlm, which transformers has no place for, and pass the config of these parameters"
    require(not faults, where, "params must be those of config", _some(sorted(faults)), hint)
    require_finite(where, params, "params")


def _tokenizer_files(where: str, tokenizer: Path) -> list[Path]:
    if tokenizer.is_file():
        return [tokenizer]
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    require(bool(files), where, "tokenizer must be a tokenizer file or its folder", tokenizer, "Name tokenizer.json")
    return files


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
