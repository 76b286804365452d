"""Means, deviations and correlations of hidden units over examples, in blocks of examples."""

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import leading_size, require
from jaxft.core.types import Inputs, Params
from jaxft.geometry.paths import accumulation_dtype

UnitsFn = Callable[[Params, Inputs], Mapping[str, Array]]
"""``units(params, x)``: by group, what enters the activation of every unit, ``[n, ..., units]``; other names than those
of groups are passed over."""
Sum = tuple[Array, int | Array]
"""A sum and the number of its terms."""


def unit_moments(
    units_fn: UnitsFn, params: Params, x: Inputs, *, batch_size: int | None = None, where: str = "unit_moments"
) -> dict[str, tuple[Float[Array, "d"], Float[Array, "d"]]]:
    """Mean and variance of every unit, over examples and all axes between (positions of a map).

    In two passes: the variance is a mean of squared distances from the mean, which does not cancel.

    Args:
      units_fn: The units of a batch; jitted.
      params: The network.
      x: Examples.
      batch_size: Examples at a time; ``None`` is all.
      where: Who asks, for messages.

    Returns:
      Mean and variance by name.

    Example:
      >>> moments = unit_moments(lambda p, x: {"hidden": x @ p}, jnp.eye(2), jnp.array([[1.0, 5.0], [3.0, 5.0]]))
      >>> [part.tolist() for part in moments["hidden"]]
      [[2.0, 5.0], [1.0, 0.0]]
    """
    blocks = list(_blocks(where, x, batch_size))
    mean = _averaged(_sums(units_fn, params, block) for block in blocks)
    variance = _averaged(_squares(units_fn, params, block, mean) for block in blocks)
    return {name: (mean[name], variance[name]) for name in mean}


def unit_correlations(
    units_fn: UnitsFn,
    a: Params,
    b: Params,
    x: Inputs,
    *,
    eps: float,
    batch_size: int | None = None,
    where: str = "unit_correlations",
) -> dict[str, Float[Array, "d d"]]:
    r"""Correlation of unit i of a with unit j of b.

    It is $\mathrm{cov}_{ij} / \sqrt{(v_i + \epsilon s_a)(v_j + \epsilon s_b)}$ with the variances $v$; $s$ is the mean
    variance of the units of a layer: a dead unit correlates with none, rather than being 0 / 0.

    Args:
      units_fn: The units of a batch; jitted.
      a: The network of the rows.
      b: The network of the columns.
      x: Examples.
      eps: Variance added, relative to the mean of the layer.
      batch_size: Examples at a time; ``None`` is all.
      where: Who asks, for messages.

    Returns:
      Correlations by name.
    """
    moments = [unit_moments(units_fn, side, x, batch_size=batch_size, where=where) for side in (a, b)]
    means = [{name: mean for name, (mean, _) in side.items()} for side in moments]
    products = (_products(units_fn, a, b, block, *means) for block in _blocks(where, x, batch_size))
    covariance = _averaged(products)

    def damped(variance: Array) -> Array:
        smallest = jnp.finfo(variance.dtype).tiny
        return jnp.sqrt(variance + jnp.maximum(jnp.asarray(eps, variance.dtype) * variance.mean(), smallest))

    return {
        name: found / (damped(moments[0][name][1])[:, None] * damped(moments[1][name][1])[None])
        for name, found in covariance.items()
    }


def _blocks(where: str, x: Inputs, batch_size: int | None) -> Iterator[Inputs]:
    n = leading_size(where, x)
    size = n if batch_size is None else batch_size
    require(size > 0, where, "batch_size must be positive", batch_size, "Pass the examples of a block, or None")
    for start in range(0, n, size):
        yield jax.tree.map(lambda leaf, i=start: leaf[i : i + size], x)


def _averaged(sums: Iterator[dict[str, Sum]]) -> dict[str, Array]:
    """Sums over blocks, by their counts."""
    total, count = dict[str, Array](), dict[str, int]()
    for block in sums:
        for name, (found, n) in block.items():
            total[name] = total[name] + found if name in total else found
            count[name] = count.get(name, 0) + int(n)
    return {name: found / jnp.asarray(count[name], found.dtype) for name, found in total.items()}


def _rows(units_fn: UnitsFn, params: Params, x: Inputs) -> dict[str, Float[Array, "n d"]]:
    found = units_fn(params, x)
    flat = {name: jnp.asarray(z).reshape(-1, z.shape[-1]) for name, z in found.items()}
    return {name: z.astype(accumulation_dtype(z.dtype)) for name, z in flat.items()}


@functools.partial(jax.jit, static_argnums=0)
def _sums(units_fn: UnitsFn, params: Params, x: Inputs) -> dict[str, Sum]:
    return {name: (z.sum(axis=0), z.shape[0]) for name, z in _rows(units_fn, params, x).items()}


@functools.partial(jax.jit, static_argnums=0)
def _squares(units_fn: UnitsFn, params: Params, x: Inputs, mean: Mapping[str, Array]) -> dict[str, Sum]:
    rows = _rows(units_fn, params, x)
    return {name: (jnp.square(z - mean[name][None]).sum(axis=0), z.shape[0]) for name, z in rows.items()}


@functools.partial(jax.jit, static_argnums=0)
def _products(
    units_fn: UnitsFn, a: Params, b: Params, x: Inputs, mean_a: Mapping[str, Array], mean_b: Mapping[str, Array]
) -> dict[str, Sum]:
    left, right = _rows(units_fn, a, x), _rows(units_fn, b, x)
    centered = {name: (z - mean_a[name][None], right[name] - mean_b[name][None]) for name, z in left.items()}
    return {name: (jnp.matmul(z.T, y, precision="highest"), z.shape[0]) for name, (z, y) in centered.items()}
