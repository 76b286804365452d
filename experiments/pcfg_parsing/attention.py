"""Attention of the network beside that of the construction: heads at fixed offsets that weigh by constituency.

In the transformer that executes Inside-Outside a head looks at one offset alone, and weighs a pair of words (i, j) by
the probability that they are the ends of a constituent. Two numbers ask of every head of a trained network how near it
comes: how much of its weights the offset explains, and how well, among pairs at one offset, they follow the marginals.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxft.core.rng import host_stream
from jaxft.evaluation.span_probes import SpanIndex, at_spans


def attention_records(
    attention: Float[np.ndarray, "l b h t t"],
    marginals: Float[np.ndarray, "b i j"],
    index: SpanIndex,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """One record a head.

    Args:
      attention: Weights between words, from the row's to the column's.
      marginals: Span posteriors.
      index: Spans looked at: their ends are the pairs of words.
      seed: Of the control, in which marginals are dealt out anew among the spans of one width.

    Returns:
      Layer, head, ``offset_r2``, ``correlation`` with the marginals (of the two directions the one that is larger in
      size) and ``control_correlation``.
    """
    b, first, last = index.sentence, index.start, index.end - 1
    target = at_spans(marginals, index)
    dealt = deal_within(target, index.width, seed=seed)
    found = []
    for layer, weights in enumerate(attention, start=1):
        forward, backward = weights[b, :, first, last].T, weights[b, :, last, first].T
        explained = offset_r2(forward, backward, index.width)
        both = [within_correlation(w, target, index.width) for w in (forward, backward)]
        controls = [within_correlation(w, dealt, index.width) for w in (forward, backward)]
        for head, r2 in enumerate(explained):
            correlation, control = (max((c[head] for c in pair), key=abs) for pair in (both, controls))
            found.append(
                {
                    "layer": layer,
                    "head": head,
                    "offset_r2": float(r2),
                    "correlation": float(correlation),
                    "control_correlation": float(control),
                }
            )
    return found


def offset_r2(
    forward: Float[np.ndarray, "h n"], backward: Float[np.ndarray, "h n"], width: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "h"]:
    """Part of the variance of the weights, over pairs of words, that the signed offset between the two explains."""
    values = np.concatenate([forward, backward], axis=1)
    offsets = np.concatenate([width, -width])
    within = _centred(values, offsets)
    total = values - values.mean(axis=1, keepdims=True)
    return 1 - (within**2).sum(axis=1) / np.maximum((total**2).sum(axis=1), 1e-30)


def within_correlation(
    values: Float[np.ndarray, "h n"], target: Float[np.ndarray, "n"], groups: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "h"]:
    """Correlation after the mean of each group is taken out of both: 0 where nothing is left to vary."""
    x, y = _centred(values, groups), _centred(target[None], groups)
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum())
    return np.where(scale > 1e-12, (x * y).sum(axis=1) / np.maximum(scale, 1e-12), 0.0)


def deal_within(values: Float[np.ndarray, "n"], groups: Int[np.ndarray, "n"], *, seed: int) -> Float[np.ndarray, "n"]:
    """Values dealt out anew among the members of each group."""
    rng = host_stream(seed, "dealt")
    dealt = values.copy()
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        dealt[rows] = values[rng.permutation(rows)]
    return dealt


def _centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    _, member = np.unique(groups, return_inverse=True)
    counts = np.bincount(member)
    means = np.stack([np.bincount(member, weights=row) for row in values]) / counts[None]
    return values.astype(np.float64) - means[:, member]
