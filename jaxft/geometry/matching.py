"""Which unit of one network is which of another: matching by weights."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, nearest, require, require_finite, require_matching
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, UnitAxis, named_leaves, unit_counts
from jaxft.geometry.assignment import SOLVERS, Solver, solve_assignment
from jaxft.geometry.paths import accumulation_dtype
from jaxft.geometry.permutations import (
    Permutation,
    apply_permutation,
    identity_permutation,
    moving,
    permute_leaf,
    random_permutation,
    require_permutation,
)

Leaves = Mapping[str, Array | np.ndarray]


class Matching(NamedTuple):
    """A permutation of b towards a."""

    permutation: dict[str, Array]
    params: Params
    """b with its units permuted."""
    objective: Float[np.ndarray, "sweeps+1"]
    """Inner product of a and the permuted b over the leaves that have units, before the first sweep and after each."""

    @property
    def sweeps(self) -> int:
        """Sweeps over the groups until none could gain; a last one that must gain nothing is not made."""
        return len(self.objective) - 1


def weight_matching(
    a: Params,
    b: Params,
    spec: PermutationSpec,
    *,
    key: Array,
    solver: Solver = "scipy",
    groups: Sequence[str] | None = None,
    start: Permutation | None = None,
    max_sweeps: int = 100,
    restarts: int = 1,
) -> Matching:
    r"""Permutation P that brings b near to a: a local maximum of $\langle a, P b \rangle$, minimum of $\|a - P b\|$.

    Coordinate descent: given the permutations of all other groups, the best one of a group is a linear assignment. The
    order of groups is random, save that the first sweep begins with those of which most can be told without the others,
    such as a residual stream with its embeddings. A group is solved again only after a group that shares a leaf with it
    has changed, which is exact. The objective never falls. Groups that share no leaf (the hidden units of the MLPs of a
    transformer) are each optimal after one sweep. Where a leaf has a group on two axes the assignment is of the
    linearised objective, and is taken if the objective rises.

    Args:
      a: The network that stays.
      b: The network whose units move.
      spec: Where the units lie.
      key: Random key of the orders and restarts.
      solver: ``"scipy"`` solves assignments on the host, ``"optax"`` on device.
      groups: Groups to be matched; the others stay as in ``start``.
      start: First permutation; ``None`` is the identity.
      max_sweeps: Sweeps after which it stops, if something still changes.
      restarts: Descents, all but the first from a random permutation in random order; the best is returned.

    Returns:
      The permutation, the permuted b, and the objective by sweep.

    Raises:
      UserError: Trees that do not match or are not finite, a spec that does not fit, unknown groups, or traced input.

    Example:
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> a = {"w": jnp.array([[1.0, 2.0, 3.0]]), "v": jnp.array([4.0, 5.0, 6.0])}
      >>> b = apply_permutation(a, spec, {"hidden": jnp.array([2, 0, 1])})
      >>> matching = weight_matching(a, b, spec, key=jax.random.key(0))
      >>> matching.permutation["hidden"].tolist(), matching.objective.tolist(), matching.sweeps
      ([1, 2, 0], [85.0, 91.0], 1)

    Reference:
      Ainsworth et al. 2022, arXiv 2209.04836, section 3.2 and algorithm 1.
    """
    where = "weight_matching"
    require_matching(where, a, b, names=("a", "b"))
    require(is_concrete((a, b)), where, "a and b must be concrete", "traced parameters", "Call it outside of jit")
    require_finite(where, {"a": a, "b": b}, "parameters")
    require(solver in SOLVERS, where, "unknown solver", repr(solver), nearest(str(solver), SOLVERS))
    chosen = _chosen(where, a, spec, groups)
    require(
        max_sweeps > 0 and restarts > 0,
        where,
        "max_sweeps and restarts must be positive",
        (max_sweeps, restarts),
        "Pass 1 or more",
    )
    first = {**identity_permutation(a, spec), **(start or {})}
    require_permutation(where, a, spec, first)
    sides = _unit_leaves(a, spec), _unit_leaves(b, spec)
    found = []
    for i in range(restarts):
        drawn = random_permutation(a, spec, key=stream(key, "restart", i)) if i else {}
        begin = {**first, **{group: drawn[group] for group in chosen if i}}
        order = stream(key, "order", i)
        found.append(_descend(*sides, spec, chosen, begin, order, solver, max_sweeps, first_by_evidence=i == 0))
    best, objective = max(found, key=lambda pair: pair[1][-1])
    permutation = {group: jnp.asarray(index, jnp.int32) for group, index in best.items()}
    return Matching(permutation, apply_permutation(b, spec, permutation), np.asarray(objective))


def _chosen(where: str, params: Params, spec: PermutationSpec, groups: Sequence[str] | None) -> tuple[str, ...]:
    counts = unit_counts(params, spec, where=where)
    require(bool(counts), where, "the spec must have groups", "it has no groups", "Name the units of the network")
    lone = isinstance(groups, str)
    require(not lone, where, "groups must be a list of names", f"the string {groups!r}", "Put it in brackets")
    unknown = [group for group in groups or () if group not in counts]
    require(not unknown, where, "groups must be those of the spec", unknown, f"It has {', '.join(counts)}")
    return tuple(counts) if groups is None else tuple(groups)


def _unit_leaves(params: Params, spec: PermutationSpec) -> dict[str, Array]:
    leaves = named_leaves(params)
    return {path: jnp.asarray(leaves[path]) for path, axes in spec.leaves if axes}


def _descend(
    a: Leaves,
    b: Leaves,
    spec: PermutationSpec,
    groups: tuple[str, ...],
    start: Permutation,
    key: Array,
    solver: Solver,
    max_sweeps: int,
    *,
    first_by_evidence: bool,
) -> tuple[dict[str, Array | np.ndarray], list[float]]:
    permutation, pending = dict(start), set(groups)
    objective = [_objective(a, b, spec, permutation)]
    for sweep in range(max_sweeps):
        if not pending:
            break
        gained = 0.0
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, sweep), len(groups)))
        drawn = [groups[i] for i in order]
        if first_by_evidence and not sweep:
            drawn.sort(key=lambda group: -_evidence(a, spec, group, groups))
        for group in drawn:
            if group not in pending:
                continue
            pending.remove(group)
            index, gain = _best(a, b, spec, group, permutation, solver)
            if gain > 0:
                permutation[group] = index
                gained += gain
                pending |= _neighbours(spec, group) & set(groups)
        objective.append(objective[-1] + gained)
    return permutation, objective


def _evidence(leaves: Leaves, spec: PermutationSpec, group: str, groups: Sequence[str]) -> float:
    """Share of what belongs to a group that no other group in question lies on: what its first match can go by."""
    sizes = {path: {axis.units for axis in axes} & set(groups) for path, axes in spec.leaves}
    own = [(leaves[path].size, units == {group}) for path, units in sizes.items() if group in units]
    return sum(size for size, alone in own if alone) / max(sum(size for size, _ in own), 1)


def _neighbours(spec: PermutationSpec, group: str) -> set[str]:
    """Groups whose best permutation depends on that of a group; the group itself where a leaf has it twice."""
    found = set[str]()
    for _, axes in spec.leaves:
        units = [axis.units for axis in axes]
        if group in units:
            units.remove(group)
            found |= set(units)
    return found


def _best(
    a: Leaves, b: Leaves, spec: PermutationSpec, group: str, permutation: Permutation, solver: Solver
) -> tuple[Array | np.ndarray, float]:
    """The best permutation of a group, given the others, and what it gains; layers that gain nothing stay."""
    part = PermutationSpec(tuple((path, axes) for path, axes in spec.leaves if group in {axis.units for axis in axes}))
    a, b = ({path: side[path] for path, _ in part.leaves} for side in (a, b))
    near = moving({other: permutation[other] for other in part.groups})
    old = np.asarray(permutation[group])
    rows = old.reshape(-1, old.shape[-1]).copy()
    gained = 0.0
    for layer, similarity in enumerate(_similarities(a, b, part, group, near, len(rows))):
        new = np.asarray(solve_assignment(similarity, solver=solver))
        before, after = (np.asarray(_picked(similarity, jnp.asarray(i)), np.float64) for i in (rows[layer], new))
        gain = after.sum() - before.sum()
        # What ties within rounding must not move: two groups could move each other forever.
        if gain > jnp.finfo(similarity.dtype).eps * np.abs(after).sum():
            rows[layer], gained = new, gained + gain
    found = rows.reshape(old.shape)
    if gained > 0 and group in _neighbours(spec, group):  # the assignment was of a linearisation
        now, then = (_objective(a, b, part, p) for p in (near, {**near, group: found}))
        gained = then - now if then - now > jnp.finfo(_dtype(a)).eps * abs(now) else 0.0
    return found, gained


def _similarities(
    a: Leaves, b: Leaves, spec: PermutationSpec, group: str, permutation: Permutation, layers: int
) -> Iterator[Float[Array, "n n"]]:
    """Similarities by layer, one matrix ahead: the device multiplies while the host assigns, and holds no more."""
    ahead = _similarity(a, b, spec, group, permutation, jnp.int32(0))
    for layer in range(1, layers):
        now, ahead = ahead, _similarity(a, b, spec, group, permutation, jnp.int32(layer))
        yield now
    yield ahead


def _objective(a: Leaves, b: Leaves, spec: PermutationSpec, permutation: Permutation) -> float:
    """Inner product of a and the permuted b over the leaves of the spec."""
    moved = moving({group: permutation[group] for group in spec.groups if group in permutation})
    return sum(float(product) for product in _products({p: a[p] for p, _ in spec.leaves}, b, spec, moved))


@functools.partial(jax.jit, static_argnames="spec")
def _products(a: Leaves, b: Leaves, spec: PermutationSpec, permutation: Permutation) -> list[Array]:
    dtype = _dtype(a)
    return [
        jnp.vdot(a[path].astype(dtype), permute_leaf(b[path], axes, permutation).astype(dtype), precision="highest")
        for path, axes in spec.leaves
    ]


@functools.partial(jax.jit, static_argnames=("spec", "group"))
def _similarity(
    a: Leaves, b: Leaves, spec: PermutationSpec, group: str, permutation: Permutation, layer: Array
) -> Float[Array, "n n"]:
    """Entry (i, j): inner product of all that belongs to unit i of a and to unit j of b, other groups permuted.

    Of a group that is stacked, in one layer.
    """
    total, dtype = jnp.zeros((), _dtype(a)), _dtype(a)
    for path, axes in spec.leaves:
        for own in (axis for axis in axes if axis.units == group):
            others = tuple(axis for axis in axes if axis is not own)
            x, y, near = jnp.asarray(a[path]), b[path], permutation
            if own.stacked:
                x, y = x[layer], y[layer]
                known = [axis for axis in others if axis.units in near]
                near = {axis.units: near[axis.units][layer] if axis.stacked else near[axis.units] for axis in known}
                own, others = _of_layer(own), tuple(_of_layer(axis) for axis in others)
            left, right = (_by_unit(leaf, own).astype(dtype) for leaf in (x, permute_leaf(y, others, near)))
            total += jnp.matmul(left, right.T, precision="highest")
    return total


def _of_layer(axis: UnitAxis) -> UnitAxis:
    return replace(axis, axis=axis.axis - 1, stacked=False)


def _by_unit(leaf: Array, axis: UnitAxis) -> Float[Array, "n p"]:
    """What belongs to each unit, a row each."""
    place, shape = axis.axis, leaf.shape
    view = leaf.reshape(*shape[:place], axis.outer, -1, axis.inner, *shape[place + 1 :])
    return jnp.moveaxis(view, place + 1, 0).reshape(view.shape[place + 1], -1)


@jax.jit
def _picked(similarity: Float[Array, "n n"], index: Array) -> Float[Array, "n"]:
    return jnp.take_along_axis(similarity, index[:, None], axis=1)[:, 0]


def _dtype(leaves: Leaves) -> Any:
    """Of sums over leaves."""
    return max((accumulation_dtype(leaf.dtype) for leaf in leaves.values()), key=lambda dtype: jnp.finfo(dtype).bits)
