r"""The kernel of LoRA adapters at their start: its draws, their mean and their variance."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import path_name, require
from jaxft.core.rng import stream
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.masks import split_params
from jaxft.kernels.projections import (
    ProjectedKernel,
    by_blocks,
    gradients_of,
    sampled_kernel,
    split_and_check,
    working_dtype,
)


def lora_kernel(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    rank: int,
    key: Array,
    adapted: PyTree,
    scale: float = 1.0,
    draws: int = 8,
    block_size: int = 8,
) -> ProjectedKernel:
    r"""NTK of LoRA adapters at their start: every adapted W becomes $W + s A B$, A Gaussian and B = 0.

    W is $[d_{in}, d_{out}]$ (y = x W), A $[d_{in}, r]$ of entries $N(0, 1/r)$. With $M_i$ the gradient of output i in
    W, the gradient in A is $s M_i B^\top = 0$ and that in B is $s A^\top M_i$. So
    $K_{ij} = s^2 \sum_W \langle A^\top M_i, A^\top M_j \rangle$, of mean $s^2 \sum_W \langle M_i, M_j \rangle$: the NTK
    in the adapted matrices alone, not the whole one. ``lora_kernel_variance`` gives the variance of a draw.
    Once B has moved the gradient in A counts too: not covered, nor are parameters trained beside the adapters.

    Memory: ``block_size * c`` gradients of the adapted leaves, and ``draws * (n + m) * c`` gradients of the B.

    Args:
      f: Outputs ``[n]`` (kernel ``(n, m)``) or ``[n, c]`` (kernel ``(n, c, m, c)``).
      params: Point of linearisation.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``.
      rank: Rank r of every adapter.
      key: Source of the A.
      adapted: Mask of the adapted leaves (``parameter_mask`` makes it): matrices ``[d_in, d_out]``, or stacks of them
        on leading axes, each with an A of its own. The last two axes are taken as the matrix: the kernels
        ``[d_in, heads, d_head]`` of flax's attention, or those of convolutions, must be reshaped inside ``f`` first.
      scale: The factor s, ``alpha / r`` in the words of LoRA.
      draws: Independent sets of A, at least 2.
      block_size: Examples whose gradients are held at once.

    Returns:
      Mean, its standard error, and the kernel of each draw.

    Raises:
      UserError: A rank or block size below 1, fewer than 2 draws, a mask that does not fit or marks a leaf of fewer
        than two axes, non-finite parameters, outputs of another shape.

    Example:
      >>> f = lambda p, x: x @ p["w"] + p["b"]
      >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros((1, 1))}
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> estimate = lora_kernel(
      ...     f, params, x, rank=64, key=jax.random.key(0), adapted={"w": True, "b": False}
      ... )
      >>> bool((jnp.abs(estimate.kernel[:, 0, :, 0] - x @ x.T) < 4 * estimate.stderr[:, 0, :, 0]).all())
      True

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 7; Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    where = "lora_kernel"
    _check_adapted(where, rank, params, adapted)
    unit = sampled_kernel(
        where, _lora_features, rank, f, params, adapted, x, y, key=key, draws=draws, block_size=block_size
    )
    return ProjectedKernel(*(jnp.asarray(scale**2, part.dtype) * part for part in unit))


