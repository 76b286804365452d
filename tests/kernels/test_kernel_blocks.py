"""The out-of-core call against the one in memory; what a store does by itself is tested in ``test_store``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.kernels import StoreWarning, empirical_ntk, kernel_blocks, open_kernel_store
from tests.kernels.conftest import network
from tests.kernels.test_factored_ntk import TinyModel, make_arrays, preconditioner_of


def whole(blocks, shape):
    found = np.full(shape, np.nan)
    for block in blocks:
        for kernel in block.kernels.values():
            part = (block.rows, block.columns) if len(shape) == 2 else (block.rows, slice(None), block.columns)
            assert np.isnan(found[part]).all()
            found[part] = kernel
    return found


@pytest.mark.parametrize("method", ["auto", "tiled", "contraction", "ntvp"])
@pytest.mark.parametrize("same", [False, True], ids=["x-y", "x-x"])
def test_blocks_make_up_the_kernel(x64, method, same):
    params, x, y = make_arrays(jnp.float64)
    y = None if same else y
    options = {"kernel": "preconditioned", "preconditioner": preconditioner_of(params), "method": method}
    expected = empirical_ntk(TinyModel(), params, x, y, **options)
    found = whole(kernel_blocks(TinyModel(), params, x, y, **options, block_size=2), expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_stored_kernels_continue_and_read_back(problem32, tmp_path):
    f, params, x, y = problem32
    options = {"kernel": ("sgd", "signgd"), "block_size": (3, 2), "store": tmp_path / "k"}
    first: Any = kernel_blocks(f, params, x, y, **options)
    next(first)
    first.close()
    with pytest.warns(StoreWarning, match="8 of 9 blocks are missing"):
        assert open_kernel_store(tmp_path / "k").missing
    for _ in kernel_blocks(f, params, x, y, **options):
        pass
    stored = open_kernel_store(tmp_path / "k")
    assert not stored.missing
    expected = empirical_ntk(f, params, x, y, kernel=("sgd", "signgd"), block_size=(3, 2))
    for name, kernel in expected.items():
        assert isinstance(stored.kernels[name], np.memmap)
        np.testing.assert_array_equal(stored.kernels[name], kernel)


@pytest.mark.parametrize("field", ["function", "params", "x", "y", "kernels", "block", "method", "tile", "precision"])
def test_a_store_of_another_call_is_refused_by_the_name_of_what_differs(problem32, tmp_path, field):
    f, params, x, y = problem32
    arguments, options = {"f": f, "params": params, "x": x, "y": y}, {"block_size": (3, 2)}
    list(kernel_blocks(*arguments.values(), **options, store=tmp_path / "k"))
    other = {
        "function": {"f": lambda p, z: 2.0 * network(p, z)},
        "params": {"params": jax.tree.map(lambda leaf: leaf + 1, params)},
        "x": {"x": x + 1},
        "y": {"y": y + 1},
    }
    settings = {
        "kernels": {"kernel": "signgd"},
        "block": {"block_size": (2, 2)},
        "method": {"method": "ntvp"},
        "tile": {"tile": 7},
        "precision": {"precision": "default"},
    }
    changed = {**arguments, **other.get(field, {})}
    with pytest.raises(UserError, match=rf"\b{field}\b"):
        kernel_blocks(*changed.values(), **{**options, **settings.get(field, {})}, store=tmp_path / "k")


def test_outputs_that_depend_on_the_batch_are_refused_before_anything_is_stored(tmp_path):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    with pytest.raises(UserError, match="must not depend on the rest of its batch"):
        kernel_blocks(lambda w, z: (z - z.mean(axis=0, keepdims=True)) @ w, jnp.ones(3), x, store=tmp_path / "k")
    assert not (tmp_path / "k").exists()
