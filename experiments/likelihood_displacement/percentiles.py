"""Part percentiles: pairs are scored, and subsets around percentiles of every score are tuned on, each by itself."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments.likelihood_displacement.config import LikelihoodDisplacementConfig, Percentiles, Score
from experiments.likelihood_displacement.prepare import Loaded, Pairs, pair_pools
from experiments.likelihood_displacement.tuners import Phase, Tuned, make_trainer, method_of, run_phase
from jaxft.core.rng import host_stream
from jaxft.core.statistics import rank_correlation
from jaxft.data.batching import batch_indices
from jaxft.lab.resumable import Resumable
from jaxft.tuning.ches import ches_scores
from jaxft.tuning.displacement import likelihood_displacement
from jaxft.tuning.objectives import PreferenceLabels, loss_slopes, preference_loss
from jaxft.tuning.preference_gram import displacement_rate, preference_gram
from jaxft.tuning.reference import reference_log_probs
from jaxft.tuning.selection import score_percentiles
from jaxft.tuning.similarity import edit_distance, last_hidden_similarity, length_difference

SCORE_NAMES: dict[str, str] = {
    "ches": "CHES",
    "ches_normalized": "CHES per token",
    "exact": "CHES, exact coefficients",
    "rate": "minus the rate by the Gram matrix",
    "edit": "minus the edit distance",
    "last_hidden": "last hidden states",
    "length": "rejected minus chosen length",
    "random": "random numbers",
}
"""All of them signed so that a high score is to foretell a fall of the preferred response."""


RANDOM = "random"
"""The control: numbers drawn at random, around whose percentiles pairs are tuned on likewise."""


class Plan(NamedTuple):
    """One run of this part."""

    phase: Phase
    seed: int
    score: str
    percentile: float


def percentile_plans(part: Percentiles, base: int) -> list[Plan]:
    """All runs of this part, in order."""
    scores = [*part.scores, RANDOM]
    kinds = [(seed, score, p) for seed in part.seeds for score in scores for p in part.percentiles]
    plans = []
    for number, kind in enumerate(kinds):
        key = {"part": "percentiles", **dict(zip(("seed", "score", "percentile"), kind, strict=True))}
        plans.append(Plan(Phase(base + number * (part.steps + 1), part.steps, key), *kind))
    return plans


def run_percentiles(
    config: LikelihoodDisplacementConfig, context: Resumable, loaded: Loaded, tuned: Tuned, plans: list[Plan]
) -> Iterator[tuple[Plan, bool]]:
    """Runs what an earlier start has not done; each run with whether it came to an end."""
    pools = functools.cache(lambda: pair_pools(config, loaded))
    of_seed = functools.cache(lambda seed: _Pool(config, context, tuned, pools()[seed], seed))
    for plan in plans:
        key = plan.phase.key
        if not (context.recorded("result", key) or context.recorded("diverged", key)):
            pool = of_seed(plan.seed)
            _scores(config, context, pool, plan)
            _run(config, context, tuned, pool, plan)
        yield plan, context.recorded("result", key)


class _Pool:
    """The pairs of a seed, with what is known of them before any tuning."""

    def __init__(self, config: LikelihoodDisplacementConfig, context: Resumable, tuned: Tuned, pairs: Pairs, seed: int):
        self.pairs = pairs
        self.f = tuned.outputs(tuned.model.log_probs)
        size = config.evaluation_batch
        self.reference = reference_log_probs(self.f, tuned.start, pairs.batch, batch_size=size, mesh=context.mesh)
        self.scores: dict[str, np.ndarray] = {
            **pair_scores(config, tuned, pairs, np.asarray(self.reference)),
            RANDOM: host_stream(seed, "random score").random(len(pairs.lengths)),
        }


def pair_scores(
    config: LikelihoodDisplacementConfig, tuned: Tuned, pairs: Pairs, reference: Float[np.ndarray, "n 2"]
) -> dict[Score, Float[np.ndarray, "n"]]:
    """The scores asked for, of all pairs.

    Args:
      config: The configuration.
      tuned: The decoder.
      pairs: The pairs.
      reference: Log-probabilities of their responses.

    Returns:
      Score by name.
    """
    model, size = tuned.model, config.evaluation_batch
    whole, batch = tuned.whole(tuned.start), pairs.batch
    table = model.table(whole)
    sides = (batch.targets[:, 0], batch.mask[:, 0], batch.targets[:, 1], batch.mask[:, 1])

    def ches(**options: Any) -> Any:
        return ches_scores(model.states, whole, batch, batch_size=size, **options)

    def rate() -> Any:
        gram = preference_gram(tuned.outputs(model.log_probs), tuned.start, batch)
        training = config.training
        slopes = loss_slopes(training.loss, reference, reference, pairs.lengths, beta=training.beta)
        return -displacement_rate(gram, slopes)[:, 0]

    def last_hidden() -> Any:
        parts = range(0, len(pairs.lengths), size)
        blocks = [pairs.rows(range(i, min(i + size, len(pairs.lengths)))).batch for i in parts]
        return jnp.concatenate([last_hidden_similarity(model.states(whole, b), b.mask) for b in blocks])

    by_name: dict[Score, Callable[[], Any]] = {
        "ches": ches,
        "ches_normalized": lambda: ches(length_normalize=True),
        "exact": lambda: ches(coefficients="exact", table=table),
        "rate": rate,
        "edit": lambda: -edit_distance(*sides),
        "last_hidden": last_hidden,
        "length": lambda: length_difference(batch.mask),
    }
    return {name: np.asarray(by_name[name](), np.float64) for name in config.percentiles.scores}


def _scores(config: LikelihoodDisplacementConfig, context: Resumable, pool: _Pool, plan: Plan) -> None:
    """Records how each score goes with length, and with the rate of the Gram matrix where that is asked for."""
    key = {"part": "percentiles", "seed": plan.seed}
    if context.recorded("score", key):
        return
    context.run.save_arrays(
        f"scores-{plan.seed}",
        lines=np.array(pool.pairs.encoded.lines),
        lengths=pool.pairs.lengths,
        **pool.scores,
    )
    longer = pool.pairs.lengths[:, 1] - pool.pairs.lengths[:, 0]
    notes = pool.pairs.encoded.notes
    for name, values in pool.scores.items():
        fields = {"with_length": rank_correlation(values, longer).estimate}
        if "rate" in pool.scores and name != "rate":
            fields["with_rate"] = rank_correlation(values, pool.scores["rate"]).estimate
        equal = float(notes.first_tokens_equal.mean())
        pairs = len(pool.pairs.lengths)
        context.record(
            plan.phase.base, "score", **key, score=name, **fields, pairs=pairs, first_tokens_equal_frac=equal
        )


def _run(config: LikelihoodDisplacementConfig, context: Resumable, tuned: Tuned, pool: _Pool, plan: Plan) -> None:
    part, training = config.percentiles, config.training
    at = part.percentiles.index(plan.percentile)
    rows = score_percentiles(pool.scores[plan.score], part.percentiles, min(part.size, len(pool.pairs.lengths)))[at]
    chosen = pool.pairs.rows(rows)
    reference = jnp.asarray(pool.reference)[rows]
    labels = PreferenceLabels(reference, jnp.asarray(chosen.lengths))
    trainer = make_trainer(tuned, method_of(training, part.optimizer, part.learning_rate), context.mesh)
    index = batch_indices(len(rows), training.batch_size, seed=plan.seed, name="percentiles", stop=part.steps)
    trained = run_phase(context, plan.phase, trainer, tuned.start, chosen.batch, labels, index)
    if trained is None:
        return
    size = config.evaluation_batch
    after = reference_log_probs(pool.f, trained, chosen.batch, batch_size=size, mesh=context.mesh)
    losses = [
        preference_loss(training.loss, x, reference, labels.lengths, beta=training.beta) for x in (reference, after)
    ]
    before, after = np.asarray(reference), np.asarray(after)
    found = likelihood_displacement(
        before[:, 0], after[:, 0], loss_before=np.asarray(losses[0]), loss_after=np.asarray(losses[1])
    )
    fields = {"change": found.mean_nats, "change_stderr": found.stderr, "fell_frac": found.fell_frac}
    fields |= {"displaced_frac": found.displaced_frac, "loss": float(losses[1].mean())}
    fields |= {"change_rejected": float((after[:, 1] - before[:, 1]).mean())}
    fields |= {"mean_score": float(pool.scores[plan.score][rows].mean())}
    fields |= {
        "chosen_tokens": float(chosen.lengths[:, 0].mean()),
        "rejected_tokens": float(chosen.lengths[:, 1].mean()),
    }
    context.record(plan.phase.end, "result", **plan.phase.key, **fields)
