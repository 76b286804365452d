r"""The path of Kuditipudi et al. between two dropout stable networks, move by move.

With H hidden layers and kept units S_j of layer j, the moves of a network A lead to one that computes $\theta^A_1$ (all
hidden layers dropped) through every $\theta^A_k$ (layers k to H dropped): the top layer is moved to the kept units
(``top``); then, for k = H - 1, ..., 1, rows of units that nothing reads are filled with rescaled copies that read S_k
alone (``dead``), and the top layer is moved to those. The same is done to B, and the two meet: B's live rows are
written into A's dead units, the top layer is switched, and what is left of A is overwritten.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, nearest, require, require_finite, require_matching
from jaxft.core.trees import tree_axpy, tree_scale
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.core.units import PermutationSpec, map_named_leaves, named_leaves
from jaxft.geometry.dropout_stability import Masks, require_masks
from jaxft.geometry.paths import Curve, polychain
from jaxft.geometry.unit_chain import INSTEAD, UnitChain, unit_chain
from jaxft.geometry.unit_moves import (
    Columns,
    Move,
    MoveKind,
    Positions,
    apply_move,
    replay,
    rows_to,
    take_to,
    zero_rows,
)
from jaxft.geometry.unit_sequences import UnitSets, moves_to_dropout, permuting_moves, relocating_moves

Variant = Literal["short", "paper"]
VARIANTS = ("short", "paper")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DropoutPath:
    """A piecewise linear path of unit moves, whose points are computed when they are asked for.

    It holds its ends and lists of indices. A point costs the moves that lead to it from the nearer end, and consecutive
    breakpoints share the leaves that do not move.
    """

    params_a: Params
    params_b: Params | None
    """The other end; None where the path ends where A's moves lead."""
    chain: UnitChain
    moves_a: tuple[Move, ...]
    moves_b: tuple[Move, ...] = ()
    live_b: UnitSets = dataclasses.field(default_factory=dict)
    """Units that B's moves leave alive: they are written into A's dead ones."""

    @property
    def kinds(self) -> tuple[MoveKind, ...]:
        """Kind of every segment."""
        bridge: tuple[MoveKind, ...] = () if self.params_b is None else ("dead", "top", "dead")
        return (*(move.kind for move in self.moves_a), *bridge, *(move.kind for move in reversed(self.moves_b)))

    def __len__(self) -> int:
        """Number of segments; there is one breakpoint more."""
        return len(self.kinds)

    def __repr__(self) -> str:
        """The layers and the moves; of the ends no numbers."""
        return f"DropoutPath(layers={self.chain.groups}, kinds={self.kinds})"

    def breakpoint(self, i: int) -> Params:
        """Breakpoint i, from 0 (the first end itself) to ``len(path)`` (the other)."""
        inside = 0 <= i <= len(self)
        require(inside, "breakpoint", f"i must lie between 0 and {len(self)}", i, "Take one that is there")
        forth = len(self.moves_a)
        if i <= forth:
            return _end(self.params_a, self.moves_a[:i], self.chain)
        if i >= forth + 3:
            return _end(self.params_b, self.moves_b[: len(self) - i], self.chain)
        return self._meeting(self.breakpoint(forth), self.breakpoint(forth + 3))[i - forth - 1]

    def __iter__(self) -> Iterator[Params]:
        """All breakpoints in order; B's half is made from B anew for each, so that few points are held at a time."""
        point = self.params_a
        for point in replay(self.params_a, self.moves_a, self.chain):
            yield point
        if self.params_b is not None:
            forth = len(self.moves_a)
            yield from self._meeting(point, self.breakpoint(forth + 3))
            for i in range(forth + 3, len(self) + 1):
                yield self.breakpoint(i)

    def __call__(self, t: Any) -> Params:
        """The point at t in [0, 1], where all segments take equally long; t is a number, not traced."""
        where, advice = "DropoutPath", "Use path.curve() where t is traced (it holds all breakpoints at once)"
        require(is_concrete(t), where, "t must be a number", "a traced value", advice)
        require(0 <= float(t) <= 1, where, "t must lie in [0, 1]", f"{float(t):g}", "A path ends at its end points")
        i = min(int(float(t) * len(self)), len(self) - 1)
        u = float(t) * len(self) - i
        if u in (0.0, 1.0):
            return self.breakpoint(i + int(u))
        return tree_axpy(u, self.breakpoint(i + 1), tree_scale(1 - u, self.breakpoint(i)))

    def curve(self) -> Curve:
        """The path as one polychain, for ``eval_path`` and all else: it holds every breakpoint."""
        return polychain([jax.tree.map(jnp.asarray, point) for point in self])

    def _meeting(self, end_a: Params, end_b: Params) -> tuple[Params, Params]:
        """The two points between the ends of A's and B's moves: B's live rows written in; B's top layer taken."""
        rows = {g: rows_to(self.chain.counts[g], live, live) for g, live in self.live_b.items()}
        first = apply_move(end_a, Move("dead", rows, from_start=True), self.chain, start=end_b)
        tops = {leaf.path for leaf in self.chain.top} | set(self.chain.loose)
        others = named_leaves(end_b)
        return first, map_named_leaves(lambda path, leaf: others[path] if path in tops else leaf, first)


