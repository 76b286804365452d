"""Scores of brackets against counts made by hand and by other code."""

import dataclasses

import numpy as np
import pytest

from jaxft.structure.binarize import clean_tree
from jaxft.structure.parse_metrics import EVALB, INDUCTION, BracketConvention, bracket_scores
from jaxft.structure.tree_distances import branching_tree
from jaxft.structure.trees import parse_tree, tree_spans

GOLD = parse_tree("(TOP (S (NP (DT the) (NN dog)) (VP (VBD ran) (ADVP (RB home)) (PP (IN in) (NP (NN fog)))) (. .)))")
GUESS = parse_tree("(TOP (S (NP (DT the) (NN dog)) (VP (VBD ran) (PRT (RB home) (IN in)) (NP (NN fog))) (. .)))")
# Without the full stop: S(0,6) NP(0,2) VP(2,6) ADVP(3,4) PP(4,6) NP(5,6), against S NP VP PRT(3,5) NP(5,6).


def test_evalb_by_hand():
    scores = bracket_scores([GUESS], [GOLD])
    assert (scores.matched, scores.predicted, scores.gold) == (4, 5, 6)
    assert (scores.precision, scores.recall) == (4 / 5, 4 / 6)
    assert scores.f1 == pytest.approx(8 / 11)
    assert (scores.crossing, scores.no_crossing, scores.exact_match) == (1, 0, 0)
    assert scores.convention is EVALB


def test_deleted_words_leave_no_trace():
    gold = parse_tree("(S (NP (NN a) (, ,)) (VP (VB b) (PRN (, ,))) (. .))")
    flat = parse_tree("(S (NP (NN a)) (, ,) (VP (VB b) (, ,)) (. .))")
    assert bracket_scores([flat], [gold])[:4] == (1, 1, 1, 1)
    kept = dataclasses.replace(EVALB, deleted_tags=())
    assert bracket_scores([flat], [gold], convention=kept).matched == 2


def test_a_predicted_tag_does_not_change_which_words_are_deleted():
    guess = parse_tree(str(GOLD).replace("(. .)", "(NN .)").replace("(NN fog)", "(. fog)"))
    assert bracket_scores([guess], [GOLD]).exact_match == 1


def test_equal_labels_match():
    gold, guess = parse_tree("(S (ADVP (RB a)) (VB b))"), parse_tree("(S (PRT (RB a)) (VB b))")
    assert bracket_scores([guess], [gold]).matched == 2
    assert bracket_scores([guess], [gold], convention=dataclasses.replace(EVALB, equal_labels=())).matched == 1


def test_repeated_constituents_count_as_often_as_they_occur():
    twice, once = parse_tree("(S (NP (NP (NN a))) (VB b))"), parse_tree("(S (NP (NN a)) (VB b))")
    assert bracket_scores([once], [twice]).recall == pytest.approx(2 / 3)
    assert bracket_scores([once], [twice], convention=dataclasses.replace(EVALB, multiset=False)).recall == 1


def test_unlabelled_scores_are_no_lower():
    labelled, unlabelled = (
        bracket_scores([GUESS], [GOLD], convention=BracketConvention(labelled=labels)) for labels in (True, False)
    )
    assert unlabelled.matched >= labelled.matched
    relabelled = parse_tree(str(GOLD).replace("NP", "XP"))
    assert bracket_scores([relabelled], [GOLD], convention=BracketConvention(labelled=False)).f1 == 1


def test_induction_drops_trivial_spans_and_averages_sentences():
    gold = [parse_tree("(S (NP (A a) (B b)) (VP (C c) (NP (D d) (E e))))"), parse_tree("(S (A a) (VP (B b) (C c)))")]
    guess = [branching_tree(list("abcde")), branching_tree(list("abc"))]
    # First: NP(0,2) VP(2,5) NP(3,5) against (1,5) (2,5) (3,5): 2 of 3 and 3. Second: all right.
    scores = bracket_scores(guess, gold, convention=INDUCTION)
    assert scores.f1 == pytest.approx((2 / 3 + 1) / 2)
    corpus = bracket_scores(guess, gold, convention=dataclasses.replace(INDUCTION, average="corpus"))
    assert corpus.f1 == pytest.approx(3 / 4)


def test_nothing_to_find_and_nothing_found_is_right():
    pair = parse_tree("(S (A a) (B b))")
    assert bracket_scores([branching_tree(["a", "b"])], [pair], convention=INDUCTION).f1 == 1
    one = parse_tree("(S (A a))")
    scores = bracket_scores([one, pair], [one, pair], convention=INDUCTION)
    assert (scores.sentences, scores.skipped) == (1, 1)


def test_lengths_are_counted_without_deleted_words():
    six = dataclasses.replace(EVALB, max_length=6)
    assert bracket_scores([GUESS], [GOLD], convention=six).sentences == 1
    assert bracket_scores([GUESS], [GOLD], convention=dataclasses.replace(EVALB, max_length=5)).skipped == 1


def test_a_missing_parse_finds_nothing():
    scores = bracket_scores([None, GOLD], [GOLD, GOLD])
    assert (scores.failed, scores.matched, scores.gold, scores.precision, scores.recall) == (1, 6, 12, 1, 0.5)
    assert bracket_scores([], []).sentences == 0


def test_spans_and_arrays_score_as_their_trees():
    plain = BracketConvention()
    trees = bracket_scores([GUESS], [GOLD], convention=plain)
    assert bracket_scores([tree_spans(GUESS)], [tree_spans(GOLD)], convention=plain, lengths=[7]) == trees
    unlabelled = dataclasses.replace(INDUCTION)
    arrays = [np.array([span[:2] for span in tree_spans(tree)]) for tree in (GUESS, GOLD)]
    expected = bracket_scores([GUESS], [GOLD], convention=unlabelled)
    assert bracket_scores(arrays[:1], arrays[1:], convention=unlabelled, lengths=np.array([7])) == expected


def test_swapping_the_sides_swaps_precision_and_recall():
    there, back = (bracket_scores([a], [b], convention=BracketConvention()) for a, b in ((GUESS, GOLD), (GOLD, GUESS)))
    assert (there.precision, there.recall, there.f1) == (back.recall, back.precision, back.f1)


def test_real_trees_score_full_marks_against_themselves_and_baselines_less(data_dir):
    from jaxft.data.treebank import read_treebank

    raw = read_treebank(data_dir / "treebank" / "wsj_0003.mrg")
    gold = [tree for tree in (clean_tree(tree, punctuation=False) for tree in raw) if tree]
    assert bracket_scores(gold, gold)[:6] == (1, 1, 1, 1, 0, 1)
    right, left = (
        bracket_scores([branching_tree(t.leaves(), way) for t in gold], gold, convention=INDUCTION).f1
        for way in ("right", "left")
    )
    assert left < right < 1
