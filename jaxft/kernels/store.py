"""A folder that holds kernels block by block: what is finished survives a kill, a crash and a full disk.

=================  =================================================================================================
``<kernel>.npy``   the whole kernel, ``[n, m]`` or ``[n, c, m, c]``; what is missing holds zeros, or a part of a block
``manifest.json``  what the kernels were computed from; only a call with the same manifest adds to them
``journal.jsonl``  a line for every finished block, with the checksum of its bytes in each kernel
``.lock``          held by the process at work
=================  =================================================================================================

A block's line is written after its bytes are on the disk, so a block counts once its line is complete.
"""

import contextlib
import hashlib
import json
import os
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.checks import UserError, message, require
from jaxft.kernels.block_files import ArrayFile, disk_faults, lock, opened, replace, write_at
from jaxft.kernels.block_layout import WHERE, Index, Layout, require_layout

FORMAT = 1
"""Of the folder; another one is not read."""

MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", ".lock"
NAMED = 6
"""Blocks or files that a message names."""

NO_STORE = "Pass a folder that kernel_blocks has written"
CALLER = 5
"""Frames from a warning on opening to the user: the method, ``_open``, ``__init__`` and ``kernel_blocks`` between."""


class StoreWarning(UserWarning):
    """A stored kernel is not whole: blocks are missing, or were damaged and are computed again."""


class StoredKernels(NamedTuple):
    """Kernels of a folder, to be read."""

    kernels: dict[str, np.memmap]
    """Name -> the kernel as a memory map: what is not looked at is not read."""
    manifest: dict[str, Any]
    """What they were computed from."""
    missing: list[tuple[slice, slice]]
    """Rows and columns of every block that is not finished; its mirror image is missing with it and not listed."""


def open_kernel_store(path: str | os.PathLike, *, verify: bool = False) -> StoredKernels:
    """The kernels in a folder that ``kernel_blocks`` has written, finished or not; nothing is changed.

    Args:
      path: The folder.
      verify: Whether to read everything and compare it with the checksums; damaged blocks then count as missing.

    Returns:
      The kernels, what they were computed from and what is missing. A ``StoreWarning`` tells the number of missing
      blocks, if there are any.

    Raises:
      UserError: The folder is no store, or one of another format, or cannot be read.

    Example:
      >>> import tempfile
      >>> layout = Layout(("sgd",), (3, 3), None, (2, 2), True, np.dtype("float32"))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with KernelStore(folder, layout, {"params": "3f"}) as store:
      ...         for i, j in layout.indices():
      ...             rows, columns = layout.slices(i, j)
      ...             store.write(i, j, {"sgd": np.ones((3, 3), np.float32)[rows, columns]})
      ...     stored = open_kernel_store(folder)
      >>> float(stored.kernels["sgd"].sum()), stored.missing
      (9.0, [])
    """
    where, folder = "open_kernel_store", Path(path)
    with disk_faults(where, folder), contextlib.ExitStack() as files:
        manifest = read_manifest(where, folder)
        layout = _layout(where, folder, manifest)
        done, _ = _read_journal(folder / JOURNAL, layout)
        kernels = {name: _mapped(where, folder / f"{name}.npy", layout) for name in layout.names}
        if verify:
            arrays = {name: ArrayFile(folder / f"{name}.npy", layout, files, os.O_RDONLY) for name in layout.names}
            done = {index: sums for index, sums in done.items() if _intact(arrays, index, sums)}
    blocks = layout.indices()
    missing = [layout.slices(*index) for index in blocks if index not in done]
    if missing:
        warnings.warn(f"{where}: {len(missing)} of {len(blocks)} blocks are missing in {folder}", StoreWarning, 2)
    return StoredKernels(kernels, manifest, missing)


