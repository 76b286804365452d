"""Claims on CHES as a proxy: how well it, its exact term and plain lengths rank pairs by how fast ln pi(y+) moves.

A rate here is that of gradient flow over minus the slope of the loss, <g+, g+ - g->, the same for every margin loss.
All correlations are Spearman's with minus the rate: a score foretells displacement where its correlation is positive.
That of plain lengths stands beside every other in the setting, as do the shares of inner products and of coefficients
that are positive. CHES rests on most being so; on a decoder as small as this one hardly more than half are, and next to
no pair is displaced at all: what holds of CHES here need not hold of a large one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jaxft.core.rng import host_stream
from jaxft.core.types import Params, ResponseBatch
from jaxft.tuning.ches import ches_score, ches_terms
from jaxft.tuning.preference_gram import preference_gram
from jaxft.tuning.similarity import edit_distance, last_hidden_similarity
from theory.claims import Evidence
from theory.likelihood_displacement import language
from theory.likelihood_displacement.ufm import STANDARD, compiled, drawn_instance, make_claim, response_states

LEAST, LITTLE = 0.2, 0.4
"""A rank correlation that is something, and one that is not much."""
SEEDS = 4
FEATURE_PAIRS = 192


class Pairs(NamedTuple):
    """Pairs with their scores, and what the scores are to foretell."""

    falls: np.ndarray
    """Minus the rates."""
    scores: dict[str, np.ndarray]
    """High where a fall is foretold."""
    setting: dict[str, Any]

    def correlation(self, score: str, order: np.ndarray | None = None) -> float:
        """With minus the rates, those of other pairs if an order is given."""
        falls = self.falls if order is None else self.falls[order]
        return float(np.asarray(scipy.stats.spearmanr(self.scores[score], falls))[0])


@functools.cache
def decoder_pairs(seed: int, *, equal: bool = False) -> Pairs:
    """Pairs of a trained decoder, of random lengths or all of one; rates are those of all its parameters."""
    trained = language.trained_decoder(seed)
    with jax.enable_x64(False), STANDARD():
        batch = jax.tree.map(jnp.asarray, language.drawn_pairs(seed, equal=equal))
        states, table = _states(trained.params, batch), trained.params["unembedding"]["table"]
        gram = np.asarray(preference_gram(language.log_probs, trained.params, batch), float)
        scored = _scored(states, batch, table)
    model = f"decoder of {language.MODEL.layers} layer and width {language.MODEL.width}"
    setting = {"model": model, "loss": trained.loss, "entropy": trained.entropy, "precision": "float32, matmul highest"}
    return _collected(scored, gram[:, 0, 0] - gram[:, 0, 1], gram[:, 0, 0], setting)


@compiled
def _states(params: Params, batch: ResponseBatch) -> jax.Array:
    return language.states(params, batch)


@functools.cache
def feature_pairs(seed: int) -> Pairs:
    """Pairs of the unconstrained-features model, all features independent; rates are those of theorem 6."""
    case = drawn_instance(seed, examples=FEATURE_PAIRS)
    with STANDARD():
        params, batch = jax.tree.map(jnp.asarray, (case.params, case.batch))
        scored = _scored(response_states(params, batch), batch, params["unembedding"])
    rates = -np.asarray(scored["theorem 6"])
    return _collected(scored, rates, np.full(len(rates), np.nan), {"model": "unconstrained features"})


@compiled
def _scored(states: jax.Array, batch: ResponseBatch, table: jax.Array) -> dict[str, jax.Array]:
    """All scores of pairs, and the signs on which the step from theorem 6 to CHES rests."""
    (up, down), (up_mask, down_mask) = (jnp.moveaxis(x[:, :2], 1, 0) for x in (states, batch.mask))
    terms = ches_terms(states, batch.targets, batch.mask, table)
    plus, minus = (mask.sum(axis=1).astype(states.dtype) for mask in (up_mask, down_mask))
    chosen, rejected = batch.targets[:, 0], batch.targets[:, 1]
    errors = [
        jax.nn.one_hot(ids, len(table), dtype=table.dtype) - jax.nn.softmax(h @ table.T, axis=-1)
        for ids, h in ((chosen, up), (rejected, down))
    ]
    both = up_mask[:, :, None] * down_mask[:, None] > 0
    alpha, inner = (jnp.einsum("nkv,njv->nkj", *sides) for sides in (errors, (up, down)))
    return {
        "CHES": ches_score(up, up_mask, down, down_mask),
        "length-normalised CHES": ches_score(up, up_mask, down, down_mask, length_normalize=True),
        "exact term": -terms.states,
        "theorem 6": -terms.rate,
        "|y-| - |y+|": minus - plus,
        "-|y+|": -plus,
        "-edit distance": -edit_distance(chosen, up_mask, rejected, down_mask),
        "last hidden states": last_hidden_similarity(states[:, :2], batch.mask[:, :2]),
        "inner products > 0": jnp.mean(inner > 0, where=both),
        "coefficients > 0": jnp.mean(alpha > 0, where=both),
    }


def _collected(scored: dict[str, jax.Array], rates: np.ndarray, norms: np.ndarray, setting: dict[str, Any]) -> Pairs:
    found = {name: np.asarray(x, float) for name, x in scored.items()}
    scores = {name: x for name, x in found.items() if x.ndim and np.ptp(x) > 0}
    pairs = Pairs(-rates, scores, setting)
    correlations = {name: round(pairs.correlation(name), 3) for name in scores}
    by_norm = {
        name: round(float(np.asarray(scipy.stats.spearmanr(x, -rates / norms))[0]), 3) for name, x in scores.items()
    }
    setting |= {name: float(x) for name, x in found.items() if not x.ndim}
    setting |= {"pairs": len(rates), "displaced": float((rates < 0).mean()), "correlations": correlations}
    return pairs._replace(setting=setting | ({} if np.isnan(norms).any() else {"of rates over |g+|^2": by_norm}))


def pairs_of(seed: int, model: str) -> Pairs:
    """Pairs of the decoder, of lengths at random or all of one, or of the unconstrained-features model."""
    if model == "features":
        return feature_pairs(seed)
    return decoder_pairs(seed, equal=model == "decoder at one length")


def exceeds(seed: int, *, score: str, model: str = "decoder", least: float = LEAST, shuffled: bool = False) -> Evidence:
    """The rank correlation of a score beside a number; the control takes the score of other pairs."""
    pairs = pairs_of(seed, model)
    order = host_stream(seed, "other pairs").permutation(len(pairs.falls)) if shuffled else None
    return Evidence(least, pairs.correlation(score, order), setting={"pairs of": model, **pairs.setting})


def falls_short(seed: int, *, score: str, model: str, most: float) -> Evidence:
    """A number beside the rank correlation of a score."""
    pairs = pairs_of(seed, model)
    return Evidence(pairs.correlation(score), most, setting={"pairs of": model, **pairs.setting})


def beats(seed: int, *, score: str, other: str = "CHES", model: str = "decoder", shuffled: bool = False) -> Evidence:
    """The rank correlation of a score beside another's; the control takes that score of other pairs."""
    pairs = pairs_of(seed, model)
    order = host_stream(seed, "other pairs").permutation(len(pairs.falls)) if shuffled else None
    setting = {"pairs of": model, **pairs.setting}
    return Evidence(pairs.correlation(other), pairs.correlation(score, order), setting=setting)


