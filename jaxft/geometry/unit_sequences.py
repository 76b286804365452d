"""Sequences of unit moves: to a dropout network, of live units to other places, and off those of another network."""

from collections.abc import Mapping

import numpy as np

from jaxft.geometry.unit_chain import UnitChain
from jaxft.geometry.unit_moves import Columns, Move, Positions, moved_columns, rows_to, take_to, zero_rows

UnitSets = Mapping[str, Positions]
"""Indices of units, by group."""


def moves_to_dropout(
    chain: UnitChain, kept: UnitSets, *, prefer: UnitSets | None = None, paper: bool = False
) -> tuple[list[Move], UnitSets]:
    r"""Moves to a network that computes what the dropout network $\theta_1$ computes, and the units alive there.

    All rows and columns are copies of those of the first point, rescaled by units / units kept of the layer they read,
    so that the moves need no values of the points between.

    Args:
      chain: Layers of the network.
      kept: Units that are kept, at most half of each layer.
      prefer: Units that copies go to where there is a choice.
      paper: Whether copies go back to the kept units each time and the rest is zeroed in the end (4 H - 2 moves, rather
        than 2 H - 1).

    Returns:
      Moves and live units.
    """
    *_, last = groups = chain.groups
    scale = {g: chain.counts[g] / len(kept[g]) for g in groups}
    spare = {g: _spare(chain.counts[g], kept[g], None if prefer is None else prefer[g]) for g in groups}
    live = dict(kept)
    moves = [_top(chain, kept[last], kept[last], scale[last])]
    for k in range(len(groups) - 2, -1, -1):
        upper = groups[k + 1 :]
        places = {g: spare[g] if live[g] is kept[g] else kept[g] for g in upper}
        before = {g: kept[groups[k]] if i == 0 else places[groups[k + i]] for i, g in enumerate(upper)}
        rows = {g: rows_to(chain.counts[g], places[g], kept[g]) for g in upper}
        columns = {}
        for i, g in enumerate(upper):
            read = groups[k + i]
            columns[read] = Columns(take_to(chain.counts[read], before[g], kept[read]), scale[read])
        moves.append(Move("dead", rows, columns, from_start=True))
        moves.append(_top(chain, places[last], kept[last], scale[last]))
        live.update(places)
        if paper:
            moves += _carried(chain, places, {g: kept[g] for g in upper})
            live.update({g: kept[g] for g in upper})
    if paper:
        moves.append(_zeroed(chain, live))
    return moves, live


def permuting_moves(chain: UnitChain, live: UnitSets, targets: UnitSets) -> list[Move]:
    """Five moves of live units to other places: by way of dead units, since places and targets may overlap."""
    through = {}
    for g in chain.groups:
        free = np.setdiff1d(np.arange(chain.counts[g]), live[g])
        taken = ~np.isin(targets[g], live[g])
        others = np.setdiff1d(free, targets[g][taken])
        way = targets[g].copy()
        way[~taken] = others[: int((~taken).sum())]
        through[g] = way
    moves = _carried(chain, live, through)
    left = {g: through[g] != targets[g] for g in chain.groups}
    moves += _carried(
        chain, {g: through[g][left[g]] for g in chain.groups}, {g: targets[g][left[g]] for g in chain.groups}
    )
    return [*moves, _zeroed(chain, targets)]


def relocating_moves(chain: UnitChain, live: UnitSets, others: UnitSets) -> list[Move]:
    """Two moves of the live units that lie in ``others`` to places that are in neither; none if there are none.

    The places are there: if both sets have at most half of the units, as many are in neither as are in both.
    """
    source = {g: np.intersect1d(live[g], others[g]) for g in chain.groups}
    target = {
        g: np.setdiff1d(np.arange(chain.counts[g]), np.union1d(live[g], others[g]))[: len(source[g])]
        for g in chain.groups
    }
    return _carried(chain, source, target) if any(len(units) for units in source.values()) else []


def _carried(chain: UnitChain, source: UnitSets, target: UnitSets) -> list[Move]:
    """Units are copied to dead places, then what reads them is switched to the copies."""
    counts = chain.counts
    rows = {g: rows_to(counts[g], target[g], source[g]) for g in source}
    columns = {g: moved_columns(counts[g], target[g], source[g]) for g in source}
    return [Move("dead", rows), Move("switch", columns=columns)]


def _top(chain: UnitChain, target: Positions, source: Positions, scale: float) -> Move:
    last = chain.groups[-1]
    return Move("top", columns={last: Columns(take_to(chain.counts[last], target, source), scale)}, from_start=True)


def _zeroed(chain: UnitChain, live: UnitSets) -> Move:
    return Move("dead", {g: zero_rows(chain.counts[g], live[g]) for g in chain.groups})


def _spare(count: int, kept: Positions, prefer: Positions | None) -> Positions:
    """As many units as are kept, of the others, the preferred ones first."""
    others = np.setdiff1d(np.arange(count), kept)
    wanted = others[:0] if prefer is None else np.intersect1d(others, prefer)
    return np.concatenate([wanted, np.setdiff1d(others, wanted)])[: len(kept)]
