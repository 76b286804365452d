"""Scores and Gram matrices of preference pairs over a mesh equal those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxft.nn.decoder import decoder_config, init_decoder, unembedding_table
from jaxft.nn.decoder_outputs import make_response_log_probs, make_response_states
from jaxft.tuning.ches import ches_scores
from jaxft.tuning.packing import make_response_batch
from jaxft.tuning.preference_gram import preference_gram


@pytest.fixture(scope="module")
def problem():
    config = decoder_config("gpt2", vocab_size=11, width=8, layers=1, heads=2, mlp_width=12, max_positions=16)
    ids = np.random.default_rng(0).integers(11, size=(10, 8)).tolist()
    batch = make_response_batch([row[:3] for row in ids], [[row[3:5], row[5:]] for row in ids])
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    return config, init_decoder(config, key=jax.random.key(0)), jax.tree.map(jnp.asarray, batch), mesh


def test_scores_over_a_mesh_equal_those_of_one_device(problem):
    config, params, batch, mesh = problem
    f = make_response_states(config)
    exact = {"coefficients": "exact", "table": unembedding_table(config, params)}
    for options in ({}, exact):
        single = ches_scores(f, params, batch, batch_size=4, **options)
        spread = ches_scores(f, params, batch, batch_size=4, mesh=mesh, **options)
        np.testing.assert_allclose(spread, single, rtol=1e-5, atol=1e-5)


def test_grams_over_a_mesh_equal_those_of_one_device(problem):
    config, params, batch, mesh = problem
    f = make_response_log_probs(config)
    np.testing.assert_allclose(
        preference_gram(f, params, batch, mesh=mesh), preference_gram(f, params, batch), rtol=1e-5, atol=1e-6
    )
