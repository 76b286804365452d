"""The claims of the paper that a run can judge, each with the same measurement where it must fail."""

import functools
from collections.abc import Sequence
from typing import Any

from experiments.pcfg_parsing.config import model_sizes
from experiments.pcfg_parsing.rows import bayes_of, best_head, best_layer, models, networks, strongest
from jaxft.core.findings import Finding
from jaxft.lab.records import Record, number, of_kind
from theory.run_claims import Comparison, Key, RunClaim, compared, judge_run, run_claim

ROUNDING_NATS = 1e-6
SOURCE = "Zhao et al. 2023, arXiv 2303.08117"

_claim = functools.partial(run_claim, source=SOURCE)


def findings_of(records: Sequence[Record]) -> list[tuple[Finding, Finding]]:
    """Every claim judged on this run, and its control."""
    return judge_run([_bayes_bound(records), *_probe_claims(records), _head_claim(records), *_size_claims(records)])


def _bayes_bound(records: Sequence[Record]) -> RunClaim:
    bayes = bayes_of(records)
    floor = bayes["bayes_loss_nats"]

    def loss(key: Key) -> float:
        return floor + min(number(r["gap_nats"]) for r in of_kind(records, "event", **key))

    return _claim(
        "pcfg_parsing/trained_loss_above_bayes",
        "The posterior by Inside-Outside is optimal for the masked-word loss: no network's loss is below its.",
        "bound",
        networks(records),
        lambda key: compared("loss: network, exact posterior", loss(key) + ROUNDING_NATS, floor),
        lambda key: compared("loss: network, word frequencies", loss(key), bayes["unigram_loss_nats"]),
        "the posterior is that of the grammar (here: of the frequencies of words)",
    )


def _probe_claims(records: Sequence[Record]) -> list[RunClaim]:
    kind, keys = strongest(records), networks(records)
    right = next(number(r["f1"]) for r in of_kind(records, "parser", parser="right branching"))

    def probe(key: Key, *, trained: bool = True, above: int = 0) -> Record:
        return best_layer(records, **key, target="marginal", probe=kind, trained=trained, above=above)

    def embedded(key: Key, trained: bool) -> Any:
        found = of_kind(records, "probe", **key, target="marginal", probe=kind, trained=trained, layer=0)
        return found[0]["score"]

    return [
        _claim(
            "pcfg_parsing/training_makes_marginals_readable",
            "Probes read the marginals of Inside-Outside off a trained network better than off an untrained one.",
            "ordering",
            keys,
            lambda key: compared(
                "marginals: trained, untrained", probe(key)["score"], probe(key, trained=False)["score"]
            ),
            lambda key: compared("", probe(key)["control_score"], probe(key, trained=False)["score"]),
            "the task is about the grammar (here: random targets by the words at the ends, after training)",
        ),
        _claim(
            "pcfg_parsing/marginals_above_the_embeddings",
            "Probes read the marginals off the layers of a trained network better than off its embeddings.",
            "ordering",
            keys,
            lambda key: compared("marginals: layers, embeddings", probe(key, above=1)["score"], embedded(key, True)),
            lambda key: compared("", probe(key, above=1, trained=False)["score"], embedded(key, True)),
            "the layers are trained (here: the layers of an untrained network against trained embeddings)",
        ),
        _claim(
            "pcfg_parsing/probe_is_selective",
            "A probe follows the marginals better than a random function of the words at the ends.",
            "ordering",
            keys,
            lambda key: compared("marginals: task, control task", probe(key)["score"], probe(key)["control_score"]),
            lambda key: compared("", probe(key)["dealt_score"], probe(key)["score"]),
            "predictions belong to their spans (here: dealt out among spans of one width)",
        ),
        _claim(
            "pcfg_parsing/probed_marginals_parse",
            "Trees of greatest expected recall under the probed marginals beat right branching.",
            "ordering",
            keys,
            lambda key: compared("F1: probed marginals, right branching", probe(key)["f1"], right),
            lambda key: compared("", probe(key)["control_f1"], probe(key)["f1"]),
            "the probe was fitted to marginals (here: to the control task)",
        ),
    ]


def _head_claim(records: Sequence[Record]) -> RunClaim:
    def head(key: Key, name: str, *, trained: bool) -> float:
        return best_head(records, name, **key, trained=trained)

    return _claim(
        "pcfg_parsing/heads_weigh_constituents",
        "Some head of a trained network weighs pairs at one offset by the probability of a constituent, as the heads "
        "of the construction do, more than any head of an untrained network.",
        "ordering",
        networks(records),
        lambda key: compared(
            "attention: trained, untrained",
            head(key, "correlation", trained=True),
            head(key, "correlation", trained=False),
        ),
        lambda key: compared(
            "", head(key, "control_correlation", trained=True), head(key, "correlation", trained=True)
        ),
        "marginals belong to their spans (here: dealt out among spans of one width)",
    )


def _size_claims(records: Sequence[Record]) -> list[RunClaim]:
    """Fewer layers, and fewer heads, leave a greater gap: for every model of which the run has the larger one."""
    sizes = {model: model_sizes(model) for model in models(records)}
    claims = []
    for small, (heads, layers) in sizes.items():
        deeper = [m for m, (h, n) in sizes.items() if h == heads and n > layers]
        wider = [m for m, (h, n) in sizes.items() if n == layers and h > heads]
        for word, larger in (("layers", deeper), ("heads", wider)):
            if not larger:
                continue
            best = max(larger, key=lambda m: sizes[m])
            gaps = {m: {r["seed"]: r for r in of_kind(records, "result", model=m)} for m in (small, best)}
            keys = [{"seed": seed} for seed in gaps[small] if seed in gaps[best]]
            claims.append(
                _claim(
                    f"pcfg_parsing/fewer_{word}_greater_gap",
                    f"A network with too few {word} is further from the Bayes loss.",
                    "ordering",
                    keys,
                    _gap_pair(records, small, best),
                    _gap_pair(records, best, small, quantity=""),
                    "the network named first is the smaller one (here: the two exchanged)",
                )
            )
    return claims


def _gap_pair(records: Sequence[Record], first: str, second: str, quantity: str | None = None) -> Comparison:
    def gap(key: Key, model: str) -> Any:
        return of_kind(records, "result", **key, model=model)[0]["gap_nats"]

    said = f"gap: {first}, {second}" if quantity is None else quantity
    return lambda key: compared(said, gap(key, first), gap(key, second))
