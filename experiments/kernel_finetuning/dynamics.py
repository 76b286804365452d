"""Fine-tuning by an optimiser, and the loss that the kernel of the starting point predicts for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.kernel_finetuning.config import KERNEL_OF, Optimizer, Training
from experiments.kernel_finetuning.measure import Start
from experiments.kernel_finetuning.prepare import Unit
from jaxft.core.types import OutputFn, Params
from jaxft.data.batching import batch_indices
from jaxft.kernels import contrast_loss, kernel_gradient_descent
from jaxft.train import (
    OBJECTIVES,
    cross_entropy,
    init_state,
    make_optimizer,
    make_schedule,
    make_segment,
    second_moment,
)

B1, B2, EPS = 0.9, 0.999, 1e-8
"""Adam's constants."""


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


def is_kernel_descent(optimizer: Optimizer, classes: int, training: Training) -> bool:
    """Whether a kernel predicts the optimiser's path.

    Sign descent is kernel descent on one example a step, and for one output: two classes under a loss of their
    difference. The sign of a sum of gradients does not split.
    """
    single = training.batch_size == 1 and classes == 2 and training.objective == "cross_entropy"
    return optimizer != "sign" or single


def predicted_loss(
    unit: Unit, start: Start, training: Training, optimizer: Optimizer, rate: float
) -> np.ndarray | None:
    """Loss on the probe examples after every step, as the kernel of the starting point has it.

    The steps, batches and momentum are those of fine-tuning: nothing is fitted. ``None`` where no kernel applies.
    """
    if not is_kernel_descent(optimizer, start.outputs.shape[1], training):
        return None
    kernel, outputs = start.kernels[KERNEL_OF[optimizer]], start.outputs
    loss, shown = OBJECTIVES[training.objective], cross_entropy
    if optimizer == "sign":
        outputs, loss, shown = start.difference, contrast_loss(loss, 2), contrast_loss(shown, 2)
    pool, m = unit.pool, len(unit.probe.labels)
    probe = slice(pool.test.start, pool.test.start + m)
    schedule = make_schedule(rate, training.steps, kind=training.schedule, warmup_frac=training.warmup_frac)
    path = kernel_gradient_descent(
        jnp.asarray(kernel[pool.train]),
        jnp.asarray(outputs[pool.train]),
        unit.train.labels,
        loss,
        learning_rate=jnp.stack([schedule(step) for step in range(training.steps)]),
        steps=training.steps,
        batches=jnp.asarray(unit_batches(unit, training, 0, training.steps)),
        b1=B1 if optimizer == "adam" else 0.0,
        sign=optimizer == "sign",
        kernel_test=jnp.asarray(kernel[probe]),
        f0_test=jnp.asarray(outputs[probe]),
    )
    return np.asarray(jax.vmap(lambda outputs: shown(outputs, unit.probe.labels))(path.test))
