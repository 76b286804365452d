"""What the smallest runs of all experiments are put through: stopped, killed, resumed, compared with a whole one."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.__main__ import main
from jaxft.lab import launch
from jaxft.lab.interrupts import Interrupts
from jaxft.train import Checkpoints


class StopAfter(Interrupts):
    """Stands for ``Interrupts``: asks to stop from the (n+1)-th question on."""

    exit_status = 143  # pyright: ignore[reportAssignmentType]

    def __init__(self, questions: int):
        super().__init__()
        self.left = questions + 1

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def stop_and_resume(monkeypatch):
    """Runs a command line that is stopped at its (n+1)-th question, then once more, to the end."""

    def run(argv, folder, questions):
        with monkeypatch.context() as patch:
            patch.setattr(launch, "Interrupts", StopAfter(questions))
            assert main(argv) == 143
        assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
        assert main(argv) == 0

    return run


@pytest.fixture
def kill_and_resume():
    """Runs a command line in a process that is killed when it has recorded so many lines, then in one to the end."""

    def run(argv, folder, lines):
        command = [sys.executable, "-m", "experiments", *argv]
        metrics = folder / "metrics.jsonl"
        with subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while (not metrics.exists() or metrics.read_bytes().count(b"\n") < lines) and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def same_outcome():
    """Whether two runs left the same, of all that must not depend on how often a run was stopped."""
    return lambda a, b, tables: _same(_contents(a, tables), _contents(b, tables))


def _contents(folder, tables) -> dict:
    arrays = {path.name: dict(np.load(path)) for path in sorted((folder / "arrays").glob("*.npz"))}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
    files = {name: (folder / name).read_text() for name in ("metrics.jsonl", "findings.jsonl", *tables)}
    figures = {path.name: path.read_bytes() for path in sorted((folder / "figures").iterdir())}
    return {"arrays": arrays, "step": step, "files": files, "figures": figures}


def _same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b
