"""Texts to token ids: prompts with one mask, plain inputs, padding; for vocabularies as of BERT and RoBERTa."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from jaxft.core.checks import UserError, message, require
from jaxft.core.types import TokenBatch
from jaxft.data.readers import Example
from jaxft.data.tasks import Slot, Task, template_parts

_FAMILIES = (("[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"), ("<s>", "</s>", "<mask>", "<pad>", "<unk>"))


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the ids that frame its inputs."""

    tokenizer: Tokenizer
    """Without padding, truncation or special tokens found in texts: a text that says ``[MASK]`` has no mask."""
    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    unk_id: int
    pair_separators: int
    """Separators between two texts: 1 for BERT, 2 for RoBERTa."""

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text`` alone. A leading space counts where the vocabulary tells ``x`` from `` x``."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples as ragged lists of token ids, on the host."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    mask_positions: list[int]
    labels: list[int]
    pad_id: int
    truncated: int
    """Number of examples whose text was cut."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids in self.input_ids]


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a checkpoint folder, from its ``tokenizer.json``.

    Args:
      folder: Folder of the checkpoint.

    Returns:
      The tokenizer, with the padding and truncation that the file may ask for switched off.

    Raises:
      UserError: No such file, one that is no tokenizer, or a vocabulary without the special tokens of a masked model.
    """
    path = Path(folder) / "tokenizer.json"
    way_out = "Save the fast tokenizer beside the weights"
    require(path.is_file(), "load_tokenizer", "the checkpoint must hold tokenizer.json", f"no {path}", way_out)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a file that it cannot parse
        rule = "tokenizer.json must be one of the tokenizers library"
        raise UserError(message("load_tokenizer", rule, f"{path}: {error}", way_out)) from error
    return make_text_tokenizer(tokenizer)


