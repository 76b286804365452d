"""Kernels against neural-tangents: by a committed file everywhere, live where it is installed."""

import importlib.util
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.infinite import arccosine_kernels, ntk_parametrization_preconditioner
from jaxft.kernels.neural_tangents_shim import lenient_numpy, load_neural_tangents
from jaxft.kernels.ntk import empirical_ntk
from jaxft.nn.mlp import make_mlp

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def oracle():
    with np.load(HERE / "infinite_mlp.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("case", "hidden_layers"), [("relu", 2), ("relu_deep", 5)])
def test_closed_form_equals_the_committed_kernels(x64, oracle, case, hidden_layers):
    x, y = jnp.asarray(oracle["x"]), jnp.asarray(oracle["y"])
    for side, columns in (("xy", y), ("xx", None)):
        for name, kernel in arccosine_kernels(x, columns, hidden_layers=hidden_layers)._asdict().items():
            np.testing.assert_allclose(kernel, oracle[f"{case}/{side}/{name}"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["relu", "erf", "gelu", "relu_standard"])
def test_wide_networks_have_the_committed_kernels(oracle, case):
    activation, _, plain = case.partition("_")
    x, y = (jnp.asarray(oracle[k], jnp.float32) for k in "xy")
    init, f = make_mlp((512, 1024, 1), activation=activation)
    params = init(jax.random.key(0), 4)
    rates = None if plain else ntk_parametrization_preconditioner(params)
    kernel = empirical_ntk(f, params, x, y, kernel="sgd" if plain else "preconditioned", preconditioner=rates)
    expected = oracle[f"{case}/xy/ntk"]
    assert np.linalg.norm(kernel[:, 0, :, 0] - expected) < 0.15 * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def live():
    if not (importlib.util.find_spec("neural_tangents") and importlib.util.find_spec("frozendict")):
        pytest.skip("neural-tangents and frozendict are not installed")
    return load_neural_tangents()


@pytest.mark.oracle
def test_committed_file_is_what_neural_tangents_gives_today(oracle, live):
    today = runpy.run_path(str(HERE / "make_infinite.py"))["make"]()
    assert set(today) == set(oracle)
    for name in set(today) - {"made_with"}:
        np.testing.assert_allclose(today[name], oracle[name], rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def network():
    init, f = make_mlp((6, 5, 2), activation="tanh")
    draw = np.random.default_rng(0).normal
    x, y = (jnp.asarray(draw(size=(rows, 3)), jnp.float32) for rows in (4, 3))
    return f, init(jax.random.key(0), 3), x, y


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES", "AUTO"])
def test_empirical_kernel_equals_that_of_neural_tangents(network, live, method):
    f, params, x, y = network
    with lenient_numpy():
        kernel_fn = live.empirical_ntk_fn(f, (), vmap_axes=0, implementation=live.NtkImplementation[method])
        theirs = np.asarray(kernel_fn(x, y, params))
    np.testing.assert_allclose(empirical_ntk(*network), theirs.transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.oracle
def test_predictions_of_neural_tangents_run(live):
    kernel = np.array([[2.0, 0.5], [0.5, 1.0]])
    largest = np.linalg.eigvalsh(kernel)[-1]
    with lenient_numpy():
        np.testing.assert_allclose(live.predict.max_learning_rate(kernel), 2 * 2 / largest, rtol=1e-6)
        at_time = live.predict.gradient_descent_mse(jnp.asarray(kernel), jnp.ones((2, 1)))
        outputs = np.asarray(at_time(1.5, jnp.zeros((2, 1)), None))
    values, vectors = np.linalg.eigh(kernel)
    decay = (vectors * np.exp(-1.5 * values / 2)) @ vectors.T
    np.testing.assert_allclose(outputs[:, 0], 1 - decay @ np.ones(2), rtol=1e-5)
