import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxft.core.factors import Tap, map_outputs
from jaxft.kernels import (
    contraction,
    empirical_ntk,
    feature_drift,
    kernel_blocks,
    lora_kernel,
    ntk_vector_product,
    one_step_prediction,
    parameter_mask,
    projected_kernel,
)
from jaxft.kernels.calls import KernelName, prepare
from jaxft.kernels.sharded import sharded_kernels
from jaxft.lab.devices import make_mesh


def prepare_call(f, params, x):
    """With the defaults of ``empirical_ntk``."""
    unset = dict.fromkeys(
        ("preconditioner", "param_mask", "block_size", "tile", "memory_bytes", "accum_dtype", "factor_dtype")
    )
    return prepare("empirical_ntk", f, params, x, None, kernel="sgd", method="auto", precision="highest", **unset)


def network(params, x):
    return jnp.matmul(jnp.tanh(jnp.matmul(x, params["in"], precision="highest")), params["out"], precision="highest")


def arrays(columns):
    draw = np.random.default_rng(0).normal
    params = {"in": jnp.asarray(draw(size=(4, 6)), jnp.float32), "out": jnp.asarray(draw(size=(6, 2)), jnp.float32)}
    return params, jnp.asarray(draw(size=(7, 4)), jnp.float32), jnp.asarray(draw(size=(columns, 4)), jnp.float32)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Token table, two stacked layers with a bias without tap, and the rows of two label words as decoder."""

    def __call__(self, params, ids):
        return self.tapped(params, ids, {})[0]

    def taps(self, params, ids):
        (n, t), (layers, width, _) = ids.shape, params["layers"].shape
        shapes = {"in": (n, t, width), "layers": (layers, n, t, width), "out": (2, width)}
        return {
            name: Tap("layers", "dense", shape, jnp.float32)
            if name == "layers"
            else Tap("table", "rows", shape, jnp.float32)
            for name, shape in shapes.items()
        }

    def tapped(self, params, ids, taps):
        words, records = jnp.array([2, 5]), []
        hidden = params["table"][ids] + taps.get("in", 0.0)
        for k, w in enumerate(params["layers"]):
            records.append(hidden)
            y = jnp.matmul(hidden, w, precision="highest") + (taps["layers"][k] if taps else 0.0)
            hidden = jnp.tanh(y + params["bias"][None, None])
        out = hidden.sum(axis=1) @ (params["table"][words] + taps.get("out", 0.0)).T
        everything = {"in": ids, "layers": jnp.stack(records), "out": words}
        return out, {name: everything[name] for name in taps}


def language_model():
    draw = np.random.default_rng(0)
    shapes = {"table": (40, 16), "layers": (2, 16, 16), "bias": (16,)}
    params = {name: jnp.asarray(draw.normal(size=shape) / 3, jnp.float32) for name, shape in shapes.items()}
    return LanguageModel(), params, *(jnp.asarray(draw.integers(0, 40, (n, 4))) for n in (7, 5))


MESHES = {
    "columns": {"data": 8},
    "columns, an odd number": {"data": 3},
    "columns over two axes": {"data": 4, "model": 2},
    "rows": {"rows": 4},
    "rows and columns": {"rows": 2, "data": 4},
    "tiles": {"tiles": 8},
    "all three": {"rows": 2, "tiles": 2, "data": 2},
    "tiles and columns": {"tiles": 4, "data": 2},
    "one device": {"rows": 1, "tiles": 1, "data": 1},
}
SYMMETRIC = ("sgd", "signgd", "preconditioned")
ALL: tuple[KernelName, ...] = (*SYMMETRIC, "asymmetric_signgd", "asymmetric_signgd_transposed")


def scales(params):
    return jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), params)


def assert_close(sharded, single):
    for name in single:
        scale = np.abs(single[name]).max()
        np.testing.assert_allclose(sharded[name], single[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)
        assert sharded[name].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "columns"),
    [("columns", 19), ("columns, an odd number", 8), ("columns over two axes", 5), *((s, 5) for s in list(MESHES)[3:])],
)
def test_sharded_kernels_equal_single_device(columns, shape):
    params, x, y = arrays(columns)
    options = {"kernel": ALL, "preconditioner": scales(params), "block_size": 3, "tile": 2}
    sharded = empirical_ntk(network, params, x, y, mesh=make_mesh(MESHES[shape]), **options)
    single = empirical_ntk(network, params, x, y, **options)
    assert_close(sharded, single)
    np.testing.assert_array_equal(sharded["signgd"], single["signgd"])


@pytest.mark.parametrize(
    ("shape", "kernels"), [(s, SYMMETRIC) for s in MESHES if s != "all three"] + [("columns", ALL), ("all three", ALL)]
)
def test_sharded_train_kernels_equal_single_device(kernels, shape):
    params, x, _ = arrays(1)
    options = {"kernel": kernels, "preconditioner": scales(params), "block_size": 2}
    sharded = empirical_ntk(network, params, x, mesh=make_mesh(MESHES[shape]), **options)
    assert_close(sharded, empirical_ntk(network, params, x, **options))
    for name in SYMMETRIC:
        np.testing.assert_array_equal(sharded[name], np.transpose(sharded[name], (2, 3, 0, 1)), name)


@pytest.mark.parametrize(
    ("shape", "method"), [("columns", "tiled"), ("all three", "tiled"), ("tiles", "auto"), ("all three", "ghost")]
)
def test_sharded_kernels_from_factors_equal_single_device(method, shape):
    f, params, x, y = language_model()
    kernel = ("sgd",) if method == "ghost" else ("sgd", "asymmetric_signgd", "signgd")
    options = {"kernel": kernel, "method": method, "block_size": (3, 4), "tile": 24}
    sharded = empirical_ntk(f, params, x, y, mesh=make_mesh(MESHES[shape]), **options)
    assert_close(sharded, empirical_ntk(f, params, x, y, **options))


@pytest.mark.parametrize("shape", ["columns", "all three"])
def test_sharded_vector_products_and_masks_equal_single_device(shape):
    params, x, _ = arrays(1)
    options = {"kernel": ("asymmetric_signgd",), "method": "ntvp", "param_mask": parameter_mask(params, only=["^in"])}
    sharded = empirical_ntk(network, params, x, mesh=make_mesh(MESHES[shape]), **options)
    assert_close(sharded, empirical_ntk(network, params, x, **options))


def test_axes_of_any_type_are_taken():
    params, x, y = arrays(5)
    mesh = jax.make_mesh((2, 4), ("rows", "data"), axis_types=(AxisType.Explicit, AxisType.Auto))
    sharded = empirical_ntk(network, params, x, y, mesh=mesh)
    np.testing.assert_allclose(sharded, empirical_ntk(network, params, x, y), rtol=1e-5, atol=1e-5)


def test_blocks_over_a_mesh_equal_the_kernel():
    params, x, y = arrays(5)
    whole = np.asarray(empirical_ntk(network, params, x, y))
    for block in kernel_blocks(network, params, x, y, block_size=4, mesh=make_mesh({"rows": 2, "tiles": 4})):
        np.testing.assert_allclose(block.kernels["sgd"], whole[block.rows, :, block.columns], rtol=1e-5, atol=1e-5)


def test_signs_counted_on_several_devices_are_rounded_once():
    """bfloat16 holds whole numbers up to 256: its sums of the devices' counts would be others."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(1.5, size=(6, 3001)), jnp.float32)
    options = {"kernel": "signgd", "accum_dtype": jnp.bfloat16}
    f, w = (lambda w, x: x @ w), jnp.zeros(3001)
    sharded = empirical_ntk(f, w, x, mesh=make_mesh({"tiles": 8}), **options)
    signs = np.sign(x)
    np.testing.assert_array_equal(sharded, jnp.asarray(signs @ signs.T, jnp.bfloat16))
    assert (signs @ signs.T != np.asarray(sharded, np.float32)).any()


