"""The run itself: units and phases in a fixed order, each resumed where it was left.

A unit is a task, a k-shot sample and an arm; a phase fine-tunes it with one optimiser and learning rate. Steps are
numbered through the run: phase p holds steps p * (steps + 1) to p * (steps + 1) + steps, the first of them its start.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.kernel_finetuning.adapters import adapter_errors
from experiments.kernel_finetuning.config import KernelFinetuningConfig, Optimizer
from experiments.kernel_finetuning.dynamics import EPS, adam_moment, predicted_loss, trainer, unit_batches
from experiments.kernel_finetuning.measure import (
    ASYMMETRIC,
    Start,
    describe_start,
    dev_score,
    measure_drift,
    measure_start,
    test_accuracies,
)
from experiments.kernel_finetuning.prepare import Model, TaskData, Unit, make_unit
from experiments.kernel_finetuning.solve import permutation_control, solve_kernel
from jaxft.core.types import Params
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.resumable import Resumable, Stopped, resume
from jaxft.lab.run import Run
from jaxft.train import (
    FitState,
    NonFiniteLossError,
    adam_preconditioner,
    fit,
    init_fit,
    init_state,
)


def execute(
    config: KernelFinetuningConfig,
    run: Run,
    stop: Interrupts,
    model: Model,
    data: Sequence[TaskData],
    mesh: Mesh | None,
    advance: Any,
) -> int:
    """Runs all phases, and returns how many came to an end; what an earlier start has done is not done again.

    A phase whose loss or parameters are no longer finite is recorded as ``diverged``, and the next one begins.

    Raises:
      Stopped: The user asked to.
    """
    with resume(run, stop, mesh=mesh, sharding=config.training.sharding) as context:
        phases: list[tuple[Optimizer, float]] = [
            (o, r) for o in config.optimizers for r in getattr(config.training, f"{o}_rates")
        ]
        number, ended = 0, 0
        for task, k, split, arm in _units(config, data):
            unit: Unit | None = None
            for optimizer, rate in phases:
                key = {"task": task.task.name, "k": k, "split": split, "arm": arm, "optimizer": optimizer, "rate": rate}
                if context.recorded("result", key):
                    ended += 1
                elif not context.recorded("diverged", key):
                    if unit is None:
                        unit = make_unit(config, model, task, k=k, split=split, arm=arm)
                        start = _start(config, context, unit, number)
                    ended += _phase(config, context, unit, start, number, optimizer, rate)
                number += 1
                advance(note=" ".join(map(str, key.values())))
    return ended


def _units(config: KernelFinetuningConfig, data: Sequence[TaskData]) -> Iterator[tuple[TaskData, int, int, Any]]:
    for task in data:
        for k in config.k:
            for split in config.splits:
                for arm in config.arms:
                    yield task, k, split, arm


def phases_of(config: KernelFinetuningConfig) -> int:
    """Number of phases of a run."""
    rates = sum(len(getattr(config.training, f"{optimizer}_rates")) for optimizer in config.optimizers)
    return len(config.task) * len(config.k) * len(config.splits) * len(config.arms) * rates


def _start(config: KernelFinetuningConfig, context: Resumable, unit: Unit, number: int) -> Start:
    """What is known of a unit before it is fine-tuned; arrays that an earlier start has saved are read."""
    start = _start_arrays(config, context, unit)
    step = number * (config.training.steps + 1)
    if not context.recorded("start", unit.key):
        context.record(step, "start", **unit.key, **describe_start(unit, start))
    for kernel in (name for name in config.solving.kernels if name in start.kernels):
        key = {**unit.key, "kernel": kernel}
        if not context.recorded("kernel", key):
            context.record(step, "kernel", **key, **solve_kernel(unit, start, kernel, config))
        if kernel != ASYMMETRIC and not context.recorded("control", key):
            context.record(step, "control", **key, **permutation_control(unit, start, kernel, config))
    if config.adapters.ranks and not context.recorded("adapter", unit.key):
        for errors in list(adapter_errors(unit, config)):
            context.record(step, "adapter", **unit.key, **errors)
    return start


def _start_arrays(config: KernelFinetuningConfig, context: Resumable, unit: Unit) -> Start:
    run = context.run
    if run.has_arrays(unit.name):
        saved = run.load_arrays(unit.name)
        return Start(saved["outputs"], {name: saved[name] for name in saved if name not in ("outputs", "labels")})
    preconditioner = None
    if "preconditioned" in config.solving.kernels:
        preconditioner = adam_preconditioner(adam_moment(unit, config.training), eps=EPS)
    start = measure_start(unit, config, preconditioner, context.mesh)
    run.save_arrays(unit.name, outputs=start.outputs, labels=unit.pool.labels, **start.kernels)
    return start


def _phase(
    config: KernelFinetuningConfig,
    context: Resumable,
    unit: Unit,
    start: Start,
    number: int,
    optimizer: Optimizer,
    rate: float,
) -> bool:
    """Fine-tunes, and returns whether it came to an end rather than diverged."""
    training = config.training
    base = number * (training.steps + 1)
    key = {**unit.key, "optimizer": optimizer, "rate": rate}
    tx, segment = trainer(unit.f, training, optimizer, rate, context.mesh)
    state = context.place(init_fit(init_state(unit.params, tx)))
    predicted = predicted_loss(unit, start, training, optimizer, rate)

    def measure(params: Params) -> dict[str, float]:
        return measure_drift(unit, start, params, config)

    def record_event(step: int, params: Params, score: float, loss: float | None) -> None:
        expected = None if predicted is None else float(predicted[step])
        fields = {
            "local_step": step,
            "batch_loss_nats": loss,
            "dev_score": score,
            "predicted_probe_loss_nats": expected,
        }
        context.record(base + step, "event", **key, **fields, **measure(params))

    def evaluate(params: Params) -> float:
        return float(dev_score(unit.f, params, unit.dev.inputs, unit.dev.labels))

    def on_event(state: FitState, losses: np.ndarray, score: float) -> bool:
        step = int(state.train.step)
        record_event(step, state.train.params, score, float(losses.mean()))
        context.run.records.sync()
        context.checkpoints.save(base + step, state)
        context.run.mark("running", step=base + step)
        return context.stop.requested

    if base <= context.restored <= base + training.steps:
        state = context.checkpoints.restore(context.restored, state)
    else:
        record_event(0, state.train.params, evaluate(state.train.params), None)
    diverged = None
    try:
        state = fit(
            segment,
            state,
            unit.train.inputs,
            unit.train.labels,
            batches=lambda first, last: jnp.asarray(unit_batches(unit, training, first, last)),
            steps=training.steps,
            event_every=training.event_every,
            evaluate=evaluate,
            on_event=on_event,
            patience=training.patience,
        )
    except NonFiniteLossError as error:
        diverged = error
    if context.stop.requested:
        raise Stopped
    if diverged:
        # A resumed run takes the same steps from the last checkpoint, and diverges again if this record was cut back.
        reason = str(diverged).split(". ")[0]
        context.record(base + diverged.step, "diverged", **key, local_step=diverged.step, reason=reason)
        return False
    result = {"dev_score": float(state.best_score), **test_accuracies(unit, state.best_params)}
    context.record(base + int(state.train.step), "result", **key, **result, **measure(state.best_params))
    return True