def dropout_path(
    params_a: Params,
    params_b: Params,
    spec: PermutationSpec,
    masks_a: Masks,
    masks_b: Masks,
    *,
    variant: Variant = "short",
) -> DropoutPath:
    r"""A path on which a loss that is convex in the outputs is at most that of A, of B or of their dropout networks.

    With H hidden layers it has 4 H + 1 segments where the kept units of A and B are disjoint in every layer, and
    4 H + 3 otherwise: two more move A's live units off those of B. ``variant="paper"`` is the construction by lemmas
    (1, 4 and 2), which zeroes and moves back more than it needs: 8 H + 4 segments, through the same losses.
    ``path_certificate`` has the exact maximum on the path from 2 H + 2 losses, without making the path.

    Not covered: networks that are no chain of layers (residual streams, layers stacked on one axis) and norms that run
    over units; a per-channel norm with stored statistics is part of the rows. Leaves without units move with the top
    layer, in which the outputs must be linear.

    Args:
      params_a: First end.
      params_b: Other end.
      spec: Where the hidden units lie; channels of a convolution are units.
      masks_a: Units of A that are kept, at most half of each layer.
      masks_b: Units of B that are kept.
      variant: ``short`` or ``paper``.

    Returns:
      The path; its breakpoints are computed when they are asked for.

    Raises:
      UserError: Trees that do not match (the leaves are listed) or are not finite, a network that is no chain, masks
        that keep more than half or lack a layer.

    Example:
      >>> from jaxft.core.units import UnitAxis
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> a, b = ({"w": jnp.full((1, 4), s), "v": jnp.full((4, 1), s)} for s in (1.0, -1.0))
      >>> left = {"hidden": jnp.array([True, True, False, False])}
      >>> right = {"hidden": ~left["hidden"]}
      >>> path = dropout_path(a, b, spec, left, right)
      >>> path
      DropoutPath(layers=('hidden',), kinds=('top', 'dead', 'top', 'dead', 'top'))
      >>> path.breakpoint(1)["v"].ravel().tolist()
      [2.0, 2.0, 0.0, 0.0]

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, theorem 1, lemmas 1, 2 and 4.
    """
    where = "dropout_path"
    chain = require_path_inputs(where, params_a, params_b, spec, masks_a, masks_b)
    require(variant in VARIANTS, where, "variant must be known", repr(variant), nearest(str(variant), VARIANTS))
    kept_a, kept_b = (kept_units(where, chain, masks) for masks in (masks_a, masks_b))
    paper = variant == "paper"
    moves_a, live_a = moves_to_dropout(chain, kept_a, prefer=kept_b, paper=paper)
    moves_b, live_b = moves_to_dropout(chain, kept_b, prefer=kept_a, paper=paper)
    if paper:
        targets = {g: _free(chain.counts[g], live_b[g], live_a[g]) for g in chain.groups}
        moves_a += permuting_moves(chain, live_a, targets)
    else:
        moves_a += relocating_moves(chain, live_a, live_b)
    return DropoutPath(params_a, params_b, chain, tuple(moves_a), tuple(moves_b), live_b)


