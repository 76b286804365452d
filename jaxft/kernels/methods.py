r"""Kernels as maps of gradients, and the ways to compute a block of them.

Every kernel here is $K = \rho(J_x)\, \kappa(J_y)^\top$, with $J$ the Jacobian of the outputs in the parameters and
$\rho$, $\kappa$ applied entry by entry; ``KERNELS`` is the table of the two. ``METHODS`` says which kernels a method
can compute. ``ntvp`` pushes gradients of the columns through the rows' outputs; all others contract the features of two
blocks (``features``, ``contraction``) by the routes of a plan (``plan``).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxft.core.checks import path_name
from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.contraction import Arithmetic, KernelMaps, Route, contract, mapped, scale_map, share_of, sign_map
from jaxft.kernels.features import Features, block_features, named_leaves, taps_of
from jaxft.kernels.jacobian import output_jacobian
from jaxft.kernels.plan import Plan
from jaxft.kernels.preconditioners import RankOne, is_rank_one

KERNELS: Mapping[str, KernelMaps] = {
    "sgd": KernelMaps(None, None),
    "signgd": KernelMaps(sign_map, sign_map),
    "asymmetric_signgd": KernelMaps(None, sign_map, symmetric=False),
    "asymmetric_signgd_transposed": KernelMaps(sign_map, None, symmetric=False),
    "preconditioned": KernelMaps(None, scale_map),
}

METHODS: Mapping[str, Callable[[KernelMaps], bool]] = {
    "auto": lambda maps: True,
    "contraction": lambda maps: True,
    "ntvp": lambda maps: maps.rows is None,
    "ghost": lambda maps: True,
    "tiled": lambda maps: True,
}
"""Which kernels a method supports; what ``ghost`` does depends on the leaves too, and is found by the plan."""


class Settings(NamedTuple):
    """What is known when a block is compiled."""

    f: OutputFn
    plan: Plan
    arithmetic: Arithmetic
    factor_dtype: Any

    @property
    def maps(self) -> list[KernelMaps]:
        """Of the kernels asked for."""
        return [KERNELS[name] for name in self.plan.kernels]


class Point(NamedTuple):
    """Where gradients are taken, and how they are scaled."""

    trained: Params
    frozen: Params
    preconditioner: PyTree | None


def features_of(settings: Settings, point: Point, x: Inputs) -> Features | Inputs:
    """What a block of examples contributes; for ``ntvp`` the examples themselves.

    Devices that share the work of a block each make the features of some of its examples, and exchange them.
    """
    if settings.plan.method == "ntvp":
        return x
    names = {name for leaf in settings.plan.leaves for name, _ in leaf.taps}
    # Asked for again: columns may have another number of tokens than the rows of the plan.
    known = taps_of(settings.f, point.trained, point.frozen, x)[0] if names else {}
    taps = {name: tap for name, tap in known.items() if name in names}
    axis, share = settings.arithmetic.axis, share_of(settings.arithmetic)
    n = jax.tree.leaves(x)[0].shape[0]
    if axis is not None:
        size = -(-n // share.devices)
        mine = jnp.minimum(share.device * size + jnp.arange(size), n - 1)
        x = jax.tree.map(lambda leaf: leaf[mine], x)
    made = block_features(settings.f, point.trained, point.frozen, x, taps, factor_dtype=settings.factor_dtype)
    return made if axis is None else jax.tree.map(lambda a: jax.lax.all_gather(a, axis, tiled=True)[:n], made)


def block_of(settings: Settings, point: Point, rows: Features | Inputs) -> Callable[[Features | Inputs], Array]:
    """From the features of a block of rows, a function of those of a block of columns.

    It gives the block ``(kernel, rows * c, columns * c)``, (example, output) flattened.
    """
    if settings.plan.method == "ntvp":
        return _ntvp(settings, point, rows)
    scales = None if point.preconditioner is None else _by_name(point.preconditioner)
    routes: dict[str, Route] = {leaf.name: leaf.route for leaf in settings.plan.leaves}
    matrices = {leaf.name: leaf.matrix for leaf in settings.plan.leaves if leaf.matrix}

    def against(columns: Features | Inputs) -> Array:
        sides = cast(tuple[Features, Features], (rows, columns))
        return contract(settings.maps, routes, *sides, matrices, scales, settings.arithmetic)

    return against


def _by_name(preconditioner: PyTree) -> dict[str, Any]:
    return named_leaves(preconditioner, is_leaf=is_rank_one)


def _ntvp(settings: Settings, point: Point, x: Inputs) -> Callable[[Inputs], Array]:
    """One derivative of the rows' outputs along every mapped gradient of the columns; no gradient of a row."""

    def outputs(trained: Params, side: Inputs) -> Array:
        return settings.f(tree_combine(trained, point.frozen), side)

    _, push = jax.linearize(lambda p: outputs(p, x).ravel(), point.trained)
    scales = {} if point.preconditioner is None else _by_name(point.preconditioner)

    def against(y: Inputs) -> Array:
        jacobian = output_jacobian(outputs, point.trained, y)

        def of_kernel(maps: KernelMaps) -> Array:
            def tangent(path, gradient, leaf):
                p = scales.get(path_name(path))
                p = p.dense() if isinstance(p, RankOne) else p
                flat = mapped(maps.columns, gradient.reshape(-1, leaf.size), None if p is None else p.reshape(1, -1))
                return flat.astype(leaf.dtype).reshape(-1, *leaf.shape)

            tangents = jax.tree_util.tree_map_with_path(tangent, jacobian, point.trained)
            return jax.vmap(push)(tangents).T

        return jnp.stack([of_kernel(maps) for maps in settings.maps]).astype(settings.arithmetic.accumulate)

    return against
