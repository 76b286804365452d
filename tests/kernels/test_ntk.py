"""Every kernel by every method through one battery; a new kernel is one line of ``DENSE``."""

from collections.abc import Callable

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.kernels import empirical_ntk, output_jacobian, parameter_mask
from jaxft.kernels.calls import KernelName, MethodName
from jaxft.kernels.methods import KERNELS, METHODS
from jaxft.kernels.plan import fitting_blocks
from jaxft.train import adam_preconditioner, second_moment

DENSE: dict[KernelName, Callable] = {
    "sgd": lambda j, p: (j, j),
    "signgd": lambda j, p: (np.sign(j), np.sign(j)),
    "asymmetric_signgd": lambda j, p: (j, np.sign(j)),
    "asymmetric_signgd_transposed": lambda j, p: (np.sign(j), j),
    "preconditioned": lambda j, p: (j * p, j),
}
"""Kernel -> maps of its rows and its columns, of a dense Jacobian (..., p) and a flat preconditioner (p,)."""

SYMMETRIC = tuple(name for name in DENSE if not name.startswith("asymmetric_signgd"))
SIGNS_OF_ROWS = ("signgd", "asymmetric_signgd_transposed")
PLAIN = ("contraction", "ntvp")
"""Methods for functions without taps, which ``auto``, ``tiled`` and ``ghost`` take as ``contraction`` does."""

CASES = [(name, method) for name in DENSE for method in PLAIN if name not in SIGNS_OF_ROWS or method != "ntvp"]


def test_every_kernel_is_in_the_battery():
    assert set(DENSE) == set(KERNELS)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def kernel(case):
    return case[0]


@pytest.fixture
def options(case, preconditioner):
    kernel, method = case
    return {
        "kernel": kernel,
        "method": method,
        "preconditioner": preconditioner if kernel == "preconditioned" else None,
    }


def dense_kernel(kernel, problem, preconditioner, dense, mask=None):
    """The kernel from Jacobians by finite differences, of the parameters in a flat mask."""
    flat = np.asarray(jax.flatten_util.ravel_pytree(preconditioner)[0])
    keep = np.ones(flat.size, bool) if mask is None else mask
    rows, columns = (dense(problem.f, problem.params, side)[..., keep] for side in (problem.x, problem.y))
    flat = flat[keep]
    return np.einsum("ncp,mdp->ncmd", DENSE[kernel](rows, flat)[0], DENSE[kernel](columns, flat)[1])


@pytest.fixture
def expected(kernel, problem, preconditioner, dense):
    return dense_kernel(kernel, problem, preconditioner, dense)


def test_jacobian_equals_finite_differences(problem, dense):
    leaves = jax.tree.leaves(output_jacobian(problem.f, problem.params, problem.x))
    ours = np.concatenate([leaf.reshape(7, 3, -1) for leaf in leaves], axis=-1)
    np.testing.assert_allclose(ours, dense(problem.f, problem.params, problem.x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(PLAIN)))
def test_without_taps_every_other_method_is_contraction(problem, method):
    plan = empirical_ntk(*problem, method=method, explain=True)
    assert {leaf.route for leaf in plan.leaves} == {"whole"}
    np.testing.assert_array_equal(empirical_ntk(*problem, method=method), empirical_ntk(*problem))


def test_kernel_equals_dense_jacobian_gram(problem, options, expected):
    ours = empirical_ntk(*problem, **options)
    assert ours.shape == (7, 3, 5, 3)
    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("block_size", [1, 2, 5, (3, 4), (7, 5), 100])
def test_blocks_equal_whole(problem, options, block_size):
    whole = empirical_ntk(*problem, **options, block_size=(7, 5))
    np.testing.assert_allclose(empirical_ntk(*problem, **options, block_size=block_size), whole, rtol=1e-12)


@pytest.mark.parametrize("block_size", [1, 3, 7])
def test_train_kernel_equals_rows_against_rows(problem, options, block_size):
    f, params, x, _ = problem
    ours = empirical_ntk(f, params, x, **options, block_size=block_size)
    np.testing.assert_allclose(ours, empirical_ntk(f, params, x, x, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("subset", [{"only": ["b$"]}, {"without": ["^in/w"]}, {"only": ["^out$"]}])
@pytest.mark.parametrize("name", ["preconditioned", "asymmetric_signgd"])
def test_masked_kernel_equals_the_dense_kernel_of_the_masked_parameters(
    problem, preconditioner, dense, subset, method, name
):
    mask = parameter_mask(problem.params, **subset)
    flat = jax.tree.map(lambda keep, p: np.full(p.size, keep), mask, problem.params)
    expected = dense_kernel(name, problem, preconditioner, dense, np.concatenate(jax.tree.leaves(flat)))
    given = preconditioner if name == "preconditioned" else None
    ours = empirical_ntk(*problem, kernel=name, param_mask=mask, method=method, preconditioner=given)
    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-7)


def test_kernels_of_a_mask_and_of_its_complement_sum_to_the_whole(problem, case, options):
    mask = parameter_mask(problem.params, only=["^in/"])
    other = jax.tree.map(lambda keep: not keep, mask)
    parts = [empirical_ntk(*problem, **options, param_mask=m) for m in (mask, other)]
    np.testing.assert_allclose(parts[0] + parts[1], empirical_ntk(*problem, **options), rtol=1e-12, atol=1e-12)


def test_asymmetric_sign_kernel_is_not_symmetric(problem):
    k = np.asarray(empirical_ntk(problem.f, problem.params, problem.x, kernel="asymmetric_signgd"))
    flat = k.reshape(21, 21)
    assert np.abs(flat - flat.T).max() > 0.1 * np.abs(flat).max()


@pytest.mark.parametrize("kernel", SYMMETRIC)
@pytest.mark.parametrize("block_size", [1, 3, 7])
def test_train_kernel_is_symmetric_and_psd_where_claimed(problem, preconditioner, kernel, block_size):
    f, params, x, _ = problem
    p = preconditioner if kernel == "preconditioned" else None
    flat = np.asarray(empirical_ntk(f, params, x, kernel=kernel, preconditioner=p, block_size=block_size))
    flat = flat.reshape(21, 21)
    assert (flat == flat.T).all()
    eigenvalues = np.linalg.eigvalsh(flat)
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()


def test_scalar_outputs_give_two_axes(problem, scalar_problem, options):
    ours = empirical_ntk(*scalar_problem, **options)
    assert ours.shape == (7, 5)
    np.testing.assert_allclose(ours, empirical_ntk(*problem, **options)[:, 0, :, 0], rtol=1e-12)


def test_jit_and_vmap_over_parameters_equal_plain_calls(problem, options):
    f, params, x, y = problem
    two = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), params)
    mapped = jax.jit(jax.vmap(lambda p: empirical_ntk(f, p, x, y, **options, block_size=4)))(two)
    for i in range(2):
        plain = empirical_ntk(f, jax.tree.map(lambda a, i=i: a[i], two), x, y, **options)
        np.testing.assert_allclose(mapped[i], plain, rtol=1e-12, atol=1e-12)


