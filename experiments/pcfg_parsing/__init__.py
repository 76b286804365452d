"""Do masked language models parse? Zhao et al. 2023, arXiv 2303.08117.

Networks of several depths and numbers of heads are trained to predict hidden words of sentences drawn from a grammar.
Their loss is compared with the exact Bayes loss, their states are probed for what Inside-Outside computes, their
attention is laid beside that of the transformer that executes it.
"""

import sys
import time
from collections.abc import Sequence

import jax

from experiments.pcfg_parsing.config import PRESETS, PcfgParsingConfig
from experiments.pcfg_parsing.execute import execute, networks_of
from experiments.pcfg_parsing.findings import FINDING_COLUMNS, quantity_rows
from experiments.pcfg_parsing.prepare import Prepared, load_language, prepare
from experiments.pcfg_parsing.report import write_report
from experiments.pcfg_parsing.rows import LOSS_COLUMNS, loss_rows
from jaxft.core.checks import require
from jaxft.lab.config import parse_config
from jaxft.lab.devices import is_writer, make_mesh, peak_memory_bytes, setup_compilation_cache, start_distributed
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.report import progress, rich_table
from jaxft.lab.resumable import Stopped
from jaxft.lab.run import open_run

PROG = "python -m experiments run pcfg_parsing"


def main(argv: Sequence[str]) -> int:
    """Runs, resumes or reports the experiment; returns the exit status.

    0 when finished, 1 where every network diverged, 2 for faulty input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    began = time.monotonic()
    config, options, preset = parse_config(PcfgParsingConfig, PRESETS, argv, prog=PROG)
    start_distributed(options.distributed)
    setup_compilation_cache()
    with jax.default_matmul_precision("highest"):
        b, devices = config.training.batch_size, jax.device_count()
        require(b % devices == 0, PROG, f"training.batch_size must split over {devices} devices", b, "Change it")
        language = load_language(config)
        mesh = make_mesh() if devices > 1 else None
        with open_run("pcfg_parsing", config, preset=preset, seed=config.seed, where=options) as run:
            if run.finished:
                print(run.report())
                return 0
            print(f"run: {run.directory}", file=sys.stderr)
            prepared = prepare(config, language)
            with Interrupts() as stop:
                try:
                    with progress(networks_of(config), "networks") as advance:
                        ended = execute(config, run, stop, prepared, mesh, advance)
                except Stopped:
                    print("Stopped; the same command goes on from here.", file=sys.stderr)
                    return stop.exit_status
            if not ended:
                said = "Every network diverged: no loss stayed finite. Lower the learning rate."
                run.mark("failed", message=said)
                print(said, file=sys.stderr)
                return 1
            if is_writer():
                records = run.records.read()
                notes = [*_notes(config, prepared), _cost(time.monotonic() - began)]
                report, findings = write_report(config, run, records, prepared, notes)
                run.finish(report)
                rich_table(loss_rows(records), LOSS_COLUMNS)
                print()
                rich_table(quantity_rows(findings), FINDING_COLUMNS)
                print(f"\nreport: {run.directory / 'report.md'}")
    return 0


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


def _cost(seconds: float) -> str:
    peaks = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in peak_memory_bytes().items())
    return f"The last start of this run took {seconds:.0f} s; peak memory: {peaks}."
