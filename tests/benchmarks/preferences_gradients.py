"""Rows about gradients of log-probabilities, the Gram matrices of pairs and who gains, and generation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.types import ResponseBatch
from jaxft.nn.decoder_outputs import make_first_token_logits, make_next_token_logits, make_response_log_probs
from jaxft.nn.generation import generate
from jaxft.tuning.gains import who_gains
from jaxft.tuning.objectives import loss_slopes
from jaxft.tuning.preference_gram import preference_gram
from tests.benchmarks import preferences_peers as peers
from tests.benchmarks.preferences_problems import (
    PYTHIA_70M,
    TINY,
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

ROWS = ("preference-gram", "who-gains", "generation")
WORDS = 32
"""Words whose rates the peer finds, and on which errors are taken."""


def make_row(name: str, *, quick: bool) -> Row:
    """A row by its name."""
    if name == "generation":
        return _generation(quick)
    size = Size(TINY, 4, (4, 8), (3, 6)) if quick else Size(PYTHIA_70M, 16, (128, 128), (128, 128))
    return _gram(size) if name == "preference-gram" else _who_gains(dataclasses.replace(size, pairs=1))


def _gram(size: Size) -> Row:
    pairs, f = functools.cache(lambda: draw_pairs(size)), make_response_log_probs(size.decoder)

    @functools.cache
    def exact() -> np.ndarray:
        """Of the first pair."""

        def gram(params: Any, batch: ResponseBatch) -> jax.Array:
            leaves = jax.tree.leaves(jax.jacrev(lambda p: f(p, batch)[0])(params))
            return sum(leaf.reshape(2, -1) @ leaf.reshape(2, -1).T for leaf in leaves)  # pyright: ignore[reportReturnType]

        return in_float64(gram, draw_params(size.decoder), lay_out(pairs()[:1], "padded"))

    def error(found: Any) -> float:
        return relative_error(np.asarray(found)[0], exact())

    def ours(layout: str) -> Run:
        params, batch = draw_params(size.decoder), lay_out(pairs(), layout)
        return lambda: preference_gram(f, params, batch)

    few = min(4, size.pairs)
    said = "" if few == size.pairs else f"{few} pairs, scaled up"

    def dense() -> Run:
        return peers.plain_jax_gram(f, draw_params(size.decoder), lay_out(pairs()[:few], "packed"))

    routes = {
        "ours, packed": Route(lambda: ours("packed"), error),
        "ours, padded": Route(lambda: ours("padded"), error),
        "plain jax: dense gradients of a pair, packed": Route(dense, error, lambda: few / size.pairs, said),
        "torch: a backward pass a response": Route(
            lambda: peers.preference_gram(size.decoder, pairs()[:few]), error, lambda: few / size.pairs, said, "torch"
        ),
    }
    title = "Inner products of the gradients of a pair's log-probabilities"
    return Row(title, size.work, routes, "Error: of one pair, against dense gradients in float64, padded.")


def _who_gains(size: Size) -> Row:
    pairs = functools.cache(lambda: draw_pairs(size))
    words = np.linspace(1, size.decoder.vocab_size - 1, WORDS).astype(int)
    logits, log_probs = make_first_token_logits(size.decoder), make_response_log_probs(size.decoder)

    def rates(params: Any, batch: ResponseBatch) -> jax.Array:
        both = log_probs(params, batch)
        return who_gains(logits, log_probs, params, batch, loss_slopes("sigmoid", both, both)).log_change[0]

    def ours() -> Run:
        params, batch = draw_params(size.decoder), lay_out(pairs(), "packed")
        slopes = jnp.array([[-0.05, 0.05]])
        return lambda: who_gains(logits, log_probs, params, batch, slopes).log_change[0]

    exact = functools.cache(lambda: in_float64(rates, draw_params(size.decoder), lay_out(pairs(), "padded"))[words])

    def error(found: Any) -> float:
        found = np.asarray(found)
        return relative_error(found[words] if len(found) > WORDS else found, exact())

    count = size.decoder.vocab_size
    peer = Route(
        lambda: peers.word_rates(size.decoder, pairs()[0], words.tolist()),
        error,
        lambda: WORDS / count,
        f"{WORDS} words, scaled up",
        "torch",
    )
    forward = Route(lambda: peers.word_rates(size.decoder, pairs()[0]), error, needs="torch")
    routes = {"ours": Route(ours, error), "torch.func: a forward derivative": forward, "torch: a gradient a word": peer}
    notes = f"A step of DPO on one pair, to first order. Error: of the rates of {WORDS} words, against float64, padded."
    return Row(f"Who gains: the rate of each of {count:,} words", size.work, routes, notes)


def _generation(quick: bool) -> Row:
    config = TINY if quick else PYTHIA_70M
    b, t, new = (2, 8, 8) if quick else (8, 64, 128)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (b, t)).astype(np.int32)

    def ours() -> Run:
        params, prompts = draw_params(config), plain_tokens(ids)
        return lambda: generate(config, params, prompts, max_new_tokens=new).ids

    def error(found: Any) -> float:
        found = np.asarray(found)[:2]
        rows = plain_tokens(np.concatenate([ids[:2], found[:, :-1]], axis=1).astype(np.int32))
        best = in_float64(make_next_token_logits(config), draw_params(config), rows)[:, t - 1 :].argmax(-1)
        return float((best != found).mean())

    routes = {
        "ours": Route(ours, error),
        "transformers' generate": Route(lambda: peers.generate(config, ids, new=new), error, needs="torch"),
    }
    work = f"{shape_of(config)}; {b} prompts of {t} tokens, {new} new tokens each, greedy, with a cache"
    notes = "Error: the share of tokens of 2 rows that are not the likeliest, by float64 without a cache."
    return Row("Generation", work, routes, notes)
