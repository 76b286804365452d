"""Figures of preference tuning: what becomes of probability, by percentile of a score, by token, by way of tuning.

Theory is a line or an open bar, measurement is markers or filled bars, a control is grey.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxft.core.checks import require
from jaxft.core.types import Interval
from jaxft.lab.figures_style import CONTROL, MARKERS, PALETTE, Drawing, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_A_ROW = 4


@figure_style()
def draw_percentiles(
    series: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    quantity: str,
    abscissa: str = "percentile of the score",
    title: str = "",
    control: Sequence[str] = (),
) -> Drawing:
    """A change by percentile of a score, a panel a score on common axes: mean over seeds with its standard error.

    Args:
      series: ``(score, percentiles, values)`` with values of shape ``(seeds, percentiles)``.
      quantity: Label of the ordinate, with its unit.
      abscissa: Label of the abscissa.
      title: Title, if any.
      control: Scores drawn in grey.

    Returns:
      The figure and a table of score, percentile, mean, stderr and seeds.

    Raises:
      UserError: No series, or values that do not fit the percentiles.

    Example:
      >>> draw_percentiles([("CHES", [0, 100], [[1.0, -2.0], [2.0, -4.0]])], quantity="change (nats)").table["mean"]
      [1.5, -3.0]
    """
    where = "draw_percentiles"
    require(bool(series), where, "needs at least one series", "none", "Pass (score, percentiles, values)")
    figure, panels = _panels(len(series), width=2.1, height=2.1, title=title)
    table: dict[str, list[Any]] = {"score": [], "percentile": [], "mean": [], "stderr": [], "seeds": []}
    for axes, (label, x, values) in zip(panels, series, strict=True):
        x, values = np.asarray(x, float), np.asarray(values, float)
        fits = values.ndim == 2 and len(values) > 0 and values.shape[1:] == x.shape
        require(fits, where, f"values must be (seeds, {x.size})", f"{values.shape} for {label}", "Stack a row a seed")
        seeds = len(values)
        mean, stderr = values.mean(axis=0), values.std(axis=0, ddof=min(1, seeds - 1)) / np.sqrt(seeds)
        colour = CONTROL if label in control else PALETTE[0]
        axes.axhline(0, color="#404040", linewidth=0.8)
        axes.plot(x, values.T, color=colour, linewidth=0.6, alpha=0.4)
        bars = stderr if seeds > 1 else None
        axes.errorbar(x, mean, bars, color=colour, marker="o", linewidth=1.2, capsize=2)
        axes.set_title(label, loc="left", fontsize=8)
        axes.set_xticks(x, [f"{p:g}" for p in x])
        entries = ([label] * x.size, x.tolist(), mean.tolist(), stderr.tolist(), [seeds] * x.size)
        for column, entry in zip(table, entries, strict=True):
            table[column] += entry if column != "stderr" or seeds > 1 else [None] * x.size
    figure.supxlabel(abscissa, fontsize=9)
    figure.supylabel(quantity, fontsize=9)
    return Drawing(figure, table)


@figure_style()
def draw_step_predictions(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    quantity: str,
    abscissa: str = "step (optimizer updates)",
    names: tuple[str, str] = ("predicted", "measured"),
    title: str = "",
) -> Drawing:
    """A quantity step by step, predicted as a line and measured as markers, a panel a run with its own ordinate.

    Args:
      panels: Title of a panel -> predicted and measured values after 0, 1, 2, ... steps.
      quantity: Label of the ordinate, with its unit.
      abscissa: Label of the abscissa.
      names: What the two are called.
      title: Title, if any.

    Returns:
      The figure and a table of panel, step, predicted and measured.

    Raises:
      UserError: No panel, or one whose two rows differ in length.

    Example:
      >>> draw_step_predictions({"sgd": ([0.0, -0.5], [0.0, -0.4])}, quantity="ln p (nats)").table["measured"]
      [0.0, -0.4]
    """
    where = "draw_step_predictions"
    rows = {label: [np.asarray(x, float) for x in pair] for label, pair in panels.items()}
    shapes = {label: [x.shape for x in pair] for label, pair in rows.items()}
    fits = bool(rows) and all(a.ndim == 1 and a.shape == b.shape for a, b in rows.values())
    require(fits, where, "needs panels of two rows of one length", shapes or "none", "Pass title -> (row, row)")
    figure, all_axes = _panels(len(rows), width=2.4, height=1.9, title=title, shared=False)
    table: dict[str, list[Any]] = {"panel": [], "step": [], "predicted": [], "measured": []}
    for axes, (label, (predicted, measured)) in zip(all_axes, rows.items(), strict=True):
        steps = np.arange(predicted.size)
        axes.plot(steps, measured, "o", color=PALETTE[1], markerfacecolor="white", markersize=3.5, label=names[1])
        axes.plot(steps, predicted, color=PALETTE[0], linewidth=1.3, label=names[0])
        axes.set_title(label, loc="left", fontsize=8)
        entries = ([label] * steps.size, steps.tolist(), predicted.tolist(), measured.tolist())
        for column, entry in zip(table, entries, strict=True):
            table[column] += entry
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower right", ncols=2)
    figure.supxlabel(abscissa, fontsize=9)
    figure.supylabel(quantity, fontsize=9)
    return Drawing(figure, table)


@figure_style()
def draw_predicted_changes(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], *, quantities: tuple[str, str], title: str = ""
) -> Drawing:
    """Measured against predicted changes, a point a run and a panel a way of training, each with its own axes.

    Args:
      panels: Title of a panel -> group -> predicted and measured changes; a colour a group.
      quantities: Labels of the two axes, with their units.
      title: Title, if any.

    Returns:
      The figure and a table of panel, group, predicted and measured.

    Raises:
      UserError: No panel, an empty one, or rows of two lengths.

    Example:
      >>> shown = {"sgd": {"yes > no": ([0.1], [0.2])}}
      >>> draw_predicted_changes(shown, quantities=("predicted (nats)", "measured (nats)")).table["measured"]
      [0.2]
    """
    where = "draw_predicted_changes"
    fits = bool(panels) and all(
        of and all(np.shape(a) == np.shape(b) != () for a, b in of.values()) for of in panels.values()
    )
    require(
        fits,
        where,
        "needs panels of groups, each two rows of one length",
        list(panels),
        "Pass title -> group -> (x, y)",
    )
    groups = list(dict.fromkeys(group for of in panels.values() for group in of))
    figure, all_axes = _panels(len(panels), width=2.6, height=2.5, title=title, shared=False)
    table: dict[str, list[Any]] = {"panel": [], "group": [], "predicted": [], "measured": []}
    for axes, (label, of) in zip(all_axes, panels.items(), strict=True):
        for group, pair in of.items():
            x, y = (np.asarray(values, float).ravel() for values in pair)
            number = groups.index(group)
            look: Any = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(x, y, linestyle="none", markersize=4.5, alpha=0.8, **look)
            for column, entry in zip(table, ([label] * x.size, [group] * x.size, x.tolist(), y.tolist()), strict=True):
                table[column] += entry
        axes.axline((0, 0), slope=1, color="#404040", linewidth=0.9)
        axes.set_title(label, loc="left", fontsize=8)
        axes.set_xlabel(quantities[0])
        axes.locator_params(nbins=4)
    for number, group in enumerate(groups):
        look: Any = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
        all_axes[0].plot([], [], linestyle="none", label=group, **look)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.supylabel(quantities[1], fontsize=9)
    return Drawing(figure, table)


@figure_style()
def draw_mass_flow(
    panels: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    quantity: str = "change of probability",
    names: tuple[str, str] = ("predicted", "measured"),
    title: str = "",
) -> Drawing:
    """Probability that each token gained or lost, a panel a run: predicted as an open bar, measured as a filled one.

    Args:
      panels: Title of a panel -> token -> predicted and measured change.
      quantity: Label of the abscissa.
      names: What the two are called.
      title: Title, if any.

    Returns:
      The figure and a table of panel, token, predicted and measured.

    Raises:
      UserError: No panel, or one without tokens.

    Example:
      >>> draw_mass_flow({"no > never": {"no": (-0.1, -0.2), "yes": (0.1, 0.2)}}).table["token"]
      ['no', 'yes']
    """
    where = "draw_mass_flow"
    empty = not panels or not all(panels.values())
    require(not empty, where, "needs panels with tokens", list(panels), "Pass title -> token -> (predicted, measured)")
    longest = max(map(len, panels.values()))
    figure, all_axes = _panels(len(panels), width=2.5, height=0.6 + 0.28 * longest, title=title, shared=False)
    table: dict[str, list[Any]] = {"panel": [], "token": [], "predicted": [], "measured": []}
    for axes, (label, tokens) in zip(all_axes, panels.items(), strict=True):
        values = np.array(list(tokens.values()), float)
        y = np.arange(len(tokens))[::-1]
        reach = 1.1 * float(np.abs(values).max()) or 1.0
        axes.axvline(0, color="#404040", linewidth=0.8)
        axes.barh(y, values[:, 1], height=0.34, color=PALETTE[1], label=names[1])
        axes.barh(y + 0.36, values[:, 0], height=0.28, color="white", edgecolor=PALETTE[0], label=names[0])
        axes.set_yticks(y + 0.18, list(tokens))
        axes.set_xlim(-reach, reach)
        axes.locator_params(axis="x", nbins=3)
        axes.grid(visible=False, axis="y")
        axes.set_title(label, loc="left", fontsize=8)
        for column, entry in zip(table, ([label] * len(tokens), list(tokens), *values.T.tolist()), strict=True):
            table[column] += entry
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower right", ncols=2)
    figure.supxlabel(quantity, fontsize=9)
    return Drawing(figure, table)


@figure_style()
def draw_class_rates(
    groups: Mapping[str, Mapping[str, Sequence[Interval]]],
    *,
    quantity: str,
    reference: str | None = None,
    title: str = "",
) -> Drawing:
    """Rates of classes of responses, with intervals: a panel a class, a row a way of tuning, a marker a seed.

    Args:
      groups: Class -> way of tuning -> an interval a seed.
      quantity: Label of the abscissa.
      reference: The way whose mean is drawn as a line, such as that before tuning.
      title: Title, if any.

    Returns:
      The figure and a table of class, way, seed (by number), rate, low and high.

    Raises:
      UserError: No class, or one without rates.

    Example:
      >>> rate = Interval(0.8, 0.1, 0.6, 0.9)
      >>> draw_class_rates({"refusals": {"before": [rate], "after": [rate]}}, quantity="rate").table["low"]
      [0.6, 0.6]
    """
    where = "draw_class_rates"
    empty = not groups or not all(ways and all(ways.values()) for ways in groups.values())
    require(not empty, where, "needs classes with rates", list(groups), "Pass class -> way -> intervals")
    longest = max(map(len, groups.values()))
    most = max(len(rates) for ways in groups.values() for rates in ways.values())
    spread = min(0.16, 0.72 / most)
    figure, panels = _panels(len(groups), width=2.9, height=0.7 + max(0.33, 0.06 * most) * longest, title=title)
    table: dict[str, list[Any]] = {"class": [], "way": [], "seed": [], "rate": [], "low": [], "high": []}
    for axes, (name, ways) in zip(panels, groups.items(), strict=True):
        for row, (way, rates) in enumerate(ways.items()):
            colour = CONTROL if way == reference else PALETTE[row % len(PALETTE)]
            for seed, rate in enumerate(rates):
                y = -row + spread * ((len(rates) - 1) / 2 - seed)
                axes.plot([rate.low, rate.high], [y, y], color=colour, linewidth=1)
                axes.plot(rate.estimate, y, color=colour, marker="o", markersize=4 if most < 6 else 3)
                for column, entry in zip(table, (name, way, seed, rate.estimate, rate.low, rate.high), strict=True):
                    table[column].append(entry)
        if reference is not None and reference in ways:
            level = float(np.mean([rate.estimate for rate in ways[reference]]))
            axes.axvline(level, color=CONTROL, linewidth=0.9, linestyle="--")
        axes.set_yticks([-row for row in range(len(ways))], list(ways))
        axes.set_xlim(-0.02, 1.02)
        axes.set_title(name, loc="left", fontsize=8)
    figure.supxlabel(quantity, fontsize=9)
    return Drawing(figure, table)


def _panels(count: int, *, width: float, height: float, title: str, shared: bool = True) -> "tuple[Figure, list[Axes]]":
    """A grid of as many panels; those of a row that is not full are taken away."""
    from matplotlib.figure import Figure

    columns = min(count, PANELS_A_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.5, height * rows + 0.5), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, list(grid[:count])
