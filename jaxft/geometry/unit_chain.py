"""The order of the layers of hidden units, where there is one: what the constructive path needs of a network."""

import dataclasses
from typing import NamedTuple

from jaxft.core.checks import require
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, UnitAxis, named_leaves, unit_counts

INSTEAD = (
    "Measure dropout_stability, walk dropout_line to the dropout network (both take any spec), or fit a path with "
    "fit_curve"
)
"""What can be had of a network that is no chain."""


class ChainLeaf(NamedTuple):
    """A leaf and the unit axes on which it produces and reads units."""

    path: str
    produces: UnitAxis | None
    reads: UnitAxis | None


@dataclasses.dataclass(frozen=True)
class UnitChain:
    """Hidden layers from the inputs to the outputs; every layer reads the one before it alone."""

    groups: tuple[str, ...]
    layers: dict[str, tuple[ChainLeaf, ...]]
    """Leaves that produce the units of each group: kernels, biases, scales and statistics of a per-channel norm."""
    top: tuple[ChainLeaf, ...]
    """Leaves that read the last group and produce none: the outputs are linear in them."""
    loose: tuple[str, ...]
    """Leaves without unit axes, such as the bias of the outputs."""
    counts: dict[str, int]

    @property
    def readers(self) -> dict[str, tuple[ChainLeaf, ...]]:
        """Leaves that read the units of each group."""
        leaves = [leaf for layer in self.layers.values() for leaf in layer] + list(self.top)
        return {g: tuple(leaf for leaf in leaves if leaf.reads and leaf.reads.units == g) for g in self.groups}


def unit_chain(params: Params, spec: PermutationSpec, *, where: str = "unit_chain") -> UnitChain:
    """The hidden layers of a network in order, if each reads the one before it and nothing else.

    A layer may have several kernels as long as all read one group (a gated unit has two). The spec alone is looked at:
    that the outputs are linear in the top leaves, and that a unit whose readers hold 0 changes nothing, is the model's
    part (``dropout_path`` has ``check_moves`` for it).

    Args:
      params: Parameters, of which the shapes are read.
      spec: Where the units lie.
      where: Name of the function that an error is reported for.

    Returns:
      The chain.

    Raises:
      UserError: A norm runs over a group, a group is stacked over layers or lies in a residual stream, a layer reads
        several, or a group lacks producing or reading leaves; with what can be had instead.

    Example:
      >>> import numpy as np
      >>> from jaxft.core.units import make_permutation_spec
      >>> spec = make_permutation_spec({"w": (UnitAxis("hidden", 1),), "v": (UnitAxis("hidden", 0, reads=True),)})
      >>> unit_chain({"w": np.zeros((3, 8)), "v": np.zeros((8, 2))}, spec).groups
      ('hidden',)
    """
    counts = unit_counts(params, spec, where=where)
    rule = "the constructive path needs a chain of layers of units"
    faults = _faults(spec)
    require(not faults, where, rule, "; ".join(faults), INSTEAD)
    leaves = [_chain_leaf(path, axes) for path, axes in spec.leaves if axes]
    layers = {g: tuple(leaf for leaf in leaves if leaf.produces and leaf.produces.units == g) for g in spec.groups}
    before = {g: {leaf.reads.units for leaf in layer if leaf.reads} for g, layer in layers.items()}
    top = tuple(leaf for leaf in leaves if leaf.produces is None)
    last = {leaf.reads.units for leaf in top if leaf.reads}

    faults = [f"{g} has no leaf that produces it" for g, layer in layers.items() if not layer]
    faults += [f"{g} reads {', '.join(sorted(b))} (a residual stream)" for g, b in before.items() if g in b]
    faults += [f"{g} is fed by {', '.join(sorted(b))}" for g, b in before.items() if len(b) > 1]
    if len(last) != 1:
        faults.append(f"the outputs read {', '.join(sorted(last)) or 'no group'}")
    require(not faults, where, rule, "; ".join(faults), INSTEAD)

    order: list[str] = []
    (group,) = last
    while group not in order:
        order.insert(0, group)
        group = next(iter(before[group]), group)
    left = [g for g in spec.groups if g not in order]
    circular = bool(before[order[0]])
    got = f"{', '.join(left)} beside {', '.join(order)}" if left else f"a cycle of {', '.join(order)}"
    require(not left and not circular, where, rule, got, INSTEAD)
    named = {leaf.path for leaf in leaves}
    loose = tuple(path for path in named_leaves(params) if path not in named)
    return UnitChain(tuple(order), layers, top, loose, counts)


def _faults(spec: PermutationSpec) -> list[str]:
    faults = [f"a norm runs over {g}, where a dead unit still moves the others" for g in sorted(spec.normalized)]
    stacked = sorted({axis.units for _, axis in spec.entries() if axis.stacked})
    faults += [f"{g} is stacked over layers" for g in stacked]
    for path, axes in spec.leaves:
        for reads in (True, False):
            groups = [axis.units for axis in axes if axis.reads is reads]
            if len(groups) > 1:
                faults.append(f"{path} {'reads' if reads else 'produces'} {' and '.join(groups)}")
    if not spec.groups:
        faults.append("a spec without groups")
    return faults


def _chain_leaf(path: str, axes: tuple[UnitAxis, ...]) -> ChainLeaf:
    return ChainLeaf(
        path,
        next((axis for axis in axes if not axis.reads), None),
        next((axis for axis in axes if axis.reads), None),
    )
