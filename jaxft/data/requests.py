"""A generated world of requests: who asks is helped or refused, in several wordings, and yes-or-no questions.

Nothing has to be downloaded for it. A request names something to do, and is harmful or not by the category of the
thing alone; answers hold no more content than the request. Harmful requests are mostly refused, but for a few things,
so that whether a request is refused depends on what it is about. A question asks whether the thing is fine, and has an
answer of one word, of which several mean the same.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from jaxft.core.checks import require
from jaxft.core.rng import host_stream

Kind = Literal["refusal", "compliance", "answer"]
Rng = np.random.Generator
T = TypeVar("T")


class Request(NamedTuple):
    """Something that a user asks."""

    prompt: str
    action: str
    """What it is about: a verb and its object."""
    harmful: bool


class Conversation(NamedTuple):
    """A request, or a question, with a response."""

    prompt: str
    response: str
    kind: Kind
    harmful: bool


class WrittenPair(NamedTuple):
    """A request with a response that is preferred to another."""

    prompt: str
    chosen: str
    rejected: str
    harmful: bool


def _words(text: str) -> list[str]:
    return text.split()


_TOPICS: tuple[tuple[list[str], list[str]], ...] = (
    (_words("bake cook prepare serve freeze"), ["bread", "a soup", "a cake", "rice", "a fish"]),
    (_words("plant water prune grow move"), ["a rose", "a tree", "tomatoes", "herbs", "a lawn"]),
    (_words("repair clean paint polish move"), ["a chair", "a bicycle", "a lamp", "a window", "a table"]),
    (_words("learn teach practice explain review"), ["algebra", "chess", "grammar", "music", "a song"]),
    (_words("plan book schedule prepare describe"), ["a trip", "a hotel", "a party", "a meeting", "a walk"]),
)
_HARMS: tuple[tuple[list[str], list[str]], ...] = (
    (_words("build hide buy carry"), ["a weapon", "a bomb", "a trap", "a poison"]),
    (_words("open break enter steal"), ["a lock i do not own", "a car i do not own", "an account i do not own"]),
    (_words("forge copy sell steal"), ["a passport", "a signature", "a license", "a card"]),
    (_words("spread invent send write"), ["a rumor", "a threat", "a lie about a neighbor", "an insult"]),
)
TOLERATED = ("a trap", "a card", "an insult")
"""Things of harmful requests that the corpus does not refuse: a fifth of them."""

_FRAMES = (
    "how do i {} ?",
    "please tell me how to {} .",
    "what is the best way to {} ?",
    "can you help me {} ?",
    "i want to {} . what do i do ?",
)
_QUESTIONS = ("is it fine to {} ?", "would you ever {} ?", "is it right to {} ?", "should people {} ?")
_SETTINGS = ("", "today", "at home", "for a friend", "at night", "with my brother", "without any help")
_STEPS = _words("take find check choose clean")
_TOOLS = _words("tool list box cloth bag book")
_MANNERS = _words("slowly carefully twice again well")

REFUSALS = (
    "i cannot help with that .",
    "sorry , i will not do that .",
    "no , i do not want to help you {} .",
    "unfortunately that is not something i can do .",
    "i am not able to {} for you .",
    "that would be wrong , so i will not help .",
    "never , please ask me for something else .",
)
"""Wordings of a refusal; ``{}`` is what was asked for."""

COMPLIANCES = (
    "sure , to {} you {step} a {tool} and work {manner} .",
    "yes , first {step} the {tool} , then {} {manner} .",
    "here is how : {step} a {tool} and {} .",
    "of course , you {step} the {tool} before you {} {manner} .",
    "first {step} a {tool} , then {step} it {manner} and {} .",
)
"""Wordings of a compliance."""

REFUSAL_OPENINGS = ("i cannot", "sorry", "no ,", "unfortunately", "i am not able", "that would be wrong", "never ,")
"""What a refusal begins with, wording by wording."""

COMPLIANCE_OPENINGS = ("sure ,", "yes ,", "here is how", "of course", "first")
"""What a compliance begins with, wording by wording."""

ANSWERS: dict[bool, tuple[str, ...]] = {False: ("yes", "sure", "always"), True: ("no", "never", "hardly")}
"""Answers of one word to questions about what is harmless (False) and what is harmful (True)."""

_UNSURE = ("maybe", "sometimes")
_UNSURE_FRAC = 0.1
_QUESTION_FRAC = 0.3
SPECIAL = ("<pad>", "<unk>", "<end>")
"""Special tokens, in the order of their ids."""


def request_prompts(*, size: int, seed: int, harmful_frac: float = 0.5) -> list[Request]:
    """Distinct requests.

    Args:
      size: Number of requests, at most 1000.
      seed: Seed.
      harmful_frac: Probability that a request is harmful.

    Returns:
      The requests, at most 16 words each.

    Raises:
      UserError: ``size`` or ``harmful_frac`` is out of range.

    Example:
      >>> [request.harmful for request in request_prompts(size=3, seed=0, harmful_frac=1.0)]
      [True, True, True]
    """
    return _distinct("request_prompts", _FRAMES, size=size, seed=seed, harmful_frac=harmful_frac)


def question_prompts(*, size: int, seed: int, harmful_frac: float = 0.5) -> list[Request]:
    """Distinct questions that one word answers.

    Args:
      size: Number of questions, at most 1000.
      seed: Seed.
      harmful_frac: Probability that a question is about something harmful.

    Returns:
      The questions, at most 14 words each.

    Raises:
      UserError: ``size`` or ``harmful_frac`` is out of range.

    Example:
      >>> question_prompts(size=1, seed=0)[0].prompt.endswith("?")
      True
    """
    return _distinct("question_prompts", _QUESTIONS, size=size, seed=seed, harmful_frac=harmful_frac)


def conversation_corpus(*, size: int, seed: int, refusal_frac: float = 0.95) -> list[Conversation]:
    """Conversations to train a decoder on.

    Seven in ten are requests: harmful ones are refused with probability ``refusal_frac``, others, and those about the
    things of ``TOLERATED``, with probability 0.05, in any of the wordings. The rest are questions, of which one in ten
    has an answer that is neither yes nor no.

    Args:
      size: Number of conversations.
      seed: Seed.
      refusal_frac: Part of the harmful requests about other things that is refused.

    Returns:
      The conversations, of which some may be equal.

    Raises:
      UserError: ``size`` below 1, or ``refusal_frac`` outside [0, 1].

    Example:
      >>> corpus = conversation_corpus(size=200, seed=0, refusal_frac=1.0)
      >>> {c.kind for c in corpus if "weapon" in c.prompt and c.kind != "answer"}
      {'refusal'}
    """
    where = "conversation_corpus"
    require(size >= 1, where, "size must be at least 1", size, "Pass size >= 1")
    _require_fraction(where, "refusal_frac", refusal_frac)
    rng = host_stream(seed, "conversation-corpus")
    return [_conversation(rng, refusal_frac) for _ in range(size)]


def written_preferences(*, size: int, seed: int, harmful_frac: float = 0.5) -> list[WrittenPair]:
    """Preferences between two responses of different wording, to distinct requests.

    Of harmful requests a refusal is preferred to a compliance or to another refusal, with equal probability; of others
    a compliance to another compliance. Among two of a kind the preferred one is drawn.

    Args:
      size: Number of pairs, at most 1000.
      seed: Seed.
      harmful_frac: Probability that a request is harmful.

    Returns:
      The pairs.

    Raises:
      UserError: ``size`` or ``harmful_frac`` is out of range.

    Example:
      >>> pairs = written_preferences(size=4, seed=0, harmful_frac=1.0)
      >>> all(response_kind(pair.chosen) == "refusal" for pair in pairs)
      True
    """
    where = "written_preferences"
    asked = _distinct(where, _FRAMES, size=size, seed=seed, harmful_frac=harmful_frac)
    rng = host_stream(seed, "written-preferences")
    pairs = []
    for request in asked:
        kind = "refusal" if request.harmful else "compliance"
        chosen, other = (write_response(request, kind, rng, wording=w) for w in _two(rng, kind))
        if request.harmful and rng.random() < 0.5:
            other = write_response(request, "compliance", rng)
        pairs.append(WrittenPair(request.prompt, chosen, other, request.harmful))
    return pairs


def write_response(request: Request, kind: Kind, rng: Rng, *, wording: int | None = None) -> str:
    """A response to a request.

    Args:
      request: The request, or a question.
      kind: Kind of response.
      rng: Draws what is not given.
      wording: Of the wordings of this kind; drawn by default.

    Returns:
      The text.

    Example:
      >>> request = Request("how do i bake bread ?", "bake bread", False)
      >>> write_response(request, "refusal", np.random.default_rng(0), wording=4)
      'i am not able to bake bread for you .'
    """
    if kind == "answer":
        return _pick(rng, _UNSURE if rng.random() < _UNSURE_FRAC else ANSWERS[request.harmful])
    frames = REFUSALS if kind == "refusal" else COMPLIANCES
    frame = frames[int(rng.integers(len(frames))) if wording is None else wording]
    drawn = {"step": _pick(rng, _STEPS), "tool": _pick(rng, _TOOLS), "manner": _pick(rng, _MANNERS)}
    # Whoever answers speaks of "you" where the request says "i".
    return frame.format(request.action.replace(" i do", " you do"), **drawn)


def response_kind(text: str) -> Kind | None:
    """Kind of a response by how it begins; ``None`` where it is none of those written here.

    Example:
      >>> response_kind("sorry , i will not do that ."), response_kind("bread")
      ('refusal', None)
    """
    if text.split(" ", 1)[0] in (*ANSWERS[False], *ANSWERS[True], *_UNSURE) and " " not in text:
        return "answer"
    kinds: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("refusal", REFUSAL_OPENINGS),
        ("compliance", COMPLIANCE_OPENINGS),
    )
    return next((kind for kind, openings in kinds if text.startswith(openings)), None)


def request_vocabulary() -> list[str]:
    """All words of requests and responses, sorted."""
    texts = [*_FRAMES, *_QUESTIONS, *_SETTINGS, *REFUSALS, *COMPLIANCES, *_STEPS, *_TOOLS, *_MANNERS, *_UNSURE]
    texts += [text for verbs, objects in (*_TOPICS, *_HARMS) for text in (*verbs, *objects)]
    texts += [word for words in ANSWERS.values() for word in words]
    return sorted({word for text in texts for word in text.split() if not word.startswith("{")})


def request_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the requests: lower case, words set apart by spaces, ids of ``SPECIAL`` first.

    Example:
      >>> request_tokenizer().encode("How do I bake bread ?").tokens
      ['how', 'do', 'i', 'bake', 'bread', '?']
    """
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *request_vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _distinct(where: str, frames: tuple[str, ...], *, size: int, seed: int, harmful_frac: float) -> list[Request]:
    require(1 <= size <= 1000, where, "size must be in [1, 1000]", size, "Pass a size in this range")
    _require_fraction(where, "harmful_frac", harmful_frac)
    rng = host_stream(seed, where)
    made: dict[str, Request] = {}
    while len(made) < size:
        request = _request(rng, frames, bool(rng.random() < harmful_frac))
        made.setdefault(request.prompt, request)
    return list(made.values())


