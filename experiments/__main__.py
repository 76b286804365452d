"""Command line: ``python -m experiments list | run <slug> [--preset ...] [--field value ...]``."""

import importlib
import sys
from collections.abc import Sequence

from experiments import PAPERS
from jaxft.core.checks import UserError, message, nearest

USAGE = "usage: python -m experiments list | run <slug> [--preset smoke|cpu|accel|...] [--field value ...] [--help]"


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status, 2 for a fault of the user's."""
    if list(argv[:1]) == ["list"]:
        for slug in PAPERS:
            print(f"{slug}: {(importlib.import_module(f'experiments.{slug}').__doc__ or '').splitlines()[0]}")
        return 0
    asked = bool(argv) and argv[-1] in ("-h", "--help") and list(argv[:-1]) in ([], ["run"])
    if asked or len(argv) < 2 or argv[0] != "run":
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    slug = argv[1]
    try:
        if slug not in PAPERS:
            raise UserError(message("experiments run", "unknown experiment", repr(slug), nearest(slug, PAPERS)))
        return importlib.import_module(f"experiments.{slug}").main(argv[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
