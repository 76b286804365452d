"""Arrays from the file formats that image data sets come in: IDX, gzipped or not, and npz."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxft.core.checks import UserError, message, nearest, require

_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_GZIP = b"\x1f\x8b"


def read_idx(path: str | Path) -> np.ndarray:
    """The array of an IDX file, the format of MNIST; gzip is told by its first bytes, not by the name.

    Raises:
      UserError: No such file, one that is no IDX file, or more or fewer bytes than its header announces.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 9]))
      ...     file.flush()
      ...     read_idx(file.name).tolist()
      [7, 0, 9]

    Reference:
      LeCun et al., the MNIST database: "the IDX file format".
    """
    path = Path(path)
    require(path.is_file(), "read_idx", "the file must exist", path, "Check the path")
    data, cut = _unzipped(path.name, path.read_bytes())
    rule = f"{path.name} must start as an IDX file: two zero bytes, a type, the number of axes"
    known = len(data) >= 4 and data[:2] == b"\0\0" and data[2] in _IDX_TYPES and data[3] > 0
    require(known, "read_idx", rule, f"bytes {data[:4].hex(' ') or 'none'}", "Check that this is the file you mean")
    dtype, start = np.dtype(_IDX_TYPES[data[2]]), 4 + 4 * data[3]
    whole = len(data) >= start
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist()) if whole else ()
    expected = start + math.prod(shape) * dtype.itemsize if whole else start
    end = " where its gzip stream breaks off" if cut else ""
    rule = f"{path.name} must hold {expected} bytes{f' for shape {shape}' if whole else ' of header'}"
    advice = (
        "The file is truncated: fetch it again" if len(data) < expected or cut else "It is no IDX file of this shape"
    )
    require(len(data) == expected and not cut, "read_idx", rule, f"{len(data)}{end}", advice)
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _unzipped(name: str, data: bytes) -> tuple[bytes, bool]:
    """What a gzip file holds, as far as it can be had, and whether it breaks off; other data as it is."""
    if not data.startswith(_GZIP):
        return data, False
    parts = []
    try:
        while data.startswith(_GZIP):  # one stream after another makes a gzip file too
            stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            parts.append(stream.decompress(data))
            if not stream.eof:
                return b"".join(parts), True
            data = stream.unused_data
    except zlib.error as error:
        raise UserError(message("read_idx", f"{name} must be readable", error, "Fetch the file again")) from error
    return b"".join(parts), False


def read_npz(path: str | Path) -> tuple[np.ndarray, ...]:
    """Images and labels of an npz file, other keys being left unread.

    Returns:
      ``x_train, y_train, x_test, y_test`` if the file has these; otherwise ``x, y``.

    Raises:
      UserError: No npz file, one that is damaged, one of Python objects, or other keys.

    Example:
      >>> import io, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f"{folder}/a.npz", x=np.zeros((2, 4, 4)), y=np.arange(2))
      ...     [array.shape for array in read_npz(f"{folder}/a.npz")]
      [(2, 4, 4), (2,)]
    """
    path = Path(path)
    require(path.is_file(), "read_npz", "the file must exist", path, "Check the path")
    rule, advice = f"{path.name} must be a whole npz file", "It is truncated or of another kind: fetch it again"
    require(zipfile.is_zipfile(path), "read_npz", rule, "no zip archive", advice)
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = _KEYS if any(key in file.files for key in _KEYS) else ("x", "y")
            missing = [key for key in keys if key not in file.files]
            hints = " ".join(nearest(key, file.files) for key in missing[:1])
            rule = f"{path.name} must hold {', '.join(_KEYS)}, or x, y"
            got = f"only {', '.join(file.files) or 'nothing'}"
            require(not missing, "read_npz", rule, got, f"{hints} Name the arrays so")
            return tuple(file[key] for key in keys)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        rule = f"{path.name} must be a whole npz file of plain arrays"
        raise UserError(message("read_npz", rule, error, "Write it again by np.savez(path, x=..., y=...)")) from error
