"""Preference pairs from files: a prompt, the response that was chosen and the one that was rejected.

What is read are the layouts in which such data are published, as strings or as chat messages:

===================================================  =======================================================
fields                                               where
===================================================  =======================================================
prompt, chosen, rejected                             explicit prompt
chosen, rejected                                     implicit prompt: what the two have in common at the start
question, chosen, rejected                           the same under other names, as are the next
question, response_j, response_k                     answers of which j was preferred
question, answer_matching_behavior,                  persona statements
answer_not_matching_behavior
instruction, chosen, rejected
instruction, [input], output_1, output_2,            AlpacaFarm
preference (1 or 2)
===================================================  =======================================================
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxft.core.checks import require
from jaxft.data.chat_templates import Message, message_faults
from jaxft.data.records import Fault, JsonObject, read_json_objects, shown_faults

Turns = str | list[Message]
"""A text, or the turns of a conversation."""

OnFault = Literal["refuse", "drop"]

COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("question", "response_j", "response_k"),
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
    ("instruction", "chosen", "rejected"),
)
"""Names of prompt, chosen and rejected, in the order in which they are looked for."""

SYSTEM = ("system", "system_prompt")
"""Names of a system message beside a prompt."""

ALPACA_FARM = ("instruction", "output_1", "output_2", "preference")


class PreferencePair(NamedTuple):
    """A prompt and two responses, all of them strings or all of them lists of chat messages."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    line: int
    """Where it stands in its file, from 1."""
    extra: dict[str, Any]
    """Fields that are no part of the pair, such as scores."""


class Preferences(NamedTuple):
    """The pairs of a file."""

    pairs: list[PreferencePair]
    dropped: list[Fault]
    """What was left out, by line; empty unless faulty responses may be dropped."""


def read_preferences(path: str | Path, *, prompt_end: str | None = None, on_fault: OnFault = "refuse") -> Preferences:
    r"""The preference pairs of a file, in its order; see the head of this module for the layouts.

    The implicit prompt of two conversations is their common turns. That of two strings is their common beginning, up
    to the start of the word in which they part, less the space before it; responses that themselves begin alike lose
    that beginning to the prompt, unless ``prompt_end`` says where a prompt ends. A prompt that is a string beside
    conversations which hold their own prompt gives way to theirs, and one that both conversations repeat is taken off.

    Args:
      path: A ``.jsonl`` or ``.json`` file in UTF-8.
      prompt_end: Text that ends an implicit prompt of strings, such as ``"\n\nAssistant:"``: its last occurrence in
        the common beginning counts.
      on_fault: Whether empty or identical responses are refused or dropped. Lines of no known layout are refused.

    Returns:
      At least one pair, and what was dropped.

    Raises:
      UserError: No such file, or lines that are no pair, each given as ``file:line: fault``.

    Example:
      >>> import json, pathlib, tempfile
      >>> row = {"chosen": "Q: sky? A: blue", "rejected": "Q: sky? A: green", "score": 3}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "pairs.jsonl")
      ...     _ = path.write_text(json.dumps(row))
      ...     read_preferences(path).pairs[0]
      PreferencePair(prompt='Q: sky? A:', chosen=' blue', rejected=' green', line=1, extra={'score': 3})

    Reference:
      Layouts: the preference type of TRL's data sets; AlpacaFarm, arXiv 2305.14387; persona statements, arXiv
      2212.09251.
    """
    path = Path(path)
    items = read_json_objects(path, where="read_preferences")
    return _collect("read_preferences", path, items, prompt_end, on_fault)


def make_preferences(
    rows: Iterable[Mapping[str, Any]], *, prompt_end: str | None = None, on_fault: OnFault = "refuse"
) -> Preferences:
    """Preference pairs of records that are in memory, in the same layouts; their numbers from 1 stand for lines.

    Args:
      rows: The records.
      prompt_end: As in ``read_preferences``.
      on_fault: As in ``read_preferences``.

    Returns:
      At least one pair, and what was dropped.

    Raises:
      UserError: Records that are no pair, each given as ``record:number: fault``.
    """
    items = [JsonObject(number, dict(row)) for number, row in enumerate(rows, 1)]
    return _collect("make_preferences", "record", items, prompt_end, on_fault)


def _collect(
    where: str, source: str | Path, items: Iterable[JsonObject | Fault], prompt_end: str | None, on_fault: OnFault
) -> Preferences:
    require(on_fault in ("refuse", "drop"), where, "on_fault must be refuse or drop", on_fault, "Pass one of them")
    broken: list[Fault] = []
    useless: list[Fault] = []
    pairs: list[PreferencePair] = []
    for item in items:
        made = item if isinstance(item, Fault) else _pair(item, prompt_end)
        if isinstance(made, Fault):
            broken.append(made)
        elif fault := _response_fault(made):
            useless.append(Fault(made.line, fault))
        else:
            pairs.append(made)
    drop = on_fault == "drop"
    faults = broken if drop else sorted([*broken, *useless])
    rule = "each line must hold a prompt, a chosen and a rejected response that differ"
    way_out = "Correct them" if broken else "Correct them, or pass on_fault='drop'"
    require(not faults, where, rule, shown_faults(source, faults), way_out)
    got = f"none in {source}" + (f" ({shown_faults(source, useless)})" if useless else "")
    require(bool(pairs), where, "there must be a pair", got, "Check the data")
    return Preferences(pairs, useless)


