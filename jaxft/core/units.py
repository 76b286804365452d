"""Hidden units of a network as axes of its parameter leaves: what can be permuted, dropped or copied.

A group of units (the hidden units of a layer, the channels of a convolution, the heads of an attention layer) appears
on some axes of some leaves. An axis *produces* the units (incoming weights, biases, scales of a per-channel norm: the
rows of the papers) or *reads* them (outgoing weights: the columns). That is all the geometry of parameter spaces needs
to know of an architecture; ``jaxft.nn`` says it for our models, and users say it for theirs.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxft.core.checks import nearest, path_name, require
from jaxft.core.types import Params


@dataclasses.dataclass(frozen=True)
class UnitAxis:
    """One axis of a leaf along which the units of a group lie, as ``[outer, units, inner]``.

    ``inner`` entries in a row belong to one unit, such as the width of a head; ``outer`` repeats the whole list of
    units, such as the positions of a map that is flattened behind a convolution, or query, key and value of a fused
    kernel.
    """

    units: str
    """Name of the group."""
    axis: int
    """Axis of the leaf, not negative."""
    reads: bool = False
    """Whether the axis reads the outputs of the units rather than producing them."""
    outer: int = 1
    inner: int = 1
    stacked: bool = False
    """Whether axis 0 of the leaf counts layers, each with units (and so a permutation) of its own."""


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
    """Where the units of a network lie.

    Example:
      >>> spec = make_permutation_spec({
      ...     "in/kernel": (UnitAxis("hidden", 1),),
      ...     "in/bias": (UnitAxis("hidden", 0),),
      ...     "out/kernel": (UnitAxis("hidden", 0, reads=True),),
      ... })
      >>> spec.groups
      ('hidden',)
    """

    leaves: tuple[tuple[str, tuple[UnitAxis, ...]], ...]
    """Path of a leaf (``a/b/kernel``) and the unit axes it has; leaves without any need not be named."""
    normalized: frozenset[str] = frozenset()
    """Groups that a norm runs over (LayerNorm, RMSNorm, GroupNorm): there a dead unit still moves the others."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in order of first appearance."""
        return tuple(dict.fromkeys(axis.units for _, axis in self.entries()))

    def entries(self) -> Iterator[tuple[str, UnitAxis]]:
        """Every unit axis with the path of its leaf."""
        for path, axes in self.leaves:
            for axis in axes:
                yield path, axis

    def of_group(self, group: str, *, reads: bool | None = None) -> tuple[tuple[str, UnitAxis], ...]:
        """The unit axes of a group; only those that read it or that produce it if ``reads`` is given."""
        return tuple((p, a) for p, a in self.entries() if a.units == group and reads in (None, a.reads))


def make_permutation_spec(
    leaves: Mapping[str, tuple[UnitAxis, ...]], *, normalized: frozenset[str] | set[str] = frozenset()
) -> PermutationSpec:
    """A spec from a mapping of leaf paths; ``normalized`` names the groups that a norm runs over.

    Raises:
      UserError: Two unit axes of a leaf share an axis, or a size or an axis is out of range.
    """
    for path, axes in leaves.items():
        places = [axis.axis for axis in axes]
        rule = f"the unit axes of {path} must lie on axes of their own"
        require(len(set(places)) == len(places), "make_permutation_spec", rule, places, "Correct the axes")
        fits = all(a.axis >= a.stacked and a.outer > 0 and a.inner > 0 for a in axes)
        rule = f"axes of {path} must be >= 0 (>= 1 where stacked), outer and inner positive"
        require(fits, "make_permutation_spec", rule, axes, "Correct them")
    return PermutationSpec(tuple((p, tuple(axes)) for p, axes in leaves.items()), frozenset(normalized))


def named_leaves(params: Params) -> dict[str, Any]:
    """Leaves by path, as ``a/b/kernel``, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def map_named_leaves(fn: Any, params: Params) -> Params:
    """The tree with every leaf replaced by ``fn(path, leaf)``."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), params)


def unit_counts(params: Params, spec: PermutationSpec, *, where: str = "unit_counts") -> dict[str, int]:
    """Number of units of every group (in each layer, where they are stacked), from the shapes of the leaves.

    Raises:
      UserError: A leaf of the spec is missing, an axis does not fit it, or leaves disagree on a group; all at once.

    Example:
      >>> spec = make_permutation_spec({"w": (UnitAxis("hidden", 1),), "v": (UnitAxis("hidden", 0, reads=True),)})
      >>> unit_counts({"w": np.zeros((3, 8)), "v": np.zeros((8, 2))}, spec)
      {'hidden': 8}
    """
    made = isinstance(spec, PermutationSpec)
    require(made, where, "spec must be a PermutationSpec", type(spec).__name__, "Make it by make_permutation_spec")
    leaves, counts, faults = named_leaves(params), dict[str, int](), []
    stacks: dict[str, int] = {}
    for path, axis in spec.entries():
        if path not in leaves:
            faults.append(f"{path} is missing ({nearest(path, leaves).rstrip('.')})")
            continue
        shape, per_unit = np.shape(leaves[path]), axis.outer * axis.inner
        if axis.axis >= len(shape) or shape[axis.axis] % per_unit:
            faults.append(f"{path} {shape} has no axis {axis.axis} of [{axis.outer}, {axis.units}, {axis.inner}]")
            continue
        n, stack = shape[axis.axis] // per_unit, shape[0] if axis.stacked else 0
        if counts.setdefault(axis.units, n) != n:
            faults.append(f"{path} {shape} has {n} of {axis.units}, another leaf {counts[axis.units]}")
        if stacks.setdefault(axis.units, stack) != stack:
            faults.append(f"{path} {shape} has {stack} layers of {axis.units}, another leaf {stacks[axis.units]}")
    require(not faults, where, "the spec must fit the parameters", "; ".join(faults), "Make it for this model")
    return counts


def unit_stacks(params: Params, spec: PermutationSpec) -> dict[str, int]:
    """Number of layers that each group is stacked over; 0 where it is not stacked."""
    leaves = named_leaves(params)
    return {axis.units: np.shape(leaves[path])[0] if axis.stacked else 0 for path, axis in spec.entries()}
