"""Outputs that change with the rest of the batch are told from those that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.kernels import empirical_ntk
from jaxft.kernels.batch_dependence import output_changes, require_independent_outputs, require_small

REFUSED = "outputs of an example must not depend on the rest of its batch"


def normalised(w, x):
    """By statistics of the batch."""
    hidden = jnp.matmul(x, w)
    centred = hidden - hidden.mean(axis=0, keepdims=True)
    return (centred / jnp.sqrt((centred**2).mean(axis=0, keepdims=True) + 1e-3)).sum(axis=1)


def slightly_mixed(w, x):
    return jnp.tanh(jnp.matmul(x, w)) + 3e-3 * jnp.matmul(x, w).mean(axis=0, keepdims=True)


def averaged(w, x):
    """The share of an example in a mean."""
    return jnp.tanh(jnp.matmul(x, w)) / x.shape[0]


def ordinary(w, x):
    return jnp.tanh(jnp.matmul(x, w)) + 1


def padded(w, x):
    """Depends on how an example is filled up, not on its neighbours."""
    return jnp.matmul(jnp.cumsum(x, axis=1), w).mean(axis=1) / x.shape[1]


def rounded_on_the_way(w, x):
    """Half precision within, and most of it cancels: what is left is largely rounding."""
    hidden = jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).astype(w.dtype)
    return hidden - jnp.matmul(x, w)


def arrays(dtype, n=5, width=33):
    draw = np.random.default_rng(0)
    return jnp.asarray(draw.normal(size=(width, 3)), dtype), jnp.asarray(draw.normal(size=(n, width)), dtype)


DTYPES = {"float32": jnp.float32, "float64": jnp.float64, "bfloat16": jnp.bfloat16}


@pytest.mark.parametrize(
    ("f", "dtype"),
    [(f, dtype) for f in (normalised, averaged) for dtype in DTYPES]
    + [(slightly_mixed, dtype) for dtype in ("float32", "float64")],
)
def test_outputs_that_depend_on_the_batch_are_refused(x64, f, dtype):
    w, x = arrays(DTYPES[dtype])
    with pytest.raises(UserError, match=f"empirical_ntk: {REFUSED}, got a relative change of"):
        empirical_ntk(f, w, x)
    with pytest.raises(UserError, match=f"somewhere: {REFUSED}"):
        require_independent_outputs("somewhere", f, w, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [ordinary, padded])
def test_outputs_of_examples_alone_are_not_refused(x64, f, dtype):
    w, x = arrays(DTYPES[dtype])
    require_independent_outputs("somewhere", f, w, x)
    assert output_changes(f, w, x).company == 0


def test_rounding_within_the_network_is_not_taken_for_dependence():
    w, x = arrays(jnp.float32)
    require_independent_outputs("somewhere", rounded_on_the_way, w, x)
    assert output_changes(rounded_on_the_way, w, x).company == 0


def test_the_change_is_that_of_the_outputs():
    """Of f = own + mean of the batch: (x0 - x2) / 2 with the last beside the first, and none with the batch's size."""
    x = jnp.array([[1.0], [5.0], [4.0]])
    changes = output_changes(lambda w, x: w * (x + x.mean(axis=0, keepdims=True)), jnp.float32(2.0), x)
    np.testing.assert_allclose(changes.company, 1.5 / 3.5, rtol=1e-6)
    assert changes.size == 0
    np.testing.assert_allclose(output_changes(averaged, *arrays(jnp.float32)).size, 0.5, rtol=1e-6)


def test_one_example_has_no_company_and_the_columns_stand_in_for_it(x64):
    w, x = arrays(jnp.float64)
    require_independent_outputs("somewhere", normalised, w, x[:1])
    assert empirical_ntk(normalised, w, x[:1]).shape == (1, 1)
    with pytest.raises(UserError, match=REFUSED):
        empirical_ntk(normalised, w, x[:1], x)


def test_traced_values_are_not_looked_at(x64):
    w, x = arrays(jnp.float64)
    kernel = jax.jit(lambda w: empirical_ntk(normalised, w, x))(w)
    assert kernel.shape == (5, 5)
    assert jax.vmap(lambda w: empirical_ntk(normalised, w, x))(w[None]).shape == (1, 5, 5)
    jax.jit(lambda w: require_independent_outputs("somewhere", normalised, w, x))(w)
    with pytest.raises(UserError, match=REFUSED):
        require_small("somewhere", output_changes(normalised, w, x))


def test_empty_rows_of_zeros_are_not_refused():
    w, x = arrays(jnp.float32)
    assert not np.asarray(empirical_ntk(lambda w, x: 0 * jnp.matmul(x, w), w, x)).any()
