from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.kernels import RankOne
from jaxft.train import adafactor_preconditioner, adam_preconditioner, second_moment

SHAPES = {"square": (4, 4), "wide": (3, 7), "tall": (7, 3), "stacked": (2, 5, 4), "vector": (6,), "small": (1, 5)}


def update_of(tx: optax.GradientTransformation, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    return tx.update(grads, state, params)


@pytest.fixture
def trees():
    rng = np.random.default_rng(0)
    draw = lambda: {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}  # noqa: E731
    return draw(), draw(), draw()


def test_adafactor_preconditioner_times_gradient_is_the_update_of_optax(trees):
    """The state after a step holds the moments that made its update."""
    params, first, second = trees
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    _, state = tx.update(first, tx.init(params), params)
    update, state = update_of(tx, second, state, params)
    p = adafactor_preconditioner(state, params)
    expected = jax.tree.map(jnp.multiply, p, second)
    for name in SHAPES:
        assert p[name].shape == SHAPES[name]
        np.testing.assert_allclose(update[name], expected[name], rtol=1e-5, err_msg=name)


def test_adafactor_preconditioner_is_found_in_nested_states_and_under_jit(trees):
    params, grads, _ = trees
    tx = optax.chain(optax.clip(1.0), optax.adafactor(1e-2, min_dim_size_to_factor=2))
    _, state = tx.update(grads, tx.init(params), params)
    p, traced = adafactor_preconditioner(state, params), jax.jit(adafactor_preconditioner)(state, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), p, traced))


def test_adam_preconditioner_times_first_moment_is_the_update_of_optax(trees):
    """Bias correction, eps and eps_root are those of the optimiser."""
    params, first, second = trees
    b1, b2, eps, eps_root = 0.9, 0.99, 1e-2, 1e-3
    tx = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    _, state = tx.update(first, tx.init(params), params)
    update, state = update_of(tx, second, state, params)
    p = adam_preconditioner(second_moment(state, b2=b2), eps=eps, eps_root=eps_root)
    moment = jax.tree.map(lambda a, b: (b1 * (1 - b1) * a + (1 - b1) * b) / (1 - b1**2), first, second)
    for name in SHAPES:
        np.testing.assert_allclose(update[name], p[name] * moment[name], rtol=1e-5, err_msg=name)


def test_adafactor_preconditioner_of_an_embedding_with_unused_rows_is_finite():
    params, grads = jnp.ones((300, 128)), jnp.zeros((300, 128)).at[3].set(1e-4)
    tx = optax.scale_by_factored_rms()
    update, state = update_of(tx, grads, tx.init(params), params)
    p = adafactor_preconditioner(state, params)
    assert bool(jnp.isfinite(p).all())
    np.testing.assert_allclose(update, p * grads, rtol=1e-5)


def test_factored_preconditioner_stands_for_the_same_diagonal(trees):
    params, grads, _ = trees
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    _, state = tx.update(grads, tx.init(params), params)
    dense, factored = (adafactor_preconditioner(state, params, factored=flag) for flag in (False, True))
    by_name = {name: p for name, p in factored.items() if isinstance(p, RankOne)}
    assert by_name
    for name, p in factored.items():
        whole = p.dense() if isinstance(p, RankOne) else p
        np.testing.assert_allclose(whole, dense[name], rtol=1e-6, err_msg=name)
