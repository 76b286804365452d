"""What is trained and by what: parameters or adapters, an optimiser, a compiled segment; and one phase of training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int, PyTree

from experiments.likelihood_displacement.config import Moved, Optimizer, Training
from experiments.likelihood_displacement.prepare import Model
from jaxft.core.rng import stream
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels import parameter_mask
from jaxft.lab.resumable import Resumable, Stopped
from jaxft.nn.lora import init_lora, make_adapted_outputs, make_lora_outputs, merge_lora
from jaxft.train import (
    FitState,
    NonFiniteLossError,
    TrainState,
    adam_preconditioner,
    fit,
    init_fit,
    init_state,
    make_segment,
    second_moment,
)
from jaxft.train.loop import Segment
from jaxft.tuning.objectives import make_preference_objective

RMS_DECAY, RMS_EPS = 0.99, 1e-8
"""As of torch's RMSProp, the optimiser of the paper."""
B1, B2, ADAM_EPS = 0.9, 0.999, 1e-8
LAYERS = ["decoder/layers/"]
MATRICES = ["decoder/layers/.*kernel$"]


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
    """What is trained of a decoder: its parameters, or adapters beside them."""

    model: Model
    lora_rank: int
    seed: int

    @functools.cached_property
    def start(self) -> Params:
        """What is trained, before any training."""
        if not self.lora_rank:
            return self.model.params
        adapted = parameter_mask(self.model.params, only=MATRICES)
        key = stream(jax.random.key(self.seed), "adapters")
        return init_lora(self.model.params, adapted, rank=self.lora_rank, key=key)

    def whole(self, trained: Params) -> Params:
        """Parameters of the decoder."""
        return merge_lora(self.model.params, trained) if self.lora_rank else trained

    @functools.cached_property
    def _adapted(self) -> dict[OutputFn, OutputFn]:
        return {}

    def outputs(self, f: OutputFn) -> OutputFn:
        """An output function of the decoder as one of what is trained: the same object for the same function."""
        if not self.lora_rank:
            return f
        return self._adapted.setdefault(f, make_lora_outputs(f, self.model.params))

    def mask(self, moved: Moved) -> PyTree | None:
        """What of it moves; ``None`` is all."""
        return parameter_mask(self.start, only=LAYERS) if moved == "blocks" and not self.lora_rank else None


@dataclasses.dataclass(frozen=True)
class Method:
    """How a phase trains: the same method again meets its compiled program."""

    loss: str
    beta: float
    optimizer: Optimizer
    rate: float
    moved: Moved = "all"
    sft_weight: float = 0.0
    options: tuple[tuple[str, float], ...] = ()
    accumulate: int = 1


@functools.cache
def compiled(f: OutputFn) -> OutputFn:
    """The function as one program, the same for all who ask."""
    return jax.jit(f)


def make_transform(method: Method, mask: PyTree | None) -> optax.GradientTransformation:
    """The optimiser, which leaves what is masked out where it is."""
    tx = {
        "sgd": lambda: optax.sgd(method.rate),
        "rmsprop": lambda: optax.rmsprop(method.rate, decay=RMS_DECAY, eps=RMS_EPS, eps_in_sqrt=False),
        "adam": lambda: optax.adam(method.rate, b1=B1, b2=B2, eps=ADAM_EPS),
    }[method.optimizer]()
    if mask is None:
        return tx
    still = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, moves: u if moves else jnp.zeros_like(u), updates, mask)
    )
    return optax.chain(tx, still)


@functools.cache
def make_trainer(tuned: Tuned, method: Method, mesh: Mesh | None) -> tuple[optax.GradientTransformation, Segment]:
    """Optimiser and compiled segment, shared by all phases of a method."""
    tx = make_transform(method, tuned.mask(method.moved))
    options = dict(method.options)
    objective = make_preference_objective(method.loss, beta=method.beta, sft_weight=method.sft_weight, **options)
    f, frozen = tuned.model.log_probs, None
    if tuned.lora_rank:
        f, frozen = make_adapted_outputs(f), tuned.model.params
    return tx, make_segment(f, objective, tx, mesh=mesh, accumulate=method.accumulate, frozen=frozen)


