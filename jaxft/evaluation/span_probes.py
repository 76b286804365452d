"""Spans, gaps and tokens of sentences as the examples of a probe, and parses from what a probe says of them.

A parse is kept as the indicator of its constituents, ``[b, i, j]`` with j in 0..t, or as their probabilities: sums over
it are depths, whichever of the two it is.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxft.core.checks import require

Spans = Shaped[np.ndarray, "b i j"]
"""Indicator, score or probability of every span."""


class SpanIndex(NamedTuple):
    """Where the spans of a batch are, one after the other."""

    sentence: Int[np.ndarray, "n"]
    start: Int[np.ndarray, "n"]
    end: Int[np.ndarray, "n"]

    @property
    def width(self) -> Int[np.ndarray, "n"]:
        """Words of each span."""
        return self.end - self.start

    @property
    def ends(self) -> Int[np.ndarray, "n 2"]:
        """First and last word of each span."""
        return np.stack([self.start, self.end - 1], axis=1)

    def take(self, rows: Shaped[np.ndarray, "m"]) -> "SpanIndex":
        """Some of the spans."""
        return SpanIndex(self.sentence[rows], self.start[rows], self.end[rows])


def span_index(lengths: Int[np.ndarray, "b"], *, proper: bool = True, width: int | None = None) -> SpanIndex:
    """All spans of two words or more of every sentence.

    Args:
      lengths: Words of each sentence.
      proper: Leave the whole sentence out, which is a constituent whatever it says.
      width: Spans of this width alone; width 2 with the whole sentence are the gaps between neighbours.

    Returns:
      The spans, ordered by sentence, start and end.

    Example:
      >>> span_index(np.array([3])).ends.tolist()
      [[0, 1], [1, 2]]
    """
    found = [
        (b, i, j)
        for b, n in enumerate(lengths.tolist())
        for i in range(n)
        for j in range(i + 2, n + 1)
        if not (proper and j - i == n) and width in (None, j - i)
    ]
    return SpanIndex(*np.asarray(found, np.int64).reshape(-1, 3).T)


def token_index(lengths: Int[np.ndarray, "b"]) -> SpanIndex:
    """Every word of every sentence, as a span of width 1.

    Example:
      >>> token_index(np.array([2, 1])).start.tolist()
      [0, 1, 0]
    """
    found = [(b, i, i + 1) for b, n in enumerate(lengths.tolist()) for i in range(n)]
    return SpanIndex(*np.asarray(found, np.int64).reshape(-1, 3).T)


def span_features(hidden: Float[Array | np.ndarray, "l b t d"], index: SpanIndex) -> Float[Array, "l n d3"]:
    """Features of spans: the states at both ends and their product, ``[h_i; h_{j-1}; h_i * h_{j-1}]``.

    The product lets a linear probe see whether the ends agree; a span of width 1 has the state itself, alone.

    Args:
      hidden: States of every layer.
      index: Spans, all of width 1 or none.

    Returns:
      Features of every layer, of width 3 d, or d for single words.

    Raises:
      UserError: A span leaves the batch, or spans and single words are mixed.

    Reference:
      Endpoints and product: Zhao et al. 2023, arXiv 2303.08117, probe on the concatenated states of both ends.
    """
    where = "span_features"
    b, t = hidden.shape[1:3]
    inside = len(index.sentence) == 0 or bool(index.sentence.max() < b and index.end.max() <= t)
    require(inside, where, f"spans must lie in {b} sentences of {t} words", "others", "Index these sentences")
    single = index.width == 1
    alike = bool(single.all() or not single.any())
    require(alike, where, "spans must be single words or longer ones", "both", "Probe them apart")
    states = jnp.asarray(hidden)
    first = states[:, index.sentence, index.start]
    if len(single) and single[0]:
        return first
    last = states[:, index.sentence, index.end - 1]
    return jnp.concatenate([first, last, first * last], axis=2)


def at_spans(chart: Spans, index: SpanIndex) -> Shaped[np.ndarray, "n"]:
    """The entries of a chart at some spans."""
    return chart[index.sentence, index.start, index.end]


def fill_chart(values: Float[np.ndarray, "n"], index: SpanIndex, *, sentences: int, tokens: int) -> Spans:
    """The chart ``[b, i, j]`` with a value at each span of the index and 0 elsewhere: what a probe says, as a chart.

    Args:
      values: One a span.
      index: The spans.
      sentences: b.
      tokens: t.

    Returns:
      The chart.
    """
    chart = np.zeros((sentences, tokens, tokens + 1), values.dtype)
    chart[index.sentence, index.start, index.end] = values
    return chart


def token_depths(chart: Spans) -> Float[np.ndarray, "b t"]:
    """Constituents of two words or more around each word: of a tree its depth, of probabilities the expected one.

    Example:
      >>> tree = np.zeros((1, 3, 4))
      >>> tree[0, 0, 3] = tree[0, 1, 3] = 1
      >>> token_depths(tree).tolist()
      [[1.0, 2.0, 2.0]]
    """
    return _covering(chart, 1)


def gap_depths(chart: Spans) -> Float[np.ndarray, "b gaps"]:
    """Constituents that hold both neighbours of a gap: the depth of their lowest common ancestor, or its expectation.

    Example:
      >>> tree = np.zeros((1, 3, 4))
      >>> tree[0, 0, 3] = tree[0, 1, 3] = 1
      >>> gap_depths(tree).tolist()
      [[1.0, 2.0]]

    Reference:
      Relative depths of common ancestors: Gómez-Rodríguez and Vilares 2018, arXiv 1810.08994.
    """
    return _covering(chart, 2)


def _covering(chart: Spans, width: int) -> np.ndarray:
    """Total of the spans, 2 words or more, that hold all ``width`` words from each one on."""
    t = chart.shape[1]
    i, j, k = np.arange(t)[:, None, None], np.arange(t + 1)[None, :, None], np.arange(t - width + 1)[None, None]
    holds = (i <= k) & (k + width <= j) & (j - i >= 2)
    return np.tensordot(chart.astype(np.float64), holds.astype(np.float64), axes=2)


def split_by_depth(depths: Float[np.ndarray, "b gaps"], lengths: Int[np.ndarray, "b"]) -> Bool[np.ndarray, "b i j"]:
    """The binary trees that divide every span at its gap of least depth, the first of equals.

    From the depths of the common ancestors of a binary tree it gives that tree back.

    Args:
      depths: Of the gaps between neighbours; those beyond a sentence are not looked at.
      lengths: Words of each sentence.

    Returns:
      The constituents of two words or more.

    Example:
      >>> split_by_depth(np.array([[1.0, 2.0]]), np.array([3]))[0, 1].tolist()
      [False, False, False, True]

    Reference:
      Shen et al. 2018, arXiv 1806.04168, algorithm 2 (with distances, whose order is the opposite one).
    """
    b, t = depths.shape[0], depths.shape[1] + 1
    tree = np.zeros((b, t, t + 1), bool)
    for number, n in enumerate(lengths.tolist()):
        stack = [(0, n)]
        while stack:
            i, j = stack.pop()
            if j - i < 2:
                continue
            tree[number, i, j] = True
            middle = i + 1 + int(np.argmin(depths[number, i : j - 1]))
            stack += [(i, middle), (middle, j)]
    return tree


def branching(lengths: Int[np.ndarray, "b"], *, tokens: int, right: bool = True) -> Bool[np.ndarray, "b i j"]:
    """The trees that branch to the right alone, every constituent ending with the sentence, or to the left.

    Args:
      lengths: Words of each sentence.
      tokens: t.
      right: Or left.

    Returns:
      The constituents of two words or more.

    Example:
      >>> np.argwhere(branching(np.array([3]), tokens=3)[0]).tolist()
      [[0, 3], [1, 3]]
    """
    n = lengths[:, None, None]
    i, j = np.arange(tokens)[None, :, None], np.arange(tokens + 1)[None, None]
    edge = (j == n) & (i < j) if right else (i == 0) & (j <= n)
    return edge & (j - i >= 2)


def span_f1(predicted: Spans, gold: Spans, lengths: Int[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
    """Unlabelled F1 of each sentence by the convention of grammar induction, NaN where there is nothing to find.

    Spans of one word and the whole sentence are left out, so that sentences of two words have no F1. Their mean is the
    sentence F1; binary trees of one sentence have as many spans, so that precision, recall and F1 are one number.

    Args:
      predicted: Indicator of the constituents.
      gold: The same of the right tree.
      lengths: Words of each sentence.

    Returns:
      F1 of each sentence.

    Example:
      >>> lengths = np.array([3, 2])
      >>> left, right = (branching(lengths, tokens=3, right=right) for right in (False, True))
      >>> span_f1(right, right, lengths).tolist(), span_f1(left, right, lengths).tolist()
      ([1.0, nan], [0.0, nan])
    """
    i, j = np.arange(gold.shape[1])[None, :, None], np.arange(gold.shape[2])[None, None]
    proper = (j - i >= 2) & (j - i < lengths[:, None, None])
    found, right = ((chart > 0) & proper for chart in (predicted, gold))
    both, total = (found & right).sum(axis=(1, 2)), found.sum(axis=(1, 2)) + right.sum(axis=(1, 2))
    return np.where(total > 0, 2 * both / np.maximum(total, 1), np.nan)
