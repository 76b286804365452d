import subprocess
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import failing_leaves, leading_size, nonfinite_leaves, require_finite
from jaxft.core.rng import host_stream, stream
from jaxft.core.trees import tree_add, tree_axpy, tree_cast, tree_norm, tree_scale, tree_size, tree_sub, tree_vdot


@pytest.fixture
def trees():
    draw = np.random.default_rng(0).normal
    return [{"a": jnp.asarray(draw(size=(2, 3))), "b": [jnp.asarray(draw(size=4))]} for _ in range(2)]


def test_tree_operations_are_those_of_the_flat_vectors(trees):
    a, b = trees
    flat = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(tree)[0])  # noqa: E731
    u, v = flat(a), flat(b)
    np.testing.assert_allclose(flat(tree_add(a, b)), u + v)
    np.testing.assert_allclose(flat(tree_sub(a, b)), u - v)
    np.testing.assert_allclose(flat(tree_scale(0.3, a)), np.float32(0.3) * u, rtol=1e-6)
    np.testing.assert_allclose(flat(tree_axpy(2.0, a, b)), 2 * u + v, rtol=1e-6)
    np.testing.assert_allclose(tree_vdot(a, b), u @ v, rtol=1e-5)
    np.testing.assert_allclose(tree_norm(a), np.linalg.norm(u), rtol=1e-6)
    assert tree_size(a) == 10
    assert tree_cast({"x": jnp.ones(1), "i": jnp.ones(1, int)}, jnp.float16)["i"].dtype == jnp.int32


def test_streams_are_the_same_in_every_process():
    code = (
        "import jax; from jaxft.core.rng import *; "
        "print(jax.random.key_data(stream(jax.random.key(3), 'init', 2)).tolist(), "
        "host_stream(3, 'x', 1).integers(10**6))"
    )
    here = (
        f"{jax.random.key_data(stream(jax.random.key(3), 'init', 2)).tolist()} {host_stream(3, 'x', 1).integers(10**6)}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_faulty_leaves_are_named_even_inside_a_trace():
    tree = {"w": jnp.ones(2), "deep": {"b": jnp.array([1.0, jnp.inf])}}
    assert nonfinite_leaves(tree) == ["deep/b"]
    assert failing_leaves(lambda x: (x > 0).all(), {"a": -jnp.ones(1), "n": jnp.zeros(1, int)}) == ["a"]

    @jax.jit
    def traced(x):
        require_finite("f", tree, "tree")
        return x

    with pytest.raises(ValueError, match="deep/b"):
        traced(1.0)


def test_values_under_tracing_are_not_looked_at():
    def checked(x):
        require_finite("f", x, "x")
        return x

    assert jnp.isnan(jax.jit(checked)(jnp.array(jnp.nan)))
    with pytest.raises(ValueError, match="must be finite"):
        checked(jnp.array(jnp.nan))


def test_leading_size_is_common_to_all_leaves():
    assert leading_size("f", {"a": np.ones((3, 2)), "b": np.ones(3)}) == 3
    with pytest.raises(ValueError, match="leading axis"):
        leading_size("f", {"a": np.ones(3), "b": np.ones(2)})
