"""Which examples stand in which batch: shuffled training batches as a function of the step, buckets of like length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxft.core.checks import require
from jaxft.core.rng import host_stream


def batch_indices(
    n: int, batch_size: int, *, seed: int, name: str = "batches", start: int = 0, stop: int
) -> Int[np.ndarray, "steps b"]:
    """Example indices of the batches of steps ``start <= step < stop``.

    Row ``step`` holds positions ``step * b, ..., step * b + b - 1`` of an endless sequence of shuffled epochs, each a
    permutation of the examples: batches run across the end of an epoch, no example is dropped, and a row depends on
    (seed, name, step) alone. A batch larger than ``n`` holds examples more than once.

    Args:
      n: Number of examples.
      batch_size: Examples a batch, b.
      seed: Seed of the shuffles.
      name: Name of the stream: another name, other shuffles.
      start: First step.
      stop: One past the last step.

    Returns:
      Indices into the examples.

    Raises:
      UserError: No examples, an empty batch, or steps out of order.

    Example:
      >>> whole = batch_indices(5, 2, seed=0, stop=5)
      >>> sorted(whole.ravel().tolist())
      [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
      >>> bool((batch_indices(5, 2, seed=0, start=3, stop=5) == whole[3:]).all())
      True
    """
    where = "batch_indices"
    require(n >= 1, where, "needs at least 1 example", n, "Check the training split")
    require(batch_size >= 1, where, "batch_size must be at least 1", batch_size, "Pass batch_size >= 1")
    steps = f"[{start}, {stop})"
    require(0 <= start <= stop, where, "steps must satisfy 0 <= start <= stop", steps, "Pass stop >= start")
    first, end = start * batch_size, stop * batch_size
    epochs = range(first // n, -(-end // n))
    order = [host_stream(seed, name, epoch).permutation(n) for epoch in epochs]
    skipped = first - epochs.start * n
    flat = np.concatenate([*order, np.empty(0, np.int64)])[skipped : skipped + end - first]
    return flat.reshape(stop - start, batch_size)


def length_buckets(
    lengths: Sequence[int] | Int[np.ndarray, "n"], *, batch_size: int, multiple: int = 8
) -> list[tuple[Int[np.ndarray, "b"], int]]:
    """Batches of examples of like length, for evaluation: each index once, few shapes to compile for.

    Args:
      lengths: Tokens of each example.
      batch_size: Examples a batch; the last batch, of the shortest examples, may hold fewer.
      multiple: Padded lengths are multiples of it.

    Returns:
      Pairs (indices, padded length), longest first, so that memory runs out at once or not at all. There are at most
      max(lengths) / multiple, rounded up, distinct lengths. Within a batch the order is by length, then index.

    Raises:
      UserError: No or non-positive lengths, batch size or multiple.

    Example:
      >>> [(i.tolist(), length) for i, length in length_buckets([3, 20, 5], batch_size=2)]
      [([1, 2], 24), ([0], 8)]
    """
    where = "length_buckets"
    array = np.asarray(lengths, dtype=np.int64)
    positive = bool(array.size > 0 and array.min() >= 1)
    require(positive, where, "lengths must be positive", array.tolist()[:10], "Encode first")
    sizes = f"batch_size={batch_size}, multiple={multiple}"
    require(batch_size >= 1 and multiple >= 1, where, "sizes must be positive", sizes, "Pass both >= 1")
    order = np.argsort(-array, kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [(batch, int(-(-array[batch[0]] // multiple)) * multiple) for batch in batches]
