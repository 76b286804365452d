"""Kernels from factors: every route equals the kernel of dense Jacobians, on a small language model in plain jax."""

import dataclasses
import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.core.factors import FactoredFn, Tap, map_outputs
from jaxft.kernels import contrast_logits, empirical_ntk, logit_difference, parameter_mask
from jaxft.kernels.blocks import blocked_kernels
from jaxft.kernels.calls import KernelName, MethodName, prepare
from jaxft.kernels.preconditioners import RankOne

VOCABULARY, WIDTH, LAYERS, TOKENS = 11, 4, 2, 3
LABELS = (2, 5)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """Token table, stacked layers, and a decoder: the rows of label words (``rows``), or the table (``transposed``)."""

    decoder: str = "rows"
    tied: bool = True
    """Whether the decoder's use of the table has its tap, as it must."""

    def __call__(self, params, x):
        return self.tapped(params, x, {})[0]

    def taps(self, params, x):
        n, t = jax.tree.leaves(x)[0].shape[:2]
        kind = params["table"].dtype
        taps = {
            "in": Tap("table", "rows", (n, t, WIDTH), kind),
            "layers": Tap("layers/w", "dense", (LAYERS, n, t, WIDTH), kind),
        }
        if self.tied and self.decoder == "rows":
            taps["out"] = Tap("table", "rows", (len(LABELS), WIDTH), kind)
        if self.tied and self.decoder == "transposed":
            taps["out"] = Tap("table", "transposed", (n, VOCABULARY), kind)
        return taps

    def tapped(self, params, x, taps):
        added = lambda name, y: y + taps[name] if name in taps else y  # noqa: E731
        ids, mask = x["ids"], x["mask"]
        hidden, records = added("in", params["table"][ids]), []
        for k in range(LAYERS):
            records.append(hidden)
            y = jnp.matmul(hidden, params["layers"]["w"][k], precision="highest")
            y = y + taps["layers"][k] if "layers" in taps else y
            hidden = jnp.tanh(y + params["layers"]["b"][k][None, None])
        pooled = (hidden * mask[:, :, None]).sum(axis=1)
        everything = {"in": ids, "layers": jnp.stack(records), "out": pooled}
        if self.decoder == "rows":
            everything["out"] = jnp.asarray(LABELS)
            out = pooled @ added("out", params["table"][jnp.asarray(LABELS)]).T
        else:
            out = jnp.tanh(added("out", pooled @ params["table"].T))[:, :3]
        return out, {name: everything[name] for name in taps}


def make_arrays(dtype):
    draw = np.random.default_rng(0)
    params = {
        "table": draw.normal(size=(VOCABULARY, WIDTH)),
        "layers": {"w": draw.normal(size=(LAYERS, WIDTH, WIDTH)) / 2, "b": draw.normal(size=(LAYERS, WIDTH))},
    }

    def inputs(n):
        mask = np.arange(TOKENS)[None] < draw.integers(1, TOKENS + 1, size=n)[:, None]
        return {"ids": jnp.asarray(draw.integers(0, VOCABULARY, (n, TOKENS))), "mask": jnp.asarray(mask, dtype)}

    return jax.tree.map(lambda a: jnp.asarray(a, dtype), params), inputs(5), inputs(4)


@pytest.fixture
def arrays(x64):
    return make_arrays(jnp.float64)


@functools.cache
def dense_gradients(f):
    """``[n, c, p]`` of both sides, by central differences in float64."""
    with jax.enable_x64(True):
        params, x, y = make_arrays(jnp.float64)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        both = jax.jit(lambda v: (f(unravel(v), x), f(unravel(v), y)))
        step = 1e-6
        columns = [
            [np.asarray(high - low) / (2 * step) for high, low in zip(both(flat + e), both(flat - e), strict=True)]
            for e in step * jnp.eye(flat.size, dtype=flat.dtype)
        ]
        return tuple(np.stack(side, axis=-1) for side in zip(*columns, strict=True))


