"""Figures of paths between networks: the loss along them, a plane through them, what is measured of every pair."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxft.core.checks import require
from jaxft.lab.figures_style import CONTROL, PALETTE, Drawing, figure_style, make_axes, series_colours
from jaxft.lab.report import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", "-.", ":")
PLANE_COLOURS = "cividis"
"""Read alike with and without colour vision."""

FLATTEST = 0.4
"""Height over width of the flattest plane that is drawn in the proportions of parameter space."""


@figure_style()
def draw_paths(
    paths: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    quantity: str,
    levels: Mapping[str, float] | None = None,
    title: str = "",
    control: Sequence[str] = (),
    log: bool = False,
) -> Drawing:
    """A quantity along paths that join the same two points, all in one panel.

    Args:
      paths: ``(label, t, values)``, the last two of one length; t runs from 0 to 1.
      quantity: Label of the ordinate, with its unit.
      levels: Predictions that do not depend on t, such as a certificate: label -> level, drawn as lines.
      title: Title, if any.
      control: Labels drawn in grey.
      log: Logarithmic ordinate.

    Returns:
      The figure and a table of label, t and value; a level has no t.

    Raises:
      UserError: No path, or t and values that differ in length.

    Example:
      >>> draw_paths([("line", [0, 1], [0.1, 0.2])], quantity="loss (nats)", levels={"bound": 0.5}).table["value"]
      [0.1, 0.2, 0.5]
    """
    require(bool(paths), "draw_paths", "needs at least one path", "none", "Pass (label, t, values)")
    figure, axes = make_axes("t (fraction of the path)", quantity, title, size=(6.4, 3.6))
    table: dict[str, list[Any]] = {"label": [], "t": [], "value": []}
    colours = series_colours([label for label, *_ in paths], control)
    for number, ((label, *columns), (colour, _)) in enumerate(zip(paths, colours, strict=True)):
        t, values = (np.asarray(column, float) for column in columns)
        fits = t.ndim == 1 and t.shape == values.shape
        got = f"{t.shape} and {values.shape} for {label}"
        require(fits, "draw_paths", "t and values must be of one length", got, "Cut the longer one")
        dash = DASHES[number // len(PALETTE) % len(DASHES)]
        axes.plot(t, values, color=colour, linewidth=1.5, linestyle=dash, label=label)
        for column, entries in zip(table, ([label] * len(t), t.tolist(), values.tolist()), strict=True):
            table[column] += entries
    for (label, level), dash in zip((levels or {}).items(), (":", "--", "-.", "-") * 4, strict=False):
        axes.axhline(level, color="#404040", linewidth=1.1, linestyle=dash, label=label)
        for column, entry in zip(table, (label, None, float(level)), strict=True):
            table[column].append(entry)
    if log:
        axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    return Drawing(figure, table)


@figure_style()
def draw_plane(
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    *,
    quantity: str,
    points: Mapping[str, tuple[float, float]] | None = None,
    paths: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    title: str = "",
    levels: int = 12,
) -> Drawing:
    """A positive quantity on a plane of parameter space as filled contours, with points and paths drawn in.

    Contours are equally spaced in the logarithm: a loss that ends in a basin spans decades.

    Args:
      x: Abscissae of the grid, in units of parameter space, shape ``(columns,)``.
      y: Ordinates, shape ``(rows,)``.
      values: Positive values, shape ``(rows, columns)``.
      quantity: What the values are, with the unit.
      points: Networks in the plane by label.
      paths: Coordinates of paths in the plane by label.
      title: Title, if any.
      levels: Number of contours.

    Returns:
      The figure and a table of label, x, y and value: the grid row by row, then points and paths without a value.

    Raises:
      UserError: Shapes that do not fit, or a value that is not positive and finite.

    Example:
      >>> drawing = draw_plane([0, 1], [0, 1], [[1.0, 2.0], [3.0, 4.0]], quantity="loss", points={"A": (0.0, 0.0)})
      >>> drawing.table["label"], drawing.table["value"][-2:]
      (['grid', 'grid', 'grid', 'grid', 'A'], [4.0, None])
    """
    x, y, values = np.asarray(x, float), np.asarray(y, float), np.asarray(values, float)
    fits = x.ndim == y.ndim == 1 and values.shape == (y.size, x.size) and min(values.shape) > 1
    shapes = (values.shape, y.shape, x.shape)
    require(fits, "draw_plane", "values must be (rows, columns), both 2 or more", shapes, "Evaluate the whole grid")
    positive = bool((np.isfinite(values) & (values > 0)).all())
    require(positive, "draw_plane", "values must be positive and finite", values.min(), "Clip them")
    height = float(np.clip(4.4 * np.ptp(y) / np.ptp(x) + 1.5, 3.0, 6.0))
    figure, axes = make_axes("distance along the line (parameter norm)", "distance from it", "", size=(5.8, height))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    ends = np.log10(values.min()), np.log10(values.max()) + 1e-6
    contours = axes.contourf(x, y, values, levels=np.logspace(*ends, levels), norm="log", cmap=PLANE_COLOURS)
    bar = figure.colorbar(contours, ax=axes, label=quantity)
    ticks = np.logspace(*ends, 6)
    bar.set_ticks(ticks.tolist(), labels=[format_number(float(tick)) for tick in ticks])
    bar.ax.minorticks_off()
    grid_x, grid_y = np.meshgrid(x, y)
    table = {
        "label": ["grid"] * values.size,
        "x": grid_x.ravel().tolist(),
        "y": grid_y.ravel().tolist(),
        "value": values.ravel().tolist(),
    }
    _overlay(axes, points or {}, paths or {}, table)
    axes.grid(False)
    # A flat triangle is drawn higher than it is, so that something is seen of it.
    if np.ptp(y) > FLATTEST * np.ptp(x):
        axes.set_aspect("equal")
    return Drawing(figure, table)


def _overlay(
    axes: "Axes",
    points: Mapping[str, tuple[float, float]],
    paths: Mapping[str, tuple[ArrayLike, ArrayLike]],
    table: dict[str, list[Any]],
) -> None:
    """Points and paths on a plane, and their rows of the table."""
    for number, (label, (path_x, path_y)) in enumerate(paths.items()):
        path_x, path_y = np.asarray(path_x, float), np.asarray(path_y, float)
        axes.plot(path_x, path_y, color="white", linewidth=1.6, linestyle=DASHES[number % len(DASHES)], label=label)
        for column, entries in zip(
            table, ([label] * path_x.size, path_x.tolist(), path_y.tolist(), [None] * path_x.size), strict=True
        ):
            table[column] += entries
    for label, (point_x, point_y) in points.items():
        axes.plot(point_x, point_y, marker="o", color=PALETTE[1], markeredgecolor="white", linestyle="none")
        axes.annotate(label, (point_x, point_y), xytext=(5, 5), textcoords="offset points", color="white")
        for column, entry in zip(table, (label, point_x, point_y, None), strict=True):
            table[column].append(entry)
    if paths:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1.01), "borderaxespad": 0, "ncols": len(paths)}
        axes.legend(**place, labelcolor="white", facecolor="#505050", frameon=True, framealpha=1)


@figure_style()
def draw_matrix(
    panels: Sequence[tuple[str, ArrayLike]],
    labels: Sequence[str],
    *,
    quantity: str,
    groups: Sequence[Any] | None = None,
    bars: tuple[str, ArrayLike] | None = None,
    one_scale: bool = True,
    title: str = "",
) -> Drawing:
    """What is measured of every pair of models, as heat maps, with a quantity of each model beside them.

    Args:
      panels: ``(title, matrix)``, each of shape ``(models, models)``; NaN is left white.
      labels: Names of the models.
      quantity: What the entries are, with the unit.
      groups: Cluster of each model: models are put in order of it, and lines part the clusters.
      bars: A quantity of each model, ``(label, values)``, drawn as bars beside the last panel.
      one_scale: One scale of colours for all panels, rather than one each.
      title: Title, if any.

    Returns:
      The figure and a table of panel, row, column and value; bars are a panel without a column.

    Raises:
      UserError: No panel, or a matrix, groups or bars that do not fit the labels.

    Example:
      >>> draw_matrix([("line", [[0, 1], [1, 0]])], ["a", "b"], quantity="barrier (nats)").table["value"]
      [0.0, 1.0, 1.0, 0.0]
    """
    from matplotlib.figure import Figure

    where, m = "draw_matrix", len(labels)
    require(bool(panels), where, "needs at least one panel", "none", "Pass (title, matrix)")
    arrays = {name: np.asarray(matrix, float) for name, matrix in panels}
    shapes = {name: array.shape for name, array in arrays.items()}
    require(set(shapes.values()) == {(m, m)}, where, f"matrices must be ({m}, {m})", shapes, "Give each pair an entry")
    beside = np.asarray(bars[1], float) if bars else np.zeros(m)
    sizes = (len(groups) if groups is not None else m, *beside.shape)
    require(sizes == (m, m), where, f"groups and bars must have {m} entries", sizes, "Give each model one")
    order = (np.argsort(np.asarray(groups), kind="stable") if groups is not None else np.arange(m)).tolist()
    names = [str(labels[i]) for i in order]
    parts = [] if groups is None else [groups[i] for i in order]
    width = max(3.2, 0.34 * m + 1.2) + (0.0 if one_scale else 0.7)
    size = (width * len(panels) + 2.6 * bool(bars) + 0.9, max(3.0, 0.34 * m + 1.3))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    widths = [1.0] * len(panels) + [0.6] * bool(bars)
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    tops = [0.0 if np.isnan(a).all() else float(np.nanmax(a)) for a in arrays.values()]
    table: dict[str, list[Any]] = {"panel": [], "row": [], "column": [], "value": []}
    for panel, (name, array), top in zip(axes, arrays.items(), tops, strict=False):
        ordered = array[np.ix_(order, order)]
        image = panel.imshow(ordered, cmap=PLANE_COLOURS, vmin=0, vmax=(max(tops) if one_scale else top) or 1.0)
        _matrix_ticks(panel, name, names, parts)
        if not one_scale or panel is axes[len(panels) - 1]:
            beside_it = list(axes[: len(panels)]) if one_scale else panel
            figure.colorbar(image, ax=beside_it, label=quantity, shrink=0.85)
        cells = [(name, a, b, float(ordered[k, n])) for k, a in enumerate(names) for n, b in enumerate(names)]
        _append(table, cells)
    if bars:
        axes[-1].barh(np.arange(m), beside[order], color=PALETTE[0])
        axes[-1].set(yticks=np.arange(m), yticklabels=names, ylim=(m - 0.5, -0.5), xlabel=bars[0])
        _append(table, [(bars[0], name, None, float(beside[i])) for name, i in zip(names, order, strict=True)])
    return Drawing(figure, table)


def _append(table: dict[str, list[Any]], rows: Sequence[tuple[Any, ...]]) -> None:
    """Rows at the end of a table of columns."""
    for row in rows:
        for column, entry in zip(table.values(), row, strict=True):
            column.append(entry)


def _matrix_ticks(axes: "Axes", title: str, names: Sequence[str], groups: Sequence[Any]) -> None:
    """Names of the models on both axes, and lines between clusters."""
    ticks = np.arange(len(names))
    axes.set_title(title, fontsize=9)
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    axes.grid(False)
    for i in range(1, len(groups)):
        if groups[i] != groups[i - 1]:
            axes.axhline(i - 0.5, color=CONTROL, linewidth=1.4)
            axes.axvline(i - 0.5, color=CONTROL, linewidth=1.4)
