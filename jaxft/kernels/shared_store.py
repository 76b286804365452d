"""A store of several processes: process 0 keeps the files, and all see the same blocks and the same faults."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft.core.checks import UserError
from jaxft.kernels.block_layout import Layout
from jaxft.kernels.store import KernelStore

LONGEST_FAULT = 4096
"""Bytes of a message that the other processes are told."""


class SharedStore:
    """A ``KernelStore`` of process 0, used by every process in the same order.

    Blocks that the store holds are sent to all, so that the folder need not be one that all can reach. A fault of the
    store is raised in all of them. Arguments are those of ``KernelStore``; only those of process 0 count.
    """

    def __init__(
        self, path: str | os.PathLike, layout: Layout, identity: Mapping[str, Any], *, resume: bool = True
    ) -> None:
        self.layout = layout
        self._kept: KernelStore | None = None
        indices = layout.indices()

        def opened() -> bytes:
            self._kept = KernelStore(path, layout, identity, resume=resume)
            return bytes(self._kept.finished(*index) for index in indices)

        flags = _from_first(opened, len(indices))
        self._done = {index for index, flag in zip(indices, flags, strict=True) if flag}

    def close(self) -> None:
        """Releases the folder."""
        if self._kept is not None:
            self._kept.close()

    def finished(self, i: int, j: int) -> bool:
        """Whether block (i, j) is there."""
        return (i, j) in self._done

    def read(self, i: int, j: int) -> dict[str, np.ndarray]:
        """The kernels in block (i, j), which is finished."""
        rows, columns = (side.stop - side.start for side in self.layout.slices(i, j))
        names, c = self.layout.names, self.layout.outputs
        shape = (len(names), rows, columns) if c is None else (len(names), rows, c, columns, c)

        def taken() -> bytes:
            return b"".join(block.tobytes() for block in self._at_first().read(i, j).values())

        data = _from_first(taken, int(np.prod(shape)) * self.layout.dtype.itemsize)
        return dict(zip(names, np.frombuffer(data, self.layout.dtype).reshape(shape), strict=True))

    def write(self, i: int, j: int, kernels: Mapping[str, np.ndarray]) -> None:
        """Puts block (i, j) on the disk of process 0; it counts once all know that it is there."""

        def put() -> bytes:
            self._at_first().write(i, j, kernels)
            return b""

        _from_first(put, 0)
        self._done.add((i, j))

    def _at_first(self) -> KernelStore:
        assert self._kept is not None, "process 0 alone has the files"
        return self._kept


def open_store(
    path: str | os.PathLike, layout: Layout, identity: Mapping[str, Any], *, resume: bool = True
) -> KernelStore | SharedStore:
    """The store to write kernels to, of one process or of all.

    Args:
      path: The folder; made if need be.
      layout: How the kernels are cut into blocks.
      identity: What they depend on besides, by name: digests and settings, in the types of JSON.
      resume: Whether to go on with a store that is there already.

    Returns:
      The store, open.

    Raises:
      UserError: As ``KernelStore``, in every process.
    """
    kind = KernelStore if jax.process_count() == 1 else SharedStore
    return kind(path, layout, identity, resume=resume)


def _from_first(act: Callable[[], bytes], size: int) -> bytes:
    """What an action of process 0 gives, in every process; where it fails, every process does."""
    data, fault = b"", None
    if jax.process_index() == 0:
        try:
            data = act()
        except Exception as error:
            fault = error
    said = str(fault or "").encode()[:LONGEST_FAULT]
    if fault is not None and not said:
        said = type(fault).__name__.encode()
    told = _sent(said, LONGEST_FAULT).rstrip(b"\0")
    if fault is not None:
        raise fault
    if told:
        raise UserError(told.decode(errors="replace"))
    return _sent(data, size) if size else b""


def _sent(data: bytes, size: int) -> bytes:
    """Bytes of process 0 in every process."""
    padded = np.frombuffer(data.ljust(size, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
