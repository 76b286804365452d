import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core.checks import UserError
from jaxft.train import init_state, make_segment
from jaxft.tuning.objectives import (
    PreferenceLabels,
    loss_slopes,
    loss_weights,
    make_preference_objective,
    preference_loss,
)
from jaxft.tuning.reference import reference_log_probs

X = jnp.array([[-1.0, -2.0], [-3.0, -1.0]])
LENGTHS = jnp.array([[1, 2], [3, 1]])
FUNCTIONS = (preference_loss, loss_slopes, loss_weights)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sigmiod", {}, r"name must be a loss, got 'sigmiod'\. Did you mean sigmoid\?"),
        ("zzz", {}, r"name must be a loss, got 'zzz'\. Known: apo_down, .*, orpo, "),
        ("ipo", {"label_smoothing": 0.1}, r"options must be those of ipo, got label_smoothing\. It has none\."),
        ("simpo", {"gama": 0.1}, r"options must be those of simpo, got gama\. It has gamma, label_smoothing\."),
        ("sigmoid", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        ("exo_pair", {"label_smoothing": 0.0}, r"label_smoothing must be in \(0, 0\.5\), got 0\.0"),
        ("discopop", {"tau": 2.0}, r"tau must be in \(0, 1\], got 2\.0"),
        ("rebel", {"eta": 0.0}, r"eta must be > 0, got 0\.0"),
        ("rebel", {"rewards": (1.0, 2.0, 3.0)}, r"rewards must have a shape of \(2,\) or \(2, 2\), got \(3,\)"),
        ("gpo", {"f": "exponentail"}, r"f must be a function of gpo, got 'exponentail'\. Did you mean exponential\?"),
        ("kto", {}, r"kto must be given kl, got none\. Pass kl=\.\.\."),
        ("kto", {"kl": jnp.ones(3)}, r"kl must have a shape of \(\) or \(2,\), got \(3,\)"),
        ("kto", {"kl": jnp.array([0.0, -1.0])}, "kl must be >= 0"),
        ("ipo", {"beta": 0.0}, r"beta must be > 0, got 0\.0"),
        ("ipo", {"beta": float("nan")}, "beta must be > 0, got nan"),
    ],
)
def test_names_and_options_are_explained(name, options, said):
    for function in (preference_loss, loss_slopes):
        with pytest.raises(UserError, match=f"^{function.__name__}: {said}"):
            function(name, X, X, LENGTHS, **options)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ((X[0], X, LENGTHS), r"log_probs must be floats \[n, 2\], got float32 \(2,\)"),
        ((LENGTHS, X, LENGTHS), r"log_probs must be floats \[n, 2\], got int32 \(2, 2\)"),
        ((X, X[:1], LENGTHS), r"reference must have the shape of log_probs, \(2, 2\), got \(1, 2\)"),
        ((X, None, LENGTHS), r"ipo_mean must be given reference, got none\. Compute it once by reference_log_probs"),
        ((X, X, None), r"ipo_mean must be given lengths, got none"),
        ((X, X, LENGTHS[0]), r"lengths must have the shape of log_probs"),
        ((X, X, LENGTHS - 1), r"lengths must be >= 1"),
        ((X.at[1, 0].set(jnp.nan), X, LENGTHS), "log_probs must be finite, got NaN or infinity at examples 1"),
        ((X, X.at[0, 1].set(-jnp.inf), LENGTHS), "reference must be finite, got NaN or infinity at examples 0"),
    ],
)
def test_arrays_that_do_not_fit_are_named(function, arrays, said):
    with pytest.raises(UserError, match=f"^{function.__name__}: {said}"):
        function("ipo_mean", *arrays)


def test_a_bad_reference_is_seen_while_the_rest_is_traced():
    reference = jnp.full((2, 2), jnp.nan)
    with pytest.raises(UserError, match="reference must be finite, got NaN or infinity at examples 0, 1"):
        jax.jit(lambda x: preference_loss("dpo", x, reference))(X)


def test_losses_without_a_reference_need_none():
    for name in ("slic", "sft", "cpo"):
        assert np.isfinite(preference_loss(name, X)).all()
    with pytest.raises(UserError, match="orpo must be given lengths"):
        preference_loss("orpo", X)


def test_weights_of_a_loss_that_has_none_are_refused():
    with pytest.raises(
        UserError, match=r"name must be a loss that has weights, got 'kto'\. These have: sigmoid, ipo, "
    ):
        loss_weights("kto", X, X, kl=0.0)


def test_objective_checks_its_options_when_it_is_built():
    with pytest.raises(UserError, match=r"make_preference_objective: name must be a loss, got 'dpoo'\. Did you mean"):
        make_preference_objective("dpoo")
    with pytest.raises(UserError, match="sft_weight must be >= 0, got -1"):
        make_preference_objective("dpo", sft_weight=-1.0)
    with pytest.raises(UserError, match=r"kto must be given its KL, got 2 columns and no kl\. Pass kl=\.\.\., or add"):
        make_preference_objective("kto")(X, PreferenceLabels(X))


def test_reference_names_the_examples_that_are_not_finite():
    inputs = jnp.ones((7, 2)).at[4].set(jnp.nan)
    with pytest.raises(UserError, match=r"^reference_log_probs: .*finite, got NaN or infinity at examples 4\. Check"):
        reference_log_probs(lambda w, x: w * x, jnp.float32(1.0), inputs, batch_size=3)
    with pytest.raises(UserError, match=r"f must return \[b, r\] log-probabilities, got \(3,\)"):
        reference_log_probs(lambda w, x: w * x[:, 0], jnp.float32(1.0), inputs, batch_size=3)
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        reference_log_probs(lambda w, x: w * x, jnp.float32(1.0), inputs, batch_size=0)


def test_a_batch_that_does_not_split_into_parts_is_refused():
    tx = optax.sgd(0.1)
    with pytest.raises(UserError, match="make_segment: accumulate must be at least 1, got 0"):
        make_segment(lambda w, x: x * w, lambda u, y: u.mean(), tx, accumulate=0)
    segment = make_segment(lambda w, x: x * w, lambda u, y: u.mean(), tx, accumulate=4)
    with pytest.raises(UserError, match=r"the batch must split into 4 parts, got 6 examples\. Use a multiple of 4"):
        segment(init_state(jnp.float32(0.0), tx), jnp.ones(8), jnp.ones(8), jnp.zeros((1, 6), int))
