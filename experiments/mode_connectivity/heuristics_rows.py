"""What is shown of the language-model part: its tables, what they say in words, and its figure."""

from typing import Any

import numpy as np

from experiments.mode_connectivity.heuristics import HeuristicsResult
from experiments.mode_connectivity.heuristics_config import Heuristics
from experiments.mode_connectivity.heuristics_data import SPLITS
from jaxft.lab.figures_paths import draw_matrix
from jaxft.lab.figures_style import Drawing
from jaxft.lab.report import format_number, markdown_table

NETWORK_COLUMNS = (
    "network",
    "cluster",
    "training loss",
    "training accuracy",
    "held-out accuracy",
    "challenge accuracy",
)
PAIR_COLUMNS = ("loss on", "measure", "mean", "greatest", "to a shuffled network", "rank correlation", "p")

SIGNIFICANT = 0.05
WORDS = {"train": "training set", "held_out": "held-out set", "challenge": "challenge set"}


def network_rows(result: HeuristicsResult) -> list[dict[str, Any]]:
    """A row a network, in order of clusters, then of accuracy on the challenge set."""
    order = np.lexsort((result.accuracies["challenge"], result.clusters))
    return [
        dict(
            zip(
                NETWORK_COLUMNS,
                (
                    int(result.numbers[i]),
                    int(result.clusters[i]),
                    float(result.losses["train"][i]),
                    *(float(result.accuracies[split][i]) for split in SPLITS),
                ),
                strict=True,
            )
        )
        for i in order
    ]


def pair_rows(result: HeuristicsResult) -> list[dict[str, Any]]:
    """A row a set of sentences and measure: how high it is over pairs, and whether it goes with strategies."""
    rows = []
    for split in SPLITS:
        for measure, matrices in (("barrier", result.barriers), ("gap", result.gaps)):
            pairs = matrices[split][np.triu_indices(len(result.numbers), 1)]
            found = result.associations[f"{split}_{measure}"]
            shuffled = result.shuffled[split] if measure == "barrier" else None
            named = {"gap": "convexity gap"}.get(measure, measure)
            cells = (WORDS[split], named, float(pairs.mean()), float(pairs.max()), shuffled)
            known = np.isfinite(found.correlation)  # not where all pairs are alike
            association = (found.correlation, found.p_value) if known else (None, None)
            rows.append(dict(zip(PAIR_COLUMNS, (*cells, *association), strict=True)))
    return rows


def heuristics_notes(config: Heuristics, result: HeuristicsResult) -> list[str]:
    """What was done and what came of it, a paragraph an entry."""
    accuracy = result.accuracies["challenge"]
    found = result.associations["train_barrier"]
    p, rho = format_number(found.p_value), format_number(found.correlation)
    if not np.isfinite(found.correlation):
        verdict = "Barriers or accuracies do not vary, so that nothing can be said."
    elif found.p_value < SIGNIFICANT:
        verdict = f"Networks that differ more in strategy have higher barriers between them (p = {p})."
    else:
        verdict = (
            f"That networks which differ in strategy have higher barriers between them is not seen here (p = {p}): "
            "on this scale there is no basin a strategy."
        )
    means = ", ".join(
        f"{format_number(float(accuracy[result.clusters == c].mean()))} ({int((result.clusters == c).sum())} networks)"
        for c in range(int(result.clusters.max()) + 1)
    )
    pairs = result.barriers["train"][np.triu_indices(len(accuracy), 1)]
    lost = ", ".join(map(str, result.left_out))
    layers = "1 layer" if config.layers == 1 else f"{config.layers} layers"
    return [
        f"One encoder ({layers} of width {config.width}) is pre-trained on sentences of the embedded "
        f"grammar and fine-tuned {config.models} times from one head, in other orders of the batches. The label is "
        f"the number of the subject; in all but {format_number(config.telling_frac)} of the training sentences it is "
        f"also told by the presence of words of a class ({config.lexical}). In the challenge set the two disagree: "
        "accuracy 1 is the structural rule, 0 the lexical one."
        + (f" Networks {lost} did not learn their task, and are left out." if lost else ""),
        f"Held-out accuracies lie between {_range(result.accuracies['held_out'])}, challenge accuracies between "
        f"{_range(accuracy)}. Straight lines have barriers of the training loss of "
        f"{format_number(float(pairs.mean()))} nats on average; to the first network with its units shuffled, which "
        f"computes the same, {format_number(result.shuffled['train'])}. Rank correlation over pairs, between the "
        f"barrier and the difference of challenge accuracies: {rho}. {verdict} Mean challenge accuracy of the clusters "
        f"of networks with low barriers: {means}.",
    ]


def heuristics_section(config: Heuristics, result: HeuristicsResult | None) -> list[str]:
    """The paragraphs of a report, without its figure."""
    title = "## Fine-tuning seeds on a rule that two heuristics explain"
    if result is None:
        return [title, "Too few networks learnt their task. Lower the learning rate."]
    return [
        title,
        *heuristics_notes(config, result),
        markdown_table(network_rows(result), NETWORK_COLUMNS),
        markdown_table(pair_rows(result), PAIR_COLUMNS),
        "Losses, barriers (over the chord) and gaps in nats, accuracies as fractions. p: the part of permutations of "
        "the networks with as high a rank correlation (Mantel), since pairs of networks are not independent.",
    ]


def draw_heuristics(result: HeuristicsResult, *, split: str = "train") -> Drawing:
    """Barriers of the loss on a split, by cluster, and accuracy on the challenge set beside them."""
    order = np.lexsort((result.accuracies["challenge"], result.clusters))
    return draw_matrix(
        [(f"loss on the {WORDS[split]}", result.barriers[split][np.ix_(order, order)])],
        [str(result.numbers[i]) for i in order],
        quantity="barrier (nats)",
        one_scale=False,
        groups=[int(c) for c in result.clusters[order]],
        bars=("accuracy where the heuristics\ndisagree (fraction)", result.accuracies["challenge"][order]),
    )


def _range(values: np.ndarray) -> str:
    return f"{format_number(float(values.min()))} and {format_number(float(values.max()))}"
