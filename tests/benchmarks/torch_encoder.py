"""The BERT encoder of ``jaxft.nn`` in PyTorch, on our weights: what the peers of the kernel benchmark differentiate.

Parameters are those of ours, layers as separate leaves, as a torch module would hold them.
"""

import numpy as np
import torch
from torch.nn import functional

__all__ = ["TorchEncoder", "weights_of"]

Weights = dict[str, torch.Tensor]


class TorchEncoder:
    """Encoder and its masked-word head, or a linear head on the first token: logits ``[b, c]`` of ids ``[b, t]``."""

    def __init__(self, layers: int, heads: int, *, label_ids: tuple[int, ...] | None, mask_position: int = 0):
        self.layers, self.heads, self.mask_position = layers, heads, mask_position
        self.label_ids = None if label_ids is None else torch.tensor(label_ids)

    def __call__(self, w: Weights, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the label words at the mask token; of the classes where there are no label words."""
        at = "encoder/embeddings/"
        embedded = functional.embedding(ids, w[at + "token"]) + w[at + "token_type"][0]
        x = _norm(w, at + "norm", embedded + w[at + "position"][: ids.shape[1]])
        for i in range(self.layers):
            x = self.layer(w, f"encoder/layers/{i}/", x)
        x = x[:, self.mask_position]
        if self.label_ids is None:
            return _dense(w, "classifier", x)
        x = _norm(w, "mlm/norm", functional.gelu(_dense(w, "mlm/dense", x)))
        return x @ functional.embedding(self.label_ids, w[at + "token"]).T + w["mlm/bias"][self.label_ids]

    def layer(self, w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
        """Attention and MLP, each with its residual and norm."""
        b, t, d = x.shape
        q, k, v = (
            _dense(w, f"{at}attention/{n}", x).reshape(b, t, self.heads, -1).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d)
        x = _norm(w, f"{at}attention_norm", x + _dense(w, f"{at}attention/output", mixed))
        hidden = functional.gelu(_dense(w, f"{at}mlp/in", x))
        return _norm(w, f"{at}mlp_norm", x + _dense(w, f"{at}mlp/out", hidden))


def _dense(w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{at}/kernel"] + w[f"{at}/bias"]


def _norm(w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{at}/scale"], w[f"{at}/bias"], 1e-12)


def weights_of(tree, layers: int) -> Weights:
    """The leaves of a tree like our parameters by path, stacked layers taken apart."""
    import jax

    from jaxft.core.checks import path_name

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, value = path_name(path), np.array(leaf)
        if name.startswith("encoder/layers/"):
            rest = name.removeprefix("encoder/layers/")
            found |= {f"encoder/layers/{i}/{rest}": torch.tensor(value[i]) for i in range(layers)}
        else:
            found[name] = torch.tensor(value)
    return found
