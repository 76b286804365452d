"""Is this fine-tuning run a kernel method? Malladi et al. 2023, arXiv 2210.05643.

For every task, k-shot sample and arm (cloze prompt, fresh linear head, head at the linear probe) a network is
fine-tuned by SGD, Adam and sign descent, and compared with the kernels of its starting point. Beside it stand the
kernels of LoRA adapters and, as a control, what the kernels make of permuted labels.
"""

from collections.abc import Sequence

from experiments.kernel_finetuning.config import PRESETS, KernelFinetuningConfig
from experiments.kernel_finetuning.dynamics import is_kernel_descent
from experiments.kernel_finetuning.execute import execute, phases_of
from experiments.kernel_finetuning.findings import QUANTITY_COLUMNS, quantity_rows
from experiments.kernel_finetuning.measure import ASYMMETRIC
from experiments.kernel_finetuning.prepare import Model, TaskData, load_model, load_task
from experiments.kernel_finetuning.report import write_report
from experiments.kernel_finetuning.rows import SCREEN_COLUMNS, run_rows, table_rows
from jaxft.lab.launch import Job, Table, launch
from jaxft.lab.run import Run

Loaded = tuple[Model, list[TaskData]]


def main(argv: Sequence[str]) -> int:
    """Runs, resumes or reports the experiment; returns the exit status (see ``jaxft.lab.launch``)."""
    return launch("kernel_finetuning", KernelFinetuningConfig, PRESETS, argv, load=_load, make_job=_job)


def _load(config: KernelFinetuningConfig) -> Loaded:
    model = load_model(config)
    return model, [load_task(config, model, name) for name in config.task]


def _job(config: KernelFinetuningConfig, loaded: Loaded) -> Job:
    model, data = loaded

    def report(run: Run, cost: str) -> tuple[str, list[Table]]:
        records = run.records.read()
        text, findings = write_report(config, run, records, [*_notes(config, model, data), cost])
        columns = [c for c in SCREEN_COLUMNS if c != "k" or len(config.k) > 1]
        first = Table(table_rows(run_rows(records), spread=False), columns)
        return text, [first, Table(quantity_rows(findings), QUANTITY_COLUMNS)]

    return Job(
        parts=phases_of(config),
        parts_name="fine-tuning",
        execute=lambda run, stop, mesh, advance: execute(config, run, stop, model, data, mesh, advance),
        report=report,
        all_diverged="Every phase diverged: no loss stayed finite. Lower the learning rates.",
    )


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