def preconditioner_of(params, *, rank_one=False):
    draw = np.random.default_rng(1).uniform
    table = RankOne(jnp.asarray(draw(0.5, 2.0, VOCABULARY)), jnp.asarray(draw(0.5, 2.0, WIDTH)))
    w = RankOne(jnp.asarray(draw(0.5, 2.0, (LAYERS, WIDTH))), jnp.asarray(draw(0.5, 2.0, (LAYERS, WIDTH))))
    p = {"table": table, "layers": {"w": w, "b": jnp.asarray(draw(0.5, 2.0, (LAYERS, WIDTH)))}}
    dense = {
        "table": table.dense(),
        "layers": {"w": w.dense(), "b": p["layers"]["b"]},
    }
    return p if rank_one else dense


def expected_kernel(f, kernel, params, keep=None):
    """The definition, on dense gradients; those of no size at all are 0, and so is their sign."""
    left, right = dense_gradients(f)
    p = np.asarray(jax.flatten_util.ravel_pytree(preconditioner_of(params))[0])
    sign = lambda j: np.where(np.abs(j) < 1e-9, 0, np.sign(j))  # noqa: E731
    rows = sign(left) if kernel == "signgd" else left
    columns = {"sgd": right, "preconditioned": right * p}.get(kernel, sign(right))
    keep = slice(None) if keep is None else keep
    return np.einsum("ncp,mdp->ncmd", rows[..., keep], columns[..., keep])


KERNELS: tuple[KernelName, ...] = ("sgd", "signgd", "asymmetric_signgd", "preconditioned")
MODELS = {"label words": TinyModel(), "decoder": TinyModel("transposed")}


@pytest.fixture(params=MODELS)
def f(request):
    return MODELS[request.param]


def options_of(kernel, params, *, rank_one=False) -> dict[str, Any]:
    if kernel != "preconditioned":
        return {"kernel": kernel}
    return {"kernel": kernel, "preconditioner": preconditioner_of(params, rank_one=rank_one)}


def test_the_model_fulfils_the_protocol(f):
    assert isinstance(f, FactoredFn)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", ["auto", "tiled"])
