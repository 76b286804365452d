"""A step of DPO: ours as a user gets it, that of TRL's trainer, and one by hand in torch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.core.trees import tree_cast
from jaxft.core.types import Params
from jaxft.nn.decoder_outputs import make_response_log_probs
from jaxft.train.loop import TrainState, init_state, make_segment
from jaxft.tuning.objectives import PreferenceLabels, make_preference_objective
from tests.benchmarks import preferences_peers as peers
from tests.benchmarks.preferences_problems import (
    PYTHIA_70M,
    TINY,
    Pair,
    Size,
    draw_pairs,
    draw_params,
    lay_out,
    relative_error,
)
from tests.benchmarks.routes import Route, Row, Run
from tests.benchmarks.torch_weights import torch_weights

Weights = Callable[[], dict[str, np.ndarray]]
"""The weights as they are now, by their names in transformers."""

BETA, RATE, EPS = 0.1, 1e-4, 1e-6
OPTIONS = {"beta": BETA, "learning_rate": RATE, "eps": EPS}
CHECKED = 2
"""Pairs on which a step is compared with one in float64."""


def make_row(*, quick: bool) -> Row:
    """Of steps on one batch; parameters and the state of the optimiser go on from step to step."""
    size = Size(TINY, 4, (4, 8), (3, 6)) if quick else Size(PYTHIA_70M, 8, (128, 128), (128, 128))
    pairs = functools.cache(lambda: draw_pairs(size))
    exact = functools.cache(lambda: _wide_update(size, pairs()[:CHECKED]))

    def ours(layout: str, note: str = "", **options: Any) -> Route:
        def taken(count: int | None) -> tuple[Run, Weights]:
            step, params = start_ours(size, pairs()[:count], layout, **options)
            return step, lambda: torch_weights(size.decoder, params())

        return _route(taken, exact, note)

    def peer(kind: str) -> Route:
        def taken(count: int | None) -> tuple[Run, Weights]:
            return peers.dpo(kind, size.decoder, pairs()[:count], **OPTIONS)

        return _route(taken, exact, needs="trl" if kind == "trl" else "torch")

    routes = {
        "ours, packed": ours("packed"),
        "ours, packed, 256 tokens at the unembedding": ours("packed", chunk=8 if quick else 256),
        "ours, padded": ours("padded"),
        "TRL's DPOTrainer": peer("trl"),
        "torch by hand: no logits of prompts": peer("plain"),
    }
    notes = (
        "AdamW without decay; log-probabilities of the reference are computed once, before. First call and peak: with "
        "the weights and the state of the optimiser, which the first call builds. Error: of what two steps change on "
        f"{CHECKED} pairs, against ours in float64, padded."
    )
    return Row("A step of DPO", size.work, routes, notes)


def _route(
    taken: Callable[[int | None], tuple[Run, Weights]], exact: Callable[[], np.ndarray], note: str = "", needs: str = ""
) -> Route:
    """Of what takes a step on so many pairs, and the weights after it."""
    held: dict[str, Run] = {}

    def step() -> Any:
        if not held:
            held["step"] = taken(None)[0]
        return held["step"]()

    def error(_: Any) -> float:
        held.clear()
        return relative_error(_update(*taken(CHECKED)), exact())

    return Route(lambda: step, error, note=note, needs=needs)


def _update(step: Run, weights: Weights) -> np.ndarray:
    """What two steps change: the second's gradient knows what the first one did."""
    before = {name: np.array(leaf, np.float64) for name, leaf in weights().items()}
    losses = [float(step()) for _ in range(2)]
    assert losses[1] < losses[0], losses
    after = weights()
    return np.concatenate([(after[name] - leaf).ravel() for name, leaf in sorted(before.items())])


def _wide_update(size: Size, pairs: list[Pair]) -> np.ndarray:
    narrow = jax.tree.map(np.asarray, draw_params(size.decoder))
    with jax.enable_x64(True):
        params = tree_cast(narrow, jnp.float64)
        step, after = start_ours(size, pairs, "padded", params=params)
        return _update(step, lambda: torch_weights(size.decoder, after()))


def start_ours(
    size: Size,
    pairs: list[Pair],
    layout: str,
    *,
    params: Params | None = None,
    dtype: Any = jnp.float32,
    **options: Any,
) -> tuple[Run, Callable[[], Params]]:
    """A step of ours, which returns the loss; and a function that returns the parameters."""
    f = make_response_log_probs(size.decoder, **options)
    batch = lay_out(pairs, layout)
    params = draw_params(size.decoder, dtype=dtype) if params is None else params
    reference = jax.jit(f)(params, batch)
    labels = PreferenceLabels(reference=reference, lengths=batch.mask.sum(-1))
    tx = optax.adamw(RATE, eps=EPS, weight_decay=0.0)
    segment = make_segment(f, make_preference_objective("sigmoid", beta=BETA), tx)
    held: dict[str, TrainState] = {"state": init_state(params, tx)}
    index = jnp.arange(len(pairs))[None]
    del params

    def step() -> jax.Array:
        held["state"], losses = segment(held["state"], batch, labels, index)
        # The caller waits for the loss; the state must be there too.
        jax.block_until_ready(held["state"])
        return losses[0]

    return step, lambda: held["state"].params
