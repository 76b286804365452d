import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import empirical_ntk
from jaxft.lab.devices import make_mesh


def network(params, x):
    return jnp.matmul(jnp.tanh(jnp.matmul(x, params["in"], precision="highest")), params["out"], precision="highest")


@pytest.mark.parametrize("columns", [8, 5, 19])
@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 4, "model": 2}])
def test_sharded_kernel_equals_single_device(columns, shape):
    draw = np.random.default_rng(0).normal
    params = {"in": jnp.asarray(draw(size=(4, 6)), jnp.float32), "out": jnp.asarray(draw(size=(6, 2)), jnp.float32)}
    x, y = jnp.asarray(draw(size=(7, 4)), jnp.float32), jnp.asarray(draw(size=(columns, 4)), jnp.float32)
    single = empirical_ntk(network, params, x, y, block_size=3)
    sharded = empirical_ntk(network, params, x, y, block_size=3, mesh=make_mesh(shape))
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-5)
    assert sharded.sharding.is_fully_replicated
