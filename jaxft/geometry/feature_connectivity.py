"""Connectivity layer by layer: which layers make the barrier, and whether features are linear between two models."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import leading_size, require, require_finite, require_matching
from jaxft.core.types import Inputs, Params
from jaxft.core.units import map_named_leaves, named_leaves
from jaxft.geometry.barriers import Baseline, checked_metric, convexity_gap, loss_barrier
from jaxft.geometry.merging import interpolate, mix_leaves
from jaxft.geometry.path_loss import BatchFn, mean_over_batches
from jaxft.geometry.paths import Path, accumulation_dtype, checked_parameter, checked_parameters
from jaxft.geometry.unit_statistics import UnitsFn


def leafwise_path(a: Params, b: Params, moving: Callable[[str], bool] | Sequence[str]) -> Path:
    """The line on which some leaves go from a to b, and the others stay those of a.

    Args:
      a: Point at t = 0.
      b: The moving leaves at t = 1.
      moving: Whether a leaf moves, by its path such as ``Dense_0/kernel``; or a list of what such paths begin with,
        whole components (``Dense_1`` does not name ``Dense_10``).

    Returns:
      The path.

    Raises:
      UserError: The trees do not match, or no leaf moves.

    Example:
      >>> a, b = ({"low": jnp.array(x), "high": jnp.array(x)} for x in (0.0, 1.0))
      >>> point = leafwise_path(a, b, ["low"])(0.5)
      >>> float(point["low"]), float(point["high"])
      (0.5, 0.0)
    """
    where = "leafwise_path"
    require_matching(where, a, b, names=("a", "b"))
    names = list(named_leaves(a))
    lone = isinstance(moving, str)
    require(not lone, where, "moving must be a list of beginnings", f"the string {moving!r}", "Put it in brackets")
    moves = moving if callable(moving) else functools.partial(_begins, moving)
    require(any(moves(name) for name in names), where, "a leaf must move", "none", f"Paths are like {names[0]}")
    return jax.tree_util.Partial(_leafwise, a, map_named_leaves(lambda name, x: x if moves(name) else None, b))


def _leafwise(a: Params, moved: Params, t: Any) -> Params:
    """The line to ``moved``, which has None where a leaf stays."""
    t = checked_parameter("leafwise_path", t)
    return jax.tree.map(lambda x, y: x if y is None else interpolate(x, y, t), a, moved)


class LayerwiseBarriers(NamedTuple):
    """What replacing one layer of a by that of b costs on the way."""

    layers: tuple[str, ...]
    barriers: Float[Array, "layers"]
    gaps: Float[Array, "layers"]
    """Convexity gaps: the chord to a worse end can hide a rise."""
    losses: dict[str, Float[Array, "layers points"]]
    """Every value that the loss function returned; at t = 1 the network has one layer of b."""
    t: Float[Array, "points"]
    metric: str
    baseline: str


def layerwise_barriers(
    loss_fn: BatchFn,
    a: Params,
    b: Params,
    batches: Any,
    *,
    layers: Mapping[str, Sequence[str]] | None = None,
    stacked: str | None = None,
    points: int = 11,
    baseline: Baseline = "max",
    metric: str | None = None,
) -> LayerwiseBarriers:
    """Barriers on the lines that move one layer from a to b while all others stay those of a.

    All layers are one compiled program. The end of such a line is no trained network: the baseline is the higher end
    unless another is asked for.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar or a dict of scalars; means over the batch.
      a: The model whose other layers stay.
      b: The model that lends a layer.
      batches: Batches of one size, stacked on axis 0.
      layers: Name of a layer -> beginnings of the paths of its leaves. By default leaves that share all of their path
        but its last component are a layer.
      stacked: Beginning of the paths of leaves that stack layers on axis 0: these are taken apart, into
        ``<stacked>[0]`` and so on, beside the layers of the other leaves.
      points: Points of each line, both ends included.
      baseline: What ``loss_barrier`` measures from.
      metric: Which value of a dict the barriers are of; ``loss`` by default, or the only one.

    Returns:
      Barriers and losses by layer.

    Raises:
      UserError: The trees do not match or are not finite, a layer without leaves, stacked leaves that disagree on the
        number of layers, an unknown metric or baseline.

    Example:
      >>> a, b = ({"low": {"w": jnp.array(x)}, "high": {"w": jnp.array(x)}} for x in (-1.0, 1.0))
      >>> loss_fn = lambda p, batch: ((p["low"]["w"] * p["high"]["w"] - batch) ** 2).mean()
      >>> found = layerwise_barriers(loss_fn, a, b, jnp.ones((1, 2)), points=3)
      >>> found.layers, found.losses["loss"][0].tolist()
      (('high', 'low'), [0.0, 1.0, 4.0])

    Reference:
      Adilova et al. 2024, arXiv 2307.06966.
    """
    where = "layerwise_barriers"
    require_matching(where, a, b, names=("a", "b"))
    require_finite(where, (a, b), "a and b")
    metric = checked_metric(where, loss_fn, a, batches, metric)
    ts = checked_parameters(where, None, points)
    shares = _layer_shares(where, a, layers, stacked)
    moving = jax.tree.map(lambda *x: jnp.stack(x), *shares.values())
    losses = _layer_losses(loss_fn, a, b, moving, ts, batches)
    chosen = losses[metric]
    barriers = loss_barrier(chosen, t=ts, baseline=baseline)
    return LayerwiseBarriers(tuple(shares), barriers, convexity_gap(chosen, t=ts), losses, ts, metric, baseline)


class FeatureConnectivity(NamedTuple):
    """How far features of the mixed model are from the mixture of features, by layer."""

    t: Float[Array, "points"]
    distance: dict[str, Float[Array, "points"]]
    """Mean over examples of 1 - cos; 0 where features are linear between the models up to a factor."""
    coefficient: dict[str, Float[Array, "points"]]
    """Mean of the projection of the mixed model's features on the mixture, over the mixture: that factor."""
    ends: dict[str, Float[Array, ""]]
    """Mean of 1 - cos between the features of a and of b: what a small distance has to be compared with."""


