"""Devices of a run: starting several processes, meshes, the compilation cache, peak memory."""

import math
import os
import platform
import resource
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

from jaxft.core.checks import UserError, message, require

CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
EVERY_WORKER = "Run this same command on every worker: each waits for all the others"


def start_distributed(requested: bool) -> None:
    """Starts ``jax.distributed`` on a TPU pod, or where it was asked for; does nothing elsewhere, or the second time.

    The cluster is what ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` say, or else what
    jax detects (TPU pod, Slurm, Open MPI). Call it before anything touches a device.

    Args:
      requested: Whether the command line asked (``--distributed``).

    Raises:
      UserError: The variables are incomplete or no numbers, or the processes did not find each other.

    Example:
      >>> start_distributed(False)
    """
    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    if not (requested or pod) or jax.distributed.is_initialized():
        return
    where, found = "start_distributed", {name: os.environ[name] for name in CLUSTER if os.environ.get(name)}
    missing = ", ".join(name for name in CLUSTER if name not in found)
    require(len(found) in (0, 3), where, f"{', '.join(CLUSTER)} are set together", f"no {missing}", f"Set {missing}")
    numbers = all(found[name].isdecimal() for name in CLUSTER[1:] if name in found)
    require(numbers, where, f"{CLUSTER[1]} and {CLUSTER[2]} must be numbers", found, "Set them to 2 and 0, say")
    print(f"{where}: waiting for all workers. {EVERY_WORKER}.", file=sys.stderr, flush=True)
    try:
        if found:
            address, processes, process = (found[name] for name in CLUSTER)
            jax.distributed.initialize(address, int(processes), int(process))
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        way_out = f"{EVERY_WORKER}, with {', '.join(CLUSTER)} set where no cluster is detected"
        got = str(error).strip().rstrip(".")
        raise UserError(message(where, "jax.distributed must start before any device is used", got, way_out)) from error


def is_writer() -> bool:
    """Whether this process writes the run's files and talks to the terminal: process 0 alone does."""
    return jax.process_index() == 0


def make_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh with Auto axes: the compiler places what no annotation does.

    Args:
      shape: Devices along each named axis; ``None`` puts all on ``data``. Fewer than there are is allowed in a single
        process, where the first ones are taken.

    Returns:
      The mesh.

    Raises:
      UserError: A size is not positive, or the product does not fit the devices.

    Example:
      >>> make_mesh({"data": 1}).axis_names
      ('data',)
    """
    devices = jax.devices()
    shape = {"data": len(devices)} if shape is None else dict(shape)
    product = math.prod(shape.values())
    positive = bool(shape) and all(size > 0 for size in shape.values())
    require(positive, "make_mesh", "an axis has at least one device", shape, "Leave the axis out, or give it size 1")
    fits = product == len(devices) or (product < len(devices) and jax.process_count() == 1)
    rule = f"the sizes must multiply to the {len(devices)} devices (one process may take fewer)"
    require(fits, "make_mesh", rule, f"{shape}, {product} devices", "Change a size, or pass none for all on data")
    sizes, names = tuple(shape.values()), tuple(shape)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices[:product])


def cache_dir() -> Path:
    """Folder of what can be made again: ``$JAXFT_CACHE``, else ``jaxft`` in the user's cache folder.

    Example:
      >>> isinstance(cache_dir(), Path)
      True
    """
    if os.environ.get("JAXFT_CACHE"):
        return Path(os.environ["JAXFT_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jaxft"


def setup_compilation_cache() -> Path:
    """Keeps compiled programs between processes, in a folder of the user's for this kind of processor.

    A folder that jax was already given is left in place.

    Returns:
      The folder.
    """
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given:
        return Path(given)
    folder = cache_dir() / "xla" / f"{platform.machine()}-{_processor():08x}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def peak_memory_bytes() -> dict[str, int]:
    """Most memory held so far: by this process on the ``host``, and on its fullest ``device`` where it says.

    Example:
      >>> peak_memory_bytes()["host"] > 2**20
      True
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    on_device = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return peak | ({"device": max(on_device)} if on_device else {})


def _processor() -> int:
    """Fingerprint of the processor's instruction set: a shared home folder must not mix two kinds."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    return zlib.crc32(flags[0].encode())
