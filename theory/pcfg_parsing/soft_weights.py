"""Weights of the construction with soft attention: every attention score is an entry of a chart, or a part of one."""

from typing import Any

import numpy as np

from jaxft.nn import AttentionStage, FeedForward
from jaxft.structure.pcfg import PCFG, LowRankPCFG, to_dense
from theory.pcfg_parsing.layout import FORBIDDEN, Coordinates, make_stage

Head = dict[str, Any]


def stages(
    grammar: PCFG | LowRankPCFG, at: Coordinates, max_tokens: int, heads: str
) -> list[tuple[AttentionStage, dict[str, np.ndarray]]]:
    """The stages of the model in order: place, inside, outside, tags; those without layers are left out."""
    s, p, dense = len(at.forward), max_tokens + 1, to_dense(grammar)
    rule = np.exp(np.asarray(dense.log_rule, np.float64))
    factors = None
    if heads == "lowrank" and isinstance(grammar, LowRankPCFG):
        parts = (grammar.log_head, grammar.log_left, grammar.log_right)
        factors = tuple(np.exp(np.asarray(part, np.float64)) for part in parts)
    parts = [(place_heads(at, np.exp(np.asarray(dense.log_root, np.float64))), np.array([1]))]
    if max_tokens > 1:
        inside = _inside_lowrank(at, factors) if factors else _inside(at, rule, symmetric=heads == "symmetric")
        down = np.arange(max_tokens - 1, 1, -1)
        outside = _outside_lowrank(at, factors, False) if factors else _outside(at, rule, range(s), at.forward)
        tags = _outside_lowrank(at, factors, True) if factors else _outside(at, rule, range(s, len(rule[0])), None)
        parts += [(inside, np.arange(2, max_tokens + 1)), (outside, down), (tags, np.array([1]))]
    made = [make_stage(part, offsets, p) for part, offsets in parts if len(offsets)]
    if heads == "symmetric" and max_tokens > 1:
        shape, weights = make_stage(inside, np.arange(2, max_tokens + 1), p, (FeedForward("relu", 2 * at.left.size),))
        made[1] = (shape, weights | _keep_sides(at))
    return made


def make_head(at: Coordinates, offsets: tuple[int, ...] | None, query: Any, key: Any, output: Any) -> Head:
    """A head from entries ``(coordinate, column, value)`` of query and key; its value is the key's position.

    Args:
      at: Coordinates.
      offsets: Multiples of the layer's offset that it attends to, ``None`` for anywhere.
      query: Entries of the query matrix.
      key: Entries of the key matrix.
      output: Entries ``(slot, coordinate, value)``: what weight on a key at that position adds.

    Returns:
      The head.
    """
    p, columns = len(at.position), 1 + max(int(np.max(part[1])) for part in (*query, *key))
    matrices = {"query": np.zeros((at.width, columns)), "key": np.zeros((at.width, columns))}
    for name, entries in (("query", query), ("key", key)):
        for rows, column, value in entries:
            np.add.at(matrices[name], (rows, column), value)
    value, out = np.zeros((at.width, p)), np.zeros((p, at.width))
    value[at.position, np.arange(p)] = 1
    for slot, coordinate, amount in output:
        out[slot, coordinate] += amount
    return {"offsets": offsets, "value": value, "output": out, **matrices}


def place_heads(at: Coordinates, root: np.ndarray) -> list[Head]:
    """The first layer: words into slots of either end, the root's distribution to both ends of the sentence."""
    s, slots = len(at.forward), np.arange(len(at.position))
    anywhere = [(at.position, 0, 1.0)]  # positions are one-hot: their sum is the constant 1
    heads = []
    for x, word in enumerate(at.word):
        own = [(word, 0, 1.0)]
        heads.append(make_head(at, (1,), anywhere, own, [(slots, at.left[s + x], 1.0)]))
        heads.append(make_head(at, (-1,), own, anywhere, [(slots, at.right[s + x], 1.0)]))
    return heads + root_heads(at, root)


def root_heads(at: Coordinates, root: np.ndarray) -> list[Head]:
    """From the last word to the begin token and back; and to the word of a sentence of one, whose root is a tag."""
    s, slots = len(at.forward), np.arange(len(at.position))
    begin, last = [(at.position[0], 0, 1.0)], [(at.last, 0, 1.0)]
    to_begin = [(slots[2:], at.forward[symbol], root[symbol]) for symbol in range(s)]
    to_last = [(0, at.backward[symbol, :1], root[symbol]) for symbol in range(s)]
    to_tag = [(0, tag, root[s + x]) for x, tag in enumerate(at.tag)]
    return [
        make_head(at, None, begin, last, to_begin),
        make_head(at, None, last, begin, to_last),
        make_head(at, (-1,), last, begin, to_tag),
    ]


def _columns(shape: tuple[int, ...], start: int = 0) -> np.ndarray:
    """Columns of a query or key for each symbol and each slot."""
    return start + np.arange(np.prod(shape)).reshape(shape)


