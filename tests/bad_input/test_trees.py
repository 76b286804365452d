"""What a user is told about malformed trees, treebanks, grammars and parses to score."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.core.checks import UserError
from jaxft.data.treebank import coverage, encode_sentences, encode_words, read_treebank, treebank_grammar
from jaxft.structure.binarize import binarize, collapse_unaries
from jaxft.structure.cfg import Rule, rules_to_pcfg
from jaxft.structure.grammar_text import format_grammar, parse_grammar, read_grammar
from jaxft.structure.parse_metrics import INDUCTION, bracket_scores
from jaxft.structure.pcfg import SymbolNames, random_pcfg
from jaxft.structure.tree_distances import branching_tree, tree_from_distances
from jaxft.structure.trees import Tree, parse_tree, parse_trees, tree_from_spans
from jaxft.structure.validate import grammar_faults, prune, require_valid

PAIR = parse_tree("(S (A a) (B b))")
GRAMMAR = treebank_grammar([PAIR], unknown=None)
RANDOM = random_pcfg(jax.random.key(0), 2, 2, 3)

TREES = {
    "open bracket": ("(S (A a)\n (B b)", r"x.mrg:1: 1 open at the end of a tree begun here"),
    "closing bracket": ("(S (A a))\n)", r"x.mrg:2: a closing bracket too many"),
    "text outside": ("(S (A a))\n\nword", r"x.mrg:3: 'word' outside brackets"),
    "no children": ("(S (A a)\n(NP ))", r"x.mrg:2: 'NP' without children"),
    "empty bracket": ("(S\n ())", r"x.mrg:2: an empty bracket"),
    "no label": ("(S (A a)\n ((B b)))", r"x.mrg:2: two opening brackets"),
}

GRAMMARS = {
    "no arrow": ("S NP VP", r"g.cfg:1: S NP VP. Write one symbol and an arrow"),
    "two parents": ("\nS T -> A", r"g.cfg:2: S T -> A"),
    "empty side": ("S -> A\nA ->", r"g.cfg:2: A -> nothing. Write the sentence out"),
    "empty alternative": ("S -> 'a' | | 'b'", r"g.cfg:1: S -> nothing"),
    "empty word": ("S -> ''", r"g.cfg:1: S -> ''. Leave empty rules out"),
    "open quote": ("# a comment\nS -> 'a", r"g.cfg:2: 'a. Close quotes"),
    "weight within": ("S -> A [0.5] A", r"g.cfg:1: A. Write | after the weight"),
    "weight of 0": ("S -> 'a' [0] | 'b' [1]", r"g.cfg:1: \[0\]"),
    "no weight": ("S -> 'a' [x]", r"write weights as \[0.5\]"),
    "some weights": ("S -> A A [1.0]\nA -> 'a'", r"none at g.cfg:2: A"),
    "sums": (
        "S -> A A [0.5]\nA -> 'a' [0.7] | 'b' [0.4]\nB -> 'b' [1]",
        r"g.cfg: sums S 0.5, A 1.1. Correct them, or pass",
    ),
    "undefined": (
        "S -> A B\nA -> 'a'\n",
        r"each symbol must have a rule, got g.cfg:1: B. Add rules for it, or quote it",
    ),
    "undefined start": ("%start T\nS -> 'a'", r"the start symbol must have a rule, got T"),
    "directive": ("%begin S\nS -> 'a'", r"g.cfg:1: %begin S"),
    "cycle": ("S -> X [1]\nX -> S [1]", r"no cycle of mass 1, got g.cfg: spectral radius 1. Give"),
    "nothing": ("# nothing\n", r"a grammar must have a rule, got none in g.cfg"),
}

CALLS = {
    "two trees": (lambda: parse_tree("(A a) (B b)"), "one tree, got 2 in <string>. Use parse_trees"),
    "childless tree": (lambda: Tree("A", ()), "a constituent must have a child, got none under 'A'"),
    "crossing": (lambda: tree_from_spans("abc", [(0, 2, "X"), (1, 3, "Y")]), r"not cross, got \[0, 2\) and \[1, 3\)"),
    "span beyond": (lambda: tree_from_spans("ab", [(0, 3, "X")]), r"within 0..2, got \[\(0, 3, 'X'\)\]. Count from 0"),
    "no words": (lambda: tree_from_spans([], []), "a sentence must have a word"),
    "tags": (lambda: tree_from_spans("ab", [], tags=["A"]), "each word needs a tag"),
    "gaps": (lambda: tree_from_distances("abc", [1.0]), r"each gap needs a distance, got \(1,\) for 3 words"),
    "nan": (lambda: tree_from_distances("ab", [float("nan")]), "distances must be numbers"),
    "direction": (lambda: branching_tree("ab", "up"), "direction must be one of"),
    "scheme": (lambda: binarize(PAIR, direction="rihgt"), "Did you mean right"),  # pyright: ignore[reportArgumentType]
    "h": (lambda: binarize(PAIR, h=-1), "h must be 0 or more"),
    "v": (lambda: binarize(PAIR, v=0), "v must be 1 or more"),
    "mixed": (lambda: binarize(parse_tree("(S a (B b) (C c))")), r"words must stand under preterminals, got \['a'\]"),
    "mark": (lambda: binarize(parse_tree("(S (A^B a))")), r"the mark of binarisation '\^', got \['A\^B'\]"),
    "joiner": (lambda: collapse_unaries(parse_tree("(S (A+B a))")), r"the joiner '\+', got \['A\+B'\]. Rename"),
    "numbers of trees": (lambda: bracket_scores([PAIR], []), "each given parse needs a prediction, got 1 and 0"),
    "numbers of words": (
        lambda: bracket_scores([parse_tree("(S (A a))")], [PAIR]),
        "as many words, got 1 and 2 at 0. Predict a tree over the given words",
    ),
    "spans without lengths": (
        lambda: bracket_scores([[(0, 2)]], [[(0, 2)]], convention=INDUCTION),
        "spans need the lengths of their sentences, got none at sentence 0",
    ),
    "spans under evalb": (lambda: bracket_scores([[]], [[]], lengths=[2]), "words are deleted by the tags of trees"),
    "span outside": (
        lambda: bracket_scores([[(0, 4)]], [[(0, 2)]], convention=INDUCTION, lengths=[3]),
        r"within the sentence, got \[0, 4\) of 3 at predicted sentence 0",
    ),
    "unlabelled spans": (lambda: bracket_scores([[(0, 2)]], [PAIR]), "labelled scores need labels"),
    "wrong length": (lambda: bracket_scores([PAIR], [PAIR], lengths=[5]), "lengths must be those of the trees, got 5"),
    "no trees": (lambda: treebank_grammar([]), "a grammar must be read off trees"),
    "negative smoothing": (lambda: treebank_grammar([PAIR], rule_smoothing=-1), "must be 0 or more, got -1"),
    "unknown": (lambda: treebank_grammar([PAIR], unknown="class"), "unknown must be one of"),  # pyright: ignore[reportArgumentType]
    "outside the lexicon": (
        lambda: encode_words(GRAMMAR, ["a", "x", "y"]),
        "got 2 that are not: x, y. Read the grammar",
    ),
    "too long": (
        lambda: encode_sentences(GRAMMAR, [["a"] * 3], length=2),
        "length must hold each sentence, got 3 in 2",
    ),
    "nothing to cover": (lambda: coverage(GRAMMAR, []), "there must be a tree"),
    "no names": (lambda: encode_words(GRAMMAR._replace(names=None), ["a"]), "the grammar must have names"),
    "no folder": (lambda: read_treebank("nowhere"), r"paths must exist, got \['nowhere'\]"),
    "no grammar file": (lambda: read_grammar("nowhere.cfg"), "the grammar must be a file, got nowhere.cfg"),
    "undefined rule": (lambda: rules_to_pcfg("S", [Rule("S", ((False, "A"),))], [1.0]), r"got \['A'\]. Add one"),
    "quotes": (
        lambda: format_grammar(GRAMMAR._replace(names=SymbolNames(["S"], ["A", "B"], ["a", "'\""]))),
        "must not hold both kinds of quotes",
    ),
    "invalid": (
        lambda: require_valid(RANDOM._replace(log_root=RANDOM.log_root - 1, log_emit=RANDOM.log_emit - 1)),
        "must be valid, got the roots sum to 0.367879; the words of preterminal 0 sum to 0.367879; the words of",
    ),
    "no sentence": (
        lambda: prune(RANDOM._replace(log_emit=RANDOM.log_emit - jnp.inf)),
        "a root must derive a sentence",
    ),
    "traced": (lambda: jax.jit(lambda g: len(grammar_faults(g)))(RANDOM), "must be concrete"),
}


@pytest.mark.parametrize("case", TREES)
def test_a_malformed_tree_is_named_with_file_and_line(case, tmp_path):
    text, message = TREES[case]
    with pytest.raises(UserError, match=message):
        list(parse_trees(text, source="x.mrg"))
    (tmp_path / "x.mrg").write_text(text)
    with pytest.raises(UserError, match=message):
        read_treebank(tmp_path)


@pytest.mark.parametrize("case", GRAMMARS)
def test_a_malformed_grammar_is_named_with_file_and_line(case):
    text, message = GRAMMARS[case]
    with pytest.raises(UserError, match=message):
        parse_grammar(text, source="g.cfg")


@pytest.mark.parametrize("case", CALLS)
def test_the_message_says_what_to_do(case):
    call, message = CALLS[case]
    with pytest.raises(UserError, match=message):
        call()


def test_a_file_without_trees_is_named(tmp_path):
    (tmp_path / "empty.mrg").write_text("\n")
    with pytest.raises(UserError, match=r"a file must hold a tree, got none in .*empty.mrg"):
        read_treebank(tmp_path)
    with pytest.raises(UserError, match=r"a folder must hold \*.ptb, got none in"):
        read_treebank(tmp_path, pattern="*.ptb")


def test_a_grammar_is_not_read_off_nothing():
    with pytest.raises(ValueError, match="tree 0 must be a tree, got None"):
        treebank_grammar([None])  # pyright: ignore[reportArgumentType]
