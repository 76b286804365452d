"""Training over 8 devices: data parallel and fully sharded equal one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxft.train import Checkpoints, cross_entropy, fully_shard, init_state, make_segment, replicate, shard_examples

TX = optax.adam(1e-2)


def mlp(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(5, 16)), "bias": rng.normal(size=16), "out": rng.normal(size=(16, 3))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    inputs = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(3, size=32), jnp.int32)
    index = jnp.asarray(np.stack([rng.permutation(32)[:16] for _ in range(6)]))
    return init_state(params, TX), inputs, labels, index


@pytest.fixture(scope="module")
def single(problem):
    return make_segment(mlp, cross_entropy, TX)(*problem)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), a, b)


@pytest.mark.parametrize("place_data", [replicate, shard_examples])
@pytest.mark.parametrize("place_state", [replicate, fully_shard])
def test_sharded_training_equals_single_device(mesh, problem, single, place_state, place_data):
    state, inputs, labels, index = problem
    placed = place_state(state, mesh)
    inputs, labels = place_data((inputs, labels), mesh)
    segment = make_segment(mlp, cross_entropy, TX, mesh=mesh)
    after, losses = segment(placed, inputs, labels, replicate(index, mesh))
    assert_close((after, losses), single)
    kept = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), placed, after)
    assert all(jax.tree.leaves(kept))


def test_state_keeps_its_placement_where_the_model_asks_for_another(mesh, problem):
    state, inputs, labels, index = problem

    def split_inside(params, x):
        split = NamedSharding(mesh, PartitionSpec("data"))
        return mlp(params | {"out": jax.lax.with_sharding_constraint(params["out"], split)}, x)

    segment = make_segment(split_inside, cross_entropy, TX, mesh=mesh)
    after, _ = segment(replicate(state, mesh), inputs, labels, index)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(after))


def test_fully_sharded_state_takes_an_eighth_of_the_memory(mesh, problem):
    placed = fully_shard(problem[0], mesh)
    assert placed.params["in"].sharding.spec == PartitionSpec(None, "data")
    assert placed.params["out"].sharding.spec == PartitionSpec("data")
    assert placed.opt_state[0].mu["in"].sharding.spec == PartitionSpec(None, "data")
    assert placed.step.sharding.is_fully_replicated
    for leaf in jax.tree.leaves(placed.params):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


def test_leaf_that_does_not_divide_is_replicated(mesh):
    placed = fully_shard({"a": jnp.ones((3, 5)), "b": jnp.ones((24, 8)), "c": jnp.ones((8, 8))}, mesh)
    assert placed["a"].sharding.is_fully_replicated
    assert placed["b"].sharding.spec == PartitionSpec("data")
    assert placed["c"].sharding.spec == PartitionSpec("data")


def test_batch_is_computed_in_parallel(mesh, problem):
    state, inputs, labels, index = problem
    seen = []

    def spy(params, x):
        jax.debug.inspect_array_sharding(x, callback=seen.append)
        return mlp(params, x)

    make_segment(spy, cross_entropy, TX, mesh=mesh)(replicate(state, mesh), inputs, labels, index)
    assert seen
    assert all(s.shard_shape((16, 5)) == (2, 5) for s in seen)


def test_checkpoint_restores_into_the_placement_of_like(mesh, problem, tmp_path):
    state = problem[0]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, fully_shard(state, mesh))
        whole = checkpoints.restore(1, state)
        split = checkpoints.restore(1, fully_shard(jax.tree.map(jnp.zeros_like, state), mesh))
    assert split.params["in"].sharding.spec == PartitionSpec(None, "data")
    for restored in (whole, split):
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_batch_that_does_not_split_is_refused_with_the_way_out(mesh, problem):
    state, inputs, labels, index = problem
    segment = make_segment(mlp, cross_entropy, TX, mesh=mesh)
    with pytest.raises(ValueError, match="split over the 8 devices of axis 'data', got 12 examples"):
        segment(state, inputs, labels, index[:, :12])
    with pytest.raises(ValueError, match=r"devices of axis 'data', got 30\. Pass 24 or 32 examples"):
        shard_examples(inputs[:30], mesh)
