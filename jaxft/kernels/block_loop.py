"""The loop of the host over blocks of a kernel that may be larger than memory."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxft.core.checks import leading_size, require
from jaxft.core.types import Inputs
from jaxft.kernels.block_layout import WHERE, Index, Layout, require_layout
from jaxft.kernels.shared_store import SharedStore
from jaxft.kernels.store import KernelStore

Store = KernelStore | SharedStore


class KernelBlock(NamedTuple):
    """Some rows and columns of kernels."""

    rows: slice
    columns: slice
    kernels: dict[str, np.ndarray]
    """Name -> ``[rows, columns]`` or ``[rows, c, columns, c]``."""

    @property
    def mirror(self) -> "KernelBlock":
        """The same entries as the block across the diagonal."""
        kernels = {name: np.transpose(k, (1, 0) if k.ndim == 2 else (2, 3, 0, 1)) for name, k in self.kernels.items()}
        return KernelBlock(self.columns, self.rows, kernels)


def run_blocks(
    features: Callable[[Inputs], Any],
    gram: Callable[[Any, Any], Array | np.ndarray],
    x: Inputs,
    y: Inputs | None,
    *,
    layout: Layout,
    store: Store | None = None,
    check: Callable[[KernelBlock], None] | None = None,
    ahead: bool = True,
) -> Iterator[KernelBlock]:
    """Kernels block by block: what belongs to a block of examples is made by ``features``, and paired by ``gram``.

    Every entry of the kernels lies in exactly one of the blocks that come: a block across the diagonal of symmetric
    kernels is followed by its mirror image. All calls have one shape, since the last block is filled up with its last
    example. The features of a block of rows are made once, those of columns again for every block of rows except where
    it begins, and none of a block that the store holds. A block is in the store when it comes; the loop may be left at
    any of them.

    Memory: the features of two blocks, or with ``ahead`` of up to four, and a few blocks of the kernels.

    Args:
      features: Examples of a block -> anything, such as the factors of their gradients.
      gram: Features of the rows and of the columns -> ``(kernel, rows * c, columns * c)``, (example, output) flattened;
        with several processes a result that each of them has whole.
      x: Rows; examples on axis 0 of every leaf.
      y: Columns; ``None`` means ``x``.
      layout: How the kernels are cut.
      store: Where blocks are kept, and those kept are taken from; it is closed with the loop.
      check: Is shown each block that was computed before it is stored, and raises if it is at fault.
      ahead: Whether the device is given the next block while the host writes the last one.

    Yields:
      The blocks, one row of blocks after the other, the columns back and forth.

    Raises:
      UserError: A layout that does not fit; from the loop, a fault of the disk.

    Example:
      >>> layout = Layout(("sgd",), (3, 2), None, (2, 2), False, np.dtype("float32"))
      >>> x = np.arange(6, dtype=np.float32).reshape(3, 2)
      >>> blocks = run_blocks(lambda x: x, lambda a, b: (a @ b.T)[None], x, x[:2], layout=layout)
      >>> [(block.rows, block.kernels["sgd"].tolist()) for block in blocks]
      [(slice(0, 2, None), [[1.0, 3.0], [3.0, 13.0]]), (slice(2, 3, None), [[5.0, 23.0]])]
    """
    require_layout(layout)
    sizes = tuple(leading_size(WHERE, side) for side in (x, x if y is None else y))
    require(sizes == layout.examples, WHERE, "the layout must be that of the examples", sizes, f"Cut {layout.examples}")
    return _loop(_Sides(features, gram, x, y, layout), store, check, ahead)


class _Sides(NamedTuple):
    """What the loop pairs."""

    features: Callable[[Inputs], Any]
    gram: Callable[[Any, Any], Array | np.ndarray]
    x: Inputs
    y: Inputs | None
    layout: Layout

    def rows(self, i: int) -> Any:
        """Features of a block of rows."""
        return self.features(_filled(self.x, i, self.layout.block[0]))

    def columns(self, j: int) -> Any:
        """Features of a block of columns."""
        return self.features(_filled(self.x if self.y is None else self.y, j, self.layout.block[1]))


def _loop(
    sides: _Sides, store: Store | None, check: Callable[[KernelBlock], None] | None, ahead: bool
) -> Iterator[KernelBlock]:
    def finish(index: Index, entries: Any) -> Iterator[KernelBlock]:
        rows, columns = sides.layout.slices(*index)
        if entries is None:
            assert store is not None
            block = KernelBlock(rows, columns, store.read(*index))
        else:
            block = KernelBlock(rows, columns, _cut(np.asarray(entries), index, sides.layout))
            if check is not None:
                check(block)
            if store is not None:
                store.write(*index, block.kernels)
        yield block
        if sides.layout.mirrored(*index):
            yield block.mirror

    try:
        last = None
        for index, entries in _dispatched(sides, store):
            if not ahead:
                yield from finish(index, entries)
                continue
            if last is not None:
                yield from finish(*last)
            last = index, entries
        if last is not None:
            yield from finish(*last)
    finally:
        if store is not None:
            store.close()


def _dispatched(sides: _Sides, store: Store | None) -> Iterator[tuple[Index, Any]]:
    """Blocks given to the device, which JAX does not wait for; ``None`` for those that the store holds."""
    row, column = -1, -1
    left = right = None
    one_side = sides.y is None and sides.layout.block[0] == sides.layout.block[1]
    for i, j in sides.layout.indices():
        if store is not None and store.finished(i, j):
            yield (i, j), None
            continue
        if i != row:
            left = None  # before the next is made: no more are held than needed
            row, left = i, right if one_side and i == column else sides.rows(i)
        if j != column and not (one_side and i == j):
            right = None
            column, right = j, sides.columns(j)
        yield (i, j), sides.gram(left, left if one_side and i == j else right)


def _filled(side: Inputs, index: int, size: int) -> Inputs:
    """Examples of a block, the last one repeated where there are too few."""
    total = jax.tree.leaves(side)[0].shape[0]
    taken = np.minimum(np.arange(index * size, (index + 1) * size), total - 1)
    return jax.tree.map(lambda leaf: leaf[taken], side)


def _cut(entries: np.ndarray, index: Index, layout: Layout) -> dict[str, np.ndarray]:
    """The kernels of a block by name, without the examples that fill it up; symmetric ones exactly so."""
    (rows, columns), c = layout.block, layout.outputs or 1
    shape = (len(layout.names), rows * c, columns * c)
    fits = entries.shape == shape and entries.dtype == layout.dtype
    got = f"{entries.dtype}{list(entries.shape)}"
    require(fits, WHERE, f"a block must be {layout.dtype}{list(shape)}", got, "Pass the layout of the kernels")
    n, m = (side.stop - side.start for side in layout.slices(*index))
    if layout.symmetric and index[0] == index[1]:
        entries = np.triu(entries) + np.triu(entries, 1).swapaxes(1, 2)
    cut = entries.reshape(-1, rows, c, columns, c)[:, :n, :, :m]
    return {k: one[:, 0, :, 0] if layout.outputs is None else one for k, one in zip(layout.names, cut, strict=True)}
