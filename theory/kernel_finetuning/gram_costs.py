"""Claims on what kernels made from factors cost: operations as XLA counts them, and memory as it allots it."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.types import OutputFn, Params, TokenBatch
from jaxft.kernels import empirical_ntk, parameter_mask
from jaxft.kernels.features import EXAMPLES_AT_ONCE
from jaxft.kernels.ntk import MethodName
from jaxft.kernels.plan import Plan, activation_bytes
from jaxft.nn import EncoderConfig, init_encoder, make_tied_logits
from theory.claims import Evidence
from theory.kernel_finetuning.toys import make_claim

LABELS = (1, 2)
TRAINED = ("embeddings/token$", "query/kernel$", "mlp/(in|out)/kernel$")
"""The token table, and most of what is dense."""

METHODS: tuple[MethodName, ...] = ("tiled", "ghost", "contraction")


class Size(NamedTuple):
    """Shapes of a call."""

    width: int
    layers: int
    tokens: int
    rows: int
    columns: int
    block: int | None
    tile: int


COUNTED = tuple(Size(128, 1, tokens, EXAMPLES_AT_ONCE, EXAMPLES_AT_ONCE, None, 2**17) for tokens in (4, 16, 8))
"""One block, one tile a matrix, all examples at once: XLA counts the body of a loop once."""

ALLOTTED = (
    Size(64, 2, 8, 16, 16, 8, 2**12),
    Size(64, 2, 8, 16, 64, 8, 2**12),
    Size(128, 2, 16, 32, 64, 16, 2**13),
)
"""The second differs from the first in its columns alone."""


class Call(NamedTuple):
    """A call of known shapes: nothing of it is computed."""

    f: OutputFn
    params: Params
    x: TokenBatch
    y: TokenBatch
    options: Mapping[str, Any]

    def plan(self, method: MethodName) -> Plan:
        """What the formulas say."""
        plans: list[Plan] = []

        def explained(params: Params, x: TokenBatch, y: TokenBatch) -> None:
            plans.append(empirical_ntk(self.f, params, x, y, method=method, **self.options, explain=True))

        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(explained, self.params, self.x, self.y)
        return plans[0]

    def lowered(self, method: MethodName) -> jax.stages.Lowered:
        """The program."""

        def kernel(params: Params, x: TokenBatch, y: TokenBatch) -> jax.Array:
            return empirical_ntk(self.f, params, x, y, method=method, **self.options)

        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(kernel).lower(self.params, self.x, self.y)


def call_of(size: Size, *, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Call:
    """An encoder of some size in float32, with the embeddings of two label words as decoder."""
    config = EncoderConfig("bert", 500, size.width, size.layers, 4, 4 * size.width, 32, 2, 1e-5, 0, scan_layers=True)
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(functools.partial(init_encoder, config), key=jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)

    def batch(n: int) -> TokenBatch:
        tokens, of_each = ((n, size.tokens), (n,))
        shapes: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (tokens, tokens, tokens, of_each)]
        return TokenBatch(*shapes)

    mask = parameter_mask(params, only=only, without=without)
    options = {"param_mask": mask, "block_size": size.block, "tile": size.tile}
    return Call(make_tied_logits(config, LABELS), params, batch(size.rows), batch(size.columns), options)


@functools.cache
def operations(size: Size) -> dict[str, tuple[float, float]]:
    """Of every method: as XLA counts them, and as the formulas do."""
    # Tables of a few rows are left out: a tile has more rows than they.
    call = call_of(size, without=("embeddings/(position|token_type)$",))
    counts: dict[str, Any] = {method: call.lowered(method).cost_analysis() for method in METHODS}
    return {method: (counts[method]["flops"], call.plan(method).flops) for method in METHODS}


def counted_operations(seed: int, *, other: bool = False) -> Evidence:
    """Operations that XLA counts, as a multiple of the formulas: the ratio furthest from 1 of three methods.

    The control compares the count of tiles with the formula of inner products of factors.
    """
    size = COUNTED[seed % len(COUNTED)]
    found = operations(size)
    ratios = {method: found[method][0] / found["ghost" if other else method][1] for method in METHODS}
    worst = max(ratios.values(), key=lambda ratio: abs(np.log(ratio)))
    return Evidence(worst, 1.0, setting={"ratios": ratios, "tokens": size.tokens, "width": size.width})


@functools.cache
def memory(size: Size, method: MethodName) -> tuple[int, int]:
    """Bytes that XLA allots besides arguments and results, and the bound."""
    call = call_of(size, only=TRAINED)
    with jax.numpy_dtype_promotion("standard"):
        activations = activation_bytes(call.f, call.params, call.x)
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}  # quick to compile; buffers are the same
    found: Any = call.lowered(method).compile(compiler_options=options).memory_analysis()
    return found.temp_size_in_bytes, call.plan("tiled").peak_bytes(activations)


def peak_memory(seed: int, *, whole: bool = False) -> Evidence:
    """Bytes that XLA allots to tiles of gradients made from factors, and their bound.

    The control holds whole gradients.
    """
    size = ALLOTTED[0 if whole else seed % len(ALLOTTED)]
    measured, bound = memory(size, "contraction" if whole else "tiled")
    setting = {"call": size._asdict(), "unit": "bytes", "precision": "float32, matmul highest"}
    return Evidence(measured, bound, setting=setting)


CLAIMS = (
    make_claim(
        "gram-operations",
        "Gradients, tiles and products of a kernel cost the operations that the formulas of its plan say.",
        "cf. section 3; costs of arXiv 2206.08720",
        "equality",
        counted_operations,
        {"other": True},
        "tiles are compared with the formula of inner products of factors",
        tolerance=0.1,
    ),
    make_claim(
        "gram-memory",
        "Contracted in tiles, gradients take memory bounded by block and tile, however large the kernel.",
        "cf. section 3; costs of arXiv 2206.08720",
        "bound",
        peak_memory,
        {"whole": True},
        "gradients are held whole",
        seeds=3,
    ),
)