def lora_kernel_variance(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    rank: int,
    adapted: PyTree,
    scale: float = 1.0,
    block_size: int = 8,
) -> Float[Array, "n m"] | Float[Array, "n c m c"]:
    r"""Variance of each entry of one draw of ``lora_kernel``, exactly.

    $s^4 \sum_W (\lVert M_i M_j^\top \rVert_F^2 + \operatorname{tr}[(M_i M_j^\top)^2]) / r$, at most
    $2 s^4 \sum_W \lVert M_i \rVert_F^2 \lVert M_j \rVert_F^2 / r$: fourth moments of a Gaussian A, independent between
    matrices. Entries of one draw are dependent: their covariances are not covered.

    Memory: ``block_size * c`` gradients and ``block_size * c**2`` products $M_i M_j^\top$, ``[d_in, d_in]`` each.

    Args:
      f: Outputs ``[n]`` or ``[n, c]``.
      params: Point of linearisation.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``.
      rank: Rank r of every adapter.
      adapted: Mask of the adapted leaves.
      scale: The factor s.
      block_size: Rows taken against one column at once.

    Returns:
      Variances in the shape of the kernel.

    Raises:
      UserError: As ``lora_kernel``.

    Example:
      >>> f = lambda w, x: (x @ w)[:, 0]
      >>> x = jnp.array([[1.0, 2.0]])
      >>> lora_kernel_variance(f, jnp.ones((2, 1)), x, rank=2, adapted=True).tolist()
      [[25.0]]

    Reference:
      Moments of $A A^\top$ for a Gaussian A (a Wishart matrix): $\operatorname{Cov}(S_{ij}, S_{kl}) =
      (\delta_{ik} \delta_{jl} + \delta_{il} \delta_{jk}) / r$; the setting is that of arXiv 2210.05643, section 7.
    """
    where = "lora_kernel_variance"
    _check_adapted(where, rank, params, adapted)
    trained, frozen, shape = split_and_check(where, f, params, adapted, x, y, block_size)
    unit = _wishart_variance(f, block_size, trained, frozen, x, x if y is None else y)
    unit = jnp.asarray(scale**4 / rank, unit.dtype) * unit
    return unit if len(shape) == 2 else unit[:, 0, :, 0]


def _check_adapted(where: str, rank: int, params: Params, adapted: PyTree) -> None:
    require(rank >= 1, where, "rank must be at least 1", rank, "Use 8, say")
    chosen, _ = split_params(where, params, adapted)
    named = ((path_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(chosen))
    bad = [f"{name} {shape}" for name, shape in named if len(shape) < 2]
    rule, advice = "adapted leaves must have two axes or more", "Leave vectors out of the mask"
    require(not bad, where, rule, ", ".join(bad[:5]), advice)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _wishart_variance(f, block_size, trained, frozen, x, y) -> Array:
    """The sum over matrices of |M N^T|^2 + tr (M N^T)^2, ``[n, c, m, c]``."""

    def of_pair(m: PyTree, n: PyTree) -> Array:
        def of_matrices(pair: tuple[Array, Array]) -> Array:
            product = jnp.matmul(pair[0], pair[1].T, precision="highest")
            return jnp.sum(product * product + product * product.T)

        dtype = working_dtype(m)
        pairs = zip(jax.tree.leaves(m), jax.tree.leaves(n), strict=True)
        stacks = [tuple(leaf.astype(dtype).reshape(-1, *leaf.shape[-2:]) for leaf in pair) for pair in pairs]
        return jnp.stack([jax.lax.map(of_matrices, stack).sum() for stack in stacks]).sum()

    outer = jax.vmap(jax.vmap(of_pair, (None, 0)), (0, None))

    def row(a: Inputs) -> Array:
        left = gradients_of(f, trained, frozen, a)
        return jax.lax.map(lambda b: outer(left, gradients_of(f, trained, frozen, b)), y)

    # [n, m, c, c]: a block of rows shares the gradients of each column.
    return jnp.moveaxis(by_blocks(row, x, block_size), 1, 2)


def _lora_features(key: Array, tree: PyTree, rank: int) -> Array:
    """A^T M of every matrix: the gradient in B. A is that of an adapter initialised from the same key."""
    dtype = working_dtype(tree)

    def of_leaf(name: str, m: Array) -> Array:
        a = jax.random.normal(stream(key, name), (*m.shape[:-1], rank), m.dtype).astype(dtype)
        left = jnp.swapaxes(a, -1, -2) / math.sqrt(rank)
        return jnp.matmul(left, m.astype(dtype), precision="highest").ravel()

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return jnp.concatenate([of_leaf(path_name(path), leaf) for path, leaf in leaves])
