"""The written result of a run: tables, findings, figures and the report that holds them."""

from collections.abc import Sequence

from experiments.pcfg_parsing.config import PcfgParsingConfig
from experiments.pcfg_parsing.figures import draw_figures
from experiments.pcfg_parsing.findings import findings_of
from experiments.pcfg_parsing.held_out import COLUMNS as HELD_OUT_COLUMNS
from experiments.pcfg_parsing.prepare import Prepared
from experiments.pcfg_parsing.rows import (
    HEAD_COLUMNS,
    LOSS_COLUMNS,
    PARSER_COLUMNS,
    PROBE_COLUMNS,
    bayes_of,
    head_rows,
    loss_rows,
    parser_rows,
    probe_rows,
    strongest,
)
from jaxft.core.findings import Finding
from jaxft.lab.records import Record, of_kind
from jaxft.lab.report import format_number, markdown_table, write_csv
from jaxft.lab.run import Run
from theory.run_claims import CONTROLLED_COLUMNS, controlled_rows

PROBE_RECORD_COLUMNS = (
    "model",
    "seed",
    "trained",
    "target",
    "probe",
    "layer",
    "score",
    "control_score",
    "selectivity",
    "spearman",
    "pearson_overall",
    "spearman_overall",
    "r2",
    "f1",
    "control_f1",
    "majority_accuracy",
)
HEAD_RECORD_COLUMNS = (
    "model",
    "seed",
    "trained",
    "layer",
    "head",
    "offset_r2",
    "correlation",
    "control_correlation",
)


def write_report(
    config: PcfgParsingConfig, run: Run, records: Sequence[Record], prepared: Prepared, notes: Sequence[str]
) -> tuple[str, list[tuple[Finding, Finding]]]:
    """Writes tables, figures and findings into the run's folder; returns the report and the findings."""
    findings = findings_of(records)
    write_csv(run.directory / "losses.csv", loss_rows(records), LOSS_COLUMNS)
    write_csv(run.directory / "probes.csv", of_kind(records, "probe"), PROBE_RECORD_COLUMNS)
    write_csv(run.directory / "heads.csv", of_kind(records, "attention"), HEAD_RECORD_COLUMNS)
    for finding, _ in findings:
        run.add_finding(finding)
    figures = draw_figures(run, records, prepared)
    bayes = bayes_of(records)
    parts = [
        "# Do masked language models parse?",
        "Zhao et al. 2023, *Do Transformers Parse while Predicting the Masked Word?*, arXiv 2303.08117.",
        *notes,
        "## Loss and the exact Bayes loss",
        markdown_table(loss_rows(records), LOSS_COLUMNS),
        f"Expected loss of {bayes['hidden_words']} hidden words of {config.evaluation_sentences} held-out sentences: "
        "the Bayes loss is the entropy of the exact posterior of Inside-Outside, the gap the divergence of the "
        f"network from it. The grammar with all rules equally likely has {format_number(bayes['wrong_loss_nats'])} "
        "nats. Context learnt: the part of what the posterior gains over the frequencies of words.",
        "## Findings",
        markdown_table(controlled_rows(findings), CONTROLLED_COLUMNS),
        "Of an ordering predicted is the greater one of a pair, measured the lesser, network by network. The control "
        f"is the same claim with one assumption broken, and must not hold. Probes here: {strongest(records)}.",
        "## Probes",
        markdown_table(probe_rows(records), PROBE_COLUMNS),
        "Score of the best layer on test sentences: Pearson's correlation with the exact span marginals among spans "
        "of one width, with the depth of words and of the common ancestors of neighbours (constituency) in the "
        "drawn tree among places in the sentence, accuracy for labels. Control: random but fixed targets by the "
        "words at the ends; where a probe solves it, as it can for single words, it has learnt the words by heart. "
        "F1: unlabelled, by sentence, against the tree the sentence was drawn with; spans of one word and whole "
        "sentences do not count. All layers: probes.csv.",
        "## Parsers",
        markdown_table(parser_rows(records), PARSER_COLUMNS),
        _ceilings(bayes),
        *_treebank(config, records),
        "## Attention",
        markdown_table(head_rows(records), HEAD_COLUMNS),
        "Correlation, among pairs of words at one offset, of attention with the marginal of the span between them, "
        "of the head where it is greatest in size; beside it the same with marginals dealt out anew among spans of "
        "one width, which is what the greatest of so many heads reaches by chance. Offset R²: part of the variance "
        "of the weights that the offset explains, mean over heads. Every head: heads.csv.",
        "## Figures",
        *[f"![{name}](figures/{name}.png)" for name in figures],
    ]
    return "\n\n".join(parts), findings


def _treebank(config: PcfgParsingConfig, records: Sequence[Record]) -> list[str]:
    rows = of_kind(records, "treebank")
    if not rows:
        return []
    return [
        "## Trees that the grammar was not read from",
        markdown_table(rows, HELD_OUT_COLUMNS),
        "Brackets by the conventions of evalb, as fractions, on held-out sentences of 2 to "
        f"{config.corpus.parsed_length} words. {of_kind(records, 'coverage')[0]['said']}",
    ]


def _ceilings(bayes: Record) -> str:
    depth, constituency = (format_number(bayes[f"{name}_ceiling"]) for name in ("depth", "constituency"))
    return (
        "Exact marginals: the tree of greatest expected recall. The words leave the tree open: the correlation of "
        f"the exact expectation with the drawn tree is {depth} for the depth of words and {constituency} for that of "
        "common ancestors."
    )
