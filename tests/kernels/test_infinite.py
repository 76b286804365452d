"""Infinite-width kernels against integrals of the definition, against each other, and against wide networks."""

import importlib.util
import subprocess
import sys
import textwrap

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxft.kernels.infinite import arccosine_kernels, infinite_mlp_kernels, ntk_parametrization_preconditioner
from jaxft.kernels.neural_tangents_shim import _lent
from jaxft.kernels.ntk import empirical_ntk
from jaxft.nn.mlp import make_mlp

needs_package = pytest.mark.skipif(
    not (importlib.util.find_spec("neural_tangents") and importlib.util.find_spec("frozendict")),
    reason="neural-tangents and frozendict are not installed",
)

NORMAL = scipy.stats.norm
ACTIVATIONS = {
    "erf": (scipy.special.erf, lambda u: 2 / np.sqrt(np.pi) * np.exp(-(u**2)), 1e-5),
    "gelu": (lambda u: u * NORMAL.cdf(u), lambda u: NORMAL.cdf(u) + u * NORMAL.pdf(u), 1e-5),
    "relu": (lambda u: np.maximum(u, 0), lambda u: (u > 0) * 1.0, 1e-3),
}
"""Activation -> itself, its derivative, and what the quadrature is good for: the derivative of relu jumps."""


def gaussian_mean(g, k) -> float:
    """E g(u) g(v) for (u, v) of covariance ``k``, by polar coordinates: independent of any closed form."""
    radii, weights = np.polynomial.laguerre.laggauss(40)
    angles = (np.arange(2000) + 0.5) * (2 * np.pi / 2000)
    values, vectors = np.linalg.eigh(k)
    root = vectors * np.sqrt(np.maximum(values, 0))
    u, v = np.einsum("ij,jt,r->irt", root, np.stack([np.cos(angles), np.sin(angles)]), np.sqrt(2 * radii))
    return float(weights @ (g(u) * g(v)).mean(axis=1))


def by_quadrature(x, y, *, activation, hidden_layers, w_std=1.0, b_std=0.0, rates=(1, 1, 1)):
    """The recursion of the definition, entry by entry."""
    phi, slope, _ = ACTIVATIONS[activation]
    both = np.concatenate([x, y])
    sigma = k = both @ both.T / x.shape[1]
    theta = slopes = np.zeros_like(k)
    for layer in range(hidden_layers + 1):
        theta = rates[layer] * sigma + 1 + w_std**2 * slopes * theta
        k = w_std**2 * sigma + b_std**2
        if layer < hidden_layers:
            pairs = [[k[np.ix_([i, j], [i, j])] for j in range(len(k))] for i in range(len(k))]
            sigma, slopes = (
                np.array([[gaussian_mean(g, pair) for pair in row] for row in pairs]) for g in (phi, slope)
            )
    return k[: len(x), len(x) :], theta[: len(x), len(x) :]


@pytest.fixture
def points(x64):
    draw = np.random.default_rng(0).normal
    return jnp.asarray(draw(size=(3, 4))), jnp.asarray(draw(size=(2, 4)))


@pytest.fixture
def points32():
    draw = np.random.default_rng(0).normal
    return jnp.asarray(draw(size=(3, 4)), jnp.float32), jnp.asarray(draw(size=(2, 4)), jnp.float32)


def test_arccosine_kernels_equal_the_integrals(points):
    x, y = map(np.asarray, points)
    ours = arccosine_kernels(*points, hidden_layers=2)
    for kernel, expected in zip(ours, by_quadrature(x, y, activation="relu", hidden_layers=2), strict=True):
        np.testing.assert_allclose(kernel, expected, rtol=1e-3)


@needs_package
@pytest.mark.oracle
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("w_std", "b_std", "widths"), [(1.0, 0.0, None), (1.4, 0.3, None), (1.4, 0.3, (50, 70))])
def test_infinite_kernels_equal_the_integrals(points, activation, w_std, b_std, widths):
    options: dict = {"activation": activation, "hidden_layers": 2, "w_std": w_std, "b_std": b_std}
    parameterization = "standard" if widths else "ntk"
    ours = infinite_mlp_kernels(*points, **options, parameterization=parameterization, widths=widths)
    rates = (4, *widths) if widths else (1, 1, 1)
    x, y = map(np.asarray, points)
    expected = by_quadrature(x, y, **options, rates=rates)
    for kernel, integral in zip(ours, expected, strict=True):
        np.testing.assert_allclose(kernel, integral, rtol=ACTIVATIONS[activation][2])


