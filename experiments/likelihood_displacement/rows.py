"""From the records of a run to the rows of its tables."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.likelihood_displacement.percentiles import SCORE_NAMES
from experiments.likelihood_displacement.unalignment import SETS
from jaxft.core.statistics import rank_correlation
from jaxft.lab.records import Record, number, of_kind
from jaxft.lab.report import format_number

RUN = ("comparison", "prompt", "moved", "optimizer")
KIND = ("comparison", "moved", "optimizer")
SIDES = ("chosen", "rejected")

ARM_NAMES = {
    "dpo": "all pairs",
    "filtered": "lowest CHES per token",
    "random": "as many at random",
    "sft": "with an SFT term",
    "dpop": "DPOP",
}
MOVED_NAMES = {"all": "all parameters", "blocks": "layers alone"}


def single_runs(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a finished run of part single: its start, its end, and sums over its steps.

    ``steady`` is whether the loss rose at no step; the paper leaves other runs out.
    """
    rows = []
    for result in of_kind(records, "result", part="single"):
        key = {name: result[name] for name in RUN}
        (start,) = of_kind(records, "start", part="single", **key)
        events = of_kind(records, "event", part="single", **key)
        losses = [number(e["loss"]) for e in events] + [number(result["loss"])]
        path = [number(e["log_chosen"]) for e in events] + [number(result["log_chosen"])]
        row = {**key, "steady": bool((np.diff(losses) <= 0).all()), "rises": int((np.diff(losses) > 0).sum())}
        row |= {"p_start": math.exp(path[0]), "p_end": math.exp(path[-1]), "p_lowest": math.exp(min(path))}
        row |= {"change": path[-1] - path[0], "lowest": min(path) - path[0], "steps": len(events)}
        for side in SIDES:
            columns = {
                name: np.array([number(e[f"{name}_{side}"]) for e in events])
                for name in ("change", "predicted", "gram")
            }
            row |= {f"{name}_{side}": float(values.sum()) for name, values in columns.items()}
            row |= {f"first_{name}_{side}": float(values[0]) for name, values in columns.items()}
        row |= {name: start[name] for name in start if name.startswith(("term_", "inner_", "unembedding_"))}
        row |= {name: result[name] for name in ("rank_predicted", "rank_steps", "rank_shuffled", "rank_unembedding")}
        row |= {name: result[name] for name in ("gainers", "predicted_gainers", "gained_mass")}
        # Of the flow of gradient descent, over -l': its sign says whether the preferred answer is to rise.
        row["flow_rate"] = number(start["inner_chosen"]) - number(start["inner_between"])
        rows.append(row)
    return rows


SINGLE_COLUMNS = (
    "answers",
    "trained",
    "optimizer",
    "runs",
    "loss never rose",
    "p(y+) start",
    "lowest",
    "end",
    "Δ ln p(y+)",
    "predicted",
    "by the Gram matrix",
    "fell",
)


