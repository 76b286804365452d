"""The loss on the plane through three points of a parameter space."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, leading_size, require
from jaxft.core.trees import tree_axpy, tree_norm, tree_scale, tree_sub, tree_vdot
from jaxft.core.types import Params
from jaxft.geometry.path_loss import BatchFn, Statistics, mean_over_batches
from jaxft.geometry.paths import require_ends, stack_points, widened


class LossPlane(NamedTuple):
    """Losses on a grid of a plane, in the metric of the parameter space."""

    x: Float[Array, "columns"]
    y: Float[Array, "rows"]
    values: dict[str, Float[Array, "rows columns"]]
    """Means by name; ``loss`` where the function returned a scalar."""
    corners: Float[Array, "3 2"]
    """Where the three points lie."""
    origin: Params
    """The first point; like the axes in one dtype, float32 or a wider one of its leaves."""
    axes: Params
    """Two orthonormal directions, stacked on axis 0 of every leaf."""

    def coordinates(self, params: Params) -> Float[Array, "2"]:
        """Where the projection of a point to the plane lies."""
        away = tree_sub(widened(params), self.origin)
        return jnp.stack([tree_vdot(_row(self.axes, k), away) for k in range(2)])


def loss_plane(
    loss_fn: BatchFn,
    a: Params,
    b: Params,
    c: Params,
    batches: Any,
    *,
    points: int = 21,
    margin: float = 0.2,
    statistics: Statistics | None = None,
) -> LossPlane:
    r"""Losses on a grid of the plane through three points.

    Its origin is a; x runs along b - a; y along the part of c - a that is orthogonal to it. So distances in the
    picture are distances of parameters.

    Args:
      loss_fn: Mean loss of a batch, or a mapping of means.
      a: First point.
      b: Second point.
      c: Third point, off the line through a and b.
      batches: Tree with a leading axis of batches.
      points: Grid points along each axis.
      margin: Room around the triangle, as a part of its width and height.
      statistics: As of ``eval_path``.

    Returns:
      Grid, values, and a projection to the plane.

    Raises:
      UserError: Trees that do not match, fewer than 2 points, or three points on a line.

    Example:
      >>> corner = lambda x, y: {"w": jnp.array([x, y])}
      >>> bowl = lambda p, _: jnp.sum(p["w"] ** 2)
      >>> a, b, c = corner(0.0, 0.0), corner(2.0, 0.0), corner(1.0, 1.0)
      >>> plane = loss_plane(bowl, a, b, c, jnp.zeros((1, 1)), points=3, margin=0.0)
      >>> plane.values["loss"][0].tolist(), [round(float(v), 3) for v in plane.coordinates(c)]
      ([0.0, 1.0, 4.0], [1.0, 1.0])

    Reference:
      Garipov et al. 2018, arXiv 1802.10026, appendix A.2.
    """
    where = "loss_plane"
    require_ends(where, a, b)
    require_ends(where, a, c, names=("a", "c"))
    require(points >= 2, where, "a grid needs 2 points along an axis", points, "Raise points")
    leading_size(where, batches)
    origin = widened(a)
    along, other = tree_sub(widened(b), origin), tree_sub(widened(c), origin)
    width = tree_norm(along)
    u = tree_scale(1 / jnp.where(width > 0, width, 1), along)
    across = tree_axpy(-tree_vdot(u, other), u, other)
    height = tree_norm(across)
    flat = ~((width > 0) & (height > 1e-5 * tree_norm(other)))
    require(
        not (is_concrete(flat) and bool(flat)),
        where,
        "three points must span a plane",
        "points on a line",
        "Choose another third point",
    )
    axes = stack_points([u, tree_scale(1 / height, across)])
    corners = jnp.stack([jnp.zeros(2, width.dtype), jnp.stack([width, 0 * width]), _pair(tree_vdot(u, other), height)])
    x, y = (_room(corners[:, k], margin, points) for k in range(2))
    values = _grid(a, origin, axes, x, y, batches, loss_fn, statistics)
    return LossPlane(x, y, values, corners, origin, axes)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _grid(
    like: Params,
    origin: Params,
    axes: Params,
    x: Array,
    y: Array,
    batches: Any,
    loss_fn: BatchFn,
    statistics: Statistics | None,
) -> dict[str, Array]:
    """Values on the grid, of points in the dtypes of ``like``."""

    def at(place: Array) -> dict[str, Array]:
        point = tree_axpy(place[0], _row(axes, 0), tree_axpy(place[1], _row(axes, 1), origin))
        params = jax.tree.map(lambda p, leaf: p.astype(jnp.result_type(leaf)), point, like)
        return mean_over_batches(loss_fn, params if statistics is None else statistics(params, batches), batches)

    places = jnp.stack(jnp.meshgrid(x, y), axis=-1)
    values = jax.lax.map(at, places.reshape(-1, 2))
    return jax.tree.map(lambda v: v.reshape(len(y), len(x)), values)


def _row(tree: Params, k: int) -> Params:
    return jax.tree.map(lambda x: x[k], tree)


def _pair(first: Array, second: Array) -> Array:
    return jnp.stack([first, second])


def _room(values: Array, margin: float, points: int) -> Array:
    low, high = values.min(), values.max()
    room = margin * (high - low)
    return jnp.linspace(low - room, high + room, points)
