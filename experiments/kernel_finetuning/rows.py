"""From the records of a run to the rows of its tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.kernel_finetuning.config import KERNEL_OF
from jaxft.lab.records import Record, number
from jaxft.lab.report import format_number
from theory.kernel_finetuning import UNMOVED, Diagnostics, kernel_verdict, paper_verdict

UNIT = ("task", "k", "split", "arm")

QUANTITIES = {
    "zero-shot": "accuracy_start",
    "fine-tuned": "accuracy",
    "linearized": "accuracy_linearized",
    "K": "accuracy_kernel",
    "K sgd": "accuracy_sgd",
    "K signgd": "accuracy_signgd",
    "K asym.": "accuracy_asymmetric_signgd",
    "K precond.": "accuracy_preconditioned",
    "χ": "chi_start",
    "lin. gap": "linearization_gap",
    "feature drift": "feature_drift",
    "kernel drift": "kernel_drift",
    "alignment": "alignment",
}
"""Column -> quantity of a row; K alone is the kernel of the row's optimiser."""

COLUMNS = ("task", "k", "arm", "optimizer", *QUANTITIES, "kernel method", "paper's thresholds")
"""Columns of the diagnostic table: means over splits, accuracies on test."""

NOT_ON_SCREEN = ("K sgd", "K signgd", "K asym.", "K precond.", "χ", "feature drift", "alignment", "paper's thresholds")
SCREEN_COLUMNS = tuple(column for column in COLUMNS if column not in NOT_ON_SCREEN)
"""Those that a terminal of 120 columns shows."""

DIVERGED = "diverged"
"""Verdict where every learning rate of an optimiser diverged."""

NO_KERNEL = "no kernel"
"""Verdict where the optimiser has no kernel: sign descent on more than two classes."""


def run_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a unit and optimiser: the learning rate of best dev score, its kernels, its verdicts."""
    starts = {unit_of(r): r for r in records if r["kind"] == "start"}
    kernels: dict[tuple, dict[str, Any]] = {unit: {} for unit in starts}
    for r in (r for r in records if r["kind"] == "kernel"):
        kernels[unit_of(r)] |= {f"accuracy_{r['kernel']}": r["accuracy"], f"solver_{r['kernel']}": r["solver"]}
    best: dict[tuple, Record | None] = {}
    for r in (r for r in records if r["kind"] in ("result", "diverged")):
        key, score = (unit_of(r), r["optimizer"]), r.get("dev_score")
        kept = best.setdefault(key, None)
        if score is not None and (kept is None or score > kept["dev_score"]):
            best[key] = r
    rows = []
    for (unit, optimizer), result in best.items():
        row = dict(result or {**dict(zip(UNIT, unit, strict=True)), "optimizer": optimizer}) | kernels[unit]
        row |= {"accuracy_start": starts[unit]["accuracy_start"], "chi_start": starts[unit]["chi"]}
        row["accuracy_kernel"] = row.get(f"accuracy_{KERNEL_OF[optimizer]}")
        rows.append(row | _verdicts(row, diverged=result is None))
    return rows


def _verdicts(row: Record, *, diverged: bool) -> dict[str, str]:
    if diverged or row["accuracy_kernel"] is None:
        why = DIVERGED if diverged else NO_KERNEL
        return {"verdict": why, "paper_verdict": why}
    diagnostics = Diagnostics(**{name: number(row[name]) for name in Diagnostics.__dataclass_fields__})
    return {"verdict": kernel_verdict(diagnostics), "paper_verdict": paper_verdict(diagnostics)}


def table_rows(rows: Sequence[Record], *, spread: bool = True) -> list[dict[str, Any]]:
    """The diagnostic table: means over splits, with ``spread`` their deviation, and how many are kernel methods."""
    table = []
    for key, members in grouped(rows, ("task", "k", "arm", "optimizer")):
        cells = key | {c: mean_std([m.get(name) for m in members], spread=spread) for c, name in QUANTITIES.items()}
        cells["kernel method"] = _votes([m["verdict"] for m in members])
        cells["paper's thresholds"] = _votes([m["paper_verdict"] for m in members])
        table.append(cells)
    return table


ADAPTER_COLUMNS = ("task", "k", "arm", "rank", "features", "LoRA error", "predicted", "projection error")


def adapter_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Relative errors of the adapters' kernels by rank: means over splits."""
    table = []
    adapters = [r for r in records if r["kind"] == "adapter"]
    for key, members in grouped(adapters, ("task", "k", "arm", "rank")):
        lora, projection = ([m for m in members if m["method"] == name] for name in ("lora", "projection"))
        errors = {"LoRA error": (lora, "error"), "predicted": (lora, "predicted_error")}
        errors["projection error"] = (projection, "error")
        cells = {column: mean_std([m[name] for m in found]) for column, (found, name) in errors.items()}
        table.append({**key, "features": lora[0]["features"], **cells})
    return table


CONTROL_COLUMNS = (
    "task",
    "k",
    "arm",
    "kernel",
    "labels",
    "alignment",
    "complexity",
    "accuracy",
    "simpler than permuted",
)


def control_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What the kernels make of the true and of the permuted training labels: means over splits."""
    table = []
    controls = [r for r in records if r["kind"] == "control"]
    for key, members in grouped(controls, ("task", "k", "arm", "kernel")):
        simpler = sum(number(m["complexity"]) < number(m["complexity_permuted"]) for m in members)
        for labels, suffix in (("true", ""), ("permuted", "_permuted")):
            names = ("alignment", "complexity", "accuracy")
            cells = {name: mean_std([m[f"{name}{suffix}"] for m in members]) for name in names}
            votes = f"{simpler} of {len(members)}" if labels == "true" else None
            table.append({**key, "labels": labels, **cells, "simpler than permuted": votes})
    return table


def grouped(records: Sequence[Record], names: Sequence[str]) -> list[tuple[dict[str, Any], list[Record]]]:
    """Records that share these fields, after the fields, in the order of their first."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return [(dict(zip(names, values, strict=True)), members) for values, members in groups.items()]


def unit_of(record: Record) -> tuple:
    """What identifies the unit of a record."""
    return tuple(record[name] for name in UNIT)


def phase_of(record: Record) -> tuple:
    """What identifies the phase of a record; of an optimiser that diverged, none."""
    return (unit_of(record), record["optimizer"], record.get("rate"))


def mean_std(values: Sequence[Any], *, spread: bool = True) -> str | None:
    """Mean (and standard deviation) of what was measured, as text."""
    numbers = [number(v) for v in values if v is not None]
    if not numbers:
        return None
    deviation = f" ± {format_number(float(np.std(numbers, ddof=1)))}" if spread and len(numbers) > 1 else ""
    return format_number(float(np.mean(numbers))) + deviation


def _votes(verdicts: Sequence[str]) -> str:
    """How many of the runs that moved are a kernel method; those that cannot be judged are named."""
    judged = [v for v in verdicts if v not in (UNMOVED, DIVERGED, NO_KERNEL)]
    others = [f"{verdicts.count(why)} {why}" for why in (DIVERGED, NO_KERNEL) if why in verdicts]
    if not judged and len(others) == 1 and len(set(verdicts)) == 1:
        return verdicts[0]
    return ", ".join([f"{sum(v == 'yes' for v in judged)} of {len(judged)}", *others])
