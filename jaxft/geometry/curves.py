r"""Curves of low loss between two points: minimise $E_t L(\theta(t))$ over the interior control points.

The gradient needs no differentiation of the curve: $\partial L(\theta(t)) / \partial c_k = w_k(t) \nabla L(\theta(t))$.
So each t costs one ordinary gradient at one point, and memory holds that gradient and one sum a control point.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import leading_size, require
from jaxft.core.types import Params, Transform
from jaxft.geometry.path_loss import BatchFn, require_finite_losses, scalar_loss
from jaxft.geometry.paths import Curve, accumulation_dtype


class CurveFit(NamedTuple):
    """A fitted curve, and the loss of every step, the mean over its values of t."""

    curve: Curve
    losses: Float[Array, "steps"]


def fit_curve(
    loss_fn: BatchFn,
    curve: Curve,
    batches: Any,
    *,
    tx: Transform,
    steps: int,
    key: Array,
    points_per_step: int = 4,
) -> CurveFit:
    r"""Fits the interior control points of a curve; the ends stay as they are.

    A step takes one batch and ``points_per_step`` values of t, one drawn uniformly in each of as many equal parts of
    [0, 1]: an unbiased estimate of the gradient of $\int_0^1 L(\theta(t))\, dt$ with less variance than one t. The
    integral runs over t, not over arc length. The whole fit is one compiled program.

    Leaves that hold statistics of norms would be trained like weights. For such a model take a loss that normalises by
    the batch (``f(params, x, train=True)`` of ``jaxft.nn.make_convnet``), and re-estimate them on the curve
    (``statistics`` of ``eval_path``).

    Args:
      loss_fn: Mean loss of a batch, or a mapping with ``loss``; the same object again meets a compiled program.
      curve: Where to start, such as ``init_curve(a, b, n_bends=1)``.
      batches: Tree with a leading axis of batches; step s uses batch s modulo their number.
      tx: Optax transform; its state covers the interior points alone.
      steps: Steps.
      key: Of the values of t.
      points_per_step: Values of t, and gradients, a step.

    Returns:
      The curve and its losses.

    Raises:
      UserError: A curve without interior points, numbers out of range, or a loss that is not finite (with its step).

    Example:
      >>> import optax
      >>> from jaxft.geometry import init_curve
      >>> ring = lambda params, _: (jnp.sum(params["w"] ** 2) - 1) ** 2  # low loss on the unit circle
      >>> line = init_curve({"w": jnp.array([-1.0, 0.1])}, {"w": jnp.array([1.0, 0.1])})
      >>> fit = fit_curve(ring, line, jnp.zeros((1, 1)), tx=optax.adam(0.05), steps=300, key=jax.random.key(0))
      >>> bool(ring(line(0.5), None) > 0.9), bool(ring(fit.curve(0.5), None) < 0.1)
      (True, True)

    Reference:
      Garipov et al. 2018, arXiv 1802.10026, equation 2.
    """
    where = "fit_curve"
    require(curve.n_bends > 0, where, "a curve to fit needs interior points", 0, "Make it with n_bends >= 1")
    require(steps > 0 and points_per_step > 0, where, "steps and points_per_step must be positive", steps, "Raise them")
    leading_size(where, batches)
    fitted, losses = _fit(curve, batches, key, loss_fn=loss_fn, tx=tx, steps=steps, n_t=points_per_step)
    require_finite_losses(where, losses)
    return CurveFit(fitted, losses)


def curve_gradient(
    loss_fn: BatchFn, curve: Curve, batch: Any, ts: Float[Array, "points"]
) -> tuple[Float[Array, ""], Params]:
    """Mean loss over values of t, and its gradient by all control points, stacked as they are.

    Args:
      loss_fn: Mean loss of a batch, or a mapping with ``loss``.
      curve: The curve.
      batch: One batch.
      ts: Values of t.

    Returns:
      The loss, and the sum over t of weight times gradient, over the number of values.

    Example:
      >>> curve = Curve({"w": jnp.array([0.0, 1.0, 2.0])}, "bezier")
      >>> loss, gradient = curve_gradient(lambda p, _: p["w"] ** 2, curve, None, jnp.array([0.5]))
      >>> float(loss), gradient["w"].tolist()
      (1.0, [0.5, 1.0, 0.5])

    Reference:
      Garipov et al. 2018, arXiv 1802.10026, section 3.3.
    """
    return _gradient(loss_fn, curve, batch, ts, slice(None))


def _gradient(
    loss_fn: BatchFn, curve: Curve, batch: Any, ts: Float[Array, "points"], chosen: slice
) -> tuple[Float[Array, ""], Params]:
    """Mean loss, and its gradient by the chosen control points."""
    count = ts.shape[0]
    control = jax.tree.map(lambda c: jax.ShapeDtypeStruct(c[chosen].shape, c.dtype), curve.control)

    def loss_at(params: Params) -> Array:
        return scalar_loss("fit_curve", loss_fn, params, batch)

    def at(total: tuple[Array, Params], t: Array) -> tuple[tuple[Array, Params], None]:
        loss, gradient = jax.value_and_grad(loss_at)(curve(t))
        weights = curve.weights(t)[chosen] / count

        def accumulate(s: Array, g: Array) -> Array:
            return s + weights.astype(s.dtype).reshape((-1,) + (1,) * g.ndim) * g.astype(s.dtype)[None]

        return (total[0] + loss / count, jax.tree.map(accumulate, total[1], gradient)), None

    shape = jax.eval_shape(loss_at, curve(ts[0]))
    zeros = jax.tree.map(lambda c: jnp.zeros(c.shape, accumulation_dtype(c.dtype)), control)
    start = jnp.zeros((), shape.dtype), zeros
    if count == 1:
        (loss, gradient), _ = at(start, ts[0])
    else:
        (loss, gradient), _ = jax.lax.scan(at, start, ts)
    return loss, jax.tree.map(lambda g, c: g.astype(c.dtype), gradient, control)


@functools.partial(jax.jit, static_argnames=("loss_fn", "tx", "steps", "n_t"))
def _fit(
    curve: Curve, batches: Any, key: Array, *, loss_fn: BatchFn, tx: Transform, steps: int, n_t: int
) -> tuple[Curve, Float[Array, "steps"]]:
    ends = jax.tree.map(lambda c: (c[:1], c[-1:]), curve.control)
    count = leading_size("fit_curve", batches)

    def whole(interior: Params) -> Curve:
        joined = jax.tree.map(lambda x, end: jnp.concatenate([end[0], x, end[1]]), interior, ends)
        return dataclasses.replace(curve, control=joined)

    def step(state: tuple[Params, Any], number: Array) -> tuple[tuple[Params, Any], Array]:
        interior, opt_state = state
        batch = jax.tree.map(lambda x: x[number % count], batches)
        dtype = jnp.result_type(float)
        u = jax.random.uniform(jax.random.fold_in(key, number), (n_t,), dtype)
        ts = (jnp.arange(n_t, dtype=dtype) + u) / n_t
        loss, gradient = _gradient(loss_fn, whole(interior), batch, ts, slice(1, -1))
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            updates, opt_state = tx.update(gradient, opt_state, interior)
            interior = jax.tree.map(lambda p, du: (p + du).astype(p.dtype), interior, updates)
        return (interior, opt_state), loss

    interior = jax.tree.map(lambda c: c[1:-1], curve.control)
    with jax.numpy_dtype_promotion("standard"):
        state = interior, tx.init(interior)
    (interior, _), losses = jax.lax.scan(step, state, jnp.arange(steps))
    return whole(interior), losses
