"""The figures of a run, from its records and arrays."""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.mode_connectivity.config import ModeConnectivityConfig, net_sizes
from experiments.mode_connectivity.execute import pairs_of
from experiments.mode_connectivity.heuristics import HeuristicsResult
from experiments.mode_connectivity.heuristics_rows import draw_heuristics
from experiments.mode_connectivity.pairs import PATHS
from experiments.mode_connectivity.rows import kinds_of_networks
from jaxft.lab.figures import draw_drift
from jaxft.lab.figures_paths import draw_matrix, draw_paths, draw_plane
from jaxft.lab.figures_style import Drawing, save_figure
from jaxft.lab.records import Record, number, of_kind
from jaxft.lab.run import Run

FLOOR = 1e-6
"""Losses below it, in nats, are drawn there on a logarithmic axis."""


def draw_figures(
    run: Run, records: Sequence[Record], config: ModeConnectivityConfig, heuristics: HeuristicsResult | None
) -> list[str]:
    """Writes the figures of the run and returns their names."""
    drawings = dict(_drawings(run, records, config))
    if heuristics is not None:
        drawings["heuristics"] = draw_heuristics(heuristics)
    for name, drawing in drawings.items():
        save_figure(*drawing, run.figures, name)
    return list(drawings)


def _drawings(run: Run, records: Sequence[Record], config: ModeConnectivityConfig) -> Iterator[tuple[str, Drawing]]:
    for kind in kinds_of_networks(records):
        yield f"paths-{kind['net']}-{kind['dropout']:g}", _paths(run, records, config, kind["net"], kind["dropout"])
    yield from _widths(records)
    if of_kind(records, "matrix"):
        shown = run.load_arrays("shown")
        yield "matrix", _matrix(shown, of_kind(records, "matrix")[0]["labels"], config)
        if "plane_loss" in shown:
            yield "plane", _plane(shown, config)


def _said(net: str, dropout: float) -> str:
    return f"{net}, {f'dropout {dropout:g}' if dropout else 'no dropout'}"


def _paths(run: Run, records: Sequence[Record], config: ModeConnectivityConfig, net: str, dropout: float) -> Drawing:
    """Training loss along every path of the first pair of a kind, with the certificate."""
    pair = next(
        p for p in pairs_of(config) if of_kind(records, "pair", **p.key) and (p.net, p.dropout) == (net, dropout)
    )
    arrays = run.load_arrays(pair.file("paths"))
    series = [
        (words, arrays[f"{path}.t"], np.maximum(arrays[f"{path}.train_loss"], FLOOR))
        for path, words in PATHS.items()
        if f"{path}.t" in arrays
    ]
    found = of_kind(records, "pair", **pair.key)[0]
    return draw_paths(
        series,
        quantity="training loss (nats)",
        levels={"certificate": number(found["certificate"])},
        control=[PATHS["shuffled"]],
        title=f"{_said(net, dropout)}, seed {pair.seed}",
        log=True,
    )


def _widths(records: Sequence[Record]) -> Iterator[tuple[str, Drawing]]:
    """Epsilon against width, for every kind and depth of which there are two widths or more."""
    kinds = kinds_of_networks(records)
    depths = dict.fromkeys(net_sizes(kind["net"])[:2] for kind in kinds)
    for depth in depths:
        nets = [kind["net"] for kind in kinds if net_sizes(kind["net"])[:2] == depth]
        widths = sorted({net_sizes(net)[2] for net in nets})
        if len(widths) > 1:
            name = f"{'' if depth[0] == 'mlp' else depth[0]}{depth[1]}"
            yield f"epsilon-{name}", _epsilon(records, name, widths)


def _epsilon(records: Sequence[Record], name: str, widths: Sequence[int]) -> Drawing:
    """A row of values a network: the pairs of a width all count."""
    series, depth = [], net_sizes(f"{name}x{widths[0]}")[1]
    rates = sorted({kind["dropout"] for kind in kinds_of_networks(records)})
    for rate in rates:
        for part, words in (("", "best"), ("_median", "median")):
            pairs = [of_kind(records, "pair", net=f"{name}x{width}", dropout=rate) for width in widths]
            values = [[max(number(p[f"epsilon{part}_{s}"]), FLOOR) for p in found for s in "ab"] for found in pairs]
            networks = min(len(v) for v in values)
            if networks:
                label = f"{f'dropout {rate:g}' if rate else 'no dropout'}, {words}"
                series.append((label, list(widths), np.array([v[:networks] for v in values]).T))
    return draw_drift(
        series,
        quantity="ε (nats)",
        abscissa="width (units a hidden layer)",
        title=f"Dropout stability, {depth} hidden layer{'s' if depth > 1 else ''}",
        log=True,
        log_abscissa=True,
    )


def _matrix(shown: dict[str, np.ndarray], labels: Sequence[str], config: ModeConnectivityConfig) -> Drawing:
    return draw_matrix(
        [("as trained", shown["trained"]), ("matched to the first", shown["matched"])],
        labels,
        quantity="barrier of the line (nats)",
        title=_said(config.plane.net, config.plane.dropout),
    )


def _plane(shown: dict[str, np.ndarray], config: ModeConnectivityConfig) -> Drawing:
    corners = shown["plane_corners"]
    return draw_plane(
        shown["plane_x"],
        shown["plane_y"],
        np.maximum(shown["plane_loss"], FLOOR),
        quantity="training loss (nats)",
        points={name: (float(x), float(y)) for name, (x, y) in zip(("A", "B", "bend"), corners, strict=True)},
        paths={
            "straight line": (corners[:2, 0], corners[:2, 1]),
            "Bézier curve": (shown["plane_curve"][:, 0], shown["plane_curve"][:, 1]),
        },
        title=_said(config.plane.net, config.plane.dropout),
    )
