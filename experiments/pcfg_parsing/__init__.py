"""Do masked language models parse? Zhao et al. 2023, arXiv 2303.08117.

Networks of several depths and numbers of heads are trained to predict hidden words of sentences drawn from a grammar.
Their loss is compared with the exact Bayes loss, their states are probed for what Inside-Outside computes, their
attention is laid beside that of the transformer that executes it.
"""

from collections.abc import Sequence

from experiments.pcfg_parsing.config import PRESETS, PcfgParsingConfig
from experiments.pcfg_parsing.execute import execute, networks_of
from experiments.pcfg_parsing.prepare import Language, Prepared, load_language, prepare
from experiments.pcfg_parsing.report import write_report
from experiments.pcfg_parsing.rows import LOSS_COLUMNS, loss_rows
from jaxft.lab.launch import Job, Table, launch
from jaxft.lab.run import Run
from theory.run_claims import CONTROLLED_COLUMNS, controlled_rows


def main(argv: Sequence[str]) -> int:
    """Runs, resumes or reports the experiment; returns the exit status (see ``jaxft.lab.launch``)."""
    return launch("pcfg_parsing", PcfgParsingConfig, PRESETS, argv, load=load_language, make_job=_job)


def _job(config: PcfgParsingConfig, language: Language) -> Job:
    prepared = prepare(config, language)

    def report(run: Run, cost: str) -> tuple[str, list[Table]]:
        records = run.records.read()
        text, findings = write_report(config, run, records, prepared, [*_notes(config, prepared), cost])
        return text, [Table(loss_rows(records), LOSS_COLUMNS), Table(controlled_rows(findings), CONTROLLED_COLUMNS)]

    return Job(
        parts=networks_of(config),
        parts_name="networks",
        execute=lambda run, stop, mesh, advance: execute(config, run, stop, prepared, mesh, advance),
        report=report,
        all_diverged="Every network diverged: no loss stayed finite. Lower the learning rate.",
    )


def _notes(config: PcfgParsingConfig, prepared: Prepared) -> list[str]:
    training, corpus = config.training, config.corpus
    read = training.steps * training.batch_size
    passes = "each read once" if read <= corpus.sentences else f"{corpus.sentences} of them distinct"
    hidden = "the mask token" if training.masking == "mask" else "the mask token, a random word or the word itself"
    return [
        f"Sentences of up to {corpus.max_length} words are drawn from {prepared.source.description}. Networks of width "
        f"{config.width} are trained for {training.steps} steps on {read} sentences ({passes}), from "
        f"{len(config.seeds)} starting points each; {100 * training.mask_frac:.3g} of 100 words are hidden behind "
        f"{hidden}. A12L6 has 12 heads and 6 layers."
    ]
