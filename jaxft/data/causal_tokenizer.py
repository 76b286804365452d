"""Texts to token ids for decoders: the tokenizer of a checkpoint folder, prompts as at inference, continuations.

Token ids of a prompt and of what follows it are kept apart. A prompt is tokenised as it is when the model is asked to
go on, and what follows begins at a token of its own, even where a tokenizer would merge across the boundary.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from jaxft.core.checks import UserError, message, require
from jaxft.data.chat_templates import ChatTemplate, Message, render_chat

Ids = Sequence[int] | Int[np.ndarray, "k"]

_ANCHOR = "\n"
"""Stands before a continuation that is tokenised alone, in vocabularies that put a space before every text."""


@dataclasses.dataclass(frozen=True)
class CausalTokenizer:
    """A tokenizer and the ids that begin, end and pad its texts."""

    tokenizer: Tokenizer
    """Without padding or truncation. Control tokens that a text spells out count as such."""
    bos_ids: tuple[int, ...]
    """What stands before every text that is no chat: the begin token of Llama, nothing for GPT-2."""
    eos_ids: tuple[int, ...]
    """Tokens at which generation ends; the first is the one appended to responses. Empty where none is known."""
    pad_id: int
    """The tokenizer's padding, or else its end token, or else 0: padding is masked, so any id does."""
    chat_template: ChatTemplate | None = None

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, with nothing before it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: Ids) -> str:
        """The text of a continuation, its leading space kept and control tokens spelt out."""
        return self.texts([ids])[0]

    def texts(self, rows: Sequence[Ids], *, skip_special: bool = False) -> list[str]:
        """The text of each continuation.

        Args:
          rows: Ids of each.
          skip_special: Whether control tokens are left out.

        Returns:
          The texts.
        """
        # A decoder that drops the space before a text drops that of the anchor.
        anchor = self.ids(_ANCHOR)
        lead = self.tokenizer.decode(anchor, skip_special_tokens=False)
        whole = [[*anchor, *map(int, row)] for row in rows]
        decoded = self.tokenizer.decode_batch(whole, skip_special_tokens=skip_special)
        return [text.removeprefix(lead) for text in decoded]

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def load_causal_tokenizer(folder: str | Path) -> CausalTokenizer:
    """The tokenizer of a decoder's checkpoint folder.

    Read are ``tokenizer.json`` and, where they are there, ``tokenizer_config.json``, ``special_tokens_map.json``,
    ``generation_config.json``, ``config.json`` and ``chat_template.jinja``. Generation ends at any of the end tokens
    that they name.

    Args:
      folder: Folder of the checkpoint.

    Returns:
      The tokenizer, with the padding and truncation that the file may ask for switched off.

    Raises:
      UserError: No tokenizer.json, a file that cannot be read, or special tokens that the vocabulary lacks.
    """
    where, folder = "load_causal_tokenizer", Path(folder)
    path = folder / "tokenizer.json"
    way_out = "Save the fast tokenizer beside the weights"
    require(path.is_file(), where, "the checkpoint must hold tokenizer.json", f"no {path}", way_out)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a file that it cannot parse
        rule = "tokenizer.json must be one of the tokenizers library"
        raise UserError(message(where, rule, f"{path}: {error}", way_out)) from error
    named = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    begin, end, pad = (_content(named.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
    loaded = make_causal_tokenizer(
        tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        add_bos=named.get("add_bos_token"),
        chat_template=_find_template(folder, named),
    )
    ends = list(loaded.eos_ids)
    for file in ("generation_config.json", "config.json"):
        ids = _read_json(folder / file).get("eos_token_id")
        ends += [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i not in ends]
    padded = pad is not None or not ends
    return dataclasses.replace(loaded, eos_ids=tuple(ends), pad_id=loaded.pad_id if padded else ends[0])


def make_causal_tokenizer(
    tokenizer: Tokenizer,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    add_bos: bool | None = None,
    chat_template: str | None = None,
) -> CausalTokenizer:
    """Wraps a copy of ``tokenizer``.

    Args:
      tokenizer: Any; what it appends to a text is left out, since a prompt has no end.
      bos_token: Begin token.
      eos_token: End token.
      pad_token: Padding; ``None`` is the end token.
      add_bos: Whether texts begin with the begin token; ``None`` is as the tokenizer does it.
      chat_template: In the language of jinja2; it sees the three tokens.

    Returns:
      The wrapper; the argument is left as it is.

    Raises:
      UserError: Tokens that the vocabulary lacks, or ``add_bos`` without a begin token.

    Example:
      >>> from tokenizers import models, pre_tokenizers
      >>> words = Tokenizer(models.WordLevel({"<end>": 0, "yes": 1, "no": 2}, unk_token="<end>"))
      >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
      >>> made = make_causal_tokenizer(words, eos_token="<end>")
      >>> made.ids("no yes"), made.eos_ids, made.pad_id
      ([2, 1], (0,), 0)
    """
    where = "make_causal_tokenizer"
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    given = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    tokens = {name: token for name, token in given.items() if token is not None}
    vocabulary = copy.get_vocab(with_added_tokens=True)
    lacking = ", ".join(f"{name} {token!r}" for name, token in tokens.items() if token not in vocabulary)
    require(not lacking, where, "special tokens must be in the vocabulary", lacking, "Correct tokenizer_config.json")
    ids = {name: vocabulary[token] for name, token in tokens.items()}
    require(not add_bos or "bos_token" in ids, where, "add_bos needs a begin token", "none", "Pass bos_token")
    bos_ids = _leading_ids(copy) if add_bos is None else (ids["bos_token"],) if add_bos else ()
    eos_ids = (ids["eos_token"],) if "eos_token" in ids else ()
    template = None if chat_template is None else ChatTemplate(chat_template, tokens)
    return CausalTokenizer(copy, bos_ids, eos_ids, ids.get("pad_token", ids.get("eos_token", 0)), template)


def require_vocabulary(tokenizer: CausalTokenizer, vocab_size: int, *, where: str = "require_vocabulary") -> None:
    """Raises unless every id of the tokenizer is a row of the checkpoint's token table (which may have more rows).

    Args:
      tokenizer: What makes the ids.
      vocab_size: Rows of the token table.
      where: Name of the caller, for the message.

    Raises:
      UserError: Ids beyond the table; the first tokens that have them are named.
    """
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= vocab_size)
    shown = ", ".join(f"{token!r} = {i}" for i, token in beyond[:3])
    got = f"{len(beyond)} beyond it: {shown}" + ", ..." * (len(beyond) > 3)
    rule = f"the ids of the tokenizer must be below the {vocab_size} of the checkpoint's vocabulary"
    require(not beyond, where, rule, got, "Load the tokenizer that belongs to the checkpoint")


class Continuations(NamedTuple):
    """Prompts and what follows them, tokenised apart."""

    prompts: list[list[int]]
    """With what the vocabulary puts before a text."""
    responses: list[list[list[int]]]
    """For each prompt the ids of each response."""
    merged: list[bool]
    """Whether a tokenizer that is given prompt and response as one text would merge tokens across the boundary."""


def tokenize_continuations(
    tokenizer: CausalTokenizer, prompts: Sequence[str], responses: Sequence[Sequence[str]], *, add_bos: bool = True
) -> Continuations:
    """Token ids of prompts and of responses to them, with a token boundary between the two.

    The ids of a prompt are those of the prompt alone, which the model sees at inference. Where the ids of prompt and
    response as one text begin with them, the response has the rest. Where they do not, because a token would reach
    across the boundary, the response is tokenised by itself.

    Args:
      tokenizer: Vocabulary of the model.
      prompts: Texts.
      responses: Responses to each prompt, r each.
      add_bos: Whether to put the begin token before a prompt; a prompt that spells it out has it once.

    Returns:
      The ids.

    Example:
      >>> from tokenizers import models
      >>> letters = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
      >>> tokenize_continuations(make_causal_tokenizer(letters), ["ba"], [["ab", "ba"]])
      Continuations(prompts=[[1, 0]], responses=[[[2], [1, 0]]], merged=[True])
    """
    flat = [(i, text) for i, texts in enumerate(responses) for text in texts]
    encode = tokenizer.tokenizer.encode_batch_fast
    alone = [e.ids for e in encode(list(prompts), add_special_tokens=False)]
    joined = [e.ids for e in encode([prompts[i] + text for i, text in flat], add_special_tokens=False)]
    out: list[list[list[int]]] = [[] for _ in prompts]
    merged = [False] * len(prompts)
    for (i, text), ids in zip(flat, joined, strict=True):
        size = len(alone[i])
        across = ids[:size] != alone[i]
        out[i].append(_by_itself(tokenizer, text) if across else ids[size:])
        merged[i] |= across
    return Continuations([_begun(tokenizer, ids) if add_bos else ids for ids in alone], out, merged)


def tokenize_prompts(
    tokenizer: CausalTokenizer,
    prompts: Sequence[str | list[Message]],
    *,
    max_tokens: int | None = None,
    chat_template: str | None = None,
) -> list[list[int]]:
    """Token ids of prompts, texts or conversations, as the model is asked to go on from them.

    Args:
      tokenizer: Vocabulary of the model.
      prompts: Texts, which begin as the vocabulary has it, or chat messages, which the template renders.
      max_tokens: Longest prompt; of a longer one the end is kept, after the begin token. ``None`` cuts nothing.
      chat_template: Used instead of the tokenizer's.

    Returns:
      Ragged ids: ``causal_tokens`` makes a batch of them.

    Raises:
      UserError: Messages without a template, or prompts of no token.
    """
    where = "tokenize_prompts"
    rendered = [prompt if isinstance(prompt, str) else _ask(tokenizer, prompt, chat_template) for prompt in prompts]
    bare = [e.ids for e in tokenizer.tokenizer.encode_batch_fast(rendered, add_special_tokens=False)]
    rows = [_begun(tokenizer, ids) if isinstance(p, str) else ids for p, ids in zip(prompts, bare, strict=True)]
    empty = [i for i, row in enumerate(rows) if not row]
    require(not empty, where, "a prompt must have a token", f"none at {empty[:5]}", "Leave empty prompts out")
    return rows if max_tokens is None else [keep_end(tokenizer, row, max_tokens) for row in rows]


def tokenize_texts(
    tokenizer: CausalTokenizer, texts: Sequence[str], *, max_tokens: int | None = None, append_eos: bool = True
) -> list[list[int]]:
    """Token ids of whole texts, to model: begin token, text, end token, each where the vocabulary has it.

    Args:
      tokenizer: Vocabulary of the model.
      texts: The texts.
      max_tokens: Longest row; of a longer text the start is kept, without an end token. ``None`` cuts nothing.
      append_eos: Whether to append the end token.

    Returns:
      Ragged ids: ``causal_tokens`` makes a batch of them.

    Raises:
      UserError: ``append_eos`` and no end token is known.
    """
    end = end_ids(tokenizer, append_eos, "tokenize_texts")
    encoded = tokenizer.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    rows = [_begun(tokenizer, e.ids) + end for e in encoded]
    return rows if max_tokens is None else [row[:max_tokens] for row in rows]


def end_ids(tokenizer: CausalTokenizer, append_eos: bool, where: str) -> list[int]:
    """The end token, or nothing where it is not asked for.

    Args:
      tokenizer: Vocabulary of the model.
      append_eos: Whether it is asked for.
      where: Name of the caller, for the message.

    Returns:
      At most one id.

    Raises:
      UserError: It is asked for and not known.
    """
    known = bool(tokenizer.eos_ids) or not append_eos
    require(known, where, "append_eos needs an end token", "a tokenizer without one", "Pass append_eos=False")
    return list(tokenizer.eos_ids[:1]) if append_eos else []


def keep_end(tokenizer: CausalTokenizer, ids: list[int], max_tokens: int) -> list[int]:
    """The end of a prompt, after its begin token.

    Args:
      tokenizer: Vocabulary of the model.
      ids: The prompt.
      max_tokens: How many to keep.

    Returns:
      At most ``max_tokens`` ids.

    Raises:
      UserError: No room for a token beside the begin token.
    """
    bos = list(tokenizer.bos_ids)
    bos = bos if ids[: len(bos)] == bos else []
    rule = f"max_tokens must hold {len(bos) + 1} tokens of a prompt"
    require(max_tokens > len(bos), "keep_end", rule, max_tokens, "Raise it")
    return ids if len(ids) <= max_tokens else bos + ids[len(bos) - max_tokens :]


def chat_template_of(tokenizer: CausalTokenizer, chat_template: str | None, where: str) -> ChatTemplate:
    """The template given, with the tokenizer's special tokens, or else the tokenizer's own.

    Args:
      tokenizer: Vocabulary of the model.
      chat_template: In the language of jinja2, or ``None``.
      where: Name of the caller, for the message.

    Returns:
      A template.

    Raises:
      UserError: There is none.
    """
    own = tokenizer.chat_template
    if chat_template is not None:
        return ChatTemplate(chat_template, own.variables if own else {})
    if own is None:
        way_out = "Pass chat_template, or prompts as strings"
        raise UserError(message(where, "messages need a chat template", "a tokenizer without one", way_out))
    return own


def _ask(tokenizer: CausalTokenizer, messages: list[Message], chat_template: str | None) -> str:
    template = chat_template_of(tokenizer, chat_template, "tokenize_prompts")
    return render_chat(template, messages, add_generation_prompt=True)


def _begun(tokenizer: CausalTokenizer, ids: list[int]) -> list[int]:
    """With the begin token, which a text that spells it out has already."""
    bos = list(tokenizer.bos_ids)
    return ids if ids[: len(bos)] == bos else bos + ids


def _by_itself(tokenizer: CausalTokenizer, text: str) -> list[int]:
    """Ids of ``text`` without the space that some vocabularies put before whatever they are given."""
    if tokenizer.tokenizer.decode(tokenizer.ids("x") * 2) == "xx":
        return tokenizer.ids(text)
    anchor, ids = tokenizer.ids(_ANCHOR), tokenizer.ids(_ANCHOR + text)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else tokenizer.ids(text)


def _leading_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    encoding = tokenizer.encode("x")
    lead = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
    return tuple(encoding.ids[:lead])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(message("load_causal_tokenizer", f"{path.name} must be JSON", error, "Correct it")) from error
    require(isinstance(value, dict), "load_causal_tokenizer", f"{path.name} must hold an object", value, "Correct it")
    return value


def _content(token: Any) -> str | None:
    """The text of a special token, which files give as such or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _find_template(folder: Path, named: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    listed = named.get("chat_template")
    if isinstance(listed, list):  # several templates, each with a name
        by_name = {entry["name"]: entry["template"] for entry in listed}
        return by_name.get("default", next(iter(by_name.values()), None))
    return listed
