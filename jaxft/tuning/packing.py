"""Prompts and their responses as a ``ResponseBatch``: packed into one row an example, or padded, a row a response."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from jaxft.core.checks import require
from jaxft.core.types import CausalTokens, ResponseBatch
from jaxft.data.causal_rows import Piece, Side, lay_out, row_width
from jaxft.tuning.encoding import EncodedPreferences

Layout = Literal["packed", "padded"]

Ids = Sequence[int]


class BatchShape(NamedTuple):
    """Static sizes of a batch."""

    tokens: int
    """Columns of a row, t."""
    response_tokens: int
    """Tokens of the longest response, k."""


class TokenUse(NamedTuple):
    """How much of a batch is text."""

    tokens: int
    """Tokens of text, prompts counted as often as they stand there."""
    columns: int
    """Tokens computed, padding included."""
    fill_frac: float


def make_response_batch(
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    *,
    layout: Layout = "packed",
    tokens: int | None = None,
    response_tokens: int | None = None,
    multiple: int = 8,
    side: Side = "right",
    pad_id: int = 0,
) -> ResponseBatch:
    """Prompts with r responses each, as int32 numpy arrays.

    Packed, the row of an example is its prompt (segment 1), then its responses (segments 2, 3, ...), whose positions
    all go on from the end of the prompt: the prompt is computed once. Padded, each response has a row of its own
    behind a copy of the prompt, all of it segment 1.

    Args:
      prompts: Ids of each prompt, one or more.
      responses: For each prompt the ids of r responses, one or more each: one for supervised fine-tuning, two for a
        preference pair, more where further continuations are asked about.
      layout: Packed or padded.
      tokens: Columns of a row; ``None`` is what the longest needs, rounded up to ``multiple``.
      response_tokens: Tokens of the longest response, likewise.
      multiple: Rounding, so that few shapes are compiled.
      side: Where rows are padded.
      pad_id: Id at padding, which nothing sees.

    Returns:
      The batch.

    Raises:
      UserError: No examples, empty prompts or responses, an uneven number of responses, or sizes below the longest.

    Example:
      >>> batch = make_response_batch([[5, 6]], [[[7, 8], [9]]], multiple=1)
      >>> batch.tokens.input_ids.tolist(), batch.tokens.segment_ids.tolist(), batch.tokens.positions.tolist()
      ([[[5, 6, 7, 8, 9]]], [[[1, 1, 2, 2, 3]]], [[[0, 1, 2, 3, 2]]])
      >>> batch.source.tolist(), batch.targets.tolist()
      ([[[1, 2], [1, 0]]], [[[7, 8], [9, 0]]])
    """
    where = "make_response_batch"
    r = _require_rectangular(where, prompts, responses)
    require(layout in get_args(Layout), where, "layout must be packed or padded", repr(layout), "Pass one of them")
    packed = layout == "packed"
    rows = [row for p, rs in zip(prompts, responses, strict=True) for row in _rows(list(p), rs, packed=packed)]
    lengths = [sum(len(ids) for ids, _, _ in row) for row in rows]
    t = row_width(where, max(lengths), tokens, multiple)
    longest = max(len(ids) for rs in responses for ids in rs)
    k = row_width(where, longest, response_tokens, multiple, name="response_tokens")
    n, s = len(prompts), 1 if packed else r
    laid = lay_out(where, rows, t, side=side, pad_id=pad_id)
    source, targets, mask = (np.zeros((n, r, k), np.int32) for _ in range(3))
    for i, (prompt, rs) in enumerate(zip(prompts, responses, strict=True)):
        for j, ids in enumerate(rs):
            row = j * (not packed)
            begin = row * t + (t - lengths[i * s + row] if side == "left" else 0)
            first = begin + len(prompt) + (sum(map(len, rs[:j])) if packed else 0)
            source[i, j, : len(ids)] = [begin + len(prompt) - 1, *range(first, first + len(ids) - 1)]
            targets[i, j, : len(ids)], mask[i, j, : len(ids)] = ids, 1
    shaped: list[Any] = [field.reshape(n, s, t) for field in laid]
    fields: list[Any] = [source, targets, mask]
    return ResponseBatch(CausalTokens(*shaped), *fields)


def response_batch(
    encoded: EncodedPreferences,
    indices: Sequence[int] | Int[np.ndarray, "m"] | None = None,
    *,
    continuations: Sequence[Ids] = (),
    layout: Layout = "packed",
    tokens: int | None = None,
    response_tokens: int | None = None,
    multiple: int = 8,
    side: Side = "right",
    pad_id: int | None = None,
) -> ResponseBatch:
    """Preference pairs as a batch: response 0 is the chosen one, 1 the rejected one.

    Args:
      encoded: Ragged pairs.
      indices: Which, in which order; ``None`` is all.
      continuations: Further responses, the same for every example: 2, 3, ... in the batch.
      layout: Packed or padded, as in ``make_response_batch``.
      tokens: Columns of a row.
      response_tokens: Tokens of the longest response.
      multiple: Rounding of both where they are not given.
      side: Where rows are padded.
      pad_id: Id at padding; ``None`` is the tokenizer's.

    Returns:
      The batch.

    Raises:
      UserError: An index that is none, or what ``make_response_batch`` refuses.
    """
    n = len(encoded)
    rows = list(range(n)) if indices is None else [int(i) for i in indices]
    foreign = [i for i in rows if not 0 <= i < n]
    require(not foreign, "response_batch", f"indices must be in [0, {n})", foreign[:5], "Index the encoded pairs")
    return make_response_batch(
        [encoded.prompts[i] for i in rows],
        [[encoded.chosen[i], encoded.rejected[i], *continuations] for i in rows],
        layout=layout,
        tokens=tokens,
        response_tokens=response_tokens,
        multiple=multiple,
        side=side,
        pad_id=encoded.pad_id if pad_id is None else pad_id,
    )


def row_lengths(
    encoded: EncodedPreferences, *, layout: Layout = "packed", continuations: Sequence[Ids] = ()
) -> Int[np.ndarray, "n"]:
    """Columns that each pair needs in a row, from which buckets of like length are made (``length_buckets``).

    Args:
      encoded: Ragged pairs.
      layout: Packed or padded.
      continuations: Further responses.

    Returns:
      Lengths; padded, those of the longer row of a pair.
    """
    further = [len(ids) for ids in continuations]
    total = sum if layout == "packed" else max
    pairs = zip(encoded.prompts, encoded.chosen, encoded.rejected, strict=True)
    return np.array([len(p) + total([len(c), len(r), *further]) for p, c, r in pairs], np.int64)


def batch_shape(
    encoded: EncodedPreferences, *, layout: Layout = "packed", continuations: Sequence[Ids] = (), multiple: int = 8
) -> BatchShape:
    """Sizes that hold every pair, so that all batches of a run have one shape.

    Args:
      encoded: Ragged pairs.
      layout: Packed or padded.
      continuations: Further responses.
      multiple: Rounding.

    Returns:
      ``tokens`` and ``response_tokens`` of ``response_batch``.
    """
    longest = max([*encoded.lengths.ravel().tolist(), *map(len, continuations)])
    columns = int(row_lengths(encoded, layout=layout, continuations=continuations).max())
    sizes = (row_width("batch_shape", size, None, multiple) for size in (columns, longest))
    return BatchShape(*sizes)


def token_use(batch: ResponseBatch) -> TokenUse:
    """Tokens and columns of a batch: compare those of the two layouts.

    Example:
      >>> pair = ([[5, 6, 7]], [[[8, 9], [4]]])
      >>> [token_use(make_response_batch(*pair, layout=layout, multiple=1))[:2] for layout in ("packed", "padded")]
      [(6, 6), (9, 10)]
    """
    segments = np.asarray(batch.tokens.segment_ids)
    used = int((segments != 0).sum())
    return TokenUse(used, segments.size, used / segments.size)


def _rows(prompt: list[int], responses: Sequence[Ids], *, packed: bool) -> list[list[Piece]]:
    trunk = (prompt, 1, 0)
    if packed:
        return [[trunk, *((list(ids), j, len(prompt)) for j, ids in enumerate(responses, 2))]]
    return [[trunk, (list(ids), 1, len(prompt))] for ids in responses]


def _require_rectangular(where: str, prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> int:
    """The number of responses, which must be the same for every prompt."""
    sizes = f"{len(prompts)} prompts, {len(responses)} lists"
    require(len(prompts) == len(responses) > 0, where, "each prompt must have its responses", sizes, "Pass one or more")
    counts = sorted({len(rs) for rs in responses})
    rule = "every prompt must have the same number of responses, one or more"
    require(len(counts) == 1 and counts[0] > 0, where, rule, counts, "Leave some out")
    empty = [i for i, (p, rs) in enumerate(zip(prompts, responses, strict=True)) if not (len(p) and all(map(len, rs)))]
    rule = "prompts and responses must have a token"
    require(
        not empty, where, rule, f"none at {empty[:5]}", "Begin prompts with a begin token, and drop empty responses"
    )
    return counts[0]
