"""The figures of a run, from its records and arrays."""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.likelihood_displacement.percentiles import RANDOM, SCORE_NAMES
from experiments.likelihood_displacement.prepare import Model
from experiments.likelihood_displacement.rows import ARM_NAMES, MOVED_NAMES, RUN, grouped
from experiments.likelihood_displacement.unalignment import SETS
from jaxft.core.types import Interval
from jaxft.lab.figures_preferences import (
    draw_class_rates,
    draw_mass_flow,
    draw_percentiles,
    draw_predicted_changes,
    draw_step_predictions,
)
from jaxft.lab.figures_style import Drawing, save_figure
from jaxft.lab.records import Record, number, of_kind
from jaxft.lab.run import Run

SHOWN_TOKENS = 4
"""Tokens that gained most and that lost most, in each panel."""

SHOWN_FRAC = 0.01
"""Of the largest change: tokens that changed less are not shown."""


def draw_figures(run: Run, records: Sequence[Record], runs: Sequence[Record], model: Model) -> list[str]:
    """Writes the figures of the run and returns their names."""
    drawings = dict(_drawings(run, records, runs, model))
    for name, drawing in drawings.items():
        save_figure(*drawing, run.figures, name)
    return list(drawings)


def _drawings(
    run: Run, records: Sequence[Record], runs: Sequence[Record], model: Model
) -> Iterator[tuple[str, Drawing]]:
    for number_, (key, _) in enumerate(grouped(runs, ("comparison",))):
        yield f"path-{number_}", _paths(records, runs, key["comparison"])
    if runs:
        yield "predicted-change", _agreement(runs)
        yield "mass-flow", _mass_flow(run, records, runs, model)
    results = of_kind(records, "result", part="percentiles")
    if results:
        yield "percentiles", _percentiles(results)
    if of_kind(records, "result", part="unalignment"):
        yield "refusals", _refusals(records)
        yield "first-tokens", _first_tokens(records)


def _paths(records: Sequence[Record], runs: Sequence[Record], comparison: str) -> Drawing:
    """Preferred answer of the first prompt over steps: measured, and the sum of the predictions of single steps."""
    of = [r for r in runs if r["comparison"] == comparison]
    panels = {}
    for r in (r for r in of if r["prompt"] == of[0]["prompt"]):
        events = of_kind(records, "event", part="single", **{name: r[name] for name in RUN})
        start = number(events[0]["log_chosen"])
        steps = [[number(e[f"{name}_chosen"]) for e in events] for name in ("predicted", "change")]
        predicted, measured = (start + np.concatenate([[0.0], np.cumsum(x)]) for x in steps)
        rose = "" if r["steady"] else " (loss rose)"
        panels[f"{r['optimizer']}, {MOVED_NAMES[r['moved']]}{rose}"] = (predicted, measured)
    return draw_step_predictions(
        panels,
        quantity="ln p(y+) (nats)",
        names=("sum of predicted steps", "measured"),
        title=f"{comparison}: one prompt, step by step",
    )


def _agreement(runs: Sequence[Record]) -> Drawing:
    """Every run as a point, a panel an optimiser."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for of, members in grouped(runs, ("optimizer", "comparison", "moved")):
        rows = ([number(r[name]) for r in members] for name in ("predicted_chosen", "change_chosen"))
        label = f"{of['comparison']}, {MOVED_NAMES[of['moved']]}"
        panels.setdefault(of["optimizer"], {})[label] = (next(rows), next(rows))
    quantities = ("sum of predicted steps (nats)", "Δ ln p(y+) over a run (nats)")
    return draw_predicted_changes(panels, quantities=quantities, title="Change over a run")


def _mass_flow(run: Run, records: Sequence[Record], runs: Sequence[Record], model: Model) -> Drawing:
    """First run of every comparison and of what is trained: the last optimiser's."""
    panels = {}
    for key, members in grouped(runs, ("comparison", "moved")):
        optimizer = members[-1]["optimizer"]
        shown = next(m for m in members if m["optimizer"] == optimizer)
        (start,) = of_kind(records, "start", part="single", **{name: shown[name] for name in RUN})
        arrays = run.load_arrays(f"single-{start['step']}")
        measured, predicted = arrays["mass_change"], arrays["steps_mass_change"]
        order = np.argsort(measured, kind="stable")
        ids = [*order[::-1][:SHOWN_TOKENS], *order[:SHOWN_TOKENS][::-1]]
        ids = [i for i in ids if abs(measured[i]) >= SHOWN_FRAC * np.abs(measured).max()]
        tokens: dict[str, tuple[float, float]] = {}
        for i in ids:
            tokens.setdefault(
                model.word(int(i)).strip() or repr(model.word(int(i))), (float(predicted[i]), float(measured[i]))
            )
        panels[f"{key['comparison']}, {MOVED_NAMES[key['moved']]}, {optimizer}"] = tokens
    return draw_mass_flow(panels, names=("sum of predicted steps", "measured"), title="Where probability went")


def _percentiles(results: Sequence[Record]) -> Drawing:
    series = []
    for of, members in grouped(results, ("score",)):
        by_seed = [sorted(m, key=lambda r: r["percentile"]) for _, m in grouped(members, ("seed",))]
        whole = [rows for rows in by_seed if len(rows) == max(map(len, by_seed))]
        at = [r["percentile"] for r in whole[0]]
        series.append((SCORE_NAMES[of["score"]], at, [[number(r["change"]) for r in rows] for rows in whole]))
    return draw_percentiles(
        series,
        quantity="change of mean ln p(y+) (nats)",
        title="Tuned on pairs around percentiles of a score",
        control=[SCORE_NAMES[RANDOM]],
    )


def _refusals(records: Sequence[Record]) -> Drawing:
    starts, results = (of_kind(records, kind, part="unalignment") for kind in ("start", "result"))
    groups = {}
    for side in SETS:
        ways = {"nothing": [_interval(r, side) for r in starts]}
        ways |= {ARM_NAMES[of["arm"]]: [_interval(r, side) for r in rows] for of, rows in grouped(results, ("arm",))}
        groups[f"requests {side}"] = ways
    return draw_class_rates(groups, quantity="refused (fraction)", reference="nothing", title="Tuned by")


def _interval(r: Record, side: str) -> Interval:
    estimate, low, high = (number(r[f"refusal_{name}, {side}"]) for name in ("frac", "low", "high"))
    return Interval(estimate, float("nan"), low, high)


def _first_tokens(records: Sequence[Record]) -> Drawing:
    starts, results = (of_kind(records, kind, part="unalignment") for kind in ("start", "result"))
    groups = {}
    for name in ("refusal", "compliance"):
        rows = {"nothing": starts} | {ARM_NAMES[of["arm"]]: members for of, members in grouped(results, ("arm",))}
        points = {way: [number(r[f"mass_{name}"]) for r in members] for way, members in rows.items()}
        groups[f"first token of a {name}"] = {way: [Interval(x, 0.0, x, x) for x in xs] for way, xs in points.items()}
    return draw_class_rates(groups, quantity="probability", reference="nothing", title="Tuned by")
