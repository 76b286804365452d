r"""Empirical neural tangent kernels by Jacobian contraction, in blocks of bounded memory.

Every kernel here is $K = \phi(J_x)\, \phi(J_y)^\top$, with $J$ the Jacobian of the outputs in the parameters and
$\phi$ applied entry by entry; ``FEATURES`` is the table of the $\phi$.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import failing_leaves, is_concrete, nearest, require, require_finite
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.jacobian import output_jacobian, output_shape

KernelName = Literal["sgd", "signgd", "preconditioned"]

FEATURES: Mapping[str, Callable[[Array, Any], Array]] = {
    "sgd": lambda gradient, _: gradient,
    "signgd": lambda gradient, _: jnp.sign(gradient),
    "preconditioned": lambda gradient, p: gradient * jnp.sqrt(p),
}
"""Kernel name -> map of flattened gradients and their preconditioner leaf (``None`` but for "preconditioned")."""


CPU_TILE = 8192
"""Parameters contracted at a time on CPU: the maps of a tile stay in the cache instead of being written to memory."""


@overload
def empirical_ntk(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    kernel: KernelName = "sgd",
    preconditioner: PyTree | None = None,
    block_size: int | tuple[int, int] = 8,
    accum_dtype: jnp.dtype | type | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> Array: ...


@overload
def empirical_ntk(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    kernel: tuple[KernelName, ...],
    preconditioner: PyTree | None = None,
    block_size: int | tuple[int, int] = 8,
    accum_dtype: jnp.dtype | type | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> dict[str, Array]: ...


def empirical_ntk(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None = None,
    *,
    kernel: KernelName | tuple[KernelName, ...] = "sgd",
    preconditioner: PyTree | None = None,
    block_size: int | tuple[int, int] = 8,
    accum_dtype: jnp.dtype | type | None = None,
    precision: str = "highest",
    mesh: Mesh | None = None,
) -> Float[Array, "n m"] | Float[Array, "n c m c"] | dict[str, Array]:
    r"""Kernel of gradient descent (or of a preconditioned or sign-based surrogate) at ``params``.

    ========================  ==================================================================
    ``sgd``                   $K = J_x J_y^\top$: the NTK
    ``signgd``                $K = \operatorname{sign}(J_x) \operatorname{sign}(J_y)^\top$
    ``preconditioned``        $K = J_x P J_y^\top$, $P$ diagonal and non-negative: the NTK of
                              Adam with a frozen second moment for $P = 1 / (\sqrt{\hat v} + \epsilon)$
    ========================  ==================================================================

    All three are symmetric and positive semi-definite for ``y=None``. ``signgd`` is a surrogate: its kernel descent
    is not sign descent, whose kernel is not symmetric. Outputs that depend on other examples of the batch are not
    covered.

    Memory: the Jacobians of two blocks, ``(rows + columns) * c * p`` numbers, and their maps, whatever n and m. Work:
    n * c gradients for the rows, m * c for the columns of every block of rows, and 2 n m c^2 p operations of the
    contraction (half of it for ``y=None``).

    Args:
      f: Outputs ``[n]`` (kernel ``(n, m)``) or ``[n, c]`` (kernel ``(n, c, m, c)``).
      params: Point of linearisation.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``.
      kernel: Name of the kernel, or several: they share the gradients, which are most of the work.
      preconditioner: The diagonal of P as a tree like ``params``; goes with ``preconditioned``.
      block_size: Examples in a block, or (rows, columns).
      accum_dtype: Type of the sums over parameters and of the result; ``None`` means that of the outputs.
      precision: Precision of the matrix products.
      mesh: Devices to spread the columns over, along all its axes; ``None`` means no placement.

    Returns:
      The kernel, first axes ``x``, last axes ``y``; a dict of them by name where several were asked for.

    Raises:
      UserError: An unknown kernel, a missing or ill-fitting or (concrete) negative preconditioner, a block size below
        1, non-finite parameters, outputs of another shape.

    Example:
      >>> f = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
      >>> empirical_ntk(f, jnp.ones(2), x).tolist()
      [[5.0, 1.0], [1.0, 10.0]]
      >>> empirical_ntk(f, jnp.ones(2), x, kernel="signgd").tolist()
      [[2.0, 0.0], [0.0, 2.0]]

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 3 (SGD and sign kernels); Jacot et al. 2018, arXiv 1806.07572.
    """
    where = "empirical_ntk"
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    for name in names:
        require(name in FEATURES, where, "unknown kernel", repr(name), nearest(str(name), FEATURES))
    require(bool(names), where, "needs a kernel", "none", nearest("", FEATURES))
    rows, columns = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    require(min(rows, columns) >= 1, where, "block_size must be at least 1", block_size, "Use 8, or what memory allows")
    shape_x = output_shape(where, f, params, x)
    if y is not None:
        output_shape(where, f, params, y)
    require_finite(where, params, "params")
    _check_preconditioner(where, names, params, preconditioner)
    accumulate = jnp.dtype(accum_dtype or jax.eval_shape(f, params, x).dtype)
    settings = (f, names, rows, columns, accumulate, precision)
    flat = (
        _blocked_kernels(*settings, params, x, y, preconditioner)
        if mesh is None
        else _sharded_kernels(mesh, settings, params, x, x if y is None else y, preconditioner)
    )
    if len(shape_x) == 2:
        n, c = shape_x
        flat = [k.reshape(n, c, -1, c) for k in flat]
    return flat[0] if isinstance(kernel, str) else dict(zip(names, flat, strict=True))


def _check_preconditioner(where: str, kernels: tuple[str, ...], params: Params, preconditioner: PyTree | None) -> None:
    given = preconditioner is not None
    rule = 'preconditioner goes with kernel="preconditioned", and only with it'
    advice = "Pass 1 / (sqrt(second moment) + eps), or choose another kernel"
    require(given == ("preconditioned" in kernels), where, rule, f"{', '.join(kernels)}, given={given}", advice)
    if not given:
        return
    shapes = jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, preconditioner)
    same = jax.tree.structure(params) == jax.tree.structure(preconditioner) and shapes[0] == shapes[1]
    require(same, where, "preconditioner must have the tree and shapes of params", "others", "Map it over params")
    if is_concrete(preconditioner):
        bad = failing_leaves(lambda leaf: (leaf >= 0).all(), preconditioner)
        require(not bad, where, "preconditioner must be non-negative", f"others in {bad[:5]}", "Use its magnitude")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _blocked_kernels(f, names, rows, columns, accumulate, precision, params, x, y, preconditioner) -> list[Array]:
    """The kernels with (example, output) flattened on both sides.

    For ``y=None`` only blocks on or above the diagonal are computed.
    """
    symmetric = y is None
    if symmetric:
        y, columns = x, rows
    n, m = (jax.tree.leaves(side)[0].shape[0] for side in (x, y))
    rows, columns = min(rows, n), min(columns, m)
    c = max(jax.eval_shape(f, params, x).shape[1:], default=1)
    contract = functools.partial(_contract, names, accumulate, precision, preconditioner)

    def row_of_blocks(i):
        left = _flat_jacobian(f, params, x, _block(i, rows, n))
        if symmetric and rows == n:
            return contract(left, left)

        def one_block(j):
            def compute():
                return contract(left, _flat_jacobian(f, params, y, _block(j, columns, m)))

            if not symmetric:
                return compute()
            return jax.lax.cond(j >= i, compute, lambda: jnp.zeros((len(names), rows * c, columns * c), accumulate))

        blocks = jax.lax.map(one_block, jnp.arange(-(-m // columns)))
        return jnp.moveaxis(blocks, 0, 2).reshape(len(names), rows * c, -1)[..., : m * c]

    full = jnp.moveaxis(jax.lax.map(row_of_blocks, jnp.arange(-(-n // rows))), 0, 1)
    full = full.reshape(len(names), -1, m * c)[:, : n * c]
    if symmetric:
        full = jnp.triu(full) + jnp.swapaxes(jnp.triu(full, 1), 1, 2)
    return list(full)


def _flat_jacobian(f: OutputFn, params: Params, side: Inputs, block: Array) -> list[Array]:
    """Gradients of a block of examples, a matrix (example and output, parameter) a leaf."""
    jacobian = output_jacobian(f, params, jax.tree.map(lambda leaf: leaf[block], side))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return [leaf.reshape(-1, size) for leaf, size in zip(jax.tree.leaves(jacobian), sizes, strict=True)]


def _contract(names, accumulate, precision, preconditioner, left: list[Array], right: list[Array]) -> Array:
    """Gram matrices of two blocks of gradients, a kernel a row."""
    diagonals = [p.reshape(1, -1) for p in jax.tree.leaves(preconditioner)] or [None] * len(left)
    dot = functools.partial(jnp.matmul, precision=precision, preferred_element_type=accumulate)
    tile = CPU_TILE if jax.default_backend() == "cpu" else max(leaf.shape[1] for leaf in left)

    def gram(a, b, p):
        return jnp.stack([dot(FEATURES[name](a, p), FEATURES[name](b, p).T) for name in names])

    def leaf(a, b, p):
        tiles = a.shape[1] // tile
        if tiles == 0:
            return gram(a, b, p)

        def cut(start, width):
            return [x if x is None else jax.lax.dynamic_slice_in_dim(x, start, width, axis=1) for x in (a, b, p)]

        whole = jax.lax.fori_loop(0, tiles, lambda k, total: total + gram(*cut(k * tile, tile)), zero)
        return whole + gram(*cut(tiles * tile, a.shape[1] - tiles * tile))

    zero = jnp.zeros((len(names), left[0].shape[0], right[0].shape[0]), accumulate)
    return sum((leaf(*terms) for terms in zip(left, right, diagonals, strict=True)), zero)


def _block(index: Array, size: int, total: int) -> Array:
    """Examples of a block; the last one repeats the final example, whose copies are cut off afterwards."""
    return jnp.minimum(index * size + jnp.arange(size), total - 1)


def _sharded_kernels(mesh: Mesh, settings, params, x, y, preconditioner) -> list[Array]:
    """Each device computes the columns of its share of ``y``."""
    m = jax.tree.leaves(y)[0].shape[0]
    share = jnp.minimum(jnp.arange(-(-m // mesh.size) * mesh.size), m - 1)
    columns = PartitionSpec(mesh.axis_names)
    run = jax.shard_map(
        lambda *operands: _blocked_kernels(*settings, *operands),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), columns, PartitionSpec()),
        out_specs=PartitionSpec(None, mesh.axis_names),
        check_vma=False,
    )
    # Gathered on every device, so that every process can read the whole.
    whole = NamedSharding(mesh, PartitionSpec())
    flat = jax.jit(run, out_shardings=whole)(params, x, jax.tree.map(lambda leaf: leaf[share], y), preconditioner)
    return [k[:, : k.shape[1] // share.size * m] for k in flat]
