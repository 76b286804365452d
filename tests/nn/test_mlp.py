import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn import make_mlp

ACTIVATIONS = {
    "relu": lambda z: max(z, 0.0),
    "tanh": math.tanh,
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "erf": math.erf,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula(activation):
    init, f = make_mlp((5, 2), activation=activation)
    params = jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0), 3))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    first, last = (jax.tree.map(np.asarray, params[name]) for name in ("Dense_0", "Dense_1"))
    hidden = np.vectorize(ACTIVATIONS[activation])(x @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(f(params, jnp.asarray(x)), hidden @ last["kernel"] + last["bias"], atol=2e-6)


def test_kernels_have_variance_one_over_fan_in():
    init, _ = make_mlp((400, 3))
    params = init(jax.random.key(0), 100)
    assert abs(float(params["Dense_0"]["kernel"].var()) * 100 - 1) < 0.05
    assert not params["Dense_0"]["bias"].any()
    assert abs(float(params["Dense_1"]["kernel"].var()) * 400 - 1) < 0.2
