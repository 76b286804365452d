"""The claims that a run can judge, each with the same measurement where it must fail."""

import functools
from collections.abc import Sequence

import numpy as np

from experiments.likelihood_displacement.percentiles import RANDOM
from experiments.likelihood_displacement.rows import grouped, single_runs
from experiments.likelihood_displacement.unalignment import SETS
from jaxft.core.findings import Finding
from jaxft.core.rng import host_stream
from jaxft.lab.records import Record, number, of_kind
from theory.claims import Claim, Evidence
from theory.run_claims import Key, RunClaim, compared, judge_run, run_claim

RAZIN = "Razin et al. 2025, arXiv 2410.08847"
SLOPE, SLOPE_TOLERANCE = 1.0, 0.15
SUFFIXES = {"all": "", "blocks": "_in_layers_alone"}

_claim = functools.partial(run_claim, source=RAZIN)


def findings_of(records: Sequence[Record], similar: Sequence[str]) -> list[tuple[Finding, Finding]]:
    """Every claim judged on this run, and its control."""
    claims = [*_step_claims(records), *_single_claims(records, similar)]
    return judge_run([*claims, *_percentile_claims(records), *_arm_claims(records)])


def _step_claims(records: Sequence[Record]) -> list[RunClaim]:
    """The first-order prediction of a step of descent is exact as the step shrinks: its error is of first order."""
    tried = grouped(of_kind(records, "step_size"), ("comparison", "moved"))
    keys = [key for key, _ in tried]

    def errors(n: int, name: str) -> Evidence:
        rows = of_kind(records, "step_size", **keys[n])
        setting = {"quantity": "relative error by size of the step", "precision": "float64, matmul highest"}
        x, y = ([number(r[column]) for r in rows] for column in ("size", name))
        return Evidence(np.array(y), x=np.array(x), setting=setting)

    claim = Claim(
        "likelihood_displacement/gram_rate_is_the_limit_of_a_step",
        "The rate by the Gram matrix is the change of both log-probabilities per unit of a vanishing step.",
        f"{RAZIN}, proposition 2 for a whole network",
        "rate",
        lambda n: errors(n, "error"),
        lambda n: errors(n, "swapped"),
        "rows of the Gram matrix belong to their responses (here: exchanged)",
        tolerance=SLOPE_TOLERANCE,
        slope=SLOPE,
        seeds=max(1, len(keys)),
    )
    return [RunClaim(claim, keys)]


def _single_claims(records: Sequence[Record], similar: Sequence[str]) -> list[RunClaim]:
    runs = single_runs(records)
    names = ("comparison", "prompt", "moved", "optimizer")
    keys = [{name: r[name] for name in names} for r in runs]

    def run(key: Key) -> Record:
        return next(r for r in runs if all(r[name] == key[name] for name in names))

    def twin(key: Key, **changes: str) -> Record | None:
        return next((r for r in runs if all(r[n] == {**key, **changes}[n] for n in names)), None)

    layers = [key for key in keys if key["moved"] == "blocks" and twin(key, moved="all")]
    far = [c for c in dict.fromkeys(r["comparison"] for r in runs) if c not in similar]
    near = [key for key in keys if key["comparison"] in similar and far and twin(key, comparison=far[0])]
    steady = [key for key in keys if run(key)["steady"]]
    dealt = [keys[i] for i in host_stream(0, "dealt predictions").permutation(len(keys))]
    return [
        _claim(
            "likelihood_displacement/steps_are_predicted",
            "The change of ln p(y+) in a step is its first-order change along the update of the optimiser.",
            "association",
            keys if len(keys) >= 5 else [],
            lambda key: _pair("Δ ln p(y+) over a run", run(key)["predicted_chosen"], run(key)["change_chosen"]),
            lambda key: _pair("", run(dealt[keys.index(dict(key))])["predicted_chosen"], run(key)["change_chosen"]),
            "predicted and measured are of one run (here: of two)",
        ),
        _claim(
            "likelihood_displacement/who_gains_is_ranked_beforehand",
            "The ranking of tokens by what the first step makes of them is that of their gains over tuning.",
            "ordering",
            keys,
            lambda key: compared("rank correlation: first step, 0", run(key)["rank_predicted"], 0.0),
            lambda key: compared("", run(key)["rank_shuffled"], 0.0),
            "predictions are of their own tokens (here: of others, at random)",
        ),
        *(
            _claim(
                f"likelihood_displacement/preferred_answer_falls_by_{optimizer}" + SUFFIXES[moved],
                "Tuning on one pair, whose loss never rises, lowers the probability of the preferred answer.",
                "ordering",
                [key for key in steady if (key["optimizer"], key["moved"]) == (optimizer, moved)],
                lambda key: compared("ln p(y+): before, after", 0.0, run(key)["change"]),
                lambda key: compared("", 0.0, 0.0),
                "the decoder is tuned in between (here: not)",
            )
            for optimizer, moved in dict.fromkeys((key["optimizer"], key["moved"]) for key in keys)
        ),
        _claim(
            "likelihood_displacement/frozen_unembedding_displaces_more",
            "Without the path through the unembedding, which only raises it, the preferred answer ends lower.",
            "ordering",
            layers,
            lambda key: compared(
                "Δ ln p(y+): all parameters, layers alone", (twin(key, moved="all") or {})["change"], run(key)["change"]
            ),
            lambda key: compared("", run(key)["change"], run(key)["change"]),
            "the unembedding is trained in one of the two (here: in neither)",
        ),
        _claim(
            "likelihood_displacement/similar_answers_displace_more",
            "Between answers that mean the same the preferred one ends lower than between opposite ones.",
            "ordering",
            near,
            lambda key: compared(
                f"Δ ln p(y+): {far[0]}, similar", (twin(key, comparison=far[0]) or {})["change"], run(key)["change"]
            ),
            lambda key: compared("", run(key)["change"], run(key)["change"]),
            "the answers differ in similarity (here: the same pair twice)",
        ),
    ]