def _pair(item: JsonObject, prompt_end: str | None) -> PreferencePair | Fault:
    fields = item.fields
    named = next((names for names in COLUMNS if all(name in fields for name in names)), None)
    if named is not None:
        used, values = named, [fields[name] for name in named]
    elif all(name in fields for name in ALPACA_FARM):
        used, values = (*ALPACA_FARM, "input"), _alpaca_farm(fields)
    elif "chosen" in fields and "rejected" in fields:
        used, values = ("chosen", "rejected"), [None, fields["chosen"], fields["rejected"]]
    else:
        return Fault(item.line, _lacking(fields))
    if isinstance(values, str):
        return Fault(item.line, values)
    names = named or ("prompt", "chosen", "rejected")
    faults = [text for name, value in zip(names, values, strict=True) for text in _type_faults(name, value)]
    made = "; ".join(faults) if faults else _split(*values, prompt_end=prompt_end)
    if not isinstance(made, str):
        made = _with_system(*made, next((fields[name] for name in SYSTEM if fields.get(name)), None))
    if isinstance(made, str):
        return Fault(item.line, made)
    extra = {name: value for name, value in fields.items() if name not in (*used, *SYSTEM)}
    return PreferencePair(*made, line=item.line, extra=extra)


def _lacking(fields: dict[str, Any]) -> str:
    """What the layout that a record comes closest to would have besides."""
    closest = max([*COLUMNS, ALPACA_FARM], key=lambda names: sum(name in fields for name in names))
    lacking = ", ".join(name for name in closest if name not in fields)
    return f"no {lacking} beside {', '.join(sorted(fields)) or 'nothing'}"


def _alpaca_farm(fields: dict[str, Any]) -> list[Any] | str:
    better = fields["preference"]
    if better not in (1, 2) or isinstance(better, bool):
        return f"preference {better!r} is neither 1 nor 2"
    given = fields.get("input") or ""
    if not (isinstance(given, str) and isinstance(fields["instruction"], str)):
        return "instruction and input must be strings"
    prompt = "\n\n".join(text for text in (fields["instruction"], given) if text)
    outputs = [fields["output_1"], fields["output_2"]]
    return [prompt, *(outputs if better == 1 else outputs[::-1])]


def _type_faults(name: str, value: Any) -> list[str]:
    if (value is None and name == "prompt") or isinstance(value, str):
        return []
    if isinstance(value, list):
        return [f"{name}: {fault}" for fault in message_faults(value)]
    return [f"{name} is a {type(value).__name__} where a string or a list of messages is expected"]


def _split(
    prompt: Turns | None, chosen: Turns, rejected: Turns, *, prompt_end: str | None
) -> tuple[Turns, Turns, Turns] | str:
    """Prompt and responses of one form, or what is wrong."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        return "one of chosen and rejected is a string, the other a list of messages"
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _split_strings(chosen, rejected, prompt_end)
        if isinstance(prompt, str):
            return prompt, chosen, rejected
    return _split_turns(prompt, _turns(chosen), _turns(rejected))


def _with_system(prompt: Turns, chosen: Turns, rejected: Turns, system: Any) -> tuple[Turns, Turns, Turns] | str:
    """The pair with its system message as the first turn, or why it has no place for one."""
    if system is None:
        return prompt, chosen, rejected
    if not isinstance(system, str) or isinstance(prompt, str):
        return "a system message needs a prompt of chat messages, and to be a string: write it into the prompt"
    if prompt and prompt[0]["role"] == "system":
        return "a system message both in the prompt and beside it"
    return [{"role": "system", "content": system}, *prompt], chosen, rejected


def _turns(response: Turns) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _split_strings(chosen: str, rejected: str, prompt_end: str | None) -> tuple[Turns, Turns, Turns] | str:
    if chosen == rejected:
        return "", "", ""  # reported as identical
    size = _shared(chosen, rejected)
    if prompt_end is not None:
        at = chosen.rfind(prompt_end, 0, size)
        if at < 0:
            return f"what chosen and rejected have in common holds no {prompt_end!r}"
        size = at + len(prompt_end)
    else:
        while size and not chosen[size - 1].isspace():
            size -= 1
        # The space goes with the word after it, as byte-level vocabularies have it.
        size -= size > 0 and chosen[size - 1] == " "
    if not chosen[:size].strip():
        return "chosen and rejected have no prompt in common"
    return chosen[:size], chosen[size:], rejected[size:]


def _split_turns(
    prompt: Turns | None, chosen: list[Message], rejected: list[Message]
) -> tuple[Turns, Turns, Turns] | str:
    if chosen == rejected:
        return [], [], []
    shared = _shared(chosen, rejected)
    if isinstance(prompt, list):
        size = len(prompt) if chosen[:shared][: len(prompt)] == prompt else 0
    elif isinstance(prompt, str) and not shared:
        prompt, size = [{"role": "user", "content": prompt}], 0
    else:
        prompt, size = chosen[:shared], shared
    if not prompt:
        return "chosen and rejected have no prompt in common"
    if prompt[-1]["role"] == "assistant":
        return "the prompt ends with a turn of the assistant"
    chosen, rejected = chosen[size:], rejected[size:]
    foreign = {turn["role"] for turn in [*chosen, *rejected]} & {"user", "system"}
    if foreign:
        return f"a response holds a turn of the {' and the '.join(sorted(foreign))}"
    return prompt, chosen, rejected


def _response_fault(pair: PreferencePair) -> str | None:
    if pair.chosen == pair.rejected:
        return "chosen and rejected are identical"
    empty = [name for name, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)) if not _words(turns)]
    return f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty" if empty else None


def _words(turns: str | Sequence[Message]) -> str:
    return turns.strip() if isinstance(turns, str) else "".join(turn["content"] for turn in turns).strip()