def method_of(training: Training, optimizer: Optimizer, rate: float, moved: Moved = "all", **changes: Any) -> Method:
    """The loss of the configuration with this optimiser."""
    fields = {"loss": training.loss, "beta": training.beta, "accumulate": training.accumulate} | changes
    return Method(optimizer=optimizer, rate=rate, moved=moved, **fields)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One training among those of a run, whose steps are numbered through the run."""

    base: int
    """Number of its start; its steps follow."""
    steps: int
    key: dict[str, Any]
    """Fields of its records."""

    @property
    def end(self) -> int:
        """Number of its last step."""
        return self.base + self.steps


LOOKS = 4
"""How often a phase without events asks whether to stop."""

Event = Callable[[Params, TrainState, float], dict[str, Any]]
"""``event(before, state, loss)``: what is recorded of a step, from the parameters before it and the state after it."""


def run_phase(
    context: Resumable,
    phase: Phase,
    trainer: tuple[optax.GradientTransformation, Segment],
    start: Params,
    inputs: Inputs,
    labels: Any,
    index: Int[np.ndarray, "steps b"],
    *,
    event: Event | None = None,
) -> Params | None:
    """Trains, from the last checkpoint where it lies in this phase.

    Args:
      context: The run.
      phase: Numbers of its steps, and its fields.
      trainer: Optimiser and segment.
      start: What is trained.
      inputs: Examples.
      labels: What they are scored against.
      index: A batch of example numbers a step.
      event: Asked after every step; ``None`` records nothing.

    Returns:
      What was trained; ``None`` where the loss diverged, which is then recorded.

    Raises:
      Stopped: The user asked to. A checkpoint holds the steps so far, or, where there are events, the phase before.
    """
    tx, segment = trainer
    state = context.place(init_fit(init_state(start, tx)))
    if phase.base <= context.restored <= phase.end:
        state = context.checkpoints.restore(context.restored, state)
    before, stopped = [state.train.params], [False]

    def on_event(state: FitState, losses: np.ndarray, _: float) -> bool:
        step = int(state.train.step)
        if event is not None:
            fields = event(before[0], state.train, float(losses[-1]))
            context.record(phase.base + step, "event", **phase.key, local_step=step, **fields)
            before[0] = state.train.params
        stopped[0] = context.stop.requested
        # A phase with events is kept whole or not at all: what they add up to is in no checkpoint.
        if step == phase.steps or (stopped[0] and event is None):
            context.run.records.sync()
            context.checkpoints.save(phase.base + step, state)
            context.run.mark("running", step=phase.base + step)
        return stopped[0]

    try:
        state = fit(
            segment,
            state,
            inputs,
            labels,
            batches=lambda first, last: jnp.asarray(index[first:last]),
            steps=phase.steps,
            event_every=1 if event is not None else max(1, phase.steps // LOOKS),
            on_event=on_event,
        )
    except NonFiniteLossError as error:
        if context.stop.requested:
            raise Stopped from error
        # A resumed run takes the same steps from the last checkpoint, and diverges again if this record was cut back.
        reason = str(error).split(". ")[0]
        context.record(phase.base + error.step, "diverged", **phase.key, local_step=error.step, reason=reason)
        return None
    if stopped[0]:
        raise Stopped
    return state.train.params


def preconditioner_of(state: TrainState, optimizer: Optimizer) -> PyTree | None:
    """The diagonal P that the last step of this optimiser had; ``None`` for gradient descent.

    With it the update of RMSProp is -rate * P * gradient. That of Adam has its momentum in place of the gradient.
    """
    if optimizer == "sgd":
        return None
    if optimizer == "adam":
        return adam_preconditioner(second_moment(state.opt_state, b2=B2), eps=ADAM_EPS)
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByRmsState))
    (rms,) = [s for s in nodes if isinstance(s, optax.ScaleByRmsState)]
    return adam_preconditioner(rms.nu, eps=RMS_EPS)
