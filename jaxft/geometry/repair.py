"""REPAIR: a merged network whose units have the means and deviations of the networks that it was merged of."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import require, require_finite, require_matching
from jaxft.core.types import Inputs, Params
from jaxft.core.units import PermutationSpec, UnitAxis, map_named_leaves
from jaxft.geometry.activation_matching import unit_groups
from jaxft.geometry.unit_statistics import UnitsFn, unit_moments


def repair(
    units_fn: UnitsFn,
    merged: Params,
    a: Params,
    b: Params,
    spec: PermutationSpec,
    x: Inputs,
    *,
    alpha: float = 0.5,
    eps: float = 1e-5,
    batch_size: int | None = None,
) -> Params:
    r"""Scales and shifts units so that their mean and deviation over ``x`` are interpolated between a and b.

    For every unit, with means $\mu$ and deviations $\sigma$ of what enters its activation, the merged $z$ becomes
    $(z - \mu) \sigma' / \sigma + \mu'$, $\mu' = (1 - \alpha) \mu_a + \alpha \mu_b$ and $\sigma'$ alike. Groups are done
    in the order of the spec, which must be that of the network; the statistics of later ones are those behind the
    repaired earlier ones. Outputs of the network itself are left alone.

    Args:
      units_fn: ``units(params, x)``: by group, what enters the activation, ``[n, ..., units]``.
      merged: The network to be repaired, such as the midpoint of a and b.
      a: The first endpoint.
      b: The second, its units permuted towards a.
      spec: Where the units lie. Each group needs a bias: ``.../scale`` and ``.../bias`` of a norm where it has one,
        else ``.../kernel`` and ``.../bias``.
      x: Examples for the statistics.
      alpha: Weight of b.
      eps: A unit whose deviation is below ``eps`` times that of its layer or its mean is shifted and not scaled: it
        shows rounding.
      batch_size: Examples at a time; ``None`` is all.

    Returns:
      The repaired parameters.

    Raises:
      UserError: Trees that do not match, alpha outside [0, 1], a group without bias or stacked, or units that do not
        fit the spec.

    Reference:
      Jordan et al. 2022, arXiv 2211.08403, section 3, equation 2.
    """
    where = "repair"
    require_matching(where, a, b, names=("a", "b"))
    require_matching(where, a, merged, names=("a", "merged"))
    require(0 <= alpha <= 1, where, "alpha must lie in [0, 1]", alpha, "Pass the weight of b in the merge")
    groups = unit_groups(where, units_fn, merged, x, spec)
    leaves = {group: affine_leaves(spec, group) for group in groups}
    ends = [unit_moments(units_fn, side, x, batch_size=batch_size, where=where) for side in (a, b)]
    require_finite(where, ends, "units of a and b")
    for group in groups:
        (mean_a, var_a), (mean_b, var_b) = (side[group] for side in ends)
        mean, variance = unit_moments(units_fn, merged, x, batch_size=batch_size, where=where)[group]
        weight = jnp.asarray(alpha, mean.dtype)
        target = (1 - weight) * mean_a + weight * mean_b
        deviation, wanted = jnp.sqrt(variance), (1 - weight) * jnp.sqrt(var_a) + weight * jnp.sqrt(var_b)
        alive = deviation > jnp.asarray(eps, mean.dtype) * (deviation.mean() + jnp.abs(mean))
        scale = jnp.where(alive, wanted / jnp.where(alive, deviation, 1), 1)
        axes = {path: axis for path, axis in spec.of_group(group, reads=False) if path in leaves[group]}
        merged = _rescaled(merged, axes, leaves[group][-1], scale, target - scale * mean)
    return merged


def affine_leaves(spec: PermutationSpec, group: str) -> tuple[str, ...]:
    """The leaves that scale and shift a group: those of its norm, if it has one, else kernel and bias.

    The last is that which shifts.

    Raises:
      UserError: There is no bias; the message lists the leaves that produce the group.

    Example:
      >>> from jaxft.core.units import UnitAxis
      >>> spec = PermutationSpec((("in/kernel", (UnitAxis("hidden", 1),)), ("in/bias", (UnitAxis("hidden", 0),))))
      >>> affine_leaves(spec, "hidden")
      ('in/kernel', 'in/bias')
    """
    paths = [path for path, axis in spec.of_group(group, reads=False)]
    norms = [path.removesuffix("scale") for path in paths if path.endswith("/scale")]
    layer = norms[-1] if norms else None
    scales = [f"{layer}scale"] if norms else [path for path in paths if path.endswith("/kernel")]
    shifts = [path for path in paths if path.endswith("/bias") and (layer is None or path.startswith(layer))]
    rule = f"group {group} needs scales and one bias to be repaired"
    advice = "Train with biases or norms, or repair other groups"
    require(bool(scales) and len(shifts) == 1, "repair", rule, f"leaves {paths}", advice)
    return (*scales, shifts[0])


def _rescaled(
    params: Params, axes: Mapping[str, UnitAxis], shift_path: str, scale: Float[Array, "d"], shift: Float[Array, "d"]
) -> Params:
    def along(values: Array, path: str, leaf: Array) -> Array:
        axis = axes[path]
        shape = [1] * leaf.ndim
        shape[axis.axis] = leaf.shape[axis.axis]
        return jnp.tile(jnp.repeat(values, axis.inner), axis.outer).astype(leaf.dtype).reshape(shape)

    def changed(path: str, leaf: Array) -> Array:
        if path not in axes:
            return leaf
        scaled = leaf * along(scale, path, leaf)
        return scaled + along(shift, path, leaf) if path == shift_path else scaled

    return map_named_leaves(changed, params)
