"""An MLP in PyTorch on our weights: the peer of the kernel benchmark's MLP."""

import torch

__all__ = ["logits"]


def logits(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Outputs ``[b, c]``."""
    names = sorted({name.rsplit("/", 1)[0] for name in weights})
    for i, name in enumerate(names):
        x = x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]
        if i < len(names) - 1:
            x = torch.nn.functional.gelu(x)
    return x
