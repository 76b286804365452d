"""The conformance of every loss of the table to its line, and formulas that a slip would change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.tuning.losses import ALIASES, LOSSES
from jaxft.tuning.margin_losses import GPO_FUNCTIONS
from jaxft.tuning.objectives import (
    PreferenceLabels,
    loss_slopes,
    loss_weights,
    make_preference_objective,
    preference_loss,
)

NAMES = list(LOSSES)
FAMILIES = {
    name: [k for k, line in LOSSES.items() if line.family == name] for name in ("margin", "weighted", "outside")
}
GIVEN: dict[str, Any] = {"kto": {"kl": 0.7}, "dpop": {"lam": 5.0}}
"""Options that have no default, or whose default would hide the rest of the loss."""
BETA = 0.3
RNG = np.random.default_rng(0)
N = 24
X = -RNG.gamma(2.0, 4.0, size=(N, 2))
REFERENCE = X + RNG.normal(scale=4.0, size=(N, 2))
LENGTHS = RNG.integers(1, 9, size=(N, 2))


def value(name, x, reference: Any = REFERENCE, lengths: Any = LENGTHS, beta: Any = BETA, **options: Any):
    arrays = (jnp.asarray(x), jnp.asarray(reference), jnp.asarray(lengths))
    return np.asarray(preference_loss(name, *arrays, beta=beta, **GIVEN.get(name, {}) | options))


def slopes(name, x, reference: Any = REFERENCE, lengths: Any = LENGTHS, beta: Any = BETA, **options: Any):
    arrays = (jnp.asarray(x), jnp.asarray(reference), jnp.asarray(lengths))
    return np.asarray(loss_slopes(name, *arrays, beta=beta, **GIVEN.get(name, {}) | options))


def sigma(z):
    return 1 / (1 + np.exp(-np.asarray(z)))


@pytest.mark.parametrize("name", NAMES)
def test_slopes_equal_finite_differences(x64, name):
    measured = value(name, X)
    assert measured.shape == (N,)
    assert measured.dtype == np.float64
    step = 1e-5 * np.eye(2)
    differences = [(value(name, X + step[[k]]) - value(name, X - step[[k]])) / 2e-5 for k in range(2)]
    np.testing.assert_allclose(slopes(name, X), np.stack(differences, axis=1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES["margin"])
def test_margin_losses_see_the_difference_alone(x64, name):
    moved = X - RNG.gamma(2.0, size=(N, 1))
    np.testing.assert_allclose(value(name, moved), value(name, X), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(slopes(name, X).sum(axis=1), 0, atol=1e-12)
    assert LOSSES[name].weights is None
    np.testing.assert_array_equal(
        loss_weights(name, jnp.asarray(X), jnp.asarray(REFERENCE)), [[1] * N, [1] * N, [0] * N]
    )


@pytest.mark.parametrize("name", FAMILIES["weighted"])
def test_weighted_losses_have_the_form_of_their_weights(x64, name):
    arrays = (jnp.asarray(X), jnp.asarray(REFERENCE), jnp.asarray(LENGTHS))
    chosen, rejected, sft = map(np.asarray, loss_weights(name, *arrays, **GIVEN.get(name, {})))
    f = slopes(name, X)
    np.testing.assert_allclose(rejected * (f[:, 0] + sft) + chosen * f[:, 1], 0, atol=1e-12)
    # Along (lambda-, lambda+) the weighted difference stands still; the step keeps DPOP on its side.
    along = 1e-3 * np.stack([rejected, chosen], axis=1)
    kept = value(name, X + along) + sft * (X + along)[:, 0] - value(name, X) - sft * X[:, 0]
    np.testing.assert_allclose(kept, 0, atol=1e-10)
    assert np.abs(slopes(name, X).sum(axis=1)).max() > 1e-3, "it is a function of the margin"


@pytest.mark.parametrize("name", FAMILIES["outside"])
def test_losses_outside_have_no_weights(x64, name):
    # A weighted loss has f1 = -(lambda+/lambda-) f2 - kappa: its slopes lie on a line.
    one = [np.broadcast_to(x[:1], (N, 2)) for x in (REFERENCE, LENGTHS)]
    f = slopes(name, X, *one)
    design = np.stack([f[:, 1], np.ones(N)], axis=1)
    residual = f[:, 0] - design @ np.linalg.lstsq(design, f[:, 0], rcond=None)[0]
    assert np.abs(residual).max() > 1e-3
    with pytest.raises(ValueError, match="must be a loss that has weights"):
        loss_weights(name, jnp.asarray(X), jnp.asarray(REFERENCE), jnp.asarray(LENGTHS), **GIVEN.get(name, {}))


def many_points():
    draw = np.random.default_rng(1)
    reference = -draw.gamma(2.0, 10.0, size=(4000, 2))
    a, b = (-draw.gamma(1.0, 15.0, size=(4000, 2)) - 1e-3 for _ in range(2))
    return a, b, reference, np.broadcast_to([[3, 2]], (4000, 2))


@pytest.mark.parametrize("name", NAMES)
def test_convexity_is_as_the_table_says(x64, name):
    a, b, *others = many_points()
    gap = (value(name, a, *others) + value(name, b, *others)) / 2 - value(name, (a + b) / 2, *others)
    assert (gap.min() > -1e-8) == LOSSES[name].convex


@pytest.mark.parametrize("name", NAMES)
def test_monotony_is_as_the_table_says(x64, name):
    a, _, *others = many_points()
    f = slopes(name, a, *others)
    assert bool((f[:, 0] < 1e-9).all() and (f[:, 1] > -1e-9).all()) == LOSSES[name].decreasing


def test_losses_fall_at_the_reference_but_for_two():
    at = REFERENCE.astype(np.float32)
    f = {name: slopes(name, at, at) for name in NAMES}
    falls = [name for name in NAMES if (f[name][:, 0] < 0).all() and (f[name][:, 1] >= 0).all()]
    assert set(NAMES) - set(falls) == {"discopop", "apo_down", "slic"}
    # The margin of SLiC is its own; DiscoPOP has a bump at 0, and APO-down lowers both responses by design.
    assert (f["discopop"][:, 0] > 0).all()
    assert (f["apo_down"] >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_eager_and_vmap_equals_a_loop(name):
    arrays = [jnp.asarray(x, jnp.float32) for x in (X, REFERENCE)] + [jnp.asarray(LENGTHS)]
    options = GIVEN.get(name, {})

    def loss(x, reference, lengths):
        return preference_loss(name, x, reference, lengths, beta=BETA, **options)

    eager = loss(*arrays)
    assert eager.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(loss)(*arrays), eager, rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(lambda *row: loss(*(r[None] for r in row))[0])(*arrays)
    np.testing.assert_allclose(mapped, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes_are_finite_at_the_ends_of_float32(name):
    ends = [[-1e4, 0.0], [0.0, -1e4], [-2e4, -1e4], [-1e-30, -1e-30], [0.0, 0.0], [-1e4, -1e4]]
    x = np.asarray(ends, np.float32)
    for reference in (x * 0, np.full_like(x, -1e4), x):
        for beta in (0.1, 1.0):
            assert np.isfinite(value(name, x, reference, np.ones_like(x, int), beta=beta)).all()
            assert np.isfinite(slopes(name, x, reference, np.ones_like(x, int), beta=beta)).all()


@pytest.mark.parametrize("f", GPO_FUNCTIONS)
def test_gpo_functions_are_finite_and_fall_at_zero(f):
    x = np.asarray([[-1e4, 0.0], [0.0, -1e4], [0.0, 0.0]], np.float32)
    assert np.isfinite(value("gpo", x, 0 * x, np.ones_like(x, int), beta=1.0, f=f)).all()
    np.testing.assert_array_equal(np.sign(slopes("gpo", x, 0 * x, np.ones_like(x, int), beta=1.0, f=f))[2], [-1, 1])


def test_half_precision_is_computed_in_single():
    x = jnp.asarray(X, jnp.bfloat16)
    assert preference_loss("dpo", x, jnp.asarray(REFERENCE, jnp.bfloat16)).dtype == jnp.float32
    assert loss_slopes("dpo", x, jnp.asarray(REFERENCE, jnp.bfloat16)).dtype == jnp.float32


def test_special_cases_of_one_loss_are_other_losses(x64):
    z = BETA * ((X - REFERENCE) @ [1.0, -1.0])
    np.testing.assert_allclose(value("gpo", X, f="logistic"), value("dpo", X), rtol=1e-12)
    np.testing.assert_allclose(value("gpo", X, f="hinge"), value("hinge", X), rtol=1e-12)
    np.testing.assert_allclose(value("gpo", X, f="squared") / BETA**2, value("ipo", X, beta=BETA / 2), rtol=1e-9)
    np.testing.assert_allclose(value("gpo", X), np.exp(-z), rtol=1e-12)
    np.testing.assert_allclose(value("gpo", X, f="savage"), sigma(-z) ** 2, rtol=1e-12)
    np.testing.assert_allclose(value("robust", X, label_smoothing=0.0), value("sigmoid", X), rtol=1e-12)
    np.testing.assert_allclose(value("dpop", X, lam=0.0), value("sigmoid", X), rtol=1e-12)
    ones = np.ones_like(LENGTHS)
    np.testing.assert_allclose(value("ipo_mean", X, lengths=ones), value("ipo", X), rtol=1e-12)
    np.testing.assert_allclose(value("sigmoid_norm", X, lengths=ones), value("sigmoid", X), rtol=1e-12)
    np.testing.assert_allclose(
        value("rebel", X, eta=2.0, rewards=(3.0, 0.0)), value("ipo", X, beta=1 / 12) / 4, rtol=1e-12
    )
    np.testing.assert_allclose(value("slic", X, delta=0.5), value("hinge", X, 0 * X, beta=2.0) / 2, rtol=1e-12)
    np.testing.assert_allclose(value("cpo", X, alpha=0.0), value("sigmoid", X, 0 * X), rtol=1e-12)
    np.testing.assert_allclose(value("rpo", X) - value("dpo", X), -X[:, 0] / LENGTHS[:, 0], rtol=1e-10)
    np.testing.assert_allclose(value("cpo", X, alpha=2.0) - value("cpo", X, alpha=0.0), 2 * value("sft", X), rtol=1e-10)
    np.testing.assert_allclose(value("kto", X, kl=0.0), value("apo_zero", X), rtol=1e-12)
    np.testing.assert_array_equal(value("ipo_trl", X), value("ipo_mean", X))
    assert set(ALIASES.values()) <= set(LOSSES)


def test_robust_loss_is_unbiased_under_flipped_labels(x64):
    e = 0.2
    flipped = [x[:, ::-1] for x in (X, REFERENCE)]
    expected = (1 - e) * value("robust", X, label_smoothing=e) + e * value("robust", *flipped, label_smoothing=e)
    np.testing.assert_allclose(expected, value("sigmoid", X), rtol=1e-10)


def test_dpop_pulls_the_chosen_response_up_while_it_is_below_its_reference(x64):
    x, reference = np.array([[-5.0, -7.0], [-3.0, -7.0]]), np.array([[-4.0, -6.0]] * 2)
    one = np.ones((2, 2), int)
    penalised = -np.log(sigma(0.1 * (0.0 - 9.0 * 1.0)))
    np.testing.assert_allclose(value("dpop", x, reference, one, beta=0.1, lam=9.0)[0], penalised, rtol=1e-12)
    f, plain = (slopes(name, x, reference, one, beta=0.1, **o) for name, o in [("dpop", {"lam": 9.0}), ("dpo", {})])
    np.testing.assert_allclose(f[0, 0], -10 * f[0, 1], rtol=1e-12)
    np.testing.assert_allclose(f[1], plain[1], rtol=1e-12)


def test_orpo_equals_odds_ratios_of_mean_probabilities(x64):
    p = np.exp(X / LENGTHS)
    odds = p / (1 - p)
    expected = -X[:, 0] / LENGTHS[:, 0] - 0.3 * np.log(sigma(np.log(odds[:, 0] / odds[:, 1])))
    np.testing.assert_allclose(value("orpo", X), expected, rtol=1e-9)


def test_options_may_be_one_number_a_pair(x64):
    kl = RNG.gamma(1.0, size=N)
    rewards = RNG.normal(size=(N, 2))
    rows = range(N)
    one = [value("kto", X[[k]], REFERENCE[[k]], LENGTHS[[k]], kl=float(kl[k]))[0] for k in rows]
    np.testing.assert_allclose(value("kto", X, kl=jnp.asarray(kl)), one, rtol=1e-12)
    one = [value("rebel", X[[k]], REFERENCE[[k]], LENGTHS[[k]], rewards=tuple(rewards[k]))[0] for k in rows]
    np.testing.assert_allclose(value("rebel", X, rewards=rewards), one, rtol=1e-12)


def test_objective_is_the_mean_with_an_sft_term(x64):
    labels = PreferenceLabels(jnp.asarray(REFERENCE), jnp.asarray(LENGTHS))
    measured = make_preference_objective("ipo_mean", beta=0.2, sft_weight=0.5)(jnp.asarray(X), labels)
    np.testing.assert_allclose(measured, value("ipo_mean", X, beta=0.2).mean() - 0.5 * X[:, 0].mean(), rtol=1e-12)


def test_objective_takes_the_kl_of_kto_from_responses_to_other_prompts(x64):
    x, reference = (np.concatenate([a, RNG.normal(-5.0, size=(N, 2))], axis=1) for a in (X, REFERENCE))
    x[:, 2:] += 3.0
    labels = PreferenceLabels(jnp.asarray(reference), jnp.asarray(np.concatenate([LENGTHS, LENGTHS], axis=1)))
    objective = make_preference_objective("kto", beta=BETA)
    kl = (x - reference)[:, 2:].mean()
    assert kl > 1
    np.testing.assert_allclose(objective(jnp.asarray(x), labels), value("kto", X, kl=kl).mean(), rtol=1e-12)
    grads = jax.grad(objective)(jnp.asarray(x), labels)
    np.testing.assert_allclose(grads[:, :2], slopes("kto", X, kl=kl) / N, rtol=1e-10)
    assert not grads[:, 2:].any()


def test_objective_of_rebel_takes_the_rewards_of_the_labels(x64):
    rewards = RNG.normal(size=(N, 2))
    labels = PreferenceLabels(jnp.asarray(REFERENCE), rewards=jnp.asarray(rewards))
    measured = make_preference_objective("rebel", eta=2.0)(jnp.asarray(X), labels)
    np.testing.assert_allclose(measured, value("rebel", X, eta=2.0, rewards=rewards).mean(), rtol=1e-12)
