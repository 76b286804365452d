"""From the records of a run to the rows of its tables, and what they say in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.mode_connectivity.pairs import PATHS
from jaxft.lab.records import Record, number, of_kind
from jaxft.lab.report import format_number


def pair_keys(records: Sequence[Record], **fields: Any) -> list[dict[str, Any]]:
    """Network, dropout and seed of every pair that came to an end."""
    return [{name: r[name] for name in ("net", "dropout", "seed")} for r in of_kind(records, "pair", **fields)]


def kinds_of_networks(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Network and dropout of which a pair came to an end."""
    found = {(key["net"], key["dropout"]): None for key in pair_keys(records)}
    return [{"net": net, "dropout": dropout} for net, dropout in found]


def of_path(records: Sequence[Record], key: Mapping[str, Any], path: str, name: str) -> float:
    """A number of one path of a pair; NaN where it could not be fitted."""
    found = of_kind(records, "path", **key, path=path)
    return number(found[0][name]) if found else float("nan")


def epsilon(pair: Record, *, median: bool = False) -> float:
    """The greater epsilon of the two networks."""
    return max(number(pair[f"epsilon_{'median_' if median else ''}{side}"]) for side in "ab")


def loss_of_ends(pair: Record) -> float:
    """The greater training loss of the two networks."""
    return max(number(pair[f"loss_{side}"]) for side in "ab")


THEOREM_COLUMNS = (
    "network",
    "dropout",
    "pairs",
    "loss of the ends",
    "ε, best",
    "ε, median",
    "bound",
    "certificate",
    "on the path",
    "straight line",
    "error on the path",
    "segments",
)


def theorem_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a kind of network: dropout stability, and the constructive path beside the straight line."""
    rows = []
    for kind in kinds_of_networks(records):
        pairs = of_kind(records, "pair", **kind)
        keys = pair_keys(records, **kind)
        rows.append(
            {
                "network": kind["net"],
                "dropout": kind["dropout"],
                "pairs": len(pairs),
                "loss of the ends": _mean([loss_of_ends(p) for p in pairs]),
                "ε, best": _mean([epsilon(p) for p in pairs]),
                "ε, median": _mean([epsilon(p, median=True) for p in pairs]),
                "bound": _mean([number(p["bound"]) for p in pairs]),
                "certificate": _mean([number(p["certificate"]) for p in pairs]),
                "on the path": _mean([of_path(records, key, "theorem", "train_loss_max") for key in keys]),
                "straight line": _mean([of_path(records, key, "line", "train_loss_max") for key in keys]),
                "error on the path": _mean([of_path(records, key, "theorem", "train_error_max") for key in keys]),
                "segments": max(p["segments"] for p in pairs),
            }
        )
    return rows


PATH_COLUMNS = ("network", "dropout", *PATHS.values())


def path_rows(records: Sequence[Record], quantity: str) -> list[dict[str, Any]]:
    """A row a kind of network, a column a path: a quantity of the records of paths, means over pairs."""
    rows = []
    for kind in kinds_of_networks(records):
        cells = {
            words: _mean([number(r[quantity]) for r in of_kind(records, "path", **kind, path=path)])
            for path, words in PATHS.items()
        }
        rows.append({"network": kind["net"], "dropout": kind["dropout"], **cells})
    return rows


ENSEMBLE_COLUMNS = ("network", "dropout", "one network", "both ends", "points of the curve")


def ensemble_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Test errors of ensembles, a row a kind of network."""
    rows = []
    for kind in kinds_of_networks(records):
        pairs = [p for p in of_kind(records, "pair", **kind) if "error_ends" in p]
        if pairs:
            names = ("error_single", "error_ends", "error_ensemble")
            cells = [_mean([number(p[name]) for p in pairs]) for name in names]
            rows.append(dict(zip(ENSEMBLE_COLUMNS, (kind["net"], kind["dropout"], *cells), strict=True)))
    return rows


def vacuity_notes(records: Sequence[Record], classes: int) -> list[str]:
    """Where Theorem 1 says something and where it says nothing, from what was measured, a sentence a kind."""
    chance = math.log(classes)
    said = []
    for kind in kinds_of_networks(records):
        keys = pair_keys(records, **kind)
        certificates = [number(of_kind(records, "pair", **key)[0]["certificate"]) for key in keys]
        lines = [of_path(records, key, "line", "train_loss_max") for key in keys]
        above = sum(c > line for c, line in zip(certificates, lines, strict=True))
        beyond = sum(c > chance for c in certificates)
        certificate, line = (format_number(_mean(values)) for values in (certificates, lines))
        of = f"{len(keys)} of {len(keys)}" if above in (0, len(keys)) else f"{above} of {len(keys)}"
        name = f"{kind['net']}, {'dropout ' + format_number(kind['dropout']) if kind['dropout'] else 'no dropout'}"
        if above:
            verdict = f"vacuous for {of} pairs: the path rises higher than the straight line"
        else:
            verdict = f"not vacuous for {of} pairs: the path is certified to be better than the straight line"
        more = f", and for {beyond} of them beyond the loss of chance, {format_number(chance)}" if beyond else ""
        said.append(f"- {name}: {verdict} (certificate {certificate} nats, straight line {line}){more}.")
    return said


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else None
