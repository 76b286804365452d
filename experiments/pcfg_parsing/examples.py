"""What probes are asked: spans, gaps and words of sentences with their targets, and the same with control targets."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from experiments.pcfg_parsing.config import Probing, Target
from jaxft.core.rng import host_stream
from jaxft.evaluation.selectivity import control_targets
from jaxft.evaluation.span_probes import (
    SpanIndex,
    at_spans,
    gap_depths,
    span_index,
    token_depths,
    token_index,
)

MOST_CLASSES = 32
"""Labels that are told apart: the most frequent ones, and one class for all others."""


class ParsedSentences(NamedTuple):
    """Sentences, the trees they were drawn with, and their exact posteriors."""

    tokens: Int[np.ndarray, "b t"]
    lengths: Int[np.ndarray, "b"]
    gold: Shaped[np.ndarray, "b i j"]
    """Constituents of two words or more of the tree that the sentence was drawn with."""
    labels: Int[np.ndarray, "b i j"]
    """Top label of each of them; -1 elsewhere."""
    marginals: Float[np.ndarray, "b i j"]
    """Probability, given the words, that a span is a constituent, whatever its label."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """One half, training or test, of a probe's task."""

    index: SpanIndex
    targets: Shaped[np.ndarray, "n"]
    control: Shaped[np.ndarray, "n"]
    """Of the control task: fixed random targets by the words at the ends."""
    groups: Int[np.ndarray, "n"]
    """Within which predictions are compared: widths of spans, else places in the sentence."""


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """A target with its training and test examples."""

    target: Target
    train: Examples
    test: Examples
    classes: int | None = None
    """Number of labels; ``None`` for numbers."""


def probe_tasks(
    train: ParsedSentences, test: ParsedSentences, probing: Probing, *, seed: int
) -> dict[Target, ProbeTask]:
    """The tasks of all targets; the same few examples for every network and layer."""
    return {target: _task(target, train, test, probing, seed) for target in probing.targets}


def _task(target: Target, train: ParsedSentences, test: ParsedSentences, probing: Probing, seed: int) -> ProbeTask:
    (index, values), (test_index, test_values) = (_targets(target, half) for half in (train, test))
    rng = host_stream(seed, f"examples {target}")
    rows = np.sort(rng.permutation(len(values))[: probing.max_examples])
    index, values = index.take(rows), values[rows]
    classes = None
    if target == "label":
        kept = _frequent(values)
        values, test_values = (
            np.array([kept.get(v, len(kept)) for v in part.tolist()]) for part in (values, test_values)
        )
        classes = len(kept) + 1
    halves: list[Examples] = []
    for sentences, where, found in ((train, index, values), (test, test_index, test_values)):
        words = sentences.tokens[where.sentence[:, None], where.ends]
        control = control_targets(words, values, seed=seed)
        halves.append(Examples(where, found, control, where.width if target in ("marginal", "label") else where.start))
    return ProbeTask(target, halves[0], halves[1], classes)


def _targets(target: Target, sentences: ParsedSentences) -> tuple[SpanIndex, np.ndarray]:
    if target == "marginal":
        index = span_index(sentences.lengths)
        return index, at_spans(sentences.marginals, index)
    if target == "constituency":
        index = span_index(sentences.lengths, proper=False, width=2)
        return index, gap_depths(sentences.gold)[index.sentence, index.start]
    if target == "depth":
        index = token_index(sentences.lengths)
        return index, token_depths(sentences.gold)[index.sentence, index.start]
    index = span_index(sentences.lengths)
    labels = at_spans(sentences.labels, index)
    return index.take(labels >= 0), labels[labels >= 0]


def _frequent(labels: np.ndarray) -> Mapping[int, int]:
    """Class of each of the most frequent labels."""
    values, counts = np.unique(labels, return_counts=True)
    best = values[np.argsort(-counts, kind="stable")][: MOST_CLASSES - 1]
    return {int(label): number for number, label in enumerate(np.sort(best))}
