"""Linear and two-layer probes: closed form, training, and what a hidden layer adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.evaluation.probes import fit_linear_probe, fit_probes, fit_ridge_probes, probe_outputs

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 64, 3)).astype(np.float32) * np.float32(5) + np.float32(2)
SIGNS = (X - 2)[0, :, :2] > 0
XOR = (SIGNS[:, 0] ^ SIGNS[:, 1]).astype(np.int32)


def test_ridge_is_the_stationary_point_of_its_objective(x64):
    x, y = jnp.asarray(X, jnp.float64), jnp.asarray(RNG.normal(size=(64, 2)))
    probes = fit_ridge_probes(x, y, l2=0.1)
    z = (x[1] - probes.mean[1]) / probes.scale[1]

    def objective(params):
        residual = z @ params["kernel"][1, 0] + params["bias"][1, 0][None] - y
        return (residual**2).sum() / 64 + 0.1 * (params["kernel"][1, 0] ** 2).sum()

    gradient = jax.grad(objective)(probes.params["Dense_0"])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-12


def test_trained_linear_probe_reaches_the_closed_form():
    y = (X[0] @ np.array([[0.5], [-1.0], [0.2]], np.float32)) + RNG.normal(size=(64, 1)).astype(np.float32)
    exact = fit_ridge_probes(X, y, l2=1e-6)
    trained = fit_probes(X, y, key=KEY, steps=600, batch_size=64, weight_decay=0.0, learning_rate=0.05)
    best, got = (0.5 * ((probe_outputs(p, X)[:, 0] - y[None]) ** 2).mean(axis=1) for p in (exact, trained))
    np.testing.assert_allclose(got, best, rtol=0.05)
    assert (np.asarray(got) > np.asarray(best) - 1e-5).all()


def test_a_hidden_layer_learns_exclusive_or_and_a_line_does_not():
    options = {"key": KEY, "objective": "cross_entropy", "steps": 400, "batch_size": 64, "learning_rate": 0.02}
    correct = {}
    for hidden in (None, 16):
        outputs = probe_outputs(fit_probes(X, XOR, hidden=hidden, **options), X)
        correct[hidden] = float((np.asarray(outputs[0, 0]).argmax(axis=1) == XOR).mean())
    assert correct[None] < 0.8
    assert correct[16] > 0.95


@pytest.mark.parametrize("objective", ["squared", "logistic", "cross_entropy"])
def test_one_after_the_other_equals_all_at_once(objective):
    y = XOR if objective == "cross_entropy" else np.stack([XOR, 1 - XOR], axis=1).astype(np.float32)
    options = {"key": KEY, "objective": objective, "hidden": 4, "repeats": 2, "steps": 5, "batch_size": 8}
    one, all_ = (fit_probes(X, y, execution=mode, **options) for mode in ("map", "vmap"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, all_)
    assert one.params["Dense_0"]["kernel"].shape == (2, 2, 3, 4)
    assert not np.allclose(one.params["Dense_0"]["kernel"][0, 0], one.params["Dense_0"]["kernel"][0, 1])


def test_layers_do_not_see_each_other():
    y = SIGNS.astype(np.float32)
    both = fit_probes(X, y, key=KEY, steps=5)
    alone = fit_probes(X[1:], y, key=KEY, steps=5)
    np.testing.assert_allclose(both.params["Dense_0"]["kernel"][1], alone.params["Dense_0"]["kernel"][0], atol=1e-6)


def test_outputs_do_not_depend_on_shift_and_scale_of_the_features():
    y = SIGNS.astype(np.float32)
    first, second = (probe_outputs(fit_ridge_probes(x, y), x) for x in (X, 100 * X - 7))
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_constant_features_are_harmless():
    x = np.concatenate([X, np.full((2, 64, 1), 3e4, np.float32)], axis=2)
    for probes in (
        fit_ridge_probes(x, SIGNS.astype(np.float32)),
        fit_probes(x, XOR, key=KEY, objective="cross_entropy", steps=3),
    ):
        assert np.isfinite(np.asarray(probe_outputs(probes, x))).all()


def test_softmax_probe_agrees_with_logistic_regression():
    y = (X[0, :, 0] + RNG.normal(size=64).astype(np.float32) > 2).astype(np.int32)
    exact = fit_linear_probe(jnp.asarray(X[0]), jnp.asarray(y), classes=2, l2=1e-4)
    logits = X[0] @ np.asarray(exact["kernel"]) + np.asarray(exact["bias"])[None]
    options = {"objective": "cross_entropy", "steps": 800, "batch_size": 64, "learning_rate": 0.05}
    outputs = np.asarray(probe_outputs(fit_probes(X, y, key=KEY, weight_decay=0.0, **options), X)[0, 0])
    margin, expected = (z[:, 1] - z[:, 0] for z in (outputs, logits))
    assert np.corrcoef(margin, expected)[0, 1] > 0.99
