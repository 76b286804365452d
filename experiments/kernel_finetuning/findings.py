"""The claims about prompts and about labels, judged on a run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.kernel_finetuning.rows import grouped, phase_of, unit_of
from jaxft.core.findings import Finding
from jaxft.lab.records import Record, number
from jaxft.lab.report import finding_rows
from theory.claims import Claim, Evidence, judge
from theory.kernel_finetuning import (
    CHI_PROMPT,
    KERNEL_DRIFT_PROMPT,
    LINEARIZATION_PROMPT,
    NATURAL_ACCURACY,
    PERMUTED_LABELS,
)

QUANTITY_COLUMNS = ("claim", "task", "k", "of", "greater", "lesser", "status")


def quantity_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as rows of ``QUANTITY_COLUMNS``: each claim says which of a pair is the greater one."""
    return [
        {**row, **f.setting, "of": f.setting["quantity"], "greater": row["predicted"], "lesser": row["measured"]}
        for row, f in zip(finding_rows(findings), findings, strict=True)
    ]


def findings_of(records: Sequence[Record], rows: Sequence[Record]) -> list[Finding]:
    """The claims on orders, judged on this run for each task and k; pairs are matched by split."""
    starts = {unit_of(r): r for r in records if r["kind"] == "start"}
    groups: dict[tuple, list[tuple[tuple, tuple]]] = {}
    for unit in starts:
        head = (*unit[:3], "head")
        if unit[3] == "prompt" and head in starts:
            groups.setdefault(unit[:2], []).append((unit, head))
    prompts = [finding for pairs in groups.values() for finding in _group_findings(pairs, starts, records, rows)]
    return prompts + _permuted_findings(records)


def _permuted_findings(records: Sequence[Record]) -> list[Finding]:
    """True against permuted labels, for the SGD kernel of every arm."""
    found = []
    controls = [r for r in records if r["kind"] == "control" and r["kernel"] == "sgd"]
    for key, members in grouped(controls, ("task", "k", "arm")):
        quantity = f"complexity, {key['arm']}: permuted, true labels"
        setting = {"quantity": quantity, "task": key["task"], "k": key["k"], "precision": "float32, matmul highest"}
        pairs = [(number(m["complexity"]), number(m["complexity_permuted"])) for m in members]
        found.append(judge(PERMUTED_LABELS, [Evidence(true, other, setting=setting) for true, other in pairs]))
    return found


def _group_findings(
    pairs: Sequence[tuple[tuple, tuple]],
    starts: Mapping[tuple, Record],
    records: Sequence[Record],
    rows: Sequence[Record],
) -> Iterator[Finding]:
    chi = [(starts[prompt]["chi"], starts[head]["chi"]) for prompt, head in pairs]
    yield _ordering(CHI_PROMPT, pairs, chi, "χ: head, prompt", starts)
    swapped = [(starts[prompt]["chi_swapped"], starts[head]["chi"]) for prompt, head in pairs]
    yield _ordering(CHI_PROMPT, pairs, swapped, "χ: head, prompt with its label words swapped (control)", starts)
    rates = {(unit_of(r), r["optimizer"]): r.get("rate") for r in rows}
    for optimizer in dict.fromkeys(r["optimizer"] for r in rows):
        ended = [pair for pair in pairs if all(rates.get((unit, optimizer)) is not None for unit in pair)]
        if not ended:
            continue
        phases = [[(unit, optimizer, rates[unit, optimizer]) for unit in pair] for pair in ended]
        paths = [[[r for r in records if r["kind"] == "event" and phase_of(r) == p] for p in pair] for pair in phases]
        drift = [np.log(_at_same_loss(pair, "kernel_drift")) for pair in paths]
        yield _ordering(KERNEL_DRIFT_PROMPT, ended, drift, f"log kernel drift, {optimizer}: head, prompt", starts)
        gap = [_at_same_loss(pair, "linearization_gap") for pair in paths]
        yield _ordering(LINEARIZATION_PROMPT, ended, gap, f"linearization gap, {optimizer}: head, prompt", starts)


def _ordering(
    claim: Claim, pairs: Sequence[tuple[tuple, tuple]], values: Sequence[Any], quantity: str, starts: Mapping
) -> Finding:
    """A claim judged on (prompt, head) values of each pair; a prompt that does not solve its task is not covered."""
    task, k = pairs[0][0][:2]
    setting = {"quantity": quantity, "task": task, "k": k, "precision": "float32, matmul highest"}
    evidence = []
    for (prompt, _), (lesser, greater) in zip(pairs, values, strict=True):
        zero_shot = number(starts[prompt]["accuracy_start"])
        unmet = () if zero_shot > NATURAL_ACCURACY else (f"natural task (zero-shot accuracy {zero_shot:.2f})",)
        evidence.append(Evidence(float(lesser), float(greater), setting=setting, unmet=unmet))
    return judge(claim, evidence)


def _at_same_loss(paths: Sequence[Sequence[Record]], name: str) -> list[float]:
    """A quantity of two paths where each first reaches the lowest training loss that both reach.

    Between two events it is interpolated in the loss; before the first event after the start it is that event's.
    """
    target = max(min(number(r["train_loss_nats"]) for r in path[1:]) for path in paths)
    found = []
    for path in paths:
        i = next((i for i, r in enumerate(path) if i > 0 and number(r["train_loss_nats"]) <= target), None)
        if i is None:  # a loss beyond the largest number: nothing can be compared
            return [float("nan")] * len(paths)
        (loss0, value0), (loss1, value1) = (
            (number(r["train_loss_nats"]), number(r[name])) for r in path[i - 1 : i + 1]
        )
        share = (loss0 - target) / (loss0 - loss1) if i > 1 and loss0 > loss1 else 1.0
        found.append(value1 if share == 1 else value0 + share * (value1 - value0))
    return found
