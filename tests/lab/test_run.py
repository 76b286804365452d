import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.findings import Finding
from jaxft.lab import Run, RunOptions, config_hash, open_run


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1
    seed: int = 0


@pytest.fixture
def options(tmp_path):
    return RunOptions(root=tmp_path / "runs")


def start(options, config=None, **changes):
    config = config or Config()
    options = dataclasses.replace(options, **changes)
    return open_run("demo", config, preset="cpu", seed=config.seed, where=options)


def test_directory_is_named_by_preset_hash_and_seed(options):
    with start(options, Config(seed=3)) as run:
        assert run.directory == options.root / "demo" / f"cpu-{config_hash(Config())}-s3"
        assert json.loads((run.directory / "config.json").read_text()) == {"lr": 0.1, "seed": 3}
        assert run.status == {"state": "running", "step": None, "message": ""}
        assert not run.finished


def test_provenance_tells_versions_device_and_command_of_every_start(options):
    for _ in range(2):
        with start(options) as run:
            provenance = json.loads((run.directory / "provenance.json").read_text())
    assert provenance["experiment"] == "demo"
    assert len(provenance["starts"]) == 2
    begun = provenance["starts"][1]
    assert begun["packages"]["jax"]
    assert begun["command"] == sys.argv
    assert begun["devices"] >= 1
    assert begun["matmul_precision"] == "default"


def test_the_same_command_resumes_after_a_torn_metrics_line(options):
    with start(options) as run:
        for step in range(4):
            run.records.append({"step": step})
        run.mark("running", step=2)
        path = run.records.path
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    with start(options) as run:
        assert run.status["step"] == 2
        run.records.cut_back(2)
        run.records.append({"step": 3, "again": True})
        assert run.records.read() == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_another_configuration_or_seed_is_another_directory(options):
    folders = []
    for config in (Config(), Config(lr=0.2), Config(seed=1)):
        with start(options, config) as run:
            folders.append(run.directory)
    assert len(set(folders)) == 3


def test_fresh_makes_siblings_and_leaves_the_first_alone(options):
    with start(options) as run:
        run.records.append({"step": 0})
        first = run.directory
    names = []
    for _ in range(2):
        with start(options, fresh=True) as run:
            names.append(run.directory.name)
            assert run.records.read() == []
    assert names == [f"{first.name}-2", f"{first.name}-3"]
    with start(options) as run:
        assert run.directory == first
        assert run.records.read() == [{"step": 0}]


def test_a_named_folder_may_be_new_or_empty_and_is_resumed(options, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/new"):
        for _ in range(2):
            with start(options, run_dir=tmp_path / name) as run:
                assert run.directory == tmp_path / name
    assert not options.root.exists()


def test_a_finished_run_gives_its_report_and_changes_no_more(options):
    with start(options) as run:
        run.records.append({"step": 0})
        run.finish("# Result")
    before = {p: p.read_bytes() for p in run.directory.rglob("*") if p.is_file()}
    with start(options) as again, start(options) as beside:
        assert again.finished
        assert beside.report() == "# Result\n"
        again.records.append({"step": 1})
        again.save_arrays("a", x=np.ones(2))
        again.finish("# Other")
    assert {p: p.read_bytes() for p in run.directory.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("error", "state"), [(FloatingPointError("loss at step 3"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_an_exception_leaves_its_state_and_message(options, error, state):
    run = start(options)

    def train():
        with run:
            run.mark("running", step=3)
            raise error

    with pytest.raises(type(error)):
        train()
    assert run.status["state"] == state
    assert run.status["step"] == 3
    assert run.status["message"].startswith(type(error).__name__)


def test_leaving_unfinished_is_an_interruption_and_a_mark_stays(options):
    with start(options):
        pass
    with start(options) as run:
        assert run.status["state"] == "running"
        run.mark("interrupted", step=5, message="Ctrl-C")
    assert run.status == {"state": "interrupted", "step": 5, "message": "Ctrl-C"}


def test_arrays_read_back_equal_and_bfloat16_as_float32(options):
    with start(options) as run:
        assert not run.has_arrays("k")
        run.save_arrays("k", kernel=np.eye(3), low=jnp.array([1.5, 2.0], jnp.bfloat16), name=np.array(["a"]))
        assert run.has_arrays("k")
        loaded = run.load_arrays("k")
    assert loaded["kernel"].tolist() == np.eye(3).tolist()
    assert loaded["kernel"].dtype == np.float64
    assert loaded["low"].dtype == np.float32
    assert loaded["low"].tolist() == [1.5, 2.0]
    assert loaded["name"].tolist() == ["a"]


def test_the_same_arrays_are_the_same_bytes(options):
    with start(options) as run:
        path = run.directory / "arrays" / "k.npz"
        run.save_arrays("k", a=np.arange(3))
        first = path.read_bytes()
        run.save_arrays("k", a=np.arange(3))
        assert path.read_bytes() == first


def test_a_finding_replaces_the_earlier_answer_to_its_question(options):
    def finding(measured, **setting):
        return Finding("width", 1.0, measured, 0.1, 0.2, "holds", setting=setting)

    with start(options) as run:
        run.add_finding(finding(1.1, task="sst2", sizes=(16, 64)))
        run.add_finding(finding(float("nan"), task="rte"))
        run.add_finding(finding(0.9, task="sst2", sizes=(16, 64)))
        run.add_finding(dataclasses.replace(finding(0.8, task="rte"), seed=1))
    measured = [f.measured for f in run.findings()]
    assert np.isnan(measured[0])
    assert measured[1:] == [0.9, 0.8]
    assert run.findings()[1].setting == {"task": "sst2", "sizes": [16, 64]}


def test_a_crash_before_the_rename_leaves_no_run(options):
    code = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "import test_run as t; os.rename = lambda *_: os._exit(9)\n"
        "t.start(t.RunOptions(root=Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(options.root), str(Path(__file__).parent)])
    assert done.returncode == 9
    assert [p.name for p in (options.root / "demo").glob("cpu-*")] == []
    with start(options) as run:
        assert run.status["state"] == "running"


def test_a_failed_creation_leaves_nothing(options, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="disk full"):
        start(options)
    assert list((options.root / "demo").iterdir()) == []


def test_the_lock_ends_with_the_process_that_is_killed(options):
    code = (
        "import os, sys, signal; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "import test_run as t; run = t.start(t.RunOptions(root=Path(sys.argv[1])))\n"
        "run.records.append({'step': 0}); print(run.directory, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(options.root), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        with pytest.raises(ValueError, match="one process at a time, got a lock held by another process"):
            start(options)
        process.kill()
    assert Run(directory, writable=False).status["state"] == "running"
    with start(options) as run:
        assert run.directory == directory
        assert run.records.read() == [{"step": 0}]
