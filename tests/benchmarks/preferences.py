"""Preference tuning: time, memory and error of ours and of its peers, side by side."""

import sys

from tests.benchmarks import routes
from tests.benchmarks.preferences_rows import make_row

__all__ = ["NOTES", "ROWS", "make_row", "measure"]

NOTES = (
    "A process for each route, both cores. CPU and wall seconds: medians of 5 runs after a first call, of fewer once "
    "they have taken 30 s. First call: tracing and compilation, what it takes beyond a later run. Peak: what a fresh "
    "process grows by until all runs are done. Random weights and tokens; the models of the peers are those of "
    "transformers with the same weights. float32."
)
ROWS = (
    "ches",
    "ches-varied",
    "exact-ches",
    "dpo-step",
    "forward-gpt2",
    "forward-gpt_neox",
    "forward-llama",
    "forward-olmo",
    "forward-olmo2",
    "preference-gram",
    "who-gains",
    "generation",
)


def measure(*, quick: bool, only: str | None = None) -> str:
    """The tables, each under a line that states its sizes."""
    parts = []
    for name in ROWS:
        if only in (None, name):
            print(f"{name} ...", file=sys.stderr, flush=True)
            parts.append(routes.table("preferences", name, quick=quick))
    return "\n\n".join(parts)