def test_tiles_divide_the_contraction_among_the_devices(monkeypatch):
    f, params, x, y = language_model()
    done = np.zeros(8)
    plain = contraction._gram

    def counted(maps, rows, columns, p, arithmetic):
        at = jax.lax.axis_index("tiles")
        jax.debug.callback(lambda device, size=rows.shape[1]: np.add.at(done, device, size), at)
        return plain(maps, rows, columns, p, arithmetic)

    monkeypatch.setattr(contraction, "_gram", counted)
    kernel = empirical_ntk(lambda p, ids: f(p, ids), params, x, y, mesh=make_mesh({"tiles": 8}))
    jax.effects_barrier()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert kernel.shape == (7, 2, 5, 2)
    assert size <= done.sum() <= 1.1 * size
    assert done.max() <= 1.1 * size / 8
    done[:] = 0
    empirical_ntk(map_outputs(f, lambda out: out), params, x, y, method="tiled", mesh=make_mesh({"tiles": 8}))
    jax.effects_barrier()
    # Tables are contracted in the rows alone that are read, padded to tiles.
    assert 0.5 * size <= done.sum() <= 1.3 * size
    assert done.max() <= 1.4 * done.mean()


def flops_of(compiled):
    counted = compiled.cost_analysis()
    assert counted is not None
    return counted["flops"]