def single_rows(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """Preferred answer over tuning: measured, and the sum of first-order predictions; means over prompts."""
    table = []
    for key, members in grouped(runs, KIND):
        cells = {
            "runs": len(members),
            "loss never rose": sum(m["steady"] for m in members),
            "p(y+) start": _mean(members, "p_start"),
            "lowest": _mean(members, "p_lowest"),
            "end": _mean(members, "p_end"),
            "Δ ln p(y+)": _mean(members, "change"),
            "predicted": _mean(members, "predicted_chosen"),
            "by the Gram matrix": _mean(members, "gram_chosen"),
            "fell": f"{sum(m['change'] < 0 for m in members)} of {len(members)}",
        }
        table.append({**_kind_cells(key), **cells})
    return table


TERM_COLUMNS = (
    "answers",
    "trained",
    "runs",
    "m (norms)",
    "S (words)",
    "states",
    "sum of three",
    "whole network",
    "falls at once",
    "W+ - W- along W+",
    "across",
)


def term_rows(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """Rates of ln p(y+) at the start over -l': terms of Theorem 4, and what the network does; means over prompts."""
    table = []
    for key, members in grouped(runs, ("comparison", "moved")):
        # The start does not depend on the optimiser.
        starts = list({m["prompt"]: m for m in members}.values())
        terms = {name: _mean(starts, f"term_{name}") for name in ("norms", "words", "states")}
        cells = {
            "runs": len(starts),
            "m (norms)": terms["norms"],
            "S (words)": terms["words"],
            "states": terms["states"],
            "sum of three": sum(terms.values()),
            "whole network": _mean(starts, "flow_rate"),
            "falls at once": f"{sum(m['flow_rate'] < 0 for m in starts)} of {len(starts)}",
            "W+ - W- along W+": _mean(starts, "unembedding_parallel"),
            "across": _mean(starts, "unembedding_orthogonal"),
        }
        table.append({"answers": key["comparison"], "trained": MOVED_NAMES[key["moved"]], **cells})
    return table


GAIN_COLUMNS = (
    "answers",
    "trained",
    "optimizer",
    "gained most",
    "mass",
    "predicted to gain most",
    "rank, first step",
    "all steps",
    "rank, <W_z, W+ - W->",
)


def gain_rows(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """Who gained: the tokens named most often over prompts, and how well a ranking of all tokens was foretold."""
    table = []
    for key, members in grouped(runs, KIND):
        mass: dict[str, float] = {}
        for m in members:
            for word, gained in zip(m["gainers"], m["gained_mass"], strict=True):
                mass[word.strip()] = mass.get(word.strip(), 0.0) + number(gained) / len(members)
        foretold = Counter(word.strip() for m in members for word in m["predicted_gainers"])
        most = sorted(mass.items(), key=lambda item: -item[1])[:3]
        cells = {
            "gained most": ", ".join(word for word, _ in most),
            "mass": ", ".join(format_number(x) for _, x in most),
            "predicted to gain most": ", ".join(word for word, _ in foretold.most_common(3)),
            "rank, first step": _mean(members, "rank_predicted"),
            "all steps": _mean(members, "rank_steps"),
            "rank, <W_z, W+ - W->": _mean(members, "rank_unembedding"),
        }
        table.append({**_kind_cells(key), **cells})
    return table


def percentile_columns(records: Sequence[Record]) -> list[str]:
    """Columns of ``percentile_rows``, a percentile each."""
    found = sorted({r["percentile"] for r in of_kind(records, "result", part="percentiles")})
    return ["score", *(f"{p:g}" for p in found), "rank, by seed", "with length", "with the rate"]


def percentile_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Change of the mean ln p(y+) by score and percentile, and how the score goes with length."""
    table = []
    for key, members in grouped(of_kind(records, "result", part="percentiles"), ("score",)):
        cells: dict[str, Any] = {"score": SCORE_NAMES[key["score"]]}
        for at, of in grouped(members, ("percentile",)):
            cells[f"{at['percentile']:g}"] = mean_stderr([number(m["change"]) for m in of])
        ranks = [percentile_rank(of) for _, of in grouped(members, ("seed",))]
        cells["rank, by seed"] = mean_stderr([r for r in ranks if math.isfinite(r)])
        scored = of_kind(records, "score", score=key["score"])
        for column, name in (("with length", "with_length"), ("with the rate", "with_rate")):
            values = [number(s[name]) for s in scored if name in s]
            cells[column] = float(np.mean(values)) if values else None
        table.append(cells)
    return table


def percentile_rank(members: Sequence[Record]) -> float:
    """Rank correlation of percentile and change over the subsets of a seed; NaN for fewer than five."""
    if len(members) < 5:
        return float("nan")
    x, y = ([number(m[name]) for m in members] for name in ("percentile", "change"))
    return rank_correlation(x, y).estimate


ARM_COLUMNS = (
    "tuned by",
    "runs",
    "pairs",
    "refusals, tuned on",
    "refusals, held out",
    "compliances, held out",
    "neither, held out",
    "Δ ln p(y+), own pairs",
    "all pairs",
    "fell",
    "mass of refusals",
    "of compliances",
)


def arm_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Refusals before and after by arm, and where the probability of first tokens is; means over seeds."""
    starts = of_kind(records, "start", part="unalignment")
    results = of_kind(records, "result", part="unalignment")
    if not starts:
        return []
    table = [{"tuned by": "nothing", "runs": len(starts), **_arm_cells(starts)}]
    for key, members in grouped(results, ("arm",)):
        cells = {"tuned by": ARM_NAMES[key["arm"]], "runs": len(members), **_arm_cells(members)}
        cells |= {
            "Δ ln p(y+), own pairs": mean_stderr([number(m["change"]) for m in members]),
            "all pairs": mean_stderr([number(m["change_all"]) for m in members]),
            "fell": _mean(members, "fell_frac"),
        }
        table.append(cells)
    return table


def _arm_cells(members: Sequence[Record]) -> dict[str, Any]:
    return {
        "pairs": _mean(members, "pairs"),
        "refusals, tuned on": mean_stderr([number(m[f"refusal_frac, {SETS[0]}"]) for m in members]),
        "refusals, held out": mean_stderr([number(m[f"refusal_frac, {SETS[1]}"]) for m in members]),
        "compliances, held out": mean_stderr([number(m[f"compliance_frac, {SETS[1]}"]) for m in members]),
        "neither, held out": mean_stderr([number(m[f"other_frac, {SETS[1]}"]) for m in members]),
        "mass of refusals": _mean(members, "mass_refusal"),
        "of compliances": _mean(members, "mass_compliance"),
    }


def grouped(records: Sequence[Record], names: Sequence[str]) -> list[tuple[dict[str, Any], list[Record]]]:
    """Records that share these fields, after the fields, in the order of their first."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return [(dict(zip(names, values, strict=True)), members) for values, members in groups.items()]


def mean_stderr(values: Sequence[float]) -> str | None:
    """Mean and standard error, as text."""
    if not values:
        return None
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
    return format_number(float(np.mean(values))) + (f" ± {format_number(float(error))}" if len(values) > 1 else "")


def _kind_cells(key: Record) -> dict[str, Any]:
    return {"answers": key["comparison"], "trained": MOVED_NAMES[key["moved"]], "optimizer": key["optimizer"]}


def _mean(members: Sequence[Record], name: str) -> float:
    return float(np.mean([number(m[name]) for m in members]))
