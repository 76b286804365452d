"""What the preference benchmark is measured on: decoders with random weights and pairs of random tokens.

A pair is three lists of token ids: prompt, chosen, rejected. A response ends with token 0, which is nowhere else, so
that a peer that ends responses itself reads the same.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.checks import path_name
from jaxft.core.trees import tree_cast
from jaxft.core.types import CausalTokens, Params, ResponseBatch
from jaxft.nn.decoder import DecoderConfig, decoder_config, init_decoder
from jaxft.tuning.packing import make_response_batch

Pair = tuple[list[int], list[int], list[int]]

PYTHIA_70M = decoder_config(
    "gpt_neox", vocab_size=50304, width=512, layers=6, heads=8, mlp_width=2048, max_positions=2048
)
PYTHIA_410M = decoder_config(
    "gpt_neox", vocab_size=50304, width=1024, layers=24, heads=16, mlp_width=4096, max_positions=2048
)
PYTHIA_1B = decoder_config(
    "gpt_neox", vocab_size=50304, width=2048, layers=24, heads=16, mlp_width=8192, max_positions=2048
)
TINY = decoder_config("gpt_neox", vocab_size=300, width=32, layers=2, heads=4, mlp_width=64, max_positions=64)

_WIDTHS = ("vocab_size", "width", "layers", "heads", "mlp_width", "max_positions")
FORWARD: dict[str, dict[str, Any]] = {
    "gpt2": dict(zip(_WIDTHS, (50257, 768, 4, 12, 3072, 1024), strict=True)),
    "gpt_neox": dict(zip(_WIDTHS, (50304, 512, 6, 8, 2048, 2048), strict=True)),
    "llama": {**dict(zip(_WIDTHS, (49152, 576, 10, 9, 1536, 2048), strict=True)), "kv_heads": 3, "tied": True},
    "olmo": {**dict(zip(_WIDTHS, (50304, 768, 4, 12, 2048, 2048), strict=True)), "tied": True, "clip_qkv": 8.0},
    "olmo2": dict(zip(_WIDTHS, (50304, 768, 4, 12, 2048, 2048), strict=True)),
}
"""Widths of the smallest published models, with fewer layers; Llama's is SmolLM2, with grouped heads."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder and a set of pairs; ranges of lengths hold both ends."""

    decoder: DecoderConfig
    pairs: int
    prompt: tuple[int, int]
    response: tuple[int, int]

    @property
    def work(self) -> str:
        """One line on the sizes."""

        def span(ends: tuple[int, int]) -> str:
            return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"

        lengths = f"prompts of {span(self.prompt)} tokens, responses of {span(self.response)}"
        return f"{shape_of(self.decoder)}; {self.pairs} pairs, {lengths}"


def shape_of(config: DecoderConfig) -> str:
    """One line on a decoder."""
    heads = f"{config.heads} heads" + (f" over {config.kv_heads}" if config.kv_heads != config.heads else "")
    shape = (
        f"{config.layers} layers, width {config.width}, {heads}, MLP {config.mlp_width}, {config.vocab_size:,} words"
    )
    return f"{config.family} ({shape})"


def draw_params(config: DecoderConfig, *, dtype: Any = jnp.float32) -> Params:
    """Random weights, none of them at a value that hides a mistake: biases are not 0, scales not 1. Host, then device.

    Drawn without jax, so that nothing but the weights takes memory of the device, and the same everywhere.
    """
    return jax.tree.map(jnp.asarray, draw_weights(config, dtype=dtype))


def draw_weights(config: DecoderConfig, *, dtype: Any = jnp.float32) -> Params:
    """``draw_params`` as arrays of numpy."""
    shapes = jax.eval_shape(lambda: init_decoder(config, key=jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)

    def draw(numbered: tuple[int, tuple[Any, Any]]) -> np.ndarray:
        seed, (path, leaf) = numbered
        values = np.random.default_rng(seed).standard_normal(leaf.shape, np.float32)
        values *= config.init_scale
        return (values + 1 if path_name(path).endswith("scale") else values).astype(dtype)

    with ThreadPoolExecutor() as pool:
        return jax.tree.unflatten(jax.tree.structure(shapes), list(pool.map(draw, enumerate(leaves))))


def draw_pairs(size: Size, *, seed: int = 0) -> list[Pair]:
    """Lengths and tokens are uniform; the first tokens of two responses differ."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return rng.integers(1, size.decoder.vocab_size, count).tolist()

    def length(ends: tuple[int, int]) -> int:
        return int(rng.integers(ends[0], ends[1] + 1))

    found = []
    while len(found) < size.pairs:
        prompt, chosen, rejected = tokens(length(size.prompt)), *(tokens(length(size.response)) for _ in range(2))
        if chosen[0] != rejected[0]:
            found.append((prompt, [*chosen[:-1], 0], [*rejected[:-1], 0]))
    return found


def lay_out(pairs: list[Pair], layout: Any) -> ResponseBatch:
    """The pairs as ours reads them, on the device."""
    prompts, responses = [pair[0] for pair in pairs], [list(pair[1:]) for pair in pairs]
    return jax.tree.map(jnp.asarray, make_response_batch(prompts, responses, layout=layout, pad_id=0))


def in_float64(f: Any, params: Params, *args: Any) -> np.ndarray:
    """``f(params, *args)`` in float64."""
    with jax.enable_x64(True):
        wide = tree_cast(jax.tree.map(np.asarray, params), jnp.float64)
        return np.asarray(jax.jit(f)(wide, *jax.tree.map(np.asarray, args)))


def plain_tokens(ids: np.ndarray) -> CausalTokens:
    """Rows without padding or branches."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return CausalTokens(jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32), jnp.asarray(positions))


def relative_error(found: Any, exact: Any) -> float:
    """Of norms."""
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
