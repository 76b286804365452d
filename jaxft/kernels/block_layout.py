"""How kernels are cut into blocks of rows and columns."""

from typing import NamedTuple

import numpy as np

from jaxft.core.checks import require

WHERE = "kernel_blocks"
"""The function whose arguments are checked here."""

Index = tuple[int, int]
"""Of a block: that of its rows and that of its columns."""


class Layout(NamedTuple):
    """How kernels are cut into blocks."""

    names: tuple[str, ...]
    """Of the kernels, in the order in which they are computed."""
    examples: tuple[int, int]
    """Rows and columns."""
    outputs: int | None
    """Of an example; ``None`` for a kernel without axes of outputs."""
    block: tuple[int, int]
    """Examples in a block of rows and in one of columns."""
    symmetric: bool
    """Whether a block tells its mirror image, in every kernel."""
    dtype: np.dtype
    """Of the kernels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a whole kernel."""
        (n, m), c = self.examples, self.outputs
        return (n, m) if c is None else (n, c, m, c)

    def indices(self) -> list[Index]:
        """The blocks to compute, in order: of symmetric kernels those on and above the diagonal.

        The columns are passed back and forth, so that a row of blocks begins where the one before it ended.
        """
        rows, columns = (-(-total // size) for total, size in zip(self.examples, self.block, strict=True))
        along = [[(i, j) for j in range(i if self.symmetric else 0, columns)] for i in range(rows)]
        return [index for i, row in enumerate(along) for index in (row[::-1] if i % 2 else row)]

    def slices(self, i: int, j: int) -> tuple[slice, slice]:
        """Examples of block (i, j)."""
        sides = zip((i, j), self.block, self.examples, strict=True)
        rows, columns = (slice(k * size, min((k + 1) * size, total)) for k, size, total in sides)
        return rows, columns

    def mirrored(self, i: int, j: int) -> bool:
        """Whether block (i, j) has a mirror image besides itself."""
        return self.symmetric and i != j


def require_layout(layout: Layout) -> None:
    """Raises unless the blocks have a size and fit their mirror images, and the kernels a name and a dtype of files."""
    rule = "block_size must be at least 1"
    require(min(layout.block) >= 1, WHERE, rule, layout.block, "Use 8, or what memory allows")
    alike = layout.examples[0] == layout.examples[1] and layout.block[0] == layout.block[1]
    shown = f"blocks {layout.block} of {layout.examples} examples"
    rule = "blocks of symmetric kernels must be square"
    require(alike or not layout.symmetric, WHERE, rule, shown, "Pass one block size, or the columns as y")
    distinct = bool(layout.names) and len(set(layout.names)) == len(layout.names)
    require(distinct, WHERE, "kernels must be one or more, each once", layout.names, "Name each kernel once")
    rule = "accum_dtype must be a float type that numpy can save"
    require(layout.dtype.kind == "f", WHERE, rule, layout.dtype, "Use float32")