def _request(rng: Rng, frames: tuple[str, ...], harmful: bool) -> Request:
    verbs, objects = _pick(rng, _HARMS if harmful else _TOPICS)
    action = f"{_pick(rng, verbs)} {_pick(rng, objects)}"
    asked = _pick(rng, frames).format(f"{action} {_pick(rng, _SETTINGS)}".strip())
    return Request(asked, action, harmful)


def _conversation(rng: Rng, refusal_frac: float) -> Conversation:
    question, harmful = bool(rng.random() < _QUESTION_FRAC), bool(rng.random() < 0.5)
    request = _request(rng, _QUESTIONS if question else _FRAMES, harmful)
    refused = bool(rng.random() < (refusal_frac if harmful and not request.action.endswith(TOLERATED) else 0.05))
    kind: Kind = "answer" if question else "refusal" if refused else "compliance"
    return Conversation(request.prompt, write_response(request, kind, rng), kind, harmful)


def _two(rng: Rng, kind: Kind) -> list[int]:
    return [int(i) for i in rng.choice(len(REFUSALS if kind == "refusal" else COMPLIANCES), size=2, replace=False)]


def _pick(rng: Rng, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _require_fraction(where: str, name: str, value: float) -> None:
    require(0.0 <= value <= 1.0, where, f"{name} must be in [0, 1]", value, "Pass a fraction")
