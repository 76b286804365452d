import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.lab import Records, atomic_file, write_atomically


@pytest.fixture
def records(tmp_path):
    records = Records(tmp_path / "metrics.jsonl")
    for step in range(5):
        records.append({"step": step, "kind": "train", "loss": 1 / (step + 1)})
    yield records
    records.close()


def test_read_returns_what_was_appended(records):
    assert records.read()[3] == {"step": 3, "kind": "train", "loss": 0.25}
    assert len(records.read()) == 5


def test_nothing_is_created_before_the_first_record(tmp_path):
    records = Records(tmp_path / "metrics.jsonl")
    records.cut_back(3)
    assert records.read() == []
    assert not any(tmp_path.iterdir())


def test_array_scalars_become_numbers_and_nan_null(tmp_path):
    records = Records(tmp_path / "m.jsonl")
    records.append(
        {"loss": jnp.float32(0.5), "norms": np.array([1.0, np.inf]), "other": float("nan"), "n": np.int64(3)}
    )
    assert records.read() == [{"loss": 0.5, "norms": [1.0, None], "other": None, "n": 3}]
    assert "NaN" not in records.path.read_text()
    records.close()


def test_cut_back_keeps_steps_up_to_the_given_one_byte_for_byte(records):
    whole = records.path.read_bytes()
    records.append({"kind": "note"})
    records.cut_back(2)
    assert [r.get("step") for r in records.read()] == [0, 1, 2, None]
    assert records.path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:3]))


def test_appending_after_cut_back_restores_the_uninterrupted_file(records):
    whole = records.path.read_bytes()
    records.cut_back(1)
    for step in range(2, 5):
        records.append({"step": step, "kind": "train", "loss": 1 / (step + 1)})
    assert records.path.read_bytes() == whole


@pytest.mark.parametrize("torn", [b'{"step": 5, "lo', b'{"step": 5}', b"\xff"])
def test_a_torn_last_line_is_ignored_and_never_glued_to_the_next(records, torn):
    records.close()
    with records.path.open("ab") as file:
        file.write(torn)
    again = Records(records.path)
    assert len(again.read()) == 5
    again.append({"step": 5})
    assert again.read()[5:] == [{"step": 5}]
    again.close()
    with records.path.open("ab") as file:
        file.write(torn)
    again.cut_back(10)
    assert records.path.read_bytes().endswith(b'{"step": 5}\n')


def test_read_only_records_write_nothing(records):
    before = records.path.read_bytes()
    view = Records(records.path, writable=False)
    view.append({"step": 9})
    view.cut_back(0)
    assert records.path.read_bytes() == before


def test_records_survive_kill_nine(tmp_path):
    code = (
        "import sys, os, signal; from pathlib import Path; from jaxft.lab.records import Records\n"
        "records = Records(Path(sys.argv[1]))\n"
        "for step in range(3): records.append({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "m.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert [r["step"] for r in Records(path).read()] == [0, 1, 2]


def test_a_crash_between_write_and_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    code = (
        "import os, sys; from pathlib import Path; from jaxft.lab.records import write_atomically\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "write_atomically(Path(sys.argv[1]), 'new')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert path.read_text() == "old"
    leftover = [p.read_text() for p in tmp_path.iterdir() if p != path]
    assert leftover == ["new"], "the crash came after the write"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.npz"
    write_atomically(path, "old")

    def parts():
        yield b"half"
        raise RuntimeError

    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.writelines(parts())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.npz"]
