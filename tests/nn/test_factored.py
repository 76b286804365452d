"""Taps and records give the gradients, of every model and of modules that others write."""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import path_name
from jaxft.core.factors import FactoredFn
from jaxft.core.types import TokenBatch
from jaxft.nn import (
    EncoderConfig,
    init_classifier,
    init_encoder,
    make_class_logits,
    make_features,
    make_mlm_logits,
    make_mlp,
    make_prompt_logits,
    make_tied_logits,
)
from jaxft.nn.factored import factored, linen_outputs
from jaxft.nn.tape import TAP_AXES, tape_of
from jaxft.nn.token_outputs import make_token_log_probs

LABELS = (7, 3, 11)
BUILDERS = {
    "mlm": make_mlm_logits,
    "prompt": lambda config: make_prompt_logits(config, LABELS),
    "tied": lambda config: make_tied_logits(config, LABELS),
    "features": lambda config: make_features(config, pooling="mean"),
    "class": make_class_logits,
    "token": make_token_log_probs,
}
DENSE = {f"encoder/layers/attention/{name}/kernel" for name in ("query", "key", "value", "output")}
DENSE |= {f"encoder/layers/mlp/{name}/kernel" for name in ("in", "out")}
ROWS = {f"encoder/embeddings/{name}" for name in ("token", "position", "token_type")}
HEADS = {"mlm": {"mlm/dense/kernel"}, "prompt": {"mlm/dense/kernel"}, "token": {"mlm/dense/kernel"}}
HEADS |= {"class": {"classifier/kernel"}}
USES_OF_THE_TOKEN_TABLE = {"mlm": ["rows", "transposed"], "token": ["rows", "transposed"]}
USES_OF_THE_TOKEN_TABLE |= {"prompt": ["rows", "rows"], "tied": ["rows", "rows"]}


def make_problem(family: Literal["bert", "roberta"] = "bert", *, scan_layers=True):
    """A tiny encoder, its parameters in float64 and one example with padding."""
    pad = int(family == "roberta")
    config = EncoderConfig(family, 13, 8, 2, 2, 12, 9, 2, 1e-5, pad_id=pad, scan_layers=scan_layers)
    draw = np.random.default_rng(0)
    params = init_encoder(config, key=jax.random.key(0), mlm=True)
    params["classifier"] = init_classifier(8, 3, key=jax.random.key(1))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.3 * draw.normal(size=leaf.shape)), params)
    # A token that comes twice, and the mask at none of the ends.
    ids = [[5, 7, 5, 2, pad, pad]]
    arrays = (ids, [[1, 1, 1, 1, 0, 0]], [[0, 0, 1, 1, 0, 0]], [2])
    return config, params, TokenBatch(*(jnp.asarray(x, jnp.int32) for x in arrays))


def leaves_of(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def one_output(out):
    """Some output of one example, all entries of it told apart."""
    return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)).sum()


def gradient_of_uses(tap, record, cotangent, leaf):
    """What one use of a leaf adds to its gradient, as the table of ``jaxft.core.factors`` says."""
    if tap.kind == "rows":
        stack = int(np.prod(leaf.shape[:-2]))
        assert 0 <= np.min(record) <= np.max(record) < leaf.shape[-2]
        ids, g = (np.asarray(a).reshape(stack, -1, *end) for a, end in ((record, ()), (cotangent, leaf.shape[-1:])))
        out = np.zeros((stack, *leaf.shape[-2:]))
        for k in range(stack):
            np.add.at(out[k], ids[k], g[k])
        return out.reshape(leaf.shape)
    d_in, d_out = record.shape[-1], tap.shape[-1]
    stack = leaf.size // (d_in * d_out)
    x, g = (np.asarray(a).reshape(stack, -1, d) for a, d in ((record, d_in), (cotangent, d_out)))
    first, second = (x, g) if tap.kind == "dense" else (g, x)
    return np.einsum("lri,lro->lio", first, second).reshape(leaf.shape)


def assert_taps_give_the_gradients(f, params, x, *, tapped):
    """The leaves with taps are ``tapped``, and taps and records give what ``jax.grad`` gives."""
    taps = f.taps(params, x)
    assert {tap.leaf for tap in taps.values()} == tapped
    zeros = {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in taps.items()}

    @jax.jit
    def run(zeros):
        def shown(zeros):
            out, records = f.tapped(params, x, zeros)
            return one_output(out), records

        return jax.grad(shown, has_aux=True)(zeros)

    cotangents, records = run(zeros)
    assert list(records) == list(taps)
    leaves, dense = leaves_of(params), leaves_of(jax.jit(jax.grad(lambda p: one_output(f(p, x))))(params))
    total = {}
    for name, tap in taps.items():
        each = gradient_of_uses(tap, records[name], cotangents[name], leaves[tap.leaf])
        total[tap.leaf] = total.get(tap.leaf, 0) + each
    for leaf, found in total.items():
        scale = np.abs(dense[leaf]).max()
        assert scale > 0 or leaf == "unused"
        np.testing.assert_allclose(found, dense[leaf], atol=1e-12 * max(1.0, scale), err_msg=leaf)
    return taps


