"""One step of an optimiser: what the gradients at the start predict for the outputs, beside what happens."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxft.core.checks import nearest, require, require_finite
from jaxft.core.trees import tree_add, tree_combine, tree_scale
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.calls import trained_preconditioner
from jaxft.kernels.dynamics import LossFn
from jaxft.kernels.jacobian import output_shape
from jaxft.kernels.masks import split_params
from jaxft.kernels.preconditioners import dense_diagonal

RuleName = Literal["sgd", "signgd", "preconditioned"]

DIRECTIONS: Mapping[str, Callable[[Array, Any], Array]] = {
    "sgd": lambda gradient, _: gradient,
    "signgd": lambda gradient, _: jnp.sign(gradient),
    "preconditioned": lambda gradient, p: gradient * p,
}
"""Rule -> map of a leaf of the batch gradient and its preconditioner (``None`` but for "preconditioned")."""


class OneStep(NamedTuple):
    """Change of the test outputs over one step."""

    predicted: Float[Array, "m"] | Float[Array, "m c"]
    """To first order in the step."""
    measured: Float[Array, "m"] | Float[Array, "m c"]
    """By taking it."""


def one_step_prediction(
    f: OutputFn,
    params: Params,
    x: Inputs,
    labels: Int[Array, "n"] | Float[Array, "n ..."],
    x_test: Inputs,
    loss: LossFn,
    *,
    learning_rate: float | Float[Array, ""],
    rule: RuleName = "sgd",
    preconditioner: PyTree | None = None,
    param_mask: PyTree | None = None,
) -> OneStep:
    r"""Change of outputs over one step $\theta - \eta\, d$, to first order and in fact.

    ==================  ======================  ==================================================================
    ``sgd``             $d = g$                 predicted: $-\eta\, K(x', x)\, \chi / n$, K the NTK
    ``signgd``          $d = \mathrm{sign}(g)$  a kernel of the examples predicts it only for one example of one
                                                output: $-\eta\, K(x', x)\, \mathrm{sign}(\chi)$, K asymmetric
    ``preconditioned``  $d = P g$               as ``sgd`` with $K = J_{x'} P J_x^\top$, P diagonal
    ==================  ======================  ==================================================================

    g is the gradient of the mean loss and $\chi$ the derivative of each example's loss by its outputs. No kernel is
    formed: the prediction is the derivative of the outputs along the step, whatever the rule. The two differ by the
    second order in $\eta$; in float32 a small step drowns in the rounding of the measured difference. Steps with
    momentum are not covered.

    Args:
      f: Outputs ``[n]`` or ``[n, c]``.
      params: Parameters before the step.
      x: Examples of the batch.
      labels: Their labels as ``loss`` takes them.
      x_test: Points whose outputs are followed.
      loss: Mean loss of a batch of outputs.
      learning_rate: Step size.
      rule: Name of the rule.
      preconditioner: The diagonal of P as a tree like ``params``; goes with ``preconditioned``.
      param_mask: The parameters that are trained (see ``parameter_mask``); ``None`` means all.

    Returns:
      The predicted and the measured change, in the shape of the test outputs.

    Raises:
      UserError: An unknown rule, a missing or ill-fitting preconditioner, non-finite parameters, outputs of another
        shape.

    Example:
      >>> half_square = lambda f, y: 0.5 * jnp.mean((f - y) ** 2)
      >>> one = jnp.ones(1)
      >>> step = one_step_prediction(lambda w, x: w**2 * x, jnp.array(1.0), one, 0 * one, one, half_square,
      ...     learning_rate=0.25)
      >>> step.predicted.tolist(), step.measured.tolist()
      ([-1.0], [-0.75])

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, definition 3.2 (linearization) and section 3.
    """
    where = "one_step_prediction"
    require(rule in DIRECTIONS, where, "unknown rule", repr(rule), nearest(str(rule), DIRECTIONS))
    output_shape(where, f, params, x)
    output_shape(where, f, params, x_test)
    require_finite(where, params, "params")
    trained, frozen = split_params(where, params, param_mask)
    diagonal = trained_preconditioner(where, (rule,), params, trained, preconditioner, param_mask)
    diagonal = dense_diagonal(diagonal, trained)

    def outputs(p: Params, inputs: Inputs) -> Array:
        return f(tree_combine(p, frozen), inputs)

    gradient = jax.grad(lambda p: loss(outputs(p, x), labels))(trained)
    # Without a preconditioner the second argument of a direction is not read.
    direction = jax.tree.map(DIRECTIONS[rule], gradient, gradient if diagonal is None else diagonal)
    step = tree_scale(-learning_rate, direction)
    before, predicted = jax.jvp(lambda p: outputs(p, x_test), (trained,), (step,))
    return OneStep(predicted, outputs(tree_add(trained, step), x_test) - before)
