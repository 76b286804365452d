"""The encoder of ``jaxft.nn`` with a linear head, written for torch.func: the peer of the kernel benchmark.

Parameters are those of ours, layers as separate leaves, as a torch module would hold them.
"""

import numpy as np
import torch
from torch.func import functional_call, jacrev, jvp, vjp, vmap

__all__ = ["TorchEncoder", "contraction", "ntk_vector_products", "weights_of"]


class TorchEncoder(torch.nn.Module):
    """BERT encoder and a linear head on the first token; one sequence of ids in, logits out."""

    def __init__(self, weights: dict[str, torch.Tensor], layers: int, heads: int):
        super().__init__()
        self.layers, self.heads = layers, heads
        for name, value in weights.items():
            self.register_parameter(name.replace("/", "_"), torch.nn.Parameter(value))

    def leaf(self, name: str) -> torch.Tensor:
        """A parameter by its path."""
        return getattr(self, name.replace("/", "_"))

    def dense(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Affine map."""
        return x @ self.leaf(f"{name}/kernel") + self.leaf(f"{name}/bias")

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Layer norm."""
        scale, bias = self.leaf(f"{name}/scale"), self.leaf(f"{name}/bias")
        return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[c]`` of one sequence ``[t]``."""
        at = "encoder/embeddings/"
        embedded = self.leaf(at + "token")[ids] + self.leaf(at + "token_type")[torch.zeros_like(ids)]
        x = self.norm(at + "norm", embedded + self.leaf(at + "position")[: len(ids)])
        for i in range(self.layers):
            x = self.layer(f"encoder/layers/{i}/", x)
        return self.dense("classifier", x[0])

    def layer(self, at: str, x: torch.Tensor) -> torch.Tensor:
        """Attention and MLP, each with its residual and norm."""
        t, d = x.shape
        split = (t, self.heads, d // self.heads)
        q, k, v = (self.dense(f"{at}attention/{n}", x).reshape(split) for n in ("query", "key", "value"))
        scores = torch.einsum("the,uhe->htu", q, k) / split[-1] ** 0.5
        mixed = torch.einsum("htu,uhe->the", scores.softmax(-1), v).reshape(t, d)
        x = self.norm(f"{at}attention_norm", x + self.dense(f"{at}attention/output", mixed))
        hidden = torch.nn.functional.gelu(self.dense(f"{at}mlp/in", x))
        return self.norm(f"{at}mlp_norm", x + self.dense(f"{at}mlp/out", hidden))


def weights_of(params, layers: int) -> dict[str, torch.Tensor]:
    """Our parameters by path, stacked layers taken apart."""
    import jax

    from jaxft.core.checks import path_name

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, value = path_name(path), np.array(leaf)
        if name.startswith("encoder/layers/"):
            rest = name.removeprefix("encoder/layers/")
            found |= {f"encoder/layers/{i}/{rest}": torch.tensor(value[i]) for i in range(layers)}
        else:
            found[name] = torch.tensor(value)
    return found


def contraction(net: TorchEncoder, x: torch.Tensor, y: torch.Tensor, *, chunk: int | None = None) -> torch.Tensor:
    """Jacobians of all examples, contracted leaf by leaf: torch.func's first recipe for the empirical NTK."""
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def jacobian(side):
        one = jacrev(lambda p, ids: functional_call(net, p, (ids,)))
        return {k: j.flatten(2) for k, j in vmap(one, (None, 0), chunk_size=chunk)(weights, side).items()}

    a, b = jacobian(x), jacobian(y)
    return sum(torch.einsum("ncp,mdp->ncmd", a[k], b[k]) for k in weights)


def ntk_vector_products(net: TorchEncoder, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A backward and a forward derivative for every pair of examples and output: torch.func's second recipe."""
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def pair(a, b):
        def at(ids):
            return lambda p: functional_call(net, p, (ids,))

        logits, pull = vjp(at(b), weights)

        def product(v):
            return jvp(at(a), (weights,), pull(v))[1]

        return vmap(product)(torch.eye(len(logits)))

    rows = [vmap(pair, (None, 0))(a, y) for a in x]
    # [n, m, columns' output, rows' output] -> [n, c, m, c]
    return torch.stack(rows).permute(0, 3, 1, 2)
