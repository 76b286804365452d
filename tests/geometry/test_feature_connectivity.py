"""Layer-wise lines against lines of single leaves; feature connectivity against networks where it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.geometry.barriers import convexity_gap, loss_barrier
from jaxft.geometry.feature_connectivity import feature_connectivity, layerwise_barriers, leafwise_path
from jaxft.geometry.path_loss import eval_path

X = jax.random.normal(jax.random.key(5), (2, 6, 3))


def model(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "Dense_1": {"kernel": jax.random.normal(keys[0], (3, 3)), "bias": jnp.zeros(3)},
        "Dense_10": {"kernel": jax.random.normal(keys[1], (3, 3))},
        "layers": {"in": {"kernel": jax.random.normal(keys[2], (2, 3, 3))}},
    }


A, B = model(0), model(1)


def units_fn(params, x):
    first = jnp.tanh(x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None])
    h = first
    for kernel in params["layers"]["in"]["kernel"]:
        h = jnp.tanh(h @ kernel)
    return {"first": first, "out": h @ params["Dense_10"]["kernel"]}


def loss_fn(params, x):
    out = units_fn(params, x)["out"]
    return {"loss": (out**2).mean(), "size": jnp.abs(out).mean()}


def test_named_leaves_move_and_the_others_stay():
    point = leafwise_path(A, B, ["Dense_1"])(1.0)
    jax.tree.map(np.testing.assert_array_equal, point, A | {"Dense_1": B["Dense_1"]})
    kernels = leafwise_path(A, B, lambda name: name.endswith("kernel"))(1.0)
    np.testing.assert_array_equal(kernels["Dense_1"]["bias"], A["Dense_1"]["bias"])
    np.testing.assert_array_equal(kernels["Dense_10"]["kernel"], B["Dense_10"]["kernel"])


@pytest.mark.parametrize("metric", ["loss", "size"])
def test_every_layer_has_the_losses_of_its_own_line(metric):
    found = layerwise_barriers(loss_fn, A, B, X, points=5, metric=metric)
    assert found.layers == ("Dense_1", "Dense_10", "layers/in")
    for i, layer in enumerate(found.layers):
        line = eval_path(loss_fn, leafwise_path(A, B, [layer]), X, points=5).values
        np.testing.assert_allclose(found.losses[metric][i], line[metric], rtol=1e-5)
        np.testing.assert_allclose(found.barriers[i], loss_barrier(line[metric], baseline="max"), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.gaps[i], convexity_gap(line[metric]), rtol=1e-4, atol=1e-6)


def test_stacked_layers_are_taken_apart():
    found = layerwise_barriers(loss_fn, A, B, X, points=5, stacked="layers")
    assert found.layers == ("Dense_1", "Dense_10", "layers[0]", "layers[1]")
    kernel = A["layers"]["in"]["kernel"].at[1].set(B["layers"]["in"]["kernel"][1])
    end = A | {"layers": {"in": {"kernel": kernel}}}
    line = eval_path(loss_fn, lambda t: jax.tree.map(lambda x, y: (1 - t) * x + t * y, A, end), X, points=5)
    np.testing.assert_allclose(found.losses["loss"][3], line.values["loss"], rtol=1e-5)


def test_layers_can_be_grouped_by_the_caller():
    found = layerwise_barriers(loss_fn, A, B, X, points=5, layers={"ends": ["Dense_1", "Dense_10"]})
    line = eval_path(loss_fn, leafwise_path(A, B, ["Dense_1", "Dense_10"]), X, points=5)
    assert found.layers == ("ends",)
    np.testing.assert_allclose(found.losses["loss"][0], line.values["loss"], rtol=1e-5)


def test_feature_distance_is_one_minus_the_cosine_with_the_mixture():
    found = feature_connectivity(units_fn, A, B, X[0], ts=np.array([0.25, 1.0]))
    mixed = units_fn(jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, A, B), X[0])
    for name, of_a in units_fn(A, X[0]).items():
        of_b = units_fn(B, X[0])[name]
        target = 0.75 * of_a + 0.25 * of_b
        rows = [
            1 - f @ m / np.linalg.norm(f) / np.linalg.norm(m)
            for f, m in zip(np.asarray(mixed[name]), np.asarray(target), strict=True)
        ]
        shares = [f @ m / (m @ m) for f, m in zip(np.asarray(mixed[name]), np.asarray(target), strict=True)]
        np.testing.assert_allclose(found.distance[name][0], np.mean(rows), rtol=1e-4)
        np.testing.assert_allclose(found.coefficient[name][0], np.mean(shares), rtol=1e-4)
        np.testing.assert_allclose(found.distance[name][1], 0, atol=1e-6)
        np.testing.assert_allclose(found.coefficient[name][1], 1, rtol=1e-5)
        rows = [
            1 - f @ m / np.linalg.norm(f) / np.linalg.norm(m)
            for f, m in zip(np.asarray(of_a), np.asarray(of_b), strict=True)
        ]
        np.testing.assert_allclose(found.ends[name], np.mean(rows), rtol=1e-4)


def test_features_are_linear_where_only_the_last_layer_moves():
    last = A | {"Dense_10": B["Dense_10"]}
    found = feature_connectivity(units_fn, A, last, X[0])
    assert float(found.distance["out"].max()) < 1e-6
    np.testing.assert_allclose(found.coefficient["out"], 1, rtol=1e-5)
    assert float(found.ends["out"]) > 0.1


def test_examples_without_features_are_left_out():
    x = X[0].at[0].set(0.0)  # no bias: all features of that example are 0
    full = feature_connectivity(units_fn, A, B, x)
    rest = feature_connectivity(units_fn, A, B, x[1:])
    for name in full.distance:
        np.testing.assert_allclose(full.distance[name], rest.distance[name], rtol=1e-5)
