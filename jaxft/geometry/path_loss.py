"""Losses, metrics and predictions along a path: every point over the same batches, in one compiled program."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, leading_size, require
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.geometry.paths import POINTS, Path, arc_length, checked_parameters, split_path

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
      path: A ``Curve`` or another path of this package (of a ``DropoutPath`` its ``curve()``), or any function of t. A
        plain function is compiled in with the arrays it closes over, anew for each function:
        ``jax.tree_util.Partial(function, a, b)`` passes them instead.
      batches: Tree with a leading axis of batches.
      points: Number of points from 0 to 1.
      ts: The values of t, in place of ``points``.
      inner: ``map``, ``vmap``, the number of points side by side, or ``auto``: ``map`` on CPU, 8 elsewhere.
      statistics: ``statistics(params, batches)`` re-estimates normalisation statistics at every point, over the same
        batches: ``lambda p, b: net.statistics(p, b[0])`` for a net of ``jaxft.nn.make_convnet`` and batches of images
        and labels. Without it those of a point are the mixture of the ends', which belong to no network.
      mesh: Splits the points over the first axis of the mesh.

    Returns:
      Values of t, means by name, arc length.

    Raises:
      UserError: t outside [0, 1], batches without a common leading axis, an unknown ``inner``, values that are no
        scalars.

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
    require(callable(path), where, "path must be a function of t", type(path).__name__, "Make it by linear_path")
    return _evaluate(*split_path(path), batches, ts, loss_fn, inner, statistics, mesh)


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
    return _ensemble(*split_path(path), x, ts, batches, f, statistics)


def mean_over_batches(
    loss_fn: BatchFn, params: Params, batches: Any, *, where: str = "mean_over_batches"
) -> dict[str, Float[Array, ""]]:
    """Means by name over batches of one size, one batch at a time.

    Args:
      loss_fn: Mean loss of a batch, or a mapping of means.
      params: The network.
      batches: Tree with a leading axis of batches.
      where: Who asks, for messages.

    Returns:
      Means over all examples; of a function that returns a scalar, as ``loss``.

    Raises:
      UserError: Batches without a common leading axis, or a value that is no scalar.

    Example:
      >>> float(mean_over_batches(lambda p, x: jnp.mean(p * x), jnp.array(2.0), jnp.arange(4.0).reshape(2, 2))["loss"])
      3.0
    """
    count = leading_size(where, batches)

    def one(batch: Any) -> dict[str, Array]:
        return named_means(where, loss_fn, params, batch)

    if count == 1:
        return one(jax.tree.map(lambda x: x[0], batches))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(one, batches))


def named_means(where: str, loss_fn: BatchFn, params: Params, batch: Any) -> dict[str, Float[Array, ""]]:
    """What ``loss_fn`` says of one batch, by name; a scalar is ``loss``.

    Raises:
      UserError: A value that is no scalar.
    """
    found = loss_fn(params, batch)
    values = dict(found) if isinstance(found, Mapping) else {"loss": found}
    bad = [f"{name} {np.shape(value)}" for name, value in values.items() if np.shape(value)]
    rule = "loss_fn must return a scalar or a dict of scalars"
    require(bool(values) and not bad, where, rule, ", ".join(bad) or "an empty dict", "Take means over the batch")
    return {name: jnp.asarray(value) for name, value in values.items()}


def scalar_loss(where: str, loss_fn: BatchFn, params: Params, batch: Any) -> Float[Array, ""]:
    """The loss of one batch, whether ``loss_fn`` returns it alone or in a dict.

    Raises:
      UserError: A value that is no scalar, or a dict without ``loss``.
    """
    return _loss_among(where, named_means(where, loss_fn, params, batch))


def mean_loss(where: str, loss_fn: BatchFn, params: Params, batches: Any) -> Float[Array, ""]:
    """The loss over batches of one size, as of ``mean_over_batches``; errors as of ``scalar_loss``."""
    return _loss_among(where, mean_over_batches(loss_fn, params, batches, where=where))


def require_finite_losses(where: str, losses: Float[Array, "steps"]) -> None:
    """Raises with the first step whose loss is not finite; silent under tracing."""
    if is_concrete(losses):
        bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
        shown = f"{losses[bad[0]]} at step {bad[0]}" if bad.size else ""
        require(not bad.size, where, "the loss must stay finite", shown, "Lower the learning rate")


def _loss_among(where: str, values: Mapping[str, Array]) -> Array:
    advice = "Name the value to be looked at so"
    require("loss" in values, where, "loss_fn must return a scalar or a dict with loss", ", ".join(values), advice)
    return values["loss"]


@functools.partial(jax.jit, static_argnums=(1, 5, 6))
def _ensemble(
    tree: Any, plain: Path | None, x: Inputs, ts: Array, batches: Any, f: OutputFn, statistics: Statistics | None
) -> Float[Array, "n c"]:
    path = tree if plain is None else plain

    def log_probs(t: Array) -> Array:
        params = path(t) if statistics is None else statistics(path(t), batches)
        return jax.nn.log_softmax(f(params, x), axis=-1)

    def member(total: Array, t: Array) -> tuple[Array, None]:
        return jnp.logaddexp(total, log_probs(t)), None

    shape = jax.eval_shape(log_probs, ts[0])
    total, _ = jax.lax.scan(member, jnp.full(shape.shape, -jnp.inf, shape.dtype), ts)
    return total - jnp.log(jnp.asarray(len(ts), total.dtype))


@functools.partial(jax.jit, static_argnums=(1, 4, 5, 6, 7))
def _evaluate(
    tree: Any,
    plain: Path | None,
    batches: Any,
    ts: Array,
    loss_fn: BatchFn,
    inner: str | int,
    statistics: Statistics | None,
    mesh: Mesh | None,
) -> PathLoss:
    path = tree if plain is None else plain

    def at(t: Array) -> dict[str, Array]:
        params = path(t)
        params = params if statistics is None else statistics(params, batches)
        return mean_over_batches(loss_fn, params, batches, where="eval_path")

    values = _over_points(at, ts, inner) if mesh is None else _over_mesh(at, ts, inner, mesh)
    lengths = arc_length(path, ts=ts)
    chord = arc_length(path, ts=ts[jnp.array([0, -1])])[-1]
    ratio = jnp.where(chord > 0, lengths[-1] / jnp.where(chord > 0, chord, 1), jnp.inf)
    return PathLoss(ts, values, lengths, ratio)


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
