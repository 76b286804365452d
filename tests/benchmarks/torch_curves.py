"""Curves between networks as in Garipov et al. 2018, stated anew in plain PyTorch: the peer of the geometry benchmark.

Every layer holds the weights of all control points and mixes them at each forward pass; one t a batch; a path is
evaluated point by point, with the statistics of norms estimated anew over the data before each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["CurveNet", "evaluate", "fit", "set_threads"]

set_threads = torch.set_num_threads

Layer = dict[str, torch.Tensor]


class CurveNet:
    """A quadratic Bézier curve of an MLP or a convolutional net; layers are (kind, leaves with 3 control points)."""

    def __init__(self, control: dict[str, dict[str, np.ndarray]], pools: Sequence[int] = ()):
        self.pools = set(pools)
        channels = [
            leaves["kernel"].shape[-1] for leaves in control.values() if leaves.get("kernel", np.empty(0)).ndim == 5
        ]
        self.layers = {
            name: {leaf: _to_torch(value, leaf, channels[-1] if channels else 1) for leaf, value in leaves.items()}
            for name, leaves in control.items()
        }
        self.middle = []
        for name, leaves in self.layers.items():
            for leaf, points in leaves.items():
                if leaf in ("mean", "var"):
                    continue
                bend = points[1].clone().requires_grad_()
                self.layers[name][leaf] = [points[0], bend, points[2]]  # pyright: ignore[reportArgumentType]
                self.middle.append(bend)

    def mixed(self, name: str, leaf: str, t: float) -> torch.Tensor:
        """A leaf at t."""
        a, b, c = self.layers[name][leaf]
        return (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c

    def __call__(self, x: torch.Tensor, t: float, statistics: Any = None, *, train=False):
        """Logits at t; ``statistics`` of the norms are read, or written where ``train``."""
        *hidden, output = [name for name in self.layers if not name.startswith("norm")]
        for i, name in enumerate(hidden):
            x = self._linear(name, x, t)
            if f"norm_{i}" in self.layers:
                x = self._norm(f"norm_{i}", x, t, statistics, train)
            x = F.relu(x)
            if i in self.pools:
                x = F.max_pool2d(x, 2)
        return self._linear(output, x, t)

    def _linear(self, name: str, x: torch.Tensor, t: float) -> torch.Tensor:
        bias = self.mixed(name, "bias", t) if "bias" in self.layers[name] else None
        kernel = self.mixed(name, "kernel", t)
        if kernel.ndim == 4:
            return F.conv2d(x, kernel, bias, padding="same")
        return F.linear(x.flatten(1), kernel, bias)

    def _norm(self, name: str, x: torch.Tensor, t: float, statistics, train: bool) -> torch.Tensor:
        scale, bias = self.mixed(name, "scale", t), self.mixed(name, "bias", t)
        if not train:
            mean, variance = statistics[name]
            return F.batch_norm(x, mean, variance, scale, bias, eps=1e-5)
        statistics.setdefault(name, []).append((x.mean((0, 2, 3)), x.square().mean((0, 2, 3))))
        return F.batch_norm(x, None, None, scale, bias, training=True, eps=1e-5)


def fit(net: CurveNet, batches, ts: Sequence[float], *, learning_rate: float, momentum: float) -> list[torch.Tensor]:
    """One step of SGD a value of t, each on the next batch; returns the bends."""
    x, y = batches
    tx = torch.optim.SGD(net.middle, lr=learning_rate, momentum=momentum)
    for step, t in enumerate(ts):
        tx.zero_grad()
        loss = F.cross_entropy(net(x[step % len(x)], t), y[step % len(y)])
        loss.backward()
        tx.step()
    return [bend.detach() for bend in net.middle]


@torch.no_grad()
def evaluate(net: CurveNet, batches, ts: Sequence[float], *, norms: bool = False) -> np.ndarray:
    """Loss and error at each t, ``[points, 2]``."""
    x, y = batches
    rows = []
    for t in ts:
        statistics: dict[str, Any] = {}
        if norms:
            moments: dict[str, Any] = {}
            for images in x:
                net(images, t, moments, train=True)
            for name, each in moments.items():
                mean, square = (torch.stack(m).mean(0) for m in zip(*each, strict=True))
                statistics[name] = (mean, square - mean**2)
        logits = [net(images, t, statistics) for images in x]
        losses = [F.cross_entropy(z, labels).item() for z, labels in zip(logits, y, strict=True)]
        errors = [(z.argmax(1) != labels).float().mean().item() for z, labels in zip(logits, y, strict=True)]
        rows.append((np.mean(losses), np.mean(errors)))
    return np.array(rows)


def _to_torch(value: np.ndarray, leaf: str, channels: int) -> torch.Tensor:
    """``[points, ...]`` in the layout of torch: outputs, inputs, positions; in flattened maps channels come first."""
    if leaf == "kernel":
        if value.ndim == 3 and channels > 1:
            points, fan_in, outputs = value.shape
            value = value.reshape(points, -1, channels, outputs).swapaxes(1, 2).reshape(points, fan_in, outputs)
        value = np.moveaxis(value, [-1, -2], [1, 2])
    return torch.tensor(np.ascontiguousarray(value))
