"""Preference tuning that lowers the preferred response. Razin et al. 2025, arXiv 2410.08847.

One prompt with two answers is tuned on step by step, each step predicted to first order; pairs are tuned on by
percentiles of scores that are to foretell the fall; and a decoder that refuses is tuned on preferences between its own
refusals, with the remedies that are proposed and the controls that they need.
"""

from collections.abc import Sequence

from experiments.likelihood_displacement.config import PRESETS, LikelihoodDisplacementConfig
from experiments.likelihood_displacement.execute import execute, plans_of
from experiments.likelihood_displacement.prepare import Loaded, load
from experiments.likelihood_displacement.report import write_report
from experiments.likelihood_displacement.rows import ARM_COLUMNS, SINGLE_COLUMNS, arm_rows, single_rows, single_runs
from jaxft.lab.launch import Job, Table, launch
from jaxft.lab.run import Run
from theory.run_claims import CONTROLLED_COLUMNS, controlled_rows

SCREEN_COLUMNS = tuple(c for c in SINGLE_COLUMNS if c not in ("lowest", "by the Gram matrix"))


def main(argv: Sequence[str]) -> int:
    """Runs, resumes or reports the experiment; returns the exit status (see ``jaxft.lab.launch``)."""
    return launch("likelihood_displacement", LikelihoodDisplacementConfig, PRESETS, argv, load=load, make_job=_job)


def _job(config: LikelihoodDisplacementConfig, loaded: Loaded) -> Job:
    def report(run: Run, cost: str) -> tuple[str, list[Table]]:
        records = run.records.read()
        text, findings = write_report(config, run, records, loaded.model, [*_notes(config, loaded), cost])
        tables = [
            Table(single_rows(single_runs(records)), SCREEN_COLUMNS),
            Table(arm_rows(records), ARM_COLUMNS[:7]),
            Table(controlled_rows(findings), CONTROLLED_COLUMNS),
        ]
        return text, [table for table in tables if table.rows]

    return Job(
        parts=plans_of(config).parts,
        parts_name="runs",
        execute=lambda run, stop, mesh, advance: execute(config, run, stop, loaded, mesh, advance),
        report=report,
        all_diverged="Every run diverged: no loss stayed finite. Lower the learning rates.",
    )


def _notes(config: LikelihoodDisplacementConfig, loaded: Loaded) -> list[str]:
    decoder, training = loaded.model.config, config.training
    size = f"{decoder.family}, {decoder.layers} layers, width {decoder.width}"
    trained = f"LoRA adapters of rank {training.lora_rank}" if training.lora_rank else "parameters"
    notes = [
        f"Model: {loaded.model.source} ({size}). Loss: {training.loss}, beta {training.beta:g}; trained: {trained}."
    ]
    if loaded.pairs is not None:
        notes.append(f"Pairs: {loaded.pairs.report()}.")
        notes += [f"Line {fault.line} was dropped: {fault.text}." for fault in loaded.pairs.dropped[:10]]
    return notes
