"""Where charts stand in the residual stream of the constructed transformer; numbers of layers, heads, coordinates."""

from typing import Any, Literal, NamedTuple

import numpy as np

from jaxft.nn import AttentionStage, FeedForward

Attention = Literal["soft", "hard"]
Heads = Literal["directional", "symmetric", "lowrank"]

FORBIDDEN = -1e30
"""Bias of an offset that a head may not attend to: below minus any score, in float32 too. Allowed offsets have 0."""


class Coordinates(NamedTuple):
    """Where things stand in the residual stream: arrays of coordinates, p = L + 1 slots or positions."""

    left: np.ndarray
    """``[a, p]``: alpha(A, t, k) at token t, slot k > t."""
    right: np.ndarray
    """``[a, p]``: alpha(A, k, t) at token t, slot k < t. The same coordinates as ``left``, but for symmetric heads."""
    forward: np.ndarray
    """``[s, p - 2]``: beta(A, t, k) at token t, slots from 2: nonterminals span two words or more."""
    backward: np.ndarray
    """``[s, p - 2]``: beta(A, k, t) at token t, slots up to p - 3."""
    position: np.ndarray
    """``[p]``: one-hot position."""
    word: np.ndarray
    """``[q]``: P(preterminal -> word t); of a masked word, the sum over words."""
    tag: np.ndarray
    """``[q]``: beta of the preterminal of word t."""
    last: np.ndarray
    """``[1]``: whether the token is the last word."""
    buffers: dict[str, np.ndarray]
    """What hard attention copies to, and scratch of the gated steps; empty otherwise."""
    width: int


def layer_count(max_tokens: int) -> int:
    """Layers of the construction: 2L - 1 (the paper: 2L)."""
    return 2 * max_tokens - 1


def head_counts(
    nonterminals: int, preterminals: int, *, attention: Attention = "soft", heads: Heads = "directional", rank: int = 0
) -> dict[str, int]:
    """Heads of a layer of each kind.

    Directional: two heads a nonterminal, one for either end of a span. Of the paper's |N| = s + q heads a layer these
    are no more where there are no fewer preterminals than nonterminals. Symmetric heads serve both ends in the inside
    layers; in the outside layers the cross terms of a symmetric score do not vanish. The first layer takes 2q + 3 heads
    to place words in slots, which a table of embeddings by word *and* position would save.
    """
    if attention == "hard":
        return {"place": 5, "inside": 3, "outside": 3, "tags": 2}
    if heads == "lowrank":
        return {"place": 2 * preterminals + 3, "inside": 2 * rank, "outside": 4 * rank, "tags": 2 * rank}
    inside = nonterminals if heads == "symmetric" else 2 * nonterminals
    return {"place": 2 * preterminals + 3, "inside": inside, "outside": 2 * nonterminals, "tags": preterminals}


def embedding_width(
    nonterminals: int,
    preterminals: int,
    max_tokens: int,
    *,
    attention: Attention = "soft",
    heads: Heads = "directional",
) -> int:
    """Width of the residual stream: the charts, L + 1 for positions, 2q + 1 for a word, its tags and the end.

    The inside chart takes a(L + 1) coordinates and the outside chart 2s(L - 1), with a = s + q. Together they are no
    more than the paper's 2|N|L exactly where s <= q. Symmetric heads need the inside chart twice; hard attention needs
    two buffers of a neighbour's charts, and scratch.
    """
    s, q, a, p = nonterminals, preterminals, nonterminals + preterminals, max_tokens + 1
    width = chart_width(s, q, max_tokens) + p + 2 * q + 1
    if attention == "hard":
        return width + 2 * (a * p + s * (p - 2) + p) + 2 * max(s, q)
    return width + (a * p if heads == "symmetric" else 0)


def chart_width(nonterminals: int, preterminals: int, max_tokens: int) -> int:
    """Coordinates of the charts alone: a(L + 1) + 2s(L - 1)."""
    return (nonterminals + preterminals) * (max_tokens + 1) + 2 * nonterminals * (max_tokens - 1)


def make_coordinates(s: int, q: int, p: int, attention: str, heads: str) -> Coordinates:
    """Coordinates of all blocks, one after the other, for s nonterminals, q preterminals and p positions."""
    used = 0

    def block(*shape: int) -> np.ndarray:
        nonlocal used
        used += int(np.prod(shape))
        return np.arange(used - int(np.prod(shape)), used).reshape(shape)

    left = block(s + q, p)
    right = block(s + q, p) if heads == "symmetric" else left
    forward, backward, position = block(s, p - 2), block(s, p - 2), block(p)
    word, tag, last = block(q), block(q), block(1)
    buffers = {}
    if attention == "hard":
        for side in ("left", "right"):
            # Of the partner at that side: its inside chart, its outside chart on our side, its position.
            buffers |= {f"{side}_inside": block(s + q, p), f"{side}_outside": block(s, p - 2)}
            buffers |= {f"{side}_position": block(p), f"{side}_scratch": block(max(s, q))}
    return Coordinates(left, right, forward, backward, position, word, tag, last, buffers, used)


def make_stage(
    heads: list[dict[str, Any]], offsets: np.ndarray, positions: int, steps: tuple[FeedForward, ...] = ()
) -> tuple[AttentionStage, dict[str, np.ndarray]]:
    """A stage and its weights from its heads.

    Args:
      heads: Each with ``query``, ``key`` ``[d, e]``, ``value`` ``[d, u]`` and ``output`` ``[u, d]``; narrower heads
        are filled up with zeros. ``offsets`` times the layer's offset is where a head attends to; ``None``: anywhere.
      offsets: Of each layer.
      positions: p.
      steps: What follows the attention.

    Returns:
      The stage, and its parameters but for those of the steps.
    """
    weights = {name: np.stack(_same_shape([head[name] for head in heads])) for name in heads[0] if name != "offsets"}
    bias = np.full((len(offsets), len(heads), 2 * positions - 1), FORBIDDEN)
    for h, head in enumerate(heads):
        if head["offsets"] is None:
            bias[:, h] = 0
        for sign in head["offsets"] or ():
            bias[np.arange(len(offsets)), h, sign * np.asarray(offsets) + positions - 1] = 0
    shape = AttentionStage(len(offsets), len(heads), weights["query"].shape[-1], weights["value"].shape[-1], steps)
    return shape, weights | {"offset_bias": bias}


def _same_shape(matrices: list[np.ndarray]) -> list[np.ndarray]:
    rows, columns = (max(m.shape[axis] for m in matrices) for axis in (0, 1))
    return [np.pad(m, ((0, rows - m.shape[0]), (0, columns - m.shape[1]))) for m in matrices]