def make_text_tokenizer(tokenizer: Tokenizer) -> TextTokenizer:
    """Wraps a copy of ``tokenizer``, finding the ids of its special tokens.

    Args:
      tokenizer: With the special tokens of BERT (``[MASK]``) or of RoBERTa (``<mask>``) in its vocabulary.

    Returns:
      The wrapper; the argument is left as it is.

    Raises:
      UserError: Special tokens are missing.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = True
    known = [name for family in _FAMILIES for name in family if copy.token_to_id(name) is not None]
    roberta = "<mask>" in known and "[MASK]" not in known
    needed = _FAMILIES[roberta]
    found = ", ".join(known) or "no special token"
    families = " or ".join(" ".join(family) for family in _FAMILIES)
    rule = f"the vocabulary of a masked language model must hold {families}"
    way_out = "A causal model has no mask: take a checkpoint of the BERT or RoBERTa kind"
    require(set(needed) <= set(known), "make_text_tokenizer", rule, f"only {found}", way_out)
    vocabulary = copy.get_vocab()
    return TextTokenizer(copy, *(vocabulary[name] for name in needed), pair_separators=1 + roberta)


def label_word_ids(tokenizer: TextTokenizer, words: Sequence[str]) -> tuple[int, ...]:
    """The one token of each label word, as it stands after a space.

    Args:
      tokenizer: Vocabulary of the model.
      words: Label words.

    Returns:
      One id a word.

    Raises:
      UserError: A word is several tokens or unknown, or two words are one token; all such words are listed.

    Example:
      >>> from jaxft.data.reviews import review_tokenizer
      >>> tokenizer = make_text_tokenizer(review_tokenizer())
      >>> ids = label_word_ids(tokenizer, ["terrible", "great"])
      >>> [tokenizer.tokenizer.id_to_token(i) for i in ids]
      ['terrible', 'great']
    """
    pieces = [tokenizer.ids(f" {word.strip()}") for word in words]
    faults = []
    for word, ids in zip(words, pieces, strict=True):
        if len(ids) != 1 or ids[0] == tokenizer.unk_id:
            shown = " ".join(str(tokenizer.tokenizer.id_to_token(i)) for i in ids)
            faults.append(f"{word!r} = {shown or 'no token'}")
    faults += [f"{word!r} twice" for i, word in enumerate(words) if pieces[i] in pieces[:i]]
    rule = "each label word must be one known token, and no two the same"
    require(not faults, "label_word_ids", rule, ", ".join(faults), "Choose other words with label_words")
    return tuple(ids[0] for ids in pieces)


def encode_prompt(
    tokenizer: TextTokenizer, task: Task, examples: Sequence[Example], *, max_tokens: int | None = None
) -> Encoded:
    """Prompts of the examples: cls, the filled template, sep, all of segment 0.

    Too long a prompt loses tokens at the end of text a, down to half of the room that the template leaves, then at the
    end of text b; the template and its mask are never cut. A space of the template goes with the word after it, as
    byte-level vocabularies have it; one before the mask is dropped.

    Args:
      tokenizer: Vocabulary of the model.
      task: Holds the template.
      examples: What to encode.
      max_tokens: Longest prompt, special tokens included; ``None`` is the task's.

    Returns:
      Ids, with the position of the mask in each.

    Raises:
      UserError: The template leaves no room for the texts, or examples have no second text where the task needs one.

    Example:
      >>> from jaxft.data.reviews import review_tokenizer
      >>> from jaxft.data.tasks import get_task
      >>> tokenizer = make_text_tokenizer(review_tokenizer())
      >>> encoded = encode_prompt(tokenizer, get_task("reviews"), [Example("the plot was dull .", None, 0)])
      >>> tokenizer.tokenizer.decode(encoded.input_ids[0], skip_special_tokens=False)
      '[CLS] the plot was dull . it was [MASK] . [SEP]'
    """
    limit = task.max_tokens if max_tokens is None else max_tokens
    _require_texts("encode_prompt", examples, pair=task.pair)
    parts = [p if isinstance(p, Slot) else tokenizer.ids(p) for p in template_parts(task.template)]
    fixed = 3 + sum(len(part) for part in parts if not isinstance(part, Slot))
    texts = 1 + task.pair
    rule = f"max_tokens must hold the template ({fixed} tokens with cls, mask and sep) and {texts} of text"
    require(limit >= fixed + texts, "encode_prompt", rule, limit, "Raise max_tokens, or shorten the template")
    lead = {part.name: part.lead for part in parts if isinstance(part, Slot)}
    rows, positions, truncated = [], [], 0
    for example in examples:
        whole = [tokenizer.ids(lead[name] + text) for name, text in zip("ab", _texts(example), strict=False)]
        kept = _cut(whole, limit - fixed)
        truncated += kept != whole
        filled = dict(zip("ab", kept, strict=False)) | {"mask": [tokenizer.mask_id]}
        row = [tokenizer.cls_id]
        for part in parts:
            if isinstance(part, Slot) and part.name == "mask":
                positions.append(len(row))
            row += filled[part.name] if isinstance(part, Slot) else part
        rows.append([*row, tokenizer.sep_id])
    segments = [[0] * len(row) for row in rows]
    return Encoded(rows, segments, positions, [e.label for e in examples], tokenizer.pad_id, truncated)


def encode_plain(
    tokenizer: TextTokenizer, examples: Sequence[Example], *, max_tokens: int, token_types: int
) -> Encoded:
    """Inputs without a prompt: cls a sep, and b sep where there is a second text (RoBERTa puts two sep between them).

    Too long an input is cut as a prompt is.

    Args:
      tokenizer: Vocabulary of the model.
      examples: What to encode, all with or all without a second text.
      max_tokens: Longest input, special tokens included.
      token_types: Segments that the model knows; with 2 or more the second text is segment 1.

    Returns:
      Ids; every ``mask_positions`` is 0, the place of cls.

    Raises:
      UserError: No room for text, or some examples have a second text and others none.
    """
    pair = bool(examples) and examples[0].text_b is not None
    _require_texts("encode_plain", examples, pair=pair)
    fixed = 2 + pair * tokenizer.pair_separators
    rule = f"max_tokens must hold {fixed} special tokens and {1 + pair} of text"
    require(max_tokens >= fixed + 1 + pair, "encode_plain", rule, max_tokens, "Raise max_tokens")
    rows, segments, truncated = [], [], 0
    for example in examples:
        whole = [tokenizer.ids(text) for text in _texts(example)]
        kept = _cut(whole, max_tokens - fixed)
        truncated += kept != whole
        first = [tokenizer.cls_id, *kept[0], tokenizer.sep_id]
        second = [i for ids in kept[1:] for i in [*[tokenizer.sep_id] * (fixed - 3), *ids, tokenizer.sep_id]]
        rows.append(first + second)
        segments.append([0] * len(first) + [int(token_types >= 2)] * len(second))
    return Encoded(rows, segments, [0] * len(rows), [e.label for e in examples], tokenizer.pad_id, truncated)


def pad(
    encoded: Encoded,
    indices: Sequence[int] | Int[np.ndarray, "b"] | None = None,
    *,
    length: int | None = None,
    multiple: int = 8,
) -> tuple[TokenBatch, Int[np.ndarray, "b"]]:
    """Chosen examples as one padded batch of int32 numpy arrays, and their labels.

    Args:
      encoded: Ragged examples.
      indices: Which, in which order; ``None`` is all.
      length: Tokens of a row; ``None`` is the longest chosen example, rounded up to ``multiple``.
      multiple: Rounding of the length, so that few shapes are compiled.

    Returns:
      The batch and the labels.

    Raises:
      UserError: No examples, an index that is none, or a length below the longest example.

    Example:
      >>> encoded = Encoded([[7, 8], [7, 9, 8]], [[0, 0], [0, 0, 0]], [0, 1], [1, 0], pad_id=0, truncated=0)
      >>> batch, labels = pad(encoded, multiple=4)
      >>> batch.input_ids.tolist(), batch.attention_mask.tolist(), labels.tolist()
      ([[7, 8, 0, 0], [7, 9, 8, 0]], [[1, 1, 0, 0], [1, 1, 1, 0]], [1, 0])
    """
    n = len(encoded.input_ids)
    rows = list(range(n)) if indices is None else [int(i) for i in indices]
    foreign = [i for i in rows if not 0 <= i < n]
    require(bool(rows), "pad", "a batch must hold examples", "none", "Pass at least one index")
    require(not foreign, "pad", f"indices must be in [0, {n})", foreign[:5], "Index the encoded examples")
    require(multiple >= 1, "pad", "multiple must be at least 1", multiple, "Pass multiple >= 1")
    longest = max(len(encoded.input_ids[i]) for i in rows)
    width = -(-longest // multiple) * multiple if length is None else length
    require(width >= longest, "pad", f"length must hold the longest example ({longest} tokens)", width, "Raise length")
    ids = np.full((len(rows), width), encoded.pad_id, np.int32)
    mask, segments = np.zeros_like(ids), np.zeros_like(ids)
    for row, i in enumerate(rows):
        size = len(encoded.input_ids[i])
        ids[row, :size], segments[row, :size], mask[row, :size] = encoded.input_ids[i], encoded.token_type_ids[i], 1
    positions = np.array([encoded.mask_positions[i] for i in rows], np.int32)
    # Host arrays, so that making a batch starts no device; every consumer converts them.
    fields: list[Any] = [ids, mask, segments, positions]
    return TokenBatch(*fields), np.array([encoded.labels[i] for i in rows], np.int32)


def _texts(example: Example) -> list[str]:
    return [example.text_a] if example.text_b is None else [example.text_a, example.text_b]


def _require_texts(where: str, examples: Sequence[Example], *, pair: bool) -> None:
    bad = [i for i, example in enumerate(examples) if (example.text_b is not None) != pair]
    rule = f"every example must hold {'two texts' if pair else 'one text'}"
    require(not bad, where, rule, f"others at {bad[:5]}", "Read them with the task they belong to")


def _cut(texts: list[list[int]], room: int) -> list[list[int]]:
    """At most ``room`` tokens: a loses its end, but keeps half of the room where it has it; then b."""
    if len(texts) == 1:
        return [texts[0][:room]]
    a, b = texts
    kept = a[: max(room - len(b), -(-room // 2))]
    return [kept, b[: room - len(kept)]]