CASES = [*(("bert", name, True) for name in BUILDERS), ("roberta", "prompt", False)]


@pytest.mark.parametrize(("family", "name", "scan_layers"), CASES)
def test_every_matrix_of_an_encoder_has_its_gradient(family, name, scan_layers, x64):
    config, params, one = make_problem(family, scan_layers=scan_layers)
    f = BUILDERS[name](config)
    assert isinstance(f, FactoredFn)
    taps = assert_taps_give_the_gradients(f, params, one, tapped=DENSE | ROWS | HEADS.get(name, set()))
    uses = sorted(tap.kind for tap in taps.values() if tap.leaf == "encoder/embeddings/token")
    assert uses == USES_OF_THE_TOKEN_TABLE.get(name, ["rows"])


def test_every_matrix_of_an_mlp_has_its_gradient(x64):
    init, f = make_mlp((5, 4, 2), activation="tanh", dropout_frac=0.5)
    params = init(jax.random.key(0), 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3)))
    assert_taps_give_the_gradients(f, params, x, tapped={f"Dense_{i}/kernel" for i in range(3)})
    assert float(jnp.abs(f(params, x, key=jax.random.key(1)) - f(params, x)).max()) > 0


class Own(nn.Module):
    """Attention, a tied decoder, axes that are no matrix yet, and a layer that comes twice."""

    @nn.compact
    def __call__(self, ids):
        table, twice = nn.Embed(7, 8, name="table"), nn.Dense(8, name="twice")
        kind = nn.Embed(1, 8, name="kind")
        x = table(ids) + kind(ids)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        x = twice(jnp.tanh(twice(x)))
        x = nn.DenseGeneral((2, 3), axis=-1, name="split")(x)
        x = nn.DenseGeneral(8, axis=(-1, 1), name="crossed")(x)
        x = nn.LayerNorm(name="norm")(x)
        return table.attend(x).sum(axis=1)


IDS = jnp.array([[3, 0, -1]])
"""A number below 0 counts from the end of the table, as in ``nn.Embed``."""


def init(module, x, seed=0):
    params = module.init(jax.random.key(seed), x)["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.2 * draw.normal(size=leaf.shape)), params)


def test_every_matrix_of_a_module_of_ones_own_has_its_gradient(x64):
    attention = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    tapped = {"table/embedding", "kind/embedding", "twice/kernel", "split/kernel", "crossed/kernel"} | attention
    taps = assert_taps_give_the_gradients(linen_outputs(Own()), init(Own(), IDS), IDS, tapped=tapped)
    assert [name for name, tap in taps.items() if tap.leaf == "twice/kernel"] == [
        "Own/twice/dense.0",
        "Own/twice/dense.1",
    ]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(3, name="dense")(jnp.tanh(x)), None


class Lifted(nn.Module):
    """Layers in a loop, with and without the collections, stacked, shared, rematerialized, mapped and compiled."""

    @nn.compact
    def __call__(self, x):
        def loop(name, **options):
            scanned = nn.scan(Block, split_rngs={"params": True}, length=4, **options)
            return scanned(name=name)(x)[0]

        x = loop("stacked", variable_axes={"params": 0, **TAP_AXES})
        x = loop("other_axis", variable_axes={"params": 1, **TAP_AXES})
        x = loop("taps_at_the_end", variable_axes={"params": 0, **dict.fromkeys(TAP_AXES, -1)})
        x = loop("dropped", variable_axes={"params": 0})
        shared = nn.scan(
            Block, variable_broadcast="params", variable_axes={**TAP_AXES}, split_rngs={"params": False}, length=4
        )
        x = shared(name="shared")(x)[0]
        x = nn.remat(nn.Dense)(3, name="remat")(x)
        x = nn.jit(nn.Dense)(3, name="jit")(jnp.tanh(x))
        mapped = nn.vmap(nn.Dense, variable_axes={"params": 0, **TAP_AXES}, split_rngs={"params": True})
        return mapped(2, name="mapped")(jnp.stack([x, x]))[:, :, 0].T


def test_lifted_modules_have_taps_where_they_pass_them_on(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3)))
    tapped = {"stacked/dense/kernel", "shared/dense/kernel", "remat/kernel", "jit/kernel", "mapped/kernel"}
    taps = assert_taps_give_the_gradients(linen_outputs(Lifted()), init(Lifted(), x), x, tapped=tapped)
    shapes = {tap.leaf: tap.shape for tap in taps.values()}
    assert shapes["stacked/dense/kernel"] == (4, 1, 3)
    assert shapes["mapped/kernel"] == (2, 1, 2)


