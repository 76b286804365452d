"""Cleaning, chains, binarisation: each with its inverse."""

import pytest

from jaxft.data.treebank import read_treebank
from jaxft.structure.binarize import (
    BinarizationScheme,
    binarize,
    clean_tree,
    collapse_unaries,
    from_binary,
    head_child,
    restore_unaries,
    to_binary,
    unbinarize,
)
from jaxft.structure.tree_distances import branching_tree
from jaxft.structure.trees import parse_tree, tree_spans

FLAT = parse_tree("(S (NP (NP (DT a) (JJ b) (CD c) (NN d))) (ADVP (RB e)) (VP (VB f) (PRT (RP g)) (NP (NN h))) (. .))")
SCHEMES = [
    BinarizationScheme(direction=direction, h=h, v=v, unaries=unaries)
    for direction in ("right", "left", "head")
    for h, v in ((0, 1), (1, 2), (2, 3), (None, 1))
    for unaries in ("collapse", "keep")
]


def test_cleaning_removes_traces_and_what_they_empty():
    tree = parse_tree("( (S (NP-SBJ=2 (NP (-NONE- *)) (PP (NP (-NONE- *T*-1)))) (VP (VB-X go) (-LRB- -LCB-))) )")
    assert str(clean_tree(tree)) == "(S (VP (VB go) (-LRB- -LCB-)))"
    assert str(clean_tree(tree, remove=(), function_tags=True)).startswith("(S (NP-SBJ=2 (NP (-NONE- *))")
    assert clean_tree(parse_tree("( (S (-NONE- *)) )")) is None


def test_cleaning_takes_punctuation_and_wrappers_off_and_puts_one_on():
    tree = parse_tree("(ROOT (S (`` ``) (NP (NN a)) (, ,) (VP (VB b)) (. .)))")
    assert str(clean_tree(tree, punctuation=False)) == "(S (NP (NN a)) (VP (VB b)))"
    assert str(clean_tree(tree, wrapper="TOP")).startswith("(TOP (S")
    two = parse_tree("( (S (NN a)) (. .) )")
    assert str(clean_tree(two)) == "(TOP (S (NN a)) (. .))"
    assert str(clean_tree(parse_tree("( (X yes) )"))) == "(X yes)"


def test_chains_are_joined_and_restored():
    joined = collapse_unaries(FLAT)
    assert all(len(node.children) != 1 or node.is_preterminal for node in joined.subtrees())
    assert "(ADVP+RB e)" in str(joined)
    assert restore_unaries(joined) == FLAT
    above = collapse_unaries(FLAT, preterminals=False, joiner="/")
    assert "(ADVP (RB e))" in str(above)
    assert "NP/NP" in str(above)
    assert restore_unaries(above, joiner="/") == FLAT


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_binarisation_is_undone_exactly(scheme):
    binary = to_binary(FLAT, scheme)
    assert max(len(node.children) for node in binary.subtrees()) == 2
    assert binary.leaves() == FLAT.leaves()
    assert from_binary(binary, scheme) == FLAT


@pytest.mark.parametrize("direction", ["right", "left", "head"])
def test_binarisation_keeps_every_span_and_adds_only_intermediate_ones(direction):
    before, after = set(tree_spans(FLAT)), set(tree_spans(binarize(FLAT, direction=direction)))
    assert before <= after
    assert all("|<" in span.label for span in after - before)


def test_memory_is_cut_to_the_nearest_children():
    labels = {
        h: [node.label for node in binarize(parse_tree("(A (B b) (C c) (D d) (E e))"), h=h).subtrees()][2::2]
        for h in (None, 2, 1, 0)
    }
    assert labels == {
        None: ["A|<C-D-E>", "A|<D-E>", "E"],
        2: ["A|<C-D>", "A|<D-E>", "E"],
        1: ["A|<C>", "A|<D>", "E"],
        0: ["A|<>", "A|<>", "E"],
    }
    left = binarize(parse_tree("(A (B b) (C c) (D d) (E e))"), direction="left", h=1)
    assert str(left) == "(A (A|<D> (A|<C> (B b) (C c)) (D d)) (E e))"


def test_the_head_takes_what_is_behind_it_first():
    tree = binarize(parse_tree("(VP (RB a) (VB b) (NP c) (PP d))"), direction="head", h=0)
    assert str(tree) == "(VP (RB a) (VP|<> (VP|<> (VB b) (NP c)) (PP d)))"


def test_vertical_memory_names_ancestors():
    tree = binarize(parse_tree("(S (NP (NP (A a) (B b)) (C c)) (D d))"), v=3)
    assert [node.label for node in tree.subtrees() if not node.is_preterminal] == ["S", "NP^S", "NP^NP^S"]


def test_heads_of_common_constituents():
    assert head_child("NP", ["NP", "PP"]) == 0
    assert head_child("NP", ["DT", "NN", "NN"]) == 2
    assert head_child("S", ["NP", "VP", "."]) == 1
    assert head_child("PP", ["IN", "NP+NN"]) == 0
    assert head_child("SBAR", ["WHNP+WP", "S"]) == 0


def test_a_parsers_root_may_be_intermediate():
    assert str(unbinarize(parse_tree("(S|<A> (A a) (S|<B> (B b) (C c)))"))) == "(S (A a) (B b) (C c))"


def test_a_wide_and_deep_tree_is_no_problem():
    wide = parse_tree(f"(X {' '.join(f'(T w{i})' for i in range(3000))})")
    assert unbinarize(binarize(wide, h=2, v=2)) == wide
    deep = branching_tree(["w"] * 2000)
    assert from_binary(to_binary(deep, BinarizationScheme()), BinarizationScheme()) == deep


@pytest.fixture(scope="module")
def some_trees(data_dir):
    raw = read_treebank([data_dir / "treebank" / f"wsj_00{i:02}.mrg" for i in range(1, 11)])
    return [tree for tree in map(clean_tree, raw) if tree is not None]


@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=str)
def test_real_trees_come_back(some_trees, scheme):
    assert len(some_trees) > 60
    assert all(from_binary(to_binary(tree, scheme), scheme) == tree for tree in some_trees)


@pytest.fixture(scope="module")
def all_trees(data_dir):
    return [tree for tree in map(clean_tree, read_treebank([data_dir / "treebank", data_dir / "gum"])) if tree]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_all_real_trees_come_back(all_trees, scheme):
    trees = all_trees
    assert len(trees) > 8000
    assert all(from_binary(to_binary(tree, scheme), scheme) == tree for tree in trees)
