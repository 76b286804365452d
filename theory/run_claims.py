"""Claims on what a run has recorded: each judged beside the same comparison where it must fail, and their table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.core.findings import Finding
from jaxft.lab.records import number
from jaxft.lab.report import finding_rows
from theory.claims import Claim, Evidence, Kind, judge

Key = Mapping[str, Any]
"""Fields that name what one piece of evidence is about: a network, or a pair of them."""
Comparison = Callable[[Key], Evidence]

CONTROLLED_COLUMNS = ("claim", "of", "predicted", "measured", "status", "control")


class RunClaim(NamedTuple):
    """A claim, and what of the run it is about: evidence number n is that of key n."""

    claim: Claim
    keys: Sequence[Key]


def run_claim(
    claim_id: str,
    statement: str,
    kind: Kind,
    keys: Sequence[Key],
    check: Comparison,
    control: Comparison,
    breaks: str,
    *,
    source: str,
    tolerance: float | None = None,
) -> RunClaim:
    """A claim that is compared key by key: nothing is trained, the records of a run are looked up.

    Args:
      claim_id: ``<paper>/<claim>``.
      statement: What the paper says.
      kind: Kind of the claim, which sets the rule.
      keys: What it is about, a piece of evidence each.
      check: The evidence of one key.
      control: The same comparison with one assumption broken.
      breaks: That assumption.
      source: The paper.
      tolerance: Of the rule; ``None`` is that of the kind.

    Returns:
      The claim with its keys.

    Raises:
      UserError: No such kind, or a kind that needs more than this.

    Example:
      >>> losses = {"a": (0.9, 0.5), "b": (0.8, 0.3), "c": (0.7, 0.3)}
      >>> falls = run_claim(
      ...     "paper/falls", "Training lowers the loss.", "ordering", [{"net": net} for net in losses],
      ...     lambda key: compared("loss: before, after", *losses[key["net"]]),
      ...     lambda key: compared("", *reversed(losses[key["net"]])),
      ...     "before is before (here: after)", source="a paper",
      ... )
      >>> [(finding, control)] = judge_run([falls])
      >>> finding.status, control.status
      ('holds', 'violated')
    """
    claim = Claim(
        id=claim_id,
        statement=statement,
        source=source,
        kind=kind,
        check=lambda n: check(keys[n]),
        control=lambda n: control(keys[n]),
        control_breaks=breaks,
        tolerance=tolerance,
        seeds=max(3, len(keys)),
    )
    return RunClaim(claim, keys)


def compared(quantity: str, greater: Any, lesser: Any) -> Evidence:
    """Evidence from two recorded numbers: what is predicted to be the greater one (or the same), and the lesser."""
    setting = {"quantity": quantity, "precision": "float32, matmul highest"}
    return Evidence(measured=number(lesser), predicted=number(greater), setting=setting)


def judge_run(claims: Sequence[RunClaim]) -> list[tuple[Finding, Finding]]:
    """The finding of every claim and of its control; claims that this run has nothing to say on are left out."""
    found = []
    for claim, keys in claims:
        if keys:
            evidence, control = ([check(n) for n in range(len(keys))] for check in (claim.check, claim.control))
            found.append((judge(claim, evidence), judge(claim, control)))
    return found


def controlled_rows(findings: Sequence[tuple[Finding, Finding]]) -> list[dict[str, Any]]:
    """Findings as rows of ``CONTROLLED_COLUMNS``: of an ordering predicted is the greater one, measured the lesser."""
    rows = finding_rows([finding for finding, _ in findings])
    return [
        {**row, "claim": row["claim"].split("/")[1], "of": finding.setting["quantity"], "control": control.status}
        for row, (finding, control) in zip(rows, findings, strict=True)
    ]
