"""One small network for the whole family: two layers, tanh, three outputs, with and without a nested tree."""

from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest


class Problem(NamedTuple):
    f: object
    params: dict
    x: object
    y: object


def network(params, x):
    hidden = jnp.tanh(jnp.matmul(x, params["in"]["w"], precision="highest") + params["in"]["b"][None])
    return jnp.matmul(hidden, params["out"], precision="highest")


def scalar_network(params, x):
    return network(params, x)[:, 0]


def make_problem(dtype, f=network) -> Problem:
    draw = np.random.default_rng(0).normal
    params = {"in": {"w": draw(size=(4, 5)), "b": draw(size=5)}, "out": draw(size=(5, 3))}
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
    return Problem(f, params, jnp.asarray(draw(size=(7, 4)), dtype), jnp.asarray(draw(size=(5, 4)), dtype))


@pytest.fixture
def problem(x64):
    return make_problem(jnp.float64)


@pytest.fixture
def scalar_problem(x64):
    return make_problem(jnp.float64, scalar_network)


@pytest.fixture
def problem32():
    return make_problem(jnp.float32)


@pytest.fixture
def preconditioner(problem):
    draw = np.random.default_rng(1).uniform
    return jax.tree.map(lambda a: jnp.asarray(draw(0.5, 2.0, size=a.shape)), problem.params)


def dense_jacobian(f, params, x) -> np.ndarray:
    """(n, c, p) by central differences, one parameter at a time: independent of any derivative rule."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    step = 1e-5
    columns = []
    for k in range(flat.size):
        high, low = (f(unravel(flat.at[k].add(s * step)), x) for s in (1.0, -1.0))
        columns.append(np.asarray((high - low) / (2 * step)))
    return np.stack(columns, axis=-1)


@pytest.fixture
def dense():
    return dense_jacobian