def path_to_dropout(params: Params, spec: PermutationSpec, masks: Masks, *, variant: Variant = "short") -> DropoutPath:
    r"""The path from a network to its dropout network through every $\theta_k$: the first part of ``dropout_path``.

    ``short`` takes 2 H - 1 segments and ends at a network that *computes* what $\theta_1$ computes, with live units
    elsewhere and other units dead but not 0. ``paper`` ends at $\theta_1$ with the rows of dropped units 0, in 4 H - 2
    segments (six for three layers of weights).

    Args:
      params: The network.
      spec: Where the hidden units lie.
      masks: Units that are kept, at most half of each layer.
      variant: ``short`` or ``paper``.

    Returns:
      The path.

    Raises:
      UserError: As of ``dropout_path``.

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, lemma 1.
    """
    where = "path_to_dropout"
    chain = require_path_inputs(where, params, params, spec, masks, masks)
    require(variant in VARIANTS, where, "variant must be known", repr(variant), nearest(str(variant), VARIANTS))
    moves, _ = moves_to_dropout(chain, kept_units(where, chain, masks), paper=variant == "paper")
    return DropoutPath(params, None, chain, tuple(moves))


def permute_live_units(
    params: Params, spec: PermutationSpec, live: Mapping[str, Any], targets: Mapping[str, Any]
) -> DropoutPath:
    """Five segments that move live units to other places while the function stays as it is.

    Args:
      params: A network in which no live unit reads a dead one, such as the end of ``path_to_dropout``.
      spec: Where the hidden units lie.
      live: Indices of the live units of each group, at most half.
      targets: Where each goes to, in the same order.

    Returns:
      The path; in its end the rows of all other units are 0.

    Raises:
      UserError: A network that is no chain, indices that repeat or are out of range, or a live unit that reads a dead
        one.

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, lemma 4.
    """
    where = "permute_live_units"
    chain = unit_chain(params, spec, where=where)
    sets = []
    for name, indices in (("live", live), ("targets", targets)):
        lacking = [g for g in chain.groups if g not in indices]
        require(not lacking, where, f"{name} must name every group", f"none of {', '.join(lacking)}", "Add them")
        sets.append({g: np.asarray(indices[g]) for g in chain.groups})
        for g, found in sets[-1].items():
            n = chain.counts[g]
            whole = found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
            fits = whole and len(set(found.tolist())) == len(found) <= n // 2
            fits = fits and bool(((found >= 0) & (found < n)).all())
            rule = f"{name} of {g} must be different units of {n}, at most half"
            require(fits and len(found) > 0, where, rule, found.tolist(), "Correct the indices")
    for g in chain.groups:
        sizes = len(sets[0][g]), len(sets[1][g])
        require(sizes[0] == sizes[1], where, f"{g} must have as many targets as live units", sizes, "Pass as many")
    _require_half_zeroed(where, params, chain, sets[0])
    return DropoutPath(params, None, chain, tuple(permuting_moves(chain, sets[0], sets[1])))


class MoveCheck(NamedTuple):
    """What the outputs do on every segment of a path of moves."""

    deviations: Float[Array, "segments"]
    """Largest difference of the outputs, half way and at the end, from those at the start (dead, switch), or half way
    from the mean of both ends (top)."""
    scale: Float[Array, ""]
    """Largest output at a breakpoint, to which the differences compare."""


def check_moves(f: OutputFn, path: DropoutPath, x: Inputs) -> MoveCheck:
    """Whether a path is what it should be for a model: ``dead`` and ``switch`` flat, ``top`` linear in the outputs.

    A spec that misses a connection between units, or a model in which a unit of outgoing weight 0 still counts, shows
    here. With dtype float32 differences of 1e-5 of the scale are rounding.

    Args:
      f: Outputs of the model.
      path: The path.
      x: Examples.

    Returns:
      Differences by segment.

    Example:
      >>> from jaxft.core.units import UnitAxis
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> a = {"w": jnp.ones((1, 4)), "v": jnp.ones((4, 1))}
      >>> path = path_to_dropout(a, spec, {"hidden": jnp.array([True, False, False, False])})
      >>> check_moves(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], path, jnp.zeros((1, 1))).deviations.tolist()
      [0.0]
    """
    outputs = jax.jit(f)
    found, scale, last = [], [], None
    for kind, point in zip((None, *path.kinds), path, strict=True):
        if last is not None:
            middle = outputs(jax.tree.map(lambda p, q: (p + q) / 2, last[0], point), x)
            end = outputs(point, x)
            off = middle - (last[1] + end) / 2
            flat = jnp.maximum(jnp.abs(middle - last[1]).max(), jnp.abs(end - last[1]).max())
            found.append(jnp.abs(off).max() if kind == "top" else flat)
        last = point, outputs(point, x)
        scale.append(jnp.abs(last[1]).max())
    return MoveCheck(jnp.stack(found), jnp.stack(scale).max())


