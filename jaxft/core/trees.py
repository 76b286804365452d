"""Vector-space operations on pytrees of arrays."""

import math
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def tree_add(a: PyTree, b: PyTree) -> PyTree:
    """Sum a + b, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def tree_sub(a: PyTree, b: PyTree) -> PyTree:
    """Difference a - b, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def tree_scale(scale: float | Array, a: PyTree) -> PyTree:
    """Product scale * a, in the dtype of each leaf."""
    return jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, a)


def tree_axpy(scale: float | Array, a: PyTree, b: PyTree) -> PyTree:
    """Sum scale * a + b, leaf by leaf."""
    return tree_add(tree_scale(scale, a), b)


def tree_vdot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Inner product of two trees of one structure, summed over all entries."""
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision="highest"), a, b)
    return reduce(jnp.add, jax.tree.leaves(products))


def tree_norm(a: PyTree) -> Float[Array, ""]:
    """Euclidean norm over all entries.

    Example:
      >>> float(tree_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}))
      5.0
    """
    return jnp.sqrt(tree_vdot(a, a))


def tree_size(a: PyTree) -> int:
    """Number of entries, from shapes alone."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(a))


def tree_cast(a: PyTree, dtype: jnp.dtype | type) -> PyTree:
    """Float leaves cast to ``dtype``; others are left as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, a)


def tree_partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """The leaves where ``mask`` is true, and the others; each tree holds ``None`` where the other has the leaf.

    Example:
      >>> tree_partition({"w": 1.0, "b": 2.0}, {"w": True, "b": False})
      ({'b': None, 'w': 1.0}, {'b': 2.0, 'w': None})
    """
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, tree)
    rest = jax.tree.map(lambda m, x: None if m else x, mask, tree)
    return chosen, rest


def tree_combine(a: PyTree, b: PyTree) -> PyTree:
    """The tree that ``tree_partition`` took apart.

    Example:
      >>> tree_combine({"w": 1.0, "b": None}, {"w": None, "b": 2.0})
      {'b': 2.0, 'w': 1.0}
    """
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)
