"""The written result of a run: tables, findings, figures and the report that holds them."""

from collections.abc import Sequence

from experiments.kernel_finetuning.config import KernelFinetuningConfig
from experiments.kernel_finetuning.figures import draw_figures
from experiments.kernel_finetuning.findings import QUANTITY_COLUMNS, findings_of, quantity_rows
from experiments.kernel_finetuning.rows import (
    ADAPTER_COLUMNS,
    COLUMNS,
    CONTROL_COLUMNS,
    QUANTITIES,
    UNIT,
    adapter_rows,
    control_rows,
    run_rows,
    table_rows,
)
from jaxft.core.findings import Finding
from jaxft.lab.records import Record
from jaxft.lab.report import format_number, markdown_table, write_csv
from jaxft.lab.run import Run
from theory.kernel_finetuning import PAPER_THRESHOLDS, THRESHOLDS

DIVERGED_COLUMNS = (*UNIT, "optimizer", "rate", "local_step", "reason")


def write_report(
    config: KernelFinetuningConfig, run: Run, records: Sequence[Record], notes: Sequence[str]
) -> tuple[str, list[Finding]]:
    """Writes tables, figures and findings into the run's folder; returns the report and the findings."""
    rows = run_rows(records)
    table, findings = table_rows(rows), findings_of(records, rows)
    write_csv(run.directory / "table.csv", table, COLUMNS)
    solvers = [f"solver_{name}" for name in config.solving.kernels]
    exact = [*UNIT, "optimizer", "rate", *QUANTITIES.values(), "kernel_cosine", *solvers, "verdict", "paper_verdict"]
    write_csv(run.directory / "rows.csv", rows, exact)
    for finding in findings:
        run.add_finding(finding)
    figures = draw_figures(run, records, rows)
    parts = [
        "# Is this fine-tuning run a kernel method?",
        "Malladi et al. 2023, *A Kernel-Based View of Language Model Fine-Tuning*, arXiv 2210.05643.",
        *notes,
        "## Diagnostics",
        markdown_table(table, COLUMNS),
        _reading(config),
        *_diverged(records),
        "## Findings",
        markdown_table(quantity_rows(findings), QUANTITY_COLUMNS),
        "Each claim names the greater and the lesser of a pair, split by split: χ before fine-tuning, gap and drift "
        "at the lowest training loss that both arms reach, complexity that of the labels for the SGD kernel at the "
        "start. The control must be violated.",
        *_adapters(config, records),
        "## Permuted labels",
        markdown_table(control_rows(records), CONTROL_COLUMNS),
        "The control: training labels permuted, each class shared out over all classes. Alignment and complexity "
        "(√(yᵀ(K+λI)⁻¹y) at ridge 0.001, 1 for a kernel that relates nothing) are those of the training "
        "kernel with the labels; accuracy on test is that of kernel ridge regression without the initial outputs. The "
        "true labels must be the simpler ones; at chance, the permuted ones must stay.",
        "## Figures",
        *[f"![{name}](figures/{name}.png)" for name in figures],
    ]
    return "\n\n".join(parts), findings


def _reading(config: KernelFinetuningConfig) -> str:
    """How the diagnostic table is to be read."""
    kinds = {name: format_number(limit) for name, limit in THRESHOLDS.items()}
    return (
        f"Means over {len(config.splits)} splits, ± standard deviation. Measured at the parameters of best dev score; "
        "K is the kernel of the row's optimiser. Symmetric kernels are solved by ridge or logistic regression, the "
        "asymmetric one by an LS-SVM, whichever settings are best on dev. "
        f"A kernel method by ours: kernel accuracy at least {kinds['solves_frac']} of fine-tuning's, gap at most "
        f"{kinds['linearization_gap']}, feature drift at most {kinds['feature_drift']}, kernel drift at most "
        f"{kinds['kernel_drift']}. By the paper's, which are lax: {PAPER_THRESHOLDS['solves_frac']} of fine-tuning, "
        f"{PAPER_THRESHOLDS['recovered_frac']} of its gain from the tangent model, feature drift below "
        f"{PAPER_THRESHOLDS['feature_drift']}. Every run by itself, with what it fails on: rows.csv."
    )


def _diverged(records: Sequence[Record]) -> list[str]:
    found = [r for r in records if r["kind"] == "diverged"]
    said = "These learning rates diverged, and count for nothing above:"
    return [said, markdown_table(found, DIVERGED_COLUMNS)] if found else []


def _adapters(config: KernelFinetuningConfig, records: Sequence[Record]) -> list[str]:
    table = adapter_rows(records)
    if not table:
        return []
    return [
        "## Adapters",
        markdown_table(table, ADAPTER_COLUMNS),
        "Relative error (root mean square, Frobenius) of the kernel of LoRA adapters at their start, against the "
        "SGD kernel in the matrices of the encoder's layers; the prediction is its standard deviation, and falls as "
        f"1/√rank. {config.adapters.draws} draws. Beside it the two-sided random projection AᵀMB of the "
        "same gradients M, of as many features: a dense projection would cost parameters times features.",
    ]
