"""From files to examples and splits: which column is which text, which label is which class, which file which split."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxft.core.checks import require
from jaxft.core.rng import host_stream
from jaxft.data.records import LABEL_COLUMNS, PAIR_COLUMNS, TEXT_COLUMNS, Fault, Record, read_records, shown_faults
from jaxft.data.tasks import Task

_SUFFIXES = (".tsv", ".csv", ".jsonl")
_DEV_NAMES = ("dev", "dev_matched", "validation", "val")
_FOLDER_NAMES = {"rte": {"rte", "entailment"}}


class Example(NamedTuple):
    """A labelled text, or pair of texts."""

    text_a: str
    text_b: str | None
    """``None`` for tasks of one text."""
    label: int
    """Index into the task's classes."""


class Splits(NamedTuple):
    """What is trained on (and k-shot samples are drawn from), and what is tested on."""

    train: list[Example]
    test: list[Example]
    source: str
    """Which files, and how they were split, for the record of a run."""


def read_examples(path: str | Path, task: Task) -> list[Example]:
    r"""The examples of one file, in its order.

    Read are ``.tsv`` (quote characters are literal; named columns as in GLUE), ``.csv``, ``.jsonl`` and the ``.xml``
    of RTE; tables without a header hold the label first. Labels are numbers from 0 or the task's ``label_names``.
    Pairs of a three-way task that are labelled ``-`` (annotators disagreed) are left out, as is usual for those sets.

    Args:
      path: The file, in UTF-8.
      task: Says whether there are one or two texts, and which labels there are.

    Returns:
      At least one example.

    Raises:
      UserError: No such file, or lines that are no example of the task: each is given as ``file:line: fault``.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxft.data.tasks import get_task
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "train.tsv")
      ...     _ = path.write_text("sentence\tlabel\na fine film\t1\n")
      ...     read_examples(path, get_task("sst2"))
      [Example(text_a='a fine film', text_b=None, label=1)]
    """
    path = Path(path)
    return _to_examples(path, read_records(path), task)


def load_splits(folder: str | Path, task: Task) -> Splits:
    """Training and test examples of a task from a folder of files.

    The folder is the task's own, or holds it one or two levels down under the task's name (case and punctuation
    aside, ``entailment`` too for rte). In it are

    - ``train`` with ``test`` or ``dev`` (``.tsv``, ``.csv`` or ``.jsonl``); a ``test`` without labels, as in GLUE,
      gives way to ``dev``;
    - in a k-shot folder ``<k>-<seed>``, ``train``, ``dev`` and ``test``: train and dev are joined;
    - for rte, ``rte*_dev.xml`` (trained on) and ``rte*_test.xml``;
    - or ``all``, of which a fixed fifth becomes the test split.

    Args:
      folder: Where to look.
      task: What to look for.

    Returns:
      The splits and where they come from.

    Raises:
      UserError: The task is not there, is there twice, or its files are faulty.
    """
    folder = Path(folder)
    require(folder.is_dir(), "load_splits", "the data folder must exist", folder, "Check the path")
    home = _locate(folder, task)
    train, xml = _split_files(home, ("train",)), sorted(home.glob("rte*_dev.xml"))
    if train:
        return _load_train_test(home, train[0], task)
    if xml and task.name == "rte":
        tests = sorted(home.glob("rte*_test.xml"))
        require(bool(tests), "load_splits", "rte*_dev.xml needs rte*_test.xml beside it", home, "Add the test files")
        names = [" + ".join(path.name for path in paths) for paths in (xml, tests)]
        return Splits(_read_all(xml, task), _read_all(tests, task), f"train: {names[0]}; test: {names[1]}")
    return _split_one_file(_split_files(home, ("all",))[0], task)


def _to_examples(path: Path, records: Sequence[Record | Fault], task: Task) -> list[Example]:
    made = [(r.line, r.text if isinstance(r, Fault) else _example(r.fields, task)) for r in records]
    faults = [Fault(line, item) for line, item in made if isinstance(item, str)]
    labels = ", ".join(f"{i} or {name}" for i, name in enumerate(task.label_names))
    rule = f"each line must hold {'two texts' if task.pair else 'a text'} and a label of {task.name} ({labels})"
    require(not faults, "read_examples", rule, shown_faults(path, faults), f"Correct {path.name}")
    examples = [item for _, item in made if isinstance(item, Example)]
    require(bool(examples), "read_examples", "a file must hold examples", f"none in {path}", "Check the file")
    return examples


