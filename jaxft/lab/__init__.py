"""The workplace of an experiment: configuration, run directory, records, report, figures, devices, interruption.

``config`` reads the command line, ``run`` makes or resumes the directory that belongs to it, ``records`` keeps its
measurements, ``resumable`` goes on from its last checkpoint, ``report`` and ``figures`` show what came out, ``devices``
starts processes and meshes, ``interrupts`` turns Ctrl-C into a checkpoint. What is heavy to import (tyro, rich,
matplotlib) is imported where it is used.
"""

from jaxft.lab.config import RunOptions, config_faults, config_hash, config_json, differences, parse_config
from jaxft.lab.devices import (
    cache_dir,
    is_writer,
    make_mesh,
    peak_memory_bytes,
    setup_compilation_cache,
    start_distributed,
)
from jaxft.lab.figures import (
    Drawing,
    draw_agreement,
    draw_drift,
    draw_dynamics,
    draw_scatter,
    draw_trees,
    save_figure,
)
from jaxft.lab.interrupts import Interrupts
from jaxft.lab.records import Records, atomic_file, jsonable, write_atomically, write_json
from jaxft.lab.report import (
    FINDING_COLUMNS,
    finding_rows,
    format_number,
    markdown_table,
    progress,
    rich_table,
    write_csv,
)
from jaxft.lab.resumable import Resumable, Stopped, resume
from jaxft.lab.run import Run, open_run

__all__ = [
    "FINDING_COLUMNS",
    "Drawing",
    "Interrupts",
    "Records",
    "Resumable",
    "Run",
    "RunOptions",
    "Stopped",
    "atomic_file",
    "cache_dir",
    "config_faults",
    "config_hash",
    "config_json",
    "differences",
    "draw_agreement",
    "draw_drift",
    "draw_dynamics",
    "draw_scatter",
    "draw_trees",
    "finding_rows",
    "format_number",
    "is_writer",
    "jsonable",
    "make_mesh",
    "markdown_table",
    "open_run",
    "parse_config",
    "peak_memory_bytes",
    "progress",
    "resume",
    "rich_table",
    "save_figure",
    "setup_compilation_cache",
    "start_distributed",
    "write_atomically",
    "write_csv",
    "write_json",
]
