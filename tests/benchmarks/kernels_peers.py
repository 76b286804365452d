"""The kernels of the benchmark by plain jax, by neural-tangents and by torch.func; each returns what is to be timed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_combine
from jaxft.core.types import Inputs, Params, TokenBatch
from tests.benchmarks.kernels_problems import LABEL_IDS, MLP, Problem, mask_position
from tests.benchmarks.routes import Run

__all__ = ["THREADS", "neural_tangents", "plain_jax", "torch_contraction", "torch_directional"]

THREADS = 2


def plain_jax(problem: Problem, *, chunk: int) -> Run:
    """``vmap`` of ``jacrev``, mapped, contracted leaf by leaf; held are all rows' gradients and a chunk of columns'."""
    trained, frozen = problem.split()
    scale = [1.0] * len(jax.tree.leaves(trained))
    if problem.preconditioner is not None:
        scale = [leaf.reshape(1, -1) for leaf in jax.tree.leaves(problem.preconditioner)]
    signed: Callable = jnp.sign if problem.kernel == "signgd" else lambda g: g

    @jax.jit
    def jacobian(p: Params, side: Inputs) -> list[jax.Array]:
        def of_one(example):
            one = jax.tree.map(lambda leaf: leaf[None], example)
            return jax.jacrev(lambda p: problem.f(tree_combine(p, frozen), one)[0])(p)

        leaves = jax.tree.leaves(jax.vmap(of_one)(side))
        return [signed(leaf.reshape(leaf.shape[0] * leaf.shape[1], -1)) for leaf in leaves]

    @jax.jit
    def gram(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
        terms = [jnp.matmul(x, (y * s).T, precision="highest") for x, y, s in zip(a, b, scale, strict=True)]
        return jnp.stack(terms).sum(0)

    def run() -> np.ndarray:
        rows = [jacobian(trained, part) for part in _chunks(problem.x, chunk)]
        parts = []
        for part in _chunks(problem.y, chunk):
            columns = jacobian(trained, part)
            parts.append(np.concatenate([gram(row, columns) for row in rows]))
        return _unflattened(problem, np.concatenate(parts, axis=1))

    return run


def _chunks(side: Inputs, chunk: int) -> list[Inputs]:
    count = jax.tree.leaves(side)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i : i + chunk], side) for i in range(0, count, chunk)]


def _unflattened(problem: Problem, kernel: np.ndarray) -> np.ndarray:
    size = problem.size
    return kernel.reshape(size.n, size.outputs, size.m, size.outputs)


def neural_tangents(problem: Problem, *, implementation: int, rows: int, columns: int) -> Run:
    """One of its three implementations, in blocks."""
    from jaxft.kernels.neural_tangents_shim import lenient_numpy, load_neural_tangents

    package = load_neural_tangents()

    def f(params: Params, x: jax.Array) -> jax.Array:
        if isinstance(problem.size, MLP):
            return problem.f(params, x)
        position = jnp.full(x.shape[:1], mask_position(problem.size), x.dtype)
        return problem.f(params, TokenBatch(x, jnp.ones_like(x), jnp.zeros_like(x), position))

    options: dict[str, Any] = {"trace_axes": (), "vmap_axes": 0, "implementation": implementation}
    kernel = jax.jit(package.empirical_ntk_fn(f, **options))
    x, y = (side.input_ids if isinstance(side, TokenBatch) else side for side in (problem.x, problem.y))

    def run() -> np.ndarray:
        with lenient_numpy():
            blocks = [[np.asarray(kernel(a, b, problem.params)) for b in _chunks(y, columns)] for a in _chunks(x, rows)]
        # Of a block [n, m, c, c].
        rows_of = [np.concatenate(row, axis=1) for row in blocks]
        return np.concatenate(rows_of).transpose(0, 2, 1, 3)

    return run


def torch_directional(problem: Problem, *, chunk: int) -> Run:
    """The algorithm of arXiv 2210.05643's code; columns in chunks."""
    from tests.benchmarks import torch_kernels as peer

    f, weights, x, y = _torch_problem(problem)
    return lambda: peer.by_directional_derivatives(f, weights, x, y, chunk=chunk).numpy()


def torch_contraction(problem: Problem, *, chunk: int) -> Run:
    """Jacobians by chunks of examples, mapped in place, contracted."""
    from tests.benchmarks import torch_kernels as peer

    f, weights, x, y = _torch_problem(problem)
    maps: dict[str, peer.Map] = {}
    if problem.kernel == "signgd":
        maps = {side: lambda _, g: g.sign_() for side in ("rows", "columns")}
    if problem.preconditioner is not None:
        diagonal = {name: leaf.flatten() for name, leaf in _torch_tree(problem, problem.preconditioner).items()}
        maps = {"columns": lambda name, g: g.mul_(diagonal[name])}
    return lambda: peer.contraction(f, weights, x, y, chunk=chunk, **maps).numpy()


def _torch_problem(problem: Problem) -> tuple[Any, Any, Any, Any]:
    """Network, the weights that are differentiated, and both sides."""
    import torch

    from tests.benchmarks import torch_encoder, torch_mlp

    torch.set_num_threads(THREADS)
    size = problem.size
    trained, frozen = (_torch_tree(problem, tree) for tree in problem.split())
    if isinstance(size, MLP):
        x, y = (torch.tensor(np.asarray(side)) for side in (problem.x, problem.y))
        return torch_mlp.logits, trained, x, y
    words = {
        "label_ids": LABEL_IDS if size.prompt else None,
        "mask_position": mask_position(size) if size.prompt else 0,
    }
    net = torch_encoder.TorchEncoder(size.layers, size.heads, **words)
    x, y = (torch.tensor(np.asarray(side.input_ids)).long() for side in (problem.x, problem.y))
    return (lambda w, ids: net(frozen | w, ids)), trained, x, y


def _torch_tree(problem: Problem, tree: Params) -> Any:
    from tests.benchmarks.torch_encoder import weights_of

    return weights_of(tree, 0 if isinstance(problem.size, MLP) else problem.size.layers)
