"""Discrete descent in function space: what a linearised network does under an optimiser, by its kernel alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.core.checks import require

LossFn = Callable[[Array, Array], Array]
"""``loss(outputs, labels)``: mean over the examples of a batch."""


class KernelTrajectory(NamedTuple):
    """Outputs before the first step and after every step."""

    train: Float[Array, "steps1 n c"] | Float[Array, "steps1 n"]
    test: Float[Array, "steps1 m c"] | Float[Array, "steps1 m"] | None


def kernel_gradient_descent(
    kernel: Float[Array, "n n"] | Float[Array, "n c n c"],
    f0: Float[Array, "n"] | Float[Array, "n c"],
    labels: Int[Array, "n"] | Float[Array, "n ..."],
    loss: LossFn,
    *,
    learning_rate: float | Float[Array, "steps"],
    steps: int,
    batches: Int[Array, "steps b"] | None = None,
    b1: float = 0.0,
    sign: bool = False,
    kernel_test: Float[Array, "m n"] | Float[Array, "m c n c"] | None = None,
    f0_test: Float[Array, "m"] | Float[Array, "m c"] | None = None,
) -> KernelTrajectory:
    r"""Outputs under descent with a constant kernel.

    $f_{t+1} = f_t - \eta_t K s_t / (1 - b_1^t)$ with $s_t = b_1 s_{t-1} + (1 - b_1)\, \partial L / \partial f_t$.
    With $K = J J^\top$ and $b_1 = 0$ these are the outputs of the linearised network under gradient descent on the same
    batches, exactly; with $K = J P J^\top$ those under Adam with the frozen preconditioner P and momentum $b_1$.

    ``sign=True`` takes the asymmetric sign kernel $K_{ij} = \langle \nabla f(x_i), \operatorname{sign} \nabla f(x_j)
    \rangle$ and moves outputs by $-\eta_t$ times the mean over the batch of $K_{\cdot j} \operatorname{sign}(\chi_j)$,
    $\chi_j$ the derivative of example j's loss. With one example a step this is sign descent of the linearised network,
    exactly. With more it is the average of the sign steps of the single examples, which sign descent on their mean loss
    is not. Several outputs are not covered: the sign of a sum over outputs does not split.

    Args:
      kernel: Kernel of the training examples; rows are the outputs that move, columns the examples that move them.
      f0: Their outputs at the start.
      labels: Labels as ``loss`` takes them.
      loss: Mean loss of a batch of outputs, e.g. cross-entropy.
      learning_rate: Step size, or one a step.
      steps: Number of steps.
      batches: Indices of the examples of each step; ``None`` means all, every step.
      b1: Decay of the (bias-corrected) momentum; 0 with ``sign``.
      sign: Whether each example of a batch moves the outputs by the sign of its derivative.
      kernel_test: Kernel of further points (rows) against the training examples.
      f0_test: Outputs of the further points at the start.

    Returns:
      Outputs over time.

    Raises:
      UserError: Only one of ``kernel_test`` and ``f0_test``, steps that do not fit ``batches``, or ``sign`` with
        momentum or with several outputs.

    Example:
      >>> half_square = lambda f, y: 0.5 * jnp.mean((f - y) ** 2)
      >>> path = kernel_gradient_descent(
      ...     jnp.eye(1), jnp.zeros(1), jnp.ones(1), half_square, learning_rate=0.5, steps=2
      ... )
      >>> path.train[:, 0].tolist()
      [0.0, 0.5, 0.75]

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, definition 3.2 and section 3.
    """
    where = "kernel_gradient_descent"
    both = (kernel_test is None) == (f0_test is None)
    require(both, where, "kernel_test and f0_test go together", "one of them", "Pass both or neither")
    if sign:
        one = f0.shape[1:] in ((), (1,))
        advice = "For two classes take the kernel of logit_difference(f), which has one output"
        require(one, where, "sign needs one output an example", f"f0 of shape {f0.shape}", advice)
        require(b1 == 0, where, "sign goes without momentum", f"b1={b1}", "Pass b1=0")
    size = f0.size if kernel.ndim == 4 else f0.shape[0]
    joint = kernel.reshape(size, size)
    start = f0.reshape(size, -1)
    if kernel_test is not None and f0_test is not None:
        joint = jnp.concatenate([joint, kernel_test.reshape(-1, size)])
        start = jnp.concatenate([start, f0_test.reshape(-1, start.shape[1])])
    if batches is None:
        batches = jnp.broadcast_to(jnp.arange(f0.shape[0]), (steps, f0.shape[0]))
    require(len(batches) == steps, where, "batches must hold one row a step", f"{len(batches)} rows", f"Pass {steps}")
    rates = jnp.broadcast_to(jnp.asarray(learning_rate, kernel.dtype), (steps,))
    decay = jnp.asarray(b1, kernel.dtype)

    def batch_derivative(outputs, index):
        """Derivative of the batch's mean loss by all training outputs; an example drawn twice counts twice."""
        drawn = jax.grad(loss)(outputs[index], labels[index])
        drawn = jnp.sign(drawn) / index.shape[0] if sign else drawn
        return jnp.zeros_like(outputs).at[index].add(drawn)

    def step(carry, inputs):
        outputs, momentum, scale = carry
        rate, index = inputs
        chi = batch_derivative(outputs[:size].reshape(f0.shape), index).reshape(size, -1)
        momentum = decay * momentum + (1 - decay) * chi
        scale = decay * scale
        moved = outputs - rate * jnp.matmul(joint, momentum, precision="highest") / (1 - scale)
        return (moved, momentum, scale), moved

    carry = (start, jnp.zeros_like(start[:size]), jnp.ones((), kernel.dtype))
    _, path = jax.lax.scan(step, carry, (rates, batches))
    path = jnp.concatenate([start[None], path])
    train = path[:, :size].reshape(steps + 1, *f0.shape)
    test = None if f0_test is None else path[:, size:].reshape(steps + 1, *f0_test.shape)
    return KernelTrajectory(train, test)
