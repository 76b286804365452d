"""Do networks that generalise alike lie in one basin? Fine-tuned seeds, and the barriers between every two of them.

All networks start from one pre-trained encoder and one head, and learn a rule that two heuristics explain. Juneja et
al. 2023, arXiv 2205.12411, find such networks in clusters by strategy, with barriers between the clusters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments.mode_connectivity.heuristics_config import FEWEST_MODELS, Heuristics
from experiments.mode_connectivity.heuristics_data import SPLITS, Sentences, heuristic_sentences
from experiments.mode_connectivity.heuristics_training import (
    encoder_config,
    fine_tuned,
    pretrained,
    split_losses,
    start_of_fine_tuning,
)
from experiments.mode_connectivity.networks import leaves_by_name
from jaxft.core.rng import stream
from jaxft.core.statistics import Association, mantel_test
from jaxft.core.types import Params
from jaxft.core.units import map_named_leaves
from jaxft.geometry.barriers import cluster_barriers, convexity_gap, loss_barrier, pairwise_barriers
from jaxft.geometry.path_loss import mean_over_batches
from jaxft.geometry.permutations import apply_permutation, random_permutation
from jaxft.lab.resumable import Stopped
from jaxft.nn import init_encoder
from jaxft.nn.unit_specs import encoder_spec
from jaxft.train import NonFiniteLossError

PERMUTATIONS = 5000


@runtime_checkable
class Store(Protocol):
    """Where networks are kept between starts: a run, or a dict in disguise."""

    def has_arrays(self, name: str) -> bool:
        """Whether arrays of this name are kept."""
        ...

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of this name."""
        ...

    def save_arrays(self, name: str, /, **arrays: Any) -> None:
        """Keeps arrays under a name."""
        ...


class HeuristicsResult(NamedTuple):
    """What was measured of the m networks that learnt their task. Dicts are by split: train, held_out, challenge."""

    numbers: Int[np.ndarray, "m"]
    losses: dict[str, Float[np.ndarray, "m"]]
    """Cross-entropy in nats."""
    accuracies: dict[str, Float[np.ndarray, "m"]]
    """Fractions; on the challenge set 1 is the structural rule and 0 the lexical one."""
    barriers: dict[str, Float[np.ndarray, "m m"]]
    """Of the straight lines between the networks, over their chord, in nats."""
    gaps: dict[str, Float[np.ndarray, "m m"]]
    """Convexity gaps of the same lines."""
    clusters: Int[np.ndarray, "m"]
    """Networks with low training barriers between them."""
    associations: dict[str, Association]
    """``train_barrier``, ``train_gap`` and the like: with the difference of accuracies on the challenge set."""
    shuffled: dict[str, float]
    """Mean barrier to the first network with its units shuffled: the same function, in another basin."""
    left_out: Int[np.ndarray, "k"]
    """Networks that diverged or did not learn their task."""
    pretraining_loss: float
    """Nats a hidden word."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All matrices and vectors, for a file of arrays."""
        found = {"numbers": self.numbers, "clusters": self.clusters, "left_out": self.left_out}
        for name in ("losses", "accuracies", "barriers", "gaps"):
            found |= {f"{name}_{split}": values for split, values in getattr(self, name).items()}
        return found


