"""The claims of likelihood_displacement: each holds, its control is violated, and faults of the library show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.tuning.ches import ches_scores, ches_terms
from jaxft.tuning.gains import who_gains
from jaxft.tuning.objectives import loss_slopes, preference_loss
from jaxft.tuning.preference_gram import batch_displacement_rate, displacement_rate, preference_gram
from theory.claims import check_claim, judge
from theory.likelihood_displacement import (
    CLAIMS,
    closed_form,
    constructed_pair,
    decoders,
    flows,
    gram,
    language,
    phases,
    propositions,
    proxies,
    rate_chosen,
    rate_single_token,
    theorems,
    ufm,
)

BY_NAME = {claim.id.removeprefix("likelihood_displacement/"): claim for claim in CLAIMS}
TRAINED = tuple(claim.id.removeprefix("likelihood_displacement/") for claim in proxies.CLAIMS)
EXACT = tuple(name for name in BY_NAME if name not in TRAINED)


@pytest.fixture
def claim_modules():
    return (ufm, theorems, propositions, flows, phases, gram, decoders)


@pytest.mark.parametrize("name", EXACT)
def test_claim_holds_and_its_control_is_violated(name):
    assert check_claim(BY_NAME[name]).status == "holds"
    assert check_claim(BY_NAME[name], control=True).status == "violated"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_claim_on_a_trained_decoder_holds_and_its_control_is_violated(name):
    assert check_claim(BY_NAME[name]).status == "holds"
    assert check_claim(BY_NAME[name], control=True).status == "violated"


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_claim_holds_at_other_seeds(name):
    assert check_claim(BY_NAME[name], first_seed=100).status == "holds"


BROKEN = {
    "theorem 4, pairs of other instances": ("single-token", {"swapped": True}),
    "theorem 5, pairs of other instances": ("other-token", {"swapped": True}),
    "theorem 6, the wrong sign of S": ("sequences", {"sign": -1.0}),
    "theorem 6, responses with one first token": ("sequences", {"same_first": True}),
    "theorem 7, states one token late": ("other-sequences", {"shifted": True}),
    "theorem 7, as printed": ("other-sequences", {"as_printed": True}),
    "theorem 8, pairs of other instances": ("across-examples", {"swapped": True}),
    "theorem 8, the loss for its slope": ("across-examples", {"as_printed": True}),
    "theorem 9, the wrong sign of alpha": ("other-token-across-examples", {"sign": -1.0}),
    "theorem 9, pairs of other instances": ("other-token-across-examples", {"swapped": True}),
    "Adam's Gram matrices of other pairs": ("gram-rates-adam", {"wrong": "pairs"}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_claim_is_violated_where_an_assumption_is_broken(what):
    name, options = BROKEN[what]
    claim = BY_NAME[name]
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        assert judge(claim, [claim.check(0, **options)]).status == "violated"


def _negated(function):
    return lambda *args, **options: jax.tree.map(jnp.negative, function(*args, **options))


def _one_slope_only(name, *args, **options):
    return loss_slopes(name, *args, **options) * jnp.array([[1.0, 0.0]])


def _mean_of_lengths(name, log_probs, reference, lengths, **options):
    """A loss that takes means of log-probabilities where it should take sums."""
    return preference_loss(name, log_probs / lengths.astype(log_probs.dtype), reference, lengths, **options)


def _without_states(states, targets, mask, table):
    terms = ches_terms(states, targets, mask, table)
    return terms._replace(states=0 * terms.states)


def _coefficients_of_one(states_fn, params, batch, **options):
    options = {name: x for name, x in options.items() if name not in ("coefficients", "table", "chunk")}
    return ches_scores(states_fn, params, batch, **options)


def _transposed(kernel, slopes):
    return batch_displacement_rate(jnp.transpose(kernel, (2, 1, 0, 3)), slopes)


def _sum_of_losses(kernel, slopes):
    return len(slopes) * batch_displacement_rate(kernel, slopes)


def _unscaled(f, params, batch, *, preconditioner):
    return preference_gram(f, params, batch, preconditioner=jax.tree.map(jnp.ones_like, preconditioner))


def _gains_by_rejected(logits, log_probs, params, batch, slopes, **options):
    return who_gains(logits, log_probs, params, batch, slopes[:, ::-1], **options)


FAULTS = {
    "slopes of the other sign": ("loss_slopes", _negated(loss_slopes), ("single-token", "sequences", "gram-rates")),
    "slopes of the chosen response alone": ("loss_slopes", _one_slope_only, ("gram-rates", "batch-rates")),
    "losses of means": ("preference_loss", _mean_of_lengths, ("sequences", "gram-rates")),
    "terms without hidden states": ("ches_terms", _without_states, ("terms-of-pairs",)),
    "exact coefficients that are 1": ("ches_scores", _coefficients_of_one, ("exact-coefficients",)),
    "rates of the other sign": ("displacement_rate", _negated(displacement_rate), ("gram-rates",)),
    "Gram matrices without the preconditioner": ("preference_gram", _unscaled, ("gram-rates-adam",)),
    "kernels read by the wrong examples": ("batch_displacement_rate", _transposed, ("batch-rates",)),
    "sums of losses in the place of means": ("batch_displacement_rate", _sum_of_losses, ("batch-rates",)),
    "gains under the exchanged pair": ("who_gains", _gains_by_rejected, ("tokens-that-gain",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_claims_are_violated_by_a_fault_of_the_library(patched, fault):
    function, replacement, claims = FAULTS[fault]
    patched(function, replacement)
    for name in claims:
        assert check_claim(BY_NAME[name]).status == "violated", name


def test_closed_form_of_a_path_solves_its_equations(x64):
    """By differences of the path itself: D' = 2 h and h' = D, or one of them with the other at rest."""
    pair, step = constructed_pair(6.0), 1e-5
    for trained, moves in flows.MOVES.items():
        before, here, after = closed_form(pair, np.array([0.7 - step, 0.7, 0.7 + step]), trained=trained)
        velocity = [(b - a) / (2 * step) for a, b in zip(before, after, strict=True)]
        np.testing.assert_allclose(velocity[1], moves[0] * here.difference, atol=1e-7)
        np.testing.assert_allclose(velocity[0][0] - velocity[0][1], 2 * moves[1] * here.hidden, atol=1e-7)
        np.testing.assert_allclose(velocity[0][2], 0, atol=1e-9)


def test_constructed_pair_is_as_stated():
    pair = constructed_pair(6.0)
    np.testing.assert_allclose(np.exp(pair.log_probs()), [0.488, 0.488, 0.024], atol=5e-4)
    assert (pair.table[2] - pair.table[0]) @ pair.difference == 18
    assert pair.hidden @ pair.hidden == 1


def test_rate_of_a_single_token_is_that_of_a_sequence_of_one(x64):
    case = ufm.drawn_instance(3, length=1)
    table, hidden = (jnp.asarray(case.params[name]) for name in ("unembedding", "hidden"))
    tokens, slope = jnp.asarray(case.batch.targets[0, :2, 0]), jnp.asarray(-0.3)
    single = rate_single_token(table, hidden[0], tokens[0], tokens[1], slope)
    states, mask = jnp.broadcast_to(hidden[:1][None], (2, 1, ufm.WIDTH)), jnp.ones((2, 1), jnp.int32)
    np.testing.assert_allclose(rate_chosen(table, states, tokens[:, None], mask, slope), single, rtol=1e-12)


def test_chosen_response_may_fall_with_fixed_states_if_it_has_several_tokens(x64):
    """A case in 96: what theorem 4 excludes is of one token."""
    cases = [gram.fixed_states_rate(seed, several=True).setting["least"] for seed in range(16, 32)]
    assert min(cases) < 0 < np.median(cases)


@pytest.mark.slow
def test_decoder_learns_the_chain():
    trained = language.trained_decoder(0)
    assert trained.entropy < trained.loss + 0.1
    assert trained.loss < trained.entropy + 0.15 < np.log(language.WORDS) - 1


def test_pairs_differ_in_their_first_word_and_have_the_lengths_asked_for():
    for equal in (False, True):
        batch = language.drawn_pairs(0, equal=equal)
        assert (batch.targets[:, 0, 0] != batch.targets[:, 1, 0]).all()
        lengths = batch.mask.sum(axis=-1)
        assert set(np.unique(lengths)) == ({5} if equal else set(range(2, 9)))


def test_names_of_claims_differ():
    assert len(BY_NAME) == len(CLAIMS)
