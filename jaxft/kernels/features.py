r"""What a block of examples contributes to a kernel: factors of its gradients, or the gradients themselves.

One forward pass and one backward pass an output give both. A leaf with taps (``jaxft.core.factors``) has its
gradient kept as $G = \sum_r L_r \otimes R_r$, with r over tokens and uses; its matrix is ``[l, k, o]``. A leaf without
taps, or one whose gradient is smaller than its factors, has it kept whole.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxft.core.checks import path_name
from jaxft.core.factors import FactoredFn, Tap
from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, OutputFn, Params

UNROLLED = 8
"""Up to so many outputs are pulled back one by one."""

EXAMPLES_AT_ONCE = 4
"""Examples whose activations are held at once on CPU, where larger batches are no faster."""


class Use(NamedTuple):
    r"""One use of a leaf, by a block of examples: $G = \sum_r$ left x right.

    The axis c of what does not depend on the output has length 1.
    """

    left: Array
    """``[n, c, l, r, k]``, or row numbers ``[n, 1, l, r]``: integers stand for unit vectors."""
    right: Array
    """``[n, c, l, r, o]``."""


Uses = tuple[Use, ...]
Whole = list[Array]
"""Gradients ``[n, c, p]``, apart for each output where they are few: each is then written once, where it is used."""
Features = dict[str, Uses | Whole]
"""By path of the leaf."""


class Matrix(NamedTuple):
    """The shape in which a leaf is contracted: l matrices of k rows and o columns."""

    l: int  # noqa: E741 (the axis legend's name of the layers)
    k: int
    o: int


def leaf_matrix(leaf: Any, tap: Tap, record: tuple[int, ...]) -> Matrix:
    """Shape of a leaf's matrices, from one use of it."""
    if tap.kind == "rows":
        *stack, v, d = leaf.shape
        return Matrix(math.prod(stack), v, d)
    ends = (record[-1], tap.shape[-1])
    k, o = ends if tap.kind == "dense" else ends[::-1]
    return Matrix(leaf.size // (k * o), k, o)


def named_leaves(params: Params, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by path; those that are ``None`` have none."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)}


def first_example(x: Inputs) -> Inputs:
    """A batch of the first example alone."""
    return jax.tree.map(lambda leaf: leaf[:1], x)


def taps_of(f: OutputFn, trained: Params, frozen: Params, x: Inputs) -> tuple[dict[str, Tap], dict[str, Any]]:
    """Taps of the trained leaves for one example, and the shapes of their records."""
    if not isinstance(f, FactoredFn):
        return {}, {}
    leaves, tree = jax.tree.flatten((trained, frozen, x))
    return _taps_of(
        f,
        jax.dtypes.canonicalize_dtype(float),
        tree,
        tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves),
    )


@functools.lru_cache(maxsize=64)
def _taps_of(f: FactoredFn, widest: Any, tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]):
    # Kept, since to find the taps of a model takes longer than the kernel of a small one.
    trained, frozen, x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    one, params = jax.eval_shape(first_example, x), tree_combine(trained, frozen)
    known = named_leaves(trained)
    taps = {name: tap for name, tap in f.taps(params, one).items() if tap.leaf in known}
    zeros = {name: jax.ShapeDtypeStruct(tap.shape, tap.dtype) for name, tap in taps.items()}
    return taps, cast(Any, jax.eval_shape(f.tapped, params, one, zeros)[1])


def block_features(
    f: OutputFn,
    trained: Params,
    frozen: Params,
    x: Inputs,
    taps: Mapping[str, Tap],
    *,
    factor_dtype: Any = None,
) -> Features:
    """Features of a block of examples: factors of the leaves of ``taps``, whole gradients of the others.

    Args:
      f: The function; a ``FactoredFn`` where there are taps.
      trained: The leaves to differentiate in.
      frozen: The others.
      x: The block.
      taps: The taps to use.
      factor_dtype: Type in which the factors are kept; ``None`` means as they come.
    """
    leaves = named_leaves(trained)
    factored = {tap.leaf for tap in taps.values()}

    def of_one(example: Inputs) -> tuple[dict[str, Array], dict[str, Array], list[dict[str, Array]]]:
        one = jax.tree.map(lambda leaf: leaf[None], example)
        whole = {name: leaf for name, leaf in leaves.items() if name not in factored}

        def outputs(added: dict[str, Array], whole: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            params = tree_combine(_with_leaves(trained, {**leaves, **whole}), frozen)
            if not taps:
                return f(params, one)[0], {}
            out, records = cast(FactoredFn, f).tapped(params, one, added)
            return out[0], records

        zeros = {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in taps.items()}
        out, pull, records = jax.vjp(outputs, zeros, whole, has_aux=True)
        basis = jnp.eye(out.size, dtype=out.dtype).reshape(out.size, *out.shape)
        if out.size > UNROLLED:
            right, every = jax.vmap(pull)(basis)
            return right, records, [every]
        pulled = [pull(direction) for direction in basis]
        right = {name: jnp.stack([grads[name] for grads, _ in pulled]) for name in zeros}
        return right, records, [jax.tree.map(lambda leaf: leaf[None], grads) for _, grads in pulled]

    right, records, whole = _over_examples(of_one, x, one_by_one=bool(taps))
    features: Features = {
        name: [grads[name].reshape(*grads[name].shape[:2], -1) for grads in whole] for name in whole[0]
    }
    for leaf in sorted(factored):
        features[leaf] = tuple(
            _use(leaves[leaf], tap, records[name], right[name], factor_dtype)
            for name, tap in taps.items()
            if tap.leaf == leaf
        )
    return features


def _over_examples(of_one, x: Inputs, *, one_by_one: bool):
    """``vmap``, a few examples at a time where the activations of all would outweigh what is kept of them."""
    n = jax.tree.leaves(x)[0].shape[0]
    size = EXAMPLES_AT_ONCE
    if not one_by_one or n <= size or jax.default_backend() != "cpu":
        return jax.vmap(of_one)(x)
    rows = jnp.minimum(jnp.arange(-(-n // size) * size), n - 1).reshape(-1, size)
    parts = jax.lax.map(lambda few: jax.vmap(of_one)(jax.tree.map(lambda leaf: leaf[few], x)), rows)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:n], parts)


def _with_leaves(tree: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], tree)


def _use(leaf: Array, tap: Tap, record: Array, grads: Array, dtype: Any) -> Use:
    """The factors of one use: ``record`` is ``[n, *shape]``, ``grads`` ``[n, c, *tap]``."""
    n, c = grads.shape[:2]
    matrix = leaf_matrix(leaf, tap, record.shape[1:])
    grads = grads.reshape(n, c, matrix.l, -1, tap.shape[-1]).astype(dtype or grads.dtype)
    if tap.kind == "rows":
        # As jnp.take and indexing do: negative numbers count from the end.
        rows = record.astype(jnp.int32).reshape(n, 1, matrix.l, -1)  # numbers of bytes count no further than 255
        return Use(jnp.where(rows < 0, rows + matrix.k, rows), grads)
    record = record.reshape(n, 1, matrix.l, -1, record.shape[-1]).astype(dtype or record.dtype)
    return Use(record, grads) if tap.kind == "dense" else Use(grads, record)
