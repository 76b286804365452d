"""The written result of a run: tables, findings, figures and the report that holds them."""

from collections.abc import Sequence

from experiments.mode_connectivity.config import ModeConnectivityConfig
from experiments.mode_connectivity.figures import draw_figures
from experiments.mode_connectivity.findings import findings_of
from experiments.mode_connectivity.heuristics import HeuristicsResult
from experiments.mode_connectivity.heuristics_rows import heuristics_section
from experiments.mode_connectivity.rows import (
    ENSEMBLE_COLUMNS,
    PATH_COLUMNS,
    THEOREM_COLUMNS,
    ensemble_rows,
    path_rows,
    theorem_rows,
    vacuity_notes,
)
from jaxft.core.findings import Finding
from jaxft.lab.records import Record, of_kind
from jaxft.lab.report import format_number, markdown_table, write_csv
from jaxft.lab.run import Run
from theory.run_claims import CONTROLLED_COLUMNS, controlled_rows

PATH_RECORD_COLUMNS = (
    *("net", "dropout", "seed", "path", "points", "length_ratio", "train_barrier", "test_barrier", "error_barrier"),
    *("train_loss_max", "train_error_max", "test_loss_max", "test_error_max"),
)


def write_report(
    config: ModeConnectivityConfig,
    run: Run,
    records: Sequence[Record],
    heuristics: HeuristicsResult | None,
    classes: int,
    notes: Sequence[str],
) -> tuple[str, list[tuple[Finding, Finding]]]:
    """Writes tables, figures and findings into the run's folder.

    Args:
      config: The configuration.
      run: The run.
      records: Its records.
      heuristics: What came of the language-model part.
      classes: Number of classes of the images.
      notes: What the report says first.

    Returns:
      The report and the findings.
    """
    findings = findings_of(records)
    write_csv(run.directory / "paths.csv", of_kind(records, "path"), PATH_RECORD_COLUMNS)
    for finding, _ in findings:
        run.add_finding(finding)
    figures = draw_figures(run, records, config, heuristics)
    parts = [
        "# Mode connectivity: paths with certificates",
        "Kuditipudi et al. 2019, *Explaining Landscape Connectivity of Low-cost Solutions for Multilayer Nets*, "
        "arXiv 1906.06247.",
        *notes,
        *_diverged(records),
        "## The constructive path of Theorem 1",
        markdown_table(theorem_rows(records), THEOREM_COLUMNS),
        f"Training losses in nats, means over pairs. ε: by how much the loss rises when half of the units of the last, "
        f"the last two, ... hidden layers are dropped; the best and the median of {config.stability.draws} random "
        "halves, the greater of the two networks. Bound: loss and ε of the ends, which the best halves of both give. "
        "Certificate: the largest of the 2H+2 losses between which the path is flat or convex, known before the path "
        "is built. The rest is measured: the largest loss on a grid of the path that holds its breakpoints, the "
        "largest on the straight line, and the largest training error (fraction) on the path.",
        "Where the theorem says something:",
        "\n".join(vacuity_notes(records, classes)),
        "## All paths",
        "Barriers: largest rises of the training loss over the chord of the ends, in nats.",
        markdown_table(path_rows(records, "train_barrier"), PATH_COLUMNS),
        "Largest test errors (fractions).",
        markdown_table(path_rows(records, "test_error_max"), PATH_COLUMNS),
        "Lengths over the distance of the ends.",
        markdown_table(path_rows(records, "length_ratio"), PATH_COLUMNS),
        "Means over pairs; paths.csv has every pair. The shuffled network is the second one with its units in random "
        "order: the control of matching.",
        "## Findings",
        markdown_table(controlled_rows(findings), CONTROLLED_COLUMNS),
        "Of an ordering predicted is the greater one, measured the lesser, pair by pair. The control is the same claim "
        "with one assumption broken, and must not hold.",
        "## Ensembles",
        markdown_table(ensemble_rows(records), ENSEMBLE_COLUMNS),
        "Test errors (fractions), means over pairs: mean probabilities of both ends, and of 5 points of the Bézier "
        "curve.",
        *_matrix(config, records),
        *(heuristics_section(config.heuristics, heuristics) if config.heuristics.models else []),
        "## Figures",
        *[f"![{name}](figures/{name}.png)" for name in figures],
    ]
    return "\n\n".join(parts), findings


def _diverged(records: Sequence[Record]) -> list[str]:
    lost = of_kind(records, "diverged")
    names = ", ".join(f"{r['net']} (dropout {r['dropout']:g}, seed {r['seed']}{r['side']})" for r in lost)
    failed = [
        f"{r['net']} (dropout {r['dropout']:g}, seed {r['seed']}): {name.removesuffix('_failed')}"
        for r in of_kind(records, "pair")
        for name in r
        if name.endswith("_failed")
    ]
    said = [f"Diverged, and left out with their pairs: {names}."] if lost else []
    return said + (
        [f"Paths that could not be fitted, since their loss diverged: {', '.join(failed)}."] if failed else []
    )


def _matrix(config: ModeConnectivityConfig, records: Sequence[Record]) -> list[str]:
    found = of_kind(records, "matrix")
    if not found:
        return []
    matrix, shown = found[0], config.plane
    before, after = (
        f"{format_number(matrix[f'{name}_mean'])} on average, {format_number(matrix[f'{name}_max'])} at most"
        for name in ("trained", "matched")
    )
    return [
        "## Barriers between all networks of one kind",
        f"Between the {len(matrix['labels'])} networks {shown.net} of dropout {shown.dropout:g}, straight lines have "
        f"barriers of {before} (nats); after all are matched to the first one, {after}.",
    ]
