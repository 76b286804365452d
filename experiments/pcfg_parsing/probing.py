"""Probes of every layer of a network, scored on held-out sentences, each beside its control task."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments.pcfg_parsing.attention import deal_within
from experiments.pcfg_parsing.config import ProbeKind, Probing, Target
from experiments.pcfg_parsing.examples import ParsedSentences, ProbeTask
from jaxft.core.rng import stream
from jaxft.evaluation.probes import Objective, fit_probes, fit_ridge_probes, probe_outputs
from jaxft.evaluation.selectivity import Agreement, agreement, agreement_by_group, mean_agreement
from jaxft.evaluation.span_probes import SpanIndex, fill_chart, span_f1, span_features, split_by_depth
from jaxft.structure.bracketings import best_bracketing
from jaxft.structure.parses import parse_mask

FEATURE_BYTES = 2**30
"""Of the features held at once: layers are probed in groups that fit."""

States = Float[np.ndarray, "l b t d"]


def probe_records(
    states: Mapping[str, States],
    tasks: Mapping[Target, ProbeTask],
    sentences: ParsedSentences,
    probing: Probing,
    *,
    seed: int,
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Fits every probe to every layer, and scores it.

    Args:
      states: States of the words of the ``train`` and the ``test`` sentences in every layer, the embeddings first.
      tasks: What is probed for.
      sentences: The test sentences.
      probing: Settings.
      seed: Of the probes.

    Yields:
      A record a target, kind of probe and layer, and the predictions on the test examples.
    """
    key = jax.random.key(seed)
    for target, task in tasks.items():
        for kind in probing.kinds:
            predictions = {
                which: _predictions(states, task, which, kind, probing, stream(key, f"{target} {which}"))
                for which in ("targets", "control")
            }
            for layer in range(len(states["train"])):
                found, control = (predictions[which][layer] for which in ("targets", "control"))
                scores = _scores(task, found, control, sentences, seed)
                yield {"target": target, "probe": kind, "layer": layer, **scores}, found


