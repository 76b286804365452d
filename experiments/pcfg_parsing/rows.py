"""From the records of a run to the rows of its tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.lab.records import Record, number, of_kind
from jaxft.lab.report import format_number

SCORED = ("score", "control_score", "selectivity", "dealt_score", "f1", "control_f1", "pearson_overall", "r2")


def bayes_of(records: Sequence[Record]) -> Record:
    """The record of the exact losses."""
    return of_kind(records, "bayes")[0]


def networks(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Model and seed of every network that came to an end."""
    return [{"model": r["model"], "seed": r["seed"]} for r in of_kind(records, "result")]


def models(records: Sequence[Record]) -> list[str]:
    """Models of which a network came to an end."""
    return list(dict.fromkeys(key["model"] for key in networks(records)))


def by_layer(records: Sequence[Record], name: str, **fields: Any) -> list[float]:
    """A quantity of the probes of one network, layer by layer, the embeddings first."""
    return [number(r.get(name)) for r in sorted(of_kind(records, "probe", **fields), key=lambda r: r["layer"])]


def best_layer(records: Sequence[Record], *, above: int = 0, **fields: Any) -> Record:
    """The probe of greatest score among the layers of one network from ``above`` on."""
    found = [r for r in of_kind(records, "probe", **fields) if r["layer"] >= above]
    return max(found, key=lambda r: (np.nan_to_num(number(r["score"]), nan=-np.inf), -r["layer"]))


def best_head(records: Sequence[Record], name: str, **fields: Any) -> float:
    """The greatest correlation, in size, of a head of one network."""
    return max(abs(number(r[name])) for r in of_kind(records, "attention", **fields))


def kinds_of(records: Sequence[Record]) -> list[str]:
    """Kinds of probes."""
    return list(dict.fromkeys(r["probe"] for r in of_kind(records, "probe")))


def strongest(records: Sequence[Record]) -> str:
    """The kind of probe that findings are about: the one with a hidden layer, where there is one."""
    return "mlp" if "mlp" in kinds_of(records) else "linear"


LOSS_COLUMNS = (
    "model",
    "networks",
    "gap to Bayes (nats)",
    "context learnt",
    "loss (nats)",
    "Bayes",
    "word frequencies",
)


def loss_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a model: its gap to the Bayes loss, and how much it has learnt of what the context tells."""
    bayes = bayes_of(records)
    floor, ceiling = bayes["bayes_loss_nats"], bayes["unigram_loss_nats"]
    rows = []
    for model in models(records):
        gaps = [number(r["gap_nats"]) for r in of_kind(records, "result", model=model)]
        rows.append(
            {
                "model": model,
                "networks": len(gaps),
                "gap to Bayes (nats)": mean_std(gaps),
                "context learnt": mean_std([1 - gap / (ceiling - floor) for gap in gaps]),
                "loss (nats)": mean_std([floor + gap for gap in gaps]),
                "Bayes": floor,
                "word frequencies": ceiling,
            }
        )
    return rows


PROBE_COLUMNS = (
    "model",
    "target",
    "probe",
    "trained",
    "best layer",
    "embeddings",
    "untrained",
    "control",
    "selectivity",
    "F1",
    "F1 untrained",
)


def probe_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a model, target and kind of probe: the best layer after training beside everything it must beat."""
    rows = []
    targets = list(dict.fromkeys(r["target"] for r in of_kind(records, "probe")))
    for model in models(records):
        seeds = [key["seed"] for key in networks(records) if key["model"] == model]
        for target in targets:
            for kind in kinds_of(records):
                fields = {"model": model, "target": target, "probe": kind}
                best = [best_layer(records, **fields, seed=seed, trained=True) for seed in seeds]
                before = [best_layer(records, **fields, seed=seed, trained=False) for seed in seeds]
                first = [by_layer(records, "score", **fields, seed=seed, trained=True)[0] for seed in seeds]
                rows.append(
                    {
                        **fields,
                        "trained": mean_std([r["score"] for r in best]),
                        "best layer": ", ".join(str(r["layer"]) for r in best),
                        "embeddings": mean_std(first),
                        "untrained": mean_std([r["score"] for r in before]),
                        "control": mean_std([r["control_score"] for r in best]),
                        "selectivity": mean_std([r["selectivity"] for r in best]),
                        "F1": mean_std([r.get("f1") for r in best]),
                        "F1 untrained": mean_std([r.get("f1") for r in before]),
                    }
                )
    return rows


PARSER_COLUMNS = ("parser", "F1")


def parser_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Unlabelled sentence F1 of parsers that know the grammar, and of baselines."""
    return [{"parser": r["parser"], "F1": r["f1"]} for r in of_kind(records, "parser")]


HEAD_COLUMNS = ("model", "layer", "best head, trained", "best head, untrained", "dealt out anew", "offset R²")


def head_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a model and layer: the head that follows the marginals best, and how positional its heads are."""
    rows = []
    for model in models(records):
        seeds = [key["seed"] for key in networks(records) if key["model"] == model]
        layers = sorted({r["layer"] for r in of_kind(records, "attention", model=model)})
        for layer in layers:
            fields = [{"model": model, "layer": layer, "seed": seed} for seed in seeds]
            r2 = [number(r["offset_r2"]) for f in fields for r in of_kind(records, "attention", **f, trained=True)]
            cells = {
                "best head, trained": ("correlation", True),
                "best head, untrained": ("correlation", False),
                "dealt out anew": ("control_correlation", True),
            }
            rows.append(
                {"model": model, "layer": layer, "offset R²": mean_std(r2, spread=False)}
                | {
                    column: mean_std([best_head(records, name, **f, trained=trained) for f in fields])
                    for column, (name, trained) in cells.items()
                }
            )
    return rows


def mean_std(values: Sequence[Any], *, spread: bool = True) -> str | None:
    """Mean (and standard deviation) of what was measured, as text."""
    numbers = [number(v) for v in values if v is not None]
    if not numbers:
        return None
    deviation = f" ± {format_number(float(np.std(numbers, ddof=1)))}" if spread and len(numbers) > 1 else ""
    return format_number(float(np.mean(numbers))) + deviation
