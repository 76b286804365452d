"""Cases on which kernels made from factors are checked: a tiny masked language model, and its kernels twice over.

The model has what makes gradients structured: a token table that is read by tokens and by label words, stacked layers,
padding. Trained is one leaf of every kind (``TRAINED``), biases alone, the table alone, or adapters. The engine's
kernels stand beside those of Jacobians by plain reverse mode, contracted on the host in float64.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.checks import path_name
from jaxft.core.factors import Tap, map_outputs
from jaxft.core.rng import host_stream
from jaxft.core.types import Inputs, OutputFn, Params, TokenBatch
from jaxft.kernels import empirical_ntk, parameter_mask
from jaxft.kernels.ntk import KernelName, MethodName
from jaxft.kernels.preconditioners import RankOne
from jaxft.nn import EncoderConfig, init_encoder, init_lora, make_mlm_logits, make_prompt_logits, merge_lora

CONFIG = EncoderConfig("bert", 13, 8, 2, 2, 16, 8, 2, 1e-5, pad_id=0, scan_layers=True)
LABELS = (1, 2, 5)
EXAMPLES, TOKENS, PADDING, RANK = 5, 5, 2, 2

TRAINED = (
    "embeddings/(token|position)$",
    "query/kernel$",
    "mlp/in/(kernel|bias)$",
    "attention_norm/scale$",
    "mlm/dense/kernel$",
    "mlm/bias$",
)
"""One leaf of every kind: fewer of them compile in a fraction of the time."""

KEY_BIAS = "attention/key/bias$"
"""Without gradient, since softmax ignores shifts; the sign of its rounding noise means nothing."""

TABLE = "encoder/embeddings/token"
TABLE_USES = ("encoder/embeddings/rows.0", "mlm/transposed.0")
"""Taps of the token table in ``f_table``: by tokens, as decoder."""

ADAPTED = ("embeddings/token$", "query/kernel$")

KERNELS: tuple[KernelName, ...] = ("sgd", "signgd", "asymmetric_signgd", "preconditioned")
COMPUTED: Mapping[MethodName, tuple[KernelName, ...]] = {
    "auto": KERNELS,
    "contraction": KERNELS,
    "tiled": KERNELS,
    "ghost": ("sgd", "preconditioned"),
    "ntvp": ("sgd", "asymmetric_signgd", "preconditioned"),
}
"""Kernels that a method computes where factors are of any rank; ``auto`` takes the routes of the others."""

SINGLE: Sequence[MethodName] = ("tiled", "ghost")
"""Methods that are also checked in float32."""

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Most of the time here goes to compiling."""


f_words = make_prompt_logits(CONFIG, LABELS)
"""Three logits: the token table is read by tokens, and by the label words."""

f_table = map_outputs(make_mlm_logits(CONFIG), lambda logits: logits[:, 1, jnp.asarray(LABELS[:2])])
"""The first two of them, the table being the decoder of the whole vocabulary."""

f_difference = map_outputs(f_words, lambda logits: logits[:, 1] - logits[:, 0])


def f_adapters(params: Params, x: Inputs) -> jax.Array:
    """The first two, of adapters and what they adapt; a function without taps."""
    return f_words(merge_lora(params["base"], params["adapters"]), x)[:, :2]


class OneUse:
    """A function of which one use of the token table is tapped: gradients of the others are lost."""

    def __init__(self, f: Any, use: str):
        self.f, self.use = f, use

    def __call__(self, params: Params, x: Inputs) -> jax.Array:
        """The outputs."""
        return self.f(params, x)

    def taps(self, params: Params, x: Inputs) -> dict[str, Tap]:
        """The taps that are left."""
        return {name: tap for name, tap in self.f.taps(params, x).items() if tap.leaf != TABLE or name == self.use}

    def tapped(self, params: Params, x: Inputs, taps: Mapping[str, Any]) -> tuple[jax.Array, dict]:
        """As the function does it."""
        return self.f.tapped(params, x, taps)


