"""Whether a function's factors make up its gradients: for authors of a ``FactoredFn``."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, require
from jaxft.core.factors import FactoredFn
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.features import Matrix, Use, Uses, block_features, first_example, leaf_matrix, named_leaves, taps_of
from jaxft.kernels.jacobian import output_shape
from jaxft.kernels.masks import split_params


def check_factors(f: OutputFn, params: Params, x: Inputs, *, key: Array) -> dict[str, Float[Array, ""]]:
    r"""Compares each gradient formed from factors with the gradient itself, for random weights of the outputs.

    $\lVert \sum_r L_r \otimes R_r - \nabla_W \sum_c z_c f_c \rVert / \lVert \nabla_W \sum_c z_c f_c \rVert$ at the
    first example, for z normal. A use of W that has no tap shows as an error of the size of what it lacks. It is a test
    of the function at one point: a use that contributes nothing there is not seen. Memory: two gradients.

    Args:
      f: A function with taps.
      params: Point of differentiation.
      x: Examples; the first is used.
      key: Random key of z.

    Returns:
      Relative error of every leaf with taps; 0 where the gradient is 0 and formed as such.

    Raises:
      UserError: ``f`` has no taps, or (concrete) an error is beyond the square root of the type's precision: the leaves
        are named.

    Example:
      >>> from jaxft.nn import make_mlp
      >>> init, f = make_mlp((4, 2), activation="tanh")
      >>> params, x = init(jax.random.key(0), 3), jnp.ones((1, 3))
      >>> errors = check_factors(f, params, x, key=jax.random.key(1))
      >>> sorted(errors), max(errors.values()) < 1e-5
      (['Dense_0/kernel', 'Dense_1/kernel'], Array(True, dtype=bool))
    """
    where = "check_factors"
    output_shape(where, f, params, x)
    rule, advice = "f must have taps", "See jaxft.core.factors, or jaxft.nn.linen_outputs for a Linen module"
    require(isinstance(f, FactoredFn), where, rule, type(f).__name__, advice)
    trained, frozen = split_params(where, params, None)
    taps, records = taps_of(f, trained, frozen, x)
    require(bool(taps), where, rule, "none for these inputs", advice)
    leaves = named_leaves(trained)
    matrices = {tap.leaf: leaf_matrix(leaves[tap.leaf], tap, records[name].shape) for name, tap in taps.items()}
    errors = _errors(f, tuple(taps.items()), tuple(matrices.items()), params, first_example(x), key)
    if is_concrete(errors):
        bad = [
            f"{name} (relative error {float(error):.2g})"
            for name, error in errors.items()
            if not error <= jnp.finfo(leaves[name].dtype).eps ** 0.5
        ]
        rule = "factors must make up the gradient"
        require(not bad, where, rule, "; ".join(bad), "Give every use of the leaf a tap, or leave all of them out")
    return errors


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _errors(f, taps, matrices, params: Params, x: Inputs, key: Array) -> dict[str, Array]:
    weights = jax.random.normal(key, jax.eval_shape(f, params, x).shape[1:])
    weights = weights.astype(jax.eval_shape(f, params, x).dtype)
    whole = named_leaves(jax.grad(lambda p: jnp.vdot(f(p, x)[0], weights, precision="highest"))(params))
    nothing = jax.tree.map(lambda _: None, params)
    features = block_features(f, params, nothing, x, dict(taps))

    def error(name: str, matrix: Matrix) -> Array:
        uses: Uses = features[name]  # pyright: ignore[reportAssignmentType]  (leaves with taps have uses)
        formed = sum((_formed(use, matrix, weights.reshape(-1)) for use in uses), jnp.zeros((), weights.dtype))
        actual = whole[name].reshape(matrix)
        scale = jnp.linalg.norm(actual)
        return jnp.linalg.norm(formed - actual) / jnp.where(scale > 0, scale, 1)

    return {name: error(name, matrix) for name, matrix in matrices}


def _formed(use: Use, matrix: Matrix, weights: Array) -> Array:
    """The gradient of the first example, ``[l, k, o]``."""
    c = max(part.shape[1] for part in use)
    mixed = weights if c > 1 else weights[:1]
    right = use.right[0] * (mixed if use.right.shape[1] == c else jnp.ones(1, mixed.dtype))[:, None, None, None]
    if not jnp.issubdtype(use.left.dtype, jnp.integer):
        left = use.left[0] * (mixed if use.right.shape[1] < c else jnp.ones(1, mixed.dtype))[:, None, None, None]
        both = jnp.broadcast_shapes(left.shape[:3], right.shape[:3])
        left, right = (jnp.broadcast_to(side, (*both, side.shape[-1])) for side in (left, right))
        return jnp.einsum("clrk,clro->lko", left, right, precision="highest")
    layer = jnp.arange(matrix.l)[:, None]
    return jnp.zeros(matrix, right.dtype).at[layer, use.left[0, 0]].add(right.sum(axis=0))
