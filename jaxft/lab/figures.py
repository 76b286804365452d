"""Figures of theory against measurement, each kept as PDF, PNG and the CSV of what it shows.

Theory is a line, measurement is markers, a control is grey. A drawing function returns the figure with its table,
``save_figure(*draw_dynamics(...), folder, name)`` writes both; the same data give the same bytes.
matplotlib is imported inside functions alone, and its global state is left as it was.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxft.core.checks import require
from jaxft.lab.figures_style import (
    CONTROL,
    MARKERS,
    PALETTE,
    Drawing,
    add_legend,
    figure_style,
    log_abscissa_at,
    make_axes,
    save_figure,
    series_colours,
)
from jaxft.structure.trees import Tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "CONTROL",
    "MARKERS",
    "PALETTE",
    "Drawing",
    "draw_agreement",
    "draw_drift",
    "draw_dynamics",
    "draw_scatter",
    "draw_trees",
    "save_figure",
]


@figure_style()
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
    figure, axes = make_axes(abscissa, quantity, title)
    colours = series_colours([label for label, *_ in series], control)
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
        log_abscissa_at(axes, table["step"])
    axes.plot([], [], color="#404040", linewidth=1.4, label="predicted")
    axes.plot([], [], color="#404040", marker="o", linestyle="none", markerfacecolor="white", label="measured")
    add_legend(axes)
    return Drawing(figure, table)


@figure_style()
def draw_drift(
    series: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    quantity: str,
    abscissa: str = "step (optimizer updates)",
    levels: Mapping[str, float] | None = None,
    title: str = "",
    control: Sequence[str] = (),
    log: bool = False,
    log_abscissa: bool = False,
    whole: bool = False,
) -> Drawing:
    """A measured quantity over training, or another abscissa, by arm: mean over seeds, with its standard error.

    Args:
      series: ``(label, steps, values)`` with values of shape ``(seeds, steps)``; one seed has no error bar.
      quantity: Label of the ordinate, with its unit.
      abscissa: Label of the abscissa, with its unit.
      levels: Predictions that do not depend on the abscissa, such as a bound: label -> level, drawn as lines.
      title: Title, if any.
      control: Labels drawn in grey.
      log: Logarithmic ordinate.
      log_abscissa: Logarithmic abscissa, with a tick at every value of the series.
      whole: Ticks of the abscissa at whole numbers alone.

    Returns:
      The figure and a table of label, step, mean, stderr and seeds; a level has no step.

    Raises:
      UserError: No series, or values that do not fit the steps.

    Example:
      >>> draw_drift([("sgd", [0, 1], [[0.0, 1.0], [0.0, 3.0]])], quantity="drift (fraction)").table["stderr"]
      [0.0, 1.0]
    """
    table: dict[str, list[Any]] = {"label": [], "step": [], "mean": [], "stderr": [], "seeds": []}
    figure, axes = make_axes(abscissa, quantity, title)
    require(bool(series), "draw_drift", "needs at least one series", "none", "Pass (label, steps, values)")
    colours = series_colours([label for label, *_ in series], control)
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
    for (label, level), style in zip((levels or {}).items(), itertools.cycle(("-", "--", ":"))):
        axes.axhline(level, color="#404040", linewidth=1.2, linestyle=style, label=label)
        for column, entry in zip(table, (label, None, float(level), None, None), strict=True):
            table[column].append(entry)
    if whole:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_yscale("log")
        _keep_means_in_sight(axes, table)
    if log_abscissa:
        log_abscissa_at(axes, [step for step in table["step"] if step is not None])
    add_legend(axes)
    return Drawing(figure, table)


def _keep_means_in_sight(axes: "Axes", table: Mapping[str, Sequence[Any]]) -> None:
    """On a logarithmic axis a bar that nearly reaches 0 goes down for decades: it must not set the range."""
    bars = [(m, m - (e or 0)) for m, e in zip(table["mean"], table["stderr"], strict=True) if m > 0]
    if any(end < mean / 10 for mean, end in bars):
        axes.set_ylim(bottom=0.8 * min(max(end, mean / 10) for mean, end in bars))


@figure_style()
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
    figure, axes = make_axes(*quantities, title)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    pad = 0.05 * (high - low) or 0.05
    axes.plot([low - pad, high + pad], [low - pad, high + pad], color="#404040", linewidth=1, label="equal")
    names, arms = list(dict.fromkeys(labels)), list(dict.fromkeys(groups))
    colour_of = {arm: colour for arm, (colour, _) in zip(arms, series_colours(arms, control), strict=True)}
    marker_of = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}
    for i in range(x.size):
        colour, marker = colour_of[groups[i]], marker_of[labels[i]]
        axes.plot(x[i], y[i], color=colour, marker=marker, linestyle="none", markersize=5.5, alpha=0.85)
    for arm in arms:
        axes.plot([], [], color=colour_of[arm], linewidth=5, label=arm)
    for name in names if len(names) > 1 else []:
        axes.plot([], [], color="#404040", marker=marker_of[name], linestyle="none", label=name)
    axes.set_aspect("equal")
    add_legend(axes)
    return Drawing(figure, {"label": list(labels), "group": list(groups), "x": x.tolist(), "y": y.tolist()})


@figure_style()
def draw_scatter(
    groups: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    quantities: tuple[str, str],
    title: str = "",
    control: Sequence[str] = (),
) -> Drawing:
    """Many points a group against the diagonal on which prediction and truth agree, one panel a group.

    Args:
      groups: ``(label, x, y)``, x and y of one length.
      quantities: Labels of the two axes, with their units.
      title: Title, if any.
      control: Labels drawn in grey.

    Returns:
      The figure and a table of label, x and y.

    Raises:
      UserError: No group, or lengths that differ.

    Example:
      >>> draw_scatter([("probe", [0.1, 0.9], [0.2, 0.8])], quantities=("true", "predicted")).table["y"]
      [0.2, 0.8]
    """
    from matplotlib.figure import Figure

    require(bool(groups), "draw_scatter", "needs at least one group", "none", "Pass (label, x, y)")
    pairs = {label: (np.asarray(x, float), np.asarray(y, float)) for label, x, y in groups}
    shapes = {label: (x.shape, y.shape) for label, (x, y) in pairs.items()}
    fits = all(x.ndim == 1 and x.shape == y.shape and x.size for x, y in pairs.values())
    require(fits, "draw_scatter", "x and y must be of one length, 1 or more", shapes, "Give each point both")
    ends = [
        f(values.reshape(-1)) for f in (np.min, np.max) for values in (np.concatenate([*p]) for p in pairs.values())
    ]
    limits = (min(ends), max(ends))
    figure = Figure(figsize=(2.7 * len(pairs) + 0.4, 3.1), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    table: dict[str, list[Any]] = {"label": [], "x": [], "y": []}
    panels = figure.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (label, (x, y)), (colour, _) in zip(
        panels, pairs.items(), series_colours(list(pairs), control), strict=True
    ):
        axes.plot(limits, limits, color="#404040", linewidth=1)
        # Thousands of vector marks would make a PDF of megabytes.
        axes.plot(x, y, ".", color=colour, markersize=3, alpha=0.35, markeredgewidth=0, rasterized=True)
        axes.set(xlabel=quantities[0], title=label, aspect="equal")
        for column, values in zip(table, ([label] * x.size, x.tolist(), y.tolist()), strict=True):
            table[column] += values
    panels[0].set_ylabel(quantities[1])
    return Drawing(figure, table)


@figure_style()
def draw_trees(trees: Sequence[tuple[str, Tree]], *, marked: Sequence[set[tuple[int, int]]] = ()) -> Drawing:
    """Constituency trees, one below the other.

    Args:
      trees: ``(title, tree)``.
      marked: For each tree the spans [i, j) drawn in colour, such as those that another tree lacks; none by default.

    Returns:
      The figure and a table of tree, label, start and end: every constituent, parents first.

    Raises:
      UserError: No tree, or marks for some of them alone.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> draw_trees([("gold", parse_tree("(S (N dogs) (V bark))"))]).table["label"]
      ['S', 'N', 'V']
    """
    from matplotlib.figure import Figure

    require(bool(trees), "draw_trees", "needs at least one tree", "none", "Pass (title, tree)")
    rule = "marked must have a set of spans a tree, or be empty"
    require(len(marked) in (0, len(trees)), "draw_trees", rule, len(marked), "Mark every tree")
    words = max(len(tree.leaves()) for _, tree in trees)
    heights = [tree.height() for _, tree in trees]
    size = (max(3.0, 0.62 * words + 0.4), 0.3 * sum(heights) + 0.55 * len(trees))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(trees), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    table: dict[str, list[Any]] = {"tree": [], "label": [], "start": [], "end": []}
    for axes, (title, tree), spans in zip(panels, trees, marked or [set()] * len(trees), strict=True):
        axes.set_axis_off()
        axes.set_title(title, loc="left", fontsize=9)
        drawn: list[tuple[str, int, int]] = []
        _draw_node(axes, tree, 0, spans, drawn)
        for label, i, j in drawn:
            for column, value in zip(table, (title, label, i, j), strict=True):
                table[column].append(value)
    return Drawing(figure, table)


def _draw_node(
    axes: "Axes", node: Tree | str, start: int, marked: set[tuple[int, int]], drawn: list[tuple[str, int, int]]
) -> tuple[float, int, int]:
    """Draws what is below a node and the node; returns its place, and where its words end."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    if isinstance(node, str):
        axes.text(start, 0, node, ha="center", va="center", style="italic", bbox=box, zorder=2)
        return float(start), 0, start + 1
    at, end = len(drawn), start
    drawn.append((node.label, start, start))
    below = []
    for child in node.children:
        x, height, end = _draw_node(axes, child, end, marked, drawn)
        below.append((x, height))
    drawn[at] = (node.label, start, end)
    x, y = sum(x for x, _ in below) / len(below), 1 + max(height for _, height in below)
    colour = PALETTE[1] if (start, end) in marked and end - start > 1 else "#404040"
    for child_x, height in below:
        axes.plot([x, child_x], [y, height], color=colour, linewidth=0.9, zorder=1)
    axes.text(x, y, node.label, ha="center", va="center", color=colour, bbox=box, zorder=2)
    return x, y, end
