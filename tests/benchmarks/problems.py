"""What the kernel benchmark is measured on, and the routes to its kernel: ours, plain jax, torch.func.

A route is a function without arguments that returns the kernel ``(n, c, m, c)`` on the host. The weights are shared.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_cast, tree_size
from jaxft.core.types import Inputs, OutputFn, Params, TokenBatch
from jaxft.kernels import empirical_ntk
from jaxft.nn import EncoderConfig, init_classifier, init_encoder, make_class_logits, make_mlp

Route = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, two sets of examples and the work that their kernel must cost."""

    sizes: str
    f: OutputFn
    params: Params
    x: Inputs
    y: Inputs
    routes: Mapping[str, Route]
    gradient_flops: float
    """One forward pass of every example, and a backward pass an output."""
    contraction_flops: float

    def exact(self) -> np.ndarray:
        """The kernel in float64, an example at a time."""
        with jax.enable_x64(True):
            return np.asarray(empirical_ntk(self.f, *tree_cast((self.params, self.x, self.y), jnp.float64)))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """An encoder with a linear head on the first token."""

    layers: int = 4
    width: int = 256
    tokens: int = 64
    n: int = 32
    m: int = 64
    outputs: int = 2
    vocabulary: int = 1000
    heads: int = 4
    pairs: bool = False
    """Whether to take torch's second recipe, whose work grows with the pairs of examples."""


@dataclasses.dataclass(frozen=True)
class MLP:
    """A multilayer perceptron."""

    inputs: int = 128
    width: int = 512
    n: int = 32
    m: int = 64
    outputs: int = 2


Size = Transformer | MLP

SIZES: Mapping[str, Size] = {
    "transformer": Transformer(),
    "transformer, few examples": Transformer(n=4, m=8, pairs=True),
    "mlp": MLP(),
}
QUICK: Mapping[str, Size] = {
    "transformer": Transformer(layers=2, width=16, tokens=8, n=4, m=6, vocabulary=50, pairs=True),
    "mlp": MLP(inputs=16, width=32, n=8, m=16),
}


def make_problem(size: Size) -> Problem:
    """Random weights and inputs of a size."""
    return _transformer(size) if isinstance(size, Transformer) else _mlp(size)


def _our_routes(f: OutputFn, params: Params, x: Inputs, y: Inputs, n: int, m: int) -> dict[str, Route]:
    def route(**options: Any) -> Route:
        return lambda: np.asarray(empirical_ntk(f, params, x, y, **options))

    few = max(1, (n + m) // 10)
    return {
        "contraction, default blocks": route(),
        "contraction, a tenth of the gradients held": route(block_size=(max(1, few - 1), 1)),
        "ntvp, columns by 8": route(method="ntvp", block_size=(n, 8)),
        "plain jax: vmap(jacrev), einsum": lambda: np.asarray(_dense_kernel(f, params, x, y)),
    }


def _transformer(size: Transformer) -> Problem:
    d, t, c = size.width, size.tokens, size.outputs
    config = EncoderConfig("bert", size.vocabulary, d, size.layers, size.heads, 4 * d, t, 2, 1e-12, pad_id=0)
    params = init_encoder(config, key=jax.random.key(0))
    params = {**params, "classifier": init_classifier(d, c, key=jax.random.key(1))}
    f = make_class_logits(config)

    def batch(seed: int, count: int) -> TokenBatch:
        ids = jax.random.randint(jax.random.key(seed), (count, t), 1, size.vocabulary)
        return TokenBatch(ids, jnp.ones_like(ids), jnp.zeros_like(ids), jnp.zeros_like(ids[:, 0]))

    x, y = batch(1, size.n), batch(2, size.m)
    routes = _our_routes(f, params, x, y, size.n, size.m)
    if importlib.util.find_spec("torch"):
        routes |= _torch_transformer(params, size, x, y)
    dense, attention = 12 * size.layers * d**2, 4 * size.layers * t**2 * d
    forward = (size.n + size.m) * (2 * t * dense + attention)
    sizes = f"{size.layers} layers, width {d}, {t} tokens, {size.vocabulary} words"
    return Problem(
        _sizes(f"Encoder ({sizes}) with a linear head", params, size),
        f,
        params,
        x,
        y,
        routes,
        gradient_flops=forward * (1 + 2 * c),
        contraction_flops=2.0 * size.n * size.m * c**2 * tree_size(params),
    )


def _torch_transformer(params: Params, size: Transformer, x: TokenBatch, y: TokenBatch) -> dict[str, Route]:
    import torch

    from tests.benchmarks import torch_encoder as peer

    net = peer.TorchEncoder(peer.weights_of(params, size.layers), size.layers, size.heads)
    left, right = (torch.tensor(np.asarray(side.input_ids)).long() for side in (x, y))
    routes: dict[str, Route] = {
        "torch.func contraction": lambda: peer.contraction(net, left, right).numpy(),
    }
    if size.pairs:
        routes["torch.func NTK-vector products"] = lambda: peer.ntk_vector_products(net, left, right).numpy()
    return routes


def _mlp(size: MLP) -> Problem:
    init, f = make_mlp((size.width, size.width, size.outputs), activation="gelu")
    params = init(jax.random.key(0), size.inputs)
    x, y = (jax.random.normal(jax.random.key(s), (count, size.inputs)) for s, count in ((1, size.n), (2, size.m)))
    routes = _our_routes(f, params, x, y, size.n, size.m)
    if importlib.util.find_spec("torch"):
        from tests.benchmarks import torch_mlp

        routes["torch.func contraction"] = functools.partial(
            torch_mlp.contraction, params, np.asarray(x), np.asarray(y)
        )
    p = tree_size(params)
    return Problem(
        _sizes(f"MLP {size.inputs} x {size.width} x {size.width} x {size.outputs} (gelu)", params, size),
        f,
        params,
        x,
        y,
        routes,
        gradient_flops=2.0 * (size.n + size.m) * p * (1 + 2 * size.outputs),
        contraction_flops=2.0 * size.n * size.m * size.outputs**2 * p,
    )


def _sizes(network: str, params: Params, size: Size) -> str:
    counts = f"{size.n} rows, {size.m} columns, {size.outputs} outputs"
    return f"{network}, {tree_size(params):,} parameters, float32; {counts}"


@functools.partial(jax.jit, static_argnums=0)
def _dense_kernel(f: OutputFn, params: Params, x: Inputs, y: Inputs) -> jax.Array:
    """Whole Jacobians, contracted leaf by leaf."""

    def jacobian(side):
        one = jax.jacrev(lambda p, example: f(p, jax.tree.map(lambda leaf: leaf[None], example))[0])
        leaves = jax.tree.leaves(jax.vmap(one, (None, 0))(params, side))
        return [leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves]

    terms = [jnp.einsum("ncp,mkp->ncmk", a, b) for a, b in zip(jacobian(x), jacobian(y), strict=True)]
    return functools.reduce(jnp.add, terms)
