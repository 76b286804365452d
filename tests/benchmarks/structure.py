"""Structured inference: time, memory, compilation and error of ours and of its peers, side by side."""

import json
import sys

from tests.benchmarks import routes, structure_growth
from tests.benchmarks.structure_rows import make_row

__all__ = ["NOTES", "ROWS", "make_row", "measure"]

NOTES = (
    "A process for each route. CPU and wall seconds: medians of 5 runs after a first call, of fewer once they have "
    "taken 30 s. First call: tracing and compilation, what it takes beyond a later run. Peak: what a fresh process "
    "grows by until all runs are done. Error: the largest difference of a span's posterior from ours in float64, "
    "unless a note says otherwise. float32."
)
GROWTH = "growth"
ROWS = ("dense", "long", "treebank", "low-rank", GROWTH, "sampling")


def measure(*, quick: bool, only: str | None = None) -> str:
    """The tables, each under a line that states its sizes."""
    parts = []
    for name in ROWS:
        if only not in (None, name):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name == GROWTH:
            parts.append(structure_growth.table(routes.child("structure", *(["--quick"] if quick else []))))
        else:
            parts.append(routes.table("structure", name, quick=quick))
    return "\n\n".join(parts)


if __name__ == "__main__":  # growth, in a process of its own
    print(json.dumps(structure_growth.measure(len(sys.argv) > 1, routes.timed)))
