"""Treebank files, the grammar read off them, and its lexicon."""

from collections.abc import Iterator

import numpy as np
import pytest

from jaxft.data.treebank import coverage, encode_sentences, encode_words, read_treebank, treebank_grammar, word_class
from jaxft.structure.binarize import BinarizationScheme, clean_tree, from_binary, to_binary
from jaxft.structure.enumeration import brute_force
from jaxft.structure.pcfg import SymbolNames
from jaxft.structure.trees import parse_tree
from jaxft.structure.validate import grammar_faults, unary_spectral_radius

TREES = [
    parse_tree("(S (NP (PRP we)) (VP (VBP eat) (NP (NN tea))) (. .))"),
    parse_tree("(S (NP (DT the) (NN tea)) (VP (VBP eat)) (. .))"),
    parse_tree("(S (VP (VB sip) (NP (DT the) (JJ old) (NN tea))))"),
    parse_tree("(UH oh)"),
]


def named(grammar) -> SymbolNames:
    """The names of a grammar that has some."""
    assert grammar.names is not None
    return grammar.names


def relative_frequency(scheme, tree):
    """Probability of a tree by counting its rules in TREES, without arrays."""

    def events(tree) -> Iterator[tuple]:
        yield ("root",), (tree.is_preterminal, tree.label)
        for node in tree.subtrees():
            children = tuple(c if isinstance(c, str) else (c.is_preterminal, c.label) for c in node.children)
            yield (node.is_preterminal, node.label), children

    seen = [event for one in TREES for event in events(to_binary(one, scheme))]
    p = 1.0
    for parent, children in events(to_binary(tree, scheme)):
        p *= seen.count((parent, children)) / sum(above == parent for above, _ in seen)
    return p


@pytest.mark.parametrize("unaries", ["collapse", "keep"])
def test_probabilities_are_relative_frequencies(unaries):
    scheme = BinarizationScheme(unaries=unaries)
    grammar = treebank_grammar(TREES, scheme=scheme, unknown=None)
    assert grammar_faults(grammar) == []
    found = [brute_force(grammar, encode_words(grammar, tree.leaves())) for tree in TREES]
    assert [len(one.derivations) for one in found] == [1] * len(TREES)
    expected = [relative_frequency(scheme, tree) for tree in TREES]
    np.testing.assert_allclose(np.exp([one.log_z for one in found]), expected, rtol=1e-5)


def test_collapsed_chains_are_symbols_and_kept_ones_rules():
    collapsed = treebank_grammar(TREES, unknown=None)
    assert collapsed.log_unary is None
    assert {"NP+PRP", "NP+NN", "VP+VBP"} <= set(named(collapsed).preterminals)
    assert "S+VP" in named(collapsed).nonterminals
    kept = treebank_grammar(TREES, scheme=BinarizationScheme(unaries="keep"), unknown=None)
    assert unary_spectral_radius(kept) == 0
    assert not any("+" in symbol for symbol in named(kept).symbols)
    s, vp = named(kept).nonterminals.index("S"), named(kept).nonterminals.index("VP")
    assert kept.log_unary is not None
    assert float(np.exp(kept.log_unary[s, vp])) == pytest.approx(1 / 3)


def test_kept_chains_of_a_treebank_have_an_exit_however_long():
    chain = parse_tree(f"{'(A (B ' * 800}(C c){'))' * 800}")
    grammar = treebank_grammar([chain], scheme=BinarizationScheme(unaries="keep"), unknown=None)
    assert grammar_faults(grammar) == []
    assert unary_spectral_radius(grammar) == pytest.approx((799 / 800) ** 0.5, rel=1e-5)


def test_a_tree_of_one_word_is_a_root_preterminal():
    grammar = treebank_grammar(TREES, unknown=None)
    uh = named(grammar).symbols.index("UH")
    assert float(np.exp(grammar.log_root[uh])) == pytest.approx(0.25)


def test_smoothing_adds_to_counts():
    grammar = treebank_grammar(TREES, unknown=None, rule_smoothing=1.0, emit_smoothing=0.5)
    assert grammar_faults(grammar) == []
    uh, v = named(grammar).preterminals.index("UH"), len(named(grammar).words)
    np.testing.assert_allclose(
        np.exp(grammar.log_emit[uh, named(grammar).word_ids["oh"]]), 1.5 / (1 + 0.5 * v), rtol=1e-6
    )
    rules = dict(
        zip(zip(*(np.asarray(x).tolist() for x in grammar[1:4]), strict=True), np.exp(grammar.log_rule), strict=True)
    )
    assert len(rules) == len(treebank_grammar(TREES, unknown=None).log_rule)


