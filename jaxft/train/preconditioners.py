r"""Preconditioners of optimisers, from their state: the diagonal P that makes $J P J^\top$ the kernel of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxft.core.checks import is_concrete, require
from jaxft.kernels import RankOne


def second_moment(opt_state: PyTree, *, b2: float) -> PyTree:
    r"""Bias-corrected second moment $\hat v = \nu_t / (1 - \beta_2^t)$ of the Adam state inside an optimiser's state.

    Args:
      opt_state: State of any optimiser that contains ``optax.scale_by_adam``, however nested.
      b2: Decay that the run used.

    Returns:
      A pytree like the parameters.

    Raises:
      UserError: There is no Adam state, more than one, or it has seen no step.

    Example:
      >>> tx = optax.adam(0.1)
      >>> _, state = tx.update(jnp.array([3.0, -2.0]), tx.init(jnp.zeros(2)))
      >>> [round(v, 3) for v in second_moment(state, b2=0.999).tolist()]
      [9.0, 4.0]
    """
    state = _only("second_moment", opt_state, optax.ScaleByAdamState, "optax.adam")
    # Leaves that optax.masked leaves out are None, as in a tree restricted to a parameter mask.
    nu = jax.tree.map(
        lambda x: None if isinstance(x, optax.MaskedNode) else x,
        state.nu,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return optax.tree.bias_correction(nu, b2, state.count)


def adam_preconditioner(second_moment: PyTree, *, eps: float | Array, eps_root: float | Array = 0.0) -> PyTree:
    r"""Diagonal of Adam's preconditioner, $1 / (\sqrt{\hat v + \epsilon_r} + \epsilon)$.

    Args:
      second_moment: Bias-corrected second moment.
      eps: Added to the square root.
      eps_root: Added under it.

    Returns:
      A pytree of the same structure.

    Example:
      >>> adam_preconditioner(jnp.array([1.0, 9.0]), eps=1.0).tolist()
      [0.5, 0.25]
    """
    return jax.tree.map(lambda v: 1 / (jnp.sqrt(v + eps_root) + eps), second_moment)


def adafactor_preconditioner(opt_state: PyTree, params: PyTree, *, factored: bool = False) -> PyTree:
    r"""Diagonal of Adafactor's preconditioner, $1 / \sqrt{r c^\top / \operatorname{mean}(r)}$, of its two moments.

    The moments of rows and columns r and c are of the two longest axes of a leaf; leaves too small to be factored have
    $1 / \sqrt v$. Adafactor's clipping of the update, its scaling by the size of the parameters and its learning rate
    are not part of it: they are one number a leaf and step.

    Args:
      opt_state: State of any optimiser that contains ``optax.scale_by_factored_rms``, as ``optax.adafactor`` does.
      params: Parameters of the run; only their shapes are used.
      factored: Whether a leaf of matrices, whose last two axes are the longest, comes as ``jaxft.kernels.RankOne``,
        with which kernels need not form the gradient.

    Returns:
      A pytree like ``params``.

    Raises:
      UserError: There is no factored state, more than one, it has seen no step, or it belongs to other parameters.

    Example:
      >>> params = jnp.ones((2, 2))
      >>> tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
      >>> grads = jnp.array([[1.0, 2.0], [2.0, 4.0]])
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> adafactor_preconditioner(state, params).tolist()
      [[1.0, 0.5], [0.5, 0.25]]

    Reference:
      Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4.
    """
    where = "adafactor_preconditioner"
    state = _only(where, opt_state, optax.FactoredState, "optax.adafactor")
    trees = jax.tree.structure(params), jax.tree.structure(state.v)
    advice = "Pass the parameters of the same run"
    require(trees[0] == trees[1], where, "opt_state must belong to params", "another tree", advice)

    def of_leaf(param: Array, rows: Array, columns: Array, whole: Array) -> Array | RankOne:
        if whole.shape == param.shape:
            return jax.lax.rsqrt(whole)
        # Adafactor factors the two longest axes and takes row moments by a mean over the longest.
        by_length = np.argsort(param.shape)
        column_axis, row_axis = int(by_length[-1]), int(by_length[-2]) if param.ndim > 1 else 0
        expected = [tuple(np.delete(param.shape, axis)) for axis in (column_axis, row_axis)]
        fits = param.ndim > 1 and [rows.shape, columns.shape] == expected
        require(fits, where, "moments must fit the parameters", (rows.shape, columns.shape, param.shape), advice)
        r, c = jnp.expand_dims(rows, column_axis), jnp.expand_dims(columns, row_axis)
        # As two factors: the product of the moments of an unused row and of a column underflows.
        by_row, by_column = jax.lax.rsqrt(r / r.mean(axis=row_axis, keepdims=True)), jax.lax.rsqrt(c)
        last = param.ndim - 1
        if not factored or {row_axis, column_axis} != {last - 1, last}:
            return by_row * by_column
        down, across = (by_row, by_column) if row_axis == last - 1 else (by_column, by_row)
        return RankOne(down[..., 0], across[..., 0, :])

    return jax.tree.map(of_leaf, params, state.v_row, state.v_col, state.v)


def _only(where: str, opt_state: PyTree, kind: type, optimizer: str):
    """The one state of a kind inside an optimiser's state, after a step at least."""
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, kind)) if isinstance(s, kind)]
    advice = f"Pass the state of a run with {optimizer}, or the branch that has it"
    require(len(found) == 1, where, f"opt_state must hold one {optimizer} state", len(found), advice)
    count = found[0].count
    stepped = not is_concrete(count) or bool((np.asarray(count) > 0).all())
    require(stepped, where, "the optimiser must have taken a step", "count 0", "Train for a step first")
    return found[0]
