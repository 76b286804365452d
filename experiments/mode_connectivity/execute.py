"""The run itself: every pair of networks in a fixed order, each resumed where it was left.

Both networks of a pair are trained, then everything between them is measured. Steps are numbered through the run:
network p holds steps p * (steps + 1) to p * (steps + 1) + steps, the first of them its start; what is measured of a
pair carries the last step of its second network.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.mode_connectivity.config import ModeConnectivityConfig
from experiments.mode_connectivity.heuristics import HeuristicsResult, measure_heuristics
from experiments.mode_connectivity.networks import (
    Network,
    initial_params,
    leaves_by_name,
    params_from_leaves,
    trainer,
)
from experiments.mode_connectivity.pairs import measure_pair
from experiments.mode_connectivity.prepare import Prepared
from experiments.mode_connectivity.shown import measure_shown
from jaxft.core.types import Params
from jaxft.data.batching import batch_indices
from jaxft.geometry.path_loss import mean_over_batches
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.resumable import Resumable, Stopped, resume
from jaxft.lab.run import Run
from jaxft.train import FitState, NonFiniteLossError, fit, init_fit, init_state


class Pair(NamedTuple):
    """Two networks that differ in their starting points and batches alone."""

    number: int
    net: str
    dropout: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """Fields of its records."""
        return {"net": self.net, "dropout": self.dropout, "seed": self.seed}

    def file(self, part: str) -> str:
        """Name of a file of arrays."""
        return f"{self.net}-{self.dropout:g}-{self.seed}-{part}"


@dataclasses.dataclass(frozen=True)
class SharedArrays:
    """The arrays of a run where several processes read what the first of them writes: all call it in one order."""

    run: Run

    def save_arrays(self, name: str, /, **arrays: Any) -> None:
        """Keeps arrays; when it returns they are there for all processes."""
        self.run.save_arrays(name, **arrays)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def has_arrays(self, name: str) -> bool:
        """Whether arrays are kept under a name: all processes say the same."""
        there = self.run.has_arrays(name)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            there = bool(multihost_utils.broadcast_one_to_all(np.asarray(there)))
        return there

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays kept under a name."""
        return self.run.load_arrays(name)


@dataclasses.dataclass(frozen=True)
class Context(Resumable):
    """What all pairs of a run share."""

    config: ModeConnectivityConfig
    prepared: Prepared

    @property
    def arrays(self) -> SharedArrays:
        """Arrays of the run."""
        return SharedArrays(self.run)


class Outcome(NamedTuple):
    """What came of a run."""

    pairs: int
    """Pairs that came to an end."""
    heuristics: HeuristicsResult | None
    """``None`` where that part is left out, or too few of its networks stayed finite."""


def pairs_of(config: ModeConnectivityConfig) -> Iterator[Pair]:
    """All pairs of a run, in order."""
    kinds = [(net, dropout, seed) for net in config.nets for dropout in config.dropout for seed in config.seeds]
    for number, (net, dropout, seed) in enumerate(kinds):
        yield Pair(number, net, dropout, seed)


def execute(
    config: ModeConnectivityConfig, run: Run, stop: Interrupts, prepared: Prepared, mesh: Mesh | None, advance: Any
) -> Outcome:
    """Trains and measures all pairs, then the networks of the language-model part; what is done is not done again.

    A network whose loss or parameters are no longer finite is recorded as ``diverged``, and its pair is left out.

    Raises:
      Stopped: The user asked to.
    """
    with resume(run, stop, mesh=mesh, sharding="replicated") as resumable:
        context = Context(**vars(resumable), config=config, prepared=prepared)
        ended = 0
        for pair in pairs_of(config):
            if not context.recorded("pair", pair.key):
                _pair(context, pair)
            ended += context.recorded("pair", pair.key)
            advance(note=f"{pair.net}, dropout {pair.dropout:g}, seed {pair.seed}")
        _shown(context)
        return Outcome(ended, _heuristics(context, advance) if ended else None)


def trained_params(run: Run, network: Network, pair: Pair) -> list[Params]:
    """The two networks of a pair that has come to an end."""
    return [params_from_leaves(network, run.load_arrays(pair.file(side))) for side in ("a", "b")]