def _claim(name: str, statement: str, check: Any, options: dict[str, Any], control: dict[str, Any], breaks: str):
    given = functools.partial(check, **options)
    return make_claim(name, statement, "cf. section 5", "ordering", given, control, breaks, seeds=SEEDS)


OTHER_PAIRS = {"shuffled": True}, "the score is that of other pairs"
ONE_LENGTH = "decoder at one length"

CLAIMS = (
    _claim(
        "exact-term-ranks",
        "On a small decoder the term through the unembedding, with exact coefficients, ranks pairs of one length by "
        f"how fast ln pi(y+) falls: its rank correlation exceeds {LEAST}.",
        exceeds,
        {"score": "exact term", "model": ONE_LENGTH},
        *OTHER_PAIRS,
    ),
    _claim(
        "ches-ranks",
        f"So does CHES pairs of lengths at random: its rank correlation exceeds {LEAST}.",
        exceeds,
        {"score": "CHES"},
        *OTHER_PAIRS,
    ),
    _claim(
        "length-beats-ches",
        "The length of the chosen response alone ranks them better than CHES.",
        beats,
        {"score": "-|y+|"},
        *OTHER_PAIRS,
    ),
    _claim(
        "ches-at-one-length",
        f"Of pairs of one length the rank correlation of CHES falls short of {LITTLE}.",
        falls_short,
        {"score": "CHES", "model": ONE_LENGTH, "most": LITTLE},
        {"model": "decoder"},
        "lengths are drawn at random",
    ),
    _claim(
        "exact-beats-ches",
        "Exact coefficients rank pairs of lengths at random better than coefficients of 1, which is CHES.",
        beats,
        {"score": "exact term"},
        *OTHER_PAIRS,
    ),
    _claim(
        "normalised-ches-misranks",
        "Length-normalised CHES ranks pairs of lengths at random the wrong way round.",
        falls_short,
        {"score": "length-normalised CHES", "model": "decoder", "most": 0.0},
        {"score": "CHES"},
        "hidden states are summed rather than averaged",
    ),
    _claim(
        "free-features-ches-ranks",
        f"With free, independent features the rank correlation of CHES exceeds {LEAST}.",
        exceeds,
        {"score": "CHES", "model": "features"},
        *OTHER_PAIRS,
    ),
    _claim(
        "free-features-length-beats-ches",
        "There, too, the length of the chosen response alone ranks pairs better.",
        beats,
        {"score": "-|y+|", "model": "features"},
        *OTHER_PAIRS,
    ),
)
