"""Checkpoints of a pytree by step: asynchronous, whole or absent, restored bitwise.

A checkpoint is written beside its place and renamed when complete, so a process that is killed at any moment leaves
the last complete one as the latest. orbax is imported when the first ``Checkpoints`` is made.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from jaxft.core.checks import path_name, require


class Checkpoints:
    """The checkpoints of one run, in ``folder/<step>``.

    Args:
      folder: Where they lie; made if need be. Halves of saves that were killed are removed.
      keep: Number of latest checkpoints kept.

    Raises:
      UserError: ``keep`` is below 1.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
      ...     checkpoints.save(2, {"w": np.arange(3.0)})
      ...     checkpoints.latest_step(), checkpoints.restore(2, {"w": np.zeros(3)})
      (2, {'w': array([0., 1., 2.])})
    """

    def __init__(self, folder: str | Path, *, keep: int = 3):
        require(keep >= 1, "Checkpoints", "keep must be >= 1", keep, "Keep the latest at least")
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of its own internals
        self.folder = Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        # The handler is named so that the shapes of a checkpoint can be read before it is restored.
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def save(self, step: int, tree: PyTree) -> None:
        """Starts writing ``tree`` and returns once it is copied; ``wait`` returns when it is on disk.

        Args:
          step: Its number, above all earlier ones.
          tree: Arrays, typed PRNG keys included, in dicts, lists, tuples and NamedTuples.

        Raises:
          UserError: ``step`` is not above the latest step saved.
        """
        import orbax.checkpoint as ocp

        latest = self._manager.latest_step()
        rule = f"step must be above {latest}, the latest saved"
        require(latest is None or step > latest, "Checkpoints.save", rule, step, "Save each step once, in order")
        self._manager.save(step, args=ocp.args.StandardSave(tree))

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None; waits for a save under way."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree saved at ``step``, in the containers, types and placement of ``like``.

        Args:
          step: A saved step, such as ``latest_step()``.
          like: A tree of the saved structure: concrete arrays, or ``jax.ShapeDtypeStruct`` (on the default device
            unless they have a sharding).

        Returns:
          The values saved, bit by bit.

        Raises:
          UserError: There is no such step, or ``like`` has another structure, shape or dtype; the differences are
            named.
        """
        import orbax.checkpoint as ocp

        self.wait()
        known = list(self._manager.all_steps())
        where, saved = "Checkpoints.restore", f"step must be one saved in {self.folder}"
        require(step in known, where, saved, step, f"Saved: {', '.join(map(str, sorted(known))) or 'none'}")
        faults = _differences(_described(self._manager.item_metadata(step)), _described(like))
        shown = "; ".join(faults[:5]) + ("; and others" if len(faults) > 5 else "")
        way_out = f"Build the state with the configuration that wrote {self.folder}"
        require(not faults, where, "like must have the structure of the checkpoint", shown, way_out)
        return self._manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_target, like)))

    def wait(self) -> None:
        """Returns when every save is complete on disk, and raises what a save in the background raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops the threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _target(x: Any) -> Any:
    """What orbax is to make of a leaf; it would guess the device of an abstract one from the file."""
    if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    return x


def _described(tree: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every leaf by path; a PRNG key is described by the words it is stored as."""
    described = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        has_shape = hasattr(x, "shape") and hasattr(x, "dtype")
        described[path_name(path)] = (tuple(x.shape), np.dtype(x.dtype).name) if has_shape else ((), "scalar")
    return described


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    faults = [f"{path} missing" for path in saved if path not in wanted]
    faults += [f"{path} not in the checkpoint" for path in wanted if path not in saved]
    for path in wanted:
        if path in saved and saved[path] != wanted[path]:
            (shape, dtype), (old_shape, old_dtype) = wanted[path], saved[path]
            faults.append(f"{path} {dtype}{list(shape)} for {old_dtype}{list(old_shape)}")
    return faults
