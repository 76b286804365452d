"""The exact maximum of the loss on the constructive path, from 2 H + 2 losses and no path."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec
from jaxft.geometry.dropout_path import require_path_inputs
from jaxft.geometry.dropout_stability import Masks, start_layer_losses
from jaxft.geometry.path_loss import BatchFn


class Certificate(NamedTuple):
    """What the loss is at most, everywhere on the path of ``dropout_path`` with the same masks."""

    maximum: Float[Array, ""]
    """Largest of the losses below: the maximum on the path, and it is attained."""
    bound: Float[Array, ""]
    """Theorem 1: the larger of the losses at the ends plus the larger epsilon; the maximum is no greater."""
    loss_a: Float[Array, ""]
    loss_b: Float[Array, ""]
    epsilon_a: Float[Array, ""]
    """Largest rise of A's loss when the layers from some start layer on are dropped; 0 if it never rises."""
    epsilon_b: Float[Array, ""]
    losses_a: Float[Array, "layers"]
    """Losses of A's dropout networks: the last hidden layer dropped, the last two, ..., all."""
    losses_b: Float[Array, "layers"]
    vacuous: Bool[Array, ""] | None
    """Whether the maximum is not below the baseline: then another path may be better; None without a baseline."""


def path_certificate(
    loss_fn: BatchFn,
    params_a: Params,
    params_b: Params,
    spec: PermutationSpec,
    masks_a: Masks,
    masks_b: Masks,
    batches: Any,
    *,
    baseline: float | Array | None = None,
) -> Certificate:
    r"""Maximum over the path: $\max\{L(\theta^A), L(\theta^B), L(\theta^A_k), L(\theta^B_k) : k = 1 \ldots H\}$.

    On ``dead`` and ``switch`` moves the loss is constant, on ``top`` moves it lies below its chord, and breakpoints
    compute what one of these networks computes. That takes a loss that is convex in the outputs and outputs that are
    linear in the top layer; neither is checked here (``check_moves`` looks at the latter). Batches are gone through one
    at a time, one network at a time, in one compiled program; it works inside jit.

    Args:
      loss_fn: Mean loss of a batch, or a mapping with ``loss``; the same object again meets a compiled program.
      params_a: One end.
      params_b: Other end.
      spec: Where the hidden units lie.
      masks_a: Units of A that are kept, at most half of each layer.
      masks_b: Units of B that are kept.
      batches: Tree with a leading axis of batches.
      baseline: Loss to compare with, such as that of guessing or the maximum on the straight line.

    Returns:
      The certificate.

    Raises:
      UserError: As of ``dropout_path``.

    Example:
      >>> from jaxft.core.units import UnitAxis
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> a = {"w": jnp.array([[1.0, 1.0]]), "v": jnp.array([[1.0], [0.0]])}
      >>> loss = lambda p, x: jnp.mean((x @ p["w"] @ p["v"] - x) ** 2)
      >>> left = {"hidden": jnp.array([True, False])}
      >>> found = path_certificate(loss, a, a, spec, left, {"hidden": ~left["hidden"]}, jnp.ones((1, 1, 1)))
      >>> [float(x) for x in (found.loss_a, found.epsilon_a, found.epsilon_b, found.maximum)]
      [0.0, 1.0, 1.0, 1.0]

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, theorem 1.
    """
    chain = require_path_inputs("path_certificate", params_a, params_b, spec, masks_a, masks_b)
    masks = [{g: jnp.asarray(m[g]) for g in chain.groups} for m in (masks_a, masks_b)]
    losses_a = _losses(params_a, masks[0], batches, loss_fn, spec, chain.groups)
    losses_b = _losses(params_b, masks[1], batches, loss_fn, spec, chain.groups)
    epsilon_a, epsilon_b = (jnp.maximum(x[1:].max() - x[0], 0) for x in (losses_a, losses_b))
    bound = jnp.maximum(losses_a[0], losses_b[0]) + jnp.maximum(epsilon_a, epsilon_b)
    maximum = jnp.maximum(losses_a.max(), losses_b.max())
    vacuous = None if baseline is None else ~(maximum < jnp.asarray(baseline, maximum.dtype))
    ends = losses_a[0], losses_b[0], epsilon_a, epsilon_b
    return Certificate(maximum, bound, *ends, losses_a[1:], losses_b[1:], vacuous)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _losses(
    params: Params,
    masks: dict[str, Array],
    batches: Any,
    loss_fn: BatchFn,
    spec: PermutationSpec,
    groups: tuple[str, ...],
) -> Float[Array, "networks"]:
    draw = {group: mask[None] for group, mask in masks.items()}
    loss, losses = start_layer_losses("path_certificate", loss_fn, params, spec, draw, batches, groups)
    return jnp.concatenate([loss[None], losses[0]])
