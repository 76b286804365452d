"""The command line of an experiment, from its arguments to its exit status: what all experiments do in one way."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxft.core.checks import require
from jaxft.lab.config import parse_config
from jaxft.lab.devices import is_writer, make_mesh, peak_memory_bytes, setup_compilation_cache, start_distributed
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.report import Row, progress, rich_table
from jaxft.lab.resumable import Stopped
from jaxft.lab.run import Run, open_run


class Table(NamedTuple):
    """Rows for the screen."""

    rows: Sequence[Row]
    columns: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Job:
    """What an experiment does with a configuration."""

    parts: int
    """Number of parts, for the progress bar."""
    parts_name: str
    execute: Callable[[Run, Interrupts, Mesh | None, Any], int]
    """``execute(run, stop, mesh, advance)``: does the parts and returns how many came to an end."""
    report: Callable[[Run, str], tuple[str, Sequence[Table]]]
    """``report(run, cost)``: writes what belongs into the folder; the text of the report, and tables for the screen."""
    all_diverged: str
    """What to say where no part came to an end."""


def launch(
    slug: str,
    config_type: type,
    presets: Mapping[str, Any],
    argv: Sequence[str],
    *,
    load: Callable[[Any], Any],
    make_job: Callable[[Any, Any], Job],
) -> int:
    """Runs, resumes or reports an experiment.

    Args:
      slug: Of the experiment.
      config_type: Its configuration, with fields ``seed`` and ``training.batch_size``.
      presets: Configurations by name.
      argv: Arguments after the slug.
      load: ``load(config)``: reads the user's files, so that their faults show before a run's folder is made.
      make_job: ``make_job(config, loaded)``: what is costly and not needed where the run is finished.

    Returns:
      The exit status: 0 when finished, 1 where every part diverged, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
      UserError: Faulty input; the command line turns it into exit status 2.
    """
    began = time.monotonic()
    prog = f"python -m experiments run {slug}"
    config, options, preset = parse_config(config_type, presets, argv, prog=prog)
    start_distributed(options.distributed)
    setup_compilation_cache()
    with jax.default_matmul_precision("highest"):
        b, devices = config.training.batch_size, jax.device_count()
        require(b % devices == 0, prog, f"training.batch_size must split over {devices} devices", b, "Change it")
        loaded = load(config)
        mesh = make_mesh() if devices > 1 else None
        with open_run(slug, config, preset=preset, seed=config.seed, where=options) as run:
            if run.finished:
                print(run.report())
                return 0
            print(f"run: {run.directory}", file=sys.stderr)
            job = make_job(config, loaded)
            with Interrupts() as stop:
                try:
                    with progress(job.parts, job.parts_name) as advance:
                        ended = job.execute(run, stop, mesh, advance)
                except Stopped:
                    print("Stopped; the same command goes on from here.", file=sys.stderr)
                    return stop.exit_status
            if not ended:
                run.mark("failed", message=job.all_diverged)
                print(job.all_diverged, file=sys.stderr)
                return 1
            if is_writer():
                _finish(run, job, time.monotonic() - began)
    return 0


def _finish(run: Run, job: Job, seconds: float) -> None:
    peaks = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in peak_memory_bytes().items())
    report, tables = job.report(run, f"The last start of this run took {seconds:.0f} s; peak memory: {peaks}.")
    run.finish(report)
    for table in tables:
        rich_table(table.rows, table.columns)
        print()
    print(f"report: {run.directory / 'report.md'}")