def applied(module, x):
    return module(x)


def half_of(pull, cotangent):
    """A derivative that is not that of the function."""
    variables, *inputs = pull(cotangent)
    return jax.tree.map(lambda g: g / 2, variables), *inputs


class Replacing(nn.Module):
    """Its kernel is the leaf in the first turn of a loop alone."""

    @nn.compact
    def __call__(self, carry):
        x, kernel = carry
        return (jnp.tanh(tape_of(self).dense(x, kernel)), jnp.eye(3)), None


class Reused(nn.Module):
    """Uses that no tap sees, of one leaf each: its gradient is not that of its uses with taps."""

    @nn.compact
    def __call__(self, x):
        seen = nn.Dense(3, name="seen")
        by_hand = nn.Dense(3, name="by_hand")
        x = by_hand(seen(x))
        x = x @ by_hand.variables["params"]["kernel"]
        x = nn.WeightNorm(nn.Dense(3, name="normalized"))(x)
        branched = nn.Dense(3, name="branched")
        x = branched(x)
        kernel = branched.variables["params"]["kernel"]
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ kernel, lambda x: x, x)
        carried = self.param("carried", nn.initializers.normal(1.0), (3, 3))
        loop = nn.scan(Replacing, variable_axes={**TAP_AXES}, split_rngs={}, length=2)
        x = loop(name="loop")((x, carried))[0][0]
        halved = nn.custom_vjp(applied, forward_fn=functools.partial(nn.vjp, applied), backward_fn=half_of)
        x = halved(nn.Dense(3, name="own_derivative"), x)
        replaced = nn.Dense(3, dot_general=lambda *a, **b: 2 * jax.lax.dot_general(*a, **b), name="replaced")
        x = replaced(x)
        batched = nn.DenseGeneral(3, batch_dims=(0,), name="batched")
        return batched(x)


def test_a_leaf_with_another_use_has_no_tap(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3)))
    assert_taps_give_the_gradients(linen_outputs(Reused()), init(Reused(), x), x, tapped={"seen/kernel"})


def test_a_leaf_with_another_use_out_of_the_tape_has_no_tap(x64):
    def outputs(params, x, tape):
        same = jax.jit(lambda w: w)(params["c"])
        out = tape.dense(x, params["a"]) + tape.dense(x, params["b"]) * params["b"][:1]
        return out + tape.dense(x, params["c"]) * same[:1]

    params = {name: jnp.ones((2, 2)) for name in ("a", "b", "c", "unused")}
    assert_taps_give_the_gradients(factored(outputs), params, jnp.array([[1.0, 2.0]]), tapped={"a"})


def test_leaves_of_one_path_have_no_tap(x64):
    def outputs(params, x, tape):
        return tape.dense(tape.dense(x, params["a/b"]), params["a"]["b"]) + tape.dense(x, params["c"])

    params = {"a/b": jnp.eye(2), "a": {"b": 2 * jnp.eye(2)}, "c": 3 * jnp.eye(2)}
    assert {tap.leaf for tap in factored(outputs).taps(params, jnp.ones((1, 2))).values()} == {"c"}
    assert factored(lambda params, x, tape: x).taps({}, jnp.ones((1, 2))) == {}


class ByHand(nn.Module):
    @nn.compact
    def __call__(self, ids):
        tape = tape_of(self)
        table = self.param("table", nn.initializers.normal(1.0), (5, 3))
        kernel = self.param("kernel", nn.initializers.normal(1.0), (3, 3))
        return jnp.tanh(tape.transposed(tape.dense(tape.rows(table, ids), kernel), table)).sum(axis=1)


def test_products_of_a_module_go_through_its_tape(x64):
    params = init(ByHand(), IDS)
    taps = assert_taps_give_the_gradients(linen_outputs(ByHand()), params, IDS, tapped={"table", "kernel"})
    assert list(taps) == ["ByHand/dense.0", "ByHand/rows.0", "ByHand/transposed.0"]
    variables, applied = ByHand().init(jax.random.key(0), IDS), ByHand().apply({"params": params}, IDS, mutable=True)
    assert list(variables) == ["params"]
    assert list(applied[1]) == ["params"]


def test_a_module_applied_twice_has_the_taps_of_both_calls(x64):
    module, x = nn.Dense(3), jnp.array([[1.0, 2.0, 3.0]])
    f = factored(lambda params, x, tape: tape.apply(module, params, jnp.tanh(tape.apply(module, params, x))))
    taps = assert_taps_give_the_gradients(f, init(module, x), x, tapped={"kernel"})
    assert sorted(taps) == ["Dense.1/dense.0", "Dense/dense.0"]
    # Both calls are one program: its tap would be in two places.
    compiled = nn.jit(nn.Dense)(3)
    f = factored(lambda params, x, tape: tape.apply(compiled, params, jnp.tanh(tape.apply(compiled, params, x))))
    assert_taps_give_the_gradients(f, init(module, x), x, tapped=set())


