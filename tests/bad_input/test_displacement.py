"""What a user of scores, Gram matrices, directions and measures of displacement is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core.types import CausalTokens, ResponseBatch
from jaxft.tuning.ches import ches_score, ches_scores, ches_terms
from jaxft.tuning.directions import flow_direction, predicted_changes
from jaxft.tuning.displacement import displacement_kind, likelihood_displacement
from jaxft.tuning.gains import mass_flow, who_gains
from jaxft.tuning.preference_gram import batch_displacement_rate, displacement_rate, preference_gram
from jaxft.tuning.selection import filter_by_score, score_percentiles
from jaxft.tuning.similarity import edit_distance, last_hidden_similarity, length_difference
from jaxft.tuning.unembedding import unembedding_decomposition, unembedding_gram

H, MASK, IDS, TABLE = jnp.ones((2, 3, 4)), jnp.ones((2, 3), int), jnp.zeros((2, 2, 3), int), jnp.ones((5, 4))
STATES = jnp.ones((2, 2, 3, 4))
ROW = jnp.zeros((2, 1, 6), int)
BATCH = ResponseBatch(CausalTokens(ROW, ROW + 1, ROW), IDS, IDS, IDS + 1)
ONE = BATCH._replace(targets=IDS[:, :1])


def of_states(params, batch):
    return STATES


SCORES = {
    "other widths": (lambda: ches_score(H, MASK, H[..., :3], MASK), "the same n and d for both responses"),
    "mask of another shape": (lambda: ches_score(H, MASK[:, :2], H, MASK), "with masks"),
    "one response": (lambda: ches_scores(of_states, {}, ONE), "needs a chosen and a rejected response, got 1"),
    "unknown coefficients": (lambda: ches_scores(of_states, {}, BATCH, coefficients="exat"), "Did you mean exact"),  # pyright: ignore[reportArgumentType]
    "exact without a table": (lambda: ches_scores(of_states, {}, BATCH, coefficients="exact"), "go with a table"),
    "a stray table": (lambda: ches_scores(of_states, {}, BATCH, table=TABLE), "or leave both out"),
    "batches of 0": (lambda: ches_scores(of_states, {}, BATCH, batch_size=0), "batch_size must be at least 1, got 0"),
    "states of other tokens": (lambda: ches_scores(lambda p, b: STATES[:, :, :2], {}, BATCH), "must return states"),
    "scores of nan": (
        lambda: ches_scores(lambda p, b: STATES * jnp.nan, {}, BATCH),
        r"the first at \[0\]. Look at that",
    ),
    "no examples": (lambda: ches_scores(of_states, {}, jax.tree.map(lambda x: x[:0], BATCH)), "must be an example"),
    "table of another width": (lambda: unembedding_gram(STATES, IDS, IDS, TABLE[:, :3]), r"the table \[v, d\]"),
    "token outside the vocabulary": (
        lambda: unembedding_gram(STATES, IDS + 5, IDS, TABLE),
        r"targets must lie in 0..4, got 5..5. Use the tokenizer of the checkpoint",
    ),
    "chunk of 0": (lambda: unembedding_gram(STATES, IDS, IDS, TABLE, chunk=0), "chunk must be at least 1"),
    "terms of one response": (lambda: ches_terms(STATES[:, :1], IDS[:, :1], IDS[:, :1], TABLE), "two responses"),
    "id outside the table": (
        lambda: unembedding_decomposition(TABLE, np.array([5]), np.array([0])),
        "chosen must lie in 0..4, got 5..5",
    ),
    "no pairs": (lambda: unembedding_decomposition(TABLE, np.array([1, 2]), np.array([0])), "must come in pairs"),
    "tokens without masks": (lambda: edit_distance(MASK, MASK[:, :2], MASK, MASK), "tokens and masks must be"),
    "last hidden of one": (lambda: last_hidden_similarity(STATES[:, :1], IDS[:, :1]), "with two responses"),
    "length of one": (lambda: length_difference(IDS[:, :1]), "needs two responses"),
}

X, W = jnp.ones((3, 2)), jnp.ones((2, 2))
SLOPES = jnp.ones((3, 2))


def f(w, x):
    return x @ w


TX = optax.adam(0.1)

RATES = {
    "one log-probability an example": (
        lambda: preference_gram(lambda w, x: x @ w[:, 0], W, X),
        r"must return \[n, r\]",
    ),
    "infinite log-probability": (lambda: preference_gram(lambda w, x: jnp.log(0 * x @ w), W, X), "the first at .0."),
    "gram of nan": (lambda: preference_gram(lambda p, x: x @ p["w"], {"w": W * jnp.nan}, X), "preference_gram: params"),
    "preconditioner of another tree": (lambda: preference_gram(f, W, X, preconditioner=W[:1]), "tree and shapes"),
    "three slopes": (lambda: displacement_rate(jnp.ones((3, 2, 2)), jnp.ones((3, 3))), "s <= r"),
    "slopes of others": (lambda: displacement_rate(jnp.ones((3, 2, 2)), jnp.ones((2, 2))), "s <= r"),
    "gram as a kernel": (lambda: batch_displacement_rate(jnp.ones((3, 2, 2)), SLOPES), "needs a kernel"),
    "slopes as a vector": (lambda: flow_direction(f, W, X, SLOPES[:, 0]), r"slopes must be \[3, s\]"),
    "more slopes than outputs": (lambda: flow_direction(f, W[:, :1], X, SLOPES), "for each of 2 slopes"),
    "unknown rule": (lambda: flow_direction(f, W, X, SLOPES, rule="sign"), "unknown rule, got 'sign'"),  # pyright: ignore[reportArgumentType]
    "rule without its preconditioner": (lambda: flow_direction(f, W, X, SLOPES, rule="preconditioned"), "goes with"),
    "rule and transform": (
        lambda: flow_direction(f, W, X, SLOPES, rule="signgd", transform=TX, opt_state=TX.init(W)),
        "a transform goes without a rule",
    ),
    "transform without a state": (lambda: flow_direction(f, W, X, SLOPES, transform=TX), "goes with its state"),
    "update of another tree": (lambda: predicted_changes(f, W, X, {"w": W}), "tree and shapes of params"),
    "batches of none": (lambda: predicted_changes(f, W, X, W, batch_size=0), "batch_size must be at least 1"),
    "unknown ranking": (lambda: who_gains(f, f, W, X, SLOPES, by="mas"), "Did you mean mass"),  # pyright: ignore[reportArgumentType]
    "none at the top": (lambda: who_gains(f, f, W, X, SLOPES, top=0), "top must be at least 1"),
    "logits of one token": (lambda: who_gains(lambda w, x: x @ w[:, 0], f, W, X, SLOPES), r"must return \[n, v\]"),
    "flow between vocabularies": (lambda: mass_flow(X, X[:, :1]), "before and after"),
}

LOGS = np.log([[0.5, 0.5]])
ZERO = np.array([0])

MEASURES = {
    "other examples": (lambda: likelihood_displacement(np.ones(2), np.ones(3)), "Measure the same examples"),
    "one loss": (lambda: likelihood_displacement(np.ones(2), np.ones(2), loss_after=0.1), "before and after"),
    "mean and single losses": (
        lambda: likelihood_displacement(np.ones(2), np.ones(2), loss_before=0.1, loss_after=np.ones(2)),
        "a mean, or one an example",
    ),
    "probability 0": (lambda: likelihood_displacement(np.ones(2), -np.inf * np.ones(2)), "must be finite"),
    "logits": (lambda: displacement_kind(LOGS + 1, LOGS, ZERO, {"a": [1]}), "sum to 1, got 2.72 in row 0"),
    "no sets": (lambda: displacement_kind(LOGS, LOGS, ZERO, {}), "needs sets of tokens, got no sets"),
    "an empty set": (lambda: displacement_kind(LOGS, LOGS, ZERO, {"a": []}), "got none in a"),
    "a verdict as a set": (lambda: displacement_kind(LOGS, LOGS, ZERO, {"other": [1]}), "verdicts of their own"),
    "overlap": (lambda: displacement_kind(LOGS, LOGS, ZERO, {"a": [1], "b": [0, 1]}), r"ids \[1\] in two"),
    "id beyond": (lambda: displacement_kind(LOGS, LOGS, ZERO, {"a": [2]}), "token_sets must lie in 0..1, got 2..2"),
    "no cut": (lambda: filter_by_score(np.ones(3)), "exactly one of keep_fraction, keep and threshold, got none"),
    "two cuts": (lambda: filter_by_score(np.ones(3), keep=1, threshold=0.0), "got keep and threshold"),
    "percent": (lambda: filter_by_score(np.ones(3), keep_fraction=5.0), r"must lie in \(0, 1\], got 5.0"),
    "too many": (lambda: filter_by_score(np.ones(3), keep=4), "keep must lie in 1..3, got 4"),
    "nan scores": (lambda: filter_by_score(np.array([1.0, np.nan]), keep=1), r"1 that are not, the first at \[1\]"),
    "subsets too large": (lambda: score_percentiles(np.ones(3), [50], 4), "size must lie in 1..3"),
    "fractions beyond": (lambda: score_percentiles(np.ones(3), [0, 101], 1), r"in \[0, 100\], got \[0, 101\]"),
}

CASES = {**SCORES, **RATES, **MEASURES}


@pytest.mark.parametrize("case", CASES)
def test_the_message_says_what_is_wrong_and_what_to_do(case):
    call, text = CASES[case]
    with pytest.raises(ValueError, match=text):
        call()
