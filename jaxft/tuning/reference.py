"""Log-probabilities of a reference model, computed once before training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxft.core.checks import leading_size, require
from jaxft.core.precision import accumulator
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.train.sharding import shard_examples


def reference_log_probs(
    f: OutputFn, params: Params, inputs: Inputs, *, batch_size: int, mesh: Mesh | None = None
) -> Float[Array, "n r"]:
    """Log-probabilities of all responses under a model that will not change, a batch at a time.

    It compiles once: the last batch is filled up with its last example, whose further results are dropped. What is
    compiled takes ``params`` as an argument.

    Args:
      f: Log-probabilities of a batch of examples, ``[b, r]``.
      params: The reference, placed on the mesh where there is one.
      inputs: All examples, such as a ``ResponseBatch``.
      batch_size: Examples at a time.
      mesh: Splits every batch over its axis ``data``.

    Returns:
      A row an example, in float32 or the wider type of the outputs; on every device of the mesh, where there is one.

    Raises:
      UserError: A batch size below 1 or one that the devices do not divide, outputs of another shape, or a
        log-probability that is not finite, naming the examples.

    Example:
      >>> f = lambda scale, x: -scale * x
      >>> inputs = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
      >>> reference_log_probs(f, jnp.float32(2.0), inputs, batch_size=2).tolist()
      [[-2.0, -4.0], [-6.0, -8.0], [-10.0, -12.0]]
    """
    where = "reference_log_probs"
    n = leading_size(where, inputs)
    require(batch_size >= 1, where, "batch_size must be at least 1", batch_size, "Use 8, say")
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(f, out_shardings=whole)
    rows = []
    for start in range(0, n, batch_size):
        batch = _take(inputs, np.minimum(np.arange(start, start + batch_size), n - 1))
        out = compiled(params, batch if mesh is None else shard_examples(batch, mesh))
        rule = "f must return [b, r] log-probabilities"
        require(out.ndim == 2 and out.shape[0] == batch_size, where, rule, out.shape, "Sum over tokens")
        rows.append(out)
    log_probs = jnp.concatenate(rows)[:n]
    log_probs = log_probs.astype(accumulator(log_probs.dtype))
    bad = np.flatnonzero(~np.isfinite(np.asarray(log_probs)).all(axis=1))
    shown = f"NaN or infinity at examples {', '.join(map(str, bad[:8]))}{' and others' if bad.size > 8 else ''}"
    require(not bad.size, where, "log-probabilities must be finite", shown, "Check their tokens and the checkpoint")
    return log_probs


def _take(inputs: Inputs, rows: np.ndarray) -> Any:
    """Rows of every leaf, on the host where the leaf is there."""
    return jax.tree.map(lambda x: x[rows], inputs)
