"""Structured inference: time, memory, compilation and error of ours and of its peers, side by side.

Every route runs in a process of its own, one after another. Seconds of the processor are those of all threads.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxft.lab.report import markdown_table
from tests.benchmarks import structure_growth
from tests.benchmarks.kernels import peak_resident_kib
from tests.benchmarks.structure_rows import Row, left_out, make_row

COLUMNS = (
    "route",
    "CPU s",
    "wall s",
    "CPU, times ours",
    "runs",
    "first call, CPU / wall s",
    "peak MiB",
    "error",
    "note",
)
NOTES = (
    "A process for each route. CPU and wall seconds: medians of 5 runs after a first call, of fewer once they have "
    "taken 30 s. First call: tracing and compilation, what it takes beyond a later run. Peak: what a fresh process "
    "grows by until all runs are done. Error: the largest difference of a span's posterior from ours in float64, "
    "unless a note says otherwise. float32."
)
REPEATS = 5
LONG = 30.0
"""Seconds after which a route is not run again."""
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
            parts.append(structure_growth.table(_child(GROWTH, "", quick)))
        else:
            parts.append(_table(name, make_row(name, quick=quick), quick))
    return "\n\n".join(parts)


def _table(name: str, row: Row, quick: bool) -> str:
    if row.skip:
        return f"## {row.title}\n\nLeft out: {row.skip}."
    cells, reasons = [], []
    for number, (label, route) in enumerate(row.routes.items()):
        reason = left_out(route)
        if reason:
            reasons.append(f"{label}: left out, {reason}.")
            continue
        print(f"  {label}", file=sys.stderr, flush=True)
        try:
            cells.append({"route": label, "note": route.note, **_child(name, str(number), quick)})
        except subprocess.CalledProcessError as error:
            # A peer may run out of memory, or not work with these versions; the others are still worth a table.
            print(error.stderr[-2000:], file=sys.stderr, flush=True)
            reasons.append(f"{label}: did not end, exit status {error.returncode}.")
    unit = cells[0]["cpu"] if cells else 1.0
    table = markdown_table([_cell(cell, unit) for cell in cells], COLUMNS)
    notes = " ".join(filter(None, [row.notes, *reasons]))
    return f"## {row.title}\n\n{row.work}.\n\n{table}" + (f"\n\n{notes}" if notes else "")


def _cell(found: dict[str, Any], unit: float) -> dict[str, Any]:
    return {
        "route": found["route"],
        "CPU s": f"{found['cpu']:.3g}",
        "wall s": f"{found['wall']:.3g}",
        "CPU, times ours": f"{found['cpu'] / unit:.3g}",
        "runs": found["runs"],
        "first call, CPU / wall s": f"{found['first_cpu']:.3g} / {found['first_wall']:.3g}",
        "peak MiB": f"{found['peak']:.0f}",
        "error": None if found["error"] is None else f"{found['error']:.1e}",
        "note": found["note"],
    }


def _child(name: str, number: str, quick: bool) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "tests.benchmarks.structure", name, number, *(["--quick"] if quick else [])]
    done = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def timed(run: Any, *, repeats: int = REPEATS) -> tuple[tuple[float, float], list[tuple[float, float]], Any]:
    """(CPU, wall) seconds of the first call, and those of later ones; what the last returned."""

    def once() -> tuple[float, float, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        value = jax.block_until_ready(run())
        return time.process_time() - cpu, time.perf_counter() - wall, value

    *first, value = once()
    taken = []
    while len(taken) < repeats and sum(wall for _, wall in taken) < LONG:
        cpu, wall, value = once()
        taken.append((cpu, wall))
    return (first[0], first[1]), taken, value


def _measure_route(name: str, number: int, quick: bool) -> dict[str, Any]:
    route = list(make_row(name, quick=quick).routes.values())[number]
    run = route.start()
    jax.block_until_ready(jax.numpy.zeros(()) + 1)
    before = _reset_peak_kib()
    first, taken, value = timed(run)
    peak = (peak_resident_kib() - before) / 1024
    share = route.share() if route.share else 1.0
    cpu, wall = (statistics.median(x) for x in zip(*taken, strict=True))
    error = route.error(value) if route.error else None
    return {
        "first_cpu": max(first[0] - cpu, 0.0),
        "first_wall": max(first[1] - wall, 0.0),
        "cpu": cpu / share,
        "wall": wall / share,
        "runs": len(taken),
        "peak": peak,
        "error": None if error is None or math.isnan(error) else error,
    }


def _reset_peak_kib() -> int:
    """Forgets what building the input took, and returns the resident size. Linux."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident_kib()


def main(arguments: Sequence[str]) -> None:
    """The process that measures one route, or growth, and prints what it found as JSON."""
    name, number, *rest = arguments
    quick = bool(rest)
    found = structure_growth.measure(quick, timed) if name == GROWTH else _measure_route(name, int(number), quick)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