def _mixed(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> tuple[Any, Any, Any]:
    """Entries from symbol x at slot k (rows) to symbol y at slot k (columns), of ``weights[x, y]``."""
    shape = (len(rows), *columns.shape)
    entries = np.broadcast_to(rows[:, None, :], shape), np.broadcast_to(columns[None], shape)
    return *entries, np.broadcast_to(weights[:, :, None], shape)


def _inside(at: Coordinates, rule: np.ndarray, *, symmetric: bool) -> list[Head]:
    slots, columns, heads = np.arange(len(at.position)), _columns(at.left.shape), []
    for symbol, binary in enumerate(rule):
        query, key = [_mixed(at.left, columns, binary)], [(at.right, columns, 1.0)]
        to_left, to_right = [(slots, at.left[symbol], 1.0)], [(slots, at.right[symbol], 1.0)]
        if symmetric:
            more = _columns(at.left.shape, columns.size)
            query.append(_mixed(at.right, more, binary.T))
            key.append((at.left, more, 1.0))
            heads.append(make_head(at, (1, -1), query, key, to_left + to_right))
        else:
            heads.append(make_head(at, (1,), query, key, to_left))
            heads.append(make_head(at, (-1,), key, query, to_right))
    return heads


def _outside(at: Coordinates, rule: np.ndarray, symbols: range, forward: np.ndarray | None) -> list[Head]:
    """Heads of nonterminals at both ends of a span, or (``forward=None``) of preterminals at their word."""
    s, slots = len(at.forward), np.arange(len(at.position))
    left, right = at.left[:, 2:], at.right[:, :-2]  # at the slots of forward and of backward
    first, second, heads = _columns(at.forward.shape), _columns(at.backward.shape, at.forward.size), []
    for symbol in symbols:
        as_left, as_right = rule[:, symbol, :], rule[:, :, symbol]  # of parent and sibling
        query = [(at.forward, first, 1.0), _mixed(right, second, as_right.T)]
        key = [_mixed(left, first, as_left.T), (at.backward, second, 1.0)]
        if forward is None:
            heads.append(make_head(at, (-1,), key, query, [(slots, at.tag[symbol - s], 1.0)]))
        else:
            heads.append(make_head(at, (1,), query, key, [(slots[2:], forward[symbol], 1.0)]))
            heads.append(make_head(at, (-1,), key, query, [(slots[:-2], at.backward[symbol], 1.0)]))
    return heads


def _inside_lowrank(at: Coordinates, factors: tuple[np.ndarray, ...]) -> list[Head]:
    slots, heads = np.arange(len(at.position)), []
    for head, left, right in zip(factors[0].T, factors[1], factors[2], strict=True):
        query, key = [_summed(at.left, left)], [_summed(at.right, right)]
        for sign, ends, chart in ((1, (query, key), at.left), (-1, (key, query), at.right)):
            output = [(slots, chart[symbol], amount) for symbol, amount in enumerate(head)]
            heads.append(make_head(at, (sign,), *ends, output))
    return heads


def _outside_lowrank(at: Coordinates, factors: tuple[np.ndarray, ...], tags: bool) -> list[Head]:
    s, slots, heads = len(at.forward), np.arange(len(at.position)), []
    for head, left, right in zip(factors[0].T, factors[1], factors[2], strict=True):
        as_left = [_summed(at.forward, head)], [_summed(at.left[:, 2:], right)], left
        as_right = [_summed(at.right[:, :-2], left)], [_summed(at.backward, head)], right
        for query, key, child in (as_left, as_right):
            if tags:
                output = [(slots, tag, amount) for tag, amount in zip(at.tag, child[s:], strict=True)]
                heads.append(make_head(at, (-1,), key, query, output))
                continue
            to_left = [(slots[2:], at.forward[symbol], child[symbol]) for symbol in range(s)]
            to_right = [(slots[:-2], at.backward[symbol], child[symbol]) for symbol in range(s)]
            heads.append(make_head(at, (1,), query, key, to_left))
            heads.append(make_head(at, (-1,), key, query, to_right))
    return heads


def _summed(rows: np.ndarray, weights: np.ndarray) -> tuple[Any, Any, Any]:
    """Entries that sum symbols with ``weights`` at each slot."""
    columns = np.broadcast_to(np.arange(rows.shape[1])[None], rows.shape)
    return rows, columns, np.broadcast_to(weights[:, None], rows.shape)


def _keep_sides(at: Coordinates) -> dict[str, np.ndarray]:
    """A step that clears slots of ``left`` up to the token and of ``right`` from it: a symmetric head writes both."""
    p, units = len(at.position), 2 * at.left.size
    rows = np.concatenate([at.left.ravel(), at.right.ravel()])
    slot = np.tile(np.arange(p), units // p)
    after = np.arange(p)[:, None] < slot[None]  # [position, unit]
    before = np.arange(p)[:, None] > slot[None]
    kept = np.where(np.arange(units)[None] < at.left.size, after, before)
    up, down = np.zeros((at.width, units)), np.zeros((units, at.width))
    up[rows, np.arange(units)] = 1
    up[at.position] = FORBIDDEN * kept
    down[np.arange(units), rows] = -1
    return {"step_0_up": up, "step_0_down": down, "step_0_bias": np.zeros(units)}
