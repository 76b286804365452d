"""Which kind of response is it? Classes given by the user as phrases or token ids, their rates, and what changed.

A refusal is whatever the user's class of refusals says. Nothing here judges whether a response is harmful.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Int

from jaxft.core.checks import UserError, message, nearest, require
from jaxft.core.types import Interval


@dataclasses.dataclass(frozen=True)
class ResponseClass:
    """What a response of the class looks like: any one of these suffices.

    Texts are compared without regard to case, to the shape of apostrophes, or to white space at their start.
    """

    name: str
    prefixes: tuple[str, ...] = ()
    """Beginnings of the text."""
    substrings: tuple[str, ...] = ()
    """Found anywhere in the text."""
    patterns: tuple[str, ...] = ()
    """Regular expressions, searched for; apostrophes in the text are straight ones."""
    token_prefixes: tuple[tuple[int, ...], ...] = ()
    """Beginnings of the token ids, for responses that are ids."""
    token_sequences: tuple[tuple[int, ...], ...] = ()
    """Found anywhere in the token ids."""


class ClassifiedResponses(NamedTuple):
    """A class for each response."""

    labels: list[str]
    several: list[int]
    """Responses that fit more than one class; each has the first listed."""


Response = str | Sequence[int] | Int[np.ndarray, "k"]


def classify_responses(
    responses: Sequence[Response], classes: Sequence[ResponseClass], *, other: str = "other"
) -> ClassifiedResponses:
    """The first listed class that each response fits.

    Args:
      responses: Texts, or token ids without a prompt.
      classes: In order of precedence.
      other: Label of a response that fits none.

    Returns:
      Labels, and which responses fit several classes.

    Raises:
      UserError: No classes, equal names, a class that says nothing, a pattern that is no regular expression, or
        responses of a kind, texts or ids, of which no class says anything.

    Example:
      >>> refusal = ResponseClass("refusal", prefixes=("I can't", "I cannot"))
      >>> classify_responses(["I can’t help with that.", "Here is how:"], [refusal]).labels
      ['refusal', 'other']
    """
    where = "classify_responses"
    _require_classes(where, responses, classes, other)
    compiled = {c.name: [_regex(where, c.name, pattern) for pattern in c.patterns] for c in classes}
    labels, several = [], []
    for i, response in enumerate(responses):
        if isinstance(response, str):
            fits = [c.name for c in classes if _fits_text(response, c, compiled[c.name])]
        else:
            fits = [c.name for c in classes if _fits_ids(response, c)]
        labels.append(fits[0] if fits else other)
        several += [i] if len(fits) > 1 else []
    return ClassifiedResponses(labels, several)


def class_rates(
    labels: Sequence[str], *, names: Sequence[str] | None = None, confidence_frac: float = 0.95
) -> dict[str, Interval]:
    """How often each class occurs, with Wilson's score interval.

    Args:
      labels: Of independent responses.
      names: Classes to report; ``None`` is those that occur, by name.
      confidence_frac: Coverage.

    Returns:
      Rates by class; ``stderr`` is that of the estimate, 0 at a rate of 0 or 1, where the interval still has a width.

    Raises:
      UserError: No labels.

    Example:
      >>> rate = class_rates(["refusal", "other", "other", "other"])["refusal"]
      >>> rate.estimate, round(rate.low, 4), round(rate.high, 4)
      (0.25, 0.0456, 0.6994)

    Reference:
      Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22.
    """
    n = len(labels)
    require(n > 0, "class_rates", "there must be a response", "none", "Generate some")
    rates = {}
    for name in sorted(set(labels)) if names is None else names:
        count = list(labels).count(name)
        found = scipy.stats.binomtest(count, n).proportion_ci(confidence_level=confidence_frac, method="wilson")
        p = count / n
        rates[name] = Interval(p, (p * (1 - p) / n) ** 0.5, float(found.low), float(found.high))
    return rates


class RateChange(NamedTuple):
    """How the rate of a class changed over the same prompts."""

    before: Interval
    after: Interval
    difference: Interval
    """After minus before, shrunk towards 0 as its interval is; the plain one is the difference of the two rates."""
    gained: int
    """Prompts whose response came into the class."""
    lost: int
    """Prompts whose response left it."""
    p_value: float
    """Of McNemar's exact test that neither is more likely than the other."""


