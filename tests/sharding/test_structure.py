import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.lab.devices import make_mesh
from jaxft.structure.inside_outside import inside_outside, log_partition
from jaxft.structure.pcfg import random_pcfg, to_sparse


def problem(method):
    grammar = random_pcfg(jax.random.key(0), 2, 3, 5, rules_per_nonterminal=12)
    draw = np.random.default_rng(0)
    words, lengths = jnp.asarray(draw.integers(0, 5, (8, 5))), jnp.asarray(draw.integers(0, 6, 8))
    return to_sparse(grammar) if method == "sparse" else grammar, words, lengths


@pytest.mark.parametrize("method", ["scaled", "sparse"])
def test_sharded_posteriors_and_counts_equal_single_device(method):
    grammar, words, lengths = problem(method)
    single = inside_outside(grammar, words, lengths, method=method, counts=True)
    mesh = make_mesh({"data": 8})
    sharded = inside_outside(grammar, words, lengths, method=method, counts=True, mesh=mesh)
    assert len(sharded.span.sharding.device_set) == 8
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_gradient_over_spread_sentences_equals_single_device():
    grammar, words, lengths = problem("scaled")
    spread = jax.device_put((words, lengths), NamedSharding(make_mesh({"data": 8}), PartitionSpec("data")))

    @jax.jit
    def gradient(grammar, words, lengths):
        def total(grammar):
            log_z = log_partition(grammar, words, lengths)
            return jnp.where(log_z > -jnp.inf, log_z, 0).sum()

        return jax.grad(total)(grammar)

    single, sharded = gradient(grammar, words, lengths), gradient(grammar, *spread)
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
