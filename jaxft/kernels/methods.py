r"""Kernels as maps of gradients, and the ways to contract a block of them.

Every kernel here is $K = \rho(J_x)\, \kappa(J_y)^\top$, with $J$ the Jacobian of the outputs in the parameters and
$\rho$, $\kappa$ applied entry by entry; ``KERNELS`` is the table of the two. ``METHODS`` is the table of the ways to
compute a block: a method takes a block of rows and returns a function of a block of columns, so that what belongs to
the rows is made once, and says which kernels it supports. A faster one is a further entry.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.jacobian import output_jacobian

Map = Callable[[Array, Any], Array]
"""Map of gradients ``(..., p)`` and the preconditioner of their leaf ``(1, p)``."""


class KernelMaps(NamedTuple):
    """The two maps of a kernel; ``None`` is the identity."""

    rows: Map | None
    columns: Map | None
    symmetric: bool = True


def _sign(gradient: Array, _: Any) -> Array:
    return jnp.sign(gradient)


KERNELS: Mapping[str, KernelMaps] = {
    "sgd": KernelMaps(None, None),
    "signgd": KernelMaps(_sign, _sign),
    "asymmetric_signgd": KernelMaps(None, _sign, symmetric=False),
    "preconditioned": KernelMaps(None, lambda gradient, p: gradient * p),
}

CPU_TILE = 8192
"""Parameters contracted at a time on CPU: the maps of a tile stay in the cache instead of being written to memory."""


class Problem(NamedTuple):
    """What the blocks of one call share."""

    f: OutputFn
    names: tuple[str, ...]
    accumulate: Any
    precision: str
    trained: Params
    frozen: Params
    preconditioner: PyTree | None

    def outputs(self, trained: Params, x: Inputs) -> Array:
        """Outputs as a function of the trained leaves."""
        return self.f(tree_combine(trained, self.frozen), x)


Block = Callable[[Inputs], Array]
"""Columns -> kernels ``(kernel, rows * c, columns * c)``, (example, output) flattened."""


class Method(NamedTuple):
    """A way to compute blocks."""

    rows: Callable[[Problem, Inputs], Block]
    """Makes what belongs to a block of rows, and returns the function of the columns."""
    supports: Callable[[KernelMaps], bool]


def _contraction(problem: Problem, x: Inputs) -> Block:
    """Gram matrices of two blocks of gradients."""
    left = _gradients(problem, x)
    return lambda y: _contract(problem, left, left if y is x else _gradients(problem, y))


def _ntvp(problem: Problem, x: Inputs) -> Block:
    """One derivative of the rows' outputs along every mapped gradient of the columns; no gradient of a row."""
    _, push = jax.linearize(lambda p: problem.outputs(p, x).ravel(), problem.trained)
    diagonals = _diagonals(problem)

    def against(y: Inputs) -> Array:
        jacobian = output_jacobian(problem.outputs, problem.trained, y)

        def of_kernel(name: str) -> Array:
            def tangent(gradient, p, diagonal):
                flat = _mapped(KERNELS[name].columns, gradient.reshape(-1, p.size), diagonal)
                return flat.reshape(-1, *p.shape)

            return jax.vmap(push)(jax.tree.map(tangent, jacobian, problem.trained, diagonals)).T

        return jnp.stack([of_kernel(name) for name in problem.names]).astype(problem.accumulate)

    return against


METHODS: Mapping[str, Method] = {
    "contraction": Method(_contraction, lambda maps: True),
    "ntvp": Method(_ntvp, lambda maps: maps.rows is None),
}

Gradients = list[list[Array]]
"""Gradients of a block of examples: for each leaf and output, a matrix (example, parameter)."""

UNROLLED = 8
"""Up to so many outputs are pulled back one by one: each gradient is then written once, where it is contracted."""


def _gradients(problem: Problem, x: Inputs) -> Gradients:
    def of_one(example: Inputs) -> list[PyTree]:
        one = jax.tree.map(lambda leaf: leaf[None], example)
        out, pull = jax.vjp(lambda p: problem.outputs(p, one)[0], problem.trained)
        basis = jnp.eye(out.size, dtype=out.dtype).reshape(out.size, *out.shape)
        if out.size <= UNROLLED:
            return [pull(direction)[0] for direction in basis]
        every = jax.vmap(lambda direction: pull(direction)[0])(basis)
        return [jax.tree.map(lambda leaf, c=c: leaf[c], every) for c in range(out.size)]

    by_output = [jax.tree.leaves(tree) for tree in jax.vmap(of_one)(x)]
    return [[leaf.reshape(leaf.shape[0], -1) for leaf in leaves] for leaves in zip(*by_output, strict=True)]


def _diagonals(problem: Problem) -> PyTree:
    """The preconditioner's leaves as rows; ``False`` for each leaf where there is none."""
    if problem.preconditioner is None:
        return jax.tree.map(lambda _: False, problem.trained)
    return jax.tree.map(lambda p: p.reshape(1, -1), problem.preconditioner)


def _mapped(feature: Map | None, gradient: Array, diagonal: Any) -> Array:
    return gradient if feature is None else feature(gradient, diagonal)


def _contract(problem: Problem, left: Gradients, right: Gradients) -> Array:
    dot = functools.partial(jnp.matmul, precision=problem.precision, preferred_element_type=problem.accumulate)
    on_cpu = jax.default_backend() == "cpu"

    def gram(a, b, p):
        maps, (a, b) = [KERNELS[name] for name in problem.names], map(jnp.concatenate, (a, b))
        return jnp.stack([dot(_mapped(m.rows, a, p), _mapped(m.columns, b, p).T) for m in maps])

    def leaf(a, b, p):
        width = a[0].shape[1]
        tile = CPU_TILE if on_cpu else width
        if width <= tile:
            return gram(a, b, p)

        def cut(start, size):
            part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
            return [part(g) for g in a], [part(g) for g in b], part(p) if isinstance(p, Array) else p

        tiles = width // tile
        whole = jax.lax.fori_loop(0, tiles, lambda k, total: total + gram(*cut(k * tile, tile)), zero)
        return whole + gram(*cut(tiles * tile, width - tiles * tile))

    c, n, m = len(left[0]), left[0][0].shape[0], right[0][0].shape[0]
    zero = jnp.zeros((len(problem.names), c * n, c * m), problem.accumulate)
    diagonals = jax.tree.leaves(_diagonals(problem))
    total = sum((leaf(*terms) for terms in zip(left, right, diagonals, strict=True)), zero)
    # From (output, example) to (example, output).
    total = jnp.transpose(total.reshape(-1, c, n, c, m), (0, 2, 1, 4, 3))
    return total.reshape(-1, n * c, m * c)
