"""A generated world of short reviews: a corpus to pre-train on, a task to fine-tune on, and their tokenizer.

Nothing has to be downloaded for it. In the corpus a review often ends in "it was great ." or "it was terrible .",
so that a masked-word model learns the cloze that the prompt of the task asks for; the task's own reviews never say
it. They are harder than the corpus: words of faint sentiment, which the corpus uses both ways, count as much as strong
ones, and where words disagree the majority decides. A model of the corpus is therefore good at the task, not perfect.
"""

from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxft.core.checks import require
from jaxft.core.rng import host_stream
from jaxft.data.readers import Example, Splits


def _words(text: str) -> list[str]:
    return text.split()


_NOUNS = _words("plot story script ending acting music cast pace dialogue humor scenery opening")
_THINGS = _words("film movie picture comedy drama")
_STRONG = (
    _words("dull boring dreadful clumsy stale lifeless tedious weak messy painful"),
    _words("brilliant moving superb charming wonderful funny clever gripping fresh lovely"),
)
_FAINT = (_words("loud long strange cold dark slow"), _words("quiet simple bold light sincere soft"))
_VERBS = (_words("hated disliked regretted mocked"), _words("loved enjoyed admired praised"))
_WHO = _words("we i they everyone critics children")
_ADVERBS = _words("very rather quite truly")
_DAYS = _words("friday sunday monday holiday")
_PLACES = _words("theater festival village school")
_LABEL_WORDS = ("terrible", "great")
_FRAME_WORDS = _words("the a was and but on at saw with it about of another this one , .")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_CLOZE_AGREES = 0.95
_FAINT_FRAC = 0.3
_FAINT_AGREES = 0.65

Rng = np.random.Generator
Word = Callable[[int], str]
"""A describing word of polarity 0 or 1."""


def review_corpus(*, size: int, seed: int, positive_frac: float = 0.5) -> list[str]:
    """Sentences to pre-train on.

    Three in four are a review that ends in the cloze, which agrees with the review 19 times in 20; one in six is a
    review that ends otherwise; the rest tell where a film was seen or what it was about. At most 20 words each.

    Args:
      size: Number of sentences.
      seed: Seed.
      positive_frac: Part of the reviews that praise. Away from one half, a model of the corpus is biased at the cloze.

    Returns:
      The sentences, of which some may be equal.

    Raises:
      UserError: ``size`` below 1, or ``positive_frac`` outside [0, 1].

    Example:
      >>> review_corpus(size=3, seed=0) == review_corpus(size=3, seed=0)
      True
    """
    require(size >= 1, "review_corpus", "size must be at least 1", size, "Pass size >= 1")
    where, fine = "review_corpus", 0.0 <= positive_frac <= 1.0
    require(fine, where, "positive_frac must be in [0, 1]", positive_frac, "Pass a fraction")
    rng = host_stream(seed, "review-corpus")
    return [_corpus_sentence(rng, positive_frac) for _ in range(size)]


def review_examples(*, size: int, seed: int, noise_frac: float = 0.4) -> list[Example]:
    """Distinct labelled reviews of three describing words each, without the cloze.

    Args:
      size: Number of examples.
      seed: Seed.
      noise_frac: Part of the reviews in which one of the three words contradicts the label.

    Returns:
      Examples of the task ``reviews``: 1 where most describing words are positive. At most 16 words each.

    Raises:
      UserError: ``size`` outside [1, 100000], or ``noise_frac`` outside [0, 1].

    Example:
      >>> examples = review_examples(size=4, seed=0)
      >>> any("it was" in example.text_a for example in examples)
      False
    """
    where = "review_examples"
    require(1 <= size <= 100_000, where, "size must be in [1, 100000]", size, "Pass a size in this range")
    require(0.0 <= noise_frac <= 1.0, where, "noise_frac must be in [0, 1]", noise_frac, "Pass a fraction")
    rng = host_stream(seed, "review-examples")
    made: dict[str, Example] = {}
    while len(made) < size:
        label = int(rng.integers(2))
        polarities = _polarities(rng, label, noise_frac)
        text = _three_word_review(rng, polarities, lambda polarity: _any_word(rng, polarity))
        made.setdefault(text, Example(text, None, label))
    return list(made.values())


