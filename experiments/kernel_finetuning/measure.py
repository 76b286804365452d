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

from experiments.kernel_finetuning.config import KernelFinetuningConfig, Solving
from experiments.kernel_finetuning.prepare import Unit
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
from jaxft.kernels.calls import KernelName
from jaxft.train import accuracy, cross_entropy
from theory.kernel_finetuning import chi_size

MOST_GRADIENTS = 8
"""Beyond this many examples at once a gradient is made no faster."""

COPIES = 6
"""Of a gradient, where its change is measured: both ends and their difference, and what the backward pass takes."""

ASYMMETRIC: KernelName = "asymmetric_signgd"
TRANSPOSED: KernelName = "asymmetric_signgd_transposed"
FLIPPED = "asymmetric_signgd_flipped"
"""The kernel of sign descent of two classes: ``ASYMMETRIC`` is that of all examples against train, and ``FLIPPED`` that
of train against all, with the sign there."""


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

    def with_train(f: OutputFn, kernels: tuple[KernelName, ...], scales: Params | None) -> dict[str, np.ndarray]:
        """Kernels with the training examples as rows, in the order all examples, training examples."""

        def of_batch(batch: TokenBatch) -> dict[str, Array]:
            found = empirical_ntk(
                f,
                unit.params,
                unit.train.inputs,
                batch,
                kernel=kernels,
                preconditioner=scales,
                memory_bytes=config.solving.memory_bytes,
                mesh=mesh,
            )
            return {name: jnp.moveaxis(k, range(k.ndim // 2), range(k.ndim // 2, k.ndim)) for name, k in found.items()}

        return unit.pool.evaluate(of_batch)

    symmetric: tuple[KernelName, ...] = tuple(name for name in config.solving.kernels if name != ASYMMETRIC)
    kernels = with_train(unit.f, symmetric, preconditioner)
    if ASYMMETRIC in config.solving.kernels and outputs.shape[1] == 2:
        sides = with_train(logit_difference(unit.f), (ASYMMETRIC, TRANSPOSED), None)
        kernels |= {ASYMMETRIC: sides[TRANSPOSED], FLIPPED: np.ascontiguousarray(sides[ASYMMETRIC].T)}
    return Start(outputs, kernels)


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
        gradients_at_once(unit, config.solving),
        config.solving.memory_bytes,
        unit.params,
        params,
        (unit.train.inputs, unit.train.labels),
        (unit.probe.inputs, unit.probe.labels),
        jnp.asarray(rows),
        jnp.asarray(start.kernels["sgd"][unit.pool.train][rows][:, :, rows]),
    )
    return {name: float(value) for name, value in measured.items()}


def gradients_at_once(unit: Unit, solving: Solving) -> int:
    """Examples whose whole gradients fit into the memory allowed."""
    outputs = math.prod(jax.eval_shape(unit.f, unit.params, unit.train.inputs).shape[1:])
    each = COPIES * outputs * sum(leaf.nbytes for leaf in jax.tree.leaves(unit.params))
    return min(max(1, solving.memory_bytes // each), MOST_GRADIENTS)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _drift(
    f: OutputFn,
    examples: int,
    at_once: int,
    memory_bytes: int,
    params0: Params,
    params: Params,
    train: tuple[TokenBatch, Array],
    probe: tuple[TokenBatch, Array],
    rows: Array,
    kernel0: Array,
) -> dict[str, Array]:
    kernel = empirical_ntk(f, params, jax.tree.map(lambda leaf: leaf[rows], train[0]), memory_bytes=memory_bytes)
    followed = jax.tree.map(lambda leaf: leaf[:examples], probe[0])
    relative, cosine = kernel_drift(kernel0, kernel)
    outputs, on_train = f(params, probe[0]), f(params, train[0])
    return {
        "chi": chi_size(on_train, train[1]),
        "train_loss_nats": cross_entropy(on_train, train[1]),
        "probe_loss_nats": cross_entropy(outputs, probe[1]),
        "probe_accuracy": accuracy(outputs, probe[1]),
        "linearization_gap": linearization_gap(f, params0, params, probe[0]),
        "feature_drift": feature_drift(f, params0, params, followed, block_size=at_once).mean(),
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
