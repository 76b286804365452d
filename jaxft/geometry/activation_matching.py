"""Matching of units by what they do: correlations over examples, and the loss at the midpoint."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import leading_size, require, require_finite, require_matching
from jaxft.core.rng import stream
from jaxft.core.trees import tree_add
from jaxft.core.types import Inputs, Params, Transform
from jaxft.core.units import PermutationSpec, unit_counts, unit_stacks
from jaxft.geometry.assignment import Solver, solve_assignment
from jaxft.geometry.barriers import checked_metric
from jaxft.geometry.matching import Matching, weight_matching
from jaxft.geometry.permutations import Permutation, apply_permutation, identity_permutation
from jaxft.geometry.unit_statistics import UnitsFn, unit_correlations


class StraightThrough(NamedTuple):
    """What a straight-through matching found."""

    permutation: Permutation
    """That of the step with the lowest loss."""
    params: Params
    """b, permuted."""
    losses: Float[np.ndarray, "steps"]
    """Loss at the midpoint of a and the permuted b, on the batch of each step, before the step."""


def activation_matching(
    units_fn: UnitsFn,
    a: Params,
    b: Params,
    spec: PermutationSpec,
    x: Inputs,
    *,
    solver: Solver = "scipy",
    eps: float = 1e-6,
    batch_size: int | None = None,
) -> Matching:
    r"""Permutation that maximises, in every group by itself, the summed correlation of matched units over examples.

    One linear assignment a group, no sweeps: what a unit computes does not depend on the order of units below it.
    Groups that ``units_fn`` does not return stay as they are.

    Args:
      units_fn: ``units(params, x)``, by group ``[n, ..., units]``, before or after the activation.
      a: The network that stays.
      b: The network whose units move.
      spec: Where the units lie.
      x: Examples.
      solver: As in ``solve_assignment``.
      eps: Variance added in the correlations, relative to the mean variance of the layer, for dead units.
      batch_size: Examples at a time; ``None`` is all.

    Returns:
      The permutation, b permuted, and the summed correlations of all groups before and after.

    Raises:
      UserError: Trees that do not match, no group in what ``units_fn`` returns, a number of units that does not fit,
        a stacked group, or units that are not finite.

    Reference:
      Li et al. 2016, arXiv 1511.07543; Jordan et al. 2022, arXiv 2211.08403, section 2; Ainsworth et al. 2022, arXiv
      2209.04836, section 3.1.
    """
    where = "activation_matching"
    require_matching(where, a, b, names=("a", "b"))
    groups = unit_groups(where, units_fn, a, x, spec)
    found = unit_correlations(units_fn, a, b, x, eps=eps, batch_size=batch_size, where=where)
    similarities = {group: found[group] for group in groups}
    require_finite(where, similarities, "correlations of units")
    solved = {group: jnp.asarray(solve_assignment(s, solver=solver)) for group, s in similarities.items()}
    before = sum(float(jnp.trace(s)) for s in similarities.values())
    after = sum(float(s[jnp.arange(len(s)), solved[group]].sum()) for group, s in similarities.items())
    permutation = {**identity_permutation(a, spec), **solved}
    return Matching(permutation, apply_permutation(b, spec, permutation), np.array([before, after]))


def unit_groups(where: str, units_fn: UnitsFn, params: Params, x: Inputs, spec: PermutationSpec) -> tuple[str, ...]:
    """Groups of a spec that a function of units returns, checked by shapes.

    Raises:
      UserError: There are none, one is stacked, or has another number of units.
    """
    counts, stacks = unit_counts(params, spec, where=where), unit_stacks(params, spec)
    leading_size(where, x)
    found = jax.eval_shape(units_fn, params, x)
    named = isinstance(found, Mapping)
    require(named, where, "units_fn must return a mapping", type(found).__name__, "Return units by group")
    shapes = {name: z.shape for name, z in found.items()}
    groups = tuple(group for group in spec.groups if group in shapes)
    rule = "units_fn must return units of the spec's groups"
    require(bool(groups), where, rule, f"{sorted(shapes)}, groups {list(counts)}", "Name them as the spec does")
    wrong = [f"{g} {shapes[g]} for {counts[g]} units" for g in groups if not shapes[g] or shapes[g][-1] != counts[g]]
    require(not wrong, where, "units must be the last axis", ", ".join(wrong), "Return [n, ..., units]")
    stacked = [group for group in groups if stacks[group]]
    require(not stacked, where, "groups must not be stacked over layers", stacked, "Use weight_matching")
    return groups


def straight_through_matching(
    loss_fn: Callable[[Params, Inputs], Any],
    a: Params,
    b: Params,
    spec: PermutationSpec,
    batches: Inputs,
    *,
    tx: Transform,
    steps: int,
    key: Array,
    solver: Solver = "scipy",
) -> StraightThrough:
    r"""Permutation of b that lowers the loss at the midpoint, by gradients of a copy that is projected in every step.

    A free copy $\tilde\theta$ starts at a. Each step projects it to the permutation of b nearest to it (weight
    matching, from the last permutation on), takes the gradient of the loss at $\tfrac12 (\theta_a + P\theta_b)$, and
    gives it to $\tilde\theta$ as if the projection were the identity. It costs a matching a step.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, or a dict with ``"loss"``.
      a: The network that stays.
      b: The network whose units move.
      spec: Where the units lie.
      batches: Batches, stacked on the leading axis; step k uses batch k modulo their number.
      tx: An optimiser with ``init`` and ``update``.
      steps: Steps.
      key: Random key of the matchings.
      solver: As in ``solve_assignment``.

    Returns:
      The permutation of the step of lowest loss, b permuted by it, and the losses.

    Raises:
      UserError: As ``weight_matching``; no steps, or a loss that is not finite.

    Reference:
      Ainsworth et al. 2022, arXiv 2209.04836, section 3.3 and algorithm 3.
    """
    where = "straight_through_matching"
    require_matching(where, a, b, names=("a", "b"))
    unit_counts(a, spec, where=where)
    require(steps > 0, where, "steps must be positive", steps, "Pass 1 or more")
    count, metric = leading_size(where, batches), checked_metric(where, loss_fn, a, batches, None)

    def midpoint_loss(moved: Params, batch: Inputs) -> Array:
        value = loss_fn(jax.tree.map(lambda p, q: (p + q) / 2, a, moved), batch)
        return value[metric] if isinstance(value, Mapping) else value

    @jax.jit
    def step(free: Params, state: Any, moved: Params, batch: Inputs) -> tuple[Params, Any, Array]:
        loss, grads = jax.value_and_grad(midpoint_loss)(moved, batch)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            updates, state = tx.update(grads, state, free)
        return tree_add(free, updates), state, loss

    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(a)
    free, best = a, (np.inf, identity_permutation(a, spec))
    permutation, losses = best[1], []
    for k in range(steps):
        matching = weight_matching(free, b, spec, key=stream(key, "step", k), solver=solver, start=permutation)
        permutation = matching.permutation
        batch = jax.tree.map(lambda leaf, i=k % count: leaf[i], batches)
        free, state, loss = step(free, state, matching.params, batch)
        losses.append(float(loss))
        require(
            bool(np.isfinite(losses[-1])),
            where,
            "the loss must be finite",
            f"{losses[-1]} at step {k}",
            "Lower the rate",
        )
        best = min(best, (losses[-1], permutation), key=lambda pair: pair[0])
    return StraightThrough(best[1], apply_permutation(b, spec, best[1]), np.asarray(losses))