def measure_heuristics(
    config: Heuristics,
    store: Store,
    *,
    seed: int,
    advance: Callable[..., Any] = lambda **_: None,
    stopped: Callable[[], bool] = lambda: False,
) -> HeuristicsResult | None:
    """Pre-trains one encoder, fine-tunes it by every seed, and measures the lines between all networks.

    Args:
      config: Settings.
      store: Keeps the encoder and each network as soon as it is trained; what it holds is not trained again.
      seed: Of sentences, starts and batches.
      advance: Called with ``note=...`` after every network.
      stopped: Whether the user asked to stop.

    Returns:
      What was measured; ``None`` where too few networks learnt their task.

    Raises:
      Stopped: The user asked to; finished networks are kept.
      UserError: The corpus has too few sentences of a kind.
    """
    sentences = heuristic_sentences(config, seed=seed)
    try:
        base, pretraining_loss = _encoder(config, sentences, store, seed=seed, stopped=stopped)
    except NonFiniteLossError:
        return None
    start = start_of_fine_tuning(config, base, seed=seed)
    models = {}
    for number in range(config.models):
        name = f"heuristics-{number}"
        if not store.has_arrays(name):
            if stopped():
                raise Stopped
            params = fine_tuned(config, sentences, start, seed=seed, number=number)
            store.save_arrays(name, **({} if params is None else leaves_by_name(params)))
        advance(note=f"heuristics, network {number}")
        leaves = store.load_arrays(name)
        if leaves:
            models[number] = _params(start, leaves)
    losses = split_losses(encoder_config(config, sentences.layout))
    accuracy = jax.jit(lambda params, batches: mean_over_batches(losses, params, batches)["train_accuracy"])
    learnt = {
        number: params
        for number, params in models.items()
        if float(accuracy(params, sentences.evaluation)) >= config.least_accuracy
    }
    if len(learnt) < FEWEST_MODELS:
        return None
    return _measured(config, sentences, learnt, pretraining_loss, seed=seed)


def _encoder(
    config: Heuristics, sentences: Sentences, store: Store, *, seed: int, stopped: Callable[[], bool]
) -> tuple[Params, float]:
    """The pre-trained encoder, from the store where it is there."""
    name = "heuristics-pretrained"
    if not store.has_arrays(name):
        params, loss = pretrained(config, sentences, seed=seed, stopped=stopped)
        if params is None:
            raise Stopped
        store.save_arrays(name, loss=loss, **leaves_by_name({"encoder": params["encoder"]}))
    leaves = store.load_arrays(name)
    encoder = encoder_config(config, sentences.layout)
    shapes = jax.eval_shape(lambda key: init_encoder(encoder, key=key), jax.random.key(0))
    return _params(shapes, leaves), float(leaves["loss"])


def _measured(
    config: Heuristics, sentences: Sentences, models: dict[int, Params], pretraining_loss: float, *, seed: int
) -> HeuristicsResult:
    encoder, m = encoder_config(config, sentences.layout), len(models)
    first = next(iter(models.values()))
    spec = encoder_spec(first, encoder)
    shuffle = random_permutation(first, spec, key=stream(jax.random.key(seed), "heuristics shuffle"))
    members = [*models.values(), apply_permutation(first, spec, shuffle)]
    name = f"{SPLITS[0]}_loss"
    matrix = pairwise_barriers(split_losses(encoder), members, sentences.evaluation, points=config.points, metric=name)
    lines = {name: np.asarray(values) for name, values in matrix.losses.items()}
    ends = {name: np.diagonal(values[:m, :m, 0]) for name, values in lines.items()}
    every, gaps = (
        {split: np.asarray(of(lines[f"{split}_loss"], t=matrix.t)) for split in SPLITS}
        for of in (loss_barrier, convexity_gap)
    )
    barriers, gaps = ({split: values[:m, :m] for split, values in of.items()} for of in (every, gaps))
    accuracies = {split: ends[f"{split}_accuracy"] for split in SPLITS}
    apart = np.abs(accuracies["challenge"][:, None] - accuracies["challenge"])
    measures = {f"{split}_{name}": of[split] for split in SPLITS for name, of in (("barrier", barriers), ("gap", gaps))}
    return HeuristicsResult(
        np.asarray(list(models)),
        {split: ends[f"{split}_loss"] for split in SPLITS},
        accuracies,
        barriers,
        gaps,
        cluster_barriers(barriers["train"], clusters=config.clusters),
        {name: mantel_test(apart, values, permutations=PERMUTATIONS) for name, values in measures.items()},
        {split: float(every[split][m, :m].mean()) for split in SPLITS},
        np.asarray([number for number in range(config.models) if number not in models], int),
        pretraining_loss,
    )


def _params(like: Params, leaves: dict[str, np.ndarray]) -> Params:
    return map_named_leaves(lambda name, _: jnp.asarray(leaves[name]), like)
