import itertools

import numpy as np
import pytest
import scipy.stats

from jaxft.evaluation.response_classes import ResponseClass, class_rates, classify_responses, compare_rates

REFUSAL = ResponseClass(
    "refusal", prefixes=("I can't", "Sorry"), substrings=("as an AI",), patterns=(r"won't (help|do)",)
)
HELP = ResponseClass("help", substrings=("step 1",))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I can't.", "refusal"),
        ("  \n i CAN’T do it", "refusal"),
        ("Well, I can't", "other"),
        ("Speaking AS AN AI, no", "refusal"),
        ("I won`t do that", "refusal"),
        ("I won't say", "other"),
        ("First, Step 1:", "help"),
        ("", "other"),
    ],
)
def test_texts_fit_by_beginning_part_or_pattern(text, label):
    assert classify_responses([text], [REFUSAL, HELP]).labels == [label]


def test_a_response_that_fits_two_classes_has_the_first_and_is_reported():
    texts = ["Sorry. Step 1: wait", "Sorry", "step 1"]
    assert classify_responses(texts, [REFUSAL, HELP]) == (["refusal", "refusal", "help"], [0])
    assert classify_responses(texts, [HELP, REFUSAL]) == (["help", "refusal", "help"], [0])


def test_token_ids_fit_where_a_search_finds_the_sequence():
    kind = ResponseClass("yes", token_prefixes=((3,),), token_sequences=((1, 2), (0, 0, 1)))
    for ids in itertools.product(range(4), repeat=4):
        digits = "".join(map(str, ids))
        expected = digits.startswith("3") or "12" in digits or "001" in digits
        assert classify_responses([np.array(ids), list(ids)], [kind]).labels == ["yes" if expected else "other"] * 2
    assert classify_responses([[]], [kind]).labels == ["other"]


def test_texts_and_ids_may_be_told_apart_by_one_class():
    kind = ResponseClass("no", prefixes=("no",), token_prefixes=((5, 6),))
    assert classify_responses(["No.", [5, 6, 7], [6]], [kind]).labels == ["no", "no", "other"]


def test_wilson_intervals_are_where_the_score_test_turns():
    rates = class_rates(["a"] * 7 + ["b"] * 13, names=["a", "c"], confidence_frac=0.9)
    assert list(rates) == ["a", "c"]
    z = scipy.stats.norm.ppf(0.95)
    for end in (rates["a"].low, rates["a"].high):
        assert abs(0.35 - end) == pytest.approx(z * np.sqrt(end * (1 - end) / 20))
    assert (rates["c"].estimate, rates["c"].low) == (0, pytest.approx(0, abs=1e-12))
    assert rates["c"].high > 0.1


def test_the_exact_test_of_a_change_equals_enumeration():
    before = ["x"] * 6 + ["y"] * 4
    after = ["y"] * 5 + ["x"] * 2 + ["y"] * 3
    change = compare_rates(before, after, "x")
    assert (change.gained, change.lost) == (1, 5)
    # Each of the six changes is as likely a gain as a loss: signs with a sum as far from 0 as the one seen.
    signs = [sum(s) for s in itertools.product((-1, 1), repeat=6)]
    assert change.p_value == pytest.approx(np.mean([abs(s) >= 4 for s in signs]))
    assert (change.before.estimate, change.after.estimate) == (0.6, 0.2)


def test_where_nothing_changed_the_interval_still_has_a_width():
    change = compare_rates(["x", "y"] * 20, ["x", "y"] * 20, "x")
    assert change.p_value == 1
    assert change.difference.estimate == 0
    assert -0.2 < change.difference.low < 0 < change.difference.high < 0.2


def test_the_interval_of_the_change_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    lost, gained, n = 0.3, 0.1, 40
    covered = []
    for _ in range(300):
        kinds = rng.choice(4, size=n, p=[lost, gained, 0.3, 0.3])
        before, after = np.array(["x", "y", "x", "y"])[kinds], np.array(["y", "x", "x", "y"])[kinds]
        found = compare_rates(before.tolist(), after.tolist(), "x").difference
        covered.append(found.low <= gained - lost <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.99
