"""Command line: ``python -m theory list [slug] | show <claim> | check [slug] [--json FILE]``."""

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxft.core.checks import UserError, message, nearest
from jaxft.lab.devices import setup_compilation_cache
from jaxft.lab.records import write_json
from jaxft.lab.report import format_number, rich_table
from theory import PAPERS
from theory.claims import EXACT_KINDS, RULE_TEXTS, Claim, Finding, check_claim

COLUMNS = ("claim", "source", "predicted", "measured", "status", "control")


def claims_of(slug: str) -> Sequence[Claim]:
    """The claims of one paper.

    Raises:
      UserError: No such paper.
    """
    if slug not in PAPERS:
        raise UserError(message("theory", "unknown paper", repr(slug), nearest(slug, PAPERS)))
    return importlib.import_module(f"theory.{slug}").CLAIMS


def failed(claim: Claim, finding: Finding, control: Finding) -> bool:
    """Whether a check must not pass: an exact claim that does not hold, or a control that is not violated.

    A bound that is met and vacuous says nothing, which is a result.
    """
    limit = math.inf if claim.vacuous_above is None else claim.vacuous_above
    vacuous = finding.status == "inconclusive" and finding.predicted > limit
    return (claim.kind in EXACT_KINDS and finding.status != "holds" and not vacuous) or control.status != "violated"


def check(slugs: Sequence[str], json_file: Path | None) -> int:
    """Checks every claim and its control; prints the table, writes JSON; 1 if something failed."""
    setup_compilation_cache()
    rows, records, bad = [], [], []
    for slug in slugs:
        start = time.monotonic()
        for claim, finding, control in _checked(claims_of(slug)):
            records.append({"claim": finding.to_json(), "control": control.to_json()})
            if failed(claim, finding, control):
                bad.append(claim.id)
            error = f" ± {format_number(finding.stderr)}" if finding.stderr else ""
            rows.append(
                {
                    "claim": claim.id,
                    "source": claim.source,
                    "predicted": format_number(finding.predicted),
                    "measured": format_number(finding.measured) + error,
                    "status": finding.status,
                    "control": control.status,
                }
            )
        print(f"{slug}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    rich_table(rows, COLUMNS)
    if json_file is not None:
        write_json(json_file, records)
    if bad:
        print(f"failed: {', '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


def _checked(claims: Sequence[Claim]) -> list[tuple[Claim, Finding, Finding]]:
    """Findings of claims and controls, in order. Two groups run at a time: most of the work is to compile."""
    groups: dict[str, list[Claim]] = {}
    for claim in claims:  # those of one module share what they measure
        groups.setdefault(getattr(claim.check, "func", claim.check).__module__, []).append(claim)

    def run(group: Sequence[Claim]) -> list[tuple[Claim, Finding, Finding]]:
        found = []
        for claim in group:
            finding, control = check_claim(claim), check_claim(claim, control=True)
            print(f"{claim.id}: {finding.status}; control ({claim.control_breaks}): {control.status}", file=sys.stderr)
            found.append((claim, finding, control))
        return found

    # The last group first: prompts, the longest, come after what they build on.
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = list(pool.map(run, reversed(groups.values())))
    return [entry for group in reversed(done) for entry in group]


def show(claim_id: str) -> int:
    """Prints one claim in full."""
    known = {claim.id: claim for slug in PAPERS for claim in claims_of(slug)}
    if claim_id not in known:  # a name without its paper will do where it is the only one
        ends = [name for name in known if name.endswith(f"/{claim_id}")]
        claim_id = ends[0] if len(ends) == 1 else claim_id
    if claim_id not in known:
        names = known if "/" in claim_id else [name.rpartition("/")[2] for name in known]
        raise UserError(message("theory show", "unknown claim", repr(claim_id), nearest(claim_id, names)))
    claim = known[claim_id]
    fields = ("id", "statement", "source", "kind", "tolerance", "slope", "seeds", "max_seeds", "control_breaks")
    shown = {name: getattr(claim, name) for name in fields if getattr(claim, name) is not None}
    print(json.dumps({**shown, "rule": RULE_TEXTS[claim.kind]}, indent=2, ensure_ascii=False))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m theory", description="Predictions of papers beside measurements.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="claims, a line each").add_argument(
        "slug", nargs="?", help="one paper; all by default"
    )
    commands.add_parser("show", help="one claim in full").add_argument("claim")
    checker = commands.add_parser("check", help="check every claim and its control; exit 1 on failure")
    checker.add_argument("slug", nargs="?", help="one paper; all by default")
    checker.add_argument("--json", type=Path, metavar="FILE", help="write the findings here")
    options = parser.parse_args(argv)
    try:
        if options.command == "show":
            return show(options.claim)
        slugs = [options.slug] if options.slug else PAPERS
        if options.command == "check":
            return check(slugs, options.json)
        listed = [c for slug in slugs for c in claims_of(slug)]
        rich_table(
            [{"claim": c.id, "kind": c.kind, "statement": c.statement} for c in listed], ["claim", "kind", "statement"]
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
