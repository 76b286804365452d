"""How high the loss rises on a path between two models, and between every two of many.

A barrier is measured from a *baseline*, and papers differ in it: ``chord`` (Entezari et al. 2022 and most later work),
``mean`` (Frankle et al. 2020) or ``max`` (the connectedness of Kuditipudi et al. 2019). The three agree where both ends
have one loss. Functions take losses, whatever path they lie on; ``pairwise_barriers`` measures straight lines itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance
from jaxtyping import Array, Float, Int, Real

from jaxft.core.checks import is_concrete, leading_size, nearest, require, require_finite
from jaxft.core.types import Params
from jaxft.geometry.path_loss import BatchFn, Statistics, mean_over_batches, named_means
from jaxft.geometry.paths import accumulation_dtype, checked_parameters, linear_path, stack_points

Baseline = Literal["chord", "mean", "max"]


def loss_barrier(
    losses: Real[Array | np.ndarray, "*paths points"],
    *,
    t: Float[Array | np.ndarray, "points"] | None = None,
    baseline: Baseline = "chord",
) -> Float[Array, "*paths"]:
    r"""The largest rise of the loss over its baseline, $\max_t [L(t) - B(t)]$.

    ``chord``: $B(t) = (1 - t) L(0) + t L(1)$. ``mean``: $B = (L(0) + L(1)) / 2$. ``max``: $B = \max(L(0), L(1))$. Never
    negative. The mean exceeds 0 on a path that only falls, by half the fall. Any quantity that is better when lower
    can be passed, such as an error.

    Args:
      losses: Losses along a path, the ends first and last; leading axes hold other paths. NaN gives NaN.
      t: Where on the path; equally far apart by default.
      baseline: What to measure from.

    Returns:
      The barrier of each path.

    Raises:
      UserError: Fewer than two points, t that does not fit or does not rise, or an unknown baseline.

    Example:
      >>> losses = jnp.array([0.0, 3.0, 1.0])
      >>> [float(loss_barrier(losses, baseline=name)) for name in ("chord", "mean", "max")]
      [2.5, 2.5, 2.0]

    Reference:
      Frankle et al. 2020, arXiv 1912.05671, section 2 (mean); Entezari et al. 2022, arXiv 2110.06296 (chord);
      Kuditipudi et al. 2019, arXiv 1906.06247 (max).
    """
    where = "loss_barrier"
    _check_baseline(where, baseline)
    losses, t = _checked_losses(where, losses, t)
    return (losses - _baseline_values(losses, t, baseline)).max(axis=-1)


def convexity_gap(
    losses: Real[Array | np.ndarray, "*paths points"], *, t: Float[Array | np.ndarray, "points"] | None = None
) -> Float[Array, "*paths"]:
    r"""The largest chord barrier on any part of a path, $\max_{i < k < j} [L(t_k) - \text{chord}_{ij}(t_k)]$.

    It is the largest distance of the losses from their lower convex envelope: 0 where they are convex in t, and never
    less than the chord barrier of the whole path. A path that falls and then rises to a higher end has no barrier over
    its chord, and may have a gap. Memory is the square of the number of points.

    Args:
      losses: Losses along a path; leading axes hold other paths.
      t: Where on the path; equally far apart by default.

    Returns:
      The gap of each path.

    Raises:
      UserError: Fewer than two points, or t that does not fit or does not rise.

    Example:
      >>> losses = jnp.array([4.0, 0.0, 2.0, 0.0, 4.0])
      >>> float(loss_barrier(losses)), float(convexity_gap(losses))
      (0.0, 2.0)

    Reference:
      Juneja et al. 2023, arXiv 2205.12411.
    """
    return _convexity_gap(*_checked_losses("convexity_gap", losses, t))


@jax.jit
def _convexity_gap(losses: Float[Array, "*paths points"], t: Float[Array, "points"]) -> Float[Array, "*paths"]:
    points = jnp.arange(t.shape[0])
    width = t[None, :] - t[:, None]
    rise = losses[..., None, :] - losses[..., :, None]
    slope = rise / jnp.broadcast_to(jnp.where(width > 0, width, 1), rise.shape)

    def gap(k: Array) -> Array:
        chord = losses[..., :, None] + slope * jnp.broadcast_to((t[k] - t)[:, None], slope.shape)
        # Both ends at k itself count: their chord is the loss there, and the gap 0.
        spans = jnp.broadcast_to((points[:, None] <= k) & (points[None, :] >= k), chord.shape)
        return losses[..., k] - jnp.where(spans, chord, jnp.inf).min(axis=(-2, -1))

    return jax.lax.map(gap, points).max(axis=0)


class BarrierMatrix(NamedTuple):
    """What lies on the straight lines between every two of m models."""

    barriers: Float[Array, "m m"]
    """Barrier of ``metric`` over ``baseline``; symmetric, 0 on the diagonal."""
    gaps: Float[Array, "m m"]
    """Convexity gap of ``metric``."""
    losses: dict[str, Float[Array, "m m points"]]
    """Every value that the loss function returned, along the line from the row's model to the column's."""
    t: Float[Array, "points"]
    metric: str
    baseline: str


def pairwise_barriers(
    loss_fn: BatchFn,
    models: Sequence[Params] | Params,
    batches: Any,
    *,
    points: int = 11,
    baseline: Baseline = "chord",
    metric: str | None = None,
    align: Callable[[Params, Params], Params] | None = None,
    statistics: Statistics | None = None,
) -> BarrierMatrix:
    """Barriers on the straight lines between every two of m models, by one compiled program for all pairs.

    Memory beside the stack of models is two of them; a list is stacked, which copies it.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar or a dict of scalars; means over the batch.
      models: A list of parameter trees, or one tree of them stacked on axis 0.
      batches: Batches of one size, stacked on axis 0 of every leaf.
      points: Points of each line, both ends included.
      baseline: What ``loss_barrier`` measures from.
      metric: Which value of a dict the barriers are of; ``loss`` by default, or the only one.
      align: ``align(a, b)`` gives b in another form, such as permuted to match a, before the line from a is drawn. It
        is called once for i < j, outside of the compiled program.
      statistics: Re-estimates normalisation statistics at every point, as of ``eval_path``; without it they are
        interpolated like weights.

    Returns:
      The matrices, with the losses they were made from.

    Raises:
      UserError: Fewer than two models, models that do not match (the leaves are listed) or are not finite, fewer than
        two points, values that are no scalars, an unknown metric or baseline.

    Example:
      >>> models = [{"w": jnp.array([x])} for x in (-1.0, 1.0, 1.0)]
      >>> matrix = pairwise_barriers(lambda p, b: ((p["w"] ** 2 - b) ** 2).mean(), models, jnp.ones((1, 4)))
      >>> matrix.barriers.tolist()
      [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]

    Reference:
      Juneja et al. 2023, arXiv 2205.12411.
    """
    where = "pairwise_barriers"
    _check_baseline(where, baseline)
    stacked = _stacked_models(where, models)
    count = leading_size(where, stacked)
    metric = checked_metric(where, loss_fn, jax.tree.map(lambda x: x[0], stacked), batches, metric)
    ts = checked_parameters(where, None, points)
    firsts, seconds = np.triu_indices(count, 1)
    if align is None:
        values = losses_of_pairs(
            loss_fn, stacked, jnp.asarray(firsts), jnp.asarray(seconds), ts, batches, statistics=statistics
        )
    else:
        values = _aligned_losses(loss_fn, stacked, firsts, seconds, ts, batches, align, statistics)
    losses = {name: _symmetric(firsts, seconds, lines) for name, lines in values.items()}
    chosen = losses[metric]
    barriers, gaps = loss_barrier(chosen, t=ts, baseline=baseline), convexity_gap(chosen, t=ts)
    return BarrierMatrix(_symmetrized(barriers), _symmetrized(gaps), losses, ts, metric, baseline)


def cluster_barriers(
    matrix: BarrierMatrix | Float[Array | np.ndarray, "m m"],
    *,
    clusters: int | None = None,
    threshold: float | None = None,
) -> Int[np.ndarray, "m"]:
    """Groups of models that straight lines connect, by complete linkage.

    With ``threshold`` no two models of a group have a higher barrier; with ``clusters`` there are at most that many
    groups, and their highest barriers are low. Barriers are no metric: single linkage would join models by chains of
    low lines, which is the right question for paths but not for lines.

    Args:
      matrix: Barriers, or what ``pairwise_barriers`` returned.
      clusters: Number of groups.
      threshold: Highest barrier within a group. One of the two is passed.

    Returns:
      The group of every model, numbered from 0 in order of first appearance.

    Raises:
      UserError: Both or neither of the two options, or a matrix that is not square, symmetric and finite.

    Example:
      >>> cluster_barriers(np.array([[0, 9, 0], [9, 0, 9], [0, 9, 0.0]]), threshold=1.0).tolist()
      [0, 1, 0]

    Reference:
      Juneja et al. 2023, arXiv 2205.12411 (who cluster spectrally).
    """
    where = "cluster_barriers"
    given = [name for name, x in (("clusters", clusters), ("threshold", threshold)) if x is not None]
    require(len(given) == 1, where, "it takes clusters or threshold", " and ".join(given) or "neither", "Pass one")
    barriers = np.asarray(matrix.barriers if isinstance(matrix, BarrierMatrix) else matrix, float)
    square = barriers.ndim == 2 and barriers.shape[0] == barriers.shape[1] and len(barriers) > 0
    require(square, where, "barriers must be (m, m)", barriers.shape, "Pass the matrix of pairwise_barriers")
    require(bool(np.isfinite(barriers).all()), where, "barriers must be finite", "NaN or infinity", "Drop those models")
    rule, advice = "barriers must be symmetric", "Take the larger of both directions"
    require(bool(np.allclose(barriers, barriers.T)), where, rule, "a matrix that is not", advice)
    bad = clusters is not None and not 1 <= clusters <= len(barriers)
    require(not bad, where, f"clusters must be 1 to {len(barriers)}", clusters, "There is one model or more a group")
    if len(barriers) == 1:
        return np.zeros(1, int)
    distance = scipy.spatial.distance.squareform(np.maximum((barriers + barriers.T) / 2, 0), checks=False)
    tree = scipy.cluster.hierarchy.linkage(distance, "complete")
    if clusters is not None:
        found = scipy.cluster.hierarchy.fcluster(tree, clusters, "maxclust")
    else:
        found = scipy.cluster.hierarchy.fcluster(tree, threshold, "distance")
    order = {label: i for i, label in enumerate(dict.fromkeys(found.tolist()))}
    return np.array([order[label] for label in found.tolist()])


@functools.partial(jax.jit, static_argnames=("loss_fn", "statistics"))
def losses_of_pairs(
    loss_fn: BatchFn,
    stacked: Params,
    firsts: Int[Array, "pairs"],
    seconds: Int[Array, "pairs"],
    ts: Float[Array, "points"],
    batches: Any,
    *,
    statistics: Statistics | None = None,
) -> dict[str, Float[Array, "pairs points"]]:
    """Values along the lines between models of a stack, one pair at a time; compiled once for a ``loss_fn``."""

    def of_pair(pair: tuple[Array, Array]) -> dict[str, Array]:
        a, b = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in pair)
        path = linear_path(a, b)
        estimated = statistics or (lambda params, _: params)
        return jax.lax.map(lambda t: mean_over_batches(loss_fn, estimated(path(t), batches), batches), ts)

    return jax.lax.map(of_pair, (firsts, seconds))


def checked_metric(where: str, loss_fn: BatchFn, params: Params, batches: Any, metric: str | None) -> str:
    """The name of the value to look at, once the values are known to be scalars and it is one of them."""
    leading_size(where, batches)
    first = jax.tree.map(lambda x: x[0], batches)
    values = jax.eval_shape(lambda p, batch: named_means(where, loss_fn, p, batch), params, first)
    if metric is None:
        metric = "loss" if "loss" in values else next(iter(values))
        known = metric == "loss" or len(values) == 1
        require(known, where, "it must be known which value to look at", ", ".join(values), "Pass metric")
    require(metric in values, where, "unknown metric", repr(metric), nearest(metric, values))
    return metric


def _checked_losses(where: str, losses: Any, t: Any) -> tuple[Array, Array]:
    losses = jnp.asarray(losses)
    # In the dtype of integers or halves the values of t, and so the chord, would be rounded.
    wide = jnp.issubdtype(losses.dtype, jnp.floating)
    losses = losses.astype(accumulation_dtype(losses.dtype) if wide else jnp.result_type(float))
    enough = losses.ndim >= 1 and losses.shape[-1] >= 2
    require(enough, where, "losses must hold both ends of a path", f"shape {losses.shape}", "Put t on the last axis")
    if t is None:
        return losses, jnp.linspace(0, 1, losses.shape[-1], dtype=losses.dtype)
    fits = np.shape(t) == losses.shape[-1:]
    require(fits, where, "t must fit the last axis of losses", f"{np.shape(t)} and {losses.shape}", "Pass one t a loss")
    if is_concrete(t):
        rises = bool((np.diff(np.asarray(t, float)) > 0).all())
        require(rises, where, "t must rise", "values that do not", "Sort the points, and drop those that stand twice")
    return losses, jnp.asarray(t, losses.dtype)


def _check_baseline(where: str, baseline: str) -> None:
    known = ("chord", "mean", "max")
    require(baseline in known, where, "unknown baseline", repr(baseline), nearest(baseline, known))


def _baseline_values(losses: Array, t: Array, baseline: str) -> Array:
    first, last = losses[..., :1], losses[..., -1:]
    if baseline == "mean":
        return (first + last) / 2
    if baseline == "max":
        return jnp.maximum(first, last)
    u = ((t - t[0]) / (t[-1] - t[0])).reshape((1,) * (losses.ndim - 1) + t.shape)
    return jnp.where(first == last, first, (1 - u) * first + u * last)  # not rounded where the ends are one model


def _stacked_models(where: str, models: Any) -> Params:
    stacked = stack_points(models) if isinstance(models, list | tuple) else models
    count = leading_size(where, stacked)
    require(count >= 2, where, "there must be two models", count, "Pass a list of trees, or one stacked on axis 0")
    require_finite(where, stacked, "models")
    return stacked


def _aligned_losses(
    loss_fn: BatchFn,
    stacked: Params,
    firsts: np.ndarray,
    seconds: np.ndarray,
    ts: Array,
    batches: Any,
    align: Callable[[Params, Params], Params],
    statistics: Statistics | None,
) -> dict[str, Array]:
    rows = []
    for i, j in zip(firsts.tolist(), seconds.tolist(), strict=True):
        a, b = (jax.tree.map(lambda x, k=k: x[k], stacked) for k in (i, j))
        pair = stack_points([a, align(a, b)])
        ends = jnp.zeros(1, int), jnp.ones(1, int)
        rows.append(losses_of_pairs(loss_fn, pair, *ends, ts, batches, statistics=statistics))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def _symmetric(
    firsts: np.ndarray, seconds: np.ndarray, lines: Float[Array, "pairs points"]
) -> Float[Array, "m m points"]:
    """The losses of all ordered pairs; the line back is the line read backwards, and a model is a line by itself."""
    count = int(seconds[-1]) + 1
    same = jnp.zeros((count,), lines.dtype).at[seconds].set(lines[:, -1]).at[firsts].set(lines[:, 0])
    full = jnp.broadcast_to(same[:, None, None], (count, count, lines.shape[1]))
    return full.at[firsts, seconds].set(lines).at[seconds, firsts].set(lines[:, ::-1])


def _symmetrized(matrix: Array) -> Array:
    """Without the last bit in which a sum depends on its order."""
    return jnp.maximum(matrix, matrix.T)
