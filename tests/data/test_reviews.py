import re
from collections import Counter

import numpy as np
import pytest

from jaxft.data.kshot import sample_kshot
from jaxft.data.reviews import review_corpus, review_examples, review_splits, review_tokenizer, review_vocabulary
from jaxft.data.tasks import get_task
from jaxft.data.tokenization import encode_prompt, label_word_ids

CLOZE = re.compile(r"^(.*) it was (terrible|great) \.$")


@pytest.fixture(scope="module")
def corpus():
    return review_corpus(size=4000, seed=0)


@pytest.fixture(scope="module")
def word_scores(corpus):
    """Log-odds of "great" against "terrible" for a review with the word: naive Bayes, by counting."""
    counts = {"terrible": Counter(), "great": Counter()}
    for match in filter(None, map(CLOZE.match, corpus)):
        counts[match[2]].update(match[1].split())
    return {w: np.log((counts["great"][w] + 1) / (counts["terrible"][w] + 1)) for w in review_vocabulary()}


def score(word_scores, text):
    return sum(word_scores[word] for word in text.split())


def test_the_vocabulary_is_that_of_the_corpus_and_the_task(corpus):
    texts = corpus + [example.text_a for example in review_examples(size=2000, seed=0)]
    assert {word for text in texts for word in text.split()} == set(review_vocabulary())


def test_the_task_uses_words_of_the_corpus_but_not_its_cloze(corpus):
    examples = review_examples(size=2000, seed=0)
    assert not any(re.search("it was|terrible|great", example.text_a) for example in examples)
    assert {w for e in examples for w in e.text_a.split()} <= {w for text in corpus for w in text.split()}


def test_the_cloze_mostly_agrees_with_the_review(corpus, word_scores):
    pairs = [(score(word_scores, m[1]) > 0, m[2] == "great") for m in map(CLOZE.match, corpus) if m]
    assert 0.6 < len(pairs) / len(corpus) < 0.9
    assert 0.85 < np.mean([a == b for a, b in pairs]) < 0.98


def test_a_counting_model_of_the_corpus_is_good_at_the_task_not_perfect(word_scores):
    examples = review_examples(size=2000, seed=1)
    accuracy = np.mean([(score(word_scores, e.text_a) > 0) == e.label for e in examples])
    assert 0.8 < accuracy < 0.98


NEGATIVE = """dull boring dreadful clumsy stale lifeless tedious weak messy painful
    loud long strange cold dark slow"""
POSITIVE = """brilliant moving superb charming wonderful funny clever gripping fresh lovely
    quiet simple bold light sincere soft"""


def test_the_label_is_the_majority_and_noise_the_part_with_a_minority():
    kind = dict.fromkeys(NEGATIVE.split(), 0) | dict.fromkeys(POSITIVE.split(), 1)
    examples = review_examples(size=2000, seed=2, noise_frac=0.4)
    votes = [[kind[word] for word in e.text_a.split() if word in kind] for e in examples]
    assert all(len(vote) == 3 and (sum(vote) >= 2) == e.label for vote, e in zip(votes, examples, strict=True))
    assert abs(np.mean([len(set(vote)) == 2 for vote in votes]) - 0.4) < 0.04
    assert abs(np.mean([e.label for e in examples]) - 0.5) < 0.04


def test_prompts_fit_without_truncation_and_without_unknown_words(bert):
    task = get_task("reviews")
    encoded = encode_prompt(bert, task, review_examples(size=500, seed=0))
    assert encoded.truncated == 0
    assert max(encoded.lengths) <= 24
    assert not any(bert.unk_id in ids for ids in encoded.input_ids)
    assert len(label_word_ids(bert, task.label_words)) == 2


def test_corpus_sentences_fit_in_24_tokens(corpus):
    assert max(len(review_tokenizer().encode(text).ids) for text in corpus) <= 24


def test_splits_are_disjoint_and_give_64_shots():
    splits = review_splits(3)
    assert len(splits.test) == 1000
    assert not {e.text_a for e in splits.train} & {e.text_a for e in splits.test}
    assert len(sample_kshot(splits.train, classes=2, k=64, seed=13).dev) == 128


def test_the_seed_alone_decides():
    assert review_examples(size=20, seed=0) == review_examples(size=20, seed=0)
    assert review_examples(size=20, seed=0) != review_examples(size=20, seed=1)
    assert review_corpus(size=20, seed=0) != review_corpus(size=20, seed=1)