class Case(NamedTuple):
    """What is trained, of which function."""

    f: OutputFn
    only: tuple[str, ...]
    outputs: np.ndarray
    """Of the function, in terms of the logits of label words ``[c, words]``."""
    methods: Sequence[MethodName]


CASES = {
    "label words": Case(f_words, TRAINED, np.eye(3), ("contraction", "tiled", "ghost", "ntvp")),
    "biases": Case(f_difference, ("bias$",), np.array([[-1.0, 1, 0]]), ("auto",)),
    "decoder": Case(f_table, (f"{TABLE}$",), np.eye(2, 3), ("auto", "ghost")),
    "adapters": Case(f_adapters, ("lora_[ab]$",), np.eye(2, 3), ("auto",)),
}


def drawn_params(seed: int, dtype: Any = np.float64) -> Params:
    """Random parameters of the model, none of them 0 and no scale 1."""
    rng = host_stream(seed, "params")

    def draw(path, leaf):
        return jnp.asarray(0.35 * rng.normal(size=leaf.shape) + path_name(path).endswith("scale"), dtype)

    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(functools.partial(init_encoder, CONFIG, mlm=True), key=jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_adapters(seed: int, params: Params) -> Params:
    """Random adapters, trained ones: none of them 0."""
    rng, adapted = host_stream(seed, "adapters"), parameter_mask(params, only=ADAPTED)
    shapes = jax.eval_shape(lambda p: init_lora(p, adapted, rank=RANK, key=jax.random.key(0)), params)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def drawn_batch(seed: int, *, padding: int = PADDING, attended: bool = False) -> TokenBatch:
    """Examples, of 2 to ``TOKENS`` tokens each, with so many tokens of padding behind.

    What stands in the padding is not told from words; ``attended`` leaves it unmasked.
    """
    rng, n = host_stream(seed, "batch"), EXAMPLES
    lengths, width = rng.integers(2, TOKENS + 1, size=(n, 1)), TOKENS + PADDING
    ids, segments = rng.integers(CONFIG.vocab_size, size=(n, width)), rng.integers(2, size=(n, width))
    at = np.arange(width)[None]
    mask = (at < lengths) | (attended & (at >= TOKENS))
    kept = [jnp.asarray(a[:, : TOKENS + padding], jnp.int32) for a in (ids, mask, segments)]
    return TokenBatch(*kept, mask_position=jnp.ones(n, jnp.int32))


def drawn_scales(seed: int, params: Params, *, rank_one: bool = True) -> Params:
    """A diagonal preconditioner: outer products at matrices, or (for contrast) anything."""
    rng = host_stream(seed, "scales")

    def draw(path, leaf):
        if not re.search(r"(kernel|embeddings/(token|position|token_type))$", path_name(path)):
            return jnp.asarray(rng.uniform(0.5, 2, size=leaf.shape), leaf.dtype)
        *stack, k, o = leaf.shape
        sides = [jnp.asarray(rng.uniform(0.5, 2, size=(*stack, side)), leaf.dtype) for side in (k, o)]
        return RankOne(*sides)

    scales = jax.tree_util.tree_map_with_path(draw, params)
    if rank_one:
        return scales

    def of_full_rank(p):
        return p.dense() * rng.uniform(0.5, 2, size=p.dense().shape) if is_outer(p) else p

    return jax.tree.map(of_full_rank, scales, is_leaf=is_outer)


@quick_jit
def dense_jacobian(params: Params, x: Inputs) -> Params:
    """``[n, words, *leaf]`` of every leaf, of ``f_words``."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.jacrev(f_words)(params, x)


@functools.partial(quick_jit, static_argnums=(0, 1))
def engine_kernels(
    case: str, only: tuple[str, ...], params: Params, x: Inputs, scales: Params
) -> dict[str, dict[str, jax.Array]]:
    """Kernels of a case by method and name.

    In float32 also ``half``, the kernel from factors in bfloat16; of the decoder also ``crossing``, what the two uses
    of the token table have with each other.
    """
    f, _, _, methods = CASES[case]
    mask = parameter_mask(params, only=only, without=[KEY_BIAS])

    def computed(f: OutputFn, method: MethodName, names: tuple[KernelName, ...], **options: Any) -> dict:
        scaled = {"preconditioner": scales} if "preconditioned" in names else {}
        return empirical_ntk(f, params, x, kernel=names, method=method, param_mask=mask, **scaled, **options)

    with jax.numpy_dtype_promotion("standard"):
        single = jax.tree.leaves(params)[0].dtype == jnp.float32
        methods = SINGLE if single else methods
        found = {method: computed(f, method, COMPUTED[method]) for method in methods}
        if single:
            found["half"] = computed(f, "tiled", ("sgd",), factor_dtype=jnp.bfloat16)
        if case == "decoder":
            apart = [computed(OneUse(f, use), "ghost", ("sgd",))["sgd"] for use in TABLE_USES]
            found["crossing"] = {"sgd": found["ghost"]["sgd"] - functools.reduce(jnp.add, apart)}
    return found


class Dense(NamedTuple):
    """Kernels by definition, and by how much signs may err that rounding decides."""

    kernels: dict[str, np.ndarray]
    slack: dict[str, np.ndarray]


def dense_kernels(
    case: str, only: tuple[str, ...], params: Params, batch: Inputs, scales: Params, *, rounding: float
) -> Dense:
    """Kernels of dense Jacobians, contracted on the host in float64.

    A sign is decided by rounding where the entry, not being 0, is below ``rounding`` times the largest of its gradient.
    """
    params, scales = (jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree) for tree in (params, scales))
    mask = parameter_mask(params, only=only, without=[KEY_BIAS])
    names = [name for name, trained in named(mask).items() if trained]
    words = _jacobian(case, params, batch)
    outputs = CASES[case].outputs
    j = np.concatenate(
        [np.einsum("cw,nwp->ncp", outputs, words[name].reshape(*words[name].shape[:2], -1)) for name in names], axis=-1
    )
    diagonals = named(jax.tree.map(lambda p: p.dense() if is_outer(p) else p, scales, is_leaf=is_outer))
    p = np.concatenate([np.ravel(diagonals[name]) for name in names])
    unsure = ((np.abs(j) < rounding * np.abs(j).max(axis=-1, keepdims=True)) & (j != 0)).astype(float)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("ncp,mdp->ncmd", a, b)

    kernels = {
        "sgd": product(j, j),
        "signgd": product(np.sign(j), np.sign(j)),
        "asymmetric_signgd": product(j, np.sign(j)),
        "preconditioned": product(j, p[None, None] * j),
    }
    two_sided = 2 * product(unsure, np.ones_like(j)) + 2 * product(np.ones_like(j), unsure)
    return Dense(kernels, {"signgd": two_sided, "asymmetric_signgd": 2 * product(np.abs(j), unsure)})


def _jacobian(case: str, params: Params, batch: Inputs) -> dict[str, np.ndarray]:
    """Of the label words' logits, by leaf; of adapters by the chain rule, from that of what they adapt."""
    if case != "adapters":
        return named(jax.tree.map(np.asarray, dense_jacobian(params, batch)))
    whole = named(dense_jacobian(merge_lora(params["base"], params["adapters"]), batch))
    found = {}
    for name, parts in params["adapters"].items():
        a, b, j = np.asarray(parts["lora_a"]), np.asarray(parts["lora_b"]), np.asarray(whole[name])
        found[f"adapters/{name}/lora_a"] = np.einsum("nw...ko,...ro->nw...kr", j, b)
        found[f"adapters/{name}/lora_b"] = np.einsum("nw...ko,...kr->nw...ro", j, a)
    return found


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_outer(p: Any) -> bool:
    """Whether a scale is an outer product."""
    return isinstance(p, RankOne)


def inputs_of(case: str, seed: int, dtype: Any = np.float64) -> tuple[Params, Params]:
    """Parameters of a case and their scales."""
    params = drawn_params(seed, dtype)
    if case == "adapters":
        params = {"base": params, "adapters": drawn_adapters(seed, params)}
    return params, drawn_scales(seed, params)
