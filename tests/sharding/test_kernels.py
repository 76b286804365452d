import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.kernels import (
    empirical_ntk,
    feature_drift,
    lora_kernel,
    ntk_vector_product,
    one_step_prediction,
    parameter_mask,
    projected_kernel,
)
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


SHARED = {
    "random projection": lambda f, p, x, key: projected_kernel(f, p, x, size=8, key=key, draws=2).kernel,
    "lora": lambda f, p, x, key: lora_kernel(f, p, x, rank=2, key=key, adapted={"in": True, "out": True}).kernel,
    "kernel times vector": lambda f, p, x, key: ntk_vector_product(f, p, x, jnp.arange(16.0).reshape(8, 2)),
    "feature drift": lambda f, p, x, key: feature_drift(f, p, {n: 1.1 * a for n, a in p.items()}, x, block_size=2),
    "one step": lambda f, p, x, key: (
        one_step_prediction(
            f, p, x, jnp.ones((8, 2)), x, lambda u, y: jnp.mean((u - y) ** 2), learning_rate=0.1
        ).measured
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_other_functions_on_spread_examples_equal_single_device(name):
    params, _, x = arrays(8)
    spread = jax.device_put(x, NamedSharding(make_mesh({"data": 8}), PartitionSpec("data")))
    single, sharded = (SHARED[name](network, params, side, jax.random.key(0)) for side in (x, spread))
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-5)
