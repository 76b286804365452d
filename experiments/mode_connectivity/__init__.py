"""Paths of low loss between trained networks. Kuditipudi et al. 2019, arXiv 1906.06247.

Pairs of networks of several widths and depths are trained on images, with dropout and without. Each pair is joined by
the path of Theorem 1, whose largest loss is certified beforehand, by the straight line before and after the units are
matched, and by curves and bands that are fitted. Then a small transformer is fine-tuned by several seeds on a rule that
two heuristics explain, and barriers are laid beside what each network has learnt.
"""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from experiments.mode_connectivity.config import PRESETS, ModeConnectivityConfig
from experiments.mode_connectivity.execute import Outcome, execute, pairs_of
from experiments.mode_connectivity.prepare import Prepared, load, prepare
from experiments.mode_connectivity.report import write_report
from experiments.mode_connectivity.rows import THEOREM_COLUMNS, theorem_rows
from jaxft.data.images import Images
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.launch import Job, Table, launch
from jaxft.lab.run import Run
from theory.run_claims import CONTROLLED_COLUMNS, controlled_rows


def main(argv: Sequence[str]) -> int:
    """Runs, resumes or reports the experiment; returns the exit status (see ``jaxft.lab.launch``)."""
    return launch("mode_connectivity", ModeConnectivityConfig, PRESETS, argv, load=load, make_job=_job)


def _job(config: ModeConnectivityConfig, images: Images) -> Job:
    prepared = prepare(config, images)
    outcomes: list[Outcome] = []

    def execute_all(run: Run, stop: Interrupts, mesh: Mesh | None, advance: Any) -> int:
        outcomes.append(execute(config, run, stop, prepared, mesh, advance))
        return outcomes[-1].pairs

    def report(run: Run, cost: str) -> tuple[str, list[Table]]:
        records = run.records.read()
        notes = [*_notes(config, prepared), cost]
        text, findings = write_report(config, run, records, outcomes[-1].heuristics, images.classes, notes)
        return text, [
            Table(theorem_rows(records), THEOREM_COLUMNS),
            Table(controlled_rows(findings), CONTROLLED_COLUMNS),
        ]

    return Job(
        parts=len(list(pairs_of(config))) + config.heuristics.models,
        parts_name="pairs",
        execute=execute_all,
        report=report,
        all_diverged="No pair of networks stayed finite. Lower the learning rate.",
    )


def _notes(config: ModeConnectivityConfig, prepared: Prepared) -> list[str]:
    images, training, fits = prepared.images, config.training, config.paths
    evaluated = [part[0].shape[0] * part[0].shape[1] for part in prepared.splits]
    return [
        f"Images: {images.source}; losses are means over {evaluated[0]} for training and {evaluated[1]} for testing. "
        f"{len(config.seeds)} pairs of networks of each kind, trained for {training.steps} steps of Adam on batches of "
        f"{training.batch_size}. Curves are fitted for {fits.steps} steps, {fits.points_per_step} points a step; the "
        f"polychain has {fits.bends} bends, the band {fits.pivots} pivots. A network 2x256 has 2 hidden layers of "
        "256 units."
    ]