class KernelStore:
    """Kernels being written to a folder, by one process at a time.

    Blocks that do not fit their checksum are forgotten on opening, and a ``StoreWarning`` says so.

    Args:
      path: The folder; made if need be.
      layout: How the kernels are cut into blocks.
      identity: What they depend on besides, by name: digests and settings, in the types of JSON.
      resume: Whether to go on with a store that is there already.

    Raises:
      UserError: The folder holds other files, or a store with another manifest (the fields are named), or any store
        with ``resume=False``; another process is writing it; the disk is full, read-only or at fault.
    """

    def __init__(
        self, path: str | os.PathLike, layout: Layout, identity: Mapping[str, Any], *, resume: bool = True
    ) -> None:
        require_layout(layout)
        self.path, self.layout = Path(path), layout
        self._files = contextlib.ExitStack()
        self._release = weakref.finalize(self, self._files.close)
        try:
            with disk_faults(WHERE, self.path):
                self._open(json.loads(json.dumps(_manifest(layout) | dict(identity))), resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "KernelStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder; so does the end of the process, or of the last reference to the store."""
        self._release()

    def finished(self, i: int, j: int) -> bool:
        """Whether block (i, j) is there."""
        return (i, j) in self._done

    def read(self, i: int, j: int) -> dict[str, np.ndarray]:
        """The kernels in block (i, j), which is finished."""
        with disk_faults(WHERE, self.path):
            return {name: array.read(i, j) for name, array in self._arrays.items()}

    def write(self, i: int, j: int, kernels: Mapping[str, np.ndarray]) -> None:
        """Puts block (i, j) on the disk, and its mirror image where kernels are symmetric; then it counts.

        Raises:
          UserError: The disk is full, read-only or at fault. What is finished stays so, and writing may go on.
        """
        blocks = {name: np.ascontiguousarray(kernels[name], self.layout.dtype) for name in self._arrays}
        with disk_faults(WHERE, self.path):
            for name, array in self._arrays.items():
                array.write(i, j, blocks[name])
            for array in self._arrays.values():
                os.fsync(array.file)
            sums = {name: _checksum(block) for name, block in blocks.items()}
            line = _line((i, j), sums)
            os.ftruncate(self._journal, self._journal_size)  # a line torn by a full disk
            write_at(self._journal, line, self._journal_size)
            os.fsync(self._journal)
        self._journal_size += len(line)
        self._done[i, j] = sums

    def _open(self, manifest: dict[str, Any], resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        _holds_store(self.path)  # nothing is left in a folder of other files
        lock(self.path / LOCK, self._files)
        paths = {name: self.path / f"{name}.npy" for name in self.layout.names}
        is_new = not _holds_store(self.path)
        if not is_new:
            _require_same(self.path, manifest, resume)
        try:
            if is_new:
                replace(self.path / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
            flags = os.O_RDWR | os.O_CREAT
            self._arrays = {name: ArrayFile(path, self.layout, self._files, flags) for name, path in paths.items()}
            for array in self._arrays.values():
                array.allocate()
            self._read_journal()
        except OSError:
            if is_new:  # nothing is lost, and fewer data may fit
                for path in (*paths.values(), self.path / JOURNAL, self.path / MANIFEST):
                    path.unlink(missing_ok=True)
            raise

    def _read_journal(self) -> None:
        """Takes the finished blocks from the journal, and writes it anew where it holds anything else."""
        path = self.path / JOURNAL
        self._done, unreadable = _read_journal(path, self.layout)
        damaged = [index for index, sums in self._done.items() if not _intact(self._arrays, index, sums)]
        for index in damaged:
            del self._done[index]
        whole = b"".join(_line(index, sums) for index, sums in self._done.items())
        if not path.exists() or path.read_bytes() != whole:
            replace(path, whole)
        self._journal, self._journal_size = opened(path, self._files, os.O_RDWR), len(whole)
        said = [f"{unreadable} lines of the journal cannot be read"] if unreadable else []
        if damaged:
            more = ", ..." if len(damaged) > NAMED else ""
            said.append(f"{len(damaged)} blocks do not fit their checksum ({_named(damaged[:NAMED])}{more})")
        if said:
            text = f"{WHERE}: damage in {self.path}: {' and '.join(said)}. These blocks are computed again."
            warnings.warn(text, StoreWarning, CALLER)


def _checksum(block: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(block).reshape(-1).data, digest_size=16).hexdigest()


def _intact(arrays: Mapping[str, ArrayFile], index: Index, sums: Mapping[str, str]) -> bool:
    """Whether the bytes of a block, and those of its mirror image, fit their checksums."""
    for name, array in arrays.items():
        copies = [array.read, array.read_mirror] if array.layout.mirrored(*index) else [array.read]
        if any(_checksum(read(*index)) != sums[name] for read in copies):
            return False
    return True


def _mapped(where: str, path: Path, layout: Layout) -> np.memmap:
    rule, step = f"{path} must be {layout.dtype}{list(layout.shape)}", "Let kernel_blocks go on with this store"
    try:
        kernel = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:  # no header, or fewer bytes than it says
        raise UserError(message(where, rule, error, step)) from error
    fits = kernel.shape == layout.shape and kernel.dtype == layout.dtype
    require(fits, where, rule, f"{kernel.dtype}{list(kernel.shape)}", step)
    return kernel


def _line(index: Index, sums: Mapping[str, str]) -> bytes:
    return (json.dumps({"block": list(index), "checksums": dict(sums)}) + "\n").encode()


def _read_journal(path: Path, layout: Layout) -> tuple[dict[Index, dict[str, str]], int]:
    """Checksums of the finished blocks, and the number of lines that are none; a torn last line is no fault."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    known, unreadable = set(layout.indices()), 0
    done: dict[Index, dict[str, str]] = {}
    for line in (line for line in lines if line.endswith(b"\n")):
        try:
            entry = json.loads(line)
            (i, j), sums = entry["block"], {name: entry["checksums"][name] for name in layout.names}
            is_block = (i, j) in known
        except (ValueError, KeyError, TypeError):
            is_block = False
        if is_block:
            done[i, j] = sums
        else:
            unreadable += 1
    return done, unreadable


def _manifest(layout: Layout) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kernels": layout.names,
        "examples": layout.examples,
        "outputs": layout.outputs,
        "block": layout.block,
        "symmetric": layout.symmetric,
        "dtype": layout.dtype.str,
    }


def _layout(where: str, folder: Path, manifest: Mapping[str, Any]) -> Layout:
    try:
        (n, m), (rows, columns) = manifest["examples"], manifest["block"]
        names, dtype = tuple(manifest["kernels"]), np.dtype(manifest["dtype"])
        return Layout(names, (n, m), manifest["outputs"], (rows, columns), manifest["symmetric"], dtype)
    except (KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(message(where, f"{folder / MANIFEST} must tell the layout", got, NO_STORE)) from error


def read_manifest(where: str, folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
      UserError: There is none, it is damaged, or of another format.
    """
    path = folder / MANIFEST
    require(path.is_file(), where, f"{folder} must be a kernel store", f"no {MANIFEST} there", NO_STORE)
    manifest: Any = None
    with contextlib.suppress(ValueError):
        manifest = json.loads(path.read_bytes())
    require(isinstance(manifest, dict), where, f"{path} must hold a JSON object", "something else", NO_STORE)
    found, step = manifest.get("format"), "Read it with the version of jaxft that wrote it"
    require(found == FORMAT, where, f"{folder} must have format {FORMAT}", found, step)
    return manifest


def _holds_store(folder: Path) -> bool:
    """Whether a folder holds a store rather than nothing.

    Raises:
      UserError: It holds something else.
    """
    if (folder / MANIFEST).exists():
        return True
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    rule, step = f"{folder} must be empty or a kernel store", "Give the store a folder of its own"
    require(not others, WHERE, rule, f"a folder with {_named(others[:NAMED])}", step)
    return False


def _require_same(folder: Path, manifest: Mapping[str, Any], resume: bool) -> None:
    old = read_manifest(WHERE, folder)
    step = "Pass resume=True to go on with it, or another folder, or remove it"
    require(resume, WHERE, f"{folder} must be empty with resume=False", "a kernel store", step)
    nothing = object()
    fields = [k for k in (old | dict(manifest)) if old.get(k, nothing) != manifest.get(k, nothing)]
    shown = [f"{k} {_short(old.get(k, 'absent'))} there and {_short(manifest.get(k, 'absent'))} here" for k in fields]
    step = "Pass another folder, or what the stored kernels were computed from"
    require(not fields, WHERE, f"{folder} must hold the same kernels", "; ".join(shown), step)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _named(values: list[Any]) -> str:
    return ", ".join(map(str, values))