def _pair(context: Context, pair: Pair) -> None:
    """Trains both networks and measures what lies between them; nothing more where one of them diverges."""
    config, prepared = context.config, context.prepared
    for side in (0, 1):
        key = {**pair.key, "side": "ab"[side]}
        if not (context.recorded("network", key) or context.recorded("diverged", key)):
            _train(context, pair, side, key)
    if context.recorded("diverged", pair.key):
        return
    network = prepared.network(pair.net, pair.dropout)
    a, b = trained_params(context.run, network, pair)
    found = measure_pair(network, a, b, prepared, config, number=pair.number)
    at = _last_step(config, pair)
    context.arrays.save_arrays(pair.file("paths"), **found.arrays)
    for row in found.paths:
        if not context.recorded("path", {**pair.key, "path": row["path"]}):
            context.record(at, "path", **pair.key, **row)
    context.record(at, "pair", **pair.key, **found.facts)
    context.run.records.sync()
    if context.stop.requested:
        raise Stopped


def _last_step(config: ModeConnectivityConfig, pair: Pair) -> int:
    return (2 * pair.number + 2) * (config.training.steps + 1) - 1


def _train(context: Context, pair: Pair, side: int, key: dict[str, Any]) -> None:
    """Trains one network, and keeps its parameters unless it diverges."""
    config, training, prepared = context.config, context.config.training, context.prepared
    number = 2 * pair.number + side
    base = number * (training.steps + 1)
    network = prepared.network(pair.net, pair.dropout)
    tx, segment = trainer(pair.net, pair.dropout, prepared.image_shape, prepared.images.classes, training, context.mesh)
    # Pairs of one seed have the same starting points and batches for every dropout: that alone tells them apart.
    twin = 2 * pair.seed + side
    state = context.place(init_fit(init_state(initial_params(network, config, twin), tx)))
    if base <= context.restored <= base + training.steps:
        state = context.checkpoints.restore(context.restored, state)
    n = len(prepared.x_train)

    def on_event(state: FitState, losses: np.ndarray, _: float) -> bool:
        step = int(state.train.step)
        found = mean_over_batches(network.split_losses, state.train.params, prepared.splits)
        values = {name: float(x) for name, x in found.items()}
        context.record(base + step, "event", **key, local_step=step, batch_loss=float(losses.mean()), **values)
        context.run.records.sync()
        context.checkpoints.save(base + step, state)
        context.run.mark("running", step=base + step)
        return context.stop.requested

    try:
        state = fit(
            segment,
            state,
            (prepared.x_train, jnp.full(n, number, jnp.int32)),
            prepared.y_train,
            batches=lambda start, stop: batch_indices(
                n, training.batch_size, seed=config.seed, name=f"training {twin}", start=start, stop=stop
            ),
            steps=training.steps,
            event_every=training.event_every,
            on_event=on_event,
        )
    except NonFiniteLossError as diverged:
        # A resumed run takes the same steps from the last checkpoint, and diverges again if this record was cut back.
        reason = str(diverged).split(". ")[0]
        context.record(base + diverged.step, "diverged", **key, local_step=diverged.step, reason=reason)
        return
    if int(state.train.step) < training.steps:
        raise Stopped
    params = state.train.params
    if network.statistics is not None:
        params = network.statistics(params, prepared.splits)
    context.arrays.save_arrays(pair.file(key["side"]), **leaves_by_name(params))
    context.record(base + training.steps, "network", **key)


def _shown(context: Context) -> None:
    """The plane and the matrix of the networks of the configured kind, if any pair of theirs came to an end."""
    config, shown = context.config, context.config.plane
    pairs = [p for p in pairs_of(config) if (p.net, p.dropout) == (shown.net, shown.dropout)]
    done = [pair for pair in pairs if context.recorded("pair", pair.key)]
    if not done or context.recorded("matrix", {}):
        return
    network = context.prepared.network(shown.net, shown.dropout)
    models = [params for pair in done for params in trained_params(context.run, network, pair)]
    labels = [f"{pair.seed}{side}" for pair in done for side in "ab"]
    bend = {
        name.removeprefix("bend/"): x
        for name, x in context.arrays.load_arrays(done[0].file("paths")).items()
        if name.startswith("bend/")
    }
    arrays, facts = measure_shown(
        network, models, params_from_leaves(network, bend) if bend else None, context.prepared, config
    )
    context.arrays.save_arrays("shown", **arrays)
    context.record(_last_step(config, list(pairs_of(config))[-1]), "matrix", labels=labels, **facts)


def _heuristics(context: Context, advance: Any) -> HeuristicsResult | None:
    """Fine-tuned networks, and the barriers between them: kept one by one, and measured at every start."""
    config = context.config
    if not config.heuristics.models:
        return None
    result = measure_heuristics(
        config.heuristics, context.arrays, seed=config.seed, advance=advance, stopped=lambda: context.stop.requested
    )
    if result is not None:
        context.arrays.save_arrays("heuristics", **result.arrays())
    return result
