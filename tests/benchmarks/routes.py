"""Works and the routes to them: each route is timed in a process of its own, one after another.

Seconds of the processor are those of all threads.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxft.lab.report import markdown_table

COLUMNS = (
    "route",
    "CPU s",
    "wall s (least, most)",
    "CPU, wall, times ours",
    "of the matmul rate",
    "runs",
    "first call, CPU / wall s",
    "peak MiB",
    "error",
    "note",
)
REPEATS = 5
LONG = 30.0
"""Seconds after which a route is not run again."""

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Route:
    """One way to do the work of a row."""

    start: Callable[[], Run]
    """Builds the input; what it returns is measured."""
    error: Callable[[Any], float] | None = None
    """Of what a run returned."""
    share: Callable[[], float] | None = None
    """Part of the work that a run does; times are divided by it."""
    note: str = ""
    needs: str = ""
    """A module without which the route is left out."""
    gib: float = 0.0
    """Memory that must be free."""
    rate: Callable[[], float] | None = None
    """Operations a second that its own is compared to; ``None`` means those of a product in float32."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A work and the routes to it; the first is the unit."""

    title: str
    work: str
    routes: Mapping[str, Route]
    notes: str = ""
    skip: str = ""
    """Why the row cannot be measured here."""
    flops: float = 0.0
    """Of the work: its rate, as a share of that of a product of matrices in the same process, gets a column."""
    long: float = LONG
    """Seconds after which a route is not run again."""


def table(module: str, name: str, *, quick: bool) -> str:
    """The table of a row of a benchmark, under a line that states its sizes.

    Args:
      module: Of ``tests.benchmarks``; it has ``make_row(name, quick=...)``.
      name: Of the row.
      quick: Tiny sizes.
    """
    row = importlib.import_module(f"tests.benchmarks.{module}").make_row(name, quick=quick)
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
            cells.append(
                {
                    "route": label,
                    "note": route.note,
                    **child("routes", module, name, str(number), *(["--quick"] if quick else [])),
                }
            )
        except subprocess.CalledProcessError as error:
            # A peer may run out of memory, or not work with these versions; the others are still worth a table.
            print(error.stderr[-2000:], file=sys.stderr, flush=True)
            reasons.append(f"{label}: did not end, {_last_word(error)}.")
    columns = [name for name in COLUMNS if row.flops or name != "of the matmul rate"]
    shown = markdown_table([_cell(cell, cells[0]) for cell in cells], columns)
    notes = " ".join(filter(None, [row.notes, *reasons]))
    return f"## {row.title}\n\n{row.work}.\n\n{shown}" + (f"\n\n{notes}" if notes else "")


def _last_word(error: subprocess.CalledProcessError) -> str:
    """The last line that a route wrote, which names an exception; else its exit status."""
    lines = [line for line in error.stderr.splitlines() if "Error" in line]
    return lines[-1].strip().rstrip(".")[:160] if lines else f"exit status {error.returncode}"


def _cell(found: dict[str, Any], unit: dict[str, Any]) -> dict[str, Any]:
    return {
        "route": found["route"],
        "CPU s": f"{found['cpu']:.3g}",
        "wall s (least, most)": f"{found['wall']:.3g} ({found['least']:.3g}, {found['most']:.3g})",
        "CPU, wall, times ours": ", ".join(f"{found[name] / unit[name]:.3g}" for name in ("cpu", "wall")),
        "of the matmul rate": f"{found['of_rate']:.1%}",
        "runs": found["runs"],
        "first call, CPU / wall s": f"{found['first_cpu']:.3g} / {found['first_wall']:.3g}",
        "peak MiB": f"{found['peak']:.0f}",
        "error": None if found["error"] is None else f"{found['error']:.1e}",
        "note": found["note"],
    }


def child(module: str, *arguments: str) -> Any:
    """What a module of ``tests.benchmarks``, run as a process of its own, prints as JSON."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def timed(
    run: Any, *, repeats: int = REPEATS, long: float = LONG
) -> tuple[tuple[float, float], list[tuple[float, float]], Any]:
    """(CPU, wall) seconds of the first call, and those of later ones; what the last returned."""

    def once() -> tuple[float, float, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        value = jax.block_until_ready(run())
        return time.process_time() - cpu, time.perf_counter() - wall, value

    *first, value = once()
    taken = []
    while len(taken) < repeats and sum(wall for _, wall in taken) < long:
        cpu, wall, value = once()
        taken.append((cpu, wall))
    return (first[0], first[1]), taken, value


def _measure(module: str, name: str, number: str, *quick: str) -> dict[str, Any]:
    row = importlib.import_module(f"tests.benchmarks.{module}").make_row(name, quick=bool(quick))
    route = list(row.routes.values())[int(number)]
    run = route.start()
    jax.block_until_ready(jax.numpy.zeros(()) + 1)
    before = _reset_peak_kib()
    first, taken, value = timed(run, long=row.long)
    peak = (peak_resident_kib() - before) / 1024
    share = route.share() if route.share else 1.0
    cpu, wall = (statistics.median(x) for x in zip(*taken, strict=True))
    of_rate = row.flops * share / wall / (route.rate or matmul_rate)() if row.flops else 0.0
    error = route.error(value) if route.error else None
    return {
        "first_cpu": max(first[0] - cpu, 0.0),
        "first_wall": max(first[1] - wall, 0.0),
        "cpu": cpu / share,
        "wall": wall / share,
        "least": min(wall for _, wall in taken) / share,
        "most": max(wall for _, wall in taken) / share,
        "of_rate": of_rate,
        "runs": len(taken),
        "peak": peak,
        "error": None if error is None or math.isnan(error) else error,
    }


def matmul_rate(*, side: int = 2048, dtype: Any = "float32", precision: str = "highest") -> float:
    """Operations a second of a product of square matrices; those of int8 are summed in int32."""
    a = jax.numpy.ones((side, side), dtype)
    kind = jax.numpy.int32 if a.dtype == jax.numpy.int8 else a.dtype
    product = jax.jit(lambda a: jax.numpy.matmul(a, a, precision=precision, preferred_element_type=kind))
    _, taken, _ = timed(lambda: product(a))
    return 2 * side**3 / statistics.median(wall for _, wall in taken)


def peak_resident_kib() -> int:
    """Largest resident size of this process so far. Linux; getrusage would count that of the parent before exec."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _reset_peak_kib() -> int:
    """Forgets what building the input took, and returns the resident size. Linux."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident_kib()


def left_out(route: Route) -> str:
    """Why a route cannot run here; empty if it can."""
    if route.needs and importlib.util.find_spec(route.needs) is None:
        return f"{route.needs} is not installed"
    free = _available_gib()
    return f"needs {route.gib:.0f} GiB of memory, {free:.0f} are free" if route.gib > free else ""


def _available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) / 2**20


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
