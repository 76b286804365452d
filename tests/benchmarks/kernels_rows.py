"""The rows of the kernel benchmark: a kernel, and the routes to it; the first is ours as a user gets it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import kernels_peers as peers
from tests.benchmarks.kernels_problems import MLP, Encoder, Problem, make_problem
from tests.benchmarks.routes import Route, Row, Run, matmul_rate

SMALL = Encoder(6, 384, 12, 30522, 512, 64, 32, 128)
"""The shape of MiniLM."""
BASE = Encoder(12, 768, 12, 50265, 514, 40, 32, 872, family="roberta")
"""The shape of RoBERTa-base; 872 sentences are the validation split of SST-2."""
GPU = dataclasses.replace(BASE, tokens=128, n=512, m=2048)
TINY = Encoder(1, 16, 4, 50, 16, 8, 4, 6)
HEAD = Encoder(4, 256, 4, 1000, 64, 64, 32, 64, prompt=False)
PERCEPTRON = MLP(128, 512, 32, 64)
TINY_MLP = MLP(16, 32, 8, 16)

KERNELS = {"sgd": "sgd", "sign": "signgd", "adam": "preconditioned"}
TITLES = {"sgd": "SGD kernel", "sign": "SignGD kernel", "adam": "Adam kernel (a diagonal preconditioner)"}
SIGN_NOTE = "Without the biases of attention's keys, whose gradient is zero and its sign noise, in every route."
ERROR_NOTE = "Error: of 2 rows and 3 columns, relative to dense gradients in float64."
LONG = 30.0
BASE_COLUMNS = 168


def make_row(name: str, *, quick: bool) -> Row:
    """A row by its name."""
    if name == "gpu":
        return _gpu(quick)
    if name.startswith("base-"):
        return _base(name.removeprefix("base-"), quick)
    if name == "signs":
        return _signs(quick)
    if name == "mlp":
        return _mlp(quick)
    if name in ("transformer", "few"):
        return _transformer(name == "few", quick)
    return _small(name, quick)


def _ours(problem: Callable[[], Problem], note: str = "", **options: Any) -> Route:
    return Route(lambda: _start_ours(problem(), **options), lambda found: problem().error(found), note=note)


def _peer(
    problem: Callable[[], Problem],
    start: Callable[..., Run],
    note: str = "",
    part: tuple[int, int] | None = None,
    needs: str = "",
    gib: float = 0.0,
    **options: Any,
) -> Route:
    """A route to the kernel, or to a part of it: the first rows and columns."""

    def taken() -> Problem:
        whole = problem()
        return whole if part is None else whole.part(min(part[0], whole.size.n), min(part[1], whole.size.m))

    def share() -> float:
        size, of = taken().size, problem().size
        return size.n * size.m / (of.n * of.m)

    said = ", ".join(filter(None, [note, "" if part is None else f"{part[0]} x {part[1]} of the examples, scaled up"]))
    return Route(lambda: start(taken(), **options), lambda k: taken().error(k), share, said, needs, gib)


def _small(name: str, quick: bool) -> Row:
    size = TINY if quick else SMALL
    problem = functools.cache(lambda: make_problem(size, KERNELS[name]))
    torch = {"needs": "torch", "gib": 0 if quick else 11}
    routes = {
        "auto": _ours(problem),
        **(_variants(problem) if name == "sgd" else {}),
        **(
            {"contraction, 8 GiB of gradients": _ours(problem, method="contraction", memory_bytes=2**33)}
            if name == "sgd"
            else {}
        ),
        "plain jax: vmap(jacrev), einsum": _peer(problem, peers.plain_jax, "columns by 4", chunk=4, gib=torch["gib"]),
        "torch.func: vmap(jacrev), einsum": _peer(problem, peers.torch_contraction, "columns by 2", chunk=2, **torch),
    }
    if name == "sgd":
        directional = {"chunk": 32, "part": (4, size.m), "needs": "torch"}
        routes |= {
            "torch.func: the paper's algorithm": _peer(problem, peers.torch_directional, "columns by 32", **directional)
        }
        routes |= {
            f"neural-tangents {number}: {label}": _peer(
                problem,
                peers.neural_tangents,
                f"blocks of {rows} x {columns}",
                (rows, columns),
                "neural_tangents",
                implementation=number,
                rows=rows,
                columns=columns,
            )
            for number, label, rows, columns in (
                (1, "Jacobian contraction", 8, 16),
                (2, "NTK-vector products", 8, 16),
                (3, "structured derivatives", 2, 4),
            )
        }
    notes = ERROR_NOTE + (f" {SIGN_NOTE}" if name == "sign" else "")
    return Row(TITLES[name], problem().work, routes, notes, flops=size.flops(), long=LONG)


def _variants(problem: Callable[[], Problem]) -> dict[str, Route]:
    return {
        "auto, 4 GiB of features": _ours(problem, memory_bytes=2**32),
        "auto, 256 MiB of features": _ours(problem, memory_bytes=2**28),
        "auto, factors in bfloat16": _ours(problem, factor_dtype=jnp.bfloat16),
    }


def _start_ours(problem: Problem, **options: Any) -> Run:
    return lambda: problem.ours(**options)


def _base(name: str, quick: bool) -> Row:
    size = dataclasses.replace(TINY, family="roberta") if quick else BASE
    problem = functools.cache(lambda: make_problem(size, KERNELS[name]))
    title = f"{TITLES[name]} at the size of RoBERTa-base"
    notes = ERROR_NOTE + (f" {SIGN_NOTE}" if name == "sign" else "")
    # One block of columns: the others take as long.
    part = (size.n, min(size.m, BASE_COLUMNS))
    routes = {"auto, 8 GiB of features": _peer(problem, _start_ours, part=part, memory_bytes=2**33)}
    return Row(title, problem().work, routes, notes, flops=size.flops())


def _transformer(few: bool, quick: bool) -> Row:
    size = dataclasses.replace(TINY, prompt=False) if quick else HEAD
    size = dataclasses.replace(size, n=4, m=8) if few else size
    problem = functools.cache(lambda: make_problem(size))
    routes = {
        "auto": _ours(problem),
        **{method: _ours(problem, method=method) for method in ("tiled", "ghost", "contraction")},
        "ntvp": _ours(problem, "columns by 8", method="ntvp", block_size=(size.n, 8)),
        "plain jax: vmap(jacrev), einsum": _peer(problem, peers.plain_jax, chunk=size.m),
        "torch.func: vmap(jacrev), einsum": _peer(problem, peers.torch_contraction, needs="torch", chunk=size.m),
        "torch.func: the paper's algorithm": _peer(problem, peers.torch_directional, needs="torch", chunk=size.m),
    }
    title = "Linear head" + (", few examples" if few else "")
    return Row(title, problem().work, routes, ERROR_NOTE, flops=size.flops())


def _mlp(quick: bool) -> Row:
    size = TINY_MLP if quick else PERCEPTRON
    problem = functools.cache(lambda: make_problem(size))
    routes = {
        "auto": _ours(problem),
        **{method: _ours(problem, method=method) for method in ("tiled", "ghost", "contraction")},
        "plain jax: vmap(jacrev), einsum": _peer(problem, peers.plain_jax, chunk=size.m),
        "torch.func: vmap(jacrev), einsum": _peer(problem, peers.torch_contraction, needs="torch", chunk=size.m),
        **{
            f"neural-tangents {number}": _peer(
                problem,
                peers.neural_tangents,
                needs="neural_tangents",
                implementation=number,
                rows=size.n,
                columns=size.m,
            )
            for number in (1, 2, 3)
        },
    }
    return Row("MLP", problem().work, routes, ERROR_NOTE, flops=size.flops())


def _signs(quick: bool) -> Row:
    rows, width = (16, 2**8) if quick else (256, 2**15)
    a, b = (jax.random.normal(jax.random.key(seed), (rows, width)) for seed in (0, 1))

    @functools.partial(jax.jit, static_argnums=2)
    def product(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        kind = jnp.int32 if dtype == jnp.int8 else dtype
        a, b = (jnp.sign(side).astype(dtype) for side in (a, b))
        return jnp.matmul(a, b.T, precision="highest", preferred_element_type=kind).astype(jnp.int32)

    def error(found: jax.Array) -> float:
        exact = np.sign(np.asarray(a)).astype(np.int64) @ np.sign(np.asarray(b)).astype(np.int64).T
        return float(np.abs(np.asarray(found) - exact).max())

    routes = {
        name: Route(lambda dtype=dtype: lambda: product(a, b, dtype), error)
        for name, dtype in (
            ("float32, as the sign kernel has it on CPU", jnp.float32),
            ("int8, summed in int32", jnp.int8),
        )
    }
    title, work = "Products of signs", f"A tile of gradients of {rows} rows and as many columns, {width:,} parameters"
    return Row(title, work, routes, "Error: the largest difference of a sum.", flops=2.0 * rows**2 * width)


def _gpu(quick: bool) -> Row:
    if jax.default_backend() != "gpu":
        return Row("The size of RoBERTa-base on a GPU", "", {}, skip="there is no GPU here")
    size = TINY if quick else GPU
    sgd, sign = (functools.cache(functools.partial(make_problem, size, KERNELS[name])) for name in ("sgd", "sign"))
    rate = functools.partial(matmul_rate, side=256 if quick else 8192)

    def route(problem: Callable[[], Problem], note: str, of: dict[str, Any], **options: Any) -> Route:
        return dataclasses.replace(_ours(problem, note, **options), rate=functools.partial(rate, **of))

    routes = {
        "SGD, float32": route(sgd, "rate of float32", {}),
        "SGD, TF32": route(sgd, "rate of TF32", {"precision": "high"}, precision="high"),
        "SignGD": route(sign, "rate of int8", {"dtype": "int8"}),
        "SignGD, gradients in TF32": route(sign, "rate of int8", {"dtype": "int8"}, precision="high"),
    }
    notes = f"{ERROR_NOTE} {SIGN_NOTE}"
    return Row("The size of RoBERTa-base on a GPU", sgd().work, routes, notes, flops=size.flops())
