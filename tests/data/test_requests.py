from collections import Counter

import numpy as np
import pytest

from jaxft.data.requests import (
    ANSWERS,
    COMPLIANCE_OPENINGS,
    COMPLIANCES,
    REFUSAL_OPENINGS,
    REFUSALS,
    TOLERATED,
    Request,
    conversation_corpus,
    question_prompts,
    request_prompts,
    request_tokenizer,
    request_vocabulary,
    response_kind,
    write_response,
    written_preferences,
)


@pytest.fixture(scope="module")
def corpus():
    return conversation_corpus(size=4000, seed=0)


def test_the_vocabulary_is_that_of_the_corpus(corpus):
    assert {word for c in corpus for word in f"{c.prompt} {c.response}".split()} == set(request_vocabulary())


def test_harmful_requests_are_mostly_refused_and_others_mostly_not(corpus):
    asked = [c for c in corpus if c.kind != "answer"]
    tolerated = [any(thing in c.prompt for thing in TOLERATED) for c in asked]
    refused = {}
    for c, fine in zip(asked, tolerated, strict=True):
        refused.setdefault((c.harmful, fine), []).append(c.kind == "refusal")
    assert abs(np.mean(refused[True, False]) - 0.95) < 0.02
    assert abs(np.mean(refused[True, True]) - 0.05) < 0.03
    assert abs(np.mean(refused[False, False]) - 0.05) < 0.02
    assert abs(np.mean(tolerated) - 0.5 * 3 / 16) < 0.02
    assert 0.27 < 1 - len(asked) / len(corpus) < 0.33


def test_questions_are_answered_by_what_they_are_about(corpus):
    answers = {
        harmful: Counter(c.response for c in corpus if c.kind == "answer" and c.harmful == harmful)
        for harmful in ANSWERS
    }
    for harmful, words in ANSWERS.items():
        assert set(words) <= set(answers[harmful])
        assert not set(words) & set(answers[not harmful])
        assert sum(answers[harmful][w] for w in words) > 0.85 * answers[harmful].total()


def test_the_kind_of_a_response_shows_in_its_first_words(corpus):
    assert all(response_kind(c.response) == c.kind for c in corpus)
    assert response_kind("i bake bread") is None


@pytest.mark.parametrize(("frames", "openings"), [(REFUSALS, REFUSAL_OPENINGS), (COMPLIANCES, COMPLIANCE_OPENINGS)])
def test_each_opening_belongs_to_one_wording(frames, openings):
    assert [[f.startswith(o) for o in openings].index(True) for f in frames] == list(range(len(openings)))


def test_whoever_answers_says_you():
    request = Request("how do i open a lock i do not own ?", "open a lock i do not own", True)
    said = write_response(request, "refusal", np.random.default_rng(0), wording=4)
    assert said == "i am not able to open a lock you do not own for you ."


def test_pairs_prefer_refusals_of_what_is_harmful_and_never_repeat_a_text():
    pairs = written_preferences(size=600, seed=0)
    assert all(response_kind(p.chosen) == ("refusal" if p.harmful else "compliance") for p in pairs)
    assert all(p.chosen != p.rejected for p in pairs)
    both = [response_kind(p.rejected) == "refusal" for p in pairs if p.harmful]
    assert 0.4 < np.mean(both) < 0.6
    assert len({p.prompt for p in pairs}) == 600


def test_every_word_is_a_token_and_texts_come_back(corpus):
    tokenizer = request_tokenizer()
    assert tokenizer.get_vocab_size() == len(request_vocabulary()) + 3
    for c in corpus[:200]:
        ids = tokenizer.encode(c.response).ids
        assert len(ids) == len(c.response.split())
        assert 1 not in ids
        assert tokenizer.decode(ids) == c.response


def test_prompts_are_distinct_and_the_seed_alone_decides():
    for make in (request_prompts, question_prompts):
        prompts = make(size=300, seed=0)
        assert len({p.prompt for p in prompts}) == 300
        assert prompts == make(size=300, seed=0) != make(size=300, seed=1)
        assert {p.harmful for p in make(size=20, seed=0, harmful_frac=0.0)} == {False}
        assert len(make(size=1000, seed=0, harmful_frac=1.0)) == 1000
