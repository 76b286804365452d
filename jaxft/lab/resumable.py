"""What the phases of a run share: its records, its checkpoints, and whether an earlier start has done them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jaxft.lab.interrupts import Interrupts
from jaxft.lab.run import Run
from jaxft.train import Checkpoints, fully_shard, replicate


class Stopped(Exception):
    """The user asked to stop; everything up to the last event is kept."""


@dataclasses.dataclass(frozen=True)
class Resumable:
    """A run that goes on from its last checkpoint."""

    run: Run
    stop: Interrupts
    checkpoints: Checkpoints
    restored: int
    """Step of the checkpoint the run continues from; -1 at a first start."""
    mesh: Mesh | None
    sharding: Literal["replicated", "full"]
    """Placement of training states where there is a mesh."""
    history: list[dict[str, Any]]
    """All records of the run so far: the file is read once."""

    def record(self, step: int, kind: str, **fields: Any) -> None:
        """Appends to the metrics what was measured at a step."""
        found = {"step": step, "kind": kind, **fields}
        self.run.records.append(found)
        self.history.append(found)

    def recorded(self, kind: str, key: dict[str, Any]) -> bool:
        """Whether the metrics hold a record of this kind with these fields."""
        return any(r["kind"] == kind and key.items() <= r.items() for r in self.history)

    def place(self, tree: Any) -> Any:
        """A training state on the devices."""
        if self.mesh is None:
            return tree
        return (fully_shard if self.sharding == "full" else replicate)(tree, self.mesh)


@contextlib.contextmanager
def resume(
    run: Run, stop: Interrupts, *, mesh: Mesh | None, sharding: Literal["replicated", "full"]
) -> Iterator[Resumable]:
    """Opens the checkpoints of a run, and cuts its records back to the latest of them.

    Args:
      run: The run.
      stop: Says whether the user asked to stop.
      mesh: Devices of the run.
      sharding: Placement of training states on them.

    Yields:
      What the phases share.
    """
    with Checkpoints(run.checkpoints, keep=2) as checkpoints:
        latest = checkpoints.latest_step()
        restored = -1 if latest is None else latest
        run.records.cut_back(restored)
        if jax.process_count() > 1:  # the others read what process 0 has cut
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("cut back")
        yield Resumable(run, stop, checkpoints, restored, mesh, sharding, run.records.read())
