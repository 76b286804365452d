"""Figures of theory against measurement, each kept as PDF, PNG and the CSV of what it shows.

Theory is a line, measurement is markers, a control is grey. A drawing function returns the figure with its table,
``save_figure(*draw_dynamics(...), folder, name)`` writes both; the same data give the same bytes.
matplotlib is imported inside functions alone, and its global state is left as it was.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxft.core.checks import require
from jaxft.lab.records import write_atomically
from jaxft.lab.report import write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette and two of Tol's, told apart by colour-blind readers; each series has its own marker besides.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
CONTROL = "#8C8C8C"
METADATA = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E0E0E0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "svg.hashsalt": "jaxft",
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """The project's style, whatever the user's own settings are; they are restored."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


class Drawing(NamedTuple):
    """A figure and the table of what it shows, column by column."""

    figure: "Figure"
    table: dict[str, list[Any]]


@_style()
def save_figure(figure: "Figure", table: Mapping[str, Sequence[Any]], folder: Path, name: str) -> list[Path]:
    """Writes ``name.pdf``, ``name.png`` and ``name.csv`` into ``folder``, which is made if need be.

    No date, version or random name goes into the files, so that equal data give equal bytes.

    Args:
      figure: The figure.
      table: Columns of one length: what the figure shows, in full precision.
      folder: Where the files go.
      name: File name without suffix.

    Returns:
      The three paths.

    Raises:
      UserError: The columns differ in length.

    Example:
      >>> import tempfile
      >>> drawing = draw_agreement([0.5, 0.9], [0.6, 0.9], ["sst2", "rte"], ["prompt", "prompt"])
      >>> [path.name for path in save_figure(*drawing, Path(tempfile.mkdtemp()), "agreement")]
      ['agreement.pdf', 'agreement.png', 'agreement.csv']
    """
    lengths = {column: len(values) for column, values in table.items()}
    require(len(set(lengths.values())) <= 1, "save_figure", "columns must be of one length", lengths, "Pad with None")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in METADATA.items():
        data = io.BytesIO()
        figure.savefig(data, format=suffix, metadata=metadata, dpi=160)
        paths.append(folder / f"{name}.{suffix}")
        write_atomically(paths[-1], data.getvalue())
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    paths.append(folder / f"{name}.csv")
    write_csv(paths[-1], rows, list(table))
    return paths


@_style()
def draw_dynamics(
    series: Sequence[tuple[str, ArrayLike, ArrayLike, ArrayLike]],
    *,
    quantity: str,
    abscissa: str = "step (optimizer updates)",
    title: str = "",
    control: Sequence[str] = (),
    log: bool = False,
    log_abscissa: bool = False,
) -> Drawing:
    """A quantity during training, or over another abscissa: predicted as a line, measured as markers.

    Args:
      series: ``(label, steps, predicted, actual)``, the last three of one length; NaN where nothing is predicted.
      quantity: Label of the ordinate, with its unit.
      abscissa: Label of the abscissa, with its unit.
      title: Title, if any.
      control: Labels drawn in grey.
      log: Logarithmic ordinate.
      log_abscissa: Logarithmic abscissa, with a tick at every value of the series.

    Returns:
      The figure and a table of label, step, predicted and measured.

    Raises:
      UserError: No series, or lengths that differ.

    Example:
      >>> draw_dynamics([("sgd", [0, 1], [1.0, 0.5], [1.0, 0.6])], quantity="logit (nats)").table["measured"]
      [1.0, 0.6]
    """
    table: dict[str, list[Any]] = {"label": [], "step": [], "predicted": [], "measured": []}
    figure, axes = _axes(abscissa, quantity, title)
    colours = _colours([label for label, *_ in series], control)
    require(
        bool(series), "draw_dynamics", "needs at least one series", "none", "Pass (label, steps, predicted, actual)"
    )
    for (label, *columns), (colour, marker) in zip(series, colours, strict=True):
        steps, predicted, actual = (np.asarray(column, float) for column in columns)
        shapes = {steps.shape, predicted.shape, actual.shape}
        require(len(shapes) == 1, "draw_dynamics", f"columns of {label} must be of one length", shapes, "Cut them")
        axes.plot(steps, predicted, color=colour, linewidth=1.4)
        axes.plot(steps, actual, color=colour, marker=marker, linestyle="none", markerfacecolor="white", label=label)
        for column, values in zip(table, ([label] * len(steps), steps, predicted, actual), strict=True):
            table[column] += [v if isinstance(v, str) else float(v) for v in values]
    if log:
        axes.set_yscale("log")
    if log_abscissa:
        axes.set_xscale("log")
        values = sorted(set(table["step"]))
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
    axes.plot([], [], color="#404040", linewidth=1.4, label="predicted")
    axes.plot([], [], color="#404040", marker="o", linestyle="none", markerfacecolor="white", label="measured")
    _legend(axes)
    return Drawing(figure, table)


