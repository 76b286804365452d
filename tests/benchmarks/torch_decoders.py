"""Our decoders as transformers' modules, with our weights: what the peers of the preference benchmark run."""

from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from jaxft.core.types import Params
from tests.benchmarks.torch_weights import torch_weights

__all__ = ["FAMILIES", "torch_decoder"]

FAMILIES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "olmo": ("OlmoConfig", "OlmoForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
}
"""Classes of the configuration and of the model."""


def torch_decoder(config: Any, params: Params, *, dtype: str = "float32", attention: str = "sdpa") -> Any:
    """The model of transformers with the weights of ours; on the CPU, without dropout."""
    names = FAMILIES[config.family]
    wanted = getattr(transformers, names[0])(**_options(config), attn_implementation=attention)
    with no_init_weights():
        model = getattr(transformers, names[1])(wanted)
    kind = getattr(torch, dtype)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tensors = {name: torch.tensor(value).to(kind) for name, value in torch_weights(config, params, head=head).items()}
    lacking, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    assert not unknown, unknown
    assert set(lacking) <= ({f"{head}.weight"} if config.tied else set()), lacking
    return model.eval()


def _options(config: Any) -> dict[str, Any]:
    """Fields of the configuration of transformers."""
    ends = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied, "use_cache": False}
    ends |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if config.family == "gpt2":
        shape = {"n_positions": config.max_positions, "n_embd": config.width, "n_layer": config.layers}
        shape |= {"n_head": config.heads, "n_inner": config.mlp_width, "layer_norm_epsilon": config.norm_eps}
        return ends | shape | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads}
    shape |= {"intermediate_size": config.mlp_width, "max_position_embeddings": config.max_positions}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.family == "gpt_neox":
        rope |= {"partial_rotary_factor": config.rope_frac}
        shape |= {"layer_norm_eps": config.norm_eps, "use_parallel_residual": config.parallel_residual}
        return ends | shape | {"rope_parameters": rope, "hidden_act": "gelu", "attention_bias": True}
    shape |= {"num_key_value_heads": config.kv_heads, "rope_parameters": rope, "hidden_act": "silu"}
    shape |= {"clip_qkv": config.clip_qkv} if config.family == "olmo" else {"rms_norm_eps": config.norm_eps}
    shape |= {"head_dim": config.head_width} if config.family == "llama" else {}
    return ends | shape
