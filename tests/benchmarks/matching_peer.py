"""Weight matching in loops on the host: the method of samuela/git-re-basin, written anew in numpy and scipy.

A permutation for every group in every layer. A step copies each leaf of the other network with the permutations of all
its other axes applied, moves the axis to the front, multiplies, and solves an assignment; every permutation is tried in
every sweep, until a sweep gains nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, UnitAxis, named_leaves, unit_counts

Owner = tuple[str, int]
"""A group and its layer; -1 where it is not stacked."""
Axes = Sequence[tuple[UnitAxis, Owner]]


def match_by_loops(
    a: Params, b: Params, spec: PermutationSpec, groups: Sequence[str], *, seed: int
) -> dict[str, np.ndarray]:
    """The permutation of b, by group, as ``weight_matching`` returns it."""
    axes = by_layer(a, spec)
    left, right = ({leaf: _leaf(named_leaves(side), leaf) for leaf in axes} for side in (a, b))
    counts, draw = unit_counts(a, spec), np.random.default_rng(seed)
    owners = dict.fromkeys(owner for of_leaf in axes.values() for _, owner in of_leaf)
    permutation = {owner: np.arange(counts[owner[0]]) for owner in owners}
    moving = [owner for owner in permutation if owner[0] in groups]
    progress = True
    while progress:
        progress = False
        for i in draw.permutation(len(moving)):
            owner, n = moving[i], counts[moving[i][0]]
            similarity = np.zeros((n, n), np.float32)
            for leaf, of_leaf in axes.items():
                for place, (own, whose) in enumerate(of_leaf):
                    if whose == owner:
                        others = [pair for at, pair in enumerate(of_leaf) if at != place]
                        moved = _permuted(right[leaf], others, permutation)
                        similarity += _by_unit(left[leaf], own) @ _by_unit(moved, own).T
            columns = linear_sum_assignment(similarity, maximize=True)[1]
            old, new = similarity[np.arange(n), permutation[owner]].sum(), similarity[np.arange(n), columns].sum()
            permutation[owner] = columns
            progress = progress or bool(new > old * (1 + 1e-6))
    found: dict[str, np.ndarray] = {}
    for group, layer in permutation:
        of_group = [index for (name, _), index in permutation.items() if name == group]
        found[group] = np.stack(of_group) if layer >= 0 else of_group[0]
    return found


def by_layer(params: Params, spec: PermutationSpec) -> dict[tuple[str, int], Axes]:
    """Leaves of an encoder, each layer of the stacked ones apart, and the unit axes of each."""
    leaves, found = named_leaves(params), dict[tuple[str, int], Axes]()
    for path, axes in spec.leaves:
        layered = "/layers/" in path
        for layer in range(np.shape(leaves[path])[0]) if layered else (-1,):
            flat = [dataclasses.replace(axis, axis=axis.axis - (layer >= 0)) for axis in axes]
            found[path, layer] = [(axis, (axis.units, layer if axis.stacked else -1)) for axis in flat]
    return found


def _leaf(leaves: Mapping[str, np.ndarray], place: tuple[str, int]) -> np.ndarray:
    path, layer = place
    return np.asarray(leaves[path]) if layer < 0 else np.asarray(leaves[path])[layer]


def _view(leaf: np.ndarray, axis: UnitAxis) -> np.ndarray:
    shape = leaf.shape
    return leaf.reshape(*shape[: axis.axis], axis.outer, -1, axis.inner, *shape[axis.axis + 1 :])


def _permuted(leaf: np.ndarray, axes: Axes, permutation: Mapping[Owner, np.ndarray]) -> np.ndarray:
    for axis, owner in axes:
        leaf = np.take(_view(leaf, axis), permutation[owner], axis=axis.axis + 1).reshape(leaf.shape)
    return leaf


def _by_unit(leaf: np.ndarray, axis: UnitAxis) -> np.ndarray:
    view = np.moveaxis(_view(leaf, axis), axis.axis + 1, 0)
    return view.reshape(len(view), -1)
