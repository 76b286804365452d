"""From the records of a run to its findings, table, figures and report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.kernel_finetuning.config import KernelFinetuningConfig
from experiments.kernel_finetuning.measure import KERNEL_OF
from jaxft.core.findings import Finding
from jaxft.lab.figures import draw_agreement, draw_drift, draw_dynamics, save_figure
from jaxft.lab.report import finding_rows, format_number, markdown_table, write_csv
from jaxft.lab.run import Run
from theory.claims import Claim, Evidence, judge
from theory.kernel_finetuning import (
    CHI_PROMPT,
    KERNEL_DRIFT_PROMPT,
    LINEARIZATION_PROMPT,
    NATURAL_ACCURACY,
    PAPER_THRESHOLDS,
    THRESHOLDS,
    UNMOVED,
    Diagnostics,
    kernel_verdict,
    paper_verdict,
)

Record = Mapping[str, Any]
UNIT = ("task", "k", "split", "arm")
COLUMNS = (
    "task",
    "k",
    "arm",
    "optimizer",
    "zero-shot",
    "fine-tuned",
    "linearized",
    "K sgd",
    "K signgd",
    "K precond.",
    "χ",
    "lin. gap",
    "feature drift",
    "kernel drift",
    "kernel method",
    "paper's thresholds",
)
"""Columns of the diagnostic table: means over splits, accuracies on test."""

QUANTITIES = {
    "zero-shot": "accuracy_start",
    "fine-tuned": "accuracy",
    "linearized": "accuracy_linearized",
    "K sgd": "accuracy_sgd",
    "K signgd": "accuracy_signgd",
    "K precond.": "accuracy_preconditioned",
    "χ": "chi_start",
    "lin. gap": "linearization_gap",
    "feature drift": "feature_drift",
    "kernel drift": "kernel_drift",
}


def run_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a unit and optimiser: the learning rate of best dev score, its kernels, its verdicts."""
    starts = {_unit(r): r for r in records if r["kind"] == "start"}
    kernels = {(_unit(r), r["kernel"]): r for r in records if r["kind"] == "kernel"}
    best: dict[tuple, Record] = {}
    for r in (r for r in records if r["kind"] == "result"):
        key = (_unit(r), r["optimizer"])
        if key not in best or r["dev_score"] > best[key]["dev_score"]:
            best[key] = r
    rows = []
    for (unit, optimizer), result in best.items():
        row = {**result, "accuracy_start": starts[unit]["accuracy_start"], "chi_start": starts[unit]["chi"]}
        row |= {f"accuracy_{name}": r["accuracy"] for (u, name), r in kernels.items() if u == unit}
        diagnostics = Diagnostics(
            accuracy_kernel=_number(row.get(f"accuracy_{KERNEL_OF[optimizer]}")),
            **{name: _number(row[name]) for name in Diagnostics.__dataclass_fields__ if name != "accuracy_kernel"},
        )
        rows.append({**row, "verdict": kernel_verdict(diagnostics), "paper_verdict": paper_verdict(diagnostics)})
    return rows


def table_rows(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """The diagnostic table: means over splits with their standard deviation, and how many are kernel methods."""
    groups: dict[tuple, list[Record]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["k"], row["arm"], row["optimizer"]), []).append(row)
    table = []
    for (task, k, arm, optimizer), members in groups.items():
        cells: dict[str, Any] = {"task": task, "k": k, "arm": arm, "optimizer": optimizer}
        cells |= {column: _mean_std([m.get(name) for m in members]) for column, name in QUANTITIES.items()}
        cells["kernel method"] = _votes([m["verdict"] for m in members])
        cells["paper's thresholds"] = _votes([m["paper_verdict"] for m in members])
        table.append(cells)
    return table


def findings_of(records: Sequence[Record], rows: Sequence[Record]) -> list[Finding]:
    """The claims about prompts, judged on this run for each task and k; pairs are matched by split."""
    starts = {_unit(r): r for r in records if r["kind"] == "start"}
    groups: dict[tuple, list[tuple[tuple, tuple]]] = {}
    for unit in starts:
        head = (*unit[:3], "head")
        if unit[3] == "prompt" and head in starts:
            groups.setdefault(unit[:2], []).append((unit, head))
    return [finding for pairs in groups.values() for finding in _group_findings(pairs, starts, records, rows)]


