"""What is measured at a starting point and during fine-tuning, each by one call of the library."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from experiments.kernel_finetuning.config import KernelFinetuningConfig, Optimizer, Solving, Training
from experiments.kernel_finetuning.prepare import Unit
from jaxft.core.types import OutputFn, Params, TokenBatch
from jaxft.data.batching import batch_indices
from jaxft.kernels import (
    empirical_ntk,
    feature_drift,
    kernel_drift,
    kernel_gradient_descent,
    kernel_ridge_predict,
    kernel_ridge_regression,
    linearization_gap,
    linearize,
)
from jaxft.train import (
    OBJECTIVES,
    accuracy,
    adam_preconditioner,
    cross_entropy,
    init_state,
    make_optimizer,
    make_schedule,
    make_segment,
    second_moment,
)
from theory.kernel_finetuning import chi_size

B1, B2, EPS = 0.9, 0.999, 1e-8
"""Adam's constants."""

COPIES = 2
"""Of a block of gradients, while it is made: as they come out of the backward pass, and in order."""

MOST_HELD = 64
"""Beyond this many examples a larger block saves nothing."""

KERNEL_OF = {"sgd": "sgd", "adam": "preconditioned"}
"""Optimiser -> the kernel whose descent predicts its outputs."""


class Start(NamedTuple):
    """What is known before fine-tuning: outputs and kernels of train, dev and test examples against train."""

    outputs: Float[np.ndarray, "n c"]
    kernels: Mapping[str, Float[np.ndarray, "n c m c"]]


@functools.cache
def trainer(f: OutputFn, training: Training, optimizer: Optimizer, rate: float, mesh: Mesh | None):
    """Optimiser and compiled segment, shared by all units with this output function."""
    schedule = make_schedule(rate, training.steps, kind=training.schedule, warmup_frac=training.warmup_frac)
    options = {"b1": B1, "b2": B2, "eps": EPS} if optimizer == "adam" else {}
    tx = make_optimizer(optimizer, schedule, **options)
    return tx, make_segment(f, OBJECTIVES[training.objective], tx, mesh=mesh)


def unit_batches(unit: Unit, training: Training, start: int, stop: int) -> np.ndarray:
    """Training examples of the steps: the same for every optimiser, so that their paths can be compared."""
    return batch_indices(len(unit.train.labels), training.batch_size, seed=unit.split, start=start, stop=stop)


