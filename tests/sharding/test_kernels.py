import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import empirical_ntk, parameter_mask
from jaxft.lab.devices import make_mesh


def network(params, x):
    return jnp.matmul(jnp.tanh(jnp.matmul(x, params["in"], precision="highest")), params["out"], precision="highest")


def arrays(columns):
    draw = np.random.default_rng(0).normal
    params = {"in": jnp.asarray(draw(size=(4, 6)), jnp.float32), "out": jnp.asarray(draw(size=(6, 2)), jnp.float32)}
    return params, jnp.asarray(draw(size=(7, 4)), jnp.float32), jnp.asarray(draw(size=(columns, 4)), jnp.float32)


@pytest.mark.parametrize("columns", [8, 5, 19])
@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 4, "model": 2}])
def test_sharded_kernel_equals_single_device(columns, shape):
    params, x, y = arrays(columns)
    single = empirical_ntk(network, params, x, y, block_size=3)
    sharded = empirical_ntk(network, params, x, y, block_size=3, mesh=make_mesh(shape))
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-5)
    assert sharded.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "signgd"},
        {"kernel": "asymmetric_signgd"},
        {"kernel": "preconditioned", "masked": True},
        {"kernel": "asymmetric_signgd", "method": "ntvp", "masked": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_sharded_kernel_equals_single_device(options):
    params, x, _ = arrays(1)
    rest = {key: value for key, value in options.items() if key != "masked"}
    if options.get("masked"):
        rest["param_mask"] = parameter_mask(params, only=["^in"])
    if options["kernel"] == "preconditioned":
        rest["preconditioner"] = {name: jnp.abs(leaf) for name, leaf in params.items()}
    single = empirical_ntk(network, params, x, block_size=3, **rest)
    sharded = empirical_ntk(network, params, x, block_size=3, mesh=make_mesh({"data": 8}), **rest)
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-5)
