"""Points of a path split over devices give what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.geometry import eval_path, init_curve


def test_a_path_over_eight_devices_is_the_path_over_one():
    mesh = Mesh(np.array(jax.devices()), ("points",))
    assert mesh.size == 8
    ends = [{"w": jax.random.normal(jax.random.key(k), (4, 3))} for k in range(2)]
    batches = jax.random.normal(jax.random.key(2), (2, 5, 4))

    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch @ params["w"]) ** 2)

    curve = init_curve(*ends, n_bends=2)
    alone = eval_path(loss, curve, batches, points=13)
    split = eval_path(loss, curve, batches, points=13, mesh=mesh)
    np.testing.assert_allclose(split.values["loss"], alone.values["loss"], rtol=1e-6)
    np.testing.assert_allclose(split.arc_length, alone.arc_length, rtol=1e-6)
