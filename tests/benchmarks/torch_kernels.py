"""Empirical kernels in torch.func: the algorithm of the reference code of arXiv 2210.05643, and Jacobian contraction.

A network is a function ``f(weights, ids)`` of a batch, ``[b, t]`` to ``[b, c]``. Kernels are ``[n, c, m, c]``.
"""

from collections.abc import Callable, Iterator

import torch
from torch.func import jacrev, jvp, vmap

__all__ = ["by_directional_derivatives", "contraction"]

Weights = dict[str, torch.Tensor]
Network = Callable[[Weights, torch.Tensor], torch.Tensor]
Map = Callable[[str, torch.Tensor], torch.Tensor]
"""Of a leaf's name and gradients."""


def by_directional_derivatives(
    f: Network, weights: Weights, x: torch.Tensor, y: torch.Tensor, *, chunk: int
) -> torch.Tensor:
    """The gradients of one row at a time, and along each a derivative of all columns; columns in chunks."""

    def of_row(ids):
        jacobian = jacrev(lambda w: f(w, ids[None])[0])(weights)

        def along(tangent, side):
            return jvp(lambda w: f(w, side), (weights,), (tangent,))[1]

        return torch.cat([vmap(along, (0, None))(jacobian, side) for side in y.split(chunk)], dim=1)

    return torch.stack([of_row(ids) for ids in x])


def contraction(
    f: Network,
    weights: Weights,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    chunk: int,
    rows: Map | None = None,
    columns: Map | None = None,
) -> torch.Tensor:
    """Jacobians of all rows, and of a chunk of columns at a time, contracted leaf by leaf."""
    left: Weights = {}
    for start, part in _jacobians(f, weights, x, rows, chunk):
        for name, jacobian in part.items():
            held = left.setdefault(name, jacobian.new_empty(len(x), *jacobian.shape[1:]))
            held[start : start + len(jacobian)] = jacobian

    def against(right):
        return torch.stack([left[name].flatten(0, 1) @ right[name].flatten(0, 1).T for name in weights]).sum(0)

    parts = [against(part) for _, part in _jacobians(f, weights, y, columns, chunk)]
    return torch.cat(parts, dim=1).reshape(len(x), -1, len(y), parts[0].shape[0] // len(x))


def _jacobians(
    f: Network, weights: Weights, side: torch.Tensor, mapped: Map | None, chunk: int
) -> Iterator[tuple[int, Weights]]:
    """Of a chunk of examples, the first's number and matrices ``[example, output, parameter]``."""
    of_one = vmap(jacrev(lambda w, ids: f(w, ids[None])[0]), (None, 0))
    for start in range(0, len(side), chunk):
        found = {name: j.flatten(2) for name, j in of_one(weights, side[start : start + chunk]).items()}
        yield start, found if mapped is None else {name: mapped(name, found.pop(name)) for name in weights}
