"""Simplexes of low loss: uniform samples, volumes, and vertices trained to make them large.

Vertices are parameter trees, stacked on axis 0 of every leaf (``stack_points``). A simplex of k + 1 vertices has
dimension k: two make a segment, three a triangle.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import leading_size, require, require_finite, require_matching
from jaxft.core.rng import stream
from jaxft.core.types import Inputs, OutputFn, Params, Transform
from jaxft.geometry.path_loss import BatchFn, require_finite_losses, scalar_loss
from jaxft.geometry.paths import accumulation_dtype, require_floats, widened


def simplex_point(vertices: Params, weights: Float[Array | np.ndarray, "vertices"]) -> Params:
    r"""The point $\sum_i w_i v_i$ of barycentric coordinates w; a vertex exactly where one weight is 1 and the rest 0.

    Args:
      vertices: Stacked on axis 0.
      weights: One a vertex; they sum to 1 on the simplex, which is not checked.

    Returns:
      The point, in the dtypes of the vertices.

    Raises:
      UserError: Leaves without a common leading axis, or weights that do not fit it.

    Example:
      >>> triangle = {"w": jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 8.0]])}
      >>> simplex_point(triangle, jnp.array([0.5, 0.25, 0.25]))["w"].tolist()
      [1.0, 2.0]
    """
    count = leading_size("simplex_point", vertices)
    require_floats("simplex_point", vertices, "vertices")
    fits = np.shape(weights) == (count,)
    require(fits, "simplex_point", f"there must be {count} weights", np.shape(weights), "Pass one a vertex")

    def mixed(x: Array) -> Array:
        dtype = accumulation_dtype(x.dtype)
        w = jnp.reshape(jnp.asarray(weights, dtype), (count,) + (1,) * (x.ndim - 1))
        return (w * x.astype(dtype)).sum(axis=0).astype(x.dtype)

    return jax.tree.map(mixed, vertices)


def simplex_weights(vertices: int, *, key: Array, n: int) -> Float[Array, "n vertices"]:
    """Barycentric coordinates of n points that are uniform on a simplex: Dirichlet(1, ..., 1).

    Args:
      vertices: Number of vertices.
      key: Source of the draws.
      n: Number of points.

    Returns:
      Weights; each row sums to 1.

    Raises:
      UserError: No vertices, or no points.

    Example:
      >>> simplex_weights(3, key=jax.random.key(0), n=5).shape
      (5, 3)
    """
    require(vertices >= 1 and n >= 1, "simplex_weights", "vertices and n must be positive", (vertices, n), "Raise them")
    exponential = jax.random.exponential(key, (n, vertices))
    return exponential / exponential.sum(axis=1, keepdims=True)


def sample_simplex(vertices: Params, *, key: Array, n: int) -> Params:
    """Points that are uniform on the simplex, stacked on axis 0.

    They are held all at once; for large models take ``simplex_weights`` and one ``simplex_point`` at a time, as
    ``simplex_ensemble`` does.

    Args:
      vertices: Stacked on axis 0.
      key: Source of the draws.
      n: Number of points.

    Returns:
      Points like the vertices.

    Raises:
      UserError: Leaves without a common leading axis, or no points.

    Example:
      >>> sample_simplex({"w": jnp.eye(3)}, key=jax.random.key(0), n=4)["w"].shape
      (4, 3)

    Reference:
      Benton et al. 2021, arXiv 2102.13042.
    """
    weights = simplex_weights(leading_size("sample_simplex", vertices), key=key, n=n)
    require_floats("sample_simplex", vertices, "vertices")

    def mixed(x: Array) -> Array:
        dtype = accumulation_dtype(x.dtype)
        return jnp.tensordot(weights.astype(dtype), x.astype(dtype), axes=1, precision="highest").astype(x.dtype)

    return jax.tree.map(mixed, vertices)


def log_volume(vertices: Params) -> Float[Array, ""]:
    r"""Logarithm of the k-dimensional volume, $\tfrac12 \log \det(E E^\top) - \log k!$ with edges $E_i = v_i - v_0$.

    Edges are taken leaf by leaf and scaled to length 1 before the determinant, so that large models and small simplexes
    neither overflow nor lose digits to their size. One vertex has volume 1. A flat simplex gives -inf, or a large
    negative number where rounding hides it; gradients are those of a simplex that is not flat.

    Args:
      vertices: k + 1 of them, stacked on axis 0.

    Returns:
      The logarithm, in nats.

    Raises:
      UserError: Leaves without a common leading axis.

    Example:
      >>> round(float(jnp.exp(log_volume({"w": jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])}))), 4)
      6.0

    Reference:
      Benton et al. 2021, arXiv 2102.13042 (there by the Cayley-Menger determinant).
    """
    k = leading_size("log_volume", vertices) - 1
    require_floats("log_volume", vertices, "vertices")
    leaves = jax.tree.leaves(widened(vertices))
    if k == 0:
        return jnp.zeros((), leaves[0].dtype)
    edges = [(x[1:] - x[:1]).reshape(k, -1) for x in leaves]
    gram = functools.reduce(jnp.add, [jnp.matmul(e, e.T, precision="highest") for e in edges])
    squares = jnp.diagonal(gram)
    lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    angles = gram / (lengths[:, None] * lengths[None, :])
    # A copy of a vertex leaves a row of zeros, and so a determinant of 0.
    sign, log_det = jnp.linalg.slogdet(angles)
    return jnp.where(sign > 0, jnp.log(lengths).sum() + log_det / 2, -jnp.inf) - math.lgamma(k + 1)


class SimplexFit(NamedTuple):
    """A trained vertex among the old ones."""

    vertices: Params
    """The old vertices, as they were, and the new one last; stacked on axis 0."""
    losses: Float[Array, "steps"]
    """Mean loss over the samples of each step, before its update."""
    log_volumes: Float[Array, "steps"]
    """Logarithm of the mean volume of the simplexes that the new vertex is part of."""


def fit_simplex(
    loss_fn: BatchFn,
    vertices: Params,
    batches: Any,
    *,
    tx: Transform,
    steps: int,
    key: Array,
    faces: Sequence[Sequence[int]] | None = None,
    log_volume_weight: float = 1e-8,
    samples: int = 5,
    init: Params | None = None,
    spread: float = 0.1,
) -> SimplexFit:
    r"""Trains one new vertex so that the simplexes it spans have low loss and large volume (SPRO).

    Minimises $\frac1s \sum_i L(\theta_i) - \lambda \log V$ over the new vertex, for s uniform samples $\theta_i$ that
    take turns on the simplexes, all on one batch a step; V is the mean volume. The gradient is $\sum_i w_i \nabla
    L(\theta_i) / s$ with $w_i$ the weight of the new vertex: beside the vertices, memory is two gradients and copies of
    one simplex, whatever s and the number of simplexes. Call it again on the result for the next vertex.

    Args:
      loss_fn: ``loss_fn(params, batch)``, a scalar, or a mapping with ``loss``.
      vertices: Trained models (and vertices of earlier calls), stacked on axis 0; constants.
      batches: Batches of one size, stacked on axis 0; step i sees batch i modulo their number.
      tx: Anything with optax's ``init`` and ``update``.
      steps: Updates.
      key: Source of samples and of the start.
      faces: Old vertices that each simplex joins to the new one, as many in each: ``((0,), (1,))`` makes two segments
        that meet in the new vertex. By default one simplex of all.
      log_volume_weight: The factor lambda.
      samples: Points per step.
      init: Where the new vertex starts; by default the mean of the vertices it is joined to, moved by noise.
      spread: Size of that noise, relative in every leaf to the root mean square of the distances of these vertices from
        their mean (for a single one, of its own entries).

    Returns:
      The vertices with the new one, and its history.

    Raises:
      UserError: Vertices that are not stacked or not finite, faces of other vertices or of several sizes, fewer samples
        than simplexes, a start that does not match, options out of range, or a loss that does not stay finite.

    Example:
      >>> class Descent:
      ...     init = staticmethod(lambda params: None)
      ...     update = staticmethod(lambda grads, state, params: (jax.tree.map(lambda g: -0.1 * g, grads), state))
      >>> bowl = lambda p, batch: jnp.sum((p["w"] - batch) ** 2)
      >>> vertices = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> fit = fit_simplex(bowl, vertices, jnp.zeros((1, 2)), tx=Descent, steps=30, key=jax.random.key(0))
      >>> fit.vertices["w"].shape, bool(fit.losses[-1] < fit.losses[0])
      ((3, 2), True)

    Reference:
      Benton et al. 2021, arXiv 2102.13042 (SPRO).
    """
    where = "fit_simplex"
    listed = isinstance(vertices, list | tuple) and len({np.shape(x)[:1] for x in jax.tree.leaves(vertices)}) > 1
    require(not listed, where, "vertices must be one tree, stacked on axis 0", "a list", "Pass stack_points(vertices)")
    count = leading_size(where, vertices)
    joined = tuple(tuple(face) for face in ([range(count)] if faces is None else faces))
    _check_faces(where, joined, count, samples)
    require(steps >= 1 and leading_size(where, batches) >= 1, where, "steps must be positive", steps, "Raise steps")
    rule = "log_volume_weight must not be negative"
    require(log_volume_weight >= 0, where, rule, log_volume_weight, "It rewards volume")
    require_floats(where, vertices, "vertices")
    require_finite(where, vertices, "vertices")
    start = _start(vertices, joined, spread, stream(key, "start")) if init is None else init
    require_matching(where, jax.tree.map(lambda x: x[0], vertices), start, names=("vertex 0", "init"))
    new, losses, volumes = _fit(
        loss_fn, tx, vertices, start, batches, stream(key, "samples"), log_volume_weight, steps, samples, joined
    )
    require_finite_losses(where, losses)
    grown = jax.tree.map(lambda x, v: jnp.concatenate([x, v[None].astype(x.dtype)]), vertices, new)
    return SimplexFit(grown, losses, volumes)


def simplex_ensemble(f: OutputFn, vertices: Params, x: Inputs, *, key: Array, samples: int) -> Float[Array, "n c"]:
    r"""Log of the mean of the class probabilities of uniform samples of a simplex, one model at a time.

    Args:
      f: Logits of a batch.
      vertices: Stacked on axis 0.
      x: Examples.
      key: Source of the samples.
      samples: Number of models.

    Returns:
      Log-probabilities in nats.

    Raises:
      UserError: Leaves without a common leading axis, or no samples.

    Example:
      >>> f = lambda p, x: x @ p["w"]
      >>> vertices = {"w": jnp.stack([jnp.eye(2), jnp.eye(2)])}
      >>> log_probs = simplex_ensemble(f, vertices, jnp.eye(2), key=jax.random.key(0), samples=3)
      >>> [round(float(p), 3) for p in jnp.exp(log_probs[0])]
      [0.731, 0.269]

    Reference:
      Benton et al. 2021, arXiv 2102.13042 (ESPRO).
    """
    weights = simplex_weights(leading_size("simplex_ensemble", vertices), key=key, n=samples)
    return _ensemble(f, vertices, x, weights)


@functools.partial(jax.jit, static_argnames=("f",))
def _ensemble(f: OutputFn, vertices: Params, x: Inputs, weights: Float[Array, "n vertices"]) -> Array:
    def add(total: Array, w: Array) -> tuple[Array, None]:
        return jnp.logaddexp(total, jax.nn.log_softmax(f(simplex_point(vertices, w), x), axis=-1)), None

    shape = jax.eval_shape(lambda w: f(simplex_point(vertices, w), x), weights[0])
    total, _ = jax.lax.scan(add, jnp.full(shape.shape, -jnp.inf, shape.dtype), weights)
    return total - math.log(len(weights))


@functools.partial(jax.jit, static_argnames=("loss_fn", "tx", "steps", "samples", "faces"))
def _fit(
    loss_fn: BatchFn,
    tx: Transform,
    vertices: Params,
    start: Params,
    batches: Any,
    key: Array,
    log_volume_weight: float | Array,
    steps: int,
    samples: int,
    faces: tuple[tuple[int, ...], ...],
) -> tuple[Params, Array, Array]:
    """The whole fit as one scan: the new vertex, losses and log-volumes by step."""
    n_batches = leading_size("fit_simplex", batches)

    def step(carry: tuple[Params, Any], i: Array) -> tuple[tuple[Params, Any], tuple[Array, Array]]:
        new, state = carry
        batch = jax.tree.map(lambda x: x[i % n_batches], batches)
        weights = simplex_weights(len(faces[0]) + 1, key=jax.random.fold_in(key, i), n=samples)
        turns = (i + jnp.arange(samples)) % len(faces)
        loss, grads = _sampled_loss(loss_fn, vertices, new, batch, weights, jnp.asarray(faces)[turns])
        volume, upward = jax.value_and_grad(lambda v: _mean_log_volume(vertices, v, faces))(new)
        grads = jax.tree.map(lambda g, u: g - jnp.asarray(log_volume_weight, g.dtype) * u, grads, upward)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            updates, state = tx.update(grads, state, new)
        return (jax.tree.map(lambda x, u: x + u.astype(x.dtype), new, updates), state), (loss, volume)

    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(start)
    (new, _), (losses, volumes) = jax.lax.scan(step, (start, state), jnp.arange(steps))
    return new, losses, volumes


def _sampled_loss(
    loss_fn: BatchFn,
    vertices: Params,
    new: Params,
    batch: Any,
    weights: Float[Array, "samples vertices"],
    faces: Array,
) -> tuple[Array, Params]:
    """Mean loss over samples, and its gradient in the new vertex; one sample at a time."""
    loss_and_grads = jax.value_and_grad(lambda p: scalar_loss("fit_simplex", loss_fn, p, batch))

    def add(total: tuple[Array, Params], sample: tuple[Array, Array]) -> tuple[tuple[Array, Params], None]:
        w, face = sample
        loss, grads = loss_and_grads(simplex_point(_joined(vertices, new, face), w))
        weighted = (loss, jax.tree.map(lambda g: w[-1].astype(g.dtype) * g, grads))
        return jax.tree.map(lambda x, y: x + y / len(weights), total, weighted), None

    shapes = jax.eval_shape(loss_and_grads, new)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zero, (weights, faces))[0]


def _joined(vertices: Params, new: Params, face: Any) -> Params:
    """The vertices of one simplex, the new one last."""
    return jax.tree.map(lambda x, v: jnp.concatenate([x[jnp.asarray(face)], v[None]]), vertices, new)


def _mean_log_volume(vertices: Params, new: Params, faces: tuple[tuple[int, ...], ...]) -> Array:
    volumes = jax.lax.map(lambda face: log_volume(_joined(vertices, new, face)), jnp.asarray(faces))
    return jax.nn.logsumexp(volumes) - math.log(len(faces))


@functools.partial(jax.jit, static_argnames=("faces",))
def _start(vertices: Params, faces: tuple[tuple[int, ...], ...], spread: float | Array, key: Array) -> Params:
    """The mean of the vertices in use, moved off their plane: there the volume would be 0 and without a gradient."""
    used = jnp.asarray(sorted({i for face in faces for i in face}))
    chosen = jax.tree.map(lambda x: x[used], vertices)
    mean = jax.tree.map(lambda x: x.mean(axis=0), chosen)
    away = chosen if len(used) == 1 else jax.tree.map(lambda x, m: x - m[None], chosen, mean)
    leaves, tree = jax.tree.flatten(mean)
    noise = tree.unflatten([jax.random.normal(stream(key, "noise", i), x.shape, x.dtype) for i, x in enumerate(leaves)])

    # By leaf, so that a layer of small weights does not drown in noise of the size of another.
    def moved(x: Array, far: Array, z: Array) -> Array:
        size = jnp.sqrt(jnp.mean(far * far))
        return x + jnp.asarray(spread, x.dtype) * size * z

    return jax.tree.map(moved, mean, away, noise)


def _check_faces(where: str, faces: tuple[tuple[int, ...], ...], count: int, samples: int) -> None:
    sizes = sorted({len(face) for face in faces})
    require(
        len(sizes) == 1 and sizes[0] > 0, where, "faces must be of one size", sizes, "Join as many vertices in each"
    )
    bad = [face for face in faces if len(set(face)) != len(face) or not all(0 <= i < count for i in face)]
    require(not bad, where, f"faces must name distinct vertices 0 to {count - 1}", bad[:3], "Correct the indices")
    rule = "every simplex must have a sample"
    require(samples >= len(faces), where, rule, f"{samples} for {len(faces)}", "Raise samples")
