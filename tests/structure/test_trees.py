"""Trees: brackets in and out, spans, distances, and the ways back from them."""

import numpy as np
import pytest

from jaxft.structure.tree_distances import (
    branching_tree,
    common_ancestor_depths,
    gap_depths,
    syntactic_distances,
    tree_depths,
    tree_distances,
    tree_from_distances,
)
from jaxft.structure.trees import (
    Span,
    Tree,
    draw_tree,
    fold_tree,
    parse_tree,
    parse_trees,
    tree_from_spans,
    tree_spans,
)

SENTENCE = parse_tree("(S (NP (DT the) (JJ old) (NN dog)) (VP (VBD saw) (NP (NP (PRP us)))))")


def random_binary_tree(rng, n):
    """A random split at every constituent."""
    if n == 1:
        return Tree("T", (f"w{rng.integers(9)}",))
    k = int(rng.integers(1, n))
    return Tree("X", (random_binary_tree(rng, k), random_binary_tree(rng, n - k)))


def paths(tree):
    """The constituents above each word, by identity: the definition of depth and common ancestor."""
    found = []

    def walk(node, above):
        if isinstance(node, str):
            found.append(above)
        else:
            for child in node.children:
                walk(child, [*above, id(node)])

    walk(tree, [])
    return found


def test_printing_then_parsing_is_the_identity():
    assert parse_tree(str(SENTENCE)) == SENTENCE
    assert hash(parse_tree(str(SENTENCE))) == hash(SENTENCE)
    assert SENTENCE.children[0] != SENTENCE


def test_white_space_and_wrappers_are_read():
    text = "( (S\n  (A a)\t(B b) ))\n\n(ROOT(S(A a)))"
    assert [str(tree) for tree in parse_trees(text)] == ["( (S (A a) (B b)))", "(ROOT (S (A a)))"]
    assert list(parse_trees(" \n ")) == []


def test_words_tags_and_height():
    assert SENTENCE.leaves() == ["the", "old", "dog", "saw", "us"]
    assert SENTENCE.tags() == ["DT", "JJ", "NN", "VBD", "PRP"]
    assert (SENTENCE.height(), parse_tree("(A a)").height()) == (5, 1)


def test_spans_leave_out_what_is_asked():
    full = [(0, 5, "S"), (0, 3, "NP"), (3, 5, "VP"), (4, 5, "NP"), (4, 5, "NP")]
    assert [tuple(span) for span in tree_spans(SENTENCE)] == full
    assert [tuple(span) for span in tree_spans(SENTENCE, unary_chains=False)] == full[:-1]
    assert [tuple(span) for span in tree_spans(SENTENCE, trivial=False)] == full[1:3]
    assert len(tree_spans(SENTENCE, preterminals=True)) == 10
    assert tree_spans(parse_tree("(X a (Y b c))")) == [Span(0, 3, "X"), Span(1, 3, "Y")]


def test_spans_of_nltk_are_the_same():
    nltk = pytest.importorskip("nltk", reason="nltk is an oracle and need not be installed")
    theirs = nltk.Tree.fromstring(str(SENTENCE))
    assert str(SENTENCE) == " ".join(str(theirs).split())
    place = {id(leaf): i for i, leaf in enumerate(theirs.treepositions("leaves"))}
    assert len(place) == 5
    spans = []
    for position in theirs.treepositions("preorder"):
        node = theirs[position]
        if not isinstance(node, str) and not isinstance(node[0], str):
            leaves = [i for i, leaf in enumerate(theirs.treepositions("leaves")) if leaf[: len(position)] == position]
            spans.append((leaves[0], leaves[-1] + 1, node.label()))
    assert spans == [tuple(span) for span in tree_spans(SENTENCE)]


@pytest.mark.parametrize("seed", range(4))
def test_depths_and_distances_equal_paths_of_ancestors(seed):
    tree = random_binary_tree(np.random.default_rng(seed), 9) if seed else SENTENCE
    above = paths(tree)
    common = [[sum(x == y for x, y in zip(p, q, strict=False)) - 1 for q in above] for p in above]
    np.testing.assert_array_equal(tree_depths(tree), [len(p) for p in above])
    distances = [
        [len(p) + len(q) - 2 * c for q, c in zip(above, row, strict=True)] for p, row in zip(above, common, strict=True)
    ]
    np.fill_diagonal(table := np.array(distances), 0)
    np.testing.assert_array_equal(tree_distances(tree), table)
    off = ~np.eye(len(above), dtype=bool)
    np.testing.assert_array_equal(common_ancestor_depths(tree)[off], np.array(common)[off])
    np.testing.assert_array_equal(gap_depths(tree), np.diagonal(common, 1))


def test_tree_distance_is_a_metric_with_four_points():
    d = tree_distances(random_binary_tree(np.random.default_rng(3), 8))
    assert (d[:, :, None] <= d[:, None, :] + d.T[None, :, :]).all()
    for i, j, k, m in np.ndindex(4, 4, 4, 4):
        sums = sorted([d[i, j] + d[k, m], d[i, k] + d[j, m], d[i, m] + d[j, k]])
        assert sums[1] == sums[2], "the two largest sums of a tree metric are equal"


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_distances_determine_a_binary_tree(n):
    tree = random_binary_tree(np.random.default_rng(n), n)
    again = tree_from_distances(tree.leaves(), syntactic_distances(tree), tags=tree.tags())
    assert again == tree
    negated = tree_from_distances(tree.leaves(), -gap_depths(tree), tags=tree.tags())
    assert negated == tree


def test_spans_determine_a_tree():
    words, tags, spans = SENTENCE.leaves(), SENTENCE.tags(), tree_spans(SENTENCE)
    assert tree_from_spans(words, spans, tags=tags) == SENTENCE
    # From the nodes of a parse, the preterminals among them.
    nodes = tree_spans(SENTENCE, preterminals=True)
    assert tree_from_spans(words, nodes) == SENTENCE
    assert str(tree_from_spans(["a", "b"], [], tags=["A", "B"], top="S")) == "(S (A a) (B b))"


def test_baselines():
    words = list("abcde")
    spans = {
        way: {span[:2] for span in tree_spans(branching_tree(words, way))} for way in ("right", "left", "balanced")
    }
    assert spans["right"] == {(0, 5), (1, 5), (2, 5), (3, 5)}
    assert spans["left"] == {(0, 5), (0, 4), (0, 3), (0, 2)}
    assert spans["balanced"] == {(0, 5), (0, 2), (2, 5), (3, 5)}
    assert str(branching_tree(["a"])) == "(X a)"


def test_a_deep_tree_is_no_problem():
    tree = branching_tree([f"w{i}" for i in range(3000)])
    assert parse_tree(str(tree)) == tree
    assert len(tree_spans(tree)) == 2999
    assert syntactic_distances(tree)[0] == 3000
    assert fold_tree(tree, lambda node, sizes: sum(sizes), lambda word: 1) == 3000


def test_drawing_holds_every_label_once_and_in_order():
    lines = draw_tree(SENTENCE).splitlines()
    drawn = " ".join(lines).replace("-", " ").replace("+", " ").replace("|", " ").split()
    assert sorted(drawn) == sorted(str(SENTENCE).replace("(", " ").replace(")", " ").split())
    column = {word: max(line.find(word) for line in lines) for word in ("the", "old", "dog", "saw")}
    assert sorted(column, key=column.__getitem__) == ["the", "old", "dog", "saw"]
    assert draw_tree(parse_tree("(LONGLABEL a)")).splitlines()[0] == "LONGLABEL"
