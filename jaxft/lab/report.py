"""What a run says: numbers in three digits, tables for Markdown, CSV and the terminal, progress.

Where the output is no terminal everything is plain text, so that a log can be read and compared.
"""

import contextlib
import csv
import io
import math
import numbers
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO, cast

from jaxft.core.findings import Finding
from jaxft.lab.devices import is_writer
from jaxft.lab.records import write_atomically

Row = Mapping[str, Any]
Output = TextIO | io.TextIOBase
FINDING_COLUMNS = ("claim", "predicted", "measured", "status")
COLOURS = {"holds": "green", "violated": "red", "inconclusive": "yellow"}


def format_number(value: Any) -> str:
    """A number in three significant digits; integers, text and other values as they are, ``None`` as a dash.

    Example:
      >>> [format_number(x) for x in (0.123456, 1234.5, 2e-7, 7, True, None, float("nan"), "a")]
      ['0.123', '1230', '2e-07', '7', 'True', '–', 'nan', 'a']
    """
    if value is None:
        return "–"
    if isinstance(value, bool | numbers.Integral | str) or not isinstance(value, numbers.Real):
        return str(value)
    number = float(value)
    if not math.isfinite(number) or number == 0:
        return str(number) if number else "0"
    rounded = float(f"{number:.3g}")
    return f"{rounded:.3g}" if abs(rounded) < 1e3 or abs(rounded) >= 1e6 else f"{rounded:.0f}"


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a Markdown table; numbers are aligned right, a missing cell is a dash.

    Example:
      >>> print(markdown_table([{"task": "sst2", "accuracy": 0.91234}], ["task", "accuracy"]))
      | task | accuracy |
      | :--- | ---: |
      | sst2 | 0.912 |
    """
    rule = ["---:" if _numeric(rows, column) else ":---" for column in columns]
    body = [[_escape(format_number(row.get(column))) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [[_escape(c) for c in columns], rule, *body])


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Rows as CSV in full precision, written at once; a missing cell is empty.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "table.csv"
      >>> write_csv(path, [{"task": "sst2", "accuracy": 2 / 3}], ["task", "accuracy"])
      >>> path.read_text().splitlines()
      ['task,accuracy', 'sst2,0.6666666666666666']
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[_exact(row.get(column)) for column in columns] for row in rows])
    write_atomically(path, text.getvalue())


def rich_table(rows: Sequence[Row], columns: Sequence[str], *, title: str = "", file: Output | None = None) -> None:
    """Prints rows as a table: drawn and coloured on a terminal, aligned plain text elsewhere.

    Args:
      rows: Cells by column.
      columns: Columns shown, in this order.
      title: Line above the table.
      file: Where to print; ``None`` is stdout.

    Example:
      >>> rich_table([{"task": "sst2", "accuracy": 0.9}, {"task": "rte", "accuracy": 0.525}], ["task", "accuracy"])
      task  accuracy
      sst2       0.9
      rte      0.525
    """
    out = file or sys.stdout
    cells = [[format_number(row.get(column)) for column in columns] for row in rows]
    right = [_numeric(rows, column) for column in columns]
    if not out.isatty():
        widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
        for line in [*([[title]] if title else []), columns, *cells]:
            padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=False)]
            print("  ".join(padded).rstrip(), file=out)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None)
    for column, to_right in zip(columns, right, strict=True):
        table.add_column(Text(column), justify="right" if to_right else "left")
    for line in cells:
        table.add_row(*[Text(cell, style=COLOURS.get(cell, "")) for cell in line])
    Console(file=cast(IO[str], out)).print(table)


def finding_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as rows of ``FINDING_COLUMNS``, for any of the tables.

    Example:
      >>> finding_rows([Finding("width", 1.0, 1.04, 0.03, 0.1, "holds")])
      [{'claim': 'width', 'predicted': 1.0, 'measured': '1.04 ± 0.03', 'status': 'holds'}]
    """
    return [
        {"claim": f.claim, "predicted": f.predicted, "measured": _with_error(f.measured, f.stderr), "status": f.status}
        for f in findings
    ]


@contextlib.contextmanager
def progress(
    total: int, description: str, *, done: int = 0, every_s: float = 5.0, file: Output | None = None
) -> Iterator[Callable[..., None]]:
    """Progress of a loop: a bar with the time left on a terminal, a plain line every few seconds elsewhere.

    Args:
      total: Steps of the whole loop.
      description: What the loop does.
      done: Steps an earlier run has done.
      every_s: Least time between two plain lines; the last step always has one.
      file: Where to show it; ``None`` is stderr.

    Yields:
      ``advance(steps=1, note="")``, to be called after each step or several. Process 0 alone shows anything.

    Example:
      >>> with progress(2, "train", file=sys.stdout) as advance:
      ...     advance(note="loss 0.7")
      ...     advance(note="loss 0.5")
      train: 1/2 (50%), ... left, loss 0.7
      train: 2/2 (100%), loss 0.5
    """
    out = file or sys.stderr
    if not is_writer():
        yield lambda steps=1, note="": None
    elif out.isatty():
        with _bar(total, description, done, out) as advance:
            yield advance
    else:
        yield _plain_progress(total, description, done, every_s, out)


def _plain_progress(total: int, description: str, done: int, every_s: float, out: Output) -> Callable[..., None]:
    start, first, last = time.monotonic(), done, -math.inf

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= every_s or done >= total:
            last = now
            left = (now - start) / max(done - first, 1) * (total - done)
            eta = f", {_duration(left)} left" if done < total else ""
            tail = f", {note}" if note else ""
            print(f"{description}: {done}/{total} ({100 * done // max(total, 1)}%){eta}{tail}", file=out, flush=True)

    return advance


@contextlib.contextmanager
def _bar(total: int, description: str, done: int, out: Output) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(file=cast(IO[str], out))) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda steps=1, note="": bar.update(task, advance=steps, note=note)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _with_error(value: float, stderr: float) -> str:
    return f"{format_number(value)} ± {format_number(stderr)}" if stderr else format_number(value)


def _numeric(rows: Sequence[Row], column: str) -> bool:
    cells = [row[column] for row in rows if row.get(column) is not None]
    return bool(cells) and all(isinstance(c, numbers.Real) and not isinstance(c, bool) for c in cells)


def _exact(value: Any) -> str:
    """Text that reads back as the same number."""
    if value is None:
        return ""
    if isinstance(value, numbers.Real) and not isinstance(value, bool | numbers.Integral):
        return repr(float(value))
    return str(value)


def _escape(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
