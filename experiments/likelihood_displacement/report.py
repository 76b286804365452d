"""The written result of a run: tables, findings, figures and the report that holds them."""

from collections.abc import Sequence

from experiments.likelihood_displacement.config import LikelihoodDisplacementConfig
from experiments.likelihood_displacement.figures import draw_figures
from experiments.likelihood_displacement.findings import findings_of
from experiments.likelihood_displacement.prepare import Model
from experiments.likelihood_displacement.rows import (
    ARM_COLUMNS,
    GAIN_COLUMNS,
    RUN,
    SINGLE_COLUMNS,
    TERM_COLUMNS,
    arm_rows,
    gain_rows,
    percentile_columns,
    percentile_rows,
    single_rows,
    single_runs,
    term_rows,
)
from jaxft.core.findings import Finding
from jaxft.lab.records import Record, number, of_kind
from jaxft.lab.report import format_number, markdown_table, write_csv
from jaxft.lab.run import Run
from theory.run_claims import CONTROLLED_COLUMNS, controlled_rows

DIVERGED_COLUMNS = ("part", "what", "local_step", "reason")
RUN_COLUMNS = (
    *RUN,
    *("steady", "rises", "steps", "p_start", "p_lowest", "p_end", "change", "lowest", "flow_rate"),
    *(f"{name}_{side}" for side in ("chosen", "rejected") for name in ("change", "predicted", "gram")),
    *(f"first_{name}_chosen" for name in ("change", "predicted", "gram")),
    *("rank_predicted", "rank_steps", "rank_unembedding", "rank_shuffled"),
)


def write_report(
    config: LikelihoodDisplacementConfig, run: Run, records: Sequence[Record], model: Model, notes: Sequence[str]
) -> tuple[str, list[tuple[Finding, Finding]]]:
    """Writes tables, figures and findings into the run's folder.

    Args:
      config: The configuration.
      run: The run.
      records: Its records.
      model: The decoder, for the names of tokens.
      notes: What the report says first.

    Returns:
      The report and the findings.
    """
    runs = single_runs(records)
    findings = findings_of(records, config.single.similar)
    write_csv(run.directory / "runs.csv", runs, RUN_COLUMNS)
    for finding, _ in findings:
        run.add_finding(finding)
    figures = draw_figures(run, records, runs, model)
    parts = [
        "# Likelihood displacement in preference tuning",
        "Razin et al. 2025, *Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization*, "
        "arXiv 2410.08847.",
        *notes,
        *_diverged(records),
        *(_single(config, runs) if runs else []),
        *(_percentiles(config, records) if of_kind(records, "score") else []),
        *(_unalignment(config, records) if of_kind(records, "start", part="unalignment") else []),
        "## Findings",
        markdown_table(controlled_rows(findings), CONTROLLED_COLUMNS),
        "Of an ordering predicted is the greater one, measured the lesser, pair by pair; of an association they are "
        "the sign and the rank correlation. The control is the same claim with one assumption broken, and must not "
        "hold. A violated or inconclusive claim of the paper is a result for this decoder.",
        "## Figures",
        *[f"![{name}](figures/{name}.png)" for name in figures],
    ]
    return "\n\n".join(parts), findings