def test_float32_agrees_with_float64_and_can_sum_in_float64(problem, problem32):
    exact = empirical_ntk(*problem)
    ours = empirical_ntk(*problem32)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)
    with jax.enable_x64(True):
        wide = empirical_ntk(*problem32, accum_dtype=jnp.float64)
    assert wide.dtype == jnp.float64


def test_sign_kernel_is_invariant_to_scaling_an_output(problem):
    f, params, x, y = problem
    scales = jnp.array([0.1, 3.0, 7.0])
    scaled = empirical_ntk(lambda p, z: f(p, z) * scales[None], params, x, y, kernel="signgd")
    np.testing.assert_array_equal(scaled, empirical_ntk(f, params, x, y, kernel="signgd"))


def test_unit_preconditioner_gives_the_sgd_kernel(problem):
    ones = jax.tree.map(jnp.ones_like, problem.params)
    ours = empirical_ntk(*problem, kernel="preconditioned", preconditioner=ones)
    np.testing.assert_allclose(ours, empirical_ntk(*problem), rtol=1e-13)


def test_one_example_and_pytree_inputs_work(problem):
    f, params, x, _ = problem
    ours = empirical_ntk(lambda p, z: f(p, z["a"] + z["b"]), params, {"a": x[:1], "b": jnp.zeros((1, 4))})
    np.testing.assert_allclose(ours, empirical_ntk(f, params, x[:1]), rtol=1e-13)


def test_memory_is_bounded_by_the_blocks(problem32):
    """The compiled temporary memory does not grow with the number of columns."""
    f, params, x, y = problem32

    def temporaries(repeats):
        columns = jnp.tile(y, (repeats, 1))
        compiled = jax.jit(lambda p, a, b: empirical_ntk(f, p, a, b, block_size=5)).lower(params, x, columns).compile()
        result = 4 * 7 * 3 * columns.shape[0] * 3
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes - 2 * result

    jacobians = 4 * (5 + 5) * 3 * (4 * 5 + 5 + 5 * 3)
    assert temporaries(64) < temporaries(4) + jacobians


def test_several_kernels_at_once_equal_each_alone(problem, preconditioner):
    names: tuple[KernelName, ...] = tuple(DENSE)
    for side in (problem.y, None):
        together = empirical_ntk(
            problem.f, problem.params, problem.x, side, kernel=names, preconditioner=preconditioner, block_size=3
        )
        for name in names:
            p = preconditioner if name == "preconditioned" else None
            alone = empirical_ntk(
                problem.f, problem.params, problem.x, side, kernel=name, preconditioner=p, block_size=3
            )
            np.testing.assert_allclose(together[name], alone, rtol=1e-12, atol=1e-12)


def test_half_precision_is_summed_in_float32():
    """Ten thousand ones: in bfloat16 the sum would stop growing at 256."""
    x = jnp.ones((2, 10_000), jnp.bfloat16)
    methods: tuple[MethodName, ...] = ("contraction", "ntvp")
    for method in methods:
        ours = empirical_ntk(lambda w, z: z @ w, jnp.zeros(10_000, jnp.bfloat16), x, method=method)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, 10_000, rtol=0 if method == "contraction" else 4e-3)


def test_moment_of_a_masked_optimiser_fits_the_mask():
    """BitFit by optax.masked: its state holds nothing for the frozen leaves, and needs not."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    x = jnp.arange(12.0).reshape(4, 3)

    def f(p, z):
        return jnp.matmul(z, p["w"], precision="highest") + p["b"][None]

    mask = parameter_mask(params, only=["^b$"])
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.masked(optax.adam(0.1), mask)
        _, state = tx.update({"w": params["w"], "b": jnp.array([2.0, 0.5])}, tx.init(params), params)
        moment = second_moment(state, b2=0.999)
    p = adam_preconditioner(moment, eps=0.0)
    ours = empirical_ntk(f, params, x, kernel="preconditioned", preconditioner=p, param_mask=mask)
    expected = jnp.broadcast_to(jnp.diag(jnp.array([0.5, 2.0]))[None, :, None], (4, 2, 4, 2))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_default_blocks_hold_a_gibibyte_and_waste_no_row():
    assert fitting_blocks(32, 64, 2**10) == (32, 64)
    assert fitting_blocks(32, 64, 2**25) == (16, 16)
    assert fitting_blocks(30, 64, 2**29) == (1, 1)
    assert fitting_blocks(100, None, 2**26) == (8, 8)