def _pair(quantity: str, predicted: object, measured: object) -> Evidence:
    setting = {"quantity": quantity, "precision": "float32, matmul highest"}
    return Evidence(np.array([number(measured)]), x=np.array([number(predicted)]), setting=setting)


def _percentile_claims(records: Sequence[Record]) -> list[RunClaim]:
    results = of_kind(records, "result", part="percentiles")

    def path(key: Key, score: str) -> Evidence:
        rows = sorted(of_kind(results, "result", score=score, **key), key=lambda r: r["percentile"])
        setting = {"quantity": f"fall of ln p(y+) by percentile, {score}", "precision": "float32, matmul highest"}
        fall, at = ([number(r[name]) for r in rows] for name in ("change", "percentile"))
        return Evidence(-np.array(fall), x=np.array(at), setting=setting)

    return [
        _claim(
            f"likelihood_displacement/{of['score']}_orders_displacement",
            "The higher the score of the pairs that are tuned on, the more their preferred responses fall.",
            "association",
            [key for key, _ in grouped(members, ("seed",)) if of_kind(results, "result", score=RANDOM, **key)],
            lambda key, score=of["score"]: path(key, score),
            lambda key: path(key, RANDOM),
            "the score knows the pairs (here: it is drawn at random)",
        )
        for of, members in grouped(results, ("score",))
        if of["score"] != RANDOM
    ]


def _arm_claims(records: Sequence[Record]) -> list[RunClaim]:
    results = of_kind(records, "result", part="unalignment")
    held_out = f"refusal_frac, {SETS[1]}"

    def of(key: Key, arm: str, name: str) -> float:
        return number(of_kind(results, "result", seed=key["seed"], arm=arm)[0][name])

    def having(*arms: str) -> list[dict[str, int]]:
        seeds = dict.fromkeys(r["seed"] for r in results)
        return [{"seed": s} for s in seeds if all(of_kind(results, "result", seed=s, arm=arm) for arm in arms)]

    starts = {r["seed"]: r for r in of_kind(records, "start", part="unalignment")}
    claims = [
        _claim(
            "likelihood_displacement/tuning_unaligns",
            "Tuning on preferences of refusals over refusals lowers the part of requests that are refused.",
            "ordering",
            having("dpo"),
            lambda key: compared(
                "refusals held out: before, after", starts[key["seed"]][held_out], of(key, "dpo", held_out)
            ),
            lambda key: compared("", of(key, "dpo", held_out), of(key, "dpo", held_out)),
            "the decoder is tuned in between (here: the same one twice)",
        )
    ]
    claims.append(
        _claim(
            "likelihood_displacement/displaced_mass_goes_to_compliances",
            "What refusals lose goes to first tokens of compliances.",
            "ordering",
            having("dpo"),
            lambda key: compared(
                "mass of compliances: after, before",
                of(key, "dpo", "mass_compliance"),
                starts[key["seed"]]["mass_compliance"],
            ),
            lambda key: compared("", of(key, "dpo", "mass_compliance"), of(key, "dpo", "mass_compliance")),
            "the decoder is tuned in between (here: the same one twice)",
        )
    )
    broken = f"other_frac, {SETS[1]}"
    claims.append(
        _claim(
            "likelihood_displacement/tuning_breaks_responses",
            "Tuning on preferences of refusals over refusals makes responses that neither refuse nor comply.",
            "ordering",
            having("dpo"),
            lambda key: compared(
                "neither, held out: after, before", of(key, "dpo", broken), starts[key["seed"]][broken]
            ),
            lambda key: compared("", of(key, "dpo", broken), of(key, "dpo", broken)),
            "the decoder is tuned in between (here: the same one twice)",
            source="found here",
        )
    )
    for arm, words in (("sft", "With an SFT term"), ("dpop", "By DPOP")):
        claims.append(
            _claim(
                f"likelihood_displacement/{arm}_breaks_fewer_than_dpo",
                f"{words} fewer responses neither refuse nor comply than by the plain loss.",
                "ordering",
                having(arm, "dpo"),
                lambda key, arm=arm: compared(
                    f"neither, held out: dpo, {arm}", of(key, "dpo", broken), of(key, arm, broken)
                ),
                lambda key: compared("", of(key, "dpo", broken), of(key, "dpo", broken)),
                "the two are tuned in different ways (here: in the same)",
                source="found here",
            )
        )
    for arm, than, words in (
        ("filtered", "dpo", "Tuned on the pairs of lowest CHES alone, more requests are refused than on all."),
        ("filtered", "random", "The filter by CHES keeps more refusals than as many pairs at random do."),
        ("sft", "dpo", "With an SFT term more requests are refused than without."),
        ("dpop", "dpo", "By DPOP more requests are refused than by the plain loss."),
    ):
        claims.append(
            _claim(
                f"likelihood_displacement/{arm}_refuses_more_than_{than}",
                words,
                "ordering",
                having(arm, than),
                lambda key, arm=arm, than=than: compared(
                    f"refusals held out: {arm}, {than}", of(key, arm, held_out), of(key, than, held_out)
                ),
                lambda key, than=than: compared("", of(key, than, held_out), of(key, than, held_out)),
                "the two are tuned in different ways (here: in the same)",
            )
        )
    return claims
