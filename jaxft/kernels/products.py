"""Products of an NTK with a vector, for data whose kernel is too large to hold."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import require
from jaxft.core.trees import tree_add, tree_combine
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.calls import trained_preconditioner
from jaxft.kernels.jacobian import output_shape
from jaxft.kernels.masks import split_params
from jaxft.kernels.preconditioners import dense_diagonal


def ntk_vector_product(
    f: OutputFn,
    params: Params,
    x: Inputs,
    v: Float[Array, "m"] | Float[Array, "m c"],
    y: Inputs | None = None,
    *,
    preconditioner: PyTree | None = None,
    param_mask: PyTree | None = None,
    block_size: int | None = None,
) -> Float[Array, "n"] | Float[Array, "n c"]:
    r"""$K v = J_x P J_y^\top v$ without the kernel: one backward pass over ``y``, one forward derivative over ``x``.

    For iterative solvers such as ``jax.scipy.sparse.linalg.cg``. The sign kernels are no such product: a sign stands
    between the two Jacobians. Memory: one gradient, and the activations of a block.

    Args:
      f: Outputs ``[n]`` or ``[n, c]``.
      params: Point of linearisation.
      x: Rows.
      v: A number for every output of ``y``.
      y: Columns; ``None`` means ``x``.
      preconditioner: The diagonal of P as a tree like ``params``; ``None`` means the identity.
      param_mask: The parameters that are trained; ``None`` means all.
      block_size: Examples whose activations are held at once; ``None`` means all.

    Returns:
      The product, in the shape of the outputs of ``x``.

    Raises:
      UserError: Outputs of another shape, ``v`` in another shape than they, an ill-fitting mask or preconditioner, a
        block size below 1.

    Example:
      >>> f = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> ntk_vector_product(f, jnp.ones(2), x, jnp.array([1.0, 1.0])).tolist()
      [6.0, 11.0]

    Reference:
      Novak et al. 2022, arXiv 2206.08720, section 3.
    """
    where = "ntk_vector_product"
    y = x if y is None else y
    shape_x, shape_y = output_shape(where, f, params, x), output_shape(where, f, params, y)
    fits = v.shape == shape_y
    require(fits, where, f"v must have the shape of the outputs of y, {shape_y}", v.shape, "Reshape or transpose it")
    rule = "block_size must be at least 1"
    require(block_size is None or block_size >= 1, where, rule, block_size, "Use None, or what memory allows")
    trained, frozen = split_params(where, params, param_mask)
    names = ("sgd",) if preconditioner is None else ("preconditioned",)
    diagonal = trained_preconditioner(where, names, params, trained, preconditioner, param_mask)
    diagonal = dense_diagonal(diagonal, trained)

    def outputs(p: Params, block: Inputs) -> Array:
        return f(tree_combine(p, frozen), block)

    def add_pulled(direction: Params, columns: tuple[Array, Array]) -> tuple[Params, None]:
        index, new = columns
        block, weights = jax.tree.map(lambda leaf: leaf[index], (y, v))
        weights = weights * new.reshape(-1, *[1] * (v.ndim - 1)).astype(v.dtype)
        grads = jax.grad(lambda p: jnp.vdot(outputs(p, block), weights, precision="highest"))(trained)
        return tree_add(direction, grads), None

    def pushed(index: Array) -> Array:
        block = jax.tree.map(lambda leaf: leaf[index], x)
        return jax.jvp(lambda p: outputs(p, block), (trained,), (direction,))[1]

    zero = jax.tree.map(jnp.zeros_like, trained)
    direction, _ = jax.lax.scan(add_pulled, zero, _blocks(shape_y[0], block_size))
    if diagonal is not None:
        direction = jax.tree.map(jnp.multiply, direction, diagonal)
    product = jax.lax.map(pushed, _blocks(shape_x[0], block_size)[0])
    return product.reshape(-1, *shape_x[1:])[: shape_x[0]]


def _blocks(total: int, size: int | None) -> tuple[Array, Array]:
    """Examples of every block, and which of them are new; the last block repeats the final example."""
    size = min(size or total, total)
    index = jnp.arange(-(-total // size) * size).reshape(-1, size)
    return jnp.minimum(index, total - 1), index < total