def _group_findings(
    pairs: Sequence[tuple[tuple, tuple]],
    starts: Mapping[tuple, Record],
    records: Sequence[Record],
    rows: Sequence[Record],
) -> Iterator[Finding]:
    zero_shot = [_number(starts[prompt]["accuracy_start"]) for prompt, _ in pairs]

    def ordering(claim: Claim, values: Sequence[tuple[float, float]], quantity: str) -> Finding:
        task, k = pairs[0][0][:2]
        setting = {"quantity": quantity, "task": task, "k": k, "precision": "float32, matmul highest"}
        natural = [() if a > NATURAL_ACCURACY else (f"natural task (zero-shot accuracy {a:.2f})",) for a in zero_shot]
        evidence = [Evidence(p, h, setting=setting, unmet=u) for (p, h), u in zip(values, natural, strict=True)]
        return judge(claim, evidence)

    yield ordering(CHI_PROMPT, [(starts[p]["chi"], starts[h]["chi"]) for p, h in pairs], "χ")
    swapped = [(starts[p]["chi_swapped"], starts[h]["chi"]) for p, h in pairs]
    yield ordering(CHI_PROMPT, swapped, "χ, label words swapped (control)")
    rates = {(_unit(r), r["optimizer"]): r["rate"] for r in rows}
    for optimizer in dict.fromkeys(r["optimizer"] for r in rows):
        phases = [[(unit, optimizer, rates[unit, optimizer]) for unit in pair] for pair in pairs]
        paths = [[[r for r in records if r["kind"] == "event" and _phase(r) == p] for p in pair] for pair in phases]
        drift = [[float(np.log(value)) for value in _at_same_loss(pair, "kernel_drift")] for pair in paths]
        yield ordering(KERNEL_DRIFT_PROMPT, [(a, b) for a, b in drift], f"log kernel drift, {optimizer}")
        gap = [_at_same_loss(pair, "linearization_gap") for pair in paths]
        yield ordering(LINEARIZATION_PROMPT, [(a, b) for a, b in gap], f"linearization gap, {optimizer}")


def _at_same_loss(paths: Sequence[Sequence[Record]], name: str) -> list[float]:
    """A quantity of two paths where each first reaches the lowest training loss that both reach.

    Between two events it is interpolated in the loss; before the first event after the start it is that event's.
    """
    target = max(min(_number(r["train_loss_nats"]) for r in path[1:]) for path in paths)
    found = []
    for path in paths:
        i = next(i for i, r in enumerate(path) if i > 0 and _number(r["train_loss_nats"]) <= target)
        (loss0, value0), (loss1, value1) = (
            (_number(r["train_loss_nats"]), _number(r[name])) for r in path[i - 1 : i + 1]
        )
        share = (loss0 - target) / (loss0 - loss1) if i > 1 and loss0 > loss1 else 1.0
        found.append(value1 if share == 1 else value0 + share * (value1 - value0))
    return found


def draw_figures(run: Run, records: Sequence[Record], rows: Sequence[Record]) -> list[str]:
    """Writes the figures of the run and returns their names."""
    events = [r for r in records if r["kind"] == "event"]
    chosen = {_phase(r) for r in rows}
    events = [r for r in events if _phase(r) in chosen]
    names = []
    for task, k in dict.fromkeys((r["task"], r["k"]) for r in rows):
        here = [r for r in events if (r["task"], r["k"]) == (task, k)]
        title = f"{task}, {k}-shot"
        dynamics = draw_dynamics(
            _dynamics(here),
            quantity="loss on held-out examples (nats)",
            log=True,
            title=f"{title}: kernel descent and fine-tuning",
        )
        names.append(f"dynamics-{task}-{k}")
        save_figure(*dynamics, run.figures, names[-1])
        for quantity, label in (
            ("kernel_drift", "relative change of the kernel"),
            ("feature_drift", "relative change of gradients"),
            ("linearization_gap", "relative error of the tangent model"),
        ):
            names.append(f"{quantity.replace('_', '-')}-{task}-{k}")
            save_figure(
                *draw_drift(_series(here, quantity), quantity=label, title=title, log=True), run.figures, names[-1]
            )
    points = [r for r in rows if r.get(f"accuracy_{KERNEL_OF[r['optimizer']]}") is not None]
    agreement = draw_agreement(
        [r["accuracy"] for r in points],
        [r[f"accuracy_{KERNEL_OF[r['optimizer']]}"] for r in points],
        [f"{r['task']}-{r['k']}-{r['split']}" for r in points],
        [f"{r['arm']}, {r['optimizer']}" for r in points],
    )
    save_figure(*agreement, run.figures, "accuracy")
    return [*names, "accuracy"]


