"""What a user of the task of two heuristics, and of its test of association, is told."""

import dataclasses
from typing import cast

import numpy as np
import pytest

from experiments.mode_connectivity.heuristics_config import SMOKE, Heuristics
from jaxft.core.checks import UserError
from jaxft.core.statistics import mantel_test
from jaxft.data.english_grammar import english_grammar
from jaxft.data.heuristic_rules import contains_symbol, main_subject_number, two_rule_splits
from jaxft.data.pcfg_corpus import sample_corpus
from jaxft.structure.pcfg import SymbolNames

GRAMMAR = english_grammar()
NAMES = cast(SymbolNames, GRAMMAR.names)
SIZES = {"train": 8, "held_out": 4, "challenge": 4, "seed": 0}


@pytest.fixture(scope="module")
def parses():
    return sample_corpus(GRAMMAR, seed=0, size=4, max_length=6).parses


def test_too_small_a_corpus_says_which_sentences_are_missing():
    structural = np.array([0, 1] * 8)
    with pytest.raises(UserError, match="0 of class 0 on which they disagree, of 2 wanted; 0 of class 1") as error:
        two_rule_splits(structural, structural, **SIZES)
    assert "larger corpus" in str(error.value)


def test_rules_of_other_lengths_and_fractions_out_of_range_are_refused():
    ones = np.ones(4, int)
    with pytest.raises(UserError, match=r"rules must be \[b\] and \[b\]"):
        two_rule_splits(ones, ones[:2], **SIZES)
    with pytest.raises(UserError, match=r"telling_frac must lie in \[0, 1\], got 1.5"):
        two_rule_splits(ones, ones, telling_frac=1.5, **SIZES)


def test_another_grammar_is_refused_by_the_symbols_it_lacks(parses):
    with pytest.raises(UserError, match="none called PP, CS, NPs"):
        main_subject_number(parses, SymbolNames(["S"], ["N"], ["dogs"]))
    with pytest.raises(UserError, match="none called Adjective"):
        contains_symbol(parses, NAMES, "Adjective")


def test_matrices_that_are_too_small_or_not_finite_are_refused():
    with pytest.raises(UserError, match="m of 4 or more"):
        mantel_test(np.ones((3, 3)), np.ones((3, 3)))
    holes = np.full((4, 4), np.nan)
    with pytest.raises(UserError, match="entries must be finite"):
        mantel_test(holes, np.ones((4, 4)))


def test_all_faults_of_the_settings_are_listed():
    assert not Heuristics().faults()
    assert not SMOKE.faults()
    assert not dataclasses.replace(SMOKE, models=0).faults()
    bad = dataclasses.replace(SMOKE, models=2, width=15, train_sentences=30, telling_frac=-1.0, points=2, steps=0)
    words = ("models", "width", "train_sentences", "telling_frac", "points", "steps")
    assert [sum(fault.startswith(f"{word}:") for fault in bad.faults()) for word in words] == [1] * len(words)