def _single(config: LikelihoodDisplacementConfig, runs: Sequence[Record]) -> list[str]:
    single, steady = config.single, [r for r in runs if r["steady"]]
    falls = [sum(r["change"] < 0 for r in of) for of in (runs, steady)]
    first = [abs(number(r["first_change_chosen"]) - number(r["first_predicted_chosen"])) for r in runs]
    scale = [abs(number(r["first_change_chosen"])) for r in runs]
    return [
        "## One prompt, two answers",
        markdown_table(single_rows(runs), SINGLE_COLUMNS),
        f"One prompt at a time, {single.steps} steps of {config.training.loss} (beta {config.training.beta:g}) on two "
        "answers of one token, means over prompts. Δ ln p(y+) is measured over the run; beside it stand the sums of "
        "the predictions of its steps to first order, along the update of the optimiser and by the Gram matrix of "
        "gradients with the preconditioner of the step (which leaves Adam's momentum out). Of the first step alone the "
        f"prediction is off by {format_number(sum(first))} of {format_number(sum(scale))} nats, summed over runs.",
        f"The loss rose at some step in {len(runs) - len(steady)} of {len(runs)} runs, which the paper leaves out. ln "
        f"p(y+) fell in {falls[0]} of {len(runs)} runs, and in {falls[1]} of the {len(steady)} whose loss never rose. "
        "Every run by itself: runs.csv.",
        "### What the rate is made of",
        markdown_table(term_rows(runs), TERM_COLUMNS),
        "Rates of ln p(y+) under gradient flow at the start, over -l'. The first terms are those of Theorem 4, for a "
        "decoder whose hidden states were free parameters; the rate of the whole network is that of the parameters "
        "that are trained, by their Gram matrix. The part through the unembedding is never negative for one "
        "token, and absent where the unembedding is frozen. Last: lengths of the projection of W+ - W- onto W+ and of "
        "the rest.",
        "### Who gained",
        markdown_table(gain_rows(runs), GAIN_COLUMNS),
        "Tokens by probability gained, and rank correlations over all other tokens of the vocabulary, between their "
        "change over the run and three predictions: first-order change in the first step, the sum of such changes over "
        "all steps, and Theorem 5's inner products of unembeddings.",
    ]


def _percentiles(config: LikelihoodDisplacementConfig, records: Sequence[Record]) -> list[str]:
    part, scored = config.percentiles, of_kind(records, "score")
    pairs = sorted({r["pairs"] for r in scored})
    equal = max(number(r["first_tokens_equal_frac"]) for r in scored)
    return [
        "## Percentiles of scores",
        markdown_table(percentile_rows(records), percentile_columns(records)),
        f"Change of the mean ln p(y+), in nats, of the pairs that are tuned on: {part.size} around each percentile of "
        f"{', '.join(map(str, pairs))} pairs, {part.steps} steps of {part.optimizer} at rate {part.learning_rate:g}; "
        f"means and standard errors over {len(part.seeds)} seeds, which draw pairs and batches. All scores are signed "
        "so that a high one foretells a fall: a rank correlation of -1 with the percentile is perfect. The last "
        "columns are rank correlations over all pairs, with the difference of lengths in tokens, which is a confounder "
        f"of sums over tokens, and with minus the rate that the Gram matrix gives. Up to {format_number(equal)} of the "
        "pairs begin with the same token, which Theorem 6 excludes.",
    ]


def _unalignment(config: LikelihoodDisplacementConfig, records: Sequence[Record]) -> list[str]:
    part = config.unalignment
    both = [number(r["both_refusals_frac"]) for r in of_kind(records, "start", part="unalignment")]
    return [
        "## Tuned on refusals",
        markdown_table(arm_rows(records), ARM_COLUMNS),
        f"Parts of requests that are refused, by one sampled response each, before and after {part.steps} steps of "
        f"{part.optimizer} at rate {part.learning_rate:g} on pairs of the decoder's own responses, of which "
        f"{format_number(sum(both) / len(both))} are two refusals. The filter keeps {format_number(part.keep_frac)} of "
        "the pairs; every arm takes as many steps. Means and standard errors over "
        f"{len(part.seeds)} seeds. Mass is the probability of the first tokens of refusals and of compliances after "
        "the requests that are tuned on.",
    ]


def _diverged(records: Sequence[Record]) -> list[str]:
    found = of_kind(records, "diverged")
    names = ("part", "step", "kind", "local_step", "reason")
    rows = [{**r, "what": ", ".join(str(v) for k, v in r.items() if k not in names)} for r in found]
    return ["These runs diverged, and are left out:", markdown_table(rows, DIVERGED_COLUMNS)] if rows else []
