"""Losses, metrics and predictions along a path: every point over the same batches, in one compiled program."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxft.core.checks import leading_size, require
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.geometry.paths import POINTS, Path, arc_length, checked_parameters

BatchFn = Callable[[Params, Any], Float[Array, ""] | Mapping[str, Float[Array, ""]]]
"""``loss_fn(params, batch)``: the mean loss of a batch, or several means by name."""

Statistics = Callable[[Params, Any], Params]
"""``statistics(params, batches)``: the same point with its normalisation statistics estimated anew."""

ACCELERATOR_POINTS = 8
"""Points side by side where a GPU or TPU is at hand."""


class PathLoss(NamedTuple):
    """What was seen along a path."""

    t: Float[Array, "points"]
    values: dict[str, Float[Array, "points"]]
    """Mean over all examples, by name; ``loss`` where the function returned a scalar."""
    arc_length: Float[Array, "points"]
    """Length of the path up to each t, in the norm of the parameters."""
    length_ratio: Float[Array, ""]
    """Length of the path over the distance of its ends; infinite where they coincide."""


def eval_path(
    loss_fn: BatchFn,
    path: Path,
    batches: Any,
    *,
    points: int = POINTS,
    ts: Float[Array | np.ndarray, "points"] | None = None,
    inner: str | int = "auto",
    statistics: Statistics | None = None,
    mesh: Mesh | None = None,
) -> PathLoss:
    """Losses and metrics at points of a path.

    The mean over batches is the mean over examples, since all batches have one size. One point is held at a time by
    ``map``; by ``vmap`` all of them are, which on a CPU costs a multiple (its batched products are slow).

    Args:
      loss_fn: Mean loss of a batch, or a mapping of means; the same object again meets a compiled program.
      path: A ``Curve``, or any function of t.
      batches: Tree with a leading axis of batches.
      points: Number of points from 0 to 1.
      ts: The values of t, in place of ``points``.
      inner: ``map``, ``vmap``, the number of points side by side, or ``auto``: ``map`` on CPU, 8 elsewhere.
      statistics: Re-estimates normalisation statistics at every point, over the same batches; without it those of a
        point are the mixture of the ends', which belong to no network.
      mesh: Splits the points over the first axis of the mesh.

    Returns:
      Values of t, means by name, arc length.

    Raises:
      UserError: t outside [0, 1], batches without a common leading axis, an unknown ``inner``.

    Example:
      >>> from jaxft.geometry import linear_path
      >>> line = linear_path({"w": jnp.array(-1.0)}, {"w": jnp.array(1.0)})
      >>> found = eval_path(lambda p, x: jnp.mean((p["w"] ** 2 - x) ** 2), line, jnp.ones((2, 4)), points=3)
      >>> found.values["loss"].tolist(), float(found.length_ratio)
      ([0.0, 1.0, 0.0], 1.0)

    Reference:
      Garipov et al. 2018, arXiv 1802.10026, section 4.
    """
    where = "eval_path"
    ts = checked_parameters(where, ts, points)
    leading_size(where, batches)
    known = inner in ("auto", "map", "vmap") or (isinstance(inner, int) and inner > 0)
    require(known, where, "inner must be auto, map, vmap or a positive number", repr(inner), "Pass one of them")
    if inner == "auto":
        inner = "map" if jax.default_backend() == "cpu" else ACCELERATOR_POINTS
    return _evaluate(path if _is_tree(path) else _Opaque(path), batches, ts, loss_fn, inner, statistics, mesh)


def path_ensemble(
    f: OutputFn,
    path: Path,
    x: Inputs,
    *,
    ts: Float[Array | np.ndarray, "points"] | None = None,
    points: int = POINTS,
    batches: Any = None,
    statistics: Statistics | None = None,
) -> Float[Array, "n c"]:
    r"""Log of the mean of the class probabilities of the networks at points of a path.

    $\log \frac1T \sum_t \operatorname{softmax} f(\theta(t), x)$, one point held at a time.

    Args:
      f: Logits of a batch.
      path: The path.
      x: Examples.
      ts: Members; ``points`` of them from 0 to 1 by default.
      points: Number of members where ``ts`` is None.
      batches: For ``statistics``.
      statistics: As of ``eval_path``.

    Returns:
      Log-probabilities in nats.

    Raises:
      UserError: t outside [0, 1].

    Example:
      >>> from jaxft.geometry import linear_path
      >>> line = linear_path({"w": jnp.array(-2.0)}, {"w": jnp.array(2.0)})
      >>> f = lambda p, x: jnp.stack([p["w"] * x, -p["w"] * x], 1)
      >>> [round(float(p), 3) for p in jnp.exp(path_ensemble(f, line, jnp.ones(1), ts=jnp.array([0.0, 1.0])))[0]]
      [0.5, 0.5]

    Reference:
      Garipov et al. 2018, arXiv 1802.10026, section 5.
    """
    ts = checked_parameters("path_ensemble", ts, points)

    def member(total: Array, t: Array) -> tuple[Array, None]:
        params = path(t) if statistics is None else statistics(path(t), batches)
        return jnp.logaddexp(total, jax.nn.log_softmax(f(params, x), axis=-1)), None

    shape = jax.eval_shape(f, path(ts[0]), x)
    total, _ = jax.lax.scan(member, jnp.full(shape.shape, -jnp.inf, shape.dtype), ts)
    return total - jnp.log(jnp.asarray(len(ts), total.dtype))


def mean_over_batches(loss_fn: BatchFn, params: Params, batches: Any) -> dict[str, Float[Array, ""]]:
    """Means by name over batches of one size, one batch at a time.

    Args:
      loss_fn: Mean loss of a batch, or a mapping of means.
      params: The network.
      batches: Tree with a leading axis of batches.

    Returns:
      Means over all examples; of a function that returns a scalar, as ``loss``.

    Example:
      >>> float(mean_over_batches(lambda p, x: jnp.mean(p * x), jnp.array(2.0), jnp.arange(4.0).reshape(2, 2))["loss"])
      3.0
    """
    count = leading_size("mean_over_batches", batches)

    def one(batch: Any) -> dict[str, Array]:
        found = loss_fn(params, batch)
        return dict(found) if isinstance(found, Mapping) else {"loss": found}

    if count == 1:
        return one(jax.tree.map(lambda x: x[0], batches))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(one, batches))


class _Opaque(NamedTuple):
    """A path that is a plain function: it is compiled in, with the points it closes over."""

    path: Path


def _is_tree(path: Path) -> bool:
    return not jax.tree_util.all_leaves([path])


def _evaluate(
    path: Any, batches: Any, ts: Array, loss_fn: BatchFn, inner: str | int, statistics: Any, mesh: Mesh | None
) -> PathLoss:
    if isinstance(path, _Opaque):
        return _compiled(None, batches, ts, path.path, loss_fn, inner, statistics, mesh)
    return _compiled(path, batches, ts, None, loss_fn, inner, statistics, mesh)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _compiled(
    curve: Any,
    batches: Any,
    ts: Array,
    opaque: Path | None,
    loss_fn: BatchFn,
    inner: str | int,
    statistics: Statistics | None,
    mesh: Mesh | None,
) -> PathLoss:
    path = curve if opaque is None else opaque

    def at(t: Array) -> dict[str, Array]:
        params = path(t)
        return mean_over_batches(loss_fn, params if statistics is None else statistics(params, batches), batches)

    values = _over_points(at, ts, inner) if mesh is None else _over_mesh(at, ts, inner, mesh)
    lengths = arc_length(path, ts=ts)
    chord = arc_length(path, ts=ts[jnp.array([0, -1])])[-1]
    return PathLoss(ts, values, lengths, lengths[-1] / chord)


def _over_points(at: Callable[[Array], Any], ts: Array, inner: str | int) -> Any:
    if inner == "vmap":
        return jax.vmap(at)(ts)
    return jax.lax.map(at, ts, batch_size=None if inner == "map" else int(inner))


def _over_mesh(at: Callable[[Array], Any], ts: Array, inner: str | int, mesh: Mesh) -> Any:
    """Each device of the first axis takes as many points as any other; the last point fills up."""
    axis = mesh.axis_names[0]
    count, ways = len(ts), mesh.shape[axis]
    padded = jnp.pad(ts, (0, -count % ways), mode="edge")
    padded = jax.lax.with_sharding_constraint(padded, NamedSharding(mesh, PartitionSpec(axis)))
    split = jax.shard_map(
        lambda t: _over_points(at, t, inner),
        mesh=mesh,
        in_specs=PartitionSpec(axis),
        out_specs=PartitionSpec(axis),
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:count], split(padded))
