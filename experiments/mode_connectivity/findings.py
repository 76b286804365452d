"""The claims of the paper that a run can judge, each with the same measurement where it must fail."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments.mode_connectivity.config import net_sizes
from experiments.mode_connectivity.rows import Record, epsilon, loss_of_ends, number, of_kind, of_path, pair_keys
from jaxft.core.findings import Finding
from jaxft.lab.report import finding_rows
from theory.claims import Claim, Evidence, judge

FINDING_COLUMNS = ("claim", "of", "predicted", "measured", "status", "control")
ROUNDING = 1e-4
"""Relative, of a loss in float32: the path sums units in another order than the network it certifies."""
LEAST_EPSILON = 1e-6
"""In nats: what is below is rounding."""
KUDITIPUDI = "Kuditipudi et al. 2019, arXiv 1906.06247"
GARIPOV = "Garipov et al. 2018, arXiv 1802.10026"
AINSWORTH = "Ainsworth et al. 2022, arXiv 2209.04836"
Kind = Literal["identity", "bound", "ordering"]
Pair = Callable[[Mapping[str, Any]], Evidence]
"""What is compared, of one pair of networks."""


def findings_of(records: Sequence[Record]) -> list[tuple[Finding, Finding]]:
    """Every claim judged on this run, and its control."""
    claims = [*_theorem_claims(records), *_stability_claims(records), *_curve_claims(records)]
    found = []
    for claim, keys in claims:
        if keys:
            evidence, control = ([check(n) for n in range(len(keys))] for check in (claim.check, claim.control))
            found.append((judge(claim, evidence), judge(claim, control)))
    return found


def quantity_rows(findings: Sequence[tuple[Finding, Finding]]) -> list[dict[str, Any]]:
    """Findings as rows of ``FINDING_COLUMNS``: of an ordering predicted is the greater one, measured the lesser."""
    rows = finding_rows([finding for finding, _ in findings])
    return [
        {**row, "claim": row["claim"].split("/")[1], "of": finding.setting["quantity"], "control": control.status}
        for row, (finding, control) in zip(rows, findings, strict=True)
    ]


def _claim(
    name: str,
    statement: str,
    kind: Kind,
    keys: Sequence[Mapping[str, Any]],
    check: Pair,
    control: Pair,
    breaks: str,
    *,
    source: str = KUDITIPUDI,
) -> tuple[Claim, Sequence[Mapping[str, Any]]]:
    """A claim over pairs of networks: evidence number n is that of pair n."""
    return (
        Claim(
            id=f"mode_connectivity/{name}",
            statement=statement,
            source=source,
            kind=kind,
            check=lambda n: check(keys[n]),
            control=lambda n: control(keys[n]),
            control_breaks=breaks,
            tolerance=ROUNDING if kind == "identity" else None,
            seeds=max(3, len(keys)),
        ),
        keys,
    )


def _evidence(quantity: str, greater: float, lesser: float) -> Evidence:
    setting = {"quantity": quantity, "precision": "float32, matmul highest"}
    return Evidence(measured=lesser, predicted=greater, setting=setting)


def _theorem_claims(records: Sequence[Record]) -> list[tuple[Claim, Sequence[Mapping[str, Any]]]]:
    keys = pair_keys(records)

    def pair(key: Mapping[str, Any]) -> Record:
        return of_kind(records, "pair", **key)[0]

    def on_path(key: Mapping[str, Any]) -> float:
        return of_path(records, key, "theorem", "train_loss_max")

    def certificate(key: Mapping[str, Any]) -> float:
        return number(pair(key)["certificate"])

    return [
        _claim(
            "certificate_is_the_maximum_on_the_path",
            "The largest loss on the constructive path is that of 2H+2 networks that are known beforehand.",
            "identity",
            keys,
            lambda key: _evidence("loss: certificate, largest of a grid", certificate(key), on_path(key)),
            lambda key: _evidence("", loss_of_ends(pair(key)), on_path(key)),
            "the networks with units dropped are among them (here: the two ends alone)",
        ),
        _claim(
            "constructive_path_within_the_bound",
            "Two ε-dropout stable networks are joined by a path whose loss is at most that of the ends and ε.",
            "bound",
            keys,
            lambda key: _evidence(
                "loss: bound, constructive path", number(pair(key)["bound"]) * (1 + ROUNDING), on_path(key)
            ),
            lambda key: _evidence("", loss_of_ends(pair(key)), on_path(key)),
            "ε is that of the networks (here: 0)",
        ),
    ]


def _stability_claims(records: Sequence[Record]) -> list[tuple[Claim, Sequence[Mapping[str, Any]]]]:
    """Epsilon of pairs that differ in width, or in dropout, alone."""
    keys = pair_keys(records)

    def of(key: Mapping[str, Any]) -> float:
        # Of networks that differ in size ε spans decades: it is compared by its logarithm.
        return math.log10(max(epsilon(of_kind(records, "pair", **key)[0], median=True), LEAST_EPSILON))

    wider = [(key, {**key, "net": net}) for key in keys if (net := _widest(records, key)) != key["net"]]
    rates = sorted({key["dropout"] for key in keys})
    dropped = [(key, {**key, "dropout": rates[-1]}) for key in keys if key["dropout"] == rates[0] != rates[-1]]
    claims = []
    for name, statement, pairs, quantity, breaks in (
        (
            "epsilon_falls_with_width",
            "Wide networks are dropout stable with a smaller ε than narrow ones.",
            wider,
            "log10 of the median ε: narrower, widest",
            "the networks differ in width (here: in their seeds alone)",
        ),
        (
            "epsilon_falls_with_dropout",
            "Networks trained with dropout are dropout stable with a smaller ε.",
            dropped,
            "log10 of the median ε: without dropout, with",
            "the networks differ in dropout (here: in their seeds alone)",
        ),
    ):
        known = [{"pair": p} for p in pairs if all(of_kind(records, "pair", **key) for key in p)]
        claims.append(
            _claim(
                name,
                statement,
                "ordering",
                known,
                lambda key, quantity=quantity: _evidence(quantity, of(key["pair"][0]), of(key["pair"][1])),
                lambda key: _evidence("", of(key["pair"][0]), of(_next_seed(keys, key["pair"][0]))),
                breaks,
            )
        )
    return claims


def _next_seed(keys: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Mapping[str, Any]:
    """The next pair of the same kind, the first one after the last: each is the greater and the lesser once."""
    same = [k for k in keys if (k["net"], k["dropout"]) == (key["net"], key["dropout"])]
    return same[(same.index(key) + 1) % len(same)]


def _widest(records: Sequence[Record], key: Mapping[str, Any]) -> str:
    """The widest network of the kind and depth of this one of which the run has a pair."""
    kind, layers, _ = net_sizes(key["net"])
    nets = {k["net"] for k in pair_keys(records) if net_sizes(k["net"])[:2] == (kind, layers)}
    return max(nets, key=lambda net: net_sizes(net)[2])


def _curve_claims(records: Sequence[Record]) -> list[tuple[Claim, Sequence[Mapping[str, Any]]]]:
    def having(*paths: str) -> list[dict[str, Any]]:
        return [key for key in pair_keys(records) if all(of_kind(records, "path", **key, path=p) for p in paths)]

    def barrier(key: Mapping[str, Any], path: str) -> float:
        return of_path(records, key, path, "train_barrier")

    fitted = [
        _claim(
            f"{path}_below_the_line",
            statement,
            "ordering",
            having("line", path),
            lambda key, path=path, words=words: _evidence(
                f"barrier: straight line, {words}", barrier(key, "line"), barrier(key, path)
            ),
            lambda key: _evidence("", barrier(key, "line"), barrier(key, "line")),
            "the curve is fitted (here: its control points are left on the straight line)",
            source=source,
        )
        for path, words, statement, source in (
            ("bezier", "Bézier curve", "A curve with one bend has a lower barrier than the straight line.", GARIPOV),
            (
                "band",
                "elastic band",
                "An elastic band has a lower barrier than the straight line that it starts from.",
                "Draxler et al. 2018, arXiv 1803.00885",
            ),
        )
    ]
    matched = _claim(
        "matching_lowers_the_barrier",
        "The line to the second network has a lower barrier when its hidden units are permuted to match the first's.",
        "ordering",
        having("line", "matched", "shuffled"),
        lambda key: _evidence("barrier: straight line, matched line", barrier(key, "line"), barrier(key, "matched")),
        lambda key: _evidence("", barrier(key, "line"), barrier(key, "shuffled")),
        "the permutation matches units (here: a random one)",
        source=AINSWORTH,
    )
    repaired = _claim(
        "repair_lowers_the_barrier",
        "Means and deviations of pre-activations set to those between the ends lower the barrier of the matched line.",
        "ordering",
        having("line", "matched", "repaired"),
        lambda key: _evidence("barrier: matched line, REPAIR", barrier(key, "matched"), barrier(key, "repaired")),
        lambda key: _evidence("", barrier(key, "repaired"), barrier(key, "line")),
        "the line is the matched one (here: the line as it is, against the repaired one)",
        source="Jordan et al. 2022, arXiv 2211.08403",
    )
    return [*fitted, matched, repaired]
