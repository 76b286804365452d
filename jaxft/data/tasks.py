"""The classification tasks: how an example becomes a cloze prompt, and which word stands for which class.

A template holds ``{mask}`` once, ``{a}`` once, and ``{b}`` once where the task has two texts. Class ``i`` is
``label_names[i]`` in a file (the number ``i`` is read as well) and ``label_words[i]`` at the mask. The order of classes
is the one in which the sets are commonly numbered: negative before positive, not-a-paraphrase before paraphrase, and
entailment first (so 0 is entailment, 1 neutral, 2 contradiction, or 1 not_entailment).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxft.core.checks import nearest, require

_PLACEHOLDER = re.compile(r"\{(a|b|mask)\}")


class Slot(NamedTuple):
    """A place of a template that is filled: ``a``, ``b`` or ``mask``."""

    name: str
    lead: str
    """The white space before it, which goes with the text put there."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task and its prompt."""

    name: str
    template: str
    """Text with ``{a}``, ``{mask}`` and, for pairs, ``{b}``."""
    label_words: tuple[str, ...]
    """The word at the mask, one a class."""
    label_names: tuple[str, ...]
    """The class as files name it, in the same order."""
    pair: bool
    max_tokens: int
    """Length to which a prompt is cut, special tokens included."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.label_words)


def _task(name: str, template: str, words: str, names: str, *, pair: bool = False, max_tokens: int = 128) -> Task:
    return Task(name, template, tuple(words.split()), tuple(names.split()), pair, max_tokens)


_SENTIMENT = ("{a} It was {mask} .", "terrible great", "negative positive")
_ENTAILMENT = ("{a} ? {mask} , {b}", "Yes Maybe No", "entailment neutral contradiction")
_ANSWERS = ("{a} ? {mask} , {b}", "Yes No", "entailment not_entailment")

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _task("sst2", *_SENTIMENT),
        _task(
            "sst5",
            "{a} It was {mask} .",
            "terrible bad okay good great",
            "very_negative negative neutral positive very_positive",
        ),
        _task("mr", *_SENTIMENT),
        _task("cr", *_SENTIMENT),
        _task("mpqa", *_SENTIMENT),
        _task("subj", "{a} This is {mask} .", "subjective objective", "subjective objective"),
        _task(
            "trec",
            "{mask} : {a}",
            "Description Entity Expression Human Location Number",
            "DESC ENTY ABBR HUM LOC NUM",
        ),
        _task(
            "agnews",
            "{a} This article is about {mask} news.",
            "world sports business tech",
            "world sports business sci/tech",
            max_tokens=256,
        ),
        _task("mnli", *_ENTAILMENT, pair=True, max_tokens=256),
        _task("snli", *_ENTAILMENT, pair=True, max_tokens=256),
        _task("qnli", *_ANSWERS, pair=True),
        _task("rte", *_ANSWERS, pair=True, max_tokens=256),
        _task("mrpc", "{a} {mask} , {b}", "No Yes", "not_equivalent equivalent", pair=True),
        _task("qqp", "{a} {mask} , {b}", "No Yes", "not_duplicate duplicate", pair=True),
        _task("reviews", "{a} it was {mask} .", "terrible great", "negative positive", max_tokens=24),
    )
}
"""The 14 tasks of the kernel view of fine-tuning, and ``reviews``, the generated one (``jaxft.data.reviews``).

Templates and words: Malladi et al. 2023, arXiv 2210.05643, after Gao, Fisch and Chen 2021, arXiv 2012.15723.
"""


def get_task(name: str) -> Task:
    """The task called ``name``.

    Args:
      name: A key of ``TASKS``.

    Returns:
      The task with its default prompt.

    Raises:
      UserError: No such task; the message names the nearest.

    Example:
      >>> get_task("rte").label_words
      ('Yes', 'No')
    """
    require(name in TASKS, "get_task", "task must be a known one", repr(name), nearest(name, TASKS))
    return TASKS[name]


def with_prompt(task: Task, *, template: str | None = None, label_words: Sequence[str] | None = None) -> Task:
    """The task with another prompt.

    Args:
      task: The task to change.
      template: Text with ``{mask}`` once, ``{a}`` once, and for pairs ``{b}`` once; ``None`` keeps it.
      label_words: One word a class, in the order of ``task.label_names``; ``None`` keeps them.

    Returns:
      The changed task. Whether each word is one token is for ``label_word_ids`` to say.

    Raises:
      UserError: The prompt does not fit the task; all faults are listed.

    Example:
      >>> with_prompt(get_task("mr"), template="{mask} ! {a}", label_words=["No", "Yes"]).template
      '{mask} ! {a}'
    """
    template = task.template if template is None else template
    words = task.label_words if label_words is None else tuple(label_words)
    faults = _template_faults(template, task.pair) + _word_faults(words, task)
    slots = "{a}, {b} and {mask}" if task.pair else "{a} and {mask}"
    rule = f"the prompt of {task.name} must hold {slots} once each, and {len(task.label_names)} distinct label words"
    example = " ".join(task.label_words)
    require(not faults, "with_prompt", rule, "; ".join(faults), f'As in "{task.template}" with {example}')
    return dataclasses.replace(task, template=template, label_words=words)


def template_parts(template: str) -> list[Slot | str]:
    """The template as literals and slots, in order.

    Example:
      >>> template_parts("{a} ? {mask} , {b}")
      [Slot(name='a', lead=''), ' ?', Slot(name='mask', lead=' '), ' ,', Slot(name='b', lead=' ')]
    """
    parts: list[Slot | str] = []
    # The split alternates literals with names of slots.
    pieces = _PLACEHOLDER.split(template)
    for literal, name in zip(pieces[::2], [*pieces[1::2], None], strict=True):
        text = literal.rstrip()
        parts += [text] if text else []
        parts += [Slot(name, literal[len(text) :])] if name else []
    return parts


def _template_faults(template: str, pair: bool) -> list[str]:
    found = _PLACEHOLDER.findall(template)
    wanted = {"mask": 1, "a": 1, "b": int(pair)}
    faults = [f"{{{slot}}} {found.count(slot)} times" for slot, count in wanted.items() if found.count(slot) != count]
    rest = _PLACEHOLDER.sub("", template)
    if "{" in rest or "}" in rest:
        faults.append(f"a brace outside the placeholders in {template!r}")
    return faults


def _word_faults(words: tuple[str, ...], task: Task) -> list[str]:
    faults = []
    if len(words) != len(task.label_names):
        faults.append(f"{len(words)} label words for the classes {', '.join(task.label_names)}")
    repeated = sorted({word for word in words if words.count(word) > 1})
    if repeated:
        faults.append(f"repeated label words {', '.join(map(repr, repeated))}")
    if any(not word.strip() for word in words):
        faults.append("an empty label word")
    return faults
