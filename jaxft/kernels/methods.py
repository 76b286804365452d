r"""Kernels as maps of gradients, and the ways to contract a block of them.

Every kernel here is $K = \rho(J_x)\, \kappa(J_y)^\top$, with $J$ the Jacobian of the outputs in the parameters and
$\rho$, $\kappa$ applied entry by entry; ``KERNELS`` is the table of the two. ``METHODS`` is the table of the ways to
compute a block: a method takes a block of rows and returns a function of a block of columns, so that what belongs to
the rows is made once. A faster one is a further entry.
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


BlockMethod = Callable[[Problem, Inputs], Callable[[Inputs], Array]]
"""Rows -> (columns -> kernels ``(kernel, rows * c, columns * c)``)."""


def contraction(problem: Problem, x: Inputs) -> Callable[[Inputs], Array]:
    """Gram matrices of two blocks of gradients."""
    left = _flat_gradients(problem, x)
    return lambda y: _contract(problem, left, left if y is x else _flat_gradients(problem, y))


def ntvp(problem: Problem, x: Inputs) -> Callable[[Inputs], Array]:
    """One derivative of the rows' outputs along every mapped gradient of the columns: no gradient of a row is formed.

    Costs a forward derivative a column and output, and so pays where a row has many more outputs than tokens.
    """
    _, push = jax.linearize(lambda p: problem.outputs(p, x).ravel(), problem.trained)
    diagonals = _diagonals(problem)

    def against(y: Inputs) -> Array:
        gradients = _flat_gradients(problem, y)
        shapes, tree = [leaf.shape for leaf in jax.tree.leaves(problem.trained)], jax.tree.structure(problem.trained)

        def of_kernel(name: str) -> Array:
            mapped = [_mapped(KERNELS[name].columns, g, p) for g, p in zip(gradients, diagonals, strict=True)]
            tangents = [g.reshape(-1, *shape) for g, shape in zip(mapped, shapes, strict=True)]
            return jax.vmap(push)(jax.tree.unflatten(tree, tangents)).T

        return jnp.stack([of_kernel(name) for name in problem.names]).astype(problem.accumulate)

    return against


METHODS: Mapping[str, BlockMethod] = {"contraction": contraction, "ntvp": ntvp}


def _flat_gradients(problem: Problem, x: Inputs) -> list[Array]:
    """Gradients of a block of examples, a matrix (example and output, parameter) a leaf."""
    jacobian = output_jacobian(problem.outputs, problem.trained, x)
    sizes = [leaf.size for leaf in jax.tree.leaves(problem.trained)]
    return [leaf.reshape(-1, size) for leaf, size in zip(jax.tree.leaves(jacobian), sizes, strict=True)]


def _diagonals(problem: Problem) -> list[Array | None]:
    given = [p.reshape(1, -1) for p in jax.tree.leaves(problem.preconditioner)]
    return given or [None] * len(jax.tree.leaves(problem.trained))


def _mapped(feature: Map | None, gradient: Array, diagonal: Array | None) -> Array:
    return gradient if feature is None else feature(gradient, diagonal)


def _contract(problem: Problem, left: list[Array], right: list[Array]) -> Array:
    dot = functools.partial(jnp.matmul, precision=problem.precision, preferred_element_type=problem.accumulate)
    tile = CPU_TILE if jax.default_backend() == "cpu" else max(leaf.shape[1] for leaf in left)

    def gram(a, b, p):
        maps = [KERNELS[name] for name in problem.names]
        return jnp.stack([dot(_mapped(m.rows, a, p), _mapped(m.columns, b, p).T) for m in maps])

    def leaf(a, b, p):
        tiles = a.shape[1] // tile
        if tiles == 0:
            return gram(a, b, p)

        def cut(start, width):
            return [x if x is None else jax.lax.dynamic_slice_in_dim(x, start, width, axis=1) for x in (a, b, p)]

        whole = jax.lax.fori_loop(0, tiles, lambda k, total: total + gram(*cut(k * tile, tile)), zero)
        return whole + gram(*cut(tiles * tile, a.shape[1] - tiles * tile))

    zero = jnp.zeros((len(problem.names), left[0].shape[0], right[0].shape[0]), problem.accumulate)
    return sum((leaf(*terms) for terms in zip(left, right, _diagonals(problem), strict=True)), zero)
