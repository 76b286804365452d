"""The run itself: the phases of all parts in a fixed order, each resumed where it was left.

Steps are numbered through the run: a phase of s steps has s + 1 numbers, the first of them its start.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.sharding import Mesh

from experiments.likelihood_displacement import percentiles, single, unalignment
from experiments.likelihood_displacement.config import LikelihoodDisplacementConfig
from experiments.likelihood_displacement.prepare import Loaded
from experiments.likelihood_displacement.tuners import Phase, Tuned
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.resumable import resume
from jaxft.lab.run import Run


class Plans(NamedTuple):
    """All phases of a run."""

    sft: dict[str, Phase]
    single: list[single.Plan]
    percentiles: list[percentiles.Plan]
    unalignment: list[unalignment.Plan]

    @property
    def parts(self) -> int:
        """Number of runs that are counted."""
        return len(self.single) + len(self.percentiles) + len(self.unalignment)


def plans_of(config: LikelihoodDisplacementConfig) -> Plans:
    """All phases, numbered one after another."""
    has = config.parts
    sft = single.sft_phases(config.single, 0) if "single" in has else {}
    base = _next([*sft.values()])
    runs = single.single_plans(config.single, base) if "single" in has else []
    base = _next([p.phase for p in runs], base)
    subsets = percentiles.percentile_plans(config.percentiles, base) if "percentiles" in has else []
    base = _next([p.phase for p in subsets], base)
    arms = unalignment.unalignment_plans(config.unalignment, base) if "unalignment" in has else []
    return Plans(sft, runs, subsets, arms)


def execute(
    config: LikelihoodDisplacementConfig, run: Run, stop: Interrupts, loaded: Loaded, mesh: Mesh | None, advance: Any
) -> int:
    """Runs all phases, and returns how many came to an end; what an earlier start has done is not done again.

    A phase whose loss or parameters are no longer finite is recorded as ``diverged``, and the next one begins.

    Raises:
      Stopped: The user asked to.
    """
    plans, ended = plans_of(config), 0
    with resume(run, stop, mesh=mesh, sharding=config.training.sharding) as context:
        tuned = Tuned(loaded.model, config.training.lora_rank, config.seed)
        parts: list[Iterator[tuple[Any, bool]]] = [
            single.run_single(config, context, loaded, tuned, plans.sft, plans.single),
            percentiles.run_percentiles(config, context, loaded, tuned, plans.percentiles),
            unalignment.run_unalignment(config, context, loaded, tuned, plans.unalignment),
        ]
        for part in parts:
            for plan, finished in part:
                ended += finished
                advance(note=", ".join(str(value) for value in plan.phase.key.values()))
    return ended


def _next(phases: list[Phase], base: int = 0) -> int:
    return phases[-1].end + 1 if phases else base
