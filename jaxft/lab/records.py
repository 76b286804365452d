"""Files that survive a crash: records appended line by line as JSON, and whole files replaced at once."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO

from jaxft.core.checks import require

Record = Mapping[str, Any]
"""One line of the metrics of a run."""


class Records:
    """An append-only file of JSON objects, one a line: the metrics of a run.

    A process that is killed leaves at most one torn line at the end; reading ignores it, writing removes it first.

    Example:
      >>> import tempfile
      >>> records = Records(Path(tempfile.mkdtemp()) / "metrics.jsonl")
      >>> for step in range(3):
      ...     records.append({"step": step, "loss": 1.0 / (step + 1)})
      >>> records.cut_back(1)
      >>> records.read()
      [{'step': 0, 'loss': 1.0}, {'step': 1, 'loss': 0.5}]
      >>> records.close()
    """

    def __init__(self, path: Path, *, writable: bool = True):
        """Nothing is created before the first record; with ``writable=False`` every write does nothing."""
        self.path = path
        self.writable = writable
        self._file: TextIO | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line and hands it to the system; array scalars become numbers, NaN and infinities ``null``."""
        if self.writable:
            line = json.dumps(jsonable(record), allow_nan=False)
            self._open().write(line + "\n")
            self._open().flush()

    def sync(self) -> None:
        """Puts what was appended on the disk: call it before the checkpoint that claims it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def cut_back(self, step: int) -> None:
        """Drops the records of later steps, as a resumed run writes them again; records without a step stay."""
        if not self.writable or not self.path.exists():
            return
        self.close()
        kept = [line for number, line in _whole_lines(self.path) if self._step(number, line) <= step]
        write_atomically(self.path, b"".join(kept))

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first.

        Raises:
          UserError: A line other than a torn last one is no JSON object; the file and line are named.
        """
        return [self._parse(number, line) for number, line in _whole_lines(self.path)]

    def close(self) -> None:
        """Syncs and closes; a later append opens the file again."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        if self._file is None:
            if self.path.exists():
                whole = sum(len(line) for _, line in _whole_lines(self.path))
                if whole < self.path.stat().st_size:
                    os.truncate(self.path, whole)
            self._file = self.path.open("a", encoding="utf-8")
        return self._file

    def _step(self, number: int, line: bytes) -> float:
        return float(self._parse(number, line).get("step", -math.inf))

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        record: Any = None
        with contextlib.suppress(ValueError):
            record = json.loads(line)
        where, got = f"{self.path}:{number}", repr(line[:40].decode(errors="replace"))
        require(isinstance(record, dict), where, "a line must hold one JSON object", got, "Remove the line")
        return record


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    """Numbered lines with their newline; a last line without one was torn."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [(number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def of_kind(records: Sequence[Record], kind: str, **fields: Any) -> list[Record]:
    """Records of a kind with these fields.

    Example:
      >>> of_kind([{"kind": "event", "step": 1}, {"kind": "event", "step": 2}, {"kind": "result"}], "event", step=2)
      [{'kind': 'event', 'step': 2}]
    """
    return [r for r in records if r["kind"] == kind and fields.items() <= r.items()]


def number(value: Any) -> float:
    """A recorded number; what is not finite is recorded as ``None``.

    Example:
      >>> number(2), number(None)
      (2.0, nan)
    """
    return float("nan") if value is None else float(value)


def jsonable(value: Any) -> Any:
    """``value`` in JSON's types: arrays as lists, paths as strings, NaN and infinities as ``None``.

    Raises:
      UserError: A value that has no such form.

    Example:
      >>> import numpy as np
      >>> jsonable({"loss": np.float32("nan"), "sizes": (np.int64(3), 4)})
      {'loss': None, 'sizes': [3, 4]}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    kind = type(value).__name__
    require(hasattr(value, "tolist"), "jsonable", "values must be numbers, strings or arrays", kind, "Convert it first")
    return jsonable(value.tolist())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes ``path`` as a whole, or not at all.

    It is written under a temporary name in the same folder, put on the disk, then renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replaces the content of ``path`` at once: a reader, or a crash, sees the old content or the new.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "status.txt"
      >>> write_atomically(path, "running")
      >>> path.read_text()
      'running'
    """
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` by ``value`` as indented JSON, at once."""
    write_atomically(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Puts the entries of a folder (a rename) on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
