from typing import cast

import numpy as np
import pytest

from jaxft.data.english_grammar import WORDS, english_grammar
from jaxft.data.heuristic_rules import contains_symbol, main_subject_number, two_rule_splits
from jaxft.data.pcfg_corpus import sample_corpus
from jaxft.structure.parses import parses_to_trees
from jaxft.structure.pcfg import SymbolNames

GRAMMAR = english_grammar()
NAMES = cast(SymbolNames, GRAMMAR.names)
VERBS = {"Vis": 0, "Vts": 0, "Vss": 0, "Vip": 1, "Vtp": 1, "Vsp": 1}
"""Number that a verb shows; a modal verb shows none."""


@pytest.fixture(scope="module")
def corpus():
    return sample_corpus(GRAMMAR, seed=3, size=200, max_length=12)


def words_of(corpus, i):
    return [NAMES.words[w] for w in np.asarray(corpus.tokens[i])[: int(corpus.lengths[i])]]


def main_verb(tree):
    """Preterminal of the verb of the first main clause."""
    label, children = tree
    if label == "S" and children[0][0] == "PP":
        return main_verb(children[1])
    if label == "S":
        return main_verb(children[0] if children[1][0] == "CS" else children[1])
    return main_verb(children[0]) if label in ("VPs", "VPp") else label


def as_pairs(tree):
    return (tree.label, [as_pairs(child) for child in tree.children if not isinstance(child, str)])


def test_subject_has_the_number_of_the_main_verb(corpus):
    number = main_subject_number(corpus.parses, NAMES)
    trees = parses_to_trees(corpus.parses, corpus.tokens, NAMES)
    verbs = [main_verb(as_pairs(tree)) for tree in trees]
    shown = [i for i, verb in enumerate(verbs) if verb in VERBS]
    assert len(shown) > 100
    assert [int(number[i]) for i in shown] == [VERBS[verbs[i]] for i in shown]


def test_first_and_last_nouns_often_have_another_number(corpus):
    """The rule is structural: no single word of the sentence gives it away."""
    number = main_subject_number(corpus.parses, NAMES)
    plural, singular = set(WORDS["Np"].split()), set(WORDS["Ns"].split())
    nouns = [[w in plural for w in words_of(corpus, i) if (w in plural) != (w in singular)] for i in range(200)]
    known = [i for i in range(200) if number[i] >= 0 and nouns[i]]
    assert 0.2 < np.mean([number[i] != nouns[i][-1] for i in known]) < 0.6


def test_symbols_are_found_where_their_words_are(corpus):
    prepositions = {entry.split(":")[0] for entry in WORDS["P"].split()}
    found = contains_symbol(corpus.parses, NAMES, "P")
    assert found.tolist() == [int(bool(prepositions & set(words_of(corpus, i)))) for i in range(200)]
    assert 0 < found.mean() < 1


def test_splits_are_disjoint_balanced_and_agree_where_they_say():
    rng = np.random.default_rng(0)
    structural, lexical = rng.integers(0, 2, (2, 400))
    structural[:20] = -1
    splits = two_rule_splits(structural, lexical, train=100, held_out=40, challenge=60, telling_frac=0.1, seed=1)
    rows = np.concatenate([split.rows for split in splits])
    assert len(rows) == len(set(rows.tolist())) == 200
    assert rows.min() >= 20
    agree = structural == lexical
    assert [agree[split.rows].mean() for split in splits] == [0.9, 1.0, 0.0]
    for split in splits:
        assert (structural[split.rows] == split.labels).all()
        assert split.labels.mean() == 0.5
    told = ~agree[splits.train.rows]
    assert splits.train.labels[told].mean() == 0.5, "neither class is told by the sentences that tell"


def test_splits_depend_on_the_seed():
    structural, lexical = np.random.default_rng(0).integers(0, 2, (2, 400))
    first, again, other = (
        two_rule_splits(structural, lexical, train=20, held_out=10, challenge=10, seed=seed) for seed in (0, 0, 1)
    )
    assert (first.train.rows == again.train.rows).all()
    assert (first.train.rows != other.train.rows).any()
