"""Writes encoder_<family>.npz: small masked language models as transformers saves them, inputs, and its outputs.

Run where torch and transformers are installed: ``python tests/oracles/make_encoders.py``.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FAMILIES = {
    "bert": {"layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2},
    "roberta": {"layer_norm_eps": 1e-5, "pad_token_id": 1, "type_vocab_size": 1},
}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 14,
}


def make_model(family: str):
    """A model all of whose parameters are random, so that a slip in any one shows."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            # Embeddings stay small: a wrong eps shows where variances are small. The rest is of order one.
            scale = 0.02 if "_embeddings" in name else 0.3
            x.add_(scale * torch.randn_like(x))
    return model


def make_inputs(family: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    pad, types = FAMILIES[family]["pad_token_id"], FAMILIES[family]["type_vocab_size"]
    mask = (np.arange(9)[None] < np.array([[9], [6], [2]])).astype(np.int32)
    ids = np.where(mask, draw.integers(3, SIZES["vocab_size"], size=(3, 9)), pad).astype(np.int32)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": draw.integers(types, size=(3, 9)).astype(np.int32),
    }


def outputs(model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        done = model(**{k: torch.tensor(x, dtype=torch.long) for k, x in inputs.items()}, output_hidden_states=True)
    return {"hidden": done.hidden_states[-1].numpy(), "logits": done.logits.numpy()}


def make(family: str) -> dict[str, np.ndarray]:
    """Everything that the file of a family holds."""
    import torch
    import transformers

    model, inputs = make_model(family), make_inputs(family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = {f"file/{name}": x for name, x in load_file(Path(folder) / "model.safetensors").items()}
    made_with = f"torch {torch.__version__}, transformers {transformers.__version__}"
    record = {"config": np.array(json.dumps(config)), "made_with": np.array(made_with)}
    return record | tensors | inputs | outputs(model, inputs)


if __name__ == "__main__":
    for family in FAMILIES:
        arrays: dict = make(family)
        np.savez_compressed(Path(__file__).parent / f"encoder_{family}.npz", **arrays)