def _predictions(
    states: Mapping[str, States], task: ProbeTask, which: str, kind: ProbeKind, probing: Probing, key: jax.Array
) -> Float[np.ndarray, "l n"]:
    """What the probes of all layers say of the test examples: numbers, or the number of a class."""
    values = getattr(task.train, which)
    width = states["train"].shape[3] * (1 if task.target == "depth" else 3)
    # On CPU nothing is gained by taking layers together, and networks of all depths share the programs for one.
    held = 1 if jax.default_backend() == "cpu" else max(1, FEATURE_BYTES // (4 * width * len(values)))
    layers = len(states["train"])
    found = []
    for first in range(0, layers, held):
        part = {name: x[first : first + held] for name, x in states.items()}
        x, x_test = span_features(part["train"], task.train.index), span_features(part["test"], task.test.index)
        found.append(_fit_and_predict(x, values, x_test, task, kind, probing, key))
    return np.concatenate(found)


def _fit_and_predict(
    x: Any, values: np.ndarray, x_test: Any, task: ProbeTask, kind: ProbeKind, probing: Probing, key: jax.Array
) -> np.ndarray:
    options: dict[str, Any] = {
        "key": key,
        "hidden": probing.hidden if kind == "mlp" else None,
        "steps": probing.steps,
        "batch_size": min(probing.batch_size, len(values)),
        "learning_rate": probing.learning_rate,
    }
    if task.classes is not None:
        probes = fit_probes(x, values, objective="cross_entropy", classes=task.classes, **options)
        return np.asarray(probe_outputs(probes, x_test)[:, 0]).argmax(axis=2).astype(np.float32)
    # Numbers of no fixed range are fitted in units of their deviation.
    marginal = task.target == "marginal"
    shift, scale = (0.0, 1.0) if marginal else (values.mean(), values.std() or 1.0)
    y = ((values - shift) / scale).astype(np.float32)[:, None]
    objective: Objective = "logistic" if marginal and kind == "mlp" else "squared"
    if kind == "linear":
        probes = fit_ridge_probes(x, y, l2=probing.l2)
    else:
        probes = fit_probes(x, np.clip(y, 0, 1) if marginal else y, objective=objective, **options)
    return np.asarray(probe_outputs(probes, x_test, objective=objective)[:, 0, :, 0]) * scale + shift


def _scores(
    task: ProbeTask, found: np.ndarray, control: np.ndarray, sentences: ParsedSentences, seed: int
) -> dict[str, Any]:
    test = task.test
    if task.classes is not None:
        right, right_control = (float((p == y).mean()) for p, y in ((found, test.targets), (control, test.control)))
        frequent = float((np.bincount(task.train.targets).argmax() == test.targets).mean())
        return {
            "score": right,
            "control_score": right_control,
            "selectivity": right - right_control,
            "accuracy": right,
            "majority_accuracy": frequent,
        }
    within, in_control = (_within(p, y, test.groups) for p, y in ((found, test.targets), (control, test.control)))
    whole = agreement(found.astype(np.float64), test.targets.astype(np.float64))
    dealt = deal_within(found, test.groups, seed=seed)
    return {
        "score": within.pearson,
        "control_score": in_control.pearson,
        "selectivity": within.pearson - in_control.pearson,
        "dealt_score": _within(dealt, test.targets, test.groups).pearson,
        "spearman": within.spearman,
        "pearson_overall": whole.pearson,
        "spearman_overall": whole.spearman,
        "r2": whole.r2,
        **_parse_scores(task.target, test.index, {"f1": found, "control_f1": control}, sentences),
    }


def _within(predicted: np.ndarray, target: np.ndarray, groups: np.ndarray) -> Agreement:
    """Mean over groups: among spans of one width, or words at one place."""
    return mean_agreement(agreement_by_group(predicted.astype(np.float64), target.astype(np.float64), groups))


def _parse_scores(
    target: Target, index: SpanIndex, predictions: Mapping[str, np.ndarray], sentences: ParsedSentences
) -> dict[str, float]:
    """Sentence F1 of the trees read off predictions, where these say how to build a tree."""
    readers: dict[str, Callable[[np.ndarray, SpanIndex, ParsedSentences], np.ndarray]]
    readers = {"marginal": tree_from_marginals, "constituency": tree_from_gaps}
    if target not in readers:
        return {}
    trees = {name: readers[target](values, index, sentences) for name, values in predictions.items()}
    return {name: mean_f1(tree, sentences) for name, tree in trees.items()}


def mean_f1(tree: np.ndarray, sentences: ParsedSentences) -> float:
    """Mean over sentences of the unlabelled F1 with the gold tree; NaN where no sentence has a span to find."""
    scores = span_f1(tree, sentences.gold, sentences.lengths)
    return float(np.mean(scores[np.isfinite(scores)])) if np.isfinite(scores).any() else float("nan")


def tree_from_marginals(values: np.ndarray, index: SpanIndex, sentences: ParsedSentences) -> np.ndarray:
    """The trees of greatest expected recall, by the chart, if the predicted marginals were true."""
    b, t = sentences.tokens.shape
    chart = fill_chart(values.astype(np.float32), index, sentences=b, tokens=t)
    return bracketing(chart, sentences.lengths)


def bracketing(chart: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The best trees of a chart of span scores, as indicators of their spans."""
    return np.asarray(_best(jnp.asarray(chart, jnp.float32), jnp.asarray(lengths, jnp.int32)))


@jax.jit
def _best(chart: jax.Array, lengths: jax.Array) -> jax.Array:
    parses, _ = best_bracketing(chart, lengths)
    return parse_mask(parses, chart.shape[1])


def tree_from_gaps(values: np.ndarray, index: SpanIndex, sentences: ParsedSentences) -> np.ndarray:
    """The trees split from the top at the gaps of least depth."""
    b, t = sentences.tokens.shape
    depths = np.zeros((b, t - 1))
    depths[index.sentence, index.start] = values
    return split_by_depth(depths, sentences.lengths)
