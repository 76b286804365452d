import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxft.lab import cache_dir, is_writer, make_mesh, peak_memory_bytes, setup_compilation_cache, start_distributed

WORKER = """
import dataclasses, json, os, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxft.lab import *

@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1
    seed: int = 0

start_distributed(True)
start_distributed(True)
options = RunOptions(root=Path(sys.argv[1]))
with open_run("demo", Config(), preset="cpu", seed=0, where=options) as run:
    run.records.append({"step": 0, "process": jax.process_index()})
    run.save_arrays(f"from-{jax.process_index()}", x=np.ones(1))
    with Interrupts() as stop:
        before = stop.requested
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        agreed = stop.requested, stop.exit_status
    run.finish("done")
try:
    open_run("demo", Config(lr=0.2), preset="cpu", seed=0, where=RunOptions(run_dir=run.directory))
    error = ""
except ValueError as fault:
    error = str(fault)
mesh = dict(make_mesh().shape)
print(json.dumps([jax.process_index(), is_writer(), str(run.directory), before, agreed, error, mesh]))
"""


def test_two_processes_open_one_run_and_process_zero_alone_writes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = []
    for process in range(2):
        cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
        env = os.environ | cluster | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", WORKER, str(tmp_path)]
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
    try:
        outputs = [worker.communicate(timeout=60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    seen = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert [s[:2] for s in seen] == [[0, True], [1, False]]
    assert seen[0][2:] == seen[1][2:], "all processes see the same run, request to stop, error and mesh"
    _, _, directory, before, agreed, error, mesh = seen[0]
    assert not before
    assert agreed == [True, 143]
    assert "lr: 0.1 -> 0.2" in error
    assert mesh == {"data": 2}
    assert (Path(directory) / "metrics.jsonl").read_text() == '{"step": 0, "process": 0}\n'
    assert [p.name for p in (Path(directory) / "arrays").iterdir()] == ["from-0.npz"]
    assert "every worker" in outputs[0][1]


def test_outside_a_cluster_nothing_starts_unasked():
    start_distributed(False)
    assert not jax.distributed.is_initialized()
    assert is_writer()


def test_mesh_has_auto_axes_on_which_a_product_of_shards_compiles():
    mesh = make_mesh()
    assert mesh.axis_types == (AxisType.Auto,)
    assert dict(mesh.shape) == {"data": len(jax.devices())}
    rows = 2 * len(jax.devices())
    x = jax.device_put(jnp.ones((rows, 3)), NamedSharding(mesh, PartitionSpec("data")))
    assert float((x @ x.T).sum()) == 3 * rows**2


def test_mesh_takes_named_sizes_in_order():
    assert make_mesh({"data": 1, "model": 1}).axis_names == ("data", "model")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JAXFT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/jaxft"),
        ({"HOME": "/h"}, "/h/.cache/jaxft"),
    ],
)
def test_cache_folder_follows_the_environment(monkeypatch, environment, expected):
    for name in ("JAXFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_compilation_cache_is_filled_and_a_given_folder_stays(tmp_path):
    given = setup_compilation_cache()
    assert given.name == "xla", "the suite's own folder, from conftest"
    code = "import jax; from jaxft.lab import setup_compilation_cache as s; f = s(); assert s() == f\n"
    code += "jax.jit(lambda x: x + 1)(1.0); print(f)"
    env = os.environ | {"JAXFT_CACHE": str(tmp_path)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert tmp_path in folder.parents
    assert any(folder.iterdir())


def test_peak_memory_grows_with_an_allocation():
    before = peak_memory_bytes()["host"]
    block = bytearray(before // 2 + 2**27)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes()["host"] > before
