"""Preference pairs as token ids: once, with a safe boundary between prompt and response, and notes on what was lost."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxft.core.checks import require
from jaxft.data.causal_tokenizer import (
    CausalTokenizer,
    chat_template_of,
    end_ids,
    keep_end,
    tokenize_continuations,
)
from jaxft.data.chat_templates import ChatTemplate, render_chat
from jaxft.data.records import Fault, shown_faults
from jaxft.tuning.preferences import OnFault, PreferencePair


class PairNotes(NamedTuple):
    """What is to be known of each pair; counted by ``EncodedPreferences.report``."""

    first_tokens_equal: Bool[np.ndarray, "n"]
    """Responses begin with the same token, which Theorem 6 of arXiv 2410.08847 excludes."""
    one_is_prefix: Bool[np.ndarray, "n"]
    """One response, its end token aside, begins the other."""
    prompt_cut: Bool[np.ndarray, "n"]
    """The prompt lost its start."""
    response_cut: Bool[np.ndarray, "n"]
    """A response lost its end, and with it the end token."""
    boundary_merged: Bool[np.ndarray, "n"]
    """Prompt and response as one text would have a token that reaches across the boundary."""
    text_changed: Bool[np.ndarray, "n"]
    """The vocabulary cannot spell a response: unknown tokens, or a normaliser."""


_SAYS = {
    "first_tokens_equal": "with equal first tokens",
    "one_is_prefix": "with a response that begins the other",
    "prompt_cut": "with a prompt cut",
    "response_cut": "with a response cut",
    "boundary_merged": "that would merge tokens across the boundary",
    "text_changed": "with a text that the vocabulary cannot spell",
}


@dataclasses.dataclass(frozen=True)
class EncodedPreferences:
    """Pairs as ragged lists of token ids, on the host."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    lines: list[int]
    """Where each pair stands in its file."""
    notes: PairNotes
    dropped: list[Fault]
    """Pairs that were left out, by line."""
    pad_id: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Int[np.ndarray, "n 2"]:
        """Tokens of the chosen and of the rejected response."""
        return np.array([[len(c), len(r)] for c, r in zip(self.chosen, self.rejected, strict=True)], np.int32)

    def select(self, indices: Sequence[int] | Int[np.ndarray, "m"]) -> "EncodedPreferences":
        """The pairs at ``indices``, in that order."""
        rows = [int(i) for i in indices]
        fields = {name: [getattr(self, name)[i] for i in rows] for name in ("prompts", "chosen", "rejected", "lines")}
        at = np.array(rows, np.int64)
        return dataclasses.replace(self, **fields, notes=PairNotes(*(note[at] for note in self.notes)))

    def report(self) -> str:
        """How many pairs there are, and how many of each note."""
        counts = [f"{int(getattr(self.notes, name).sum())} {says}" for name, says in _SAYS.items()]
        said = [f"{len(self)} pairs", *(text for text in counts if not text.startswith("0 "))]
        return ", ".join([*said, *([f"{len(self.dropped)} dropped"] if self.dropped else [])])


def encode_preferences(
    tokenizer: CausalTokenizer,
    pairs: Sequence[PreferencePair],
    *,
    max_tokens: int,
    max_prompt_tokens: int | None = None,
    append_eos: bool = True,
    chat_template: str | None = None,
    on_fault: OnFault = "refuse",
) -> EncodedPreferences:
    """Tokenises preference pairs.

    The ids of a prompt are those that the model sees at inference, begin token included, and a response begins at a
    token of its own (``tokenize_continuations``). Of a chat, the response is what the template renders beyond the
    prompt that ends where the assistant begins, up to the end token. Prompts keep their end and responses their start.

    Args:
      tokenizer: Vocabulary of the model.
      pairs: From ``read_preferences``; strings and chats may be mixed.
      max_tokens: The context: longest prompt with one response.
      max_prompt_tokens: A longer prompt loses its start. ``None`` cuts no prompt: one that leaves no room is a fault.
      append_eos: Whether a response that does not end with an end token is given one.
      chat_template: Used instead of the tokenizer's.
      on_fault: Whether pairs without room, or whose responses are the same tokens or none, are refused or dropped.

    Returns:
      Ids and notes.

    Raises:
      UserError: Faulty pairs, by line; messages without a template; a template that renders a prompt otherwise once a
        response follows; no end token.
    """
    where = "encode_preferences"
    require(bool(pairs), where, "there must be a pair", "none", "Pass one or more")
    least = 2 if max_prompt_tokens is None else max_prompt_tokens + 1
    rule = "max_tokens must hold a prompt and a token of a response"
    require(max_tokens >= least, where, rule, max_tokens, f"Pass max_tokens >= {least}")
    end = end_ids(tokenizer, append_eos, where)
    chats = any(not isinstance(pair.prompt, str) for pair in pairs)
    template = chat_template_of(tokenizer, chat_template, where) if chats else None
    texts = [_texts(pair, template) for pair in pairs]
    ids = _ids(tokenizer, texts, [not isinstance(pair.prompt, str) for pair in pairs], end)
    limits = _Limits(max_tokens, max_prompt_tokens, len(tokenizer.bos_ids))
    made = [_cut(tokenizer, row, limits) for row in ids]
    made = [Fault(pair.line, row) if isinstance(row, str) else row for pair, row in zip(pairs, made, strict=True)]
    faults = [row for row in made if isinstance(row, Fault)]
    way_out = "Pass max_prompt_tokens to cut prompts, a larger max_tokens, or on_fault='drop'"
    rule = f"each pair must fit into {max_tokens} tokens and have responses that differ"
    require(not faults or on_fault == "drop", where, rule, shown_faults("line", faults), way_out)
    kept = [i for i, row in enumerate(made) if not isinstance(row, Fault)]
    require(bool(kept), where, "there must be a pair left", shown_faults("line", faults), way_out)
    rows = [row for row in made if not isinstance(row, Fault)]
    changed = _text_changed(tokenizer, [texts[i] for i in kept], [ids[i] for i in kept])
    notes = PairNotes(*np.array([[*row.notes, row.merged, bad] for row, bad in zip(rows, changed, strict=True)]).T)
    prompts, chosen, rejected = ([row.prompt for row in rows], *([row.responses[j] for row in rows] for j in (0, 1)))
    lines = [pairs[i].line for i in kept]
    return EncodedPreferences(prompts, chosen, rejected, lines, notes, faults, tokenizer.pad_id)


