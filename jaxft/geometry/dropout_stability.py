"""Networks with hidden units dropped: masks, the rescaled network, and how much the loss rises."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import UserError, is_concrete, message, nearest, require, require_finite
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, UnitAxis, map_named_leaves, unit_counts, unit_stacks
from jaxft.geometry.path_loss import BatchFn, mean_loss
from jaxft.geometry.unit_moves import along

Masks = Mapping[str, Any]
"""Units that are kept, by group: ``Bool[n]``, or ``Bool[l, n]`` where a group is stacked over layers. Many draws at
once have one more axis in front."""


class DropoutStability(NamedTuple):
    """How much the loss rises when units are dropped, over random draws of what is kept."""

    epsilon_best: Float[Array, ""]
    """Least of the draws: the epsilon of the definition, to which one good choice of units is enough."""
    epsilon_median: Float[Array, ""]
    epsilon: Float[Array, "draws"]
    """Largest rise over the start layers, of each draw; 0 if the loss never rises."""
    losses: Float[Array, "draws starts"]
    """Loss with the layers from a start layer to the last one dropped; the last start layer comes first."""
    loss: Float[Array, ""]
    """Loss of the network itself."""
    masks: dict[str, Bool[Array, "..."]]
    """The draw of ``epsilon_best``."""


def dropout_masks(
    params: Params,
    spec: PermutationSpec,
    *,
    key: Array,
    keep_frac: float = 0.5,
    groups: Sequence[str] | None = None,
    draws: int | None = None,
) -> dict[str, Bool[Array, "..."]]:
    r"""Masks that keep exactly $\lfloor \mathrm{keep\_frac} \cdot n \rfloor$ units of every layer, drawn uniformly.

    Args:
      params: Parameters, of which the shapes are read.
      spec: Where the units lie.
      key: Of the draw; each group has a stream of its own.
      keep_frac: Fraction of the units that is kept.
      groups: Groups to mask; all that no norm runs over by default.
      draws: Number of masks on a leading axis; one mask without that axis by default.

    Returns:
      Masks by group, true where a unit is kept.

    Raises:
      UserError: Unknown groups, or a fraction that keeps no unit of a group, or is not in (0, 1].

    Example:
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> masks = dropout_masks({"w": jnp.ones((2, 9)), "v": jnp.ones((9, 1))}, spec, key=jax.random.key(0))
      >>> int(masks["hidden"].sum())
      4

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, definition 1.
    """
    where = "dropout_masks"
    require(0 < keep_frac <= 1, where, "keep_frac must lie in (0, 1]", keep_frac, "Pass, say, 0.5")
    require(draws is None or draws > 0, where, "draws must be positive", draws, "Leave it out for one mask")
    counts, stacks = unit_counts(params, spec, where=where), unit_stacks(params, spec)
    masks = {}
    for group in mask_groups(where, spec, groups):
        n, stack = counts[group], stacks[group]
        kept = int(np.floor(keep_frac * n + 1e-9))
        require(kept > 0, where, f"a unit of {group} must be kept", f"{keep_frac} of {n}", "Raise keep_frac")
        lead = (*(() if draws is None else (draws,)), *((stack,) if stack else ()))
        order = jnp.broadcast_to(jnp.arange(n), (*lead, n))
        order = jax.random.permutation(stream(key, group), order, axis=-1, independent=True)
        masks[group] = order < kept
    return masks


def complement_masks(masks: Masks, *, at_most_half: bool = True) -> dict[str, Bool[Array, "..."]]:
    """Masks that keep what the others drop.

    Args:
      masks: Masks by group.
      at_most_half: Whether to drop the last units of a complement beyond half of all, as the constructive path needs
        it (of 7 units with 3 kept, the complement has 4).

    Returns:
      Masks by group.

    Raises:
      UserError: A mask that is not boolean.

    Example:
      >>> complement_masks({"hidden": jnp.array([True, False, False])})["hidden"].tolist()
      [False, True, False]
    """

    def complement(group: str, mask: Any) -> Array:
        mask = jnp.asarray(mask)
        rule = f"the mask of {group} must be boolean"
        require(mask.dtype == bool, "complement_masks", rule, mask.dtype, "Use dropout_masks, or compare with 0")
        other = ~mask
        room = jnp.cumsum(other, axis=-1) <= mask.shape[-1] // 2
        return other & room if at_most_half else other

    return {group: complement(group, mask) for group, mask in masks.items()}


def mask_groups(where: str, spec: PermutationSpec, groups: Sequence[str] | None) -> tuple[str, ...]:
    """Groups to be dropped: those named, or all that no norm runs over."""
    if groups is None:
        return tuple(group for group in spec.groups if group not in spec.normalized)
    for group in groups:
        require(group in spec.groups, where, "groups must be those of the spec", group, nearest(group, spec.groups))
    return tuple(groups)


def require_masks(where: str, params: Params, spec: PermutationSpec, masks: Masks, *, draws: bool = False) -> None:
    """Raises unless every mask belongs to a group, is boolean, has its shape and (if concrete) keeps a unit."""
    counts, stacks = unit_counts(params, spec, where=where), unit_stacks(params, spec)
    require(bool(masks), where, "there must be a mask", "none", "Make them with dropout_masks")
    counted = set[int]()
    for group, mask in masks.items():
        require(group in counts, where, "masks must be of groups of the spec", group, nearest(group, counts))
        shape = (*((stacks[group],) if stacks[group] else ()), counts[group])
        found, kind = np.shape(mask)[draws:], getattr(mask, "dtype", None)
        fits = found == shape and len(np.shape(mask)) == len(shape) + draws and kind == np.dtype(bool)
        got = f"{kind}{list(np.shape(mask))} for {'[draws] + ' if draws else ''}bool{list(shape)}"
        require(fits, where, f"the mask of {group} must be boolean, one entry a unit", got, "Use dropout_masks")
        if draws:
            counted.add(np.shape(mask)[0])
        if is_concrete(mask) and np.size(mask):
            kept = int(np.asarray(mask).sum(axis=-1).min())
            require(kept > 0, where, f"the mask of {group} must keep a unit", kept, "Keep one or more")
    several = len(counted) <= 1 and 0 not in counted
    require(several, where, "all groups must have the same draws, one or more", sorted(counted), "Draw them together")


def dropout_params(
    params: Params,
    spec: PermutationSpec,
    masks: Masks,
    *,
    groups: Sequence[str] | None = None,
    rescale: bool | float = True,
) -> Params:
    """The network with units dropped and the outputs of the others scaled by (units / units kept).

    The factors go into the axes that *read* the units, so the network computes what dropout computes whatever the
    activation is; scaling what produces them would need one that is positively homogeneous, and no biases. A norm that
    runs over the units sees them all, however.

    Args:
      params: Parameters.
      spec: Where the units lie.
      masks: Units that are kept, by group.
      groups: Groups to be dropped, such as those from a start layer on; all that have masks by default.
      rescale: Whether to scale, or the factor itself, such as 1 / (1 - p) where each unit is dropped with chance p.

    Returns:
      Parameters of the same network.

    Raises:
      UserError: Masks of other shapes or groups, or one that keeps nothing.

    Example:
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> masks = {"hidden": jnp.array([True, False])}
      >>> dropout_params({"w": jnp.ones((1, 2)), "v": jnp.ones((2, 1))}, spec, masks)["v"].tolist()
      [[2.0], [0.0]]

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, definition 1.
    """
    where = "dropout_params"
    require_masks(where, params, spec, masks)
    chosen = list(masks) if groups is None else list(groups)
    for group in chosen:
        require(group in masks, where, "groups must have masks", group, nearest(group, masks))
    return scale_readers(params, spec, {group: keep_factors(masks[group], rescale) for group in chosen})


def keep_factors(mask: Bool[Array | np.ndarray, "*l n"], rescale: bool | float = True) -> Float[Array, "*l n"]:
    """What the output of each unit is multiplied by: 0, or units / units kept (or 1, or the factor given)."""
    mask = jnp.asarray(mask)
    dtype = jnp.result_type(float)
    if rescale is True:
        factor = mask.shape[-1] / mask.sum(axis=-1, keepdims=True).astype(dtype)
    else:
        factor = jnp.full((*mask.shape[:-1], 1), 1.0 if rescale is False else rescale, dtype)
    return jnp.where(mask, jnp.broadcast_to(factor, mask.shape), jnp.zeros((), dtype))


def scale_readers(params: Params, spec: PermutationSpec, factors: Mapping[str, Any]) -> Params:
    """Parameters with the axes that read each group multiplied by its factors."""
    axes: dict[str, list[UnitAxis]] = {}
    for path, axis in spec.entries():
        if axis.reads and axis.units in factors:
            axes.setdefault(path, []).append(axis)

    def scale(path: str, leaf: Any) -> Any:
        for axis in axes.get(path, ()):
            leaf = leaf * along(factors[axis.units], np.shape(leaf), axis).astype(leaf.dtype)
        return leaf

    return map_named_leaves(scale, params)


def layer_depths(
    params: Params, spec: PermutationSpec, groups: Sequence[str]
) -> tuple[dict[str, Int[np.ndarray, "..."]], int]:
    """Position of the layer(s) of every group, and the number of positions.

    Groups lie in the order given; groups that are stacked and follow one another share their layers.
    """
    stacks = unit_stacks(params, spec)
    depths, total, last = {}, 0, 0
    for group in groups:
        stack = stacks[group]
        shared = stack > 0 and stack == last
        start = total - stack if shared else total
        depths[group] = np.arange(start, start + stack) if stack else np.asarray(start)
        total, last = start + max(stack, 1), stack
    return depths, total


def start_layer_losses(
    where: str,
    loss_fn: BatchFn,
    params: Params,
    spec: PermutationSpec,
    masks: Masks,
    batches: Any,
    groups: Sequence[str],
) -> tuple[Float[Array, ""], Float[Array, "draws starts"]]:
    """Loss of the network, and by draw that with the last layer dropped, the last two, and so on to all.

    One network at a time; the undropped one is looked at once.
    """
    depths, total = layer_depths(params, spec, groups)
    draws = masks[groups[0]].shape[0]

    def at(network: Int[Array, "2"]) -> Array:
        draw, start = network

        def active(group: str) -> Array:
            drop, factors = jnp.asarray(depths[group]) >= start, keep_factors(masks[group][draw])
            return jnp.where(jnp.broadcast_to(drop[..., None], factors.shape), factors, jnp.ones((), factors.dtype))

        dropped = scale_readers(params, spec, {group: active(group) for group in groups})
        return mean_loss(where, loss_fn, dropped, batches)

    networks = [(0, total), *((draw, start) for draw in range(draws) for start in range(total - 1, -1, -1))]
    losses = jax.lax.map(at, jnp.asarray(networks))
    return losses[0], losses[1:].reshape(draws, total)


def dropout_stability(
    loss_fn: BatchFn,
    params: Params,
    spec: PermutationSpec,
    batches: Any,
    *,
    key: Array | None = None,
    draws: int = 20,
    keep_frac: float = 0.5,
    groups: Sequence[str] | None = None,
    masks: Masks | None = None,
) -> DropoutStability:
    r"""The rise of the loss when units are dropped: $\epsilon = \max_i L(\theta_i) - L(\theta)$.

    $\theta_i$ is the network with the units of layers i, i + 1, ... to the last hidden one dropped and the kept ones
    rescaled. All i count: the constructive path goes through every $\theta_i$. The definition asks for one good choice
    of units, hence the best of the draws; the median says what a random choice gives. All draws and start layers are
    one compiled program, one network held at a time.

    Args:
      loss_fn: Mean loss of a batch, or a mapping with ``loss``; the same object again meets a compiled program.
      params: The network.
      spec: Where the units lie. Groups count as layers in their order there; a group that is stacked over layers counts
        as those layers, and stacked groups that follow one another (heads and MLP of a transformer) share them.
      batches: Tree with a leading axis of batches.
      key: Of the draws.
      draws: Number of random masks.
      keep_frac: Fraction of the units of a layer that is kept.
      groups: Groups that are dropped, in the order of the layers; all that no norm runs over by default.
      masks: Masks with a leading axis of draws, in place of random ones.

    Returns:
      Epsilon by draw, its best and median, the losses and the best masks.

    Raises:
      UserError: Neither or both of ``key`` and ``masks``, parameters that are not finite, masks that do not fit.

    Example:
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> twice = {"w": jnp.ones((1, 2)), "v": jnp.ones((2, 1))}  # two units that do the same
      >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - 2 * jnp.tanh(x)) ** 2)
      >>> float(dropout_stability(loss, twice, spec, jnp.ones((1, 4, 1)), key=jax.random.key(0)).epsilon_best)
      0.0

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, definition 1.
    """
    where = "dropout_stability"
    require(draws > 0, where, "draws must be positive", draws, "Pass, say, 20")
    require_finite(where, params, "params")
    unit_counts(params, spec, where=where)
    if masks is None and key is not None:
        masks = dropout_masks(params, spec, key=key, keep_frac=keep_frac, groups=groups, draws=draws)
    elif masks is None or key is not None:
        raise UserError(message(where, "pass a key or masks", "both or none", "Pass one of them"))
    for group in groups or ():
        require(group in masks, where, "groups must have masks", repr(group), nearest(group, masks))
    masks = {group: masks[group] for group in (masks if groups is None else groups)}
    require_masks(where, params, spec, masks, draws=True)
    # A mapping that is traced is put in the order of its keys, so the order of the layers is passed beside it.
    order = tuple(group for group in spec.groups if group in masks) if groups is None else tuple(groups)
    return _stability(params, {g: jnp.asarray(m) for g, m in masks.items()}, batches, loss_fn, spec, order)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _stability(
    params: Params,
    masks: dict[str, Array],
    batches: Any,
    loss_fn: BatchFn,
    spec: PermutationSpec,
    groups: tuple[str, ...],
) -> DropoutStability:
    loss, losses = start_layer_losses("dropout_stability", loss_fn, params, spec, masks, batches, groups)
    epsilon = jnp.maximum(losses.max(axis=1) - loss, 0)
    epsilon = jnp.where(jnp.isnan(epsilon), jnp.inf, epsilon)  # a network that overflows is no good choice
    best = epsilon.argmin()
    return DropoutStability(
        epsilon[best], jnp.median(epsilon), epsilon, losses, loss, {g: m[best] for g, m in masks.items()}
    )
