"""Preference tuning of a decoder over 8 devices equals one device: data parallel, fully sharded, accumulated, LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxft.nn.decoder import decoder_config, init_decoder
from jaxft.nn.decoder_outputs import make_response_log_probs
from jaxft.nn.lora import init_lora, make_adapted_outputs
from jaxft.train import fully_shard, init_state, make_segment, replicate, shard_examples
from jaxft.tuning.objectives import PreferenceLabels, make_preference_objective
from jaxft.tuning.packing import make_response_batch
from jaxft.tuning.reference import reference_log_probs

CONFIG = decoder_config(
    "llama", vocab_size=16, width=16, layers=1, heads=2, mlp_width=32, max_positions=16, init_scale=0.2
)
LOG_PROBS = make_response_log_probs(CONFIG)
TX = optax.sgd(0.3)  # Adam would blow rounding up where a gradient is near 0
OBJECTIVE = make_preference_objective("dpo", beta=0.3, sft_weight=0.05)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def problem():
    draw = np.random.default_rng(0)
    prompts = [draw.integers(16, size=3).tolist() for _ in range(32)]
    responses = [[draw.integers(16, size=k).tolist() for k in draw.integers(1, 4, size=2)] for _ in range(32)]
    pairs = jax.tree.map(jnp.asarray, make_response_batch(prompts, responses))
    params = init_decoder(CONFIG, key=jax.random.key(0))
    labels = PreferenceLabels(reference_log_probs(LOG_PROBS, params, pairs, batch_size=16), pairs.mask.sum(axis=-1))
    index = jnp.asarray(np.stack([draw.permutation(32)[:16] for _ in range(4)]))
    return params, pairs, labels, index


@pytest.fixture(scope="module")
def single(problem):
    params, *rest = problem
    return make_segment(LOG_PROBS, OBJECTIVE, TX)(init_state(params, TX), *rest)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), a, b)


@pytest.mark.parametrize(("place", "accumulate"), [(replicate, 1), (replicate, 2), (fully_shard, 2)])
def test_sharded_preference_tuning_equals_single_device(mesh, problem, single, place, accumulate):
    params, pairs, labels, index = problem
    placed = place(init_state(params, TX), mesh)
    segment = make_segment(LOG_PROBS, OBJECTIVE, TX, mesh=mesh, accumulate=accumulate)
    pairs, labels = shard_examples((pairs, labels), mesh)
    after, losses = segment(placed, pairs, labels, replicate(index, mesh))
    assert_close((after, losses), single)
    kept = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), placed, after)
    assert all(jax.tree.leaves(kept))


def test_adapters_of_a_fully_sharded_network_equal_single_device(mesh, problem):
    params, *rest = problem
    adapted = jax.tree_util.tree_map_with_path(lambda path, _: "mlp" in str(path) and "kernel" in str(path), params)
    state = init_state(init_lora(params, adapted, rank=2, key=jax.random.key(1)), TX)
    f = make_adapted_outputs(LOG_PROBS)
    alone = make_segment(f, OBJECTIVE, TX, frozen=params)(state, *rest)
    frozen = fully_shard(params, mesh)
    segment = make_segment(f, OBJECTIVE, TX, mesh=mesh, frozen=frozen, accumulate=2)
    assert_close(segment(replicate(state, mesh), *rest), alone)
    assert not jax.tree.leaves(frozen)[0].sharding.is_fully_replicated


def test_sharded_reference_equals_single_device(mesh, problem):
    params, pairs, labels, _ = problem
    odd = jax.tree.map(lambda x: x[:29], pairs)
    measured = reference_log_probs(LOG_PROBS, fully_shard(params, mesh), odd, batch_size=16, mesh=mesh)
    np.testing.assert_allclose(measured, labels.reference[:29], rtol=1e-5)


def test_parts_that_do_not_split_over_the_devices_are_refused(mesh, problem):
    params, *rest = problem
    segment = make_segment(LOG_PROBS, OBJECTIVE, TX, mesh=mesh, accumulate=4)
    said = r"split into 4 parts over the 8 devices of axis 'data', got 16 examples\. Use a multiple of 32"
    with pytest.raises(ValueError, match=said):
        segment(init_state(params, TX), *rest)
    with pytest.raises(ValueError, match="multiple of the 8 devices of axis 'data', got 12"):
        reference_log_probs(LOG_PROBS, params, rest[0], batch_size=12, mesh=mesh)
