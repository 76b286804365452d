"""Two processes and one store: process 0 alone has the files, both see the same."""

import json
import os
import socket
import subprocess
import sys

import numpy as np

from jaxft.kernels.store import open_kernel_store

WORKER = """
import errno, json, os, sys
import jax, numpy as np
from jaxft.kernels.block_layout import Layout
from jaxft.kernels.block_loop import run_blocks
from jaxft.kernels.shared_store import open_store

jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
folder = sys.argv[1] if jax.process_index() == 0 else sys.argv[1] + "-of-another-machine"
layout = Layout(("sgd",), (5, 5), None, (2, 2), True, np.dtype("float64"))
x, calls, seen = np.arange(15.0).reshape(5, 3), [], []

def gram(a, b):
    calls.append(1)
    return (a @ b.T)[None]

def blocks(identity="p"):
    return run_blocks(lambda x: x, gram, x, None, layout=layout, store=open_store(folder, layout, {"params": identity}))

def fault(act):
    try:
        act()
    except ValueError as error:
        return str(error)

loop = blocks()
for _ in range(3):
    next(loop)
loop.close()
refused = fault(lambda: blocks("q"))
real = os.pwrite
def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")
os.pwrite = full
no_room = fault(lambda: list(blocks()))
os.pwrite = real
before = len(calls)
kernel = np.zeros((5, 5))
for block in blocks():
    kernel[block.rows, block.columns] += block.kernels["sgd"]
last = len(calls) - before
print(json.dumps([refused, no_room, last, kernel.tolist()]))
"""


def test_two_processes_see_one_store_and_its_faults(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", WORKER, str(tmp_path / "store"), address]
    environment, pipe = {**os.environ, "JAX_PLATFORMS": "cpu"}, subprocess.PIPE
    workers = [
        subprocess.Popen([*command, process], env=environment, stdout=pipe, stderr=pipe, text=True) for process in "01"
    ]
    try:
        outputs = [worker.communicate(timeout=60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    seen = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert seen[0] == seen[1]
    refused, no_room, computed, kernel = seen[0]
    assert "params p there and q here" in refused
    assert "must have room" in no_room
    assert computed == 4  # of six blocks two were finished, and read by both processes
    x = np.arange(15.0).reshape(5, 3)
    np.testing.assert_array_equal(kernel, x @ x.T)
    np.testing.assert_array_equal(open_kernel_store(tmp_path / "store", verify=True).kernels["sgd"], x @ x.T)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
