"""How kernel-like a fine-tuned network is: tangent model, output derivative, drift of gradients and kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxft.core.checks import require
from jaxft.core.trees import tree_sub
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.dynamics import LossFn
from jaxft.kernels.jacobian import output_jacobian, output_shape


class KernelDrift(NamedTuple):
    """Change of a kernel."""

    relative_norm: Float[Array, ""]
    """Frobenius norm of the change over that of the first kernel."""
    cosine: Float[Array, ""]
    """Frobenius inner product of the two over the product of their norms; 1 if only the scale changed."""


def linearize(f: OutputFn, params0: Params) -> OutputFn:
    r"""The tangent model $f_{lin}(\theta, x) = f(\theta_0, x) + \nabla f(\theta_0, x) \cdot (\theta - \theta_0)$.

    Args:
      f: Any function of parameters and inputs.
      params0: Point of linearisation.

    Returns:
      A function with the arguments of ``f``; no Jacobian is formed.

    Example:
      >>> f_lin = linearize(lambda w, x: w**2 * x, jnp.array(1.0))
      >>> float(f_lin(jnp.array(1.5), jnp.array(1.0)))
      2.0

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, definition 3.2 (linearization).
    """

    def f_lin(params: Params, x: Inputs) -> Array:
        value, change = jax.jvp(lambda p: f(p, x), (params0,), (tree_sub(params, params0),))
        return value + change

    return f_lin


def output_derivative(
    loss: LossFn, outputs: Float[Array, "n"] | Float[Array, "n c"], labels: Int[Array, "n"] | Float[Array, "n ..."]
) -> Float[Array, "n"] | Float[Array, "n c"]:
    r"""$\chi_i = \partial \ell(f_i, y_i) / \partial f_i$ of each example; softmax minus one-hot for cross-entropy.

    Args:
      loss: Mean loss of a batch of outputs.
      outputs: Outputs of the network.
      labels: Labels as ``loss`` takes them.

    Returns:
      The derivative, in the shape of ``outputs``.

    Example:
      >>> half_square = lambda f, y: 0.5 * jnp.mean((f - y) ** 2)
      >>> output_derivative(half_square, jnp.array([1.0, 0.0]), jnp.array([0.0, 0.0])).tolist()
      [1.0, 0.0]

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, definition 3.1.
    """
    return jax.grad(loss)(outputs, labels) * jnp.asarray(outputs.shape[0], outputs.dtype)


def linearization_gap(f: OutputFn, params0: Params, params1: Params, x: Inputs) -> Float[Array, ""]:
    r"""Error of the tangent model relative to the change it should explain.

    $\lVert f(\theta_1) - f_{lin}(\theta_1) \rVert / \lVert f(\theta_1) - f(\theta_0) \rVert$ over all outputs at ``x``:
    0 for a model linear in its parameters; NaN if the outputs did not move.

    Args:
      f: Outputs.
      params0: Parameters before fine-tuning.
      params1: Parameters after it.
      x: Inputs.

    Returns:
      The relative error of the tangent model.

    Example:
      >>> float(linearization_gap(lambda w, x: w * x, jnp.array(1.0), jnp.array(3.0), jnp.ones(2)))
      0.0

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 6 (linearization).
    """
    before, change = jax.jvp(lambda p: f(p, x), (params0,), (tree_sub(params1, params0),))
    after = f(params1, x)
    return jnp.linalg.norm(after - before - change) / jnp.linalg.norm(after - before)


def feature_drift(
    f: OutputFn,
    params0: Params,
    params1: Params,
    x: Inputs,
    *,
    param_mask: PyTree | None = None,
    block_size: int = 8,
) -> Float[Array, "n"] | Float[Array, "n c"]:
    r"""Relative distance of every output's gradient before and after.

    $\lVert \nabla f(x; \theta_1) - \nabla f(x; \theta_0) \rVert / \lVert \nabla f(x; \theta_0) \rVert$: 0 everywhere is
    the fixed-features half of kernel behaviour. Memory: ``2 * block_size * c * p`` numbers.

    Args:
      f: Outputs ``[n]`` or ``[n, c]``.
      params0: Parameters before fine-tuning.
      params1: Parameters after it.
      x: Inputs.
      param_mask: Leaves whose gradients count (see ``parameter_mask``); ``None`` means all.
      block_size: Examples whose gradients are held at once.

    Returns:
      The relative distance, in the shape of the outputs; the paper reports its mean.

    Raises:
      UserError: Outputs of another shape, a mask that does not fit, or a block size below 1.

    Example:
      >>> feature_drift(lambda w, x: w**2 * x, jnp.array(1.0), jnp.array(1.5), jnp.ones(2)).tolist()
      [0.5, 0.5]

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 6 (fixed features).
    """
    where = "feature_drift"
    shape = output_shape(where, f, params0, x)
    require(block_size >= 1, where, "block_size must be at least 1", block_size, "Use 8, or what memory allows")

    # A loop over the two, rather than two calls, halves what has to be compiled.
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), params0, params1)

    def of_one(example: Inputs) -> Array:
        one = jax.tree.map(lambda leaf: leaf[None], example)
        jacobians = jax.lax.map(lambda params: output_jacobian(f, params, one, param_mask=param_mask), both)
        before, after = (jax.tree.map(lambda leaf, i=i: leaf[i], jacobians) for i in (0, 1))
        change = _norms(tree_sub(after, before), len(shape))
        return (change / _norms(before, len(shape)))[0]

    return jax.lax.map(of_one, x, batch_size=min(block_size, shape[0]))


def kernel_drift(kernel0: Float[Array, "n ..."], kernel1: Float[Array, "n ..."]) -> KernelDrift:
    """Change from one kernel to another: relative Frobenius norm and cosine.

    Args:
      kernel0: Kernel before fine-tuning.
      kernel1: Kernel of the same points after it.

    Returns:
      The two numbers.

    Raises:
      UserError: Shapes differ.

    Example:
      >>> drift = kernel_drift(jnp.eye(2), 3 * jnp.eye(2))
      >>> float(drift.relative_norm), round(float(drift.cosine), 6)
      (2.0, 1.0)
    """
    same = kernel0.shape == kernel1.shape
    require(same, "kernel_drift", "kernels must share a shape", (kernel0.shape, kernel1.shape), "Use the same points")
    size0, size1 = jnp.linalg.norm(kernel0.ravel()), jnp.linalg.norm(kernel1.ravel())
    inner = jnp.vdot(kernel0, kernel1, precision="highest")
    return KernelDrift(jnp.linalg.norm((kernel1 - kernel0).ravel()) / size0, inner / (size0 * size1))


def _norms(jacobian, outputs_ndim: int) -> Array:
    """Norm over parameters of each output's gradient."""
    squares = [jnp.sum(leaf**2, axis=tuple(range(outputs_ndim, leaf.ndim))) for leaf in jax.tree.leaves(jacobian)]
    return jnp.sqrt(sum(squares[1:], squares[0]))
