"""Nudged elastic band: the path of least resistance between two minima, and the saddle that it crosses.

A chain of pivots is moved by the part of the gradient that is normal to it; along itself it is kept evenly spread, by
springs or by moving the pivots to equal distances (the string method). All pivots see one batch a step, and the end
points too, so that noise of the batch does not bend the tangents.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, leading_size, require, require_matching
from jaxft.core.trees import tree_add, tree_axpy, tree_norm, tree_scale, tree_sub, tree_vdot
from jaxft.core.types import Params, Transform
from jaxft.geometry.path_loss import BatchFn, mean_loss, require_finite_losses, scalar_loss
from jaxft.geometry.paths import Curve, init_curve


class NEBFit(NamedTuple):
    """A fitted band."""

    path: Curve
    """A polychain through the pivots, the ends exactly as passed."""
    pivot_losses: Float[Array, "points"]
    """Loss over all batches at each pivot, both ends included."""
    saddle: Float[Array, ""]
    """The highest of them: an estimate from below of the barrier on this path, as good as the pivots are dense."""
    losses: Float[Array, "steps"]
    """Highest loss of a pivot in each step, on the batch of the step."""


def fit_neb(
    loss_fn: BatchFn,
    a: Params,
    b: Params,
    batches: Any,
    *,
    tx: Transform,
    steps: int,
    pivots: int = 7,
    spring: float | None = None,
    climb_after: int | None = None,
    start: Curve | None = None,
) -> NEBFit:
    r"""A path from a to b on which the loss is stationary across the path: a minimum energy path.

    Pivot i moves along $-(g_i - (g_i \cdot \tau_i) \tau_i)$, with the upwind tangent $\tau_i$, which points to the
    higher neighbour. Without ``spring`` the pivots are then moved along the chain to equal distances (string method,
    springs of infinite stiffness); with it the force $k (|c_{i+1} - c_i| - |c_i - c_{i-1}|) \tau_i$ spreads them.
    The whole fit is one compiled scan. Such a path is a local optimum; other saddles may be lower. Statistics of norms
    are not re-estimated but moved like weights, unless the loss normalises by the batch (as ``fit_curve`` says);
    dropout belongs in neither the pivots nor the ends.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar or a dict that has ``loss``.
      a: Point at t = 0.
      b: Point at t = 1.
      batches: Pytree whose leaves have a leading axis of batches; step s takes batch s modulo their number.
      tx: An optimiser with ``init`` and ``update``, as optax has them.
      steps: Number of steps.
      pivots: Movable points between the ends; at first they lie on the straight line.
      spring: Stiffness k of the springs; None for the string method.
      climb_after: Step from which the highest pivot climbs along the path, to the saddle itself; None for never.
      start: A polychain from a to b whose interior points are the pivots to start from, instead of the line. They keep
        their distances relative to each other: close together they stay where the path is to be resolved.

    Returns:
      The path, the losses of its pivots and the course of the fit.

    Raises:
      UserError: Ends that do not match, are not finite or are equal; no pivots or steps; a ``start`` that is no
        polychain from a to b; options out of range; a loss that is no scalar or does not stay finite.

    Example:
      >>> import optax
      >>> def ring(p, batch):  # a valley around the origin, with a ridge inside it
      ...     return jnp.square(jnp.sum(p["w"] ** 2) - 1)
      >>> ends = {"w": jnp.array([-1.0, 0.1])}, {"w": jnp.array([1.0, 0.1])}
      >>> bool(fit_neb(ring, *ends, jnp.zeros((1, 1)), tx=optax.sgd(0.1), steps=200).saddle < 1e-3)
      True

    Reference:
      Henkelman and Jonsson 2000, doi 10.1063/1.1323224, eqs. 8-11 (tangents); Henkelman et al. 2000,
      doi 10.1063/1.1329672, eq. 5 (climbing); E, Ren and Vanden-Eijnden 2007, doi 10.1063/1.2720838 (string);
      Draxler et al. 2018, arXiv 1803.00885.
    """
    where = "fit_neb"
    require(steps >= 1, where, "steps must be positive", steps, "Raise it")
    stiff = spring is None or spring > 0
    require(stiff, where, "spring must be positive", spring, "Leave it out for the string method")
    fits = climb_after is None or 0 <= climb_after <= steps
    require(fits, where, "climb_after must be a step", climb_after, f"Pass 0 to {steps}, or None")
    leading_size(where, batches)
    require(pivots >= 1, where, "a band needs pivots", pivots, "Pass pivots >= 1")
    line = init_curve(a, b, n_bends=pivots, family="polychain")
    if is_concrete((a, b)):
        apart = float(tree_norm(tree_sub(a, b))) > 0
        require(apart, where, "the ends must differ", "the same point twice", "Pass two minima")
    points = (line if start is None else _checked_start(where, start, a, b)).control
    climb = steps if climb_after is None else climb_after
    place = chain_places(points)[0]
    options = {"loss_fn": loss_fn, "tx": tx, "steps": steps, "spring": spring}
    points, losses, pivot_losses = _fit(points, batches, climb, place / place[-1], **options)
    require_finite_losses(where, losses)
    return NEBFit(Curve(points, "polychain"), pivot_losses, pivot_losses.max(), losses)


def _checked_start(where: str, start: Curve, a: Params, b: Params) -> Curve:
    """A start that is a chain from a to b with a pivot at least."""
    good = start.family == "polychain" and start.n_bends >= 1
    said = f"{start.family} with {start.n_bends} interior points"
    require(good, where, "start must be a polychain with interior points", said, "Use init_curve or polychain")
    first, last = (jax.tree.map(lambda x, i=i: x[i], start.control) for i in (0, -1))
    require_matching(where, a, first, names=("a", "start"))
    if is_concrete((a, b, start.control)):
        same = all(
            bool(np.array_equal(np.asarray(x), np.asarray(y)))
            for x, y in zip(jax.tree.leaves((a, b)), jax.tree.leaves((first, last)), strict=True)
        )
        require(same, where, "start must go from a to b", "other end points", "Pass the ends of start as a and b")
    return start


def _batch(batches: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batches)


@functools.partial(jax.jit, static_argnames=("loss_fn", "tx", "steps", "spring"))
def _fit(
    points: Params,
    batches: Any,
    climb: Any,
    spread: Array,
    *,
    loss_fn: BatchFn,
    tx: Transform,
    steps: int,
    spring: float | None,
) -> tuple[Params, Array, Array]:
    """Points after the fit, the highest loss of every step, and the losses of the final points.

    ``spread`` says at which part of the length every point is to lie.
    """
    count = leading_size("fit_neb", batches)
    ends = jax.tree.map(lambda x: x[jnp.array([0, -1])], points)
    end_losses = jax.lax.map(lambda x: jax.lax.map(lambda p: scalar_loss("fit_neb", loss_fn, p, x), ends), batches)

    def step(carry: Any, at: Array) -> tuple[Any, Array]:
        points, state = carry
        inner, batch = jax.tree.map(lambda x: x[1:-1], points), _batch(batches, at % count)
        inner_losses, grads = jax.lax.map(
            jax.value_and_grad(lambda p: scalar_loss("fit_neb", loss_fn, p, batch)), inner
        )
        first, last = end_losses[at % count]
        losses = jnp.concatenate([first[None], inner_losses, last[None]])
        # Which pivot climbs, if one does: the highest; -1 is none.
        top = jnp.where(at >= climb, 1 + jnp.argmax(inner_losses), -1)
        force = _normal_gradients(points, losses, grads, top, spread, spring)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            updates, state = tx.update(force, state, inner)
        moved = jax.tree.map(lambda x, u: x.at[1:-1].add(u.astype(x.dtype)), points, updates)
        if spring is None:
            moved = jax.tree.map(lambda x, y: x.at[1:-1].set(y), points, _redistributed(moved, top, spread))
        return (moved, state), losses.max()

    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        state = tx.init(jax.tree.map(lambda x: x[1:-1], points))
    (points, _), losses = jax.lax.scan(step, (points, state), jnp.arange(steps))
    return points, losses, jax.lax.map(lambda p: mean_loss("fit_neb", loss_fn, p, batches), points)


def _normal_gradients(
    points: Params, losses: Array, grads: Params, top: Array, spread: Array, spring: float | None
) -> Params:
    """Gradients of the interior points without their part along the band; turned round there at the climbing point."""
    tangents, chords = _tangents(points, losses)
    along = jax.vmap(tree_vdot)(grads, tangents)
    climbs = jnp.arange(1, len(losses) - 1) == top
    scale = -jnp.where(climbs, 2 * along, along)
    if spring is not None:
        parts = jnp.diff(spread) * (len(losses) - 1)  # 1 where the points are to lie equally far apart
        strain = chords / jnp.maximum(parts, jnp.finfo(parts.dtype).eps)
        scale = scale - jnp.where(climbs, 0, jnp.asarray(spring, along.dtype) * (strain[1:] - strain[:-1]))
    return jax.vmap(tree_axpy)(scale, tangents, grads)


def _tangents(points: Params, losses: Array) -> tuple[Params, Array]:
    """Unit tangents at the interior points, upwind, and the lengths of the segments."""
    steps = jax.tree.map(lambda x: x[1:] - x[:-1], points)
    behind, ahead = (jax.tree.map(lambda x, s=s: x[s], steps) for s in (slice(None, -1), slice(1, None)))
    up, down = losses[2:] - losses[1:-1], losses[1:-1] - losses[:-2]
    # At an extremum of the band both sides count, the more the steeper, which keeps the tangent continuous.
    large, small = jnp.maximum(jnp.abs(up), jnp.abs(down)), jnp.minimum(jnp.abs(up), jnp.abs(down))
    rises, extremum = losses[2:] > losses[:-2], up * down <= 0
    flat = (large == 0).astype(losses.dtype)
    weight_ahead = jnp.where(extremum, jnp.where(rises, large, small), rises.astype(losses.dtype)) + flat
    weight_behind = jnp.where(extremum, jnp.where(rises, small, large), (~rises).astype(losses.dtype)) + flat
    mixed = jax.vmap(lambda x, y, u, v: tree_add(tree_scale(x, u), tree_scale(y, v)))(
        weight_ahead, weight_behind, ahead, behind
    )
    norms = jax.vmap(tree_norm)(mixed)
    unit = jax.vmap(tree_scale)(1 / jnp.where(norms > 0, norms, 1), mixed)
    return unit, jax.vmap(tree_norm)(steps)


def chain_places(points: Params) -> tuple[Float[Array, "points"], Float[Array, "segments"]]:
    """Length of a chain up to each of its points, and the lengths of its segments."""
    chords = jax.vmap(tree_norm)(jax.tree.map(lambda x: x[1:] - x[:-1], points))
    return jnp.concatenate([jnp.zeros((1,), chords.dtype), jnp.cumsum(chords)]), chords


def _redistributed(points: Params, top: Array, spread: Array) -> Params:
    """Interior points moved along the chain to their places; a climbing point stays, and each side is spread."""
    place, chords = chain_places(points)
    pinned, at, inner = place[top], spread[top], spread[1:-1]
    before = pinned * inner / jnp.where(top > 0, at, 1)
    behind = pinned + (place[-1] - pinned) * (inner - at) / jnp.where(top > 0, 1 - at, 1)
    goal = jnp.where(top < 0, place[-1] * inner, jnp.where(inner <= at, before, behind))
    segment = jnp.clip(jnp.searchsorted(place, goal, side="right") - 1, 0, len(chords) - 1)
    part = (goal - place[segment]) / jnp.where(chords[segment] > 0, chords[segment], 1)

    def moved(x: Array) -> Array:
        u = part.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return (1 - u) * x[segment] + u * x[segment + 1]

    return jax.tree.map(moved, points)
