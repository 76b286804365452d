"""Jacobians of outputs with respect to parameters, one gradient an example and output."""

import jax
from jaxtyping import PyTree

from jaxft.core.checks import leading_size, require
from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.masks import split_params


def output_shape(where: str, f: OutputFn, params: Params, x: Inputs) -> tuple[int, ...]:
    """Shape of ``f(params, x)``: ``(n,)`` or ``(n, c)``, from static shapes.

    Raises:
      UserError: Another shape, or another number of rows than ``x`` has examples.
    """
    n = leading_size(where, x)
    out = jax.eval_shape(f, params, x)
    require(
        isinstance(out, jax.ShapeDtypeStruct) and out.ndim in (1, 2) and out.shape[0] == n,
        where,
        f"f must return shape ({n},) or ({n}, c) for {n} examples",
        jax.tree.map(lambda o: o.shape, out),
        "Pool or select outputs, one row an example",
    )
    return out.shape


def output_jacobian(f: OutputFn, params: Params, x: Inputs, *, param_mask: PyTree | None = None) -> PyTree:
    """Gradient of every output of every example.

    Materialises n * c gradients: for kernels use ``empirical_ntk``, which holds a block of them at a time.

    Args:
      f: Outputs ``[n]`` or ``[n, c]``; each row must depend on its example alone.
      params: Point of differentiation.
      x: Examples on axis 0 of every leaf.
      param_mask: Leaves to differentiate in (``parameter_mask`` makes it); the others come back as ``None``.

    Returns:
      The tree of ``params``, each leaf with leading axes ``n`` or ``n c``.

    Raises:
      UserError: ``f`` returns another shape, or a mask that does not fit ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda w, x: x @ w
      >>> output_jacobian(f, jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, -1.0]])).tolist()
      [[1.0, 2.0], [3.0, -1.0]]
    """
    where = "output_jacobian"
    output_shape(where, f, params, x)
    trained, frozen = split_params(where, params, param_mask)

    def of_one(example: Inputs) -> PyTree:
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], example)
        return jax.jacrev(lambda p: f(tree_combine(p, frozen), batch_of_one)[0])(trained)

    return jax.vmap(of_one)(x)
