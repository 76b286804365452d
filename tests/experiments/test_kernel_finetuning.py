"""The experiment at its smallest: what it writes, and that a stopped run ends like one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import experiments.kernel_finetuning as experiment
from experiments.__main__ import main
from jaxft.lab.interrupts import Interrupts
from jaxft.train import Checkpoints

TINY = {
    "k": "2",
    "splits": "13",
    "arms": "prompt head",
    "optimizers": "sgd adam",
    "test-cap": "12",
    "probe-examples": "8",
    "drift-examples": "2",
    "training.steps": "4",
    "training.event-every": "2",
    "training.batch-size": "2",
    "training.sgd-rates": "0.0001",
    "solving.ridges": "0.1",
    "solving.f0-scales": "0",
    "pretraining.width": "8",
    "pretraining.heads": "2",
    "pretraining.steps": "5",
    "pretraining.sentences": "100",
}


def command(folder: Path, **changes: str) -> list[str]:
    options = TINY | {name.replace("_", "-"): value for name, value in changes.items()}
    flags = [part for name, value in options.items() for part in (f"--{name}", *value.split())]
    return ["run", "kernel_finetuning", "--preset", "smoke", "--run-dir", str(folder), *flags]


class StopAfter(Interrupts):
    """Stands for ``Interrupts``: asks to stop from the (n+1)-th question on; a phase of two events asks three times."""

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(folder)) == 0
    return folder


def contents(folder: Path) -> dict:
    """All that must not depend on how often a run was stopped."""
    arrays = {path.name: dict(np.load(path)) for path in sorted((folder / "arrays").glob("*.npz"))}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
    files = {name: (folder / name).read_text() for name in ("metrics.jsonl", "table.csv", "rows.csv", "findings.jsonl")}
    figures = {path.name: path.read_bytes() for path in sorted((folder / "figures").iterdir())}
    return {"arrays": arrays, "step": step, "files": files, "figures": figures}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b


def test_run_writes_what_it_promises(finished):
    report = (finished / "report.md").read_text()
    for part in ("Diagnostics", "Findings", "kernel method", "paper's thresholds", "peak memory"):
        assert part in report
    kinds = [json.loads(line)["kind"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    phases = 2 * 2
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "start": 2,
        "kernel": 2 * 3,
        "event": phases * 3,
        "result": phases,
    }
    for name in ("dynamics-reviews-2", "kernel-drift-reviews-2", "accuracy"):
        for suffix in ("png", "pdf", "csv"):
            assert (finished / "figures" / f"{name}.{suffix}").stat().st_size > 0
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_measured_start_lies_on_the_prediction(finished):
    """At step 0 kernel descent and fine-tuning are the same network."""
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    starts = [e for e in events if e["kind"] == "event" and e["local_step"] == 0]
    assert len(starts) == 4
    for e in starts:
        assert abs(e["predicted_probe_loss_nats"] - e["probe_loss_nats"]) < 1e-5
        assert e["feature_drift"] < 1e-5
        assert e["kernel_drift"] < 1e-5


def test_kernel_descent_predicts_the_change_of_the_loss(finished):
    """With a small learning rate the network stays where its kernel holds; batches and momentum are shared."""
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for arm in ("prompt", "head"):
        path = [r for r in records if r["kind"] == "event" and (r["arm"], r["optimizer"]) == (arm, "sgd")]
        predicted, measured = (
            path[-1][name] - path[0][name] for name in ("predicted_probe_loss_nats", "probe_loss_nats")
        )
        assert abs(predicted - measured) < 0.1 * abs(measured) + 1e-6


def test_finished_run_prints_its_report_and_computes_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert main(command(finished)) == 0
    assert "Is this fine-tuning run a kernel method?" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "questions",  # in the middle of the second phase; of the first; late in the third
    [3, pytest.param(0, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)],
)
def test_stopped_run_ends_bitwise_like_one_that_was_not(finished, tmp_path, monkeypatch, questions):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Interrupts", StopAfter(questions))
        assert main(command(folder)) == 143
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    assert main(command(folder)) == 0
    assert same(contents(folder), contents(finished))


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 6, 12])
def test_killed_run_ends_bitwise_like_one_that_was_not(finished, tmp_path, lines):
    folder = tmp_path / "run"
    arguments = [sys.executable, "-m", "experiments", *command(folder)]
    with subprocess.Popen(arguments, env=os.environ, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        metrics = folder / "metrics.jsonl"
        while (not metrics.exists() or metrics.read_bytes().count(b"\n") < lines) and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    done = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert same(contents(folder), contents(finished))
