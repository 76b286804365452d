"""The directory of a run: made whole or not at all, resumed by the same command, never overwritten.

::

  runs/<slug>/<preset>-<hash10>-s<seed>/
    config.json  provenance.json  status.json  metrics.jsonl  findings.jsonl
    arrays/*.npz  figures/  checkpoints/  report.md

With several processes all of them open the run, process 0 alone writes, and the folder is on a file system that all
of them see.
"""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import jax
import numpy as np

from jaxft.core.checks import UserError, message, require
from jaxft.core.findings import Finding
from jaxft.lab.config import RunOptions, config_faults, config_hash, config_json, differences
from jaxft.lab.devices import is_writer
from jaxft.lab.records import Records, atomic_file, jsonable, sync_folder, write_atomically, write_json

State = Literal["running", "finished", "interrupted", "failed"]
PACKAGES = ("jaxft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
AGREEMENT_BYTES = 8192


class Run:
    """An open run. As a context it releases the folder on leaving, and an exception leaves its state behind."""

    def __init__(self, directory: Path, *, writable: bool, lock: TextIO | None = None):
        """Use ``open_run``."""
        self.directory = directory
        self.records = Records(directory / "metrics.jsonl", writable=writable)
        self.figures = directory / "figures"
        self.checkpoints = directory / "checkpoints"
        self._writable = writable
        self._lock = lock

    @property
    def status(self) -> dict[str, Any]:
        """``state``, the ``step`` last marked, and a ``message``."""
        return json.loads((self.directory / "status.json").read_text())

    @property
    def finished(self) -> bool:
        """Whether the report is written; a finished run is read only."""
        return self.status["state"] == "finished"

    def mark(self, state: State, *, step: int | None = None, message: str = "") -> None:
        """Replaces the status; without ``step`` the last one stays."""
        if self._writable:
            step = self.status["step"] if step is None else step
            write_json(self.directory / "status.json", {"state": state, "step": step, "message": message})

    def save_arrays(self, name: str, /, **arrays: Any) -> None:
        """Writes ``arrays/<name>.npz`` at once. Low-precision floats, unknown to numpy, become float32.

        Args:
          name: File name without its suffix.
          **arrays: Arrays that this process holds whole.

        Raises:
          UserError: The name is a path, or an array holds objects.
        """
        path = self._array_path("save_arrays", name)
        if not self._writable:
            return
        held = {key: np.asarray(value) for key, value in arrays.items()}
        plain: dict[str, Any] = {key: a.astype(np.float32) if a.dtype.kind == "V" else a for key, a in held.items()}
        objects = ", ".join(key for key, a in plain.items() if a.dtype.hasobject)
        require(
            not objects, "save_arrays", "arrays must hold numbers or strings", f"objects in {objects}", "Split them"
        )
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as file:
            np.savez(file, **plain)

    def has_arrays(self, name: str) -> bool:
        """Whether ``save_arrays`` has written this name."""
        return self._array_path("has_arrays", name).exists()

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays saved under ``name``.

        Raises:
          UserError: There are none.
        """
        path = self._array_path("load_arrays", name)
        saved = ", ".join(sorted(p.stem for p in path.parent.glob("*.npz"))) or "nothing"
        require(path.exists(), "load_arrays", f"{path.parent} holds no {path.name}", saved, "Save it first")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def add_finding(self, finding: Finding) -> None:
        """Adds to ``findings.jsonl``, in place of an earlier finding of this claim, setting, seed and precision."""
        if self._writable:
            new = jsonable(finding.to_json())
            kept = [old for old in self._finding_records().read() if _question(old) != _question(new)]
            lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in [*kept, new])
            write_atomically(self.directory / "findings.jsonl", lines)

    def findings(self) -> list[Finding]:
        """The findings so far, oldest first."""
        numbers = ("predicted", "measured", "stderr", "tolerance")
        entries = self._finding_records().read()
        holes: list[dict[str, Any]] = [{k: math.nan for k in numbers if entry[k] is None} for entry in entries]
        return [Finding(**(entry | hole)) for entry, hole in zip(entries, holes, strict=True)]

    def finish(self, report_markdown: str) -> None:
        """Writes the report, then marks the run finished: from now on the same command prints the report."""
        if self._writable:
            self.records.close()
            write_atomically(self.directory / "report.md", report_markdown.rstrip("\n") + "\n")
            self.mark("finished")

    def report(self) -> str:
        """The text of ``report.md``.

        Raises:
          UserError: The run is not finished.
        """
        require(self.finished, "report", "the run must be finished", self.status["state"], "Run its command again")
        return (self.directory / "report.md").read_text()

    def close(self) -> None:
        """Closes the files and lets another process open the run."""
        self.records.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._writable = self.records.writable = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writable and self.status["state"] == "running":
            stopped = kind is None or not issubclass(kind, Exception)
            text = "" if kind is None else f"{kind.__name__}: {error}"
            self.mark("interrupted" if stopped else "failed", message=text)
        self.close()

    def _finding_records(self) -> Records:
        return Records(self.directory / "findings.jsonl", writable=False)

    def _array_path(self, where: str, name: str) -> Path:
        plain = bool(name) and Path(name).name == name and not name.startswith(".")
        require(plain, where, "a name must be a file name without folders", repr(name), "Write - for /")
        return self.directory / "arrays" / f"{name}.npz"


def open_run(slug: str, config: Any, *, preset: str, seed: int, where: RunOptions) -> Run:
    """Makes the folder of a run, or resumes it: the same arguments find the same folder.

    Everything is checked first; the folder appears whole, under its name, or not at all.

    Args:
      slug: Name of the experiment.
      config: Its configuration, a frozen dataclass.
      preset: Name of the preset that the configuration started from.
      seed: Seed of the run, ``config.seed``.
      where: Root of all runs, or the folder of this one; whether to start anew beside it.

    Returns:
      The run, locked against other processes unless it is finished.

    Raises:
      UserError: The configuration is faulty; the folder belongs to another configuration (the fields are listed) or is
        no run's; another process has it open. With several processes all of them raise.

    Example:
      >>> import dataclasses, tempfile
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     seed: int = 0
      >>> options = RunOptions(root=Path(tempfile.mkdtemp()))
      >>> with open_run("demo", Config(), preset="cpu", seed=0, where=options) as run:
      ...     run.records.append({"step": 0, "loss": 0.5})
      ...     run.finish("# Demo")
      >>> again = open_run("demo", Config(), preset="cpu", seed=0, where=options)
      >>> again.finished, again.report().strip()
      (True, '# Demo')
    """
    faults = config_faults(config)
    require(not faults, "open_run", "the configuration must be valid", "; ".join(faults), "Change these fields")
    same = getattr(config, "seed", seed) == seed
    require(same, "open_run", "seed must be the configuration's", f"{seed} and {config}", "Pass seed=config.seed")
    one = not (where.fresh and where.run_dir)
    require(one, "open_run", "fresh and run_dir exclude each other", where, "Name a new folder with run_dir alone")
    name = f"{preset}-{config_hash(config)}-s{seed}"
    directory = where.run_dir or where.root / slug / name
    if jax.process_count() == 1:
        return _open_writer(slug, config, directory, fresh=where.fresh)
    return _open_together(slug, config, directory, fresh=where.fresh)


def _open_together(slug: str, config: Any, directory: Path, *, fresh: bool) -> Run:
    """Process 0 opens the run; the others learn where it is, or fail with the same message."""
    from jax.experimental import multihost_utils

    run, outcome = None, {}
    if is_writer():
        try:
            run = _open_writer(slug, config, directory, fresh=fresh)
            outcome = {"directory": str(run.directory)}
        except (UserError, OSError) as error:
            outcome = {"error": str(error)[: AGREEMENT_BYTES // 8]}
    text = np.zeros(AGREEMENT_BYTES, np.uint8)
    encoded = json.dumps(outcome).encode()
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    agreed = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0"))
    if "error" in agreed:
        raise UserError(agreed["error"])
    return run or Run(Path(agreed["directory"]), writable=False)


def _open_writer(slug: str, config: Any, directory: Path, *, fresh: bool) -> Run:
    directory = _sibling(directory) if fresh else directory
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        _create(slug, config, directory)
    _require_same(slug, config, directory)
    if Run(directory, writable=False).finished:
        return Run(directory, writable=False)
    run = Run(directory, writable=True, lock=_lock(directory))
    if run.finished:  # by the process that held the lock a moment ago
        run.close()
        return run
    provenance = json.loads((directory / "provenance.json").read_text())
    write_json(directory / "provenance.json", provenance | {"starts": [*provenance["starts"], _provenance()]})
    run.mark("running")
    return run


def _sibling(directory: Path) -> Path:
    """The first of ``directory``, ``-2``, ``-3``, ... that does not exist."""
    number, candidate = 1, directory
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate


def _create(slug: str, config: Any, directory: Path) -> None:
    """Writes the first files under a temporary name, then renames: no half-made run can be found."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        write_atomically(temporary / "config.json", config_json(config) + "\n")
        write_json(temporary / "provenance.json", {"experiment": slug, "starts": []})
        write_json(temporary / "status.json", {"state": "running", "step": None, "message": ""})
        os.rename(temporary, directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        another_was_first = isinstance(error, OSError) and (directory / "config.json").exists()
        if not another_was_first:
            raise
    sync_folder(directory.parent)


def _require_same(slug: str, config: Any, directory: Path) -> None:
    """Raises unless ``directory`` is a run of this experiment and configuration."""
    files = [directory / name for name in ("config.json", "provenance.json", "status.json")]
    missing = ", ".join(file.name for file in files if not file.is_file())
    way_out = "Choose a folder that is empty or does not exist"
    require(not missing, "open_run", f"{directory} must be a run or empty", f"a path without {missing}", way_out)
    found = []
    for file in files:
        try:
            found.append(json.loads(file.read_text()))
        except ValueError as error:
            got, step = f"{file}:{getattr(error, 'lineno', 1)}: {error}", "Move the folder away and start again"
            raise UserError(message("open_run", "the files of a run must be JSON", got, step)) from error
    old, provenance, _ = found
    changed = differences(
        {"experiment": provenance.get("experiment")} | old, {"experiment": slug} | json.loads(config_json(config))
    )
    rule, step = f"{directory} belongs to another configuration", "Give each configuration a folder of its own"
    require(not changed, "open_run", rule, "; ".join(changed), step)


def _lock(directory: Path) -> TextIO:
    """An exclusive lock that ends with the process, however it ends."""
    file = (directory / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        got, step = "a lock held by another process", "Wait for it, or use --fresh for a second run beside it"
        raise UserError(message("open_run", f"{directory} may have one process at a time", got, step)) from error
    return file


def _question(entry: Mapping[str, Any]) -> str:
    """What a finding is about, as opposed to what came out."""
    return json.dumps([entry[key] for key in ("claim", "setting", "seed", "precision")], sort_keys=True)


def _provenance() -> dict[str, Any]:
    """The circumstances of one start."""
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",  # pyright: ignore[reportAttributeAccessIssue]
        "commit": _commit(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The git commit of the source, with ``+changes`` where it was edited since; ``None`` outside a checkout."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed inside someone else's checkout
        return None
    return f"{git('rev-parse', 'HEAD')}{'+changes' if git('status', '--porcelain', '--untracked-files=no') else ''}"