def _example(fields: dict[str, str], task: Task) -> Example | str | None:
    """The example, or its fault, or ``None`` where annotators found no label."""
    options: list[tuple[str, ...]] = list(PAIR_COLUMNS) if task.pair else [(name,) for name in TEXT_COLUMNS]
    names = next((names for names in options if all(name in fields for name in names)), None)
    if names is None:
        return f"no text in a column {' or '.join('+'.join(names) for names in options)}"
    texts = [fields[name].strip() for name in names]
    if not all(texts):
        return f"empty text in column {names[texts.index('')]}"
    label = _label(fields)
    if not label:
        return f"no label in a column {' or '.join(LABEL_COLUMNS)}"
    if label == "-" and "neutral" in task.label_names and task.pair:
        return None
    index = _class_index(label, task)
    if index is None:
        return f"label {label!r} is none of {task.name}"
    return Example(texts[0], texts[1] if task.pair else None, index)


def _label(fields: dict[str, str]) -> str:
    return next((fields[name].strip() for name in LABEL_COLUMNS if name in fields), "")


def _class_index(label: str, task: Task) -> int | None:
    names = [name.casefold() for name in task.label_names]
    name = re.sub(r"[\s-]+", "_", label.casefold())
    if name in names:
        return names.index(name)
    numbers = [str(i) for i in range(len(names))]
    return numbers.index(label) if label in numbers else None


def _locate(folder: Path, task: Task) -> Path:
    if _holds_splits(folder, task):
        return folder
    wanted = _FOLDER_NAMES.get(task.name, {task.name})
    named = [
        child
        for level in ("*", "*/*")
        for child in sorted(folder.glob(level))
        if child.is_dir() and re.sub(r"[^a-z0-9]", "", child.name.lower()) in wanted
    ]
    homes = [child for child in named if _holds_splits(child, task)]
    places = ", ".join(str(home) for home in homes)
    require(len(homes) < 2, "load_splits", f"one folder must hold {task.name}", places, "Name the one you mean")
    shots = [str(shot) for child in (folder, *named) for shot in sorted(child.glob("*-*")) if _holds_splits(shot, task)]
    hint = f"Name one of the k-shot folders, as {shots[0]}" if shots else "Name the folder that holds the task"
    rule = (
        f"the folder must hold {task.name}: train with test or dev, or all (.tsv, .csv, .jsonl; rte*_dev.xml for rte)"
    )
    children = ", ".join(sorted(child.name for child in folder.iterdir())[:10]) or "nothing"
    require(bool(homes), "load_splits", rule, f"{folder} with {children}", hint)
    return homes[0]


def _holds_splits(folder: Path, task: Task) -> bool:
    xml = task.name == "rte" and any(folder.glob("rte*_dev.xml"))
    return xml or bool(_split_files(folder, ("train", "all")))


def _split_files(folder: Path, names: Sequence[str]) -> list[Path]:
    paths = (folder / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return [path for path in paths if path.is_file()]


def _load_train_test(home: Path, train: Path, task: Task) -> Splits:
    test, dev = _split_files(home, ("test",))[:1], _split_files(home, _DEV_NAMES)[:1]
    records = [record for path in test for record in read_records(path)]
    if test and _labelled(records):
        trained = [train, *dev] if re.fullmatch(r"\d+-\d+", home.name) else [train]
        names = " + ".join(path.name for path in trained)
        tested = _to_examples(test[0], records, task)
        return Splits(_read_all(trained, task), tested, f"train: {names}; test: {test[0].name}")
    got = f"{home} without a dev file and with {'an unlabelled' if test else 'no'} test file"
    require(bool(dev), "load_splits", "a labelled test or dev file must stand beside train", got, "Add one")
    note = f" ({test[0].name} has no labels)" if test else ""
    source = f"train: {train.name}; test: {dev[0].name}{note}"
    return Splits(read_examples(train, task), read_examples(dev[0], task), source)


def _labelled(records: Sequence[Record | Fault]) -> bool:
    """Whether a file has labels at all; one with faults alone is left to the reader to refuse."""
    found = [_label(record.fields) not in ("", "-1") for record in records if isinstance(record, Record)]
    return any(found) or not found


def _read_all(paths: Sequence[Path], task: Task) -> list[Example]:
    return [example for path in paths for example in read_examples(path, task)]


def _split_one_file(path: Path, task: Task) -> Splits:
    examples = read_examples(path, task)
    order = host_stream(0, f"split/{task.name}").permutation(len(examples))
    cut = len(examples) - len(examples) // 5
    train, test = ([examples[i] for i in sorted(part)] for part in (order[:cut], order[cut:]))
    require(bool(test), "load_splits", "a file to be split must hold 5 examples", f"{len(examples)} in {path}", "Add")
    return Splits(train, test, f"{path.name}: a fixed random fifth is the test split, the rest train")