def test_constants_and_options_reach_the_module(x64):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, scale=1.0):
            return scale * nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))

    x = jnp.array([[1.0, 2.0]])
    params = init(Normed(), x)
    stats = {"BatchNorm_0": {"mean": jnp.array([1.0, -1.0]), "var": jnp.array([4.0, 9.0])}}
    f = linen_outputs(Normed(), select=lambda out: out[:, 0], constants={"batch_stats": stats}, scale=2.0)
    expected = np.asarray(Normed().apply({"params": params, "batch_stats": stats}, x, scale=2.0))
    np.testing.assert_array_equal(f(params, x), expected[:, 0])
    assert_taps_give_the_gradients(f, params, x, tapped={"Dense_0/kernel"})


def zeros_of(f, params, x):
    return {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in f.taps(params, x).items()}


@pytest.mark.parametrize("name", ["prompt", "class"])
def test_taps_of_zeros_leave_the_outputs_as_they_are(name):
    config, params, one = make_problem()
    f = BUILDERS[name](config)
    np.testing.assert_array_equal(f.tapped(params, one, zeros_of(f, params, one))[0], f(params, one))


def test_taps_may_be_left_out():
    config, params, one = make_problem()
    f = make_prompt_logits(config, LABELS)
    zeros = zeros_of(f, params, one)
    every = f.tapped(params, one, zeros)[1]
    some = ["mlm/rows.0", "encoder/layers/mlp/in/dense.0"]
    out, records = f.tapped(params, one, {name: zeros[name] for name in some})
    assert list(records) == some
    for name in some:
        np.testing.assert_array_equal(records[name], every[name])
    np.testing.assert_array_equal(out, f(params, one))
    assert f.tapped(params, one, {})[1] == {}


def test_a_tap_is_what_is_added_to_an_output():
    f = factored(lambda params, x, tape: tape.dense(x, params["w"]) ** 2)
    out, records = f.tapped({"w": jnp.eye(2)}, jnp.array([[1.0, 2.0]]), {"dense.0": jnp.array([[10.0, 20.0]])})
    assert out.tolist() == [[121.0, 484.0]]
    assert records["dense.0"].tolist() == [[1.0, 2.0]]


def test_functions_of_examples_are_mapped_and_compiled_with_taps():
    config, params, one = make_problem()
    f = make_class_logits(config)
    both = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)._replace(
        input_ids=jnp.array([[5] * 6, [3] * 6])
    )
    zeros = zeros_of(f, params, one)

    def of_one(example):
        return f.tapped(params, jax.tree.map(lambda leaf: leaf[None], example), zeros)

    out, records = jax.jit(jax.vmap(of_one))(both)
    np.testing.assert_allclose(out[:, 0], f(params, both), atol=2e-6)
    assert records["encoder/embeddings/rows.0"][:, 0].tolist() == [[5] * 6, [3] * 6]
    assert records["encoder/layers/mlp/in/dense.0"].shape == (2, 2, 1, 6, 8)


def test_a_function_is_compiled_once_however_often_it_is_wrapped():
    traced = []

    def fn(params, x, tape, *, scale=1.0):
        """Said of it."""
        traced.append(scale)
        return scale * tape.dense(x, params)

    one, again = factored(fn), factored(fn)
    assert (one, hash(one), one.__name__, one.__doc__) == (again, hash(again), "fn", "Said of it.")
    assert one != factored(lambda params, x, tape: x)
    outputs = jax.jit(lambda f, params, x: f(params, x), static_argnums=0)
    for f in (one, again):
        assert outputs(f, jnp.ones((2, 1)), jnp.ones((1, 2))).tolist() == [[2.0]]
    assert traced == [1.0]
    assert jax.jit(one)(jnp.ones((2, 1)), jnp.ones((1, 2)), scale=3.0).tolist() == [[6.0]]


def test_products_in_bfloat16_are_recorded_in_it():
    module, x = nn.Dense(2, dtype=jnp.bfloat16), jnp.ones((1, 3))
    f = linen_outputs(module, select=lambda out: out.astype(jnp.float32))
    params = module.init(jax.random.key(0), x)["params"]
    ((name, tap),) = f.taps(params, x).items()
    assert tap.dtype == jnp.bfloat16
    assert f.tapped(params, x, {name: jnp.zeros(tap.shape, tap.dtype)})[1][name].dtype == jnp.bfloat16
