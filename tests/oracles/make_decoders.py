"""Writes decoder_<family>.npz: small causal language models as transformers saves them, inputs, and its outputs.

Run where torch and transformers are installed: ``python tests/oracles/make_decoders.py``.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
SHARED = {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
CASES = {
    "gpt2": {},
    "gpt_neox": {"num_attention_heads": 2},
    "llama": {**SHARED, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3},
    "olmo": {**SHARED, "clip_qkv": 0.5},
    "olmo2": SHARED,
}
"""One for each family, in the committed files."""
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
LIVE_CASES = {
    "gpt2 untied, exact gelu": {"activation_function": "gelu", "tie_word_embeddings": False},
    "gpt_neox sequential, tied": {
        "num_attention_heads": 2,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "rope_parameters": LINEAR | {"partial_rotary_factor": 0.5},
    },
    "gpt_neox without biases of attention": {"num_attention_heads": 2, "attention_bias": False},
    "llama tied, biases": {
        **SHARED,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LINEAR,
    },
    "olmo without clip, tied": {"clip_qkv": None, "tie_word_embeddings": True, "attention_bias": True},
    "olmo2 other eps": {"rms_norm_eps": 1e-4, "num_key_value_heads": 1},
}
"""What else the families have, for the live comparison alone."""


def make_model(family: str, fields: dict):
    """A model all of whose parameters are random, so that a slip in any one shows."""
    import torch
    import transformers

    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = SIZES | ({"n_inner": SIZES["intermediate_size"]} if family == "gpt2" else {})
    config = transformers.AutoConfig.for_model(family, **{**sizes, **ids, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            # Embeddings stay small: a wrong eps shows where variances are small. The rest is of order one.
            scale = 0.05 if any(part in name for part in ("embed", "wte", "wpe")) else 0.3
            x.add_(scale * torch.randn_like(x))
    return model


def make_inputs() -> dict[str, np.ndarray]:
    """A full row, one padded on the right, one on the left."""
    mask = np.ones((3, 9), np.int32)
    mask[1, 6:] = 0
    mask[2, :4] = 0
    ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], size=mask.shape)
    return {"input_ids": np.where(mask, ids, 0).astype(np.int32), "attention_mask": mask}


def outputs(model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    mask = inputs["attention_mask"]
    arrays = inputs | {"position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
    feed = {k: torch.tensor(x, dtype=torch.long) for k, x in arrays.items()}
    with torch.no_grad():
        hidden = model.base_model(**feed).last_hidden_state
        return {"hidden": hidden.numpy(), "logits": model(**feed).logits.numpy()}


def make(family: str, fields: dict) -> dict[str, np.ndarray]:
    """Everything that the file of a family holds."""
    import torch
    import transformers

    model, inputs = make_model(family, fields), make_inputs()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = {f"file/{name}": x for name, x in load_file(Path(folder) / "model.safetensors").items()}
    made_with = f"torch {torch.__version__}, transformers {transformers.__version__}"
    record = {"config": np.array(json.dumps(config)), "made_with": np.array(made_with)}
    return record | tensors | inputs | outputs(model, inputs)


if __name__ == "__main__":
    for family, fields in CASES.items():
        arrays: dict = make(family, fields)
        np.savez_compressed(Path(__file__).parent / f"decoder_{family}.npz", **arrays)
