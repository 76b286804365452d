"""What a user of random projections and of LoRA, kernels and adapters, is told."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.kernels import lora_kernel, lora_kernel_variance, projected_kernel, random_projection
from jaxft.nn import init_lora, merge_lora

KEY = jax.random.key(0)
X = jnp.ones((4, 3))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
MATRIX = {"w": True, "b": False}
BOTH = {"w": True, "b": True}


def network(params, x):
    return x @ params["w"] + params["b"][None]


def projected(params=PARAMS, f=network, **options):
    return projected_kernel(f, params, X, **({"size": 2, "key": KEY} | options))


def lora(**options):
    return lora_kernel(network, PARAMS, X, **({"rank": 2, "key": KEY, "adapted": MATRIX} | options))


def variance(**options):
    return lora_kernel_variance(network, PARAMS, X, **({"rank": 2, "adapted": MATRIX} | options))


def adapters(a, b):
    return {"w": {"lora_a": jnp.ones(a), "lora_b": jnp.ones(b)}}


CASES = {
    "projection of size 0": ("random_projection", lambda: random_projection(PARAMS, 0, key=KEY), "at least 1, got 0"),
    "projection of nothing": ("random_projection", lambda: random_projection({}, 2, key=KEY), "must hold an array"),
    "unknown projection": (
        "random_projection",
        lambda: random_projection(PARAMS, 2, key=KEY, kind="gausian"),  # pyright: ignore[reportArgumentType]
        "Did you mean gaussian",
    ),
    "unknown kind": ("projected_kernel", lambda: projected(kind="sparse"), "unknown kind, got 'sparse'. Known: gauss"),
    "size 0": ("projected_kernel", lambda: projected(size=0), "size must be at least 1, got 0"),
    "one draw": ("projected_kernel", lambda: projected(draws=1), "draws must be at least 2, got 1"),
    "block of 0": ("projected_kernel", lambda: projected(block_size=0), "block_size must be at least 1"),
    "pooled outputs": ("projected_kernel", lambda: projected(f=lambda p, x: network(p, x).sum(0)), "one row an"),
    "nan parameters": ("projected_kernel", lambda: projected(PARAMS | {"b": jnp.full(2, jnp.nan)}), "infinity in b"),
    "mask of another tree": ("projected_kernel", lambda: projected(param_mask={"w": True}), "b (params alone)"),
    "lora of rank 0": ("lora_kernel", lambda: lora(rank=0), "rank must be at least 1, got 0"),
    "lora of one draw": ("lora_kernel", lambda: lora(draws=1), "draws must be at least 2, got 1"),
    "lora of a bias": ("lora_kernel", lambda: lora(adapted=BOTH), "two axes or more, got b (2,)"),
    "lora of nothing": ("lora_kernel", lambda: lora(adapted={"w": False, "b": False}), "must leave a parameter"),
    "variance of rank 0": ("lora_kernel_variance", lambda: variance(rank=0), "rank must be at least 1, got 0"),
    "variance of a bias": ("lora_kernel_variance", lambda: variance(adapted=BOTH), "two axes or more, got b (2,)"),
    "variance in blocks of 0": ("lora_kernel_variance", lambda: variance(block_size=0), "block_size must be at least"),
    "adapters of rank 0": ("init_lora", lambda: init_lora(PARAMS, MATRIX, rank=0, key=KEY), "rank must be at least 1"),
    "adapter of a bias": ("init_lora", lambda: init_lora(PARAMS, BOTH, rank=1, key=KEY), "or more, got b (2,)"),
    "adapters of another tree": ("init_lora", lambda: init_lora(PARAMS, {"w": True}, rank=1, key=KEY), "the tree of"),
    "no adapters": (
        "init_lora",
        lambda: init_lora(PARAMS, {"w": False, "b": False}, rank=1, key=KEY),
        "must mark a leaf",
    ),
    "two leaves of one path": (
        "init_lora",
        lambda: init_lora({"a": {"b": X}, "a/b": X}, {"a": {"b": True}, "a/b": True}, rank=1, key=KEY),
        "differ in their paths, got ['a/b']",
    ),
    "adapter of no leaf": (
        "merge_lora",
        lambda: merge_lora({"v": X}, adapters((4, 1), (1, 3))),
        "leaf of params, got ['w']. Known: ['v']",
    ),
    "transposed adapter": ("merge_lora", lambda: merge_lora(PARAMS, adapters((2, 1), (1, 3))), "got (2, 1) and (1, 3)"),
    "two ranks": ("merge_lora", lambda: merge_lora(PARAMS, adapters((3, 1), (2, 2))), "for w (3, 2)"),
}


@pytest.mark.parametrize("case", CASES)
def test_message_says_what_is_wrong(case):
    name, call, said = CASES[case]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(f"{name}: ")
    assert said in str(error.value)


def test_shape_faults_are_found_under_jit():
    with pytest.raises(ValueError, match="two axes or more"):
        jax.jit(lambda p: lora_kernel(network, p, X, rank=1, key=KEY, adapted=BOTH).kernel)(PARAMS)