def adam_moment(unit: Unit, training: Training) -> Params:
    """Adam's second moment over one epoch of batches at the starting point, where nothing moves."""
    n = len(unit.train.labels)
    steps = -(-n // training.batch_size)
    tx = make_optimizer("adam", 0.0, b1=B1, b2=B2, eps=EPS)
    segment = _still_segment(unit.f, training.objective)
    index = jnp.asarray(unit_batches(unit, training, 0, steps))
    state, _ = segment(init_state(unit.params, tx), unit.train.inputs, unit.train.labels, index)
    return second_moment(state.opt_state, b2=B2)


@functools.cache
def _still_segment(f: OutputFn, objective: str):
    return make_segment(f, OBJECTIVES[objective], make_optimizer("adam", 0.0, b1=B1, b2=B2, eps=EPS))


def measure_start(unit: Unit, config: KernelFinetuningConfig, mesh: Mesh | None) -> Start:
    """Outputs and kernels of all examples against the training examples, at the starting point."""
    outputs = unit.pool.evaluate(lambda batch: _outputs(unit.f, unit.params, batch))
    solving = config.solving
    examples = examples_held(unit, solving)
    # Many rows, since the gradients of the columns are computed again for every block of rows.
    columns = max(1, examples // 4)
    preconditioner = None
    if "preconditioned" in solving.kernels:
        preconditioner = adam_preconditioner(adam_moment(unit, config.training), eps=EPS)

    def against_train(batch: TokenBatch) -> Array:
        found = empirical_ntk(
            unit.f,
            unit.params,
            unit.train.inputs,
            batch,
            kernel=solving.kernels,
            preconditioner=preconditioner,
            block_size=(examples - columns, columns),
            mesh=mesh,
        )
        return jnp.stack([jnp.transpose(found[name], (2, 3, 0, 1)) for name in solving.kernels], axis=1)

    stacked = unit.pool.evaluate(against_train)
    return Start(outputs, {name: stacked[:, i] for i, name in enumerate(solving.kernels)})


def solve_kernel(unit: Unit, start: Start, name: str, config: KernelFinetuningConfig) -> dict[str, Any]:
    """Kernel ridge regression on one-hot labels; ridge and scale of the initial outputs are those best on dev."""
    kernel, pool = start.kernels[name], unit.pool
    labels = jnp.asarray(pool.labels)
    targets = jax.nn.one_hot(labels[pool.train], kernel.shape[1])
    f0 = jnp.asarray(start.outputs)
    on_train = jnp.asarray(kernel[pool.train])
    # Batches of two shapes round differently, and the sign of a gradient that is 0 but for rounding differs with them.
    on_train = (on_train + jnp.transpose(on_train, (2, 3, 0, 1))) / 2
    best: dict[str, Any] = {}
    for f0_scale in config.solving.f0_scales:
        for ridge in config.solving.ridges:
            use = f0[pool.train] if f0_scale else None
            solution = kernel_ridge_regression(on_train, targets, ridge=ridge, f0=use, f0_scale=f0_scale)
            predicted = kernel_ridge_predict(solution, jnp.asarray(kernel), f0 if f0_scale else None)
            on_dev = float(accuracy(predicted[pool.dev], labels[pool.dev]))
            if not best or on_dev > best["accuracy_dev"]:
                on_test = float(accuracy(predicted[pool.test], labels[pool.test]))
                best = {"accuracy_dev": on_dev, "accuracy": on_test, "ridge": ridge, "f0_scale": f0_scale}
                best |= {"rank": int(solution.rank), "size": int(targets.size)}
    return best


def predicted_loss(unit: Unit, start: Start, training: Training, optimizer: Optimizer, rate: float) -> np.ndarray:
    """Loss on the probe examples after every step, as the kernel of the starting point has it.

    The steps, batches and momentum are those of fine-tuning: nothing is fitted.
    """
    kernel = start.kernels[KERNEL_OF[optimizer]]
    pool, m = unit.pool, len(unit.probe.labels)
    probe = slice(pool.test.start, pool.test.start + m)
    schedule = make_schedule(rate, training.steps, kind=training.schedule, warmup_frac=training.warmup_frac)
    path = kernel_gradient_descent(
        jnp.asarray(kernel[pool.train]),
        jnp.asarray(start.outputs[pool.train]),
        unit.train.labels,
        OBJECTIVES[training.objective],
        learning_rate=jnp.stack([schedule(step) for step in range(training.steps)]),
        steps=training.steps,
        batches=jnp.asarray(unit_batches(unit, training, 0, training.steps)),
        b1=B1 if optimizer == "adam" else 0.0,
        kernel_test=jnp.asarray(kernel[probe]),
        f0_test=jnp.asarray(start.outputs[probe]),
    )
    return np.asarray(jax.vmap(lambda outputs: cross_entropy(outputs, unit.probe.labels))(path.test))


def measure_drift(unit: Unit, start: Start, params: Params, config: KernelFinetuningConfig) -> dict[str, float]:
    """How far parameters are from the tangent space of the start: the quantities of the diagnostic table."""
    n = len(unit.train.labels)
    # Training examples come class by class: the ones followed are spread over the classes.
    rows = np.unique(np.arange(config.drift_examples) * n // config.drift_examples)
    measured = _drift(
        unit.f,
        config.drift_examples,
        examples_held(unit, config.solving),
        unit.params,
        params,
        (unit.train.inputs, unit.train.labels),
        (unit.probe.inputs, unit.probe.labels),
        jnp.asarray(rows),
        jnp.asarray(start.kernels["sgd"][unit.pool.train][rows][:, :, rows]),
    )
    return {name: float(value) for name, value in measured.items()}


def examples_held(unit: Unit, solving: Solving) -> int:
    """Examples whose gradients fit into the memory allowed, 2 at least; a gradient is held ``COPIES`` times."""
    outputs = jax.eval_shape(unit.f, unit.params, unit.train.inputs).shape[1]
    each = COPIES * outputs * sum(leaf.nbytes for leaf in jax.tree.leaves(unit.params))
    return min(max(2, int(solving.memory_gib * 2**30 / each)), MOST_HELD)


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
    }


@functools.partial(jax.jit, static_argnums=0)
def dev_score(f: OutputFn, params: Params, inputs: TokenBatch, labels: Array) -> Array:
    """Minus the loss on dev: with a few examples a class, accuracy ties too often to tell parameters apart."""
    return -cross_entropy(f(params, inputs), labels)


def describe_start(unit: Unit, start: Start) -> dict[str, float]:
    r"""Test accuracy and size of $\chi$ on train before fine-tuning, and the latter with the label words swapped.

    The swapped words are a control: the same network, asked with words that do not name the classes.
    """
    pool = unit.pool
    outputs, labels = jnp.asarray(start.outputs), jnp.asarray(pool.labels)
    on_train, train_labels = outputs[pool.train], labels[pool.train]
    return {
        "accuracy_start": float(accuracy(outputs[pool.test], labels[pool.test])),
        "chi": float(chi_size(on_train, train_labels)),
        "chi_swapped": float(chi_size(jnp.roll(on_train, 1, axis=1), train_labels)),
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
