"""Digests agree for the same mathematics and tell every difference that changes a kernel."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.factors import map_outputs
from jaxft.core.types import TokenBatch
from jaxft.kernels.digests import function_digest, problem_digests, tree_digest
from jaxft.nn.outputs import make_prompt_logits
from jaxft.nn.transformer import EncoderConfig, init_encoder

TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.float32(1)}}
OTHER_TREES = {
    "value": {**TREE, "a": TREE["a"] + 1},
    "last bit": {**TREE, "a": np.nextafter(TREE["a"], np.float32(9), dtype=np.float32)},
    "sign of zero": {**TREE, "a": np.copysign(TREE["a"], [[-1, 1, 1], [1, 1, 1]]).astype(np.float32)},
    "shape": {**TREE, "a": TREE["a"].reshape(3, 2)},
    "order": {**TREE, "a": TREE["a"][::-1]},
    "dtype": {**TREE, "a": TREE["a"].view(np.int32)},
    "path": {**TREE, "b": {"d": np.float32(1)}},
    "nesting": {**TREE, "b": np.float32(1)},
    "leaf more": {**TREE, "d": np.zeros(0, np.float32)},
}


@pytest.mark.parametrize("other", OTHER_TREES)
def test_another_tree_has_another_digest(other):
    assert tree_digest(OTHER_TREES[other]) != tree_digest(TREE)


def test_the_same_tree_has_the_same_digest_wherever_it_lies(tmp_path):
    np.save(tmp_path / "a.npy", TREE["a"])
    same = [
        jax.tree.map(jnp.asarray, TREE),
        jax.tree.map(np.copy, TREE),
        {**TREE, "a": np.asfortranarray(TREE["a"])},
        {**TREE, "a": np.repeat(TREE["a"], 2, 1)[:, ::2]},
        {**TREE, "a": np.load(tmp_path / "a.npy", mmap_mode="r")},
        dict(reversed(TREE.items())),
    ]
    assert {tree_digest(tree) for tree in same} == {tree_digest(TREE)}


def test_trees_of_any_dtype_have_digests():
    trees = [{"m": True}, {"m": False}, jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float16), jax.random.key(0)]
    assert len({tree_digest(tree) for tree in trees}) == len(trees)


W, X = {"w": jnp.ones((3, 2)), "steps": jnp.zeros((), jnp.int32)}, jnp.ones((4, 3))
CONSTANT = np.arange(2.0, dtype=np.float32)


def straight_through(scale):
    """The identity, with a derivative of its own."""

    @jax.custom_vjp
    def f(x):
        return x * 1.0

    f.defvjp(lambda x: (f(x), None), lambda _, t: (scale * t,))
    return f


TWICE, THRICE = straight_through(2.0), straight_through(3.0)


def network(p, x, constant=CONSTANT, power=2, inner=TWICE):
    hidden = jax.nn.relu(x @ p["w"]) * constant[None]
    return inner(jnp.where(hidden > 0, hidden, jnp.float32(0)) ** power)


class Callable:
    """A function that is an object, as a model may be."""

    def __call__(self, params, inputs):
        return network(params, inputs)


def test_the_same_function_written_elsewhere_has_the_same_digest():
    same = [
        network,
        lambda params, inputs: network(params, inputs),
        Callable(),
        partial(network, constant=CONSTANT.copy()),
    ]
    assert {function_digest(f, W, X) for f in same} == {function_digest(network, W, X)}
    assert function_digest(map_outputs(network, lambda out: out), W, X) == function_digest(network, W, X)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (W, X))
    assert function_digest(network, *shapes) == function_digest(network, W, X)


def test_names_of_compiled_functions_do_not_count():
    def one(p, x):
        return jnp.sin(x @ p["w"])

    def other(params, inputs):
        return jnp.sin(inputs @ params["w"])

    assert function_digest(jax.jit(one), W, X) == function_digest(jax.jit(other), W, X)


OTHER_FUNCTIONS = {
    "constant array": partial(network, constant=CONSTANT + 1),
    "number": partial(network, power=3),
    "derivative": partial(network, inner=THRICE),
    "output": map_outputs(network, lambda out: out[:, :1]),
    "operation": map_outputs(network, lambda out: -out),
    "other variable": lambda p, x: network({**p, "w": p["w"][::-1]}, x),
}


@pytest.mark.parametrize("other", OTHER_FUNCTIONS)
def test_another_function_has_another_digest(other):
    assert function_digest(OTHER_FUNCTIONS[other], W, X) != function_digest(network, W, X)


def test_another_shape_or_dtype_has_another_digest(x64):
    wide = {**W, "w": jnp.ones((3, 2), jnp.float64)}
    cases = [(W, X), (W, X[:2]), (wide, X.astype(jnp.float64))]
    assert len({function_digest(lambda p, x: x @ p["w"], *case) for case in cases}) == 3


CONFIG = EncoderConfig("bert", 9, 4, 2, 2, 8, 5, 2, 1e-12, pad_id=0)


def encoder_digest(config=CONFIG, labels=(3, 4)):
    params = jax.eval_shape(lambda key: init_encoder(config, key=key, mlm=True), jax.random.key(0))
    ids = jnp.array([[1, 2, 3]])
    batch = TokenBatch(ids, ids * 0 + 1, ids * 0, jnp.array([1]))
    with jax.numpy_dtype_promotion("standard"):
        return function_digest(make_prompt_logits(config, list(labels)), params, batch)


def test_settings_of_an_encoder_are_told_apart():
    configs = [CONFIG, dataclasses.replace(CONFIG, norm_eps=1e-5)]
    assert len({encoder_digest(), *map(encoder_digest, configs), encoder_digest(labels=(4, 3))}) == 3


def test_another_process_finds_the_same_digest():
    root = str(Path(__file__).parents[2])
    program = (
        "import sys, importlib.util; sys.path.insert(0, sys.argv[1])\n"
        "spec = importlib.util.spec_from_file_location('test_digests', sys.argv[2])\n"
        "tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)\n"
        "print(tests.encoder_digest(), tests.function_digest(tests.network, tests.W, tests.X))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, root, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [encoder_digest(), function_digest(network, W, X)]


def test_every_argument_of_a_problem_has_its_digest():
    f = lambda p, x: x @ p["w"]  # noqa: E731
    digests = problem_digests(f, W, X, None, preconditioner=W, param_mask={"w": True, "steps": False})
    assert set(digests) == {"jax", "function", "params", "x", "y", "preconditioner", "param_mask"}
    assert digests["y"] is None
    assert digests["params"] == digests["preconditioner"] == tree_digest(W)
    assert digests["function"] == function_digest(f, W, X[:1])
