"""The claims of the paper that a run can judge, each with the same measurement where it must fail."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from experiments.mode_connectivity.config import net_sizes
from experiments.mode_connectivity.rows import epsilon, loss_of_ends, of_path, pair_keys
from jaxft.core.findings import Finding
from jaxft.lab.records import Record, number, of_kind
from theory.run_claims import Key, RunClaim, compared, judge_run, run_claim

ROUNDING = 1e-4
"""Relative, of a loss in float32: the path sums units in another order than the network it certifies."""
LEAST_EPSILON = 1e-6
"""In nats: what is below is rounding."""
KUDITIPUDI = "Kuditipudi et al. 2019, arXiv 1906.06247"
GARIPOV = "Garipov et al. 2018, arXiv 1802.10026"
AINSWORTH = "Ainsworth et al. 2022, arXiv 2209.04836"

_claim = functools.partial(run_claim, source=KUDITIPUDI)


def findings_of(records: Sequence[Record]) -> list[tuple[Finding, Finding]]:
    """Every claim judged on this run, and its control."""
    return judge_run([*_theorem_claims(records), *_stability_claims(records), *_curve_claims(records)])


def _theorem_claims(records: Sequence[Record]) -> list[RunClaim]:
    keys = pair_keys(records)

    def pair(key: Key) -> Record:
        return of_kind(records, "pair", **key)[0]

    def on_path(key: Key) -> float:
        return of_path(records, key, "theorem", "train_loss_max")

    def certificate(key: Key) -> float:
        return number(pair(key)["certificate"])

    return [
        _claim(
            "mode_connectivity/certificate_is_the_maximum_on_the_path",
            "The largest loss on the constructive path is that of 2H+2 networks that are known beforehand.",
            "identity",
            keys,
            lambda key: compared("loss: certificate, largest of a grid", certificate(key), on_path(key)),
            lambda key: compared("", loss_of_ends(pair(key)), on_path(key)),
            "the networks with units dropped are among them (here: the two ends alone)",
            tolerance=ROUNDING,
        ),
        _claim(
            "mode_connectivity/constructive_path_within_the_bound",
            "Two ε-dropout stable networks are joined by a path whose loss is at most that of the ends and ε.",
            "bound",
            keys,
            lambda key: compared(
                "loss: bound, constructive path", number(pair(key)["bound"]) * (1 + ROUNDING), on_path(key)
            ),
            lambda key: compared("", loss_of_ends(pair(key)), on_path(key)),
            "ε is that of the networks (here: 0)",
        ),
    ]


def _stability_claims(records: Sequence[Record]) -> list[RunClaim]:
    """Epsilon of pairs that differ in width, or in dropout, alone."""
    keys = pair_keys(records)

    def of(key: Key) -> float:
        # Of networks that differ in size ε spans decades: it is compared by its logarithm.
        return math.log10(max(epsilon(of_kind(records, "pair", **key)[0], median=True), LEAST_EPSILON))

    wider = [(key, {**key, "net": net}) for key in keys if (net := _widest(records, key)) != key["net"]]
    rates = sorted({key["dropout"] for key in keys})
    dropped = [(key, {**key, "dropout": rates[-1]}) for key in keys if key["dropout"] == rates[0] != rates[-1]]
    claims = []
    for name, statement, pairs, quantity, breaks in (
        (
            "mode_connectivity/epsilon_falls_with_width",
            "Wide networks are dropout stable with a smaller ε than narrow ones.",
            wider,
            "log10 of the median ε: narrower, widest",
            "the networks differ in width (here: in their seeds alone)",
        ),
        (
            "mode_connectivity/epsilon_falls_with_dropout",
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
                lambda key, quantity=quantity: compared(quantity, of(key["pair"][0]), of(key["pair"][1])),
                lambda key: compared("", of(key["pair"][0]), of(_next_seed(keys, key["pair"][0]))),
                breaks,
            )
        )
    return claims


def _next_seed(keys: Sequence[Key], key: Key) -> Key:
    """The next pair of the same kind, the first one after the last: each is the greater and the lesser once."""
    same = [k for k in keys if (k["net"], k["dropout"]) == (key["net"], key["dropout"])]
    return same[(same.index(key) + 1) % len(same)]


def _widest(records: Sequence[Record], key: Key) -> str:
    """The widest network of the kind and depth of this one of which the run has a pair."""
    kind, layers, _ = net_sizes(key["net"])
    nets = {k["net"] for k in pair_keys(records) if net_sizes(k["net"])[:2] == (kind, layers)}
    return max(nets, key=lambda net: net_sizes(net)[2])


def _curve_claims(records: Sequence[Record]) -> list[RunClaim]:
    def having(*paths: str) -> list[dict[str, Any]]:
        return [key for key in pair_keys(records) if all(of_kind(records, "path", **key, path=p) for p in paths)]

    def barrier(key: Key, path: str) -> float:
        return of_path(records, key, path, "train_barrier")

    fitted = [
        _claim(
            f"mode_connectivity/{path}_below_the_line",
            statement,
            "ordering",
            having("line", path),
            lambda key, path=path, words=words: compared(
                f"barrier: straight line, {words}", barrier(key, "line"), barrier(key, path)
            ),
            lambda key: compared("", barrier(key, "line"), barrier(key, "line")),
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
        "mode_connectivity/matching_lowers_the_barrier",
        "The line to the second network has a lower barrier when its hidden units are permuted to match the first's.",
        "ordering",
        having("line", "matched", "shuffled"),
        lambda key: compared("barrier: straight line, matched line", barrier(key, "line"), barrier(key, "matched")),
        lambda key: compared("", barrier(key, "line"), barrier(key, "shuffled")),
        "the permutation matches units (here: a random one)",
        source=AINSWORTH,
    )
    repaired = _claim(
        "mode_connectivity/repair_lowers_the_barrier",
        "Means and deviations of pre-activations set to those between the ends lower the barrier of the matched line.",
        "ordering",
        having("line", "matched", "repaired"),
        lambda key: compared("barrier: matched line, REPAIR", barrier(key, "matched"), barrier(key, "repaired")),
        lambda key: compared("", barrier(key, "repaired"), barrier(key, "line")),
        "the line is the matched one (here: the line as it is, against the repaired one)",
        source="Jordan et al. 2022, arXiv 2211.08403",
    )
    return [*fitted, matched, repaired]
