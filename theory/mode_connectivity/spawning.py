"""Claims on children of one network: training that is shared up to a late enough step leaves no barrier between them.

The networks are deep and narrow, and see few examples a step: with less noise, children of the initialisation already
end in one valley on data as small as this.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.geometry import instability_analysis, loss_barrier, pairwise_barriers
from jaxft.train import make_optimizer
from theory.claims import Evidence
from theory.mode_connectivity.barriers import measures
from theory.mode_connectivity.networks import (
    EXAMPLES,
    Batch,
    batches,
    cross_entropy,
    data,
    f,
    initial,
    make_claim,
)

SHARED = (0, 5, 20, 80, 240)
LATE = 80
STEPS, BATCH, RATE = 400, 8, 2e-2
WIDTH, HIDDEN, CHILDREN = 16, 4, 3
SOURCE = "arXiv 1912.05671, section 3"
SETTING = {"hidden": HIDDEN, "width": WIDTH, "steps": STEPS, "batch": BATCH, "children": CHILDREN}


def train(seed: int, key: jax.Array, *, shared: int = 0, stop: int = STEPS, init: str = "parent") -> Params:
    """A network whose first ``shared`` steps see the examples that all networks of the seed see there.

    Trained in float32, as networks are, up to step ``stop``.
    """
    start = jax.tree.map(np.float32, initial(seed, init, width=WIDTH, hidden=HIDDEN))
    batch, parent = data(seed), stream(jax.random.key(seed), "parent")
    examples = Batch(np.float32(batch.x), np.asarray(batch.labels))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as optax needs
        found = _train(start, examples, parent, key, np.int32(shared), np.int32(stop))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), found)


@jax.jit
def _train(
    start: Params, examples: Batch, parent: jax.Array, key: jax.Array, shared: jax.Array, stop: jax.Array
) -> Params:
    tx = make_optimizer("adam", RATE)

    def step(count: jax.Array, carry: Any) -> Any:
        params, state = carry
        own = jax.random.fold_in(jnp.where(count < shared, parent, key), count)
        rows = jax.random.randint(own, (BATCH,), 0, EXAMPLES)
        grads = jax.grad(lambda p: cross_entropy(f(p, examples.x[rows]), examples.labels[rows]))(params)
        updates, state = tx.update(grads, state, params)
        rate = 1 - count / STEPS
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    return jax.lax.fori_loop(0, stop, step, (start, tx.init(start)))[0]


@functools.cache
def children_barriers(seed: int) -> np.ndarray:
    """Error barriers by step of ``SHARED``, means over the pairs of children.

    Every child repeats the shared steps, rather than start from a checkpoint: they are the same, bit for bit.
    """
    start = jax.tree.map(jnp.asarray, initial(seed, "parent", width=WIDTH, hidden=HIDDEN))
    found = instability_analysis(
        lambda params, step, key: train(seed, key, shared=step),
        measures,
        [(step, start) for step in SHARED],
        batches(seed),
        key=stream(jax.random.key(seed), "children"),
        children=CHILDREN,
    )
    return np.asarray(found.barriers["error"])


def _pair_barriers(seed: int, networks: list[Params]) -> float:
    """Mean error barrier over the pairs of some networks."""
    found = pairwise_barriers(measures, networks, batches(seed), metric="error")
    barriers = loss_barrier(found.losses["error"], baseline="mean")
    return float(np.asarray(barriers)[np.triu_indices(len(networks), 1)].mean())


@functools.cache
def strangers_barrier(seed: int) -> float:
    """Error barrier between networks that share neither initialisation nor examples."""
    keys = [stream(jax.random.key(seed), "strangers", i) for i in range(CHILDREN)]
    return _pair_barriers(seed, [train(seed, key, init=f"stranger {i}") for i, key in enumerate(keys)])


@functools.cache
def apart_barriers(seed: int) -> np.ndarray:
    """Error barriers of one initialisation's children after so many steps of their own, by the steps of ``SHARED``."""
    keys = [stream(jax.random.key(seed), "apart", i) for i in range(CHILDREN)]
    return np.array([_pair_barriers(seed, [train(seed, key, stop=stop) for key in keys]) for stop in SHARED])


def late_children(seed: int, *, strangers: bool = False) -> Evidence:
    """Error barrier between children of the initialisation (the greater) and those of a later step.

    The control puts networks of initialisations of their own in the place of the later children.
    """
    barriers = children_barriers(seed)
    late = strangers_barrier(seed) if strangers else barriers[SHARED.index(LATE)]
    return Evidence(float(late), float(barriers[0]), setting=SETTING | {"late": LATE})


def shared_steps(seed: int, *, apart: bool = False) -> Evidence:
    """Error barriers by the number of shared steps; the control trains so many steps apart, and none together."""
    barriers = apart_barriers(seed) if apart else children_barriers(seed)
    return Evidence(barriers, x=np.array(SHARED, float), setting=SETTING)


CLAIMS = (
    make_claim(
        "spawning",
        "Children of the initialisation of a deep network end with a barrier of the error between them; between those "
        "of step 80 of 400 it is lower.",
        SOURCE,
        "ordering",
        late_children,
        {"strangers": True},
        "the later children have no common parent",
        seeds=3,
        max_seeds=8,
    ),
    make_claim(
        "spawning-steps",
        "The longer training is shared, the lower is the barrier between the children.",
        SOURCE,
        "association",
        shared_steps,
        {"apart": True},
        "the steps are taken apart",
        sign=-1.0,
        seeds=3,
        max_seeds=6,
    ),
)