def require_path_inputs(
    where: str, params_a: Params, params_b: Params, spec: PermutationSpec, masks_a: Masks, masks_b: Masks
) -> UnitChain:
    """The chain of two networks, if they, the spec and the masks are fit for the constructive path."""
    require_matching(where, params_a, params_b, names=("params_a", "params_b"))
    require_finite(where, params_a, "params_a")
    require_finite(where, params_b, "params_b")
    chain = unit_chain(params_a, spec, where=where)
    for name, masks in (("masks_a", masks_a), ("masks_b", masks_b)):
        lacking = [g for g in chain.groups if g not in masks]
        require(not lacking, where, f"{name} must cover every layer", f"none of {', '.join(lacking)}", "Add them")
        require_masks(where, params_a, spec, masks)
        for g in chain.groups:
            if is_concrete(masks[g]):
                kept, n = int(np.asarray(masks[g]).sum()), chain.counts[g]
                rule = f"{name} must keep at most half of {g}, so that its copies have room"
                require(2 * kept <= n, where, rule, f"{kept} of {n}", "Use keep_frac <= 0.5, or complement_masks")
    _require_loose(where, params_a, params_b, chain)
    return chain


def kept_units(where: str, chain: UnitChain, masks: Masks) -> UnitSets:
    """Indices of the units that masks keep; the masks must be known."""
    known = is_concrete({g: masks[g] for g in chain.groups})
    advice = "Make the path outside jit; path_certificate and dropout_params work inside"
    require(known, where, "masks must be known values", "traced masks", advice)
    return {g: np.flatnonzero(np.asarray(masks[g])) for g in chain.groups}


def _require_loose(where: str, params_a: Params, params_b: Params, chain: UnitChain) -> None:
    """Leaves without units move with the top layer: those of other modules must be the same at both ends."""
    modules = {_module(leaf.path) for leaf in chain.top}
    inner = [path for path in chain.loose if _module(path) not in modules]
    a, b = named_leaves(params_a), named_leaves(params_b)
    if inner and is_concrete([a[p] for p in inner] + [b[p] for p in inner]):
        bad = [path for path in inner if not np.array_equal(np.asarray(a[path]), np.asarray(b[path]))]
        rule = "leaves without units, the top layer's aside, must be the same at both ends"
        require(not bad, where, rule, f"{', '.join(bad[:5])} differ", f"Name their units in the spec. {INSTEAD}")


def _require_half_zeroed(where: str, params: Params, chain: UnitChain, live: UnitSets) -> None:
    """No live unit, and no output, reads a dead unit."""
    if not is_concrete(params):
        return
    counts = chain.counts
    rows = {g: zero_rows(counts[g], live[g]) for g in chain.groups}
    columns = {g: Columns(take_to(counts[g], live[g], live[g])) for g in chain.groups}
    alive = apply_move(params, Move("dead", rows), chain, start=params)
    read = named_leaves(apply_move(alive, Move("switch", columns=columns), chain, start=params))
    bad = [p for p, x in named_leaves(alive).items() if not np.array_equal(np.asarray(x), np.asarray(read[p]))]
    require(not bad, where, "no live unit may read a dead one", ", ".join(bad), "Start where path_to_dropout ends")


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _free(count: int, taken: Positions, live: Positions) -> Positions:
    """As many units as are live, none of them taken; those that are live already first."""
    free = np.setdiff1d(np.arange(count), taken)
    return np.concatenate([np.intersect1d(live, free), np.setdiff1d(free, live)])[: len(live)]


def _end(params: Params, moves: tuple[Move, ...], chain: UnitChain) -> Params:
    return collections.deque(replay(params, moves, chain), maxlen=1)[0]
