"""Files of kernels on a disk that may be full, read-only or at fault.

Files are written by ordinary writes, never through a memory map, where a full disk would kill the process instead of
raising an error.
"""

import contextlib
import errno
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxft.core.checks import UserError, message
from jaxft.kernels.block_layout import WHERE, Layout

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class ArrayFile:
    """The file of one kernel: its header, then its entries row by row."""

    def __init__(self, path: Path, layout: Layout, files: contextlib.ExitStack, flags: int) -> None:
        self.layout, self.c = layout, layout.outputs or 1
        self.file = opened(path, files, flags)
        header = io.BytesIO()
        fields = {"descr": layout.dtype.str, "fortran_order": False, "shape": layout.shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self.header = header.getvalue()
        self.width = layout.examples[1] * self.c * layout.dtype.itemsize

    def allocate(self) -> None:
        """Takes the room of the whole kernel, so that a disk too small for it is met before the work."""
        size = len(self.header) + self.layout.examples[0] * self.c * self.width
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.file, 0, size)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        if os.fstat(self.file).st_size != size:
            os.ftruncate(self.file, size)
        if os.pread(self.file, len(self.header), 0) != self.header:
            write_at(self.file, self.header, 0)

    def write(self, i: int, j: int, block: np.ndarray) -> None:
        """Writes a block and its mirror image."""
        rows, columns = self.layout.slices(i, j)
        flat = np.ascontiguousarray(block, self.layout.dtype).reshape((rows.stop - rows.start) * self.c, -1)
        self._write(rows, columns, flat)
        if self.layout.mirrored(i, j):
            self._write(columns, rows, np.ascontiguousarray(flat.T))

    def read(self, i: int, j: int) -> np.ndarray:
        """A block, ``[rows, columns]`` or ``[rows, c, columns, c]``."""
        rows, columns = self.layout.slices(i, j)
        return self._shaped(self._read(rows, columns), rows, columns)

    def read_mirror(self, i: int, j: int) -> np.ndarray:
        """The same block from its mirror image."""
        rows, columns = self.layout.slices(i, j)
        return self._shaped(self._read(columns, rows).T, rows, columns)

    def _shaped(self, flat: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        n, m = rows.stop - rows.start, columns.stop - columns.start
        return flat.reshape((n, m) if self.layout.outputs is None else (n, self.c, m, self.c))

    def _offsets(self, rows: slice, columns: slice) -> range:
        """Where each row of a block begins in the file."""
        first = len(self.header) + columns.start * self.c * self.layout.dtype.itemsize
        return range(first + rows.start * self.c * self.width, first + rows.stop * self.c * self.width, self.width)

    def _write(self, rows: slice, columns: slice, flat: np.ndarray) -> None:
        for offset, row in zip(self._offsets(rows, columns), flat, strict=True):
            write_at(self.file, row.tobytes(), offset)

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        size = (columns.stop - columns.start) * self.c * self.layout.dtype.itemsize
        data = b"".join(os.pread(self.file, size, offset) for offset in self._offsets(rows, columns))
        if len(data) != size * (rows.stop - rows.start) * self.c:
            raise OSError(errno.EIO, "A kernel's file ends early")
        return np.frombuffer(data, self.layout.dtype).reshape((rows.stop - rows.start) * self.c, -1)


def lock(path: Path, files: contextlib.ExitStack) -> None:
    """Takes a lock that ends with the process, however it ends.

    Raises:
      UserError: Another process, or another loop of this one, holds it.
    """
    try:
        fcntl.flock(opened(path, files, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        got, step = "another process or loop at work", "Wait for it or close it, or pass another folder"
        raise UserError(message(WHERE, f"{path.parent} may have one writer at a time", got, step)) from error


def opened(path: Path, files: contextlib.ExitStack, flags: int) -> int:
    """A descriptor of a file, closed with ``files``."""
    descriptor = os.open(path, flags, 0o666)
    files.callback(os.close, descriptor)
    return descriptor


def write_at(file: int, data: bytes, offset: int) -> None:
    """Writes all of the data: the system may take a part of it at a time."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def replace(path: Path, data: bytes) -> None:
    """Replaces a file at once: a crash leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with contextlib.ExitStack() as files:
        file = opened(temporary, files, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        write_at(file, data, 0)
        os.fsync(file)
        os.replace(temporary, path)
        os.fsync(opened(path.parent, files, os.O_RDONLY))


@contextlib.contextmanager
def disk_faults(where: str, folder: Path) -> Iterator[None]:
    """Turns a fault of the disk into a ``UserError`` that names the folder and says what to do."""
    try:
        yield
    except OSError as error:
        rule = f"{folder} must be a folder that can be read and written"
        step = "Look at the disk, or pass another folder"
        if error.errno in FULL:
            rule = f"the disk of {folder} must have room for the kernels"
            step = "Free some and call again, finished blocks are kept; or pass a folder elsewhere"
        elif error.errno in FORBIDDEN:
            rule, step = f"{folder} must be writable", "Pass a folder that you may write to"
        name = f" ({Path(error.filename).name})" if isinstance(error.filename, str | os.PathLike) else ""
        raise UserError(message(where, rule, f"{error.strerror or error}{name}", step)) from error
