"""The small data and the trained networks on which statements are checked, and the form that all claims have.

Parameters have the layout of ``jaxft.nn.make_mlp`` (``Dense_0/kernel`` of ``[in, out]``, ``Dense_0/bias``, ...), and
networks of one shape are trained in one compiled program, whatever the seed and the rate of dropout.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import relu

from jaxft.core.rng import host_stream, stream
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, UnitAxis, make_permutation_spec
from jaxft.train import make_optimizer
from theory.claims import controlled_claim

PAPER = "arXiv 1906.06247"
EXAMPLES, INPUTS, CLASSES, CLUSTERS = 128, 6, 4, 16
STEPS, RATE = 400, 1e-2
PADDED_COPIES, PADDED_WIDTHS = 3, (16, 72)
"""Networks are trained as so many copies, and as wide, at least: the fewer shapes, the less is compiled."""
SETTING = {"data": f"{CLUSTERS} Gaussian clusters of {CLASSES} classes", "examples": EXAMPLES, "inputs": INPUTS}

FAST_COMPILATION = {"xla_backend_optimization_level": 0}
"""For programs that run a few times: optimising them would cost more than it saves."""
compiled = functools.partial(jax.jit, compiler_options=FAST_COMPILATION)


class Batch(NamedTuple):
    """Inputs ``[n, d]`` and labels ``[n]``."""

    x: Any
    labels: Any


@functools.cache
def _data(seed: int, name: str) -> Batch:
    """Clusters are those of the seed, examples those of the seed and the name."""
    draw = host_stream(seed, "clusters")
    centres, classes = 1.5 * draw.normal(size=(CLUSTERS, INPUTS)), np.arange(CLUSTERS) % CLASSES
    draw = host_stream(seed, name)
    cluster = draw.integers(CLUSTERS, size=EXAMPLES)
    return Batch(centres[cluster] + 0.4 * draw.normal(size=(EXAMPLES, INPUTS)), classes[cluster].astype(np.int32))


def data(seed: int, name: str = "train") -> Batch:
    """A Gaussian mixture with several clusters a class; another name draws other examples of the same mixture."""
    return Batch(*(jnp.asarray(a) for a in _data(seed, name)))


def batches(seed: int, name: str = "train") -> Batch:
    """All examples as one batch, with the leading axis of batches that the library expects."""
    return Batch(*(a[None] for a in data(seed, name)))


def preactivations(params: Params, x: jax.Array, *, masks: list[jax.Array] | None = None) -> list[jax.Array]:
    """What every dense layer puts out before its ReLU, the last being the outputs; biases may be missing.

    ``masks`` are factors on the hidden units of each layer.
    """
    found = []
    for i in range(len(params)):
        layer = params[f"Dense_{i}"]
        x = x @ layer["kernel"]
        if "bias" in layer:
            x = x + layer["bias"][None]
        found.append(x)
        x = relu(x) if masks is None or i == len(masks) else relu(x) * masks[i]
    return found


def f(params: Params, x: jax.Array) -> jax.Array:
    """Outputs ``[n, c]``."""
    return preactivations(params, x)[-1]


def hidden_preactivations(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """Preactivations of the hidden layers by group of units: ``hidden_0``, ``hidden_1``, ..."""
    return {f"hidden_{i}": z for i, z in enumerate(preactivations(params, x)[:-1])}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over examples."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def loss(params: Params, batch: Batch) -> jax.Array:
    """Mean cross-entropy of a batch: convex in the outputs."""
    return cross_entropy(f(params, batch.x), batch.labels)


def accuracy(params: Params, batch: Batch) -> jax.Array:
    """Fraction of a batch that is classified correctly."""
    return (f(params, batch.x).argmax(axis=1).astype(batch.labels.dtype) == batch.labels).mean(dtype=batch.x.dtype)


def mlp_units(hidden: int, *, bias: bool = True) -> PermutationSpec:
    """Groups ``hidden_0``, ``hidden_1``, ... of an MLP with so many hidden layers."""
    leaves: dict[str, tuple[UnitAxis, ...]] = {}
    for i in range(hidden + 1):
        reads = (UnitAxis(f"hidden_{i - 1}", 0, reads=True),) if i else ()
        gives = (UnitAxis(f"hidden_{i}", 1),) if i < hidden else ()
        leaves[f"Dense_{i}/kernel"] = (*reads, *gives)
        if bias and i < hidden:
            leaves[f"Dense_{i}/bias"] = (UnitAxis(f"hidden_{i}", 0),)
    return make_permutation_spec(leaves)


def initial(seed: int, name: str, *, width: int = 16, hidden: int = 1, bias: bool = True) -> Params:
    """Kernels of variance 2 / fan-in, biases 0; float64 on the host."""
    draw, widths = host_stream(seed, name), (INPUTS, *[width] * hidden, CLASSES)
    params = {}
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        params[f"Dense_{i}"] = {"kernel": draw.normal(size=(d_in, d_out)) * np.sqrt(2 / d_in)}
        if bias:
            params[f"Dense_{i}"]["bias"] = np.zeros(d_out)
    return params


def trained(
    seed: int,
    *,
    copies: int = 2,
    width: int = 16,
    hidden: int = 1,
    dropout: float = 0.0,
    bias: bool = True,
    start: int | None = None,
) -> list[Params]:
    """Networks trained on the data of the seed from initial points of their own, in the precision of the caller.

    Args:
      seed: Of data, initial points and dropout.
      copies: Number of networks.
      width: Of every hidden layer.
      hidden: Number of hidden layers.
      dropout: Probability that a hidden unit is dropped in a step of training.
      bias: Whether the layers have biases.
      start: Step up to which all copies are one network, which then see dropout or noise of their own; ``None``
        for networks that share nothing.

    Returns:
      The networks.
    """
    found = _trained(seed, copies, width, hidden, float(dropout), bias, start)
    return [jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), found) for i in range(copies)]


@functools.cache
def _trained(seed: int, copies: int, width: int, hidden: int, dropout: float, bias: bool, start: int | None) -> Params:
    """Stacked networks in float64 on the host, trained in float32 as networks are."""
    trained_copies = max(copies, PADDED_COPIES)
    names = [f"network {i if start is None else 0}" for i in range(trained_copies)]
    points = [initial(seed, name, width=width, hidden=hidden, bias=bias) for name in names]
    padded = min((size for size in PADDED_WIDTHS if size >= width), default=width)
    stacked = jax.tree.map(lambda *a: np.stack(a).astype(np.float32), *(_widened(p, width, padded) for p in points))
    batch = _data(seed, "train")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as optax needs
        keys = jax.random.split(stream(jax.random.key(seed), "training"), trained_copies)
        shared = np.int32(0 if start is None else start)
        batch = Batch(np.float32(batch.x), batch.labels)
        found = _train(stacked, batch, keys, np.float32(dropout), shared)
    cut = jax.tree.map(lambda a, p: np.asarray(a, np.float64)[(..., *map(slice, p.shape))], found, points[0])
    return jax.tree.map(lambda a: a[:copies], cut)


def _widened(params: Params, width: int, padded: int) -> Params:
    """Hidden units added whose weights are all 0: no gradient reaches them, so they stay so."""

    def widened(path: Any, leaf: np.ndarray) -> np.ndarray:
        name, extra = path[0].key, padded - width
        rows = 0 if name == "Dense_0" else extra
        columns = 0 if name == f"Dense_{len(params) - 1}" else extra
        return np.pad(leaf, [(0, rows), (0, columns)][-leaf.ndim :])

    return jax.tree_util.tree_map_with_path(widened, params)


@jax.jit
def _train(stacked: Params, batch: Batch, keys: jax.Array, dropout: jax.Array, shared: jax.Array) -> Params:
    """Adam on batches of half the examples; the first ``shared`` steps draw from the stream of the first network."""
    tx = make_optimizer("adam", RATE)
    hidden, first = len(stacked) - 1, keys[0]

    def run(params: Params, key: jax.Array) -> Params:
        def step(carry: Any, count: jax.Array) -> tuple[Any, None]:
            params, state = carry
            own = jax.random.fold_in(jnp.where(count < shared, first, key), count)
            rows = jax.random.permutation(own, EXAMPLES)[: EXAMPLES // 2]
            keep = 1 - dropout

            def dropped(p: Params) -> jax.Array:
                masks = []
                for i in range(hidden):
                    shape = (EXAMPLES // 2, p[f"Dense_{i}"]["kernel"].shape[1])
                    masks.append(jax.random.bernoulli(jax.random.fold_in(own, i), keep, shape) / keep)
                return cross_entropy(preactivations(p, batch.x[rows], masks=masks)[-1], batch.labels[rows])

            updates, state = tx.update(jax.grad(dropped)(params), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[0][0]

    return jax.vmap(run)(stacked, keys)


def flat(*parts: Any) -> np.ndarray:
    """All numbers of some trees, on the host."""
    return np.concatenate([np.ravel(np.asarray(a, float)) for a in jax.tree.leaves(parts)])


make_claim = functools.partial(controlled_claim, "mode_connectivity")
