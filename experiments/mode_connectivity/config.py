"""Settings of the experiment and its presets."""

import dataclasses
import re
from pathlib import Path

from experiments.mode_connectivity.heuristics_config import SMOKE as SMOKE_HEURISTICS
from experiments.mode_connectivity.heuristics_config import Heuristics

NET = re.compile(r"(conv|vgg)?(\d+)x(\d+)")
"""Names of networks: 2x256 has 2 hidden layers of 256 units, conv3x32 has 3 convolutions of 32 channels, vgg3x16 has 3
convolutions of 16, 32 and 64 channels with a norm and a pool behind each."""

LEAST_WIDTH = 4
"""Half of the units of a layer are dropped: fewer than two kept ones are no network."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Training of each network, by Adam."""

    steps: int = 1000
    batch_size: int = 128
    event_every: int = 500
    """Steps between events: the losses on both splits, and a checkpoint."""
    learning_rate: float = 1e-3

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        return _not_positive(self, ("steps", "batch_size", "event_every", "learning_rate"))


@dataclasses.dataclass(frozen=True)
class Stability:
    """Dropout stability: the best of several random halves of the units of every layer."""

    draws: int = 20

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        return _not_positive(self, ("draws",))


@dataclasses.dataclass(frozen=True)
class Paths:
    """Paths that are fitted, and how all paths are looked at."""

    points: int = 61
    """Points at which losses are evaluated; a constructive path has 8 a segment."""
    steps: int = 500
    """Steps of each fit."""
    batch_size: int = 128
    learning_rate: float = 5e-3
    points_per_step: int = 4
    """Points of the curve at which a step takes the gradient."""
    bends: int = 3
    """Interior control points of the polychain; the Bézier curve has one."""
    pivots: int = 5
    """Interior points of the elastic band."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        names = ("steps", "batch_size", "learning_rate", "points_per_step", "bends", "pivots")
        few = [f"points: must be 3 or more, got {self.points}"] if self.points < 3 else []
        return _not_positive(self, names) + few


@dataclasses.dataclass(frozen=True)
class Plane:
    """What is shown of one kind of network: a plane of losses, and the barriers between all of its networks."""

    net: str = "2x256"
    dropout: float = 0.0
    points: int = 25
    """Points of each side of the plane."""
    margin: float = 0.3
    """How far the plane reaches beyond its three networks, in parts of their distance."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        bad = [f"points: must be 3 or more, got {self.points}"] if self.points < 3 else []
        return bad + ([] if self.margin >= 0 else [f"margin: must not be negative, got {self.margin}"])


@dataclasses.dataclass(frozen=True)
class ModeConnectivityConfig:
    """Paths between trained networks. Kuditipudi et al. 2019, arXiv 1906.06247."""

    data: Path | None = None
    """Images: a .npz file or a folder of IDX files; scikit-learn's digits by default."""
    nets: tuple[str, ...] = ("1x64", "1x256", "1x1024", "2x64", "2x128", "2x256", "3x128")
    """Hidden layers and width: 2x256; conv3x32 for convolutions; vgg3x16 for convolutions with norms and pools."""
    dropout: tuple[float, ...] = (0.0, 0.5)
    """Probabilities with which hidden units are dropped in training, each for every network."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Pairs of networks, of each size and dropout."""
    seed: int = 0
    """Of the split of the data, of masks and of the control."""
    training: Training = Training()
    stability: Stability = Stability()
    paths: Paths = Paths()
    plane: Plane = Plane()
    heuristics: Heuristics = dataclasses.field(default_factory=Heuristics)
    evaluation_images: int = 4096
    """Images of each split, drawn at random where there are more, over which losses are means: as in the paper."""
    evaluation_batch: int = 2048
    """Images evaluated at once."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        several = {"nets": self.nets, "dropout": self.dropout, "seeds": self.seeds}
        bad = [f"{name}: needs at least one" for name, values in several.items() if not values]
        bad += [f"{name}: repeats {values}" for name, values in several.items() if len(set(values)) < len(values)]
        bad += [fault for net in self.nets for fault in _net_faults(net)]
        bad += [f"dropout: must lie in [0, 1), got {frac}" for frac in self.dropout if not 0 <= frac < 1]
        if self.data is not None and not self.data.exists():
            bad.append(f"data: {self.data} does not exist")
        for name, shown, trained in (
            ("net", self.plane.net, self.nets),
            ("dropout", self.plane.dropout, self.dropout),
        ):
            if shown not in trained:
                listed = ", ".join(map(str, trained))
                bad.append(f"plane.{name}: must be one of {listed}, got {shown}. Set --plane.{name}")
        return bad + _not_positive(self, ("evaluation_images", "evaluation_batch"))


def net_sizes(name: str) -> tuple[str, int, int]:
    """Kind (``mlp``, ``conv`` or ``vgg``), hidden layers and width of a network, from its name.

    Example:
      >>> net_sizes("2x256"), net_sizes("conv3x32")
      (('mlp', 2, 256), ('conv', 3, 32))
    """
    found = NET.fullmatch(name)
    return (found[1] or "mlp", int(found[2]), int(found[3])) if found else ("", 0, 0)


def _net_faults(name: str) -> list[str]:
    kind, layers, width = net_sizes(name)
    if not kind or layers < 1:
        return [f"nets: must be named <layers>x<width>, conv<layers>x<width> or vgg<layers>x<width>, got {name!r}"]
    return [] if width >= LEAST_WIDTH else [f"nets: must be {LEAST_WIDTH} units wide or wider, got {name!r}"]


def _not_positive(fields: object, names: tuple[str, ...]) -> list[str]:
    return [f"{name}: must be positive, got {getattr(fields, name)}" for name in names if getattr(fields, name) <= 0]


PRESETS = {
    "smoke": ModeConnectivityConfig(
        nets=("1x8", "1x16"),
        seeds=(0, 1),
        training=Training(steps=40, batch_size=32, event_every=20, learning_rate=1e-2),
        stability=Stability(draws=4),
        paths=Paths(points=5, steps=6, batch_size=32, points_per_step=2, bends=2, pivots=2),
        plane=Plane(net="1x16", points=4),
        heuristics=SMOKE_HEURISTICS,
    ),
    "cpu": ModeConnectivityConfig(),
    "conv": ModeConnectivityConfig(
        nets=("conv3x8", "conv3x32"),
        dropout=(0.0, 0.25),
        seeds=(0, 1, 2),
        training=Training(steps=600, batch_size=64, event_every=300),
        paths=Paths(points=31, steps=300, batch_size=64, learning_rate=3e-3, points_per_step=2, pivots=3),
        plane=Plane(net="conv3x32", points=13),
        heuristics=Heuristics(models=0),
        evaluation_batch=512,
    ),
    "accel": ModeConnectivityConfig(
        nets=("2x256", "2x1024", "2x4096", "3x1024", "conv3x32", "conv3x128"),
        seeds=(0, 1, 2, 3, 4),
        training=Training(steps=10_000, batch_size=64, event_every=2000),
        stability=Stability(draws=100),
        paths=Paths(steps=5000, points_per_step=8, pivots=9),
        plane=Plane(net="2x1024", points=51),
        heuristics=Heuristics(models=32, width=256, layers=4, evaluation_sentences=1600),
    ),
}
