"""What config.json says of a decoder: its fields to a ``DecoderConfig``, and back.

Fields that change what is computed and have no place in a ``DecoderConfig`` are faults, not passed over; dropout,
initialisation and token ids are passed over. Positions are read in the form of transformers 5 (``rope_parameters``) and
in the older ones.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.core.checks import UserError, message, nearest, require
from jaxft.nn.checkpoint_files import is_number, some
from jaxft.nn.decoder import DecoderConfig
from jaxft.nn.decoder_names import DECODERS
from jaxft.nn.rope import RopeScaling

SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "max_positions": "n_positions",
}
"""Fields that config.json must state."""
_SHARED_HEADS = {"kv_heads": ("num_key_value_heads", None), "head_width": ("head_dim", None)}
_SILU = {"activation": ("hidden_act", "silu"), "qkv_bias": ("attention_bias", False)}
_UNTIED = {"tied": ("tie_word_embeddings", False)}
OPTIONAL: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt2": {
        "mlp_width": ("n_inner", None),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "activation": ("activation_function", "gelu_new"),
        "tied": ("tie_word_embeddings", True),
    },
    "gpt_neox": {
        "norm_eps": ("layer_norm_eps", 1e-5),
        "activation": ("hidden_act", "gelu"),
        "parallel_residual": ("use_parallel_residual", True),
        "qkv_bias": ("attention_bias", True),
        **_UNTIED,
    },
    "llama": {"norm_eps": ("rms_norm_eps", 1e-6), "mlp_bias": ("mlp_bias", False), **_SHARED_HEADS, **_SILU, **_UNTIED},
    "olmo": {"clip_qkv": ("clip_qkv", None), **_SHARED_HEADS, **_SILU, **_UNTIED},
    "olmo2": {"norm_eps": ("rms_norm_eps", 1e-5), **_SHARED_HEADS, **_SILU, **_UNTIED},
}
"""Fields that config.json may leave out, with the defaults of transformers; ``None`` follows from the sizes."""
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""``gelu_new``, ``gelu_pytorch_tanh`` and ``gelu_fast`` are three ways to write one formula."""
WRITTEN_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "qk_layernorm": False,
    "use_qk_norm": False,
    "alibi": False,
    "rope_interleaved": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "quantization_config": None,
}
"""What the decoder computes, and config.json must not contradict."""
WHOLE = {*SIZES, "kv_heads", "head_width"}
FRACTIONS = {"norm_eps", "clip_qkv", "rope_theta", "rope_frac"}
THETA = {"gpt_neox": ("rotary_emb_base", "rope_theta")}
ROPE_FRAC = {"gpt_neox": ("rotary_pct", "partial_rotary_factor")}
"""Older names beside those of the other families."""
ROPE_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
)
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
NOT_CARRIED = {*FIXED, *ROPE_FIELDS, "original_max_position_embeddings", "layer_types", "dtype"}
"""Fields of another config.json that could contradict what is written."""
NOT_STORED = ("scan_layers", "remat", "init_scale", "attention", "dtype")
"""Fields of a ``DecoderConfig`` that are no property of a checkpoint."""