def test_rare_words_become_classes():
    grammar = treebank_grammar(TREES, min_count=2)
    assert set(named(grammar).words) == {"eat", "tea", "the", ".", "<unk>"}
    single = treebank_grammar([parse_tree("(S (A Dogs) (B walking))")], min_count=2, unknown="single")
    assert named(single).words == ("<unk>",)
    classes = treebank_grammar([parse_tree("(S (A Dogs) (B walking))")], min_count=2)
    assert named(classes).words == ("<unk-C-s>", "<unk-ing>", "<unk>")
    assert word_class("walking") == "<unk-ing>"


def test_unknown_words_fall_back_mark_by_mark():
    grammar = treebank_grammar([parse_tree("(S (A Rome) (B dogs))")], min_count=2)
    assert named(grammar).words == ("<unk-C>", "<unk-s>", "<unk>")
    assert encode_words(grammar, ["Cats", "cats", "x-ray", "PARIS"]).tolist() == [0, 1, 2, 2]


def test_sentences_are_padded():
    grammar = treebank_grammar(TREES, unknown=None)
    tokens, lengths = encode_sentences(grammar, [["oh"], ["we", "eat"]], length=4)
    assert tokens.shape == (2, 4)
    assert lengths.tolist() == [1, 2]
    assert encode_sentences(grammar, [])[0].shape == (0, 0)


def test_coverage_of_the_training_trees_is_full():
    grammar = treebank_grammar(TREES, min_count=1)
    assert coverage(grammar, TREES)[:4] == (1, 1, 1, 1)
    other = parse_tree("(S (NP (PRP we)) (VP (VBP drink) (NP (NN tea))) (NP (NN tea)))")
    found = coverage(grammar, [other])
    assert found.unknown_words == ("drink",)
    assert (found.tokens, found.rules, found.derivable) == (3 / 4, 2 / 3, 0)


def test_files_are_read_in_order_whatever_their_encoding(tmp_path):
    (tmp_path / "b.mrg").write_bytes("( (S (NN caf\xe9)) )\n".encode("latin-1"))
    (tmp_path / "a.ptb").write_text("(ROOT\n  (S (NN café)))\n", encoding="utf-8-sig")
    (tmp_path / "notes.txt").write_text("not a tree")
    trees = read_treebank(tmp_path)
    assert [str(tree) for tree in trees] == ["(ROOT (S (NN café)))", "( (S (NN café)))"]
    assert read_treebank([tmp_path / "b.mrg"]) == trees[1:]
    assert read_treebank(tmp_path, pattern="b.*") == trees[1:]


def test_real_trees_are_covered_by_their_own_grammar(data_dir):
    raw = read_treebank([data_dir / "treebank" / f"wsj_000{i}.mrg" for i in range(1, 6)])
    trees = [tree for tree in map(clean_tree, raw) if tree is not None]
    for scheme in (BinarizationScheme(), BinarizationScheme(direction="head", h=2, v=2, unaries="keep")):
        grammar = treebank_grammar(trees, scheme=scheme)
        assert coverage(grammar, trees, scheme=scheme)[1:4] == (1, 1, 1)
        assert grammar_faults(grammar) == []


@pytest.mark.slow
def test_the_treebank_sample_gives_a_grammar_of_the_known_size(data_dir):
    trees = [tree for tree in map(clean_tree, read_treebank(data_dir / "treebank")) if tree is not None]
    grammar = treebank_grammar(trees)
    sizes = (len(named(grammar).nonterminals), len(named(grammar).preterminals), len(grammar.log_rule))
    assert (len(trees), *sizes) == (3401, 588, 147, 4382)


@pytest.mark.slow
def test_gum_is_read_whole(data_dir):
    trees = [tree for tree in map(clean_tree, read_treebank(data_dir / "gum")) if tree is not None]
    grammar = treebank_grammar(trees)
    assert len(trees) == 4636
    sizes = (len(named(grammar).nonterminals), len(named(grammar).preterminals), len(grammar.log_rule))
    assert sizes == (760, 158, 5902)
    scheme = BinarizationScheme(unaries="keep")
    kept = treebank_grammar(trees, scheme=scheme)
    assert 0 < unary_spectral_radius(kept) < 0.1
    assert from_binary(trees[0], scheme) == trees[0]


def test_a_string_is_no_sentence():
    grammar = treebank_grammar([parse_tree("(S (NP (PRP we)) (VP (VBP eat) (NP (NN tea))))")], min_count=1)
    with pytest.raises(ValueError, match=r"a list of words, got one string. Pass .*split"):
        encode_words(grammar, "we eat tea")