@needs_package
@pytest.mark.oracle
@pytest.mark.parametrize("hidden_layers", [0, 1, 4])
def test_arccosine_kernels_equal_neural_tangents(points, hidden_layers):
    x, y = points
    for side in (y, None):
        ours, theirs = (f(x, side, hidden_layers=hidden_layers) for f in (arccosine_kernels, infinite_mlp_kernels))
        np.testing.assert_allclose(ours.nngp, theirs.nngp, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(ours.ntk, theirs.ntk, rtol=1e-13)


KERNELS = {
    "arccosine": arccosine_kernels,
    "relu": infinite_mlp_kernels,
    "erf": lambda *sides, **options: infinite_mlp_kernels(*sides, **options, activation="erf"),
    "gelu": lambda *sides, **options: infinite_mlp_kernels(*sides, **options, activation="gelu"),
}


@pytest.fixture(params=[name if name == "arccosine" else pytest.param(name, marks=needs_package) for name in KERNELS])
def kernels(request):
    return lambda *sides: KERNELS[request.param](*sides, hidden_layers=2)


def test_kernel_of_the_rows_is_symmetric_psd_and_that_of_rows_against_rows(points, kernels):
    x = jnp.concatenate([points[0], 2 * points[0][:1]])
    for alone, twice in zip(kernels(x), kernels(x, x), strict=True):
        np.testing.assert_array_equal(alone, alone.T)
        np.testing.assert_allclose(alone, twice, rtol=1e-7)
        assert np.linalg.eigvalsh(alone).min() > -1e-12


def test_jit_and_vmap_equal_plain_calls(points, kernels):
    x, y = points
    two = jnp.stack([x, 2 * x])
    mapped = jax.jit(jax.vmap(kernels, in_axes=(0, None)))(two, y)
    for i in range(2):
        for kernel, plain in zip(mapped, kernels(two[i], y), strict=True):
            np.testing.assert_allclose(kernel[i], plain, rtol=1e-12)


def test_float32_stays_and_agrees_with_float64(points, kernels):
    x, y = (side.astype(jnp.float32) for side in points)
    for side, exact in ((y, points[1]), (None, None)):
        for kernel, expected in zip(kernels(x, side), kernels(points[0], exact), strict=True):
            assert kernel.dtype == jnp.float32
            np.testing.assert_allclose(kernel, expected, rtol=1e-5)


def test_gradients_in_the_inputs_equal_finite_differences(points, kernels):
    x, y = points
    direction = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
    _, slope = jax.jvp(lambda x: kernels(x, y).ntk, (x,), (direction,))
    high, low = (kernels(x + s * 1e-5 * direction, y).ntk for s in (1, -1))
    np.testing.assert_allclose(slope, (high - low) / 2e-5, rtol=1e-6, atol=1e-9)


def test_parallel_rows_of_one_side_are_exact_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    kernel = arccosine_kernels(x, hidden_layers=3).ntk
    with jax.enable_x64(True):
        exact = arccosine_kernels(x.astype(jnp.float64), hidden_layers=3).ntk
    np.testing.assert_allclose(np.diag(kernel), np.diag(exact), rtol=1e-6)


def test_preconditioned_standard_network_has_the_kernel_of_the_ntk_parametrization(points):
    x, y = points
    _, f = make_mlp((6, 5, 1))
    draw = np.random.default_rng(2).normal
    sizes = ((4, 6), (6, 5), (5, 1))
    unit = {f"Dense_{i}": {"kernel": draw(size=s), "bias": draw(size=s[1])} for i, s in enumerate(sizes)}
    unit = jax.tree.map(jnp.asarray, unit)

    def standard(parameters):
        return jax.tree.map(lambda leaf: leaf / leaf.shape[0] ** 0.5 if leaf.ndim == 2 else leaf, parameters)

    params = standard(unit)
    rates = ntk_parametrization_preconditioner(params)
    ours = empirical_ntk(f, params, x, y, kernel="preconditioned", preconditioner=rates)
    ntk = empirical_ntk(lambda parameters, z: f(standard(parameters), z), unit, x, y)
    np.testing.assert_allclose(ours, ntk, rtol=1e-12)


WIDTHS, SEEDS = (64, 256, 1024), 6


def kernel_errors(points, activation, expected, bias_rate=1.0) -> np.ndarray:
    """Relative error of the empirical kernel of networks of growing width, root mean square over seeds."""
    errors = []
    for width in WIDTHS:
        init, f = make_mlp((width, width, 1), activation=activation)
        for seed in range(SEEDS):
            params = init(jax.random.key(seed), 4)
            rates = ntk_parametrization_preconditioner(params)
            rates = jax.tree.map(lambda rate: rate * bias_rate if rate.ndim == 1 else rate, rates)
            kernel = empirical_ntk(f, params, *points, kernel="preconditioned", preconditioner=rates)[:, 0, :, 0]
            errors.append(relative_error(kernel, expected))
    return np.sqrt(np.mean(np.square(errors).reshape(len(WIDTHS), SEEDS), axis=1))


def relative_error(kernel, expected) -> float:
    return float(jnp.linalg.norm(kernel - expected) / jnp.linalg.norm(expected))


def test_kernel_of_wide_networks_tends_to_the_infinite_one_as_the_root_of_the_width(points32):
    errors = kernel_errors(points32, "relu", arccosine_kernels(*points32, hidden_layers=2).ntk)
    slope = np.polyfit(np.log(WIDTHS), np.log(errors), 1)[0]
    assert -0.75 < slope < -0.25
    assert errors[-1] < 0.05


def test_a_kernel_without_biases_has_another_limit(points32):
    expected = arccosine_kernels(*points32, hidden_layers=2).ntk
    assert kernel_errors(points32, "relu", expected, bias_rate=0.0).min() > 0.3


@needs_package
@pytest.mark.oracle
@pytest.mark.parametrize("activation", ["erf", "gelu"])
def test_limits_of_the_other_activations(points32, activation):
    expected = infinite_mlp_kernels(*points32, hidden_layers=2, activation=activation).ntk
    errors = kernel_errors(points32, activation, expected)
    assert errors[-1] < 0.05
    assert errors[-1] < errors[0] / 2


@needs_package
@pytest.mark.oracle
def test_plain_kernel_of_a_wide_network_is_the_standard_one(points32):
    widths = (512, 1024)
    init, f = make_mlp((*widths, 1))
    expected = infinite_mlp_kernels(*points32, hidden_layers=2, parameterization="standard", widths=widths).ntk
    kernel = empirical_ntk(f, init(jax.random.key(0), 4), *points32)[:, 0, :, 0]
    assert float(expected.max()) > 100
    assert relative_error(kernel, expected) < 0.15


def test_outputs_of_a_wide_network_have_the_covariance_of_the_infinite_one(points32):
    # The many outputs of one network are as good as many draws: given its last layer they are independent.
    init, f = make_mlp((1024, 1024, 2048))
    out = f(init(jax.random.key(0), 4), points32[0])
    measured = jnp.matmul(out, out.T, precision="highest") / 2048
    assert relative_error(measured, arccosine_kernels(points32[0], hidden_layers=2).nngp) < 0.1


def test_shim_lends_what_is_missing_and_takes_it_back():
    own = jax.core.ShapedArray
    with _lent({"jax.core": {"ShapedArray": "not this", "NoSuchName": 1}, "jax.no_such_module": {"name": 2}}):
        assert jax.core.ShapedArray is own
        assert jax.core.NoSuchName == 1  # pyright: ignore[reportAttributeAccessIssue]
        assert sys.modules["jax.no_such_module"].name == 2
    assert jax.core.ShapedArray is own
    assert "NoSuchName" not in vars(jax.core)
    assert "jax.no_such_module" not in sys.modules


@needs_package
@pytest.mark.oracle
def test_shim_works_on_request_alone_once_and_leaves_jax_as_it_was():
    code = """
        import sys, warnings
        warnings.simplefilter("error")
        import jax, jax.core, jax.interpreters.ad
        from jaxft.kernels.neural_tangents_shim import load_neural_tangents
        names = lambda: [set(vars(m)) for m in (jax.core, jax.interpreters.ad)]
        before = names()
        assert "neural_tangents" not in sys.modules
        assert load_neural_tangents() is load_neural_tangents()
        assert names() == before
        assert not {"tensorflow", "tf2jax", "jax.util", "neural_tangents.experimental"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
