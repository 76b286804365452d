"""How the time of a kernel of an encoder grows in examples, tokens, width and layers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxft.lab.report import markdown_table
from tests.benchmarks.kernels_problems import Encoder, make_problem

BASE = Encoder(2, 256, 4, 500, 128, 32, 32, 64)
AXES: dict[str, list[Any]] = {
    "n": [32, 64, 128],
    "m": [64, 128, 256],
    "tokens": [32, 64, 128],
    "width": [128, 256, 512],
    "layers": [2, 4, 8],
}
QUICK: dict[str, list[Any]] = {"n": [4, 8], "tokens": [8, 16]}
TINY = Encoder(1, 16, 4, 50, 16, 8, 4, 6)
KERNELS = ("sgd", "signgd")
COLUMNS = ("kernel", "grows in", "points", "CPU s", "exponent of the time", "of the formula", "ratio")


def measure(quick: bool, timed: Callable[..., Any]) -> dict[str, Any]:
    """CPU seconds (the best of several) and counted operations of every point."""
    base, found = TINY if quick else BASE, []
    for kernel in KERNELS:
        for axis, values in (QUICK if quick else AXES).items():
            for value in values:
                size = dataclasses.replace(base, **{axis: value})
                problem = make_problem(size, kernel)
                _, taken, _ = timed(problem.ours, repeats=3 if quick else 5)
                seconds = min(cpu for cpu, _ in taken)
                plan: Any = problem.plan()
                found.append({"kernel": kernel, "axis": axis, "value": value, "cpu": seconds, "flops": plan.flops})
    return {"base": dataclasses.asdict(base), "points": found}


def table(measured: dict[str, Any]) -> str:
    """Fitted exponents beside those of the plan's operations."""
    base, found, cells = Encoder(**measured["base"]), measured["points"], []
    for kernel in KERNELS:
        for axis in dict.fromkeys(point["axis"] for point in found):
            points = [p for p in found if (p["kernel"], p["axis"]) == (kernel, axis)]
            sizes = [p["value"] for p in points]
            time, work = (_slope(sizes, [p[name] for p in points]) for name in ("cpu", "flops"))
            cells.append(
                {
                    "kernel": kernel,
                    "grows in": axis,
                    "points": ", ".join(map(str, sizes)),
                    "CPU s": ", ".join(f"{p['cpu']:.3g}" for p in points),
                    "exponent of the time": f"{time:.2f}",
                    "of the formula": f"{work:.2f}",
                    "ratio": f"{time / work:.2f}",
                }
            )
    size = f"{base.layers} layers, width {base.width}, {base.tokens} tokens, {base.n} rows, {base.m} columns, 2 outputs"
    return f"## Growth\n\nEncoders; the other sizes are {size}.\n\n{markdown_table(cells, COLUMNS)}"


def _slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
