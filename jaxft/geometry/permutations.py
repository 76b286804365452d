"""Permutations of hidden units: applied by gathers, composed, and checked against the outputs of the network.

A permutation is a mapping from a group of a ``PermutationSpec`` to indices, ``[n]`` or, for a group that is stacked
over layers, ``[l, n]``: unit i of the permuted network is unit ``permutation[group][i]`` of the old one. Groups that
it does not name stay as they are.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxft.core.checks import failing_leaves, is_concrete, nearest, require
from jaxft.core.rng import stream
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.core.units import PermutationSpec, UnitAxis, map_named_leaves, named_leaves, unit_counts, unit_stacks

Permutation = Mapping[str, Int[Array | np.ndarray, "..."]]
"""Indices by group."""


def apply_permutation(params: Params, spec: PermutationSpec, permutation: Permutation) -> Params:
    """Moves the units of a network: every leaf is gathered along its unit axes.

    Outputs do not change if the spec is right (``check_spec``) and the network is equivariant, as networks with
    elementwise activations and LayerNorm are; GroupNorm with several groups is not. Gathers move entries and round
    nothing. May be traced.

    Args:
      params: Parameters.
      spec: Where the units lie.
      permutation: Indices by group; absent groups stay as they are.

    Returns:
      The parameters with their units in another order.

    Raises:
      UserError: The spec does not fit the parameters, an unknown group, a wrong shape, or (on concrete input) indices
        that are no permutation.

    Example:
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> params = {"w": jnp.array([[1.0, 2.0, 3.0]]), "v": jnp.array([4.0, 5.0, 6.0])}
      >>> moved = apply_permutation(params, spec, {"hidden": jnp.array([2, 0, 1])})
      >>> moved["w"].tolist(), moved["v"].tolist()
      ([[3.0, 1.0, 2.0]], [6.0, 4.0, 5.0])

    Reference:
      Ainsworth et al. 2022, arXiv 2209.04836, section 2.
    """
    require_permutation("apply_permutation", params, spec, permutation)
    axes, moved = dict(spec.leaves), moving(permutation)
    return map_named_leaves(lambda path, leaf: permute_leaf(leaf, axes.get(path, ()), moved), params)


def moving(permutation: Permutation) -> dict[str, Array]:
    """The groups that move, as far as that is known: gathers of the others would cost and do nothing."""
    still = [
        group
        for group, index in permutation.items()
        if is_concrete(index) and bool((np.asarray(index) == np.arange(np.shape(index)[-1])).all())
    ]
    return {group: jnp.asarray(index) for group, index in permutation.items() if group not in still}


def permute_leaf(leaf: Array | np.ndarray, axes: Sequence[UnitAxis], permutation: Permutation) -> Array:
    """A leaf gathered along the given unit axes, those whose group the permutation names."""
    leaf = jnp.asarray(leaf)
    for axis in axes:
        if axis.units in permutation:
            leaf = _gather(leaf, axis, jnp.asarray(permutation[axis.units]))
    return leaf


def _gather(leaf: Array, axis: UnitAxis, index: Array) -> Array:
    shape, place = leaf.shape, axis.axis
    view = leaf.reshape(*shape[:place], axis.outer, -1, axis.inner, *shape[place + 1 :])
    if axis.stacked:
        view = jax.vmap(lambda layer, i: jnp.take(layer, i, axis=place))(view, index)
    else:
        view = jnp.take(view, index, axis=place + 1)
    return view.reshape(shape)


def identity_permutation(params: Params, spec: PermutationSpec) -> dict[str, Array]:
    """The permutation of every group that moves nothing.

    Args:
      params: Parameters, for the numbers of units.
      spec: Where the units lie.

    Returns:
      Indices by group, each its own place.

    Raises:
      UserError: A spec that does not fit.

    Example:
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)),))
      >>> identity_permutation({"w": jnp.zeros((2, 3))}, spec)["hidden"].tolist()
      [0, 1, 2]
    """
    counts, stacks = unit_counts(params, spec, where="identity_permutation"), unit_stacks(params, spec)
    lone = {group: jnp.arange(n, dtype=jnp.int32) for group, n in counts.items()}
    return {g: jnp.broadcast_to(i[None], (stacks[g], counts[g])) if stacks[g] else i for g, i in lone.items()}


def random_permutation(params: Params, spec: PermutationSpec, *, key: Array) -> dict[str, Array]:
    """A uniform permutation of every group, in each layer of a stacked one.

    Args:
      params: Parameters, for the numbers of units.
      spec: Where the units lie.
      key: Random key; a group draws from a stream of its name, so its draw does not depend on the other groups.

    Returns:
      Indices by group.

    Example:
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)),))
      >>> permutation = random_permutation({"w": jnp.zeros((2, 5))}, spec, key=jax.random.key(0))
      >>> sorted(permutation["hidden"].tolist())
      [0, 1, 2, 3, 4]
    """
    unit_counts(params, spec, where="random_permutation")
    still = identity_permutation(params, spec)
    return {
        group: jax.random.permutation(stream(key, group), index, axis=-1, independent=True)
        for group, index in still.items()
    }


def invert_permutation(permutation: Permutation) -> dict[str, Array]:
    """The permutation that undoes another one.

    Example:
      >>> invert_permutation({"hidden": jnp.array([2, 0, 1])})["hidden"].tolist()
      [1, 2, 0]
    """
    return {group: jnp.argsort(jnp.asarray(index), axis=-1).astype(jnp.int32) for group, index in permutation.items()}


def compose_permutations(first: Permutation, then: Permutation) -> dict[str, Array]:
    """One permutation that does what applying ``first`` and ``then`` one after the other does.

    Args:
      first: Indices by group.
      then: Indices by group; of the units as ``first`` leaves them.

    Returns:
      Indices of all groups that one of the two names.

    Example:
      >>> first, then = {"hidden": jnp.array([2, 0, 1])}, {"hidden": jnp.array([1, 0, 2])}
      >>> compose_permutations(first, then)["hidden"].tolist()
      [0, 2, 1]
    """
    alone = {
        g: jnp.asarray(index) for p, other in ((first, then), (then, first)) for g, index in p.items() if g not in other
    }
    both = {g: jnp.take_along_axis(jnp.asarray(first[g]), jnp.asarray(then[g]), axis=-1) for g in first if g in then}
    return {**both, **alone}


def require_permutation(where: str, params: Params, spec: PermutationSpec, permutation: Permutation) -> None:
    """Raises unless the groups are known, shapes fit, and concrete indices are permutations; all faults at once."""
    counts, stacks = unit_counts(params, spec, where=where), unit_stacks(params, spec)
    for group in permutation:
        require(group in counts, where, "groups must be those of the spec", repr(group), nearest(group, counts))
    faults = []
    for group, index in permutation.items():
        n, layers = counts[group], stacks[group]
        wanted = (layers, n) if layers else (n,)
        if np.shape(index) != wanted or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
            faults.append(
                f"{group}: {jnp.result_type(index)}{list(np.shape(index))} rather than integers {list(wanted)}"
            )
    require(
        not faults,
        where,
        "a permutation must have an index for every unit",
        "; ".join(faults),
        "Make it for this model",
    )
    if is_concrete(permutation):
        bad = [g for g, index in permutation.items() if not (np.sort(index, axis=-1) == np.arange(counts[g])).all()]
        rule = "a permutation must hold every unit once"
        require(
            not bad,
            where,
            rule,
            f"repeated or missing units in {', '.join(bad)}",
            "Use random_permutation or a matching",
        )


def check_spec(
    f: OutputFn, params: Params, spec: PermutationSpec, x: Inputs, *, key: Array, tolerance: float | None = None
) -> float:
    r"""Whether a spec tells the truth: the largest change of outputs as the units of one group after another move.

    Each group moves by a random cycle through all its units. Changes are relative to the largest output:
    $\max |f(P\theta, x) - f(\theta, x)| / \max |f(\theta, x)|$. Groups of one unit cannot be checked. A spec can be
    right and incomplete: units that it does not name are not looked for.

    Args:
      f: Outputs.
      params: Parameters, best random ones (zero biases hide a bias that the spec forgets).
      spec: The spec to be checked.
      x: A few examples.
      key: Random key of the permutations.
      tolerance: Largest change that passes; ``None`` means 1e-5, or 1e-10 for float64 outputs.

    Returns:
      The largest relative change.

    Raises:
      UserError: Outputs change; the message names the groups, and leaves that may have been forgotten.

    Example:
      >>> f = lambda p, x: jnp.maximum(x @ p["w"], 0) @ p["v"]
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> params = {"w": jnp.array([[1.0, -2.0, 3.0]]), "v": jnp.array([4.0, 5.0, 6.0])}
      >>> check_spec(f, params, spec, jnp.ones((2, 1)), key=jax.random.key(0)) <= 1e-5
      True
      >>> check_spec(f, params, PermutationSpec(spec.leaves[:1]), jnp.ones((2, 1)), key=jax.random.key(0))
      Traceback (most recent call last):
      ...
      jaxft.core.checks.UserError: check_spec: permuting a group must leave the outputs as they are, got hidden (...; v
      has an axis of 3 that the spec does not name). Name every axis that produces or reads its units.
    """
    unit_counts(params, spec, where="check_spec")
    # One cycle through all units: a uniform permutation of a few units often leaves them where they are.
    order = random_permutation(params, spec, key=key)
    permutation = compose_permutations(
        invert_permutation(order), {g: jnp.roll(i, 1, axis=-1) for g, i in order.items()}
    )
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(f)
        before = outputs(params, x)
        require(
            not failing_leaves(lambda y: jnp.isfinite(y).all(), before),
            "check_spec",
            "outputs must be finite",
            "NaN or infinity",
            "Check params and x",
        )
        scale = float(jnp.maximum(jnp.abs(before).max(), jnp.finfo(before.dtype).tiny))
        changes = {
            group: float(jnp.abs(outputs(apply_permutation(params, spec, {group: index}), x) - before).max()) / scale
            for group, index in permutation.items()
        }
    tolerance = tolerance or (1e-10 if before.dtype == jnp.float64 else 1e-5)
    wrong = [
        f"{group} (relative change {change:.3g}{_forgotten(params, spec, group)})"
        for group, change in changes.items()
        if not change <= tolerance
    ]
    rule = "permuting a group must leave the outputs as they are"
    advice = "Name every axis that produces or reads its units"
    require(not wrong, "check_spec", rule, ", ".join(wrong), advice)
    return max(changes.values(), default=0.0)


def _forgotten(params: Params, spec: PermutationSpec, group: str) -> str:
    """Leaves with an axis as long as a group, which the spec does not name for it."""
    axes, n = dict(spec.leaves), unit_counts(params, spec)[group]
    named = {(path, axis.axis) for path, of_leaf in axes.items() for axis in of_leaf}
    found = [
        path
        for path, leaf in named_leaves(params).items()
        if any(size == n and (path, i) not in named for i, size in enumerate(np.shape(leaf)))
    ]
    return (
        f"; {', '.join(found[:4])} {'have' if len(found) > 1 else 'has'} an axis of {n} that the spec does not name"
        if found
        else ""
    )
