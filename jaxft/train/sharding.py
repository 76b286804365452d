"""Placement of pytrees on a mesh: replicated, split by example, or fully sharded.

Placement is all there is to distribution here: the compiler derives the communication from it. Meshes must have Auto
axes (``jax.make_mesh(..., axis_types=(AxisType.Auto,))``).
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxft.core.checks import leading_size, require


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every leaf whole on every device of the mesh.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tuple(replicate({"w": np.ones(2)}, mesh)["w"].sharding.spec)
      ()
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_examples(tree: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """Every leaf split along axis 0, the axis of examples.

    Args:
      tree: Arrays that share a leading axis.
      mesh: Devices.
      axis: Name of the mesh axis to split over.

    Returns:
      The same values, placed.

    Raises:
      UserError: The mesh lacks the axis, or its size does not divide the number of examples.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tuple(shard_examples({"x": np.ones((4, 2))}, mesh)["x"].sharding.spec)
      ('data',)
    """
    ways = _axis_size("shard_examples", mesh, axis)
    examples = leading_size("shard_examples", tree)
    rule = f"the number of examples must be a multiple of the {ways} devices of axis {axis!r}"
    way_out = f"Pass {examples - examples % ways} or {examples - examples % ways + ways} examples, or replicate"
    require(examples % ways == 0, "shard_examples", rule, examples, way_out)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(axis)))


def fully_shard(tree: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """Every leaf split along its largest dimension that the axis size divides; others are replicated.

    Applied to a training state, parameters and optimiser moments take 1 / devices of the memory each, and weights are
    gathered where they are used (as in ZeRO stage 3 and FSDP). Ties go to the first dimension.

    Args:
      tree: Arrays of any shapes: parameters, an optimiser's state, or both.
      mesh: Devices.
      axis: Name of the mesh axis to split over.

    Returns:
      The same values, placed.

    Raises:
      UserError: The mesh lacks the axis.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tuple(fully_shard({"w": np.ones((2, 8))}, mesh)["w"].sharding.spec)
      (None, 'data')

    Reference:
      Rajbhandari et al. 2020, arXiv 1910.02054, section 5.
    """
    ways = _axis_size("fully_shard", mesh, axis)

    def placement(x: Any) -> NamedSharding:
        shape = np.shape(x)
        dims = [k for k, size in enumerate(shape) if size and size % ways == 0]
        if not dims:
            return NamedSharding(mesh, PartitionSpec())
        widest = max(dims, key=lambda k: (shape[k], -k))
        return NamedSharding(mesh, PartitionSpec(*[None] * widest, axis))

    return jax.device_put(tree, jax.tree.map(placement, tree))


def _axis_size(where: str, mesh: Mesh, axis: str) -> int:
    require(axis in mesh.axis_names, where, f"mesh must have the axis {axis!r}", mesh.axis_names, "Name one it has")
    return mesh.shape[axis]
