"""Empirical NTK of an MLP, ``(n, c, m, c)``: ours, a dense one in jax, and torch.func on the same weights.

All are timed in one process, in turn, after a first call; the error is against a dense kernel in float64.
"""

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_cast, tree_size
from jaxft.kernels import empirical_ntk
from jaxft.lab.report import markdown_table
from jaxft.nn import make_mlp

COLUMNS = ("kernel", "median ms", "min-max ms", "first call ms", "times ours", "relative error")
Route = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured."""

    inputs: int = 128
    width: int = 512
    hidden: int = 2
    outputs: int = 2
    n: int = 32
    m: int = 64
    repeats: int = 9


QUICK = Size(inputs=16, width=64, n=8, m=16, repeats=5)


def measure(size: Size) -> tuple[str, str]:
    """The line that states the sizes, and the table."""
    init, f = make_mlp((size.width,) * size.hidden + (size.outputs,), activation="gelu")
    params = init(jax.random.key(0), size.inputs)
    x, y = (jax.random.normal(jax.random.key(seed), (count, size.inputs)) for seed, count in ((1, size.n), (2, size.m)))
    with jax.default_matmul_precision("highest"):
        with jax.enable_x64(True):
            exact = np.asarray(dense_kernel(f, *tree_cast((params, x, y), jnp.float64)))
        blocks = {"default blocks of 8": 8, "one block": (size.n, size.m)}
        routes: dict[str, Route] = {
            f"empirical_ntk, {name}": functools.partial(ours, f, params, x, y, block) for name, block in blocks.items()
        }
        routes["jax, vmap(jacrev) and einsum"] = lambda: np.asarray(dense_kernel(f, params, x, y))
        if importlib.util.find_spec("torch"):
            routes["torch.func, vmap(jacrev) and einsum"] = torch_route(params, x, y)
        table = markdown_table(timed(routes, exact, size.repeats), COLUMNS)
    widths = " x ".join(map(str, (size.inputs, *(size.width,) * size.hidden, size.outputs)))
    head = f"MLP {widths} ({tree_size(params):,} parameters, gelu, float32), {size.n} rows, {size.m} columns, "
    return head + f"{size.outputs} outputs; {size.repeats} repeats, routes in turn.", table


def timed(routes: dict[str, Route], exact: np.ndarray, repeats: int) -> list[dict[str, str]]:
    """One row a route; the times of the first route are the unit."""
    first, times = {}, {name: [] for name in routes}
    errors = {}
    for name, route in routes.items():
        first[name], value = clock(route)
        errors[name] = float(np.linalg.norm(value - exact) / np.linalg.norm(exact))
    for _ in range(repeats):
        for name, route in routes.items():
            times[name].append(clock(route)[0])
    unit = statistics.median(next(iter(times.values())))
    return [
        {
            "kernel": name,
            "median ms": f"{statistics.median(taken):.1f}",
            "min-max ms": f"{min(taken):.1f}-{max(taken):.1f}",
            "first call ms": f"{first[name]:.0f}",
            "times ours": f"{statistics.median(taken) / unit:.2f}",
            "relative error": f"{errors[name]:.1e}",
        }
        for name, taken in times.items()
    ]


def clock(route: Route) -> tuple[float, np.ndarray]:
    """Milliseconds and the value."""
    start = time.perf_counter()
    value = route()
    return 1e3 * (time.perf_counter() - start), value


def ours(f, params, x, y, block_size) -> np.ndarray:
    """The library's kernel, on the host."""
    return np.asarray(empirical_ntk(f, params, x, y, block_size=block_size))


@functools.partial(jax.jit, static_argnums=0)
def dense_kernel(f, params, x, y) -> jax.Array:
    """Whole Jacobians, contracted leaf by leaf."""

    def jacobian(side):
        one = jax.jacrev(lambda p, example: f(p, example[None])[0])
        leaves = jax.tree.leaves(jax.vmap(one, (None, 0))(params, side))
        return [leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves]

    terms = [jnp.einsum("ncp,mkp->ncmk", a, b) for a, b in zip(jacobian(x), jacobian(y), strict=True)]
    return functools.reduce(jnp.add, terms)


def torch_route(params, x, y) -> Route:
    """The same in torch.func, on the same weights."""
    import torch
    from torch.func import functional_call, jacrev, vmap

    layers = [params[name] for name in sorted(params)]
    modules = []
    for layer in layers:
        modules += [torch.nn.Linear(*layer["kernel"].shape), torch.nn.GELU()]
    net = torch.nn.Sequential(*modules[:-1])
    weights = {}
    for i, layer in enumerate(layers):
        weights[f"{2 * i}.weight"] = torch.tensor(np.asarray(layer["kernel"]).T.copy())
        weights[f"{2 * i}.bias"] = torch.tensor(np.asarray(layer["bias"]))
    left, right = torch.tensor(np.asarray(x)), torch.tensor(np.asarray(y))

    def one(p, example):
        return functional_call(net, p, (example[None],))[0]

    def kernel() -> np.ndarray:
        a, b = (vmap(jacrev(one), (None, 0))(weights, side) for side in (left, right))
        terms = [torch.einsum("ncp,mkp->ncmk", a[k].flatten(2), b[k].flatten(2)) for k in weights]
        return torch.stack(terms).sum(0).numpy()

    return kernel