def test_tiles_divide_all_operations_of_a_device():
    params = {"in": jnp.ones((32, 64)), "out": jnp.ones((64, 2))}
    x = jnp.ones((16, 32))
    call = prepare_call(network, params, x)
    flops = {}
    for devices in (1, 8):
        compiled = sharded_kernels.lower(make_mesh({"tiles": devices}), call.settings, call.point, x, x).compile()
        flops[devices] = flops_of(compiled)
    assert flops[8] < 1.25 * flops[1] / 8


def test_columns_of_a_train_kernel_are_paired_half():
    params = {"in": jnp.ones((32, 64)), "out": jnp.ones((64, 2))}
    x, mesh = jnp.ones((64, 32)), make_mesh({"data": 8})
    call = prepare_call(network, params, x)
    half, full = (flops_of(sharded_kernels.lower(mesh, call.settings, call.point, x, *y).compile()) for y in ((), (x,)))
    assert half < 0.7 * full  # 5 of 8 shares


WORKER = """
import json, sys
import numpy as np, jax, jax.numpy as jnp
from jaxft.kernels import empirical_ntk
from jaxft.lab import make_mesh, start_distributed

start_distributed(True)
f = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
draw = np.random.default_rng(0).normal
params = {"in": draw(size=(4, 6)).astype(np.float32), "out": draw(size=(6, 2)).astype(np.float32)}
x, y = (draw(size=(n, 4)).astype(np.float32) for n in (7, 5))
found = []
for axis, columns in (("data", None), ("rows", y), ("tiles", y)):
    kernel = empirical_ntk(f, params, x, columns, mesh=make_mesh({axis: 2}), block_size=3)
    found.append([np.asarray(kernel).tolist(), np.asarray(empirical_ntk(f, params, x, columns)).tolist()])
print(json.dumps([len(jax.devices()), len(jax.local_devices()), found]))
"""


def test_two_processes_with_a_device_each_equal_single_device():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = []
    for process in range(2):
        cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
        env = os.environ | cluster | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen([sys.executable, "-c", WORKER], env=env, stdout=pipe, stderr=pipe, text=True))
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    for out, _ in outputs:
        devices, local, found = json.loads(out.splitlines()[-1])
        assert (devices, local) == (2, 1)
        for kernel, alone in found:
            np.testing.assert_allclose(kernel, alone, rtol=1e-5, atol=1e-5)


SHARED = {
    "random projection": lambda f, p, x, key: projected_kernel(f, p, x, size=8, key=key, draws=2).kernel,
    "lora": lambda f, p, x, key: lora_kernel(f, p, x, rank=2, key=key, adapted={"in": True, "out": True}).kernel,
    "kernel times vector": lambda f, p, x, key: ntk_vector_product(f, p, x, jnp.arange(16.0).reshape(8, 2)),
    "feature drift": lambda f, p, x, key: feature_drift(f, p, {n: 1.1 * a for n, a in p.items()}, x, block_size=2),
    "one step": lambda f, p, x, key: (
        one_step_prediction(
            f, p, x, jnp.ones((8, 2)), x, lambda u, y: jnp.mean((u - y) ** 2), learning_rate=0.1
        ).measured
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_other_functions_on_spread_examples_equal_single_device(name):
    params, _, x = arrays(8)
    spread = jax.device_put(x, NamedSharding(make_mesh({"data": 8}), PartitionSpec("data")))
    single, sharded = (SHARED[name](network, params, side, jax.random.key(0)) for side in (x, spread))
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-5)
