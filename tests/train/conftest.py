"""One small classification problem and one segment, shared by the tests of the loop and of checkpoints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.train import TrainState, cross_entropy, init_state, make_segment


class Problem(NamedTuple):
    f: Any
    tx: Any
    segment: Any
    state: TrainState
    inputs: Any
    labels: Any

    def batches(self, start, stop):
        """Rows that depend on the step alone."""
        return np.stack([np.random.default_rng(step).permutation(16)[:4] for step in range(start, stop)])

    def error(self, params):
        """Minus the loss on all examples: a dev score that training improves."""
        return -float(cross_entropy(self.f(params, self.inputs), self.labels))


def mlp(params, x):
    hidden = jnp.tanh(x["a"] @ params["in"] + params["bias"][None])
    return hidden @ params["out"]


@pytest.fixture(scope="session")
def problem():
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(5, 8)), "bias": np.zeros(8), "out": rng.normal(size=(8, 3))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    inputs = {"a": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)}
    labels = jnp.asarray(rng.integers(3, size=16), jnp.int32)
    tx = optax.adam(3e-2)
    return Problem(mlp, tx, make_segment(mlp, cross_entropy, tx), init_state(params, tx), inputs, labels)
