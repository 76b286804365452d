r"""Kernels through random maps of the gradients.

Every kernel here is the mean over independent draws of $\langle \Pi^\top u, \Pi^\top v \rangle$, with u and v the
gradients of two outputs and $E[\Pi \Pi^\top] = I$. A feature map takes (key, one gradient tree, size) to the vector
$\Pi^\top u$; ``PROJECTIONS`` is the table of those that ``random_projection`` offers.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import nearest, require, require_finite
from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.jacobian import output_jacobian, output_shape
from jaxft.kernels.masks import split_params

ProjectionKind = Literal["gaussian", "rademacher", "two_sided"]

FeatureMap = Callable[[Array, PyTree, int], Array]
"""``(key, gradient tree, size) -> features``: linear in the gradient, a pure function of the key."""

TILE = 1024
"""Rows of a dense map drawn at a time. Part of what the map is: another value gives other draws."""


class ProjectedKernel(NamedTuple):
    """A kernel estimated by independent random maps."""

    kernel: Float[Array, "n m"] | Float[Array, "n c m c"]
    """Mean over the draws."""
    stderr: Float[Array, "n m"] | Float[Array, "n c m c"]
    """Standard error of that mean, from the spread of the draws."""
    samples: Float[Array, "draws n m"] | Float[Array, "draws n c m c"]
    """The kernel of each draw; draw i is made with ``jax.random.fold_in(key, i)``."""


def random_projection(
    tree: PyTree, size: int, *, key: Array, kind: ProjectionKind = "gaussian"
) -> Float[Array, "features"]:
    r"""Random linear features $\Pi^\top u$ of one gradient tree u, with $E[\Pi \Pi^\top] = I$.

    ==============  ========================================================================================
    ``gaussian``    entries of $\Pi$ are $N(0, 1/k)$, k = ``size``
    ``rademacher``  entries are $\pm 1/\sqrt k$
    ``two_sided``   each matrix M (last two axes of a leaf) gives $A^\top M B$ with A $[d_{in}, k]$, B
                    $[d_{out}, k]$ of entries $N(0, 1/k)$, both its own; leaves of fewer axes stay exact
    ==============  ========================================================================================

    Inner products of features are unbiased. Their variance is, with $\kappa = \langle u, v \rangle$,

    - Gaussian: $(\lVert u \rVert^2 \lVert v \rVert^2 + \kappa^2) / k$;
    - Rademacher: the same less $2 \sum_i u_i^2 v_i^2 / k$;
    - two-sided, summed over pairs of matrices M, N:
      $(a + b + 2 \operatorname{tr}[(M N^\top)^2]) / k
      + (\lVert M \rVert^2 \lVert N \rVert^2 + \langle M, N \rangle^2 + a + b) / k^2$,
      where $a = \lVert M N^\top \rVert^2$ and $b = \lVert M^\top N \rVert^2$, all norms Frobenius.

    So the standard deviation is at most $\lVert u \rVert \lVert v \rVert$ times $\sqrt{2/k}$, or $2 \sqrt{1/k + 1/k^2}$
    for ``two_sided``. A dense map draws p k numbers, ``TILE`` rows at a time; a two-sided one draws
    $(d_{in} + d_{out}) k$ a matrix, at once, and is the cheaper one for large matrices.

    Args:
      tree: Float arrays without leading axes; ``jax.vmap`` projects several by one map.
      size: Features, or for ``two_sided`` features per side of a matrix.
      key: The map is a pure function of it and of the shapes.
      kind: Law of the map.

    Returns:
      ``size`` features; for ``two_sided`` ``size**2`` a matrix, and the exact leaves. Float32, or float64 where a leaf
      is.

    Raises:
      UserError: A size below 1, an unknown kind, or a tree without arrays.

    Example:
      >>> u = {"w": jnp.ones((30, 20)), "b": jnp.ones(20)}
      >>> random_projection(u, 16, key=jax.random.key(0)).shape
      (16,)
      >>> random_projection(u, 4, key=jax.random.key(0), kind="two_sided").shape
      (36,)

    Reference:
      Achlioptas 2003 (signs); Park et al. 2023, arXiv 2303.14186 (projected gradients); Choe et al. 2024,
      arXiv 2405.13954 (two-sided). The variances are moments of products of independent maps.
    """
    where = "random_projection"
    _check_projection(where, size, kind)
    require(bool(jax.tree.leaves(tree)), where, "tree must hold an array", "none", "Pass a gradient")
    return PROJECTIONS[kind](key, tree, size)


def projected_kernel(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    size: int,
    key: Array,
    kind: ProjectionKind = "gaussian",
    draws: int = 8,
    param_mask: PyTree | None = None,
    block_size: int = 8,
) -> ProjectedKernel:
    r"""The NTK through randomly projected gradients, $J_x \Pi \Pi^\top J_y^\top$, with its standard error.

    With a Gaussian map one draw is the kernel of fine-tuning in a random subspace, $\theta = \theta_0 + \Pi \alpha$.
    The mean is unbiased for ``empirical_ntk``; ``random_projection`` states the variance of a draw. Sign and
    preconditioned kernels are not covered.

    Memory: ``block_size * c`` gradients, ``draws * (n + m) * c`` feature vectors and the ``draws`` kernels. Work: one
    gradient an example and output; every block of examples draws all maps again, so larger blocks are cheaper.

    Args:
      f: Outputs ``[n]`` (kernel ``(n, m)``) or ``[n, c]`` (kernel ``(n, c, m, c)``).
      params: Point of linearisation.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``.
      size: Features, as in ``random_projection``.
      key: Source of the maps.
      kind: Law of the maps.
      draws: Independent maps, at least 2.
      param_mask: Leaves that count (``parameter_mask`` makes it); ``None`` means all.
      block_size: Examples whose gradients are held at once.

    Returns:
      Mean, its standard error, and the kernel of each draw; float32, or float64 where a parameter is.

    Raises:
      UserError: An unknown kind, a size or block size below 1, fewer than 2 draws, a mask that does not fit,
        non-finite parameters, outputs of another shape.

    Example:
      >>> f = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> estimate = projected_kernel(f, jnp.ones(2), x, size=64, key=jax.random.key(0))
      >>> bool((jnp.abs(estimate.kernel - x @ x.T) < 4 * estimate.stderr).all())
      True

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 7 (subspace fine-tuning); Li et al. 2018, arXiv 1804.08838.
    """
    where = "projected_kernel"
    _check_projection(where, size, kind)
    return sampled_kernel(
        where, PROJECTIONS[kind], size, f, params, param_mask, x, y, key=key, draws=draws, block_size=block_size
    )


def _check_projection(where: str, size: int, kind: str) -> None:
    require(kind in PROJECTIONS, where, "unknown kind", repr(kind), nearest(str(kind), PROJECTIONS))
    require(size >= 1, where, "size must be at least 1", size, "The error falls as sqrt(2 / size)")


def split_and_check(
    where: str, f: OutputFn, params: Params, mask: PyTree | None, x: Inputs, y: Inputs | None, block_size: int
) -> tuple[Params, Params, tuple[int, ...]]:
    """Trained leaves, frozen leaves, and the shape of the outputs at ``x``."""
    require(block_size >= 1, where, "block_size must be at least 1", block_size, "Use 8, or what memory allows")
    shape = output_shape(where, f, params, x)
    if y is not None:
        output_shape(where, f, params, y)
    require_finite(where, params, "params")
    return *split_params(where, params, mask), shape


def sampled_kernel(
    where: str,
    feature_map: FeatureMap,
    size: int,
    f: OutputFn,
    params: Params,
    mask: PyTree | None,
    x: Inputs,
    y: Inputs | None,
    *,
    key: Array,
    draws: int,
    block_size: int,
) -> ProjectedKernel:
    """Mean, spread and samples of the kernel over independent draws of a feature map."""
    require(draws >= 2, where, "draws must be at least 2", draws, "A single draw has no spread to take an error from")
    trained, frozen, shape = split_and_check(where, f, params, mask, x, y, block_size)
    samples = _kernel_samples(f, feature_map, size, draws, block_size, trained, frozen, x, y, key)
    if len(shape) == 2:
        n, c = shape
        samples = samples.reshape(draws, n, c, -1, c)
    stderr = jnp.std(samples, axis=0, ddof=1) / math.sqrt(draws)
    return ProjectedKernel(samples.mean(axis=0), stderr, samples)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _kernel_samples(f, feature_map, size, draws, block_size, trained, frozen, x, y, key) -> Array:
    """Kernels ``[draws, n * c, m * c]``."""
    # Counted rather than split, so that more draws extend fewer.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(draws))

    def features(side: Inputs) -> Array:
        def of_one(example: Inputs) -> Array:
            gradients = gradients_of(f, trained, frozen, example)
            return jax.lax.map(lambda k: jax.vmap(lambda u: feature_map(k, u, size))(gradients), keys)

        by_example = by_blocks(of_one, side, block_size)
        by_draw = jnp.moveaxis(by_example, 1, 0)
        return by_draw.reshape(draws, -1, by_draw.shape[-1])

    left = features(x)
    right = left if y is None else features(y)
    return jnp.matmul(left, jnp.swapaxes(right, 1, 2), precision="highest")


def by_blocks(of_one: Callable[[Inputs], Array], side: Inputs, block_size: int) -> Array:
    """``of_one`` of every example, so many at a time."""
    return jax.lax.map(of_one, side, batch_size=min(block_size, jax.tree.leaves(side)[0].shape[0]))


def gradients_of(f: OutputFn, trained: Params, frozen: Params, example: Inputs) -> PyTree:
    """Gradients of the outputs of one example in the trained leaves, each ``[c, ...]`` (c = 1 for ``[n]`` outputs)."""
    one = jax.tree.map(lambda leaf: leaf[None], example)
    jacobian = output_jacobian(lambda p, z: f(tree_combine(p, frozen), z), trained, one)
    return jax.tree.map(lambda gradient, p: gradient.reshape(-1, *p.shape), jacobian, trained)


def working_dtype(tree: PyTree) -> jnp.dtype:
    """Float64 if a leaf is, else float32: half precision is too coarse for the sums."""
    wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _dense_features(draw: Callable[..., Array], key: Array, tree: PyTree, size: int) -> Array:
    """The map of each leaf drawn a tile of rows at a time, a key a leaf and tile."""
    dtype = working_dtype(tree)

    def of_leaf(leaf_key: Array, u: Array) -> Array:
        def of_tile(t, rows):
            entries = draw(jax.random.fold_in(leaf_key, t), (rows, size), dtype)
            return jnp.matmul(jax.lax.dynamic_slice_in_dim(u, t * TILE, rows), entries, precision="highest")

        tiles, rest = divmod(u.size, TILE)
        last = of_tile(tiles, rest)
        return jax.lax.fori_loop(0, tiles, lambda t, total: total + of_tile(t, TILE), last) if tiles else last

    leaves = enumerate(jax.tree.leaves(tree))
    parts = [of_leaf(jax.random.fold_in(key, i), leaf.astype(dtype).ravel()) for i, leaf in leaves]
    return sum(parts[1:], parts[0]) / math.sqrt(size)


def _two_sided_features(key: Array, tree: PyTree, size: int) -> Array:
    """A^T M B of every matrix, other leaves as they are."""
    dtype = working_dtype(tree)

    def of_leaf(leaf_key: Array, m: Array) -> Array:
        if m.ndim < 2:
            return m.ravel()
        *stack, d_in, d_out = m.shape
        keys = jax.random.split(leaf_key)
        a, b = (jax.random.normal(k, (*stack, d, size), dtype) for k, d in zip(keys, (d_in, d_out), strict=True))
        right = jnp.matmul(m, b, precision="highest")
        return jnp.matmul(jnp.swapaxes(a, -1, -2), right, precision="highest").ravel() / size

    leaves = enumerate(jax.tree.leaves(tree))
    return jnp.concatenate([of_leaf(jax.random.fold_in(key, i), leaf.astype(dtype)) for i, leaf in leaves])


PROJECTIONS: Mapping[ProjectionKind, FeatureMap] = {
    "gaussian": functools.partial(_dense_features, jax.random.normal),
    "rademacher": functools.partial(_dense_features, jax.random.rademacher),
    "two_sided": _two_sided_features,
}
"""Kind -> feature map."""