def compare_rates(
    before: Sequence[str], after: Sequence[str], name: str, *, confidence_frac: float = 0.95
) -> RateChange:
    r"""Whether a class is more or less frequent after training, prompt by prompt.

    Of n prompts, $g$ gained and $l$ lost the class. The exact test is binomial with $g$ of $g + l$ at 1/2. With
    $\tilde g = (g + 1)/(n + 2)$ and $\tilde l$ alike, the difference is
    $\tilde g - \tilde l \pm z \sqrt{(\tilde g + \tilde l - (\tilde g - \tilde l)^2)/(n + 2)}$, which keeps a width
    where no response changed. Several responses to one prompt are not independent: take one of each.

    Args:
      before: Label of the response to each prompt.
      after: Labels for the same prompts, in the same order.
      name: The class.
      confidence_frac: Coverage of the intervals.

    Returns:
      Both rates, their difference and the test.

    Raises:
      UserError: Different numbers of prompts, none, or a class that occurs on neither side.

    Example:
      >>> change = compare_rates(["refusal"] * 9 + ["other"], ["other"] * 8 + ["refusal"] * 2, "refusal")
      >>> change.gained, change.lost, round(change.p_value, 4)
      (1, 8, 0.0391)

    Reference:
      McNemar 1947, Psychometrika 12; Bonett and Price 2012, J. Educ. Behav. Stat. 37, the adjusted Wald interval.
    """
    where = "compare_rates"
    sizes = f"{len(before)} and {len(after)}"
    require(len(before) == len(after) > 0, where, "both must label the same prompts", sizes, "Pair them")
    seen = {*before, *after}
    require(name in seen, where, "the class must occur", repr(name), nearest(name, seen))
    n = len(before)
    gained = sum(a != name and b == name for a, b in zip(before, after, strict=True))
    lost = sum(a == name and b != name for a, b in zip(before, after, strict=True))
    p_value = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    stderr = ((up + down - (up - down) ** 2) / (n + 2)) ** 0.5
    half = float(scipy.stats.norm.ppf((1 + confidence_frac) / 2)) * stderr
    difference = Interval(up - down, stderr, max(up - down - half, -1.0), min(up - down + half, 1.0))
    first, second = (class_rates(x, names=[name], confidence_frac=confidence_frac)[name] for x in (before, after))
    return RateChange(first, second, difference, gained, lost, p_value)


_APOSTROPHES = str.maketrans("’‘ʼ`", "''''")


def _plain(text: str) -> str:
    return text.translate(_APOSTROPHES)


def _fits_text(response: str, kind: ResponseClass, patterns: list[re.Pattern[str]]) -> bool:
    text = _plain(response).lstrip()
    folded = text.casefold()
    return (
        any(folded.startswith(_plain(prefix).casefold().lstrip()) for prefix in kind.prefixes)
        or any(_plain(part).casefold() in folded for part in kind.substrings)
        or any(pattern.search(text) for pattern in patterns)
    )


def _fits_ids(response: Sequence[int] | Int[np.ndarray, "k"], kind: ResponseClass) -> bool:
    ids = tuple(int(i) for i in response)
    if any(ids[: len(prefix)] == tuple(prefix) for prefix in kind.token_prefixes):
        return True
    spans = ((i, tuple(part)) for part in kind.token_sequences for i in range(len(ids) - len(part) + 1))
    return any(ids[i : i + len(part)] == part for i, part in spans)


def _regex(where: str, name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        got = f"{pattern!r} of {name} ({error})"
        raise UserError(message(where, "a pattern must be a regular expression", got, "Correct it")) from error


def _require_classes(where: str, responses: Sequence[Response], classes: Sequence[ResponseClass], other: str) -> None:
    names = [c.name for c in classes]
    distinct = bool(names) and len({*names, other}) == len(names) + 1
    got = f"{names} and {other!r} for the rest"
    require(distinct, where, "there must be classes of different names", got, "Rename them")
    fields = ("prefixes", "substrings", "patterns")
    loose = [
        f"{c.name}: {name}={getattr(c, name)!r}"
        for c in classes
        for name in fields
        if isinstance(getattr(c, name), str)
    ]
    advice = "Write a tuple of one as ('phrase',)"
    require(not loose, where, "phrases must come in a tuple", ", ".join(loose), advice)
    says: dict[str, tuple[list[str], list[tuple[int, ...]]]] = {
        c.name: ([*c.prefixes, *c.substrings, *c.patterns], [*c.token_prefixes, *c.token_sequences]) for c in classes
    }
    faulty = [name for name, (texts, ids) in says.items() if not (texts or ids) or not all([*texts, *ids])]
    rule = "each class must have phrases or ids, none of them empty"
    require(not faulty, where, rule, ", ".join(faulty), "A phrase that is empty fits every response")
    for which, part in (("texts", 0), ("token ids", 1)):
        found = any(isinstance(response, str) == (part == 0) for response in responses)
        known = any(said[part] for said in says.values())
        require(known or not found, where, f"a class must say something of {which}", "nothing", "Decode, or add ids")
