"""Is this fine-tuning run a kernel method? Malladi et al. 2023, arXiv 2210.05643.

For every task, k-shot sample and arm (cloze prompt, fresh linear head, head at the linear probe) a network is
fine-tuned by SGD, Adam and sign descent, and compared with the kernels of its starting point. Beside it stand the
kernels of LoRA adapters and, as a control, what the kernels make of permuted labels.
"""

import sys
import time
from collections.abc import Sequence

import jax

from experiments.kernel_finetuning.config import PRESETS, KernelFinetuningConfig
from experiments.kernel_finetuning.dynamics import is_kernel_descent
from experiments.kernel_finetuning.execute import execute, phases_of
from experiments.kernel_finetuning.findings import QUANTITY_COLUMNS, quantity_rows
from experiments.kernel_finetuning.measure import ASYMMETRIC
from experiments.kernel_finetuning.prepare import Model, TaskData, load_model, load_task
from experiments.kernel_finetuning.report import write_report
from experiments.kernel_finetuning.rows import SCREEN_COLUMNS, run_rows, table_rows
from jaxft.core.checks import require
from jaxft.lab.config import parse_config
from jaxft.lab.devices import is_writer, make_mesh, peak_memory_bytes, setup_compilation_cache, start_distributed
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.report import progress, rich_table
from jaxft.lab.resumable import Stopped
from jaxft.lab.run import open_run

PROG = "python -m experiments run kernel_finetuning"


def main(argv: Sequence[str]) -> int:
    """Runs, resumes or reports the experiment; returns the exit status.

    0 when finished, 1 where every phase diverged, 2 for faulty input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    began = time.monotonic()
    config, options, preset = parse_config(KernelFinetuningConfig, PRESETS, argv, prog=PROG)
    start_distributed(options.distributed)
    setup_compilation_cache()
    with jax.default_matmul_precision("highest"):
        model = load_model(config)
        data = [load_task(config, model, name) for name in config.task]
        mesh = make_mesh() if jax.device_count() > 1 else None
        b, devices = config.training.batch_size, jax.device_count()
        require(b % devices == 0, PROG, f"training.batch_size must split over {devices} devices", b, "Change it")
        with open_run("kernel_finetuning", config, preset=preset, seed=config.seed, where=options) as run:
            if run.finished:
                print(run.report())
                return 0
            print(f"run: {run.directory}", file=sys.stderr)
            with Interrupts() as stop:
                try:
                    with progress(phases_of(config), "fine-tuning") as advance:
                        ended = execute(config, run, stop, model, data, mesh, advance)
                except Stopped:
                    print("Stopped; the same command goes on from here.", file=sys.stderr)
                    return stop.exit_status
            if not ended:
                said = "Every phase diverged: no loss stayed finite. Lower the learning rates."
                run.mark("failed", message=said)
                print(said, file=sys.stderr)
                return 1
            if is_writer():
                records = run.records.read()
                notes = [*_notes(config, model, data), _cost(time.monotonic() - began)]
                report, findings = write_report(config, run, records, notes)
                run.finish(report)
                rich_table(
                    table_rows(run_rows(records), spread=False),
                    [c for c in SCREEN_COLUMNS if c != "k" or len(config.k) > 1],
                )
                print()
                rich_table(quantity_rows(findings), QUANTITY_COLUMNS)
                print(f"\nreport: {run.directory / 'report.md'}")
    return 0


def _notes(config: KernelFinetuningConfig, model: Model, data: Sequence[TaskData]) -> list[str]:
    sizes = f"{model.encoder.layers} layers, width {model.encoder.width}"
    notes = [f"Model: {model.source} ({sizes}). Tasks: {', '.join(config.task)}; k = {', '.join(map(str, config.k))}."]
    if "sign" in config.optimizers and not is_kernel_descent("sign", 2, config.training):
        notes.append(
            f"Sign descent on batches of {config.training.batch_size} under {config.training.objective} is no kernel "
            "descent, since the sign of a sum of gradients does not split: no path is predicted for it."
        )
    many = [task.task.name for task in data if task.task.classes > 2]
    if many and ASYMMETRIC in config.solving.kernels:
        notes.append(f"The asymmetric kernel of sign descent needs two classes; without it: {', '.join(many)}.")
    if "prompt" in config.arms and not model.has_mlm:
        notes.append(
            "The checkpoint has no masked-word head: the prompt arm reads label words through the tied input "
            "embeddings, which nothing has trained to be read."
        )
    return notes


def _cost(seconds: float) -> str:
    peaks = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in peak_memory_bytes().items())
    return f"The last start of this run took {seconds:.0f} s; peak memory: {peaks}."
