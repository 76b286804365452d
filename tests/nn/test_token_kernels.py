"""Kernels of the log-probabilities of tokens, ``[n, t, m, t']``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.factors import map_outputs
from jaxft.core.types import TokenBatch
from jaxft.kernels import empirical_ntk
from jaxft.kernels.ntk import MethodName
from jaxft.nn import EncoderConfig, init_encoder
from jaxft.nn.token_outputs import make_token_log_probs

CONFIG = EncoderConfig("bert", 11, 4, 1, 2, 6, 9, 2, 1e-5, pad_id=0)
TOKENS = 9  # more outputs than are pulled back one by one
LENGTHS = ((9, 5), (7, 2))


def make_arrays():
    draw = np.random.default_rng(0)
    params = init_encoder(CONFIG, key=jax.random.key(0), mlm=True)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.3 * draw.normal(size=leaf.shape), jnp.float64), params)

    def batch(lengths):
        mask = np.arange(TOKENS)[None] < np.array(lengths)[:, None]
        ids = np.where(mask, draw.integers(1, 11, size=mask.shape), 0)
        places = (ids, mask, np.zeros_like(ids), np.zeros(len(ids)))
        return TokenBatch(*(jnp.asarray(a, jnp.int32) for a in places))

    return params, *map(batch, LENGTHS)


@pytest.fixture
def arrays(x64):
    return make_arrays()


@functools.cache
def expected_kernel():
    """Of Jacobians by forward derivatives: no backward pass, and no factor."""
    with jax.enable_x64(True):
        params, x, y = make_arrays()
        f = make_token_log_probs(CONFIG)
        trees = jax.jit(jax.jacfwd(lambda p: (f(p, x), f(p, y))))(params)
        left, right = (
            np.concatenate([np.reshape(leaf, (*leaf.shape[:2], -1)) for leaf in jax.tree.leaves(tree)], axis=2)
            for tree in trees
        )
    return np.einsum("ncp,mdp->ncmd", left, right)


@pytest.mark.parametrize("method", ["auto", "tiled", "ghost", "contraction"])
def test_kernel_of_tokens_equals_that_of_dense_jacobians(arrays, method: MethodName):
    expected, (params, x, y) = expected_kernel(), arrays
    kernel = empirical_ntk(make_token_log_probs(CONFIG), params, x, y, method=method)
    assert kernel.shape == (2, TOKENS, 2, TOKENS)
    np.testing.assert_allclose(kernel, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_rows_and_columns_at_padding_are_zero_and_no_others(arrays):
    params, x, y = arrays
    kernel = np.asarray(empirical_ntk(make_token_log_probs(CONFIG), params, x, y, method="tiled"))
    rows, columns = (np.asarray(side.attention_mask) > 0 for side in (x, y))
    np.testing.assert_array_equal(kernel != 0, rows[:, :, None, None] & columns[None, None])


def test_sum_over_tokens_is_the_kernel_of_the_summed_log_probability(arrays):
    params, x, y = arrays
    f = make_token_log_probs(CONFIG)
    total = empirical_ntk(map_outputs(f, lambda out: out.sum(axis=1)), params, x, y)
    by_token = empirical_ntk(f, params, x, y, method="tiled")
    np.testing.assert_allclose(np.einsum("ncmd->nm", by_token), total, rtol=1e-10)
