"""Claims on the exactness of kernels made from factors: every method gives the Gram matrix of dense gradients."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.factors import Tap
from jaxft.core.rng import host_stream
from jaxft.core.types import Inputs, Params
from jaxft.kernels.contraction import Arithmetic, Route, contract
from jaxft.kernels.features import Matrix, block_features, taps_of
from jaxft.kernels.methods import KERNELS as KERNEL_MAPS
from jaxft.nn.factored import factored
from jaxft.nn.tape import Tape
from theory.claims import Evidence
from theory.kernel_finetuning.gram_cases import (
    CASES,
    PADDING,
    TOKENS,
    TRAINED,
    Dense,
    dense_kernels,
    drawn_batch,
    drawn_scales,
    engine_kernels,
    inputs_of,
)
from theory.kernel_finetuning.toys import make_claim


def compared(pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | float]], **setting: Any) -> Evidence:
    """Evidence from kernels (ours, by definition, slack), each in units of its largest entry."""
    ours, expected = [], []
    for kernel, definition, slack in pairs:
        kernel = np.asarray(kernel, np.float64).reshape(definition.shape)
        beyond = np.maximum(np.abs(kernel - definition) - slack, 0)
        scale = np.abs(definition).max()
        expected.append(np.ravel(definition) / scale)
        ours.append(np.ravel(definition + beyond) / scale)
    return Evidence(np.concatenate(ours), np.concatenate(expected), setting={"compared": len(pairs), **setting})


def factored_kernels(
    seed: int, *, cases: Sequence[str] = tuple(CASES), forgotten: bool = False, only: tuple[str, ...] | None = None
) -> Evidence:
    """Kernels of all cases by all methods, against dense Jacobians.

    The control forgets what the token table's two uses have with each other.
    """
    pairs, off = [], 0.0
    for case in cases:
        trained = CASES[case].only if only is None else only
        params, scales = inputs_of(case, seed)
        batch = drawn_batch(seed)
        found = dict(engine_kernels(case, trained, params, batch, scales))
        dense = dense_kernels(case, trained, params, batch, scales, rounding=1e-12)
        crossing = found.pop("crossing", None)
        if crossing is not None:
            off = float(np.abs(crossing["sgd"]).max() / np.abs(dense.kernels["sgd"]).max())
            if forgotten:
                found = {m: {**k, "sgd": k["sgd"] - crossing["sgd"]} for m, k in found.items()}
        pairs += _pairs(found, dense)
    return compared(pairs, trained=", ".join(cases), cross_term=off)


def _pairs(found: Mapping[str, Mapping[str, jax.Array]], dense: Dense) -> list:
    return [
        (np.asarray(kernel), dense.kernels[name], dense.slack.get(name, 0.0))
        for kernels in found.values()
        for name, kernel in kernels.items()
    ]


def single_precision(seed: int, *, half: bool = False) -> Evidence:
    """The same of label words in float32; the control keeps factors in bfloat16."""
    params, scales = inputs_of("label words", seed, np.float32)
    batch = drawn_batch(seed)
    found = dict(engine_kernels("label words", TRAINED, params, batch, scales))
    dense = dense_kernels("label words", TRAINED, params, batch, scales, rounding=1e-6)
    rounded = found.pop("half")
    error = np.linalg.norm(np.asarray(rounded["sgd"], np.float64) - dense.kernels["sgd"]) / np.linalg.norm(
        dense.kernels["sgd"]
    )
    unsure = {name: float(slack.max()) for name, slack in dense.slack.items()}
    setting = {"error of bfloat16 factors": float(error), "signs that rounding decides": unsure, "precision": "float32"}
    return compared(_pairs({"half": rounded} if half else found, dense), **setting)


def rank_one_scales(seed: int, *, rank_one: bool = True) -> Evidence:
    """Ghost products with scales that are outer products, against their dense diagonals.

    The control has diagonals of full rank in the place of the outer products.
    """
    params, scales = inputs_of("label words", seed)
    batch = drawn_batch(seed)
    found = engine_kernels("label words", TRAINED, params, batch, scales)["ghost"]["preconditioned"]
    diagonals = drawn_scales(seed, params, rank_one=rank_one)
    dense = dense_kernels("label words", TRAINED, params, batch, diagonals, rounding=0.0)
    return compared([(np.asarray(found), dense.kernels["preconditioned"], 0.0)], scales="outer products of matrices")


def padding_invariance(seed: int, *, attended: bool = False) -> Evidence:
    """Kernels of a batch with more padding, against dense Jacobians of the same batch without it.

    The control does not mask the padding.
    """
    params, scales = inputs_of("label words", seed)
    found = engine_kernels("label words", TRAINED, params, drawn_batch(seed, attended=attended), scales)
    shorter = drawn_batch(seed, padding=0)
    dense = dense_kernels("label words", TRAINED, params, shorter, scales, rounding=1e-12)
    return compared(_pairs(found, dense), tokens=TOKENS, padding=PADDING)


@factored
def f_bilinear(params: Params, x: Inputs, tape: Tape) -> jax.Array:
    """Two outputs, whose gradients are whole numbers where the inputs are."""
    hidden = tape.dense(x["left"], params["w"])
    return jnp.einsum("nro,nrco->nc", hidden, x["right"], precision="highest")


def sign_sums(seed: int, *, half: bool = False) -> Evidence:
    """Kernels of signs, in units of 1, against sums of signs in int64: by two routes, in both arithmetics.

    The control keeps the kernel in float16, which has whole numbers up to 2048 only.
    """
    rng = host_stream(seed, "signs")
    left = rng.integers(-2, 3, size=(5, 3, 96)).astype(np.float32)
    right = rng.integers(-2, 3, size=(5, 3, 2, 64)).astype(np.float32)
    signs = np.sign(np.einsum("nrk,nrco->ncko", left, right).reshape(10, -1)).astype(np.int64)
    x = {"left": jnp.asarray(left), "right": jnp.asarray(right)}
    kernels = np.asarray(_sign_kernels(x, jnp.float16 if half else jnp.float32)).astype(np.float64)
    setting = {"parameters": signs.shape[1], "precision": "signs in int8 and float32, sums in int32"}
    return Evidence(kernels, np.broadcast_to(signs @ signs.T, kernels.shape), setting=setting)


@functools.partial(jax.jit, static_argnums=1)
def _sign_kernels(x: Inputs, kept: Any) -> jax.Array:
    """``(route and arithmetic, n * c, n * c)``."""
    matrix = Matrix(1, x["left"].shape[-1], x["right"].shape[-1])
    trained, frozen = {"w": jnp.zeros(matrix[1:], jnp.float32)}, {"w": None}
    known, _ = taps_of(f_bilinear, trained, frozen, x)
    routes: dict[Route, dict[str, Tap]] = {"tiled": known, "whole": {}}
    found = []
    for route, taps in routes.items():
        features = block_features(f_bilinear, trained, frozen, x, taps)
        for integers in (False, True):
            arithmetic = Arithmetic(kept, "highest", 1000, integers)
            sides = features, features
            found += [contract([KERNEL_MAPS["signgd"]], {"w": route}, *sides, {"w": matrix}, None, arithmetic)[0]]
    return jnp.stack(found)


CLAIMS = (
    make_claim(
        "gram-float64",
        "All methods give the Gram matrix of dense gradients, whatever is trained and however it is used.",
        "cf. section 3",
        "identity",
        factored_kernels,
        {"forgotten": True},
        "what the token table's two uses have with each other is forgotten",
        tolerance=1e-12,
    ),
    make_claim(
        "gram-float32",
        "In float32 they differ from it by rounding.",
        "cf. section 3",
        "identity",
        single_precision,
        {"half": True},
        "factors are kept in bfloat16",
        tolerance=1e-5,
    ),
    make_claim(
        "gram-rank-one",
        "A preconditioner of outer products gives its kernel from factors alone, as that of Adafactor does.",
        "cf. section 3; arXiv 1804.04235, section 3",
        "identity",
        rank_one_scales,
        {"rank_one": False},
        "the diagonals have full rank",
        tolerance=1e-12,
    ),
    make_claim(
        "gram-padding",
        "Padding that is masked leaves every kernel as it is.",
        "cf. section 3",
        "identity",
        padding_invariance,
        {"attended": True},
        "the padding is attended to",
    ),
    make_claim(
        "gram-signs",
        "Kernels of signs are sums of whole numbers, without an error.",
        "cf. section 3",
        "identity",
        sign_sums,
        {"half": True},
        "the kernel is kept in float16",
        tolerance=0.0,
    ),
)
