"""Weights of the construction with hard attention: heads copy a neighbour's charts, gated steps multiply."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.nn import AttentionStage, FeedForward
from jaxft.structure.pcfg import PCFG, to_dense
from theory.pcfg_parsing.layout import Coordinates, make_stage
from theory.pcfg_parsing.soft_weights import Head, root_heads

Product = tuple[Any, Any, Any]
"""Hidden units of a gated step: coordinates of their gates, their columns of the up matrix, what they add to."""


def stages(
    grammar: Any, at: Coordinates, max_tokens: int, heads: str
) -> list[tuple[AttentionStage, dict[str, np.ndarray]]]:
    """The stages of the model in order: place, inside, outside, tags; those without layers are left out."""
    del heads  # one kind alone
    dense: PCFG = to_dense(grammar)
    rule = np.exp(np.asarray(dense.log_rule, np.float64))
    root = np.exp(np.asarray(dense.log_root, np.float64))
    copies, clean = [_copy_charts(at, "right"), _copy_charts(at, "left")], _clear_buffers(at)
    made = [_stage(at, [*_copy_words(at), *root_heads(at, root)], [1], _place(at))]
    if max_tokens > 1:
        made.append(_stage(at, [*copies, clean], range(2, max_tokens + 1), _inside(at, rule)))
    if max_tokens > 2:
        made.append(_stage(at, [*copies, clean], range(max_tokens - 1, 1, -1), _outside(at, rule)))
    if max_tokens > 1:
        made.append(_stage(at, [copies[1], clean], [1], _tags(at, rule)))
    return made


def _stage(
    at: Coordinates, heads: list[Head], offsets: Sequence[int], steps: list[list[Product]]
) -> tuple[AttentionStage, dict[str, np.ndarray]]:
    weights, shapes = {}, []
    for i, products in enumerate(steps):
        units = sum(len(gate) for gate, _, _ in products)
        gate, up, down = (np.zeros(shape) for shape in ((at.width, units), (at.width, units), (units, at.width)))
        start = 0
        for rows, up_part, down_rows in products:
            here = np.arange(start, start + len(rows))
            gate[rows, here] = 1
            up[:, here] += up_part
            down[here, down_rows] = 1
            start += len(rows)
        weights |= {f"step_{i}_gate": gate, f"step_{i}_up": up, f"step_{i}_down": down}
        shapes.append(FeedForward("gated", units))
    shape, parameters = make_stage(heads, np.asarray(offsets), len(at.position), tuple(shapes))
    return shape, parameters | weights


def _copy(at: Coordinates, sign: int, source: np.ndarray, target: np.ndarray, amount: float = 1.0) -> Head:
    """A head that adds ``amount`` times coordinates ``source`` of the token at the offset to ``target``."""
    constant = np.zeros((at.width, 1))
    constant[at.position] = 1
    value, output = np.zeros((at.width, len(source))), np.zeros((len(source), at.width))
    value[source, np.arange(len(source))] = 1
    output[np.arange(len(source)), target] = amount
    return {"offsets": (sign,), "query": constant, "key": constant, "value": value, "output": output}


def _copy_charts(at: Coordinates, side: str) -> Head:
    outside = at.backward if side == "right" else at.forward
    source = np.concatenate([at.left.ravel(), outside.ravel(), at.position])
    names = (f"{side}_inside", f"{side}_outside", f"{side}_position")
    target = np.concatenate([at.buffers[name].ravel() for name in names])
    return _copy(at, 1 if side == "right" else -1, source, target)


def _copy_words(at: Coordinates) -> list[Head]:
    """The next word and its position, to buffers; and the position of the token before."""
    scratch = at.buffers["right_scratch"][: len(at.word)]
    source = np.concatenate([at.word, at.position])
    following = _copy(at, 1, source, np.concatenate([scratch, at.buffers["right_position"]]))
    return [following, _copy(at, -1, at.position, at.buffers["left_position"])]


def _clear_buffers(at: Coordinates) -> Head:
    rows = np.concatenate([block.ravel() for block in at.buffers.values()])
    return _copy(at, 0, rows, rows, -1.0)


def _times(at: Coordinates, gate: np.ndarray, other: np.ndarray, weights: np.ndarray, target: np.ndarray) -> Product:
    """Units that add ``sum_xyk weights[A, x, y] gate[x, k] other[y, k]`` to ``target[A]``: one a triple (A, x, k)."""
    symbols, (x, p) = len(weights), gate.shape
    up = np.zeros((at.width, symbols, x, p))
    for k in range(p):
        up[other[:, k], :, :, k] = np.moveaxis(weights, 2, 0)
    rows = np.broadcast_to(gate[None], (symbols, x, p)).ravel()
    return rows, up.reshape(at.width, -1), np.repeat(target, x * p)


def _to_slots(at: Coordinates, amounts: np.ndarray, position: np.ndarray, chart: np.ndarray) -> Product:
    """Units that add ``amounts[x]`` to the slot of ``chart[x]`` that ``position`` names."""
    x, p = chart.shape
    up = np.zeros((at.width, x, p))
    up[position, :, np.arange(p)] = 1
    return np.repeat(amounts, p), up.reshape(at.width, -1), chart.ravel()


def _place(at: Coordinates) -> list[list[Product]]:
    s, q = len(at.forward), len(at.word)
    following = _to_slots(at, at.buffers["right_scratch"][:q], at.buffers["right_position"], at.left[s:])
    return [[following, _to_slots(at, at.word, at.buffers["left_position"], at.right[s:])]]


def _inside(at: Coordinates, rule: np.ndarray) -> list[list[Product]]:
    s, buffers = len(at.forward), at.buffers
    left, right = buffers["left_scratch"][:s], buffers["right_scratch"][:s]
    products = [
        _times(at, at.left, buffers["right_inside"], rule, left),
        _times(at, at.right, buffers["left_inside"], np.swapaxes(rule, 1, 2), right),
    ]
    slots = [
        _to_slots(at, left, buffers["right_position"], at.left[:s]),
        _to_slots(at, right, buffers["left_position"], at.right[:s]),
    ]
    return [products, slots]


def _outside(at: Coordinates, rule: np.ndarray) -> list[list[Product]]:
    s, buffers = len(at.forward), at.buffers
    as_left, as_right = np.moveaxis(rule, 1, 0)[:s], np.moveaxis(rule, 2, 0)[:s]  # [symbol, parent, sibling]
    left, right = buffers["left_scratch"][:s], buffers["right_scratch"][:s]
    products = [
        _times(at, at.forward, buffers["right_inside"][:, 2:], as_left, left),
        _times(at, buffers["right_outside"], at.right[:, :-2], as_right, left),
        _times(at, buffers["left_outside"], at.left[:, 2:], as_left, right),
        _times(at, at.backward, buffers["left_inside"][:, :-2], as_right, right),
    ]
    slots = [
        _to_slots(at, left, buffers["right_position"][2:], at.forward),
        _to_slots(at, right, buffers["left_position"][:-2], at.backward),
    ]
    return [products, slots]


def _tags(at: Coordinates, rule: np.ndarray) -> list[list[Product]]:
    s, buffers = len(at.forward), at.buffers
    as_left, as_right = np.moveaxis(rule, 1, 0)[s:], np.moveaxis(rule, 2, 0)[s:]
    return [
        [
            _times(at, buffers["left_outside"], at.left[:, 2:], as_left, at.tag),
            _times(at, at.backward, buffers["left_inside"][:, :-2], as_right, at.tag),
        ]
    ]
