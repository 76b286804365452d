"""The figures of a run, from its records."""

from collections.abc import Iterator, Sequence

from experiments.kernel_finetuning.rows import phase_of
from jaxft.lab.figures import Drawing, draw_agreement, draw_drift, draw_dynamics, save_figure
from jaxft.lab.records import Record, number
from jaxft.lab.run import Run

FOLLOWED = {
    "kernel_drift": "relative change of the kernel",
    "feature_drift": "relative change of gradients",
    "linearization_gap": "relative error of the tangent model",
    "alignment": "alignment of kernel and labels (cosine)",
}
"""Quantity of an event -> its label; all but the alignment are 0 at the start, and drawn without it, in logarithm."""

METHODS = {"lora": "LoRA", "projection": "projection"}


def draw_figures(run: Run, records: Sequence[Record], rows: Sequence[Record]) -> list[str]:
    """Writes the figures of the run and returns their names."""
    chosen = {phase_of(r) for r in rows}
    names = []
    for task, k in dict.fromkeys((r["task"], r["k"]) for r in rows):
        here = [r for r in records if (r["task"], r["k"]) == (task, k)]
        events = [r for r in here if r["kind"] == "event" and phase_of(r) in chosen]
        adapters = [r for r in here if r["kind"] == "adapter"]
        for name, drawing in _of_task(events, adapters, f"{task}, {k}-shot"):
            names.append(f"{name}-{task}-{k}")
            save_figure(*drawing, run.figures, names[-1])
    points = [r for r in rows if None not in (r.get("accuracy"), r["accuracy_kernel"])]
    if points:
        names.append("accuracy")
        save_figure(*_agreement(points), run.figures, names[-1])
    return names


def _agreement(rows: Sequence[Record]) -> Drawing:
    """Accuracy of fine-tuning against that of the optimiser's kernel."""
    return draw_agreement(
        [r["accuracy"] for r in rows],
        [r["accuracy_kernel"] for r in rows],
        [f"{r['task']}-{r['k']}-{r['split']}" for r in rows],
        [f"{r['arm']}, {r['optimizer']}" for r in rows],
    )


def _of_task(events: Sequence[Record], adapters: Sequence[Record], title: str) -> Iterator[tuple[str, Drawing]]:
    if events:
        yield (
            "dynamics",
            draw_dynamics(
                _dynamics(events),
                quantity="loss on held-out examples (nats)",
                log=True,
                title=f"{title}: kernel descent and fine-tuning",
            ),
        )
    for quantity, label in FOLLOWED.items() if events else ():
        drift = quantity != "alignment"
        series = _series(events, quantity, since=1 if drift else 0)
        yield quantity.replace("_", "-"), draw_drift(series, quantity=label, title=title, log=drift)
    if adapters:
        yield (
            "adapters",
            draw_dynamics(
                _adapter_errors(adapters),
                quantity="relative error of the kernel",
                abscissa="rank of the adapters",
                log=True,
                log_abscissa=True,
                title=f"{title}: kernels of LoRA and of random projections",
            ),
        )


def _dynamics(events: Sequence[Record]) -> list[tuple[str, list, list, list]]:
    """Predicted and measured loss over steps of the first split, by arm and optimiser."""
    first = min(r["split"] for r in events)
    series = []
    for arm, optimizer in dict.fromkeys((r["arm"], r["optimizer"]) for r in events):
        path = [r for r in events if (r["arm"], r["optimizer"], r["split"]) == (arm, optimizer, first)]
        columns = ("local_step", "predicted_probe_loss_nats", "probe_loss_nats")
        steps, predicted, actual = ([number(r[column]) for r in path] for column in columns)
        series.append((f"{arm}, {optimizer}", steps, predicted, actual))
    return series


def _series(events: Sequence[Record], quantity: str, *, since: int) -> list[tuple[str, list, list]]:
    """A quantity over steps, a row a split, by arm and optimiser."""
    series = []
    for arm, optimizer in dict.fromkeys((r["arm"], r["optimizer"]) for r in events):
        mine = [r for r in events if (r["arm"], r["optimizer"]) == (arm, optimizer) and r["local_step"] >= since]
        by_split = {
            split: {r["local_step"]: number(r[quantity]) for r in mine if r["split"] == split}
            for split in dict.fromkeys(r["split"] for r in mine)
        }
        # Early stopping may end the splits at different steps.
        steps = sorted(set.intersection(*[set(path) for path in by_split.values()]))
        series.append((f"{arm}, {optimizer}", steps, [[path[s] for s in steps] for path in by_split.values()]))
    return series


def _adapter_errors(adapters: Sequence[Record]) -> list[tuple[str, list, list, list]]:
    """Predicted and measured error by rank, means over splits, by arm and method."""
    series = []
    for arm, method in dict.fromkeys((r["arm"], r["method"]) for r in adapters):
        mine = [r for r in adapters if (r["arm"], r["method"]) == (arm, method)]
        ranks = sorted({r["rank"] for r in mine})
        predicted, measured = (
            [_mean([number(r[name]) for r in mine if r["rank"] == rank]) for rank in ranks]
            for name in ("predicted_error", "error")
        )
        series.append((f"{arm}, {METHODS[method]}", ranks, predicted, measured))
    return series


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
