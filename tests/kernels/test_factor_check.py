import jax
import jax.numpy as jnp
import pytest

from jaxft.core.checks import UserError
from jaxft.kernels.factor_check import check_factors
from tests.kernels.test_factored_ntk import MODELS, TinyModel, make_arrays


@pytest.mark.parametrize("f", MODELS.values(), ids=MODELS)
def test_factors_of_every_use_make_up_the_gradient(x64, f):
    params, x, _ = make_arrays(jnp.float64)
    errors = check_factors(f, params, x, key=jax.random.key(0))
    assert sorted(errors) == ["layers/w", "table"]
    assert max(errors.values()) < 1e-14


@pytest.mark.parametrize("decoder", ["rows", "transposed"])
def test_a_forgotten_use_of_a_tied_table_is_named(x64, decoder):
    params, x, _ = make_arrays(jnp.float64)
    with pytest.raises(UserError, match=r"factors must make up the gradient, got table \(relative error"):
        check_factors(TinyModel(decoder, tied=False), params, x, key=jax.random.key(0))


def test_a_function_without_taps_is_told_what_to_do():
    with pytest.raises(UserError, match="must have taps"):
        check_factors(lambda w, x: x @ w, jnp.ones(2), jnp.ones((1, 2)), key=jax.random.key(0))