def feature_connectivity(
    units_fn: UnitsFn,
    a: Params,
    b: Params,
    x: Inputs,
    *,
    ts: Float[Array | np.ndarray, "points"] | None = None,
) -> FeatureConnectivity:
    r"""Linearity of features, $1 - \cos[f_l((1 - t) a + t b),\ (1 - t) f_l(a) + t f_l(b)]$, for every layer l.

    Features that are 0 for an example have no direction, and leave it out. Where the outputs are linear up to a
    positive factor, an example that both ends classify rightly is classified rightly in between: the error on the line
    is at most the sum of the errors of its ends.

    Args:
      units_fn: ``units_fn(params, x)``: features by layer, ``[n, ...]``; all axes but the first are one vector.
      a: Model at t = 0.
      b: Model at t = 1.
      x: Examples of one batch.
      ts: Where to look; 1/4, 1/2 and 3/4 by default.

    Returns:
      Distances by layer and t.

    Raises:
      UserError: The trees do not match or are not finite, t outside [0, 1], or features without a leading axis.

    Example:
      >>> a, b = ({"w": jnp.diag(jnp.array(d))} for d in ([1.0, 0.0], [0.0, 1.0]))
      >>> units_fn = lambda p, x: {"in": x @ p["w"], "out": (x @ p["w"]) ** 2}
      >>> found = feature_connectivity(units_fn, a, b, jnp.ones((1, 2)), ts=jnp.array([0.5, 0.75]))
      >>> {name: [round(float(d), 3) for d in row] for name, row in found.distance.items()}
      {'in': [0.0, 0.0], 'out': [0.0, 0.022]}

    Reference:
      Zhou et al. 2023, arXiv 2307.08286, lemma 1.
    """
    where = "feature_connectivity"
    require_matching(where, a, b, names=("a", "b"))
    require_finite(where, (a, b), "a and b")
    ts = checked_parameters(where, np.array([0.25, 0.5, 0.75]) if ts is None else ts)
    found = jax.eval_shape(units_fn, a, x)
    named = isinstance(found, Mapping)
    require(named, where, "units_fn must return a mapping", type(found).__name__, "Return features by layer")
    leading_size(where, dict(found))
    return _feature_connectivity(units_fn, a, b, x, ts)


