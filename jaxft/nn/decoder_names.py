"""Where the tensors of decoder files live in the parameter tree: GPT-2, GPT-NeoX, Llama, OLMo and OLMo-2.

GPT-2 stores its linear maps as ``[in, out]``, and queries, keys and values side by side; GPT-NeoX stores ``[out, in]``,
and query, key and value of each head side by side; the others keep them apart.
"""

import dataclasses
import re

from jaxft.nn.decoder import DecoderConfig
from jaxft.nn.name_maps import Entry, Rule, expand_rules, linear_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class DecoderNames:
    """The naming of a family."""

    prefix: str
    """Before the names of all but the unembedding; absent from files of the bare decoder."""
    token_table: str
    unembedding: str
    architecture: str
    """The class of transformers that has an unembedding."""
    buffers: str
    """Names of constants that older files store, as a pattern."""


_ROPE = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
DECODERS = {
    "gpt2": DecoderNames(
        "transformer.", "wte.weight", "lm_head.weight", "GPT2LMHeadModel", r"h\.\d+\.attn\.(masked_)?bias"
    ),
    "gpt_neox": DecoderNames(
        "gpt_neox.",
        "embed_in.weight",
        "embed_out.weight",
        "GPTNeoXForCausalLM",
        r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    ),
    "llama": DecoderNames("model.", "embed_tokens.weight", "lm_head.weight", "LlamaForCausalLM", _ROPE),
    "olmo": DecoderNames("model.", "embed_tokens.weight", "lm_head.weight", "OlmoForCausalLM", _ROPE),
    "olmo2": DecoderNames("model.", "embed_tokens.weight", "lm_head.weight", "Olmo2ForCausalLM", _ROPE),
}

LAYERS = "decoder/layers"
ATTENTION = f"{LAYERS}/attention"
QKV = (f"{ATTENTION}/query", f"{ATTENTION}/key", f"{ATTENTION}/value")


def decoder_plain_name(family: str, name: str) -> str:
    """The name of a tensor without the family's prefix.

    Example:
      >>> decoder_plain_name("gpt2", "transformer.wte.weight")
      'wte.weight'
    """
    names = DECODERS[family]
    # The attribute of transformers 5 is called lm_head in every family.
    return names.unembedding if name == "lm_head.weight" else name.removeprefix(names.prefix)


def decoder_file_name(family: str, name: str) -> str:
    """The name that the family's own class writes.

    Example:
      >>> decoder_file_name("gpt_neox", "embed_in.weight")
      'gpt_neox.embed_in.weight'
    """
    names = DECODERS[family]
    return name if name == names.unembedding else names.prefix + name


def is_buffer(family: str, name: str) -> bool:
    """Whether a plain name is that of a constant, which files may hold and nobody needs.

    Example:
      >>> is_buffer("gpt2", "h.0.attn.bias"), is_buffer("gpt2", "h.0.attn.c_attn.bias")
      (True, False)
    """
    return re.fullmatch(DECODERS[family].buffers, name) is not None


def decoder_entries(config: DecoderConfig) -> dict[str, Entry]:
    """Every tensor that a file of this decoder must hold, by its plain name.

    Example:
      >>> from jaxft.nn.decoder import decoder_config
      >>> config = decoder_config("gpt2", vocab_size=9, width=8, layers=1, heads=2, mlp_width=16, max_positions=8)
      >>> [path.split("/")[-2] for path in decoder_entries(config)["h.0.attn.c_attn.weight"].paths]
      ['query', 'key', 'value']
    """
    names = DECODERS[config.family]
    rules = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(config.family, _llama)(config)
    rules.append(Rule(names.token_table, ("decoder/embeddings/token",)))
    if not config.tied:
        rules.append(Rule(names.unembedding, ("unembedding/table",)))
    return expand_rules(rules, config.layers)


def _gpt2(config: DecoderConfig) -> list[Rule]:
    def linear(name, *paths, bias):
        return linear_rules(f"h.{{i}}.{name}", *paths, bias=bias, transpose=False)

    return [
        Rule("wpe.weight", ("decoder/embeddings/position",)),
        *norm_rules("h.{i}.ln_1", f"{LAYERS}/attention_norm"),
        *linear("attn.c_attn", *QKV, bias=config.qkv_bias),
        *linear("attn.c_proj", f"{ATTENTION}/output", bias=config.output_bias),
        *norm_rules("h.{i}.ln_2", f"{LAYERS}/mlp_norm"),
        *linear("mlp.c_fc", f"{LAYERS}/mlp/in", bias=config.mlp_bias),
        *linear("mlp.c_proj", f"{LAYERS}/mlp/out", bias=config.mlp_bias),
        *norm_rules("ln_f", "decoder/final_norm"),
    ]


def _gpt_neox(config: DecoderConfig) -> list[Rule]:
    layer = "layers.{i}"
    return [
        *norm_rules(f"{layer}.input_layernorm", f"{LAYERS}/attention_norm"),
        *linear_rules(f"{layer}.attention.query_key_value", *QKV, bias=config.qkv_bias, groups=config.heads),
        *linear_rules(f"{layer}.attention.dense", f"{ATTENTION}/output", bias=config.output_bias),
        *norm_rules(f"{layer}.post_attention_layernorm", f"{LAYERS}/mlp_norm"),
        *linear_rules(f"{layer}.mlp.dense_h_to_4h", f"{LAYERS}/mlp/in", bias=config.mlp_bias),
        *linear_rules(f"{layer}.mlp.dense_4h_to_h", f"{LAYERS}/mlp/out", bias=config.mlp_bias),
        *norm_rules("final_layer_norm", "decoder/final_norm"),
    ]


_NORMS = {
    "llama": {
        "layers.{i}.input_layernorm": f"{LAYERS}/attention_norm",
        "layers.{i}.post_attention_layernorm": f"{LAYERS}/mlp_norm",
        "norm": "decoder/final_norm",
    },
    "olmo": {},
    "olmo2": {
        "layers.{i}.self_attn.q_norm": f"{ATTENTION}/query_norm",
        "layers.{i}.self_attn.k_norm": f"{ATTENTION}/key_norm",
        "layers.{i}.post_attention_layernorm": f"{LAYERS}/attention_norm",
        "layers.{i}.post_feedforward_layernorm": f"{LAYERS}/mlp_norm",
        "norm": "decoder/final_norm",
    },
}


def _llama(config: DecoderConfig) -> list[Rule]:
    attention, mlp = "layers.{i}.self_attn", "layers.{i}.mlp"
    rules = []
    for name, path in zip("qkv", QKV, strict=True):
        rules += linear_rules(f"{attention}.{name}_proj", path, bias=config.qkv_bias)
    rules += linear_rules(f"{attention}.o_proj", f"{ATTENTION}/output", bias=config.output_bias)
    for name, path in {"gate": "gate", "up": "in", "down": "out"}.items():
        rules += linear_rules(f"{mlp}.{name}_proj", f"{LAYERS}/mlp/{path}", bias=config.mlp_bias)
    for name, path in _NORMS[config.family].items():
        rules += norm_rules(name, path, bias=False)
    return rules
