"""Pretrained encoders: a Hugging Face folder to parameters, and back.

Reading is strict: every tensor of the file is used exactly once or stands in the list of what is passed over, every
leaf of the tree is filled, shapes and values are checked, and all faults are named in one message.
"""

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxft.core.checks import UserError, message, nearest, path_name, require
from jaxft.core.types import Params
from jaxft.nn.checkpoint_files import (
    CONFIG,
    Pretrained,
    check_headers,
    check_params,
    file_tensors,
    is_number,
    leaf_shapes,
    read_headers,
    read_json,
    read_tree,
    require_new_folder,
    tokenizer_files,
    unequal_copies,
    write_folder,
)
from jaxft.nn.decoder_names import DECODERS
from jaxft.nn.name_maps import FAMILIES, IGNORED, file_name, plain_name, tensor_entries
from jaxft.nn.transformer import EncoderConfig, init_encoder

__all__ = ["Pretrained", "load_encoder", "save_encoder"]

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
WHERE = "load_encoder"


def load_encoder(
    folder: str | Path, *, mlm: Literal["require", "if_present", "ignore"] = "if_present"
) -> Pretrained[EncoderConfig]:
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
    family = config.family
    tensors = read_headers(WHERE, folder, lambda name: plain_name(family, name), auto_class="AutoModelForMaskedLM")
    head = {rule.name for rule in FAMILIES[family].mlm}
    has_mlm = mlm != "ignore" and not head.isdisjoint(tensors)
    rule = "mlm='require' needs a checkpoint with a masked-word head"
    got = f"{folder}, which has none"
    require(has_mlm or mlm != "require", WHERE, rule, got, "Take the checkpoint of the masked language model")
    tied = raw.get("tie_word_embeddings", True) or not has_mlm
    require(
        tied, WHERE, "the decoder must be the token table", f"tie_word_embeddings=false in {folder / CONFIG}", UNTIED
    )

    entries, copies = tensor_entries(family, config.layers, mlm=has_mlm), FAMILIES[family].tied
    leaves = _leaf_shapes(config, mlm=has_mlm)
    known = head | set(copies)
    check_headers(
        WHERE, folder, tensors, entries, leaves, passed_over=lambda k: k in known or bool(IGNORED.fullmatch(k))
    )
    params = read_tree(WHERE, tensors, entries, leaves)
    untied = unequal_copies(tensors, copies) if has_mlm else []
    require(not untied, WHERE, "the decoder must be the token table", f"another in {', '.join(untied)}", UNTIED)
    return Pretrained(config, params, raw)


UNTIED = "Pass mlm='ignore' to load the encoder alone"


def save_encoder(
    folder: str | Path, config: EncoderConfig, params: Params, *, tokenizer: str | Path | None = None
) -> None:
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
    require_new_folder(where, folder)
    hint = "Leave out heads but mlm, which transformers has no place for, and pass the config of these parameters"
    names, mlm = FAMILIES[config.family], "mlm" in params
    check_params(where, params, _leaf_shapes(config, mlm=mlm), next_step=hint)
    copied = tokenizer_files(where, tokenizer)
    leaves = {path_name(path): np.asarray(x, np.float32) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    entries = tensor_entries(config.family, config.layers, mlm=mlm)
    tensors = file_tensors(leaves, entries, lambda name: file_name(config.family, name, mlm=mlm))
    raw = {"architectures": [names.mlm_class if mlm else names.encoder_class], "model_type": config.family, **FIXED}
    raw |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    raw |= {theirs: getattr(config, ours) for ours, (theirs, _) in DEFAULTS.items()}
    raw |= {"attention_probs_dropout_prob": config.dropout_frac, "tie_word_embeddings": True}
    write_folder(folder, raw, tensors, copied)


def _read_config(path: Path) -> tuple[dict[str, Any], EncoderConfig]:
    raw = read_json(WHERE, path)
    family: Any = raw.get("model_type")
    hint = "Use load_decoder" if family in DECODERS else f"{nearest(str(family), FAMILIES)} Load one of these families"
    require(family in FAMILIES, WHERE, f"model_type in {path} must be bert or roberta", repr(family), hint)
    values: dict[str, Any] = {ours: raw.get(theirs) for ours, theirs in SIZES.items()}
    for ours, (theirs, defaults) in DEFAULTS.items():
        values[ours] = defaults[family] if raw.get(theirs) is None else raw[theirs]
    theirs = SIZES | {ours: name for ours, (name, _) in DEFAULTS.items()}
    faults = [
        f"{theirs[k]}={x!r}" for k, x in values.items() if not is_number(x, whole=k not in ("norm_eps", "dropout_frac"))
    ]
    faults += [f"{k}={raw[k]!r}, not {x!r}" for k, x in FIXED.items() if raw.get(k, x) != x]
    rule = f"{path} must state sizes as integers, and an encoder with exact gelu and absolute positions"
    require(not faults, WHERE, rule, ", ".join(faults), "Load another checkpoint, or mend the file")
    try:
        return raw, EncoderConfig(family=family, **values)
    except UserError as error:
        raise UserError(message(WHERE, f"{path} must describe an encoder", f"[{error}]", "Mend the file")) from error


def _leaf_shapes(config: EncoderConfig, *, mlm: bool) -> dict[str, tuple[int, ...]]:
    return leaf_shapes(lambda key: init_encoder(config, key=key, mlm=mlm))
