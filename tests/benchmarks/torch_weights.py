"""The weights of our decoders by their names and in their layout in transformers; needs no torch."""

from typing import Any

import jax
import numpy as np

from jaxft.core.types import Params

__all__ = ["torch_weights"]

Weights = dict[str, np.ndarray]


def torch_weights(config: Any, params: Params, *, head: str = "lm_head") -> Weights:
    """Weights by their names in transformers, which has changed that of the head; a tied table once."""
    # numpy's arrays of bfloat16 are not known to torch.
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, None if leaf.dtype.itemsize > 2 else np.float32), params)
    decoder, layers = tree["decoder"], tree["decoder"]["layers"]
    names = _NAMES[config.family]
    found = {names["token"]: decoder["embeddings"]["token"]}
    if config.family == "gpt2":
        found[names["position"]] = decoder["embeddings"]["position"]
    if not config.tied:
        found[f"{head}.weight"] = tree["unembedding"]["table"]
    found |= _norm(names["final_norm"], decoder.get("final_norm", {}))
    for i in range(config.layers):
        layer, at = jax.tree.map(lambda leaf, i=i: leaf[i], layers), names["layer"].format(i)
        found |= _fused(config, layer["attention"], at) if "fused" in names else {}
        for ours, theirs in names["dense"].items():
            part, _, name = ours.partition("/")
            found |= _dense(at + theirs, layer[part][name], transposed=config.family != "gpt2")
        for ours, theirs in names["norms"].items():
            part, _, name = ours.partition("/")
            leaf = layer.get(part, {})
            found |= _norm(at + theirs, leaf[name] if name else leaf)
    return found


def _dense(at: str, leaf: dict[str, np.ndarray], *, transposed: bool) -> Weights:
    kernel = leaf["kernel"].T if transposed else leaf["kernel"]
    return {f"{at}.weight": kernel} | ({f"{at}.bias": leaf["bias"]} if "bias" in leaf else {})


def _norm(at: str, leaf: dict[str, np.ndarray]) -> Weights:
    return {f"{at}.{name}": leaf[ours] for ours, name in (("scale", "weight"), ("bias", "bias")) if ours in leaf}


def _fused(config: Any, attention: dict[str, Any], at: str) -> Weights:
    """Queries, keys and values in one matrix: block after block, or head by head."""
    parts = [attention[name] for name in ("query", "key", "value")]
    kernel, bias = (np.stack([part[kind] for part in parts], axis=-2) for kind in ("kernel", "bias"))
    # [d, 3, h e] and [3, h e].
    if config.family == "gpt2":
        return {f"{at}attn.c_attn.weight": kernel.reshape(config.width, -1), f"{at}attn.c_attn.bias": bias.ravel()}
    kernel = kernel.reshape(config.width, 3, config.heads, -1).swapaxes(1, 2).reshape(config.width, -1)
    bias = bias.reshape(3, config.heads, -1).swapaxes(0, 1).ravel()
    return {f"{at}attention.query_key_value.weight": kernel.T, f"{at}attention.query_key_value.bias": bias}


_ATTENTION = {f"attention/{ours}": f"self_attn.{ours[0]}_proj" for ours in ("query", "key", "value", "output")}
_GATED = {"mlp/in": "mlp.up_proj", "mlp/gate": "mlp.gate_proj", "mlp/out": "mlp.down_proj"}
_LLAMA = {
    "token": "model.embed_tokens.weight",
    "final_norm": "model.norm",
    "layer": "model.layers.{}.",
    "dense": _ATTENTION | _GATED,
    "norms": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
}
_NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "token": "transformer.wte.weight",
        "position": "transformer.wpe.weight",
        "final_norm": "transformer.ln_f",
        "layer": "transformer.h.{}.",
        "fused": True,
        "dense": {"attention/output": "attn.c_proj", "mlp/in": "mlp.c_fc", "mlp/out": "mlp.c_proj"},
        "norms": {"attention_norm": "ln_1", "mlp_norm": "ln_2"},
    },
    "gpt_neox": {
        "token": "gpt_neox.embed_in.weight",
        "final_norm": "gpt_neox.final_layer_norm",
        "layer": "gpt_neox.layers.{}.",
        "fused": True,
        "dense": {
            "attention/output": "attention.dense",
            "mlp/in": "mlp.dense_h_to_4h",
            "mlp/out": "mlp.dense_4h_to_h",
        },
        "norms": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    },
    "llama": _LLAMA,
    "olmo": _LLAMA | {"norms": {}},
    "olmo2": _LLAMA
    | {
        "norms": {
            "attention_norm": "post_attention_layernorm",
            "mlp_norm": "post_feedforward_layernorm",
            "attention/query_norm": "self_attn.q_norm",
            "attention/key_norm": "self_attn.k_norm",
        }
    },
}