def _dynamics(events: Sequence[Record]) -> list[tuple[str, list, list, list]]:
    """Predicted and measured loss over steps of the first split, by arm and optimiser."""
    first = min((r["split"] for r in events), default=None)
    series = []
    for arm, optimizer in dict.fromkeys((r["arm"], r["optimizer"]) for r in events):
        path = [r for r in events if (r["arm"], r["optimizer"], r["split"]) == (arm, optimizer, first)]
        columns = ("local_step", "predicted_probe_loss_nats", "probe_loss_nats")
        steps, predicted, actual = ([_number(r[column]) for r in path] for column in columns)
        series.append((f"{arm}, {optimizer}", steps, predicted, actual))
    return series


def _series(events: Sequence[Record], quantity: str) -> list[tuple[str, list, list]]:
    """A quantity over steps, a row a split, by arm and optimiser, without the start."""
    series = []
    for arm, optimizer in dict.fromkeys((r["arm"], r["optimizer"]) for r in events):
        mine = [r for r in events if (r["arm"], r["optimizer"]) == (arm, optimizer) and r["local_step"] > 0]
        by_split = {
            split: {r["local_step"]: _number(r[quantity]) for r in mine if r["split"] == split}
            for split in dict.fromkeys(r["split"] for r in mine)
        }
        # Early stopping may end the splits at different steps.
        steps = sorted(set.intersection(*[set(path) for path in by_split.values()]))
        series.append((f"{arm}, {optimizer}", steps, [[path[s] for s in steps] for path in by_split.values()]))
    return series


QUANTITY_COLUMNS = ("claim", "task", "k", "of", "head", "prompt", "status")


def quantity_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as rows of ``QUANTITY_COLUMNS``: the claims all say that the prompt lies below the fresh head."""
    return [
        {**row, **f.setting, "of": f.setting["quantity"], "head": row["predicted"], "prompt": row["measured"]}
        for row, f in zip(finding_rows(findings), findings, strict=True)
    ]


def write_report(
    config: KernelFinetuningConfig, run: Run, records: Sequence[Record], notes: Sequence[str]
) -> tuple[str, list[Finding]]:
    """Writes table, figures and findings into the run's folder; returns the report and the findings."""
    rows = run_rows(records)
    table, findings = table_rows(rows), findings_of(records, rows)
    write_csv(run.directory / "table.csv", table, COLUMNS)
    exact = [*UNIT, "optimizer", "rate", *QUANTITIES.values(), "kernel_cosine", "verdict", "paper_verdict"]
    write_csv(run.directory / "rows.csv", rows, exact)
    for finding in findings:
        run.add_finding(finding)
    figures = draw_figures(run, records, rows)
    kinds = {name: format_number(limit) for name, limit in THRESHOLDS.items()}
    parts = [
        "# Is this fine-tuning run a kernel method?",
        "Malladi et al. 2023, *A Kernel-Based View of Language Model Fine-Tuning*, arXiv 2210.05643.",
        *notes,
        "## Diagnostics",
        markdown_table(table, COLUMNS),
        f"Means over {len(config.splits)} splits, ± standard deviation. Measured at the parameters of best dev score. "
        f"A kernel method by ours: kernel accuracy at least {kinds['solves_frac']} of fine-tuning's, gap at most "
        f"{kinds['linearization_gap']}, feature drift at most {kinds['feature_drift']}, kernel drift at most "
        f"{kinds['kernel_drift']}. By the paper's, which are lax: {PAPER_THRESHOLDS['solves_frac']} of fine-tuning, "
        f"{PAPER_THRESHOLDS['recovered_frac']} of its gain from the tangent model, feature drift below "
        f"{PAPER_THRESHOLDS['feature_drift']}. Every run by itself, with what it fails on: rows.csv.",
        "## Findings",
        markdown_table(quantity_rows(findings), QUANTITY_COLUMNS),
        "Each claim says that the prompt lies below the fresh head, split by split: χ before fine-tuning, "
        "the others at the lowest training loss that both arms reach. The control must be violated.",
        "## Figures",
        *[f"![{name}](figures/{name}.png)" for name in figures],
    ]
    return "\n\n".join(parts), findings


def _unit(record: Record) -> tuple:
    return tuple(record[name] for name in UNIT)


def _phase(record: Record) -> tuple:
    return (_unit(record), record["optimizer"], record["rate"])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _mean_std(values: Sequence[Any]) -> str | None:
    numbers = [_number(v) for v in values if v is not None]
    if not numbers:
        return None
    spread = f" ± {format_number(float(np.std(numbers, ddof=1)))}" if len(numbers) > 1 else ""
    return format_number(float(np.mean(numbers))) + spread


def _votes(verdicts: Sequence[str]) -> str:
    """How many of the runs that moved are a kernel method."""
    moved = [v for v in verdicts if v != UNMOVED]
    return f"{sum(v == 'yes' for v in moved)} of {len(moved)}"
