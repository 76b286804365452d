r"""Directions in parameter space: the one a loss of log-probabilities drives in, and what any update does to outputs.

A loss of log-probabilities enters by its two slopes alone, $f_\pm = \partial l / \partial \ln \pi(y_\pm)$, as
``jaxft.tuning.loss_slopes`` gives them. One backward pass gives the direction of a step, and one forward derivative
what it does to first order: no gradient of a single example is formed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import leading_size, nearest, require
from jaxft.core.precision import accumulator
from jaxft.core.trees import tree_add, tree_combine, tree_scale
from jaxft.core.types import Inputs, OutputFn, Params, Transform
from jaxft.kernels.calls import trained_preconditioner
from jaxft.kernels.masks import split_params
from jaxft.kernels.one_step import DIRECTIONS, RuleName
from jaxft.kernels.preconditioners import dense_diagonal


def flow_direction(
    f: OutputFn,
    params: Params,
    batch: Inputs,
    slopes: Float[Array | np.ndarray, "n s"],
    *,
    rule: RuleName = "sgd",
    preconditioner: PyTree | None = None,
    transform: Transform | None = None,
    opt_state: PyTree | None = None,
    param_mask: PyTree | None = None,
    batch_size: int | None = None,
) -> Params:
    r"""Direction in which the mean of a loss of log-probabilities drives the parameters: one backward pass.

    The gradient is $g = \tfrac1n \sum_i \sum_s f_{is} \nabla \ln \pi_{is}$, and the direction $-g$,
    $-\operatorname{sign} g$ or $-P g$ (of gradient descent, sign descent, a frozen preconditioner such as Adam's), or
    with ``transform`` the very update that the optimiser would make next, its momentum and learning rate included.

    Args:
      f: Log-probabilities ``[n, r]`` of responses, as ``jaxft.nn.make_response_log_probs`` gives them.
      params: Parameters.
      batch: Examples whose mean loss is followed.
      slopes: Derivatives of each example's loss by its first s log-probabilities; the others count 0.
      rule: ``"sgd"``, ``"signgd"`` or ``"preconditioned"``.
      preconditioner: The diagonal of P like ``params`` (``jaxft.train.adam_preconditioner``); goes with its rule.
      transform: An optax transform, in the place of a rule.
      opt_state: Its state.
      param_mask: The parameters that are trained (``jaxft.kernels.parameter_mask``); ``None`` means all. To a
        ``transform`` frozen ones have gradient 0, and what it does to them is left out.
      batch_size: Examples whose activations are held at once; ``None`` means all.

    Returns:
      A tree like ``params``, 0 where frozen.

    Raises:
      UserError: Slopes that do not fit, an unknown rule, a missing or stray preconditioner, a rule beside a transform,
        a transform without its state.

    Example:
      >>> f = lambda w, x: x @ w
      >>> flow_direction(f, jnp.ones((2, 2)), jnp.array([[1.0, 2.0]]), jnp.array([[-0.5, 0.5]])).tolist()
      [[0.5, -0.5], [1.0, -1.0]]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, section 4.1 (gradient flow) and proposition 2.
    """
    where = "flow_direction"
    require(rule in DIRECTIONS, where, "unknown rule", repr(rule), nearest(str(rule), DIRECTIONS))
    alone = transform is None or (rule == "sgd" and preconditioner is None)
    require(alone, where, "a transform goes without a rule or preconditioner", "both", "Pass one of them")
    advice = "Pass transform=tx, opt_state=tx.init(params) or the state of a run"
    require((transform is None) == (opt_state is None), where, "a transform goes with its state", "one of them", advice)
    trained, frozen = split_params(where, params, param_mask)
    diagonal = trained_preconditioner(where, (rule,), params, trained, preconditioner, param_mask)
    diagonal = dense_diagonal(diagonal, trained)
    grads = _mean_gradient(where, f, trained, frozen, batch, slopes, batch_size)
    if transform is not None:
        with jax.numpy_dtype_promotion("standard"):
            whole = tree_combine(grads, _zeros(frozen))
            updates = transform.update(whole, opt_state, params)[0]
        # What decays weights would move frozen ones too.
        return tree_combine(split_params(where, updates, param_mask)[0], _zeros(frozen))
    direction = jax.tree.map(DIRECTIONS[rule], grads, grads if diagonal is None else diagonal)
    return tree_combine(tree_scale(-1.0, direction), _zeros(frozen))


def _mean_gradient(
    where: str, f: OutputFn, trained: Params, frozen: Params, batch: Inputs, slopes: Any, batch_size: int | None
) -> Params:
    n = leading_size(where, batch)
    fits = np.ndim(slopes) == 2 and np.shape(slopes)[0] == n
    require(fits, where, f"slopes must be [{n}, s], a row an example", np.shape(slopes), "Use loss_slopes")
    weights = jnp.asarray(slopes) / n
    parts = []
    for rows, new in _blocks(where, n, batch_size):
        block, part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (batch, weights))
        part = jnp.where(jnp.asarray(new)[:, None], part, 0)
        parts = [_pulled(f, trained, frozen, block, part, *parts)]
    return jax.tree.map(lambda g, p: g.astype(p.dtype), parts[0], trained)


@functools.partial(jax.jit, static_argnums=0)
def _pulled(f: OutputFn, trained: Params, frozen: Params, block: Inputs, weights: Array, total: Any = None) -> Params:
    out, pull = jax.vjp(lambda p: f(tree_combine(p, frozen), block), trained)
    fits = out.ndim == 2 and out.shape[1] >= weights.shape[1]
    rule = f"f must return [n, r] with a log-probability for each of {weights.shape[1]} slopes"
    require(fits, "flow_direction", rule, out.shape, "Use make_response_log_probs")
    cotangent = jnp.pad(weights, ((0, 0), (0, out.shape[1] - weights.shape[1]))).astype(out.dtype)
    grads = jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), pull(cotangent)[0])
    return grads if total is None else tree_add(total, grads)


def predicted_changes(
    f: OutputFn, params: Params, batch: Inputs, update: Params, *, batch_size: int | None = None
) -> Array:
    r"""Change of any outputs along an update, to first order: $\nabla f(\theta)\, u$, one forward derivative.

    With the update of an optimiser (of ``flow_direction`` with ``transform``, or taken from a run) the prediction of a
    step; with a direction of flow, the rate. Signs and momentum included: nothing but the size of the step is an
    approximation. Take ``f(params + update) - f(params)`` for what happens.

    Args:
      f: Outputs with a leading axis of examples: log-probabilities ``[n, r]``, by token ``[n, r, k]``, logits.
      params: Parameters before the step.
      batch: Examples to follow, which need not be those of the update.
      update: A tree like ``params``; it is taken in the parameters' types.
      batch_size: Examples at a time; ``None`` means all.

    Returns:
      The change, in the shape of the outputs.

    Raises:
      UserError: A batch size below 1, or an update of another tree or other shapes.

    Example:
      >>> predicted_changes(lambda w, x: w**2 * x, jnp.array(1.0), jnp.ones(2), jnp.array(-0.25)).tolist()
      [-0.5, -0.5]
    """
    return changes_along("predicted_changes", f, False, params, batch, update, batch_size)[1]


def changes_along(
    where: str, f: OutputFn, distribution: bool, params: Params, batch: Inputs, update: Params, batch_size: int | None
) -> tuple[Array, Array]:
    """Outputs, or the logarithms of the distributions that they are logits of, and their changes."""
    n = leading_size(where, batch)
    trees = [jax.tree.map(jnp.shape, tree) for tree in (params, update)]
    advice = "Use flow_direction, or the updates of optax"
    require(trees[0] == trees[1], where, "update must have the tree and shapes of params", "another", advice)
    update = jax.tree.map(lambda u, p: jnp.asarray(u).astype(jnp.result_type(p)), update, params)
    out = []
    for rows, _ in _blocks(where, n, batch_size):
        block = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        out.append(_pushed(f, distribution, params, update, block))
    values, changes = (jnp.concatenate(parts)[:n] for parts in zip(*out, strict=True))
    return values, changes


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pushed(f: OutputFn, distribution: bool, params: Params, update: Params, block: Inputs) -> tuple[Array, Array]:
    def outputs(p: Params) -> Array:
        out = f(p, block)
        if not distribution:
            return out
        require(out.ndim == 2, "who_gains", "logits_fn must return [n, v]", out.shape, "Use make_first_token_logits")
        return log_distribution(out)

    return jax.jvp(outputs, (params,), (update,))


def _blocks(where: str, n: int, size: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Examples of every block, and which are new: the last block is filled up with copies of the final example."""
    rule = "batch_size must be at least 1"
    require(size is None or size >= 1, where, rule, size, "Use None, or what memory allows")
    size = min(size or n, n)
    index = np.arange(-(-n // size) * size).reshape(-1, size)
    return [(np.minimum(rows, n - 1), rows < n) for rows in index]


def log_distribution(logits: Float[Array, "n v"]) -> Float[Array, "n v"]:
    """Logarithms of softmax, in float32 at least."""
    return jax.nn.log_softmax(logits.astype(accumulator(logits.dtype)), axis=-1)


def _zeros(frozen: Params) -> Params:
    return jax.tree.map(jnp.zeros_like, frozen)