def test_kernel_equals_its_definition_on_dense_gradients(f, arrays, kernel, method):
    params, x, y = arrays
    ours = empirical_ntk(f, params, x, y, **options_of(kernel, params), method=method, tile=6)
    np.testing.assert_allclose(ours, expected_kernel(f, kernel, params), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank_one", [False, True], ids=["sgd", "rank-one scales"])
def test_ghost_products_equal_the_definition(f, arrays, rank_one):
    params, x, y = arrays
    kernel = "preconditioned" if rank_one else "sgd"
    ours = empirical_ntk(f, params, x, y, **options_of(kernel, params, rank_one=rank_one), method="ghost")
    np.testing.assert_allclose(ours, expected_kernel(f, kernel, params), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["contraction", "tiled", "ntvp", "auto"])
def test_scales_of_rank_one_equal_the_diagonal_that_they_stand_for(f, arrays, method):
    params, x, y = arrays
    one, dense = (
        empirical_ntk(f, params, x, y, **options_of("preconditioned", params, rank_one=r), method=method)
        for r in (True, False)
    )
    np.testing.assert_allclose(one, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_size", [(3, 2)])
def test_all_methods_and_blocks_agree_to_rounding(f, arrays, block_size):
    params, x, y = arrays
    names: tuple[KernelName, ...] = ("sgd", "asymmetric_signgd")
    exact = empirical_ntk(f, params, x, y, kernel=names, method="contraction")
    for method in ("tiled", "auto"):
        ours = empirical_ntk(f, params, x, y, kernel=names, method=method, block_size=block_size)
        for name in names:
            np.testing.assert_allclose(ours[name], exact[name], rtol=1e-12, atol=1e-12)
    for method in ("ghost", "ntvp"):
        ours = empirical_ntk(f, params, x, y, method=method, block_size=block_size)
        np.testing.assert_allclose(ours, exact["sgd"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["tiled", "ghost"])
def test_train_kernel_equals_rows_against_rows(f, arrays, method):
    params, x, _ = arrays
    ours = empirical_ntk(f, params, x, method=method, block_size=2)
    np.testing.assert_allclose(ours, empirical_ntk(f, params, x, x, method=method), rtol=1e-12, atol=1e-12)
    assert (np.asarray(ours) == np.transpose(ours, (2, 3, 0, 1))).all()


@pytest.mark.parametrize("only", ["^table$", "^layers/w$", "^layers/b$"])
@pytest.mark.parametrize("kernel", ["sgd", "signgd"])
def test_masked_kernel_equals_the_definition(f, arrays, only, kernel):
    params, x, y = arrays
    mask = parameter_mask(params, only=[only])
    keep = jax.flatten_util.ravel_pytree(jax.tree.map(lambda flag, p: jnp.full(p.shape, flag), mask, params))[0]
    ours = empirical_ntk(f, params, x, y, kernel=kernel, method="tiled", param_mask=mask)
    np.testing.assert_allclose(ours, expected_kernel(f, kernel, params, np.asarray(keep)), rtol=1e-7, atol=1e-7)


def test_the_tied_cross_term_is_there_and_matters(arrays):
    """Tables whose uses are told apart give another kernel: by twice the product of the two uses."""
    params, x, y = arrays
    whole = empirical_ntk(TinyModel(), params, x, y, method="tiled")

    def untied(p, z):
        labels = jnp.asarray(LABELS)
        return TinyModel().tapped(p["own"], z, {"out": p["copy"][labels] - p["own"]["table"][labels]})[0]

    copy = {"own": params, "copy": params["table"]}
    apart = empirical_ntk(untied, copy, x, y, method="contraction")
    assert np.abs(whole - apart).max() > 1e-3 * np.abs(whole).max()


def test_mapped_outputs_keep_their_factors(arrays):
    params, x, y = arrays
    difference = map_outputs(TinyModel(), lambda out: out[:, 1] - out[:, 0])
    plan = empirical_ntk(difference, params, x, y, method="tiled", explain=True)
    assert {leaf.name: leaf.route for leaf in plan.leaves} == {
        "layers/b": "whole",
        "layers/w": "tiled",
        "table": "rows",
    }
    whole = np.asarray(empirical_ntk(TinyModel(), params, x, y))
    expected = whole[:, 1, :, 1] - whole[:, 1, :, 0] - whole[:, 0, :, 1] + whole[:, 0, :, 0]
    np.testing.assert_allclose(
        empirical_ntk(difference, params, x, y, method="tiled"), expected, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("contrast", [logit_difference, lambda f: contrast_logits(f, 2)], ids=["difference", "basis"])
def test_contrasts_keep_their_factors(arrays, contrast):
    params, x, y = arrays
    u = contrast(TinyModel())
    plan = empirical_ntk(u, params, x, y, method="tiled", explain=True)
    assert {leaf.route for leaf in plan.leaves} == {"whole", "tiled", "rows"}
    whole = empirical_ntk(u, params, x, y, method="contraction")
    np.testing.assert_allclose(empirical_ntk(u, params, x, y, method="tiled"), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["tiled", "ghost", "auto"])
def test_columns_may_have_more_tokens_than_rows(f, arrays, method):
    params, x, y = arrays
    longer = {name: jnp.pad(a, ((0, 0), (0, 2))) for name, a in y.items()}
    short, long = (empirical_ntk(f, params, x, side, method=method) for side in (y, longer))
    np.testing.assert_allclose(long, short, rtol=1e-12, atol=1e-12)


def test_half_precision_factors_are_summed_in_float32():
    params, x, y = make_arrays(jnp.float32)
    exact = empirical_ntk(TinyModel(), params, x, y, method="tiled")
    for method in ("tiled", "ghost"):
        ours = empirical_ntk(TinyModel(), params, x, y, method=method, factor_dtype=jnp.bfloat16)
        assert ours.dtype == jnp.float32
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert 1e-6 < error < 1e-2


def test_sign_kernels_are_whole_numbers():
    params, x, y = make_arrays(jnp.float32)
    for method in ("tiled", "contraction"):
        ours = np.asarray(empirical_ntk(TinyModel(), params, x, y, kernel="signgd", method=method))
        assert (ours == np.round(ours)).all()
        assert np.abs(ours).max() > 10


def test_jit_and_vmap_over_parameters_equal_plain_calls(f, arrays):
    params, x, y = arrays
    two = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), params)
    method: MethodName = "tiled"
    mapped = jax.jit(jax.vmap(lambda p: empirical_ntk(f, p, x, y, method=method, block_size=2)))(two)
    for i in range(2):
        plain = empirical_ntk(f, jax.tree.map(lambda a, i=i: a[i], two), x, y, method=method)
        np.testing.assert_allclose(mapped[i], plain, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_not_finite_is_no_sign(arrays):
    params, x, y = arrays
    broken = map_outputs(TinyModel(), lambda out: jnp.sqrt(out - out))  # its derivative is infinite, or NaN
    for method in ("contraction", "tiled"):
        with pytest.raises(UserError, match="gradients must be finite"):
            empirical_ntk(broken, params, x, y, kernel="signgd", method=method)


def test_token_numbers_of_small_types_do_not_wrap_around():
    """A vocabulary of all bytes: its size is no byte."""
    size = 256
    layers = {"w": jnp.ones((LAYERS, WIDTH, WIDTH)) / 4, "b": jnp.zeros((LAYERS, WIDTH))}
    params = {"table": jax.random.normal(jax.random.key(0), (size, WIDTH)), "layers": layers}
    ids = jnp.array([[0, size - 1, 1], [size - 1, size - 2, size - 1]]).astype(jnp.uint8)
    x = {"ids": ids, "mask": jnp.ones(ids.shape)}
    ours, exact = (empirical_ntk(TinyModel(), params, x, method=method) for method in ("tiled", "contraction"))
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["signgd", "asymmetric_signgd"])
def test_rows_of_one_token_against_columns_of_several_are_formed(arrays, kernel):
    """The gradients of the rows have rank one in w, those of the columns do not."""
    params, x, y = arrays
    x = {"ids": x["ids"][:, :1], "mask": jnp.ones_like(x["mask"][:, :1])}
    mask = parameter_mask(params, only=["^layers/w$"])
    ours = empirical_ntk(TinyModel(), params, x, y, kernel=kernel, param_mask=mask)
    exact = empirical_ntk(TinyModel(), params, x, y, kernel=kernel, param_mask=mask, method="contraction")
    np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12)


def test_signs_of_one_token_need_no_formed_gradient_and_stay_integers(arrays):
    params, x, _ = arrays
    x = {"ids": x["ids"][:, :1], "mask": jnp.ones_like(x["mask"][:, :1])}
    mask = parameter_mask(params, only=["^layers/w$"])
    plan = empirical_ntk(TinyModel(), params, x, kernel="signgd", param_mask=mask, method="ghost", explain=True)
    assert [leaf.route for leaf in plan.leaves] == ["ghost"]
    ours, exact = (
        empirical_ntk(TinyModel(), params, x, kernel="signgd", param_mask=mask, method=method)
        for method in ("ghost", "contraction")
    )
    np.testing.assert_array_equal(ours, exact)


UNSET = ("preconditioner", "param_mask", "block_size", "tile", "memory_bytes", "accum_dtype", "factor_dtype")


@pytest.mark.parametrize("method", ["contraction", "tiled"])
def test_signs_multiplied_as_bytes_give_the_same_integers(method):
    """The products of accelerators, on any backend."""
    params, x, y = make_arrays(jnp.float32)
    call = prepare(
        "test", TinyModel(), params, x, y, **dict.fromkeys(UNSET), precision="highest", kernel="signgd", method=method
    )
    found = []
    for integers in (False, True):
        settings = call.settings._replace(arithmetic=call.settings.arithmetic._replace(integers=integers))
        found.append(np.asarray(blocked_kernels(settings, call.point, x, y)[0]))
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0]).max() > 10