class _Texts(NamedTuple):
    prompt: str
    responses: list[str]


class _Ids(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]
    ends: list[int]
    """Tokens at the end of each response that are end tokens."""
    merged: bool


class _Row(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]
    notes: tuple[bool, bool, bool, bool]
    merged: bool


class _Limits(NamedTuple):
    tokens: int
    prompt: int | None
    bos: int


def _texts(pair: PreferencePair, template: ChatTemplate | None) -> _Texts:
    sides = (pair.chosen, pair.rejected)
    if template is None or isinstance(pair.prompt, str):
        return _Texts(str(pair.prompt), [str(side) for side in sides])
    prompt = render_chat(template, pair.prompt, add_generation_prompt=True)
    whole = [render_chat(template, [*pair.prompt, *side]) for side in sides if not isinstance(side, str)]
    rule = "the template must render a prompt alike with and without a response"
    got = f"line {pair.line}, where the prompt ends with {prompt[-40:]!r}"
    way_out = "Pass another chat_template, or strings"
    require(all(text.startswith(prompt) for text in whole), "encode_preferences", rule, got, way_out)
    return _Texts(prompt, [text.removeprefix(prompt) for text in whole])


def _ids(tokenizer: CausalTokenizer, texts: list[_Texts], is_chat: list[bool], end: list[int]) -> list[_Ids]:
    """Ids of all pairs, strings and chats apart: a chat's template writes its own begin token, and ends its turns."""
    out: dict[int, _Ids] = {}
    for chat in {*is_chat}:
        where = [i for i, kind in enumerate(is_chat) if kind == chat]
        prompts, responses = [texts[i].prompt for i in where], [texts[i].responses for i in where]
        made = tokenize_continuations(tokenizer, prompts, responses, add_bos=not chat)
        for i, prompt, sides, merged in zip(where, *made, strict=True):
            closed = [_closed(side, tokenizer.eos_ids, end, chat) for side in sides]
            out[i] = _Ids(prompt, [ids for ids, _ in closed], [size for _, size in closed], merged)
    return [out[i] for i in range(len(texts))]


def _closed(ids: list[int], eos_ids: tuple[int, ...], end: list[int], chat: bool) -> tuple[list[int], int]:
    """A response with its end token, and how many tokens that is."""
    last = max((i for i, token in enumerate(ids) if token in eos_ids), default=-1)
    if last >= 0 and (chat or last == len(ids) - 1):
        # What a template writes after the end of a turn is not for the model to say.
        return ids[: last + 1], 1
    return ids + end, len(end)


def _cut(tokenizer: CausalTokenizer, row: _Ids, limits: _Limits) -> _Row | str:
    """The pair within the limits, with its first four notes; or its fault."""
    if not row.prompt:
        return "the prompt has no token"
    if not all(len(ids) > size for ids, size in zip(row.responses, row.ends, strict=True)):
        return "a response has no token"
    prompt = row.prompt
    if limits.prompt is not None:
        prompt = keep_end(tokenizer, prompt, limits.prompt)
    room = limits.tokens - len(prompt)
    if room < 1:
        return f"the prompt has {len(prompt)} tokens"
    sides = [ids[:room] for ids in row.responses]
    if sides[0] == sides[1]:
        same = "are the same tokens" if row.responses[0] == row.responses[1] else f"agree in the {room} tokens kept"
        return f"chosen and rejected {same}"
    bare = [ids[: min(room, len(ids) - size)] for ids, size in zip(row.responses, row.ends, strict=True)]
    size = min(map(len, bare))
    first = sides[0][0] == sides[1][0]
    return _Row(
        prompt,
        sides,
        (first, bare[0][:size] == bare[1][:size], prompt != row.prompt, sides != row.responses),
        row.merged,
    )


def _text_changed(tokenizer: CausalTokenizer, texts: list[_Texts], ids: list[_Ids]) -> list[bool]:
    said = [text for row in texts for text in row.responses]
    bodies = [side[: len(side) - size] for row in ids for side, size in zip(row.responses, row.ends, strict=True)]
    ends = tuple(str(tokenizer.tokenizer.id_to_token(i)) for i in tokenizer.eos_ids)
    bad = []
    for text, back in zip(said, tokenizer.texts(bodies), strict=True):
        rest = text.strip().removeprefix(back.strip()).strip()
        bad.append(bool(rest) and not (ends and rest.startswith(ends)))
    return [a or b for a, b in zip(bad[::2], bad[1::2], strict=True)]
