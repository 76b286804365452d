r"""Low-rank adapters of any ``f(params, x)`` over any tree of parameters: $W + s A B$ in the place of W.

Adapters are a flat dict ``{"path/of/leaf": {"lora_a": A, "lora_b": B}}``: a tree of arrays alone, which an optimiser
or a checkpoint takes as it is. Matrices are ``[d_in, d_out]`` (y = x W), stacks of them have leading axes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import path_name, require
from jaxft.core.rng import stream
from jaxft.core.trees import tree_partition
from jaxft.core.types import Inputs, Params

Adapters = dict[str, dict[str, Float[Array, "..."]]]
"""Path of an adapted leaf -> ``lora_a [..., d_in, r]`` and ``lora_b [..., r, d_out]``."""


def init_lora(params: Params, adapted: PyTree, *, rank: int, key: Array) -> Adapters:
    r"""Adapters that leave the function as it is: A of entries $N(0, 1/r)$, B = 0.

    Args:
      params: Parameters, or their shapes.
      adapted: A tree of bools like ``params``: true at the matrices, or stacks of them, that get an adapter. Every
        matrix of a stack has its own.
      rank: Rank r of every adapter.
      key: Source of the A; that of a leaf depends on its path alone, not on what else is adapted.

    Returns:
      Adapters by path, in the types of their leaves.

    Raises:
      UserError: A rank below 1, a mask of another tree, empty or marking a leaf of fewer than two axes, or two
        adapted leaves of one path.

    Example:
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> adapted = {"dense": {"kernel": True, "bias": False}}
      >>> adapters = init_lora(params, adapted, rank=2, key=jax.random.key(0))
      >>> {name: {part: a.shape for part, a in parts.items()} for name, parts in adapters.items()}
      {'dense/kernel': {'lora_a': (4, 2), 'lora_b': (2, 3)}}

    Reference:
      Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    where = "init_lora"
    require(rank >= 1, where, "rank must be at least 1", rank, "Use 8, say")
    same = jax.tree.structure(adapted) == jax.tree.structure(params)
    require(same, where, "adapted must have the tree of params", jax.tree.structure(adapted), "Map it over params")
    chosen, _ = tree_partition(params, adapted)
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(chosen)]
    require(bool(leaves), where, "adapted must mark a leaf", "none", "Mark the matrices to adapt")
    bad = [f"{name} {leaf.shape}" for name, leaf in leaves if len(leaf.shape) < 2]
    rule, advice = "adapted leaves must have two axes or more", "Leave vectors out of the mask"
    require(not bad, where, rule, ", ".join(bad[:5]), advice)
    names = [name for name, _ in leaves]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, where, "adapted leaves must differ in their paths", twice, "Rename one of them")

    def of_leaf(name: str, leaf: Array | jax.ShapeDtypeStruct) -> dict[str, Array]:
        *stack, d_in, d_out = leaf.shape
        a = jax.random.normal(stream(key, name), (*stack, d_in, rank), leaf.dtype) / math.sqrt(rank)
        return {"lora_a": a, "lora_b": jnp.zeros((*stack, rank, d_out), leaf.dtype)}

    return {name: of_leaf(name, leaf) for name, leaf in leaves}


def merge_lora(params: Params, adapters: Adapters, *, scale: float = 1.0) -> Params:
    r"""Parameters with $W + s A B$ in the place of every adapted W, the others untouched.

    Args:
      params: The frozen parameters.
      adapters: Adapters of ``init_lora``, trained or not.
      scale: The factor s, ``alpha / r`` in the words of LoRA.

    Returns:
      A tree like ``params``.

    Raises:
      UserError: An adapter of a path that ``params`` lacks, or of shapes that do not fit its leaf.

    Example:
      >>> adapters = {"w": {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[3.0, 0.0]])}}
      >>> merge_lora({"w": jnp.ones((2, 2))}, adapters, scale=0.5)["w"].tolist()
      [[2.5, 1.0], [4.0, 1.0]]

    Reference:
      Hu et al. 2021, arXiv 2106.09685, equation 3.
    """
    where = "merge_lora"
    known = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    strange = sorted(adapters.keys() - set(known))
    require(not strange, where, "every adapter must be of a leaf of params", strange[:5], f"Known: {known[:5]}")

    def merged(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path_name(path)
        if name not in adapters:
            return leaf
        a, b = adapters[name]["lora_a"], adapters[name]["lora_b"]
        fits = (*a.shape[:-1], b.shape[-1]) == leaf.shape and (*a.shape[:-2], a.shape[-1]) == b.shape[:-1]
        shapes = f"{a.shape} and {b.shape} for {name} {leaf.shape}"
        require(fits, where, "A must be [..., d_in, r] and B [..., r, d_out]", shapes, "Make them with init_lora")
        product = jnp.matmul(a, b, precision="highest")
        return leaf + (jnp.asarray(scale, product.dtype) * product).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(merged, params)


def make_lora_outputs(
    f: Callable[[Params, Inputs], Any], params: Params, *, scale: float = 1.0
) -> Callable[[Adapters, Inputs], Any]:
    """``f`` as a function of its adapters, at the parameters of a frozen network.

    With adapters fresh from ``init_lora`` it equals ``f(params, x)`` exactly. ``params`` become constants of what is
    compiled: for a large network use ``make_adapted_outputs``.

    Args:
      f: Any function of parameters and inputs.
      params: Its frozen parameters.
      scale: The factor s of ``merge_lora``.

    Returns:
      ``f_lora(adapters, x)``.

    Example:
      >>> params = {"w": jnp.array([[1.0], [2.0]])}
      >>> f_lora = make_lora_outputs(lambda p, x: x @ p["w"], params)
      >>> adapters = init_lora(params, {"w": True}, rank=1, key=jax.random.key(0))
      >>> f_lora(adapters, jnp.ones((1, 2))).tolist()
      [[3.0]]
    """

    def f_lora(adapters: Adapters, x: Inputs) -> Any:
        return f(merge_lora(params, adapters, scale=scale), x)

    return f_lora


def make_adapted_outputs(f: Callable[[Params, Inputs], Any], *, scale: float = 1.0) -> Callable[..., Any]:
    """``f`` as a function of adapters and of the frozen parameters, both arguments of what is compiled.

    It is what ``make_segment`` trains with ``frozen=params``: one copy of the network, placed as it was given.

    Args:
      f: Any function of parameters and inputs.
      scale: The factor s of ``merge_lora``.

    Returns:
      ``f_lora(adapters, x, *, frozen)``.

    Example:
      >>> params = {"w": jnp.array([[1.0], [2.0]])}
      >>> f_lora = make_adapted_outputs(lambda p, x: x @ p["w"])
      >>> adapters = init_lora(params, {"w": True}, rank=1, key=jax.random.key(0))
      >>> f_lora(adapters, jnp.ones((1, 2)), frozen=params).tolist()
      [[3.0]]
    """

    def f_lora(adapters: Adapters, x: Inputs, *, frozen: Params) -> Any:
        return f(merge_lora(frozen, adapters, scale=scale), x)

    return f_lora
