"""After REPAIR the statistics of units are what they should be, through dense layers, convolutions and norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.units import UnitAxis, make_permutation_spec
from jaxft.geometry.repair import _rescaled, affine_leaves, repair
from jaxft.geometry.unit_statistics import unit_moments

DENSE = make_permutation_spec(
    {
        "d0/kernel": (UnitAxis("h0", 1),),
        "d0/bias": (UnitAxis("h0", 0),),
        "d1/kernel": (UnitAxis("h0", 0, reads=True), UnitAxis("h1", 1)),
        "d1/bias": (UnitAxis("h1", 0),),
        "d2/kernel": (UnitAxis("h1", 0, reads=True),),
    }
)
NORMED = make_permutation_spec(
    {
        "conv/kernel": (UnitAxis("h0", 1),),
        **{f"norm/{leaf}": (UnitAxis("h0", 0),) for leaf in ("scale", "bias", "mean", "var")},
        "d1/kernel": (UnitAxis("h0", 0, reads=True), UnitAxis("h1", 1)),
        "d1/bias": (UnitAxis("h1", 0),),
    }
)
X = jnp.asarray(np.random.default_rng(9).normal(size=(40, 6, 3)), np.float32)


def dense(seed):
    draw = np.random.default_rng(seed)
    shapes = {"d0": (3, 7), "d1": (7, 5), "d2": (5, 2)}
    drawn = {name: (draw.normal(size=shape), draw.normal(size=shape[1:])) for name, shape in shapes.items()}
    return {
        name: {"kernel": jnp.asarray(kernel, np.float32), "bias": jnp.asarray(bias, np.float32)}
        for name, (kernel, bias) in drawn.items()
    }


def dense_units(params, x):
    """Units at each of six places, as a convolution has."""
    h0 = x @ params["d0"]["kernel"] + params["d0"]["bias"][None, None]
    h1 = jax.nn.relu(h0) @ params["d1"]["kernel"] + params["d1"]["bias"][None, None]
    return {"h0": h0, "h1": h1}


def normed(seed):
    params = dense(seed)
    draw = np.random.default_rng(seed + 100)
    positive = {leaf: jnp.asarray(0.5 + draw.uniform(size=7), np.float32) for leaf in ("scale", "bias", "mean", "var")}
    return {"conv": {"kernel": params["d0"]["kernel"]}, "norm": positive, "d1": params["d1"]}


def normed_units(params, x):
    norm = {name: leaf[None, None] for name, leaf in params["norm"].items()}
    h0 = (x @ params["conv"]["kernel"] - norm["mean"]) / jnp.sqrt(norm["var"]) * norm["scale"] + norm["bias"]
    h1 = jax.nn.relu(h0) @ params["d1"]["kernel"] + params["d1"]["bias"][None, None]
    return {"h1": h1, "h0": h0}


CASES = {"dense": (dense, dense_units, DENSE), "norms": (normed, normed_units, NORMED)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("alpha", "batch_size"), [(0.5, None), (0.3, 16)])
def test_means_and_deviations_are_interpolated(case, alpha, batch_size):
    make, units, spec = CASES[case]
    a, b = make(0), make(1)
    merged = jax.tree.map(lambda p, q: (1 - alpha) * p + alpha * q, a, b)
    done = repair(units, merged, a, b, spec, X, alpha=alpha, batch_size=batch_size)
    first, second, before, after = (units(params, X) for params in (a, b, merged, done))
    for group in ("h0", "h1"):
        flat = [np.asarray(side[group], np.float64).reshape(240, -1) for side in (first, second, before, after)]
        for statistic in (np.mean, np.std):
            of_a, of_b, of_merged, of_done = (statistic(z, axis=0) for z in flat)
            wanted = (1 - alpha) * of_a + alpha * of_b
            np.testing.assert_allclose(of_done, wanted, rtol=1e-4, atol=1e-5)
            assert group == "h0" or np.abs(of_merged - wanted).max() > 0.05


@pytest.mark.parametrize("case", CASES)
def test_network_merged_with_itself_is_left_alone(case):
    make, units, spec = CASES[case]
    a = make(0)
    done = repair(units, a, a, a, spec, X)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=2e-5, atol=2e-5), done, a)


def test_merge_at_an_end_is_left_alone():
    a, b = dense(0), dense(1)
    done = repair(dense_units, b, a, b, DENSE, X, alpha=1.0)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=2e-5, atol=2e-5), done, b)


def test_only_scale_and_shift_of_a_norm_move():
    a, b = normed(0), normed(1)
    merged = jax.tree.map(lambda p, q: (p + q) / 2, a, b)
    done = repair(normed_units, merged, a, b, NORMED, X)
    for path in (("conv", "kernel"), ("norm", "mean"), ("norm", "var")):
        np.testing.assert_array_equal(done[path[0]][path[1]], merged[path[0]][path[1]])
    assert affine_leaves(NORMED, "h0") == ("norm/scale", "norm/bias")


def test_dead_unit_is_shifted_and_not_scaled():
    a, b = dense(0), dense(1)
    merged = jax.tree.map(lambda p, q: (p + q) / 2, a, b)
    merged["d0"]["kernel"] = merged["d0"]["kernel"].at[:, 2].set(0)
    done = repair(dense_units, merged, a, b, DENSE, X)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(done))
    (mean_a, _), (mean_b, _), (mean, variance) = (unit_moments(dense_units, p, X)["h0"] for p in (a, b, done))
    np.testing.assert_allclose(mean, (mean_a + mean_b) / 2, rtol=1e-4, atol=1e-5)
    assert float(variance[2]) < 1e-10


def test_scales_follow_blocks_of_a_fused_axis():
    spec = make_permutation_spec({"d0/kernel": (UnitAxis("h0", 1, outer=2, inner=3),), "d0/bias": (UnitAxis("h0", 0),)})
    axes = dict(spec.of_group("h0"))
    params = {"d0": {"kernel": jnp.ones((1, 12)), "bias": jnp.zeros(2)}}
    done = _rescaled(params, axes, "d0/bias", jnp.array([2.0, 5.0]), jnp.array([1.0, -1.0]))
    assert done["d0"]["kernel"].tolist() == [[2.0, 2.0, 2.0, 5.0, 5.0, 5.0] * 2]
    assert done["d0"]["bias"].tolist() == [1.0, -1.0]
