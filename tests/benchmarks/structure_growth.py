"""How the time of inside, outside and rule counts of a dense grammar grows in words, nonterminals and sentences."""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.lab.report import markdown_table
from jaxft.structure import inside_outside, random_pcfg

Point = tuple[int, int, int]
"""Sentences, words, nonterminals; twice as many preterminals."""

BASE: Point = (8, 40, 30)
AXES: dict[str, list[Point]] = {
    "words": [(8, 20, 30), (8, 40, 30), (8, 80, 30)],
    "nonterminals": [(8, 40, 30), (8, 40, 60), (8, 40, 90)],
    "sentences": [(8, 40, 30), (16, 40, 30), (32, 40, 30)],
}
QUICK: dict[str, list[Point]] = {"words": [(2, 6, 3), (2, 12, 3)]}
SHARE: Point = (8, 40, 60)
COLUMNS = ("grows in", "points", "CPU s", "exponent of the time", "of the operations", "ratio")


def operations(point: Point) -> float:
    """Of the products of both passes with rule counts: those of the inside pass, 4 times over splits, else 3 times."""
    b, t, n = point
    q = 2 * n
    words = 4 * n * n * q * t + 2 * n * q * q * t
    return b * (4 * n * n * t**3 / 3 + 3 * n**3 * t * t + 3 * words)


def measure(quick: bool, timed: Callable[..., Any]) -> dict[str, Any]:
    """CPU seconds (the best of several) of every point, and operations a CPU second of a large product."""
    axes = QUICK if quick else AXES
    points = {point for several in axes.values() for point in several} | ({SHARE} if not quick else set())
    seconds = {}
    for point in sorted(points, key=operations):
        _, taken, _ = timed(_problem(point), repeats=7)
        seconds[point] = min(cpu for cpu, _ in taken)
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    _, taken, _ = timed(lambda: product(a), repeats=5)
    rate = 2 * 2048**3 / statistics.median(cpu for cpu, _ in taken)
    return {"seconds": [[*point, s] for point, s in seconds.items()], "rate": rate, "quick": quick}


def _problem(point: Point) -> Callable[[], Any]:
    b, t, n = point
    grammar = random_pcfg(jax.random.key(0), n, 2 * n, 200)
    tokens = jax.random.randint(jax.random.key(1), (b, t), 0, 200)
    return lambda: inside_outside(grammar, tokens, counts=True)


def table(found: dict[str, Any]) -> str:
    """Fitted exponents beside those of the operations, and the share of the rate of a large product."""
    seconds = {(b, t, n): s for b, t, n, s in found["seconds"]}
    cells = []
    for name, points in (QUICK if found["quick"] else AXES).items():
        sizes = [{"words": t, "nonterminals": n, "sentences": b}[name] for b, t, n in points]
        time, work = (_slope(sizes, [f(p) for p in points]) for f in (seconds.__getitem__, operations))
        cells.append(
            {
                "grows in": name,
                "points": ", ".join(map(str, sizes)),
                "CPU s": ", ".join(f"{seconds[p]:.3g}" for p in points),
                "exponent of the time": f"{time:.2f}",
                "of the operations": f"{work:.2f}",
                "ratio": f"{time / work:.2f}",
            }
        )
    text = (
        f"## Growth\n\nInside, outside and rule counts; the other sizes are {BASE[0]} sentences, {BASE[1]} words and "
    )
    text += f"{BASE[2]} nonterminals, with twice as many preterminals.\n\n{markdown_table(cells, COLUMNS)}"
    if SHARE in seconds:
        rate = operations(SHARE) / seconds[SHARE]
        text += (
            f"\n\nAt {SHARE[0]} sentences of {SHARE[1]} words and {SHARE[2]} nonterminals: {rate / 1e9:.0f} GFLOP a "
            f"CPU second, {rate / found['rate']:.0%} of the {found['rate'] / 1e9:.0f} of a product of matrices of side "
            "2048."
        )
    return text


def _slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
