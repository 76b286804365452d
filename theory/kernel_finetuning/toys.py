"""The small tanh network on which exact statements are checked, and the form that all claims of the paper have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream, stream
from jaxft.core.trees import tree_cast
from jaxft.core.types import Params
from jaxft.kernels import contrast_loss, logit_difference
from jaxft.nn import make_mlp
from jaxft.train import cross_entropy
from theory.claims import Claim, controlled_claim

PAPER = "arXiv 2210.05643"

# With two hidden layers the kernel of a pair of inputs is not symmetric in the outputs: a transposed one shows.
_INIT, f_toy = make_mlp((8, 8, 3), activation="tanh")


def _two_logits(params: Params, x: jax.Array) -> jax.Array:
    return f_toy(params, x)[:, :2]


f_binary = logit_difference(_two_logits)
"""One logit: the difference of the first two of ``f_toy``."""

binary_cross_entropy = contrast_loss(cross_entropy, 2)


class Toy(NamedTuple):
    """Random parameters of ``f_toy``, with a few labelled examples and test points."""

    params: Params
    x: jax.Array
    labels: jax.Array
    x_test: jax.Array

    def loss(self, params: Params) -> jax.Array:
        """Cross-entropy on the examples."""
        return cross_entropy(f_toy(params, self.x), self.labels)

    @property
    def binary_labels(self) -> jax.Array:
        """Labels of ``f_binary``."""
        return jnp.minimum(self.labels, 1)


def toy(seed: int) -> Toy:
    """Inputs of dimension 6, the last of them always 0: its weights have gradient 0, as unused words have."""
    rng = host_stream(seed, "toy")
    inputs = rng.normal(size=(13, 6)) * [1, 1, 1, 1, 1, 0]
    params = _init_toy(stream(jax.random.key(seed), "init"))
    return Toy(params, jnp.asarray(inputs[:8]), jnp.asarray(rng.integers(3, size=8)), jnp.asarray(inputs[8:]))


@jax.jit
def _init_toy(key: jax.Array) -> Params:
    with jax.numpy_dtype_promotion("standard"):  # parameters start in float32
        return tree_cast(_INIT(key, 6), jnp.float64)


def flat(tree: Any) -> np.ndarray:
    """All entries of a tree, on the host."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def stack(*trees: Any) -> Any:
    """Trees of one structure, stacked on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def make_claim(
    name: str, statement: str, where: str, kind: Any, check: Callable, control: dict, breaks: str, **options
) -> Claim:
    """A claim whose control is the same check with options that break an assumption.

    ``where`` is a place in the paper; "cf. ..." if the statement is derived here, from what stands there.
    """
    source = f"derived; cf. {PAPER}, {where[4:]}" if where.startswith("cf. ") else f"{PAPER}, {where}"
    return controlled_claim("kernel_finetuning", name, statement, source, kind, check, control, breaks, **options)
