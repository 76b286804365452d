"""Empirical kernels: time, memory and error of ours and of its peers, side by side."""

import json
import sys

from tests.benchmarks import kernels_growth, routes
from tests.benchmarks.kernels_rows import make_row

__all__ = ["NOTES", "ROWS", "make_row", "measure"]

NOTES = (
    "A process for each route, both cores. CPU and wall seconds: medians of 5 runs after a first call, of fewer once "
    "they have taken 30 s. First call: tracing and compilation, what it takes beyond a later "
    "run. Peak: what a fresh process grows by until all runs are done. The rate counts the work of the tiled "
    "contraction in the matrices of the layers, whatever a route really does; that of a product of matrices of side "
    "2048 is measured in the same process. Random weights and tokens, no padding. float32."
)
GROWTH = "growth"
ROWS = ("sgd", "sign", "adam", "base-sgd", "base-sign", GROWTH, "transformer", "few", "mlp", "signs", "gpu")


def measure(*, quick: bool, only: str | None = None) -> str:
    """The tables, each under a line that states its sizes."""
    parts = []
    for name in ROWS:
        if only not in (None, name):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name == GROWTH:
            parts.append(kernels_growth.table(routes.child("kernels", *(["--quick"] if quick else []))))
        else:
            parts.append(routes.table("kernels", name, quick=quick))
    return "\n\n".join(parts)


if __name__ == "__main__":  # growth, in a process of its own
    print(json.dumps(kernels_growth.measure(len(sys.argv) > 1, routes.timed)))