def review_splits(seed: int = 0) -> Splits:
    """1000 training and 1000 test reviews, all distinct: room for 64 + 64 examples a class."""
    examples = review_examples(size=2000, seed=seed)
    return Splits(examples[:1000], examples[1000:], f"generated reviews, seed {seed}")


def review_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the reviews: lower case, framed as BERT does.

    Example:
      >>> review_tokenizer().encode("It was GREAT .").tokens
      ['[CLS]', 'it', 'was', 'great', '.', '[SEP]']
    """
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *review_vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", frame)
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def review_vocabulary() -> list[str]:
    """All words of the reviews, sorted."""
    groups = (_NOUNS, _THINGS, *_STRONG, *_FAINT, *_VERBS, _WHO, _ADVERBS, _DAYS, _PLACES, _LABEL_WORDS, _FRAME_WORDS)
    return sorted({word for group in groups for word in group})


def _pick(rng: Rng, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _polarities(rng: Rng, label: int, noise_frac: float) -> list[int]:
    polarities = [label] * 3
    if rng.random() < noise_frac:
        polarities[int(rng.integers(3))] = 1 - label
    return polarities


def _any_word(rng: Rng, polarity: int) -> str:
    """A word as the task uses it: faint ones count as much as strong ones."""
    return _pick(rng, (_FAINT if rng.random() < 0.5 else _STRONG)[polarity])


def _corpus_word(rng: Rng, polarity: int) -> str:
    """A word as the corpus uses it: faint ones often stand in reviews of the other kind."""
    if rng.random() < _FAINT_FRAC:
        return _pick(rng, _FAINT[polarity if rng.random() < _FAINT_AGREES else 1 - polarity])
    return _pick(rng, _STRONG[polarity])


def _three_word_review(rng: Rng, polarities: list[int], word: Word) -> str:
    x, y, z = map(word, polarities)
    first, second, third = (str(noun) for noun in rng.choice(_NOUNS, size=3, replace=False))
    thing, who, adverb, day = (_pick(rng, words) for words in (_THINGS, _WHO, _ADVERBS, _DAYS))
    joined = "and" if polarities[1] == polarities[2] else "but"
    frames = (
        f"the {first} was {x} , the {second} was {y} {joined} the {third} was {z} .",
        f"a {x} {thing} with a {y} {first} {joined} a {z} {second} .",
        f"{who} saw a {x} {thing} , the {first} was {y} {joined} the {second} was {z} .",
        f"on {day} {who} saw this {thing} . a {x} , {y} {joined} {adverb} {z} {first} .",
    )
    return frames[int(rng.integers(len(frames)))]


def _short_review(rng: Rng, polarity: int) -> str:
    word = _corpus_word(rng, polarity)
    noun, thing, who, adverb = (_pick(rng, words) for words in (_NOUNS, _THINGS, _WHO, _ADVERBS))
    frames = (
        f"{word} and {_corpus_word(rng, polarity)} .",
        f"the {noun} was {word} .",
        f"{who} {_pick(rng, _VERBS[polarity])} the {word} {noun} .",
        f"a {adverb} {word} {thing} .",
    )
    return frames[int(rng.integers(len(frames)))]


def _review(rng: Rng, polarity: int) -> str:
    if rng.random() < 0.7:
        return _short_review(rng, polarity)
    return _three_word_review(rng, _polarities(rng, polarity, 0.2), lambda p: _corpus_word(rng, p))


def _corpus_sentence(rng: Rng, positive_frac: float) -> str:
    polarity, kind = int(rng.random() < positive_frac), rng.random()
    if kind < 0.75:
        spoken = polarity if rng.random() < _CLOZE_AGREES else 1 - polarity
        return f"{_review(rng, polarity)} it was {_LABEL_WORDS[spoken]} ."
    who, thing = _pick(rng, _WHO), _pick(rng, _THINGS)
    if kind < 0.92:
        verb, word = _pick(rng, _VERBS[polarity]), _corpus_word(rng, polarity)
        return f"{_review(rng, polarity)} {(f'{who} {verb} it .', f'one {word} {thing} .')[int(rng.integers(2))]}"
    noun, day, place = _pick(rng, _NOUNS), _pick(rng, _DAYS), _pick(rng, _PLACES)
    frames = (
        f"{who} saw it on {day} at the {place} .",
        f"it was a {thing} about the {place} and the {noun} of another {thing} .",
    )
    return frames[int(rng.integers(2))]
