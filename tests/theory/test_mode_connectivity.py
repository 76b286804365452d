"""The claims of mode_connectivity: each holds, its control is violated, and faults of the library show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.units import unit_counts
from jaxft.geometry.curves import CurveFit, curve_gradient
from jaxft.geometry.minimax_tree import minimax_tree
from jaxft.geometry.neb import fit_neb
from jaxft.geometry.paths import Curve
from jaxft.nn import make_mlp
from theory.claims import check_claim
from theory.mode_connectivity import CLAIMS, curves, networks, polygon

BY_NAME = {claim.id.removeprefix("mode_connectivity/"): claim for claim in CLAIMS}


@pytest.fixture
def claim_modules():
    return (curves, polygon)


VACUOUS = {"noise-epsilon"}
"""Bounds that are met and say nothing, on networks this small."""


def expected(name):
    return "inconclusive" if name in VACUOUS else "holds"


@pytest.mark.parametrize("name", BY_NAME)
def test_claim_holds_and_its_control_is_violated(name):
    finding = check_claim(BY_NAME[name])
    assert finding.status == expected(name)
    assert finding.measured <= finding.predicted or name not in VACUOUS
    assert check_claim(BY_NAME[name], control=True).status == "violated"


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_claim_holds_at_other_seeds(name):
    assert check_claim(BY_NAME[name], first_seed=100).status == expected(name)


def test_names_of_claims_differ():
    assert len(BY_NAME) == len(CLAIMS)


def _wrong_gradient(loss_fn, curve, batch, ts):
    """Every control point gets the mean gradient."""
    loss, gradient = curve_gradient(loss_fn, curve, batch, ts)
    return loss, jax.tree.map(lambda g: jnp.broadcast_to(g.mean(axis=0, keepdims=True), g.shape), gradient)


def _uneven(curve):
    """A chain whose knots lie elsewhere."""
    return dataclasses.replace(curve, knots=jnp.linspace(0, 1, curve.n_points) ** 2)


def _straight(loss_fn, a, b, batches, **options):
    """A band of no step worth the name."""
    fit = fit_neb(loss_fn, a, b, batches, **{**options, "steps": 1})
    line = jnp.linspace(0, 1, fit.path.n_points)
    control = jax.tree.map(lambda x, y: jnp.stack([(1 - t) * x + t * y for t in line]), a, b)
    return fit._replace(path=Curve(control, "polychain"))


def _too_low(saddles):
    tree = minimax_tree(saddles)
    return tree._replace(bottleneck=0.9 * tree.bottleneck)


FAULTS = {
    "mean gradient for every control point": ("curve_gradient", _wrong_gradient, "curve-gradient"),
    "knots elsewhere": ("reparametrise", _uneven, "constant-speed"),
    "bottleneck too low": ("minimax_tree", _too_low, "saddles-are-ultrametric"),
}
UNMOVED = {
    "curve that is not fitted": (
        "fit_curve",
        lambda loss_fn, curve, *args, **options: CurveFit(curve, jnp.zeros(1)),
        "bezier-connects",
    ),
    "band that is not fitted": ("fit_neb", _straight, "band-connects"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_claim_is_violated_by_a_fault_of_the_code(patched, fault):
    name, replacement, claim = FAULTS[fault]
    patched(name, replacement)
    assert check_claim(BY_NAME[claim]).status == "violated"


@pytest.mark.parametrize("fault", UNMOVED)
def test_claim_does_not_hold_of_a_path_that_stays_on_the_line(patched, fault):
    name, replacement, claim = UNMOVED[fault]
    patched(name, replacement)
    assert check_claim(BY_NAME[claim]).status != "holds"


def test_networks_are_those_of_the_library(x64):
    params = networks.trained(0, hidden=2)[0]
    x = networks.data(0).x
    init, f = make_mlp((16, 16, networks.CLASSES))
    fresh = jax.eval_shape(lambda key: init(key, networks.INPUTS), jax.random.key(0))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)
    ours, theirs = jax.jit(lambda p, x: (networks.f(p, x), f(p, x)))(params, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_units_of_a_network_are_all_its_hidden_units():
    for bias in (True, False):
        params = networks.initial(0, "network 0", width=8, hidden=2, bias=bias)
        spec = networks.mlp_units(2, bias=bias)
        assert unit_counts(params, spec) == {"hidden_0": 8, "hidden_1": 8}
        biases = {"Dense_0/bias", "Dense_1/bias"} if bias else set()
        assert {path for path, _ in spec.leaves} == {f"Dense_{i}/kernel" for i in range(3)} | biases


def test_networks_learn_and_those_of_one_start_part_when_they_are_told():
    batch = networks.data(0)
    apart = networks.trained(0, hidden=2)
    together = networks.trained(0, hidden=2, start=networks.STEPS)
    spawned = networks.trained(0, hidden=2, start=networks.STEPS // 2)
    distance = lambda pair: float(np.abs(networks.flat(pair[0]) - networks.flat(pair[1])).max())  # noqa: E731
    assert distance(together) == 0 < distance(spawned) < distance(apart)
    assert all(networks.accuracy(p, batch) > 0.95 for p in (*apart, *spawned))


def test_padding_leaves_networks_as_they_are(monkeypatch):
    padded = networks.trained(0, copies=2, width=12, hidden=2)
    monkeypatch.setattr(networks, "PADDED_WIDTHS", ())
    monkeypatch.setattr(networks, "PADDED_COPIES", 1)
    networks._trained.cache_clear()
    np.testing.assert_array_equal(
        networks.flat(padded), networks.flat(networks.trained(0, copies=2, width=12, hidden=2))
    )
    networks._trained.cache_clear()


def test_dropout_changes_what_is_learned():
    batch = networks.data(0)
    plain, dropped = (networks.trained(0, hidden=2, dropout=rate)[0] for rate in (0.0, 0.5))
    assert networks.loss(dropped, batch) > 2 * networks.loss(plain, batch)


def test_examples_of_other_names_are_of_the_same_clusters():
    params = networks.trained(0, hidden=2)[0]
    test, other = networks.data(0, "test"), networks.data(1)
    assert not np.array_equal(test.x, networks.data(0).x)
    assert networks.accuracy(params, test) > 0.9 > networks.accuracy(params, other)


def test_one_vertex_is_lost_with_each_unit_of_the_polygon(x64):
    """A sum of h - 1 of the units of B attains the least error that is claimed, 1 / (3h)."""
    for h in (3, 4, 6):
        case = polygon.polygon_counterexample(h)
        fewer = jax.tree.map(lambda leaf: leaf[1:], case.b)
        error = np.mean((np.asarray(polygon.f(fewer, case.x)) - case.y) ** 2)
        np.testing.assert_allclose(error, 1 / (3 * h), rtol=1e-12)
