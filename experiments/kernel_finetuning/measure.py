"""What is measured at a starting point and during fine-tuning, each by one call of the library."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from experiments.kernel_finetuning.config import KernelFinetuningConfig, KernelName, Solving
from experiments.kernel_finetuning.prepare import EVALUATION_BATCH, Unit
from jaxft.core.types import OutputFn, Params, TokenBatch
from jaxft.kernels import (
    empirical_ntk,
    feature_drift,
    kernel_alignment,
    kernel_drift,
    linearization_gap,
    linearize,
    logit_difference,
)
from jaxft.train import accuracy, cross_entropy
from theory.kernel_finetuning import chi_size

COPIES = 2
"""Of a block of gradients, while it is made: as they come out of the backward pass, and in order."""

MOST_HELD = 64
"""Beyond this many examples a larger block saves nothing."""

ASYMMETRIC, FLIPPED = "asymmetric_signgd", "asymmetric_signgd_flipped"
"""The kernel of sign descent of two classes, all examples against train, and train against all with the sign there."""


class Start(NamedTuple):
    """What is known before fine-tuning, of train, dev and test examples."""

    outputs: Float[np.ndarray, "n c"]
    kernels: Mapping[str, np.ndarray]
    """Against the training examples ``[n, c, m, c]``; ``ASYMMETRIC`` ``[n, m]`` and ``FLIPPED`` ``[m, n]``."""

    @property
    def difference(self) -> Float[np.ndarray, "n"]:
        """The one logit of two classes."""
        return self.outputs[:, 1] - self.outputs[:, 0]


def measure_start(
    unit: Unit, config: KernelFinetuningConfig, preconditioner: Params | None, mesh: Mesh | None
) -> Start:
    """Outputs and kernels of all examples against the training examples, at the starting point."""
    outputs = unit.pool.evaluate(lambda batch: _outputs(unit.f, unit.params, batch))
    solving = config.solving
    symmetric: tuple[KernelName, ...] = tuple(name for name in solving.kernels if name != "asymmetric_signgd")
    held = examples_held(unit.f, unit, solving)

    def against_train(batch: TokenBatch) -> Array:
        found = empirical_ntk(
            unit.f,
            unit.params,
            unit.train.inputs,
            batch,
            kernel=symmetric,
            preconditioner=preconditioner,
            block_size=_block_sizes(held),
            mesh=mesh,
        )
        return jnp.stack([jnp.transpose(found[name], (2, 3, 0, 1)) for name in symmetric], axis=1)

    stacked = unit.pool.evaluate(against_train)
    kernels = {name: stacked[:, i] for i, name in enumerate(symmetric)}
    if ASYMMETRIC in solving.kernels and outputs.shape[1] == 2:
        kernels |= _sign_kernels(unit, solving, mesh)
    return Start(outputs, kernels)


def _sign_kernels(unit: Unit, solving: Solving, mesh: Mesh | None) -> dict[str, np.ndarray]:
    """The kernel of sign descent on the difference of two logits, with all examples in its row and its column slot."""
    u, train = logit_difference(unit.f), unit.train.inputs
    whole = 2 * max(len(unit.train.labels), EVALUATION_BATCH)
    held = examples_held(u, unit, solving, most=whole)
    blocks = (held // 2, held // 2) if held == whole else _block_sizes(held)
    # As one program where it is not spread over devices: it then makes the gradients of both kernels once.
    both = _in_both_slots if mesh else _in_both_slots_compiled
    stacked = unit.pool.evaluate(lambda batch: both(u, blocks, mesh, unit.params, train, batch))
    return {ASYMMETRIC: stacked[:, 0], FLIPPED: np.ascontiguousarray(stacked[:, 1].T)}


def _in_both_slots(
    u: OutputFn, blocks: tuple[int, int], mesh: Mesh | None, params: Params, train: TokenBatch, batch: TokenBatch
) -> Array:
    """``[batch, 2, train]``: the sign on the training examples, and on those of the batch."""
    on_rows, on_columns = (
        empirical_ntk(u, params, *pair, kernel="asymmetric_signgd", block_size=blocks, mesh=mesh)
        for pair in ((batch, train), (train, batch))
    )
    return jnp.stack([on_rows, on_columns.T], axis=1)


_in_both_slots_compiled = jax.jit(_in_both_slots, static_argnums=(0, 1, 2))


def _block_sizes(held: int) -> tuple[int, int]:
    """Many rows, since the gradients of the columns are computed again for every block of rows."""
    columns = max(1, held // 4)
    return held - columns, columns


def followed_rows(unit: Unit, config: KernelFinetuningConfig) -> np.ndarray:
    """The training examples whose kernel is followed; they come class by class, these are spread over the classes."""
    n = len(unit.train.labels)
    return np.unique(np.arange(config.drift_examples) * n // config.drift_examples)


def measure_drift(unit: Unit, start: Start, params: Params, config: KernelFinetuningConfig) -> dict[str, float]:
    """How far parameters are from the tangent space of the start: the quantities of the diagnostic table."""
    rows = followed_rows(unit, config)
    measured = _drift(
        unit.f,
        config.drift_examples,
        examples_held(unit.f, unit, config.solving),
        unit.params,
        params,
        (unit.train.inputs, unit.train.labels),
        (unit.probe.inputs, unit.probe.labels),
        jnp.asarray(rows),
        jnp.asarray(start.kernels["sgd"][unit.pool.train][rows][:, :, rows]),
    )
    return {name: float(value) for name, value in measured.items()}


def examples_held(f: OutputFn, unit: Unit, solving: Solving, *, most: int = MOST_HELD) -> int:
    """Examples whose gradients fit into the memory allowed, 2 at least; a gradient is held ``COPIES`` times."""
    outputs = math.prod(jax.eval_shape(f, unit.params, unit.train.inputs).shape[1:])
    each = COPIES * outputs * sum(leaf.nbytes for leaf in jax.tree.leaves(unit.params))
    return min(max(2, int(solving.memory_gib * 2**30 / each)), most)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _drift(
    f: OutputFn,
    examples: int,
    held: int,
    params0: Params,
    params: Params,
    train: tuple[TokenBatch, Array],
    probe: tuple[TokenBatch, Array],
    rows: Array,
    kernel0: Array,
) -> dict[str, Array]:
    block = len(rows) if len(rows) <= held else held // 2
    kernel = empirical_ntk(f, params, jax.tree.map(lambda leaf: leaf[rows], train[0]), block_size=block)
    followed = jax.tree.map(lambda leaf: leaf[:examples], probe[0])
    relative, cosine = kernel_drift(kernel0, kernel)
    outputs, on_train = f(params, probe[0]), f(params, train[0])
    return {
        "chi": chi_size(on_train, train[1]),
        "train_loss_nats": cross_entropy(on_train, train[1]),
        "probe_loss_nats": cross_entropy(outputs, probe[1]),
        "probe_accuracy": accuracy(outputs, probe[1]),
        "linearization_gap": linearization_gap(f, params0, params, probe[0]),
        "feature_drift": feature_drift(f, params0, params, followed, block_size=max(1, held // 2)).mean(),
        "kernel_drift": relative,
        "kernel_cosine": cosine,
        "alignment": kernel_alignment(kernel, train[1][rows]),
    }


@functools.partial(jax.jit, static_argnums=0)
def dev_score(f: OutputFn, params: Params, inputs: TokenBatch, labels: Array) -> Array:
    """Minus the loss on dev: with a few examples a class, accuracy ties too often to tell parameters apart."""
    return -cross_entropy(f(params, inputs), labels)


def describe_start(unit: Unit, start: Start) -> dict[str, float]:
    r"""Test accuracy before fine-tuning, size of $\chi$ on train, and the latter with the label words swapped.

    The swapped words are a control: the same network, asked with words that do not name the classes. The alignment
    with the labels is that of the whole training kernel.
    """
    pool = unit.pool
    outputs, labels = jnp.asarray(start.outputs), jnp.asarray(pool.labels)
    on_train, train_labels = outputs[pool.train], labels[pool.train]
    return {
        "accuracy_start": float(accuracy(outputs[pool.test], labels[pool.test])),
        "chi": float(chi_size(on_train, train_labels)),
        "chi_swapped": float(chi_size(jnp.roll(on_train, 1, axis=1), train_labels)),
        "alignment": float(kernel_alignment(jnp.asarray(start.kernels["sgd"][pool.train]), train_labels)),
    }


def test_accuracies(unit: Unit, params: Params) -> dict[str, float]:
    """Test accuracy of parameters and of the tangent model at them."""
    labels = jnp.asarray(unit.pool.labels[unit.pool.test])
    actual = unit.pool.evaluate(lambda batch: _outputs(unit.f, params, batch))[unit.pool.test]
    tangent = unit.pool.evaluate(lambda batch: _tangent_outputs(unit.f, unit.params, params, batch))[unit.pool.test]
    return {
        "accuracy": float(accuracy(jnp.asarray(actual), labels)),
        "accuracy_linearized": float(accuracy(jnp.asarray(tangent), labels)),
    }


@functools.partial(jax.jit, static_argnums=0)
def _outputs(f: OutputFn, params: Params, batch: TokenBatch) -> Array:
    return f(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _tangent_outputs(f: OutputFn, params0: Params, params: Params, batch: TokenBatch) -> Array:
    return linearize(f, params0)(params, batch)