@_style()
def draw_drift(
    series: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    quantity: str,
    title: str = "",
    control: Sequence[str] = (),
    log: bool = False,
) -> Drawing:
    """A measured quantity over training by arm: mean over seeds, with the standard error of the mean.

    Args:
      series: ``(label, steps, values)`` with values of shape ``(seeds, steps)``; one seed has no error bar.
      quantity: Label of the ordinate, with its unit.
      title: Title, if any.
      control: Labels drawn in grey.
      log: Logarithmic ordinate.

    Returns:
      The figure and a table of label, step, mean, stderr and seeds.

    Raises:
      UserError: No series, or values that do not fit the steps.

    Example:
      >>> draw_drift([("sgd", [0, 1], [[0.0, 1.0], [0.0, 3.0]])], quantity="drift (fraction)").table["stderr"]
      [0.0, 1.0]
    """
    table: dict[str, list[Any]] = {"label": [], "step": [], "mean": [], "stderr": [], "seeds": []}
    figure, axes = _axes("step (optimizer updates)", quantity, title)
    require(bool(series), "draw_drift", "needs at least one series", "none", "Pass (label, steps, values)")
    colours = _colours([label for label, *_ in series], control)
    for (label, steps, values), (colour, marker) in zip(series, colours, strict=True):
        steps, values = np.asarray(steps, float), np.asarray(values, float)
        fits = values.ndim == 2 and len(values) > 0 and values.shape[1:] == steps.shape
        got = f"{values.shape} for {label}"
        require(fits, "draw_drift", f"values must be (seeds, {steps.size})", got, "Stack one row a seed")
        seeds = len(values)
        mean, stderr = values.mean(axis=0), values.std(axis=0, ddof=min(1, seeds - 1)) / np.sqrt(seeds)
        bars = stderr if seeds > 1 else None
        axes.errorbar(
            steps, mean, bars, color=colour, marker=marker, linewidth=0.8, linestyle=":", capsize=2, label=label
        )
        entries = ([label] * len(steps), steps.tolist(), mean.tolist(), stderr.tolist(), [seeds] * len(steps))
        for column, entry in zip(table, entries, strict=True):
            table[column] += entry if column != "stderr" or seeds > 1 else [None] * len(steps)
    if log:
        axes.set_yscale("log")
    _legend(axes)
    return Drawing(figure, table)


@_style()
def draw_agreement(
    x: ArrayLike,
    y: ArrayLike,
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    quantities: tuple[str, str] = ("fine-tuned accuracy (fraction)", "kernel accuracy (fraction)"),
    title: str = "",
    control: Sequence[str] = ("control",),
) -> Drawing:
    """Points against the diagonal on which two quantities agree.

    Args:
      x: Abscissae, shape ``(points,)``.
      y: Ordinates, same shape.
      labels: What each point is (its task): a marker each.
      groups: The arm of each point: a colour each.
      quantities: Labels of the two axes, with their units.
      title: Title, if any.
      control: Groups drawn in grey.

    Returns:
      The figure and a table of label, group, x and y.

    Raises:
      UserError: Lengths differ, or there is no point.

    Example:
      >>> draw_agreement([0.5, 0.9], [0.6, 0.9], ["sst2", "rte"], ["prompt", "control"]).table["group"]
      ['prompt', 'control']
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    sizes = [x.size, y.size, len(labels), len(groups)]
    fits = x.size > 0 and len(set(sizes)) == 1
    require(fits, "draw_agreement", "x, y, labels and groups must be of one length", sizes, "Give each point all four")
    figure, axes = _axes(*quantities, title)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    pad = 0.05 * (high - low) or 0.05
    axes.plot([low - pad, high + pad], [low - pad, high + pad], color="#404040", linewidth=1, label="equal")
    names, arms = list(dict.fromkeys(labels)), list(dict.fromkeys(groups))
    colour_of = {arm: colour for arm, (colour, _) in zip(arms, _colours(arms, control), strict=True)}
    marker_of = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}
    for i in range(x.size):
        colour, marker = colour_of[groups[i]], marker_of[labels[i]]
        axes.plot(x[i], y[i], color=colour, marker=marker, linestyle="none", markersize=5.5, alpha=0.85)
    for arm in arms:
        axes.plot([], [], color=colour_of[arm], linewidth=5, label=arm)
    for name in names if len(names) > 1 else []:
        axes.plot([], [], color="#404040", marker=marker_of[name], linestyle="none", label=name)
    axes.set_aspect("equal")
    _legend(axes)
    return Drawing(figure, {"label": list(labels), "group": list(groups), "x": x.tolist(), "y": y.tolist()})


def _axes(xlabel: str, ylabel: str, title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def _colours(labels: Sequence[str], control: Sequence[str]) -> list[tuple[str, str]]:
    """A colour and a marker a label, in order; grey for controls."""
    shown = [label for label in labels if label not in control]
    pairs = {label: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(shown)}
    return [pairs.get(label, (CONTROL, "x")) for label in labels]


def _legend(axes: "Axes") -> None:
    """Inside the axes while it is short, else beside them."""
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 4:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    else:
        axes.legend(loc="best")