@functools.partial(jax.jit, static_argnames=("units_fn",))
def _feature_connectivity(
    units_fn: UnitsFn, a: Params, b: Params, x: Inputs, ts: Float[Array, "points"]
) -> FeatureConnectivity:
    def units(params: Params) -> dict[str, Array]:
        return {name: f.reshape(f.shape[0], -1) for name, f in units_fn(params, x).items()}

    of_a, of_b = units(a), units(b)

    def at(t: Array) -> dict[str, tuple[Array, Array]]:
        mixed = units(interpolate(a, b, t))
        return {name: _agreement(mixed[name], interpolate(of_a[name], of_b[name], t)) for name in mixed}

    found = jax.lax.map(at, ts)
    distance, coefficient = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    ends = {name: _agreement(of_a[name], of_b[name])[0] for name in of_a}
    return FeatureConnectivity(ts, distance, coefficient, ends)


def _agreement(features: Float[Array, "n d"], mixture: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Means over examples of 1 - cos, and of the part of the mixture that the features hold."""
    inner, square_f, square_m = (
        (x * y).sum(axis=1) for x, y in ((features, mixture), (features, features), (mixture, mixture))
    )
    product = jnp.sqrt(square_f * square_m)
    seen, directed = product > 0, square_m > 0
    cosine = inner / jnp.where(seen, product, 1)
    share = inner / jnp.where(directed, square_m, 1)
    distance = jnp.where(seen, 1 - cosine, 0).sum() / jnp.maximum(seen.sum(), 1).astype(cosine.dtype)
    return distance, jnp.where(directed, share, 0).sum() / jnp.maximum(directed.sum(), 1).astype(share.dtype)


@functools.partial(jax.jit, static_argnames=("loss_fn",))
def _layer_losses(
    loss_fn: BatchFn, a: Params, b: Params, moving: Params, ts: Float[Array, "points"], batches: Any
) -> dict[str, Float[Array, "layers points"]]:
    """Losses on one line a layer; ``moving`` has the share of every leaf that moves, 0 or 1 and broadcastable."""

    def of_layer(share: Params) -> dict[str, Array]:
        def at(t: Array) -> dict[str, Array]:
            params = jax.tree.map(
                lambda s, x, y: mix_leaves([x, y], [1 - s * t.astype(s.dtype), s * t.astype(s.dtype)]), share, a, b
            )
            return mean_over_batches(loss_fn, params, batches)

        return jax.lax.map(at, ts)

    return jax.lax.map(of_layer, moving)


def _layer_shares(
    where: str, params: Params, layers: Mapping[str, Sequence[str]] | None, stacked: str | None
) -> dict[str, Params]:
    """Name of a layer -> tree of what moves: 1 or 0 a leaf, or a vector of them over the layers of a stacked leaf."""
    names = list(named_leaves(params))
    inside = [name for name in names if stacked is not None and _begins([stacked], name)]
    require(bool(inside) or stacked is None, where, "stacked must begin the path of a leaf", stacked, f"As {names[0]}")
    depths = sorted({np.shape(named_leaves(params)[name])[:1] for name in inside})
    one = len(depths) <= 1 and () not in depths
    require(
        one, where, "stacked leaves must have one number of layers", depths, "Name those that stack layers on axis 0"
    )
    if layers is None:
        layers = {(name.rpartition("/")[0] or name): () for name in names if name not in inside}
        layers = {layer: [layer] for layer in layers}
    chosen = {layer: {n for n in names if n not in inside and _begins(starts, n)} for layer, starts in layers.items()}
    empty = [layer for layer, members in chosen.items() if not members]
    require(not empty, where, "every layer must have a leaf", ", ".join(empty), f"Paths are like {names[0]}")
    depth = depths[0][0] if depths else 0

    def share(members: set[str], index: int) -> Params:
        def of_leaf(name: str, x: Array) -> Array:
            dtype = accumulation_dtype(jnp.result_type(x))
            if name not in inside:
                return jnp.asarray(name in members, dtype)
            hot = jnp.arange(depth) == index
            return hot.astype(dtype).reshape((depth,) + (1,) * (np.ndim(x) - 1))

        return map_named_leaves(of_leaf, params)

    found = {layer: share(members, -1) for layer, members in chosen.items()}
    return found | {f"{stacked}[{i}]": share(set(), i) for i in range(depth)}


def _begins(starts: Sequence[str], name: str) -> bool:
    return any(name == start or name.startswith(f"{start}/") for start in starts)
