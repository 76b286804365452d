"""Files of labelled texts as records: the named fields of each line, or what is wrong with it.

Forms: tab-separated (quote characters are literal), comma-separated (quoted as in the csv module), one JSON object a
line, and the XML of the RTE challenges. A faulty line becomes a ``Fault``, so that a reader can report all of them.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

from jaxft.core.checks import require

PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("#1 string", "#2 string"),
)
"""Columns of two texts, in the order in which they are looked for."""

TEXT_COLUMNS = ("sentence", "text", "text_a", "review", "question")
"""Columns of one text."""

LABEL_COLUMNS = ("label", "gold_label", "is_duplicate", "quality")

_TEXTS = {*TEXT_COLUMNS, *(name for pair in PAIR_COLUMNS for name in pair)}
_KNOWN = _TEXTS | set(LABEL_COLUMNS)
_HEADERLESS = {2: ["label", "text"], 3: ["label", "text_a", "text_b"]}
_ENTAILMENT = {"TRUE": "entailment", "YES": "entailment", "FALSE": "not_entailment", "NO": "not_entailment"}


class Record(NamedTuple):
    """The known fields of one example."""

    line: int
    """Where it begins in the file, from 1."""
    fields: dict[str, str]
    """Values by lower-case column name; columns that no task reads are left out."""


class JsonObject(NamedTuple):
    """A JSON object of a file, whatever its fields."""

    line: int
    """Where it begins in the file, from 1."""
    fields: dict[str, Any]


class Fault(NamedTuple):
    """What is wrong with a line."""

    line: int
    text: str


MOST_SHOWN = 5
"""Faults that a message spells out."""


def shown_faults(source: Path | str, faults: Sequence[Fault]) -> str:
    """The first faults as ``source:line: what is wrong``, and how many more there are.

    Example:
      >>> shown_faults("a.tsv", [Fault(3, "no label")])
      'a.tsv:3: no label'
    """
    more = f" and {len(faults) - MOST_SHOWN} more" if len(faults) > MOST_SHOWN else ""
    return "; ".join(f"{source}:{fault.line}: {fault.text}" for fault in faults[:MOST_SHOWN]) + more


Rows = Iterable[tuple[int, list[str]]]


def read_records(path: Path) -> list[Record | Fault]:
    """The records of a file, in its order; the suffix decides the form.

    A table may lack a header: two columns are then label and text, three are label and two texts.

    Args:
      path: A ``.tsv``, ``.csv``, ``.jsonl`` or ``.xml`` file in UTF-8.

    Returns:
      A record or a fault for each example.

    Raises:
      UserError: No such file, or a suffix that is not read.
    """
    forms = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
    known = sorted([*forms, ".xml"])
    known_suffix = path.suffix in known
    require(known_suffix, "read_examples", f"a file of examples must end in one of {known}", path, "Convert it")
    require(path.is_file(), "read_examples", "the file must exist", path, "Check the path")
    raw = path.read_bytes()
    if path.suffix == ".xml":
        return _read_rte_xml(raw)
    text = _decoded(raw)
    return [text] if isinstance(text, Fault) else list(forms[path.suffix](text))


def read_json_objects(path: Path, *, where: str = "read_json_objects") -> list[JsonObject | Fault]:
    """The objects of a file of JSON: one a line (``.jsonl``), or those of a list (``.json``, which may hold lines too).

    Args:
      path: The file, in UTF-8.
      where: Name of the reader, for messages.

    Returns:
      An object or a fault for each; of a list that is no JSON, its fault alone.

    Raises:
      UserError: No such file, or another suffix.
    """
    known = path.suffix in (".jsonl", ".json")
    require(known, where, "a file of JSON objects must end in .jsonl or .json", path, "Convert it")
    require(path.is_file(), where, "the file must exist", path, "Check the path")
    text = _decoded(path.read_bytes())
    if isinstance(text, Fault):
        return [text]
    listed = path.suffix == ".json" and text.lstrip().startswith("[")
    return list(_json_list(text) if listed else _json_lines(text))


def _decoded(raw: bytes) -> str | Fault:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = raw[error.start : error.start + 1].hex()
        return Fault(raw.count(b"\n", 0, error.start) + 1, f"byte 0x{bad} is not UTF-8")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Only "\n" ends a line: str.splitlines also breaks at characters that occur inside of sentences.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line


def _read_tsv(text: str) -> list[Record | Fault]:
    return _table((number, line.split("\t")) for number, line in _lines(text))


def _read_csv(text: str) -> list[Record | Fault]:
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        return [*_table(rows), Fault(line, f"not csv ({error})")]
    return _table(rows)


def _table(rows: Rows) -> list[Record | Fault]:
    rows = list(rows)
    if not rows:
        return []
    line, first = rows[0]
    names = [cell.strip().lower() for cell in first]
    if any(name in _TEXTS for name in names) and not any(name.isdigit() for name in names):
        rows = rows[1:]
    elif len(names) in _HEADERLESS:
        names = _HEADERLESS[len(names)]
    else:
        return [Fault(line, f"no known text column in the header {first}")]
    return [_row(number, names, cells) for number, cells in rows]


def _row(line: int, names: list[str], cells: list[str]) -> Record | Fault:
    if len(cells) != len(names):
        return Fault(line, f"{len(cells)} columns where {len(names)} are expected")
    return Record(line, {name: cell for name, cell in zip(names, cells, strict=True) if name in _KNOWN})


def _read_jsonl(text: str) -> Iterator[Record | Fault]:
    for item in _json_lines(text):
        if isinstance(item, Fault):
            yield item
            continue
        scalars = {k.lower(): str(v) for k, v in item.fields.items() if isinstance(v, str | int | float)}
        yield Record(item.line, {name: scalar for name, scalar in scalars.items() if name in _KNOWN})


def _json_lines(text: str) -> Iterator[JsonObject | Fault]:
    for number, line in _lines(text):
        try:
            yield _json_object(number, json.loads(line))
        except json.JSONDecodeError as error:
            yield Fault(number, f"not JSON ({error.msg} at column {error.colno})")


def _json_object(line: int, value: Any) -> JsonObject | Fault:
    if isinstance(value, dict):
        return JsonObject(line, value)
    return Fault(line, f"a JSON {type(value).__name__} where an object is expected")


_BETWEEN_ITEMS = re.compile(r"\s*,?\s*")


def _json_list(text: str) -> Iterator[JsonObject | Fault]:
    """Items one by one, since ``json.loads`` would not say on which line an item begins."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        yield Fault(error.lineno, f"not JSON ({error.msg} at column {error.colno})")
        return
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        separator = _BETWEEN_ITEMS.match(text, at)
        at = separator.end() if separator else at
        if text[at] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        value, at = decoder.raw_decode(text, at)
        yield _json_object(line, value)


def _read_rte_xml(raw: bytes) -> list[Record | Fault]:
    """Elements ``<pair value="TRUE"|entailment="YES"><t>..</t><h>..</h></pair>``, with the line of each."""
    out: list[Record | Fault] = []
    columns = {"t": "premise", "h": "hypothesis"}
    column: str | None = None
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal column
        column = columns.get(tag)
        if tag == "pair":
            mark = attributes.get("value", attributes.get("entailment", ""))
            label = {"label": _ENTAILMENT.get(mark.upper(), mark)} if mark else {}
            out.append(Record(parser.CurrentLineNumber, label))

    def text(data: str) -> None:
        if column and out and isinstance(out[-1], Record):
            fields = out[-1].fields
            fields[column] = fields.get(column, "") + data

    def end(_: str) -> None:
        nonlocal column
        column = None

    parser.StartElementHandler, parser.CharacterDataHandler, parser.EndElementHandler = start, text, end
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        # The pair that was open is cut short: the fault of the file stands for it.
        return [*out[:-1], Fault(error.lineno, f"not XML ({expat.ErrorString(error.code)})")]
    return out
