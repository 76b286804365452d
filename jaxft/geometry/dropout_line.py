"""The straight line from a network to a dropout network of its own, and the variance that dropout adds."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.core.checks import require, require_finite
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, unit_counts, unit_stacks
from jaxft.geometry.dropout_stability import (
    Masks,
    dropout_params,
    keep_factors,
    mask_groups,
    scale_readers,
)
from jaxft.geometry.path_loss import BatchFn, mean_loss
from jaxft.geometry.paths import Curve, linear_path


class DropoutLine(NamedTuple):
    """The best straight line of some draws of a dropout network."""

    line: Curve
    losses: Float[Array, "draws"]
    """Loss of the dropout network of every draw."""
    masks: dict[str, Bool[Array, "..."]]
    """The draw of the least loss."""


def bernoulli_masks(
    params: Params,
    spec: PermutationSpec,
    *,
    key: Array,
    dropout_frac: float,
    groups: Sequence[str] | None = None,
    draws: int | None = None,
) -> dict[str, Bool[Array, "..."]]:
    """Masks in which every unit is dropped by itself with chance ``dropout_frac``.

    Args:
      params: Parameters, of which the shapes are read.
      spec: Where the units lie.
      key: Of the draw; each group has a stream of its own.
      dropout_frac: Chance of a unit to be dropped, in [0, 1).
      groups: Groups to mask; all that no norm runs over by default.
      draws: Number of masks on a leading axis; one mask without that axis by default.

    Returns:
      Masks by group, true where a unit is kept. A mask may keep none.

    Raises:
      UserError: Unknown groups, or a chance outside [0, 1).

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, lemma 3.
    """
    where = "bernoulli_masks"
    require(0 <= dropout_frac < 1, where, "dropout_frac must lie in [0, 1)", dropout_frac, "Pass, say, 0.25")
    counts, stacks = unit_counts(params, spec, where=where), unit_stacks(params, spec)
    masks = {}
    for group in mask_groups(where, spec, groups):
        shape = (*(() if draws is None else (draws,)), *((stacks[group],) if stacks[group] else ()), counts[group])
        masks[group] = jax.random.bernoulli(stream(key, group), 1 - dropout_frac, shape)
    return masks


def dropout_line(params: Params, spec: PermutationSpec, masks: Masks, *, dropout_frac: float | None = None) -> Curve:
    r"""The straight line from a network to its dropout network.

    It moves the outgoing weights of all hidden layers at once, so for more than one of them nothing is convex; for a
    noise stable network the loss still stays within about $\sqrt p\, \epsilon$ of that of the network. It takes any
    spec: norms, residual streams and stacked layers are covered (with what a norm does to the units that are left).

    Args:
      params: The network.
      spec: Where the units lie.
      masks: Units that are kept.
      dropout_frac: p of the scale 1 / (1 - p) of kept units; units / units kept by default.

    Returns:
      The line, at t = 1 the dropout network.

    Raises:
      UserError: Masks that do not fit, a network that is not finite, or p outside [0, 1).

    Example:
      >>> from jaxft.core.units import UnitAxis
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> params = {"w": jnp.ones((1, 2)), "v": jnp.ones((2, 1))}
      >>> dropout_line(params, spec, {"hidden": jnp.array([True, False])})(0.5)["v"].ravel().tolist()
      [1.5, 0.5]

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, lemma 3.
    """
    inside = dropout_frac is None or 0 <= dropout_frac < 1
    require(inside, "dropout_line", "dropout_frac must lie in [0, 1)", dropout_frac, "Pass, say, 0.25")
    unit_counts(params, spec, where="dropout_line")
    rescale = True if dropout_frac is None else 1 / (1 - dropout_frac)
    return linear_path(params, dropout_params(params, spec, masks, rescale=rescale))


def best_dropout_line(
    loss_fn: BatchFn,
    params: Params,
    spec: PermutationSpec,
    batches: Any,
    *,
    key: Array,
    dropout_frac: float,
    draws: int = 20,
    groups: Sequence[str] | None = None,
) -> DropoutLine:
    """The line to the dropout network of least loss among some draws: lemma 3 holds with chance 1/4 a draw.

    Args:
      loss_fn: Mean loss of a batch, or a mapping with ``loss``.
      params: The network.
      spec: Where the units lie.
      batches: Tree with a leading axis of batches.
      key: Of the draws.
      dropout_frac: Chance of a unit to be dropped; the others are scaled by 1 / (1 - p).
      draws: Number of draws.
      groups: Groups that are dropped; all that no norm runs over by default.

    Returns:
      The line, the losses at the far ends of all draws, and the masks.

    Raises:
      UserError: As of ``dropout_line``.

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, lemma 3.
    """
    where = "best_dropout_line"
    require(draws > 0, where, "draws must be positive", draws, "Pass, say, 20")
    require_finite(where, params, "params")
    masks = bernoulli_masks(params, spec, key=key, dropout_frac=dropout_frac, groups=groups, draws=draws)
    scale = 1 / (1 - dropout_frac)
    losses = _losses(params, masks, batches, loss_fn, spec, jnp.asarray(scale, jnp.result_type(float)))
    best = jnp.where(jnp.isnan(losses), jnp.inf, losses).argmin()
    chosen = {group: mask[best] for group, mask in masks.items()}
    factors = {group: keep_factors(mask, scale) for group, mask in chosen.items()}
    return DropoutLine(linear_path(params, scale_readers(params, spec, factors)), losses, chosen)


def dropout_output_variance(
    hidden: Float[Array, "n d"], kernel: Float[Array, "d c"], *, dropout_frac: float
) -> Float[Array, "n"]:
    r"""Mean square that dropout of one hidden layer adds to the outputs, exactly.

    $E \lVert f_{drop}(x) - f(x) \rVert^2 = \frac{p}{1 - p} \sum_j \phi_j(x)^2 \lVert W_j \rVert^2$ for independent
    drops with chance p and kept units scaled by 1 / (1 - p). Masks that keep an exact count have another covariance and
    are not covered, nor is dropout in more than one layer.

    Args:
      hidden: Activations of the layer.
      kernel: Weights from the layer to the outputs.
      dropout_frac: p.

    Returns:
      One number an example.

    Raises:
      UserError: Widths that differ, or p outside [0, 1).

    Example:
      >>> dropout_output_variance(jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [1.0]]), dropout_frac=0.5).tolist()
      [13.0]

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, cf. lemma 3; Wager et al. 2013, arXiv 1307.1493, section 2.
    """
    where = "dropout_output_variance"
    require(0 <= dropout_frac < 1, where, "dropout_frac must lie in [0, 1)", dropout_frac, "Pass, say, 0.25")
    fits = hidden.shape[-1] == kernel.shape[0]
    require(fits, where, "hidden and kernel must share the width", (hidden.shape, kernel.shape), "Pass W as [d, c]")
    odds = jnp.asarray(dropout_frac / (1 - dropout_frac), hidden.dtype)
    return odds * jnp.matmul(hidden**2, jnp.sum(kernel**2, axis=1), precision="highest")


@functools.partial(jax.jit, static_argnums=(3, 4))
def _losses(
    params: Params, masks: dict[str, Array], batches: Any, loss_fn: BatchFn, spec: PermutationSpec, scale: Array
) -> Float[Array, "draws"]:
    def at(draw: dict[str, Array]) -> Array:
        factors = {group: jnp.where(mask, scale, jnp.zeros((), scale.dtype)) for group, mask in draw.items()}
        return mean_loss("best_dropout_line", loss_fn, scale_readers(params, spec, factors), batches)

    return jax.lax.map(at, masks)
