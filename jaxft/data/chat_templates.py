"""Chat messages as the text that a model was trained on: the jinja2 templates that published checkpoints carry.

A template comes from whoever published the checkpoint, so it runs in the immutable sandbox of jinja2, and sees plain
JSON alone.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.sandbox

from jaxft.core.checks import UserError, message, require

Message = dict[str, Any]
"""A turn: ``{"role": "user", "content": "..."}``; further fields are the template's business."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and what it may refer to."""

    source: str
    """In the language of jinja2."""
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Names that the template sees besides the messages, such as ``bos_token``."""


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    r"""The text of a conversation.

    As in Hugging Face's libraries, white space around blocks is trimmed, loops have ``break`` and ``continue``,
    ``generation`` blocks are let through, and there is ``raise_exception``. There is no clock: a template that
    writes today's date through ``strftime_now`` falls back to its fixed date, or is given one in ``variables``.

    Args:
      template: Of the checkpoint.
      messages: The turns.
      add_generation_prompt: Whether the text ends where the assistant's next turn begins.
      variables: Further names that the template sees, such as ``date_string``.

    Returns:
      The text, with the control tokens that the template writes.

    Raises:
      UserError: The template is no jinja2, refuses the conversation, or refers to what is not there.

    Example:
      >>> template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
      >>> render_chat(template, [{"role": "user", "content": "Hello"}])
      'user: Hello\n'
    """
    where = "render_chat"
    faults = message_faults(messages)
    require(not faults, where, "each message must have a role and a content", "; ".join(faults), "Correct them")
    # Rebuilt from JSON, so that no object of the caller reaches the template.
    plain = json.loads(json.dumps(list(messages)))
    seen = {**template.variables, **(variables or {})}
    try:
        compiled = _compiled(template.source)
        return compiled.render(messages=plain, add_generation_prompt=add_generation_prompt, **seen)
    except jinja2.TemplateSyntaxError as error:
        got = f"{error.message} at line {error.lineno}"
        raise UserError(message(where, "the template must be jinja2", got, "Pass chat_template")) from error
    except jinja2.UndefinedError as error:
        way_out = "Pass it in variables"
        raise UserError(message(where, "what the template refers to must be there", error, way_out)) from error
    except (jinja2.TemplateError, TypeError) as error:
        way_out = "Change the messages, or pass another chat_template"
        raise UserError(message(where, "the template must accept the conversation", error, way_out)) from error


def message_faults(messages: Any) -> list[str]:
    """What keeps a value from being a conversation: no list of turns, or turns without a role or a text.

    Example:
      >>> message_faults([{"role": "user", "content": "Hello"}, {"content": "Hi"}])
      ['message 2 has no role']
    """
    if not isinstance(messages, list | tuple) or not messages:
        return ["no list of messages"]
    faults = []
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict):
            faults.append(f"message {number} is a {type(turn).__name__}")
            continue
        for name in ("role", "content"):
            if not isinstance(turn.get(name), str):
                what = "no" if name not in turn else f"a {type(turn[name]).__name__} as"
                faults.append(f"message {number} has {what} {name}")
    return faults


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for those who train on them alone: its content stays."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    extensions: Iterable[Any] = (jinja2.ext.loopcontrols, _GenerationBlock)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=list(extensions)
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # The filter of jinja2 escapes for HTML, which no chat template means.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(text: str) -> None:
    raise jinja2.TemplateError(text)
