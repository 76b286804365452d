"""Functions whose outputs depend on the rest of the batch, which have no kernel: found by what they return."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, require
from jaxft.core.types import Inputs, OutputFn, Params

MOST_BY_SIZE = 0.25
"""Change of an output with the size of the batch that may be rounding: programs of other shapes round otherwise, and
networks that compute in half precision by much. To divide by the size changes it by half."""


class Changes(NamedTuple):
    """Of an example's outputs with the rest of its batch, relative to the largest of them."""

    company: Float[Array, ""]
    """Between another example beside it and itself: the same program, so that no rounding enters."""
    size: Float[Array, ""]
    """Between itself beside it and none."""
    tolerance: Float[Array, ""]
    """Of the first."""


def output_changes(f: OutputFn, params: Params, x: Inputs) -> Changes:
    """How the outputs of the first example change with its company: beside the last one, beside itself, alone.

    Three evaluations of f, two of them by one compiled loop. What depends on others in a way that does not show at
    these examples is not found; of one example nothing is.
    """
    last = jax.tree.leaves(x)[0].shape[0] - 1
    if last == 0:
        return Changes(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    def first(rows: Array) -> Array:
        return f(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], x))[0]

    beside_itself, beside_last = jax.lax.map(first, jnp.array([[0, 0], [0, last]]))
    alone = first(jnp.array([0]))
    largest = jnp.abs(jnp.stack([beside_itself, beside_last, alone])).max()
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    company, size = (jnp.abs(beside_itself - other).max() / largest for other in (beside_last, alone))
    return Changes(company, size, jnp.sqrt(jnp.asarray(jnp.finfo(alone.dtype).eps, alone.dtype)))


def require_independent_outputs(where: str, f: OutputFn, params: Params, x: Inputs) -> None:
    """Raises if concrete outputs of the first example change with the rest of the batch; compiles f for it."""
    if is_concrete((params, x)):
        ends = np.array([0, -1][: jax.tree.leaves(x)[0].shape[0]])
        require_small(where, _changes(f, params, jax.tree.map(lambda leaf: leaf[ends], x)))


_changes = jax.jit(output_changes, static_argnums=0)


def require_small(where: str, changes: Changes) -> None:
    """Raises if concrete changes of outputs are more than rounding; silent under tracing."""
    if not is_concrete(changes):
        return
    rule = "outputs of an example must not depend on the rest of its batch"
    advice = "Evaluate with stored statistics: use_running_average, or the evaluation mode of the model"
    shown = f"a relative change of {float(changes.company):.2g} with another example beside it"
    require(not changes.company > changes.tolerance, where, rule, shown, advice)
    shown = f"a relative change of {float(changes.size):.2g} from a batch of one to a batch of two"
    require(not changes.size > MOST_BY_SIZE, where, rule, shown, advice)
