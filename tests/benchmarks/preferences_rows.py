"""The rows of the preference benchmark: a work on preference pairs, and the routes to it; the first is ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.types import ResponseBatch
from jaxft.nn.decoder import DecoderConfig, decoder_config, unembedding_table
from jaxft.nn.decoder_outputs import make_next_token_logits, make_response_states
from jaxft.tuning.ches import ches_scores
from tests.benchmarks import preferences_dpo, preferences_gradients, preferences_peers
from tests.benchmarks.preferences_problems import (
    FORWARD,
    PYTHIA_70M,
    TINY,
    Pair,
    Size,
    draw_pairs,
    draw_params,
    in_float64,
    lay_out,
    plain_tokens,
    relative_error,
    shape_of,
)
from tests.benchmarks.routes import Route, Row, Run

SAMPLE = 4
"""Pairs on which errors are taken."""
ONE_BY_ONE = 32
"""Pairs on which the slow peers are timed."""
ROWS = ("ches", "ches-varied", "exact-ches")


def make_row(name: str, *, quick: bool) -> Row:
    """A row by its name."""
    if name == "dpo-step":
        return preferences_dpo.make_row(quick=quick)
    if name in preferences_gradients.ROWS:
        return preferences_gradients.make_row(name, quick=quick)
    if name.startswith("forward-"):
        return _forward(name.removeprefix("forward-"), quick)
    return _exact(quick) if name == "exact-ches" else _ches(name == "ches-varied", quick)


def _size(name: str, quick: bool) -> Size:
    if quick:
        return Size(TINY, 6, (4, 8), (3, 6))
    if name == "ches":
        return Size(PYTHIA_70M, 512, (128, 128), (128, 128))
    return Size(PYTHIA_70M, 256, (64, 128), (32, 128))


def _ches(varied: bool, quick: bool) -> Row:
    size = _size("ches-varied" if varied else "ches", quick)
    pairs = functools.cache(lambda: draw_pairs(size))
    exact = functools.partial(_exact_scores, size.decoder, pairs)
    few = min(ONE_BY_ONE, size.pairs)

    def error(found: Any) -> float:
        return relative_error(np.asarray(found)[:SAMPLE], exact())

    def ours(layout: str, batch_size: int) -> Route:
        return Route(
            functools.partial(_start_ches, size, pairs, layout, batch_size), error, note=f"{batch_size} at a time"
        )

    def peer(start: Callable[..., Run], count: int, note: str, **options: Any) -> Route:
        said = note if count == size.pairs else ", ".join(filter(None, [note, f"{count} pairs, scaled up"]))
        return Route(
            lambda: start(size.decoder, pairs()[:count], **options), error, lambda: count / size.pairs, said, "torch"
        )

    batched = preferences_peers.ches_batched
    routes = {
        "ours, packed": ours("packed", 8),
        "ours, padded": ours("padded", 8),
        "the authors' way: one pair at a time, two passes, logits": peer(preferences_peers.ches_one_by_one, few, ""),
        "torch, padded batches, no logits": peer(batched, min(4 * few, size.pairs), "8 at a time", batch=8),
    }
    if varied:
        start = functools.partial(_start_buckets, size, pairs, 4)
        routes["ours, packed, by length in 4 shapes"] = Route(start, error, note="8 at a time")
    else:
        routes["torch, one pair a batch, no logits"] = peer(batched, few, "", batch=1)
    title = "CHES" + (", lengths varied" if varied else "")
    return Row(title, size.work, routes, f"Error: of {SAMPLE} scores, against ours in float64, padded.")


def _start_ches(size: Size, pairs: Callable[[], list[Pair]], layout: str, batch_size: int, **options: Any) -> Run:
    params, batch = draw_params(size.decoder), lay_out(pairs(), layout)
    f = make_response_states(size.decoder)
    if options:
        options["table"] = unembedding_table(size.decoder, params)
    return lambda: ches_scores(f, params, batch, batch_size=batch_size, **options)


def _start_buckets(size: Size, pairs: Callable[[], list[Pair]], count: int) -> Run:
    """Pairs of like length have a width of their own."""
    order = np.argsort([sum(map(len, pair)) for pair in pairs()], kind="stable")
    params, f = draw_params(size.decoder), make_response_states(size.decoder)
    batches = [lay_out([pairs()[i] for i in some], "packed") for some in np.array_split(order, count)]

    def run() -> np.ndarray:
        found = np.empty(len(order), np.float32)
        found[order] = np.concatenate([np.asarray(ches_scores(f, params, batch, batch_size=8)) for batch in batches])
        return found

    return run


def _exact_scores(config: DecoderConfig, pairs: Callable[[], list[Pair]], *, weighed: bool = False) -> np.ndarray:
    """Of the first pairs, padded, in float64; with weights, by dense gradients of the unembedding."""
    batch = lay_out(pairs()[:SAMPLE], "padded")
    f = make_response_states(config)
    params = draw_params(config)

    def sums(p: Any, b: ResponseBatch) -> jax.Array:
        states = f(p, b)
        if not weighed:
            return (states * b.mask[..., None]).sum(2)
        logits = states @ unembedding_table(config, p).T
        errors = (jax.nn.one_hot(b.targets, logits.shape[-1]) - jax.nn.softmax(logits)) * b.mask[..., None]
        return jnp.einsum("nrkv,nrkd->nrvd", errors, states).reshape(*states.shape[:2], -1)

    found = [
        in_float64(sums, params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch))[0]
        for i in range(len(batch.mask))
    ]
    return np.array([chosen @ rejected - chosen @ chosen for chosen, rejected in found])


def _exact(quick: bool) -> Row:
    size = dataclasses.replace(_size("ches-varied", quick), pairs=8 if quick else 32)
    pairs = functools.cache(lambda: draw_pairs(size))

    def error(found: Any) -> float:
        exact = _exact_scores(size.decoder, pairs, weighed=True)
        return relative_error(np.asarray(found)[: len(exact)], exact[: len(found)])

    def ours(batch_size: int, **options: Any) -> Route:
        start = functools.partial(_start_ches, size, pairs, "packed", batch_size, coefficients="exact", **options)
        chunk = f", {options['chunk']} words at a time" if options else ""
        return Route(start, error, note=f"{batch_size} pairs at a time{chunk}")

    few = min(8, size.pairs)
    peer = Route(
        lambda: preferences_peers.exact_ches(size.decoder, pairs()[:few]),
        error,
        lambda: few / size.pairs,
        f"{few} pairs, scaled up",
        "torch",
    )
    routes = {
        "ours": ours(8),
        "ours, in chunks of words": ours(8, chunk=64 if quick else 8192),
        "torch: two gradients of the unembedding a pair": peer,
    }
    notes = (
        f"Error: of {SAMPLE} scores, against dense gradients in float64. Peers that ship these scores are not known."
    )
    return Row("CHES with exact coefficients", size.work, routes, notes)


def _forward(family: Any, quick: bool) -> Row:
    sizes = {"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "mlp_width": 64, "max_positions": 64}
    config = decoder_config(family, **(sizes if quick else FORWARD[family]))
    b, t = (2, 16) if quick else (4, 256)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (b, t)).astype(np.int32)
    f = make_next_token_logits(config)

    def ours() -> Run:
        params, tokens, compiled = draw_params(config), plain_tokens(ids), jax.jit(f)
        return lambda: compiled(params, tokens)

    def error(found: Any) -> float:
        return relative_error(np.asarray(found)[:1], in_float64(f, draw_params(config), plain_tokens(ids[:1])))

    routes = {
        "ours": Route(ours, error),
        "transformers": Route(lambda: preferences_peers.logits(config, ids), error, needs="torch"),
    }
    return Row(f"Forward, {family}", f"{shape_of(config)}; logits of {b} rows of {t} tokens", routes, FORWARD_NOTE)


FORWARD_NOTE = "Error: of the logits of one row, against ours in float64."
