"""Command line: ``python -m tests.benchmarks kernels [--quick]``."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

from tests.benchmarks import kernels

RESULTS = Path(__file__).with_name("results.md")
COMMAND = "python -m tests.benchmarks kernels"
NOTES = (
    "Medians of up to 3 runs in one process, routes in turn, after a first call; the peak is what a first call adds to "
    "a fresh process, compilation included; the error is against our kernel in float64. The share of the matmul rate "
    "counts the work of the contraction route, whatever a route really does. The second recipe of torch.func, which "
    "takes every pair of examples by itself, is measured on few examples alone."
)
PACKAGES = ("jax", "flax", "numpy", "torch")


def environment() -> str:
    """Versions and processors."""
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
    return f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}."


def main() -> int:
    """Prints the table; a full run with torch writes it to results.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Speed and error, side by side.")
    parser.add_argument("what", choices=["kernels"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written")
    options = parser.parse_args()
    tables = kernels.measure(quick=options.quick)
    text = f"# Empirical NTK\n\n`{COMMAND}`\n\n{environment()} {NOTES}\n\n{tables.strip()}\n"
    print(text)
    if options.quick or importlib.util.find_spec("torch") is None:
        print(f"{RESULTS.name} is left as it was: it takes a full run with torch installed.", file=sys.stderr)
    else:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
