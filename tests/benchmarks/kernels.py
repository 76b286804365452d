"""Empirical NTKs: time, peak memory and error of every route to the same kernel, side by side.

Times are taken in one process, routes in turn, after a first call; the memory of each in a process of its own.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.lab.report import markdown_table
from tests.benchmarks.problems import QUICK, SIZES, Problem, Route, make_problem

COLUMNS = ("route", "median s", "min-max s", "times the first", "of the matmul rate", "peak MiB", "relative error")
REPEATS = 3
LONG = 4.0
"""Seconds beyond which a route is repeated only once more."""


def measure(*, quick: bool) -> str:
    """The tables, each under a line that states its sizes."""
    parts = []
    with jax.default_matmul_precision("highest"):
        for name, size in (QUICK if quick else SIZES).items():
            problem = make_problem(size)
            rate = matmul_rate()
            rows = timed(problem, rate)
            for row in rows:
                row["peak MiB"] = f"{peak_mib(name, row['route'], quick):.0f}"
            head = (
                f"{problem.sizes}. Work: gradients {problem.gradient_flops / 1e9:.3g}, "
                f"contraction {problem.contraction_flops / 1e9:.3g} GFLOP; matmul rate {rate / 1e9:.0f} GFLOP/s."
            )
            parts.append(f"## {name.capitalize()}\n\n{head}\n\n{markdown_table(rows, COLUMNS)}")
    return "\n\n".join(parts)


def timed(problem: Problem, rate: float) -> list[dict[str, str]]:
    """One row a route; the times of the first route are the unit."""
    exact = problem.exact()
    times: dict[str, list[float]] = {name: [] for name in problem.routes}
    errors = {}
    for name, route in problem.routes.items():
        _, value = clock(route)
        errors[name] = float(np.linalg.norm(value - exact) / np.linalg.norm(exact))
    for repeat in range(REPEATS):
        for name, route in problem.routes.items():
            if repeat < 2 or times[name][0] < LONG:
                times[name].append(clock(route)[0])
    unit = statistics.median(next(iter(times.values())))
    work = problem.gradient_flops + problem.contraction_flops
    return [
        {
            "route": name,
            "median s": f"{statistics.median(taken):.3g}",
            "min-max s": f"{min(taken):.3g}-{max(taken):.3g}",
            "times the first": f"{statistics.median(taken) / unit:.2f}",
            "of the matmul rate": f"{work / statistics.median(taken) / rate:.1%}",
            "relative error": f"{errors[name]:.1e}",
        }
        for name, taken in times.items()
    ]


def clock(route: Route) -> tuple[float, np.ndarray]:
    """Seconds and the value."""
    start = time.perf_counter()
    value = route()
    return time.perf_counter() - start, value


def matmul_rate() -> float:
    """Operations a second of a float32 product of matrices of side 2048."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    taken = [clock(lambda: np.asarray(product(a, a)[0, 0]))[0] for _ in range(REPEATS)]
    return 2 * 2048**3 / statistics.median(taken)


def peak_mib(problem: str, route: str, quick: bool) -> float:
    """Memory that a route's first call, compilation included, adds to a fresh process, in MiB."""
    arguments = [sys.executable, "-m", "tests.benchmarks.kernels", problem, route, *(["--quick"] if quick else [])]
    done = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """The process that ``peak_mib`` starts: prints the growth of its largest resident size."""
    name, route, *rest = sys.argv[1:]
    with jax.default_matmul_precision("highest"):
        run = make_problem((QUICK if rest else SIZES)[name]).routes[route]
        before = peak_resident_kib()
        run()
    print((peak_resident_kib() - before) / 1024)


def peak_resident_kib() -> int:
    """Largest resident size of this process so far. Linux; getrusage would count that of the parent before exec."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
