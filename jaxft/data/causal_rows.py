"""Ragged token ids as rows of one width, for a decoder."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxft.core.checks import require
from jaxft.core.types import CausalTokens

Side = Literal["right", "left"]
"""Where a row is padded."""


def causal_tokens(
    sequences: Sequence[Sequence[int]],
    *,
    side: Side = "right",
    pad_id: int = 0,
    tokens: int | None = None,
    multiple: int = 8,
) -> CausalTokens:
    """Texts or prompts as one batch of int32 numpy arrays, each row a trunk.

    Args:
      sequences: Ids of each row, one or more.
      side: Where to pad. Generation goes on from the end of a row: padded left, all rows end in one column.
      pad_id: Id at padding, which nothing sees.
      tokens: Columns; ``None`` is the longest row, rounded up to ``multiple``.
      multiple: Rounding of the columns, so that few shapes are compiled.

    Returns:
      The batch.

    Raises:
      UserError: No rows, an empty row, or fewer columns than the longest row needs.

    Example:
      >>> batch = causal_tokens([[7, 8], [9]], multiple=2, side="left")
      >>> batch.input_ids.tolist(), batch.segment_ids.tolist(), batch.positions.tolist()
      ([[7, 8], [0, 9]], [[1, 1], [0, 1]], [[0, 1], [0, 0]])
    """
    where = "causal_tokens"
    lengths = [len(ids) for ids in sequences]
    require(bool(lengths), where, "there must be a row", "none", "Pass one or more")
    empty = [i for i, size in enumerate(lengths) if size == 0]
    require(not empty, where, "a row must have a token", f"none at {empty[:5]}", "Leave empty texts out")
    width = row_width(where, max(lengths), tokens, multiple)
    rows = [[(list(ids), 1, 0)] for ids in sequences]
    return lay_out(where, rows, width, side=side, pad_id=pad_id)


def row_width(where: str, longest: int, width: int | None, multiple: int, *, name: str = "tokens") -> int:
    """The width asked for, or else the longest row rounded up.

    Args:
      where: Name of the caller, for messages.
      longest: Tokens of the longest row.
      width: What is asked for, or ``None``.
      multiple: Rounding.
      name: Name of the option, for messages.

    Returns:
      At least ``longest``.

    Raises:
      UserError: A width below ``longest``, or a multiple below 1.
    """
    require(multiple >= 1, where, "multiple must be at least 1", multiple, "Pass multiple >= 1")
    chosen = -(-longest // multiple) * multiple if width is None else width
    require(chosen >= longest, where, f"{name} must hold the longest ({longest})", chosen, f"Raise {name}")
    return chosen


Piece = tuple[list[int], int, int]
"""Ids, their segment, and the position of the first."""


def lay_out(where: str, rows: Sequence[Sequence[Piece]], width: int, *, side: Side, pad_id: int) -> CausalTokens:
    """Rows of pieces, each row's pieces end to end.

    Args:
      where: Name of the caller, for messages.
      rows: Pieces of each row, no more than ``width`` tokens.
      width: Columns.
      side: Where to pad.
      pad_id: Id at padding.

    Returns:
      Each field ``[rows, width]``, int32, on the host; segment and position are 0 at padding.

    Raises:
      UserError: Another side.
    """
    require(side in ("right", "left"), where, "side must be right or left", repr(side), "Pass one of them")
    ids = np.full((len(rows), width), pad_id, np.int32)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row, pieces in enumerate(rows):
        at = 0 if side == "right" else width - sum(len(tokens) for tokens, _, _ in pieces)
        for tokens, segment, first in pieces:
            stop = at + len(tokens)
            ids[row, at:stop], segments[row, at:stop] = tokens, segment
            positions[row, at:stop] = np.arange(first, first + len(tokens))
            at = stop
    # Host arrays, so that making a batch starts no device; every consumer converts them.
    fields: list[Any] = [ids, segments, positions]
    return CausalTokens(*fields)
