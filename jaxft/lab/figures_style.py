"""The style of all figures, and how a figure is kept: PDF, PNG and the CSV of what it shows.

matplotlib is imported inside functions alone, and its global state is left as it was; equal data give equal bytes.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
def figure_style() -> Iterator[None]:
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


@figure_style()
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
      >>> figure, axes = make_axes("step", "loss", "")
      >>> [path.name for path in save_figure(figure, {"step": [0]}, Path(tempfile.mkdtemp()), "loss")]
      ['loss.pdf', 'loss.png', 'loss.csv']
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


def make_axes(xlabel: str, ylabel: str, title: str, *, size: tuple[float, float] = (5.6, 3.6)) -> "tuple[Figure, Axes]":
    """A figure of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def series_colours(labels: Sequence[str], control: Sequence[str]) -> list[tuple[str, str]]:
    """A colour and a marker a label, in order; grey for controls, and a thin marker."""
    shown = [label for label in labels if label not in control]
    pairs = {label: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(shown)}
    thin = itertools.cycle("x+12")
    return [pairs[label] if label in pairs else (CONTROL, next(thin)) for label in labels]


def add_legend(axes: "Axes") -> None:
    """Inside the axes while it is short, else beside them."""
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 4:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    else:
        axes.legend(loc="best")


def log_abscissa_at(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic abscissa with a tick at each of the values."""
    axes.set_xscale("log")
    ticks = sorted(set(values))
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xticks([], minor=True)
