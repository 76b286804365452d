import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.trees import tree_combine, tree_partition
from jaxft.kernels import output_jacobian, parameter_mask

TREE = {
    "encoder": {
        "embeddings": {"token": jnp.ones((5, 2)), "norm": {"bias": jnp.ones(2), "scale": jnp.ones(2)}},
        "layers": {"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "lora_a": jnp.ones((2, 1))}},
    },
    "classifier": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}


def chosen(mask) -> set[str]:
    found = jax.tree_util.tree_leaves_with_path(mask)
    return {"/".join(k.key for k in path) for path, flag in found if flag}


@pytest.mark.parametrize(
    ("subset", "names"),
    [
        ("bitfit", {"encoder/embeddings/norm/bias", "encoder/layers/mlp/bias", "classifier/bias"}),
        ("head", {"classifier/kernel", "classifier/bias"}),
        ("adapters", {"encoder/layers/mlp/lora_a"}),
    ],
)
def test_subset_holds_its_leaves_alone(subset, names):
    assert chosen(parameter_mask(TREE, subset)) == names


def test_without_embeddings_is_all_but_the_embeddings():
    assert chosen(parameter_mask(TREE, "all")) - chosen(parameter_mask(TREE, "without_embeddings")) == {
        "encoder/embeddings/token",
        "encoder/embeddings/norm/bias",
        "encoder/embeddings/norm/scale",
    }


def test_patterns_are_taken_together():
    mask = parameter_mask(TREE, only=["bias$", "kernel$"], without=["^classifier", "norm"])
    assert chosen(mask) == {"encoder/layers/mlp/kernel", "encoder/layers/mlp/bias"}


def test_partition_and_combine_are_inverse():
    mask = parameter_mask(TREE, "bitfit")
    parts = tree_partition(TREE, mask)
    assert [len(jax.tree.leaves(part)) for part in parts] == [3, 5]
    assert jax.tree.all(jax.tree.map(np.array_equal, tree_combine(*parts), TREE))


def test_masked_jacobian_is_the_part_of_the_whole(problem):
    f, params, x, _ = problem
    whole = output_jacobian(f, params, x)
    part = output_jacobian(f, params, x, param_mask=parameter_mask(params, only=["^in/b$"]))
    assert part["out"] is None
    assert part["in"]["w"] is None
    np.testing.assert_array_equal(part["in"]["b"], whole["in"]["b"])