def read_decoder_config(where: str, path: Path, raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that the content of a config.json describes.

    Args:
      where: The function that a fault is reported by.
      path: The file, for messages.
      raw: Its content.

    Returns:
      The config.

    Raises:
      UserError: Another kind of model, a field missing or of the wrong type, or one that asks for what the decoder does
        not compute; all faults in one message.
    """
    family: Any = raw.get("model_type")
    known = ", ".join(DECODERS)
    encoder = family in ("bert", "roberta")
    hint = (
        "Use load_encoder" if encoder else f"{nearest(str(family), DECODERS)} Load a decoder of one of these families"
    )
    require(family in DECODERS, where, f"model_type in {path} must be one of {known}", repr(family), hint)
    values, faults = _read_fields(family, raw)
    faults += [f"{k}={raw[k]!r}, not {x!r}" for k, x in FIXED.items() if raw.get(k) is not None and raw[k] != x]
    layer_types = raw.get("layer_types") or []
    faults += [f"layer_types with {x!r}" for x in dict.fromkeys(layer_types) if x != "full_attention"]
    rule = f"{path} must state sizes as integers, and a decoder that can be computed here"
    require(not faults, where, rule, ", ".join(faults), "Load another checkpoint, or mend the file")
    try:
        return DecoderConfig(**values)
    except UserError as error:
        raise UserError(message(where, f"{path} must describe a decoder", f"[{error}]", "Mend the file")) from error


def _read_fields(family: str, raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of ``DecoderConfig``, and faults."""
    names = GPT2_SIZES if family == "gpt2" else SIZES
    values: dict[str, Any] = {ours: raw.get(theirs) for ours, theirs in names.items()}
    for ours, (theirs, default) in OPTIONAL[family].items():
        values[ours] = default if raw.get(theirs) is None else raw[theirs]
    said = names | {ours: theirs for ours, (theirs, _) in OPTIONAL[family].items()}
    faults = []
    for ours, x in values.items():
        optional = x is None and ours in OPTIONAL[family]
        if ours == "activation":
            right = isinstance(x, str) and x in ACTIVATIONS
        elif ours in WHOLE or ours in FRACTIONS:
            right = optional or is_number(x, whole=ours in WHOLE)
        else:
            right = isinstance(x, bool)
        faults += [] if right else [f"{said[ours]}={x!r}"]
    if faults:
        return {}, faults
    values |= {ours: float(values[ours]) for ours in FRACTIONS & values.keys() if values[ours] is not None}
    rope, faults = _read_rope(family, raw, values["max_positions"]) if family != "gpt2" else ({}, [])
    values = _derived(family, values) | {"activation": ACTIVATIONS[values["activation"]]} | rope
    if values["heads"] < 1 or (raw.get("head_dim") is None and values["width"] % values["heads"]):
        faults.append(f"{said['width']}={values['width']} with {said['heads']}={values['heads']}")
    return {"family": family, **values}, faults


def _derived(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """Adds what follows from the family and from other fields."""
    heads, width, bias = values["heads"], values["width"], values.get("qkv_bias", True)
    defaults = {"kv_heads": heads, "head_width": width // max(heads, 1), "mlp_width": 4 * width, "norm_eps": 1e-5}
    biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": family in ("gpt2", "gpt_neox")}
    return defaults | biases | {k: x for k, x in values.items() if x is not None}


def _read_rope(family: str, raw: Mapping[str, Any], max_positions: int) -> tuple[dict[str, Any], list[str]]:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
        return {}, [f"rope_parameters={rope!r}"]

    def first(new, olds, default):
        found = [x for x in (rope.get(new), *map(raw.get, olds)) if x is not None]
        return found[0] if found else default

    theta = first("rope_theta", THETA.get(family, ("rope_theta",)), 10000.0)
    names = ROPE_FRAC.get(family, ("partial_rotary_factor",))
    frac = first("partial_rotary_factor", names, 0.25 if family == "gpt_neox" else 1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    faults = [f"{n}={x!r}" for n, x in {"rope_theta": theta, names[0]: frac}.items() if not is_number(x, whole=False)]
    if faults:
        return {}, faults
    if family != "gpt_neox" and frac != 1:
        faults.append(f"{names[0]}={frac!r}, which is GPT-NeoX's alone")
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    scaling, wrong = _read_scaling(kind, rope, original or max_positions)
    return {"rope_theta": float(theta), "rope_frac": float(frac), "rope_scaling": scaling}, faults + wrong


def _read_scaling(kind: Any, rope: dict[str, Any], original: Any) -> tuple[RopeScaling | None, list[str]]:
    if kind == "default":
        return None, []
    if kind not in ("linear", "llama3"):
        return None, [f"rope_type={kind!r}, not default, linear or llama3"]
    numbers: dict[str, Any] = {name: rope.get(name) for name in (LLAMA3 if kind == "llama3" else LLAMA3[:1])}
    wrong = [f"{name}={x!r} of rope_type={kind!r}" for name, x in numbers.items() if not is_number(x, whole=False)]
    if kind == "llama3" and not is_number(original, whole=True):
        wrong.append(f"original_max_position_embeddings={original!r}")
    if wrong:
        return None, wrong
    numbers = {name: float(x) for name, x in numbers.items()}
    numbers |= {"original_max_positions": original} if kind == "llama3" else {}
    try:
        return RopeScaling(kind, **numbers), []
    except UserError as error:
        return None, [f"rope_type={kind!r} [{error}]"]


def write_decoder_config(
    where: str, config: DecoderConfig, *, dtype: str, raw_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of a config.json that says what ``config`` does, to every version of transformers.

    Args:
      where: The function that a fault is reported by.
      config: The decoder.
      dtype: That of the stored parameters.
      raw_config: A config.json whose further fields, such as token ids, are carried along.

    Returns:
      The content.

    Raises:
      UserError: The family has no field for something that ``config`` asks for.
    """
    family = config.family
    names = GPT2_SIZES if family == "gpt2" else SIZES
    written = names | {ours: theirs for ours, (theirs, _) in OPTIONAL[family].items()}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    raw = ids | {k: x for k, x in (raw_config or {}).items() if k not in NOT_CARRIED}
    raw |= {"architectures": [DECODERS[family].architecture], "model_type": family, "torch_dtype": dtype}
    raw |= {theirs: getattr(config, ours) for ours, theirs in written.items()}
    raw[written["activation"]] = WRITTEN_ACTIVATIONS[config.activation]
    raw |= _written_rope(config) if family != "gpt2" else {}
    # Reading it again tells what the family's file cannot say.
    again, faults = _read_fields(family, raw)
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    default = {field.name: field.default for field in dataclasses.fields(config)}
    own = {k: x for k, x in own.items() if again and k not in NOT_STORED}
    faults += [f"{k}={x!r}" for k, x in own.items() if again.get(k, default[k]) != x]
    rule = f"config must be one that files of {family} can state"
    require(not faults, where, rule, some(faults), "Save it in another family, or keep the parameters by a checkpoint")
    return raw


def _written_rope(config: DecoderConfig) -> dict[str, Any]:
    scaling, family = config.rope_scaling, config.family
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {name: getattr(scaling, name) for name in LLAMA3[1:]}
            rope["original_max_position_embeddings"] = scaling.original_max_positions
    fields: dict[str, Any] = {THETA.get(family, ("rope_theta",))[0]: config.rope_theta}
    if family == "gpt_neox" or config.rope_frac != 1:
        fields[ROPE_FRAC.get(family, ("partial_rotary_factor",))[0]] = config.rope_frac
    fields["rope_scaling"] = dict(rope) if scaling is not None else None
    partial = {"partial_rotary_factor": config.rope_frac} if family == "gpt_neox" else {}
    return fields | {"rope_parameters": {**rope, "rope_theta": config.rope_theta, **partial}}
