"""Grammars as text: what is read has the distribution that was written."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.structure.binarize import unbinarize
from jaxft.structure.derivations import viterbi
from jaxft.structure.enumeration import brute_force
from jaxft.structure.grammar_text import format_grammar, parse_grammar, read_grammar
from jaxft.structure.inside_outside import log_partition
from jaxft.structure.pcfg import SymbolNames, random_pcfg, to_dense, to_sparse
from jaxft.structure.trees import parse_tree
from jaxft.structure.validate import grammar_faults

TEXT = """
# A toy with everything: words within rules, long rules, chains, words beside rules, and a cycle.
%start S
S -> NP VP [0.6] | NP "and" NP 'and' VP [0.1] | VP [0.1] | "yes" [0.2]   # "#" in a comment
NP -> N [0.5] | "the" N [0.3] | NP PP PP [0.1] \\
   | NP PP [0.1]
VP -> V [0.3] | V NP [0.4] | VP PP [0.2] | X [0.1]
X -> VP [0.5] | "no" [0.5]
PP -> "in" NP [1]
N -> "dog" [0.5] | "#" [0.5]
V -> 'saw' [.25] | "dog" [7.5e-1]
"""
RULES = {
    "S": [(0.6, "NP VP"), (0.1, "NP 'and NP 'and VP"), (0.1, "VP"), (0.2, "'yes")],
    "NP": [(0.5, "N"), (0.3, "'the N"), (0.1, "NP PP PP"), (0.1, "NP PP")],
    "VP": [(0.3, "V"), (0.4, "V NP"), (0.2, "VP PP"), (0.1, "X")],
    "X": [(0.5, "VP"), (0.5, "'no")],
    "PP": [(1.0, "'in NP")],
    "N": [(0.5, "'dog"), (0.5, "'#")],
    "V": [(0.25, "'saw"), (0.75, "'dog")],
}
SENTENCES = [
    "yes",
    "no",
    "dog",
    "the dog saw",
    "dog dog in the # in dog",
    "# and # and no",
    "dog in # in # dog dog",
    "in",
]


def named(grammar) -> SymbolNames:
    """The names of a grammar that has some."""
    assert grammar.names is not None
    return grammar.names


def probability(words):
    """By the rules as they stand: the least fixed point, iterated; no conversion."""
    n = len(words)
    spans = [(i, j) for i, j in itertools.combinations(range(n + 1), 2)]
    value = {(lhs, i, j): 0.0 for lhs in RULES for i, j in spans}

    def sequence(items, i, j) -> float:
        if len(items) == 1:
            return float(j == i + 1 and words[i] == items[0][1:]) if items[0][0] == "'" else value[items[0], i, j]
        return sum((sequence(items[:1], i, k) * sequence(items[1:], k, j) for k in range(i + 1, j)), 0.0)

    for _ in range(60):
        value = {(a, i, j): sum(p * sequence(rhs.split(), i, j) for p, rhs in RULES[a]) for a, i, j in value}
    return value["S", 0, n]


def log_z(grammar, sentences):
    """Log probabilities of sentences of words."""
    longest = max(len(words) for words in sentences)
    ids = [[named(grammar).word_ids[w] for w in words] + [0] * (longest - len(words)) for words in sentences]
    return log_partition(grammar, jnp.array(ids), jnp.array([len(words) for words in sentences]))


@pytest.mark.usefixtures("x64")
def test_a_read_grammar_gives_sentences_the_probability_of_the_text():
    grammar = parse_grammar(TEXT)
    assert grammar_faults(grammar, tolerance=1e-12) == []
    sentences = [words.split() for words in SENTENCES]
    found = np.exp(log_z(grammar, sentences))
    expected = [probability(words) for words in sentences]
    assert min(expected[:-1]) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    again = parse_grammar(format_grammar(grammar))
    np.testing.assert_allclose(np.exp(log_z(again, sentences)), expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_sentences_of_one_length_have_the_mass_of_that_length():
    grammar = parse_grammar("S -> S S S [0.2] | 'a' [0.5] | 'b' [0.3]")
    sentences = [list(words) for n in (1, 2, 3) for words in itertools.product("ab", repeat=n)]
    mass = np.split(np.exp(log_z(grammar, sentences)), [2, 6])
    assert [float(part.sum()) for part in mass] == pytest.approx([0.8, 0.0, 0.2 * 0.8**3])


def test_symbols_of_each_kind_are_where_they_belong():
    names = named(parse_grammar(TEXT))
    assert names.nonterminals[:5] == ("S", "NP", "VP", "X", "PP")
    assert set(names.nonterminals[5:]) == {"|<NP-and>", "|<NP-and-NP-and>", "|<NP-PP>"}
    assert names.preterminals == ("N", "V", "|<'and'>", "|<'the'>", "|<'in'>", "S|<words>", "X|<words>")
    assert names.words == ("and", "yes", "the", "no", "in", "dog", "#", "saw")


def test_added_symbols_are_taken_out_of_a_tree():
    pair = "(|<NP-and> (NP (N dog)) (|<'and'> and))"
    tree = f"(S (|<NP-and-NP-and> {pair} {pair}) (VP (X (X|<words> no))))"
    assert str(unbinarize(parse_tree(tree))) == "(S (NP (N dog)) and (NP (N dog)) and (VP (X no)))"


def test_without_weights_alternatives_are_equally_likely():
    grammar = parse_grammar("S -> A A | A | S S | 'w'\nA -> 'a' | 'b'")
    np.testing.assert_allclose(np.exp(grammar.log_rule), [0.25, 0.25])
    np.testing.assert_allclose(np.exp(grammar.log_emit)[0], [0, 0.5, 0.5])


def test_equal_rules_add_up_and_weights_can_be_normalised():
    grammar = parse_grammar("S -> A B [2] | A B [1] | B A [1]\nA -> 'a' [3]\nB -> 'b' [1]", normalize=True)
    np.testing.assert_allclose(np.exp(grammar.log_rule), [0.75, 0.25], rtol=1e-6)


def test_the_start_symbol_may_be_a_preterminal():
    grammar = parse_grammar("%start A\nA -> 'a'\nS -> A A")
    assert grammar.log_root.tolist() == [-np.inf, 0]


@pytest.mark.parametrize("text", ["S -> 'a' [0.25] | 'b' [0.75]", "S -> 'a' [0.25] | T [0.75]\nT -> 'b' [1]"])
def test_a_grammar_of_single_words_has_sentences_of_one_word(text):
    grammar = parse_grammar(text)
    words, lengths = jnp.array([[0, 0], [1, 0], [1, 1]]), jnp.array([1, 1, 2])
    expected = [0.25, 0.75, 0.0]
    for method in ("scaled", "log", "sparse"):
        log_z = log_partition(grammar, words, lengths, method=method)
        np.testing.assert_allclose(np.exp(log_z), expected, rtol=1e-6)
    best = viterbi(grammar, words, lengths)
    np.testing.assert_allclose(np.exp(best.score), expected, rtol=1e-6)
    assert best.valid.sum(axis=1).tolist() == [1, 1, 0]


@pytest.mark.parametrize("names", [True, False])
def test_writing_then_reading_keeps_the_distribution(names):
    dense = random_pcfg(jax.random.key(1), 3, 2, 4, rules_per_nonterminal=6, words_per_preterminal=3)
    grammar = to_sparse(dense)
    if names:
        odd = SymbolNames(["NP|<A-B>^S", "a->b", "''"], ["%start", "#"], ['"', "it's", "1\\/2", "|"])
        grammar = grammar._replace(names=odd)
    text = format_grammar(grammar)
    again = parse_grammar(text)
    words = ['"', "it's", "1\\/2", "|"] if names else ["w0", "w1", "w2", "w3"]
    for sentence in ([0, 1, 2, 3], [3, 3, 0, 0], [2, 0, 1]):
        there, back = (
            brute_force(grammar, sentence),
            brute_force(again, [named(again).word_ids[words[i]] for i in sentence]),
        )
        assert len(back.derivations) == len(there.derivations) > 0
        assert back.log_z == pytest.approx(there.log_z, rel=1e-5)
    if names:
        assert {"NP|<A-B>^S", "a->b", "''", "%start", "#"} <= set(named(again).symbols)


def test_a_grammar_with_one_root_is_written_as_it_was():
    grammar = to_dense(parse_grammar(TEXT))
    again = to_dense(parse_grammar(format_grammar(grammar)))
    order = [named(again).symbols.index(name) for name in named(grammar).symbols]
    inner = order[: len(grammar.log_rule)]
    np.testing.assert_allclose(
        np.exp(again.log_rule)[inner][:, order][:, :, order], np.exp(grammar.log_rule), rtol=1e-5
    )
    assert grammar.log_unary is not None
    assert again.log_unary is not None
    np.testing.assert_allclose(
        np.asarray(jnp.exp(again.log_unary))[inner][:, order], np.asarray(jnp.exp(grammar.log_unary)), rtol=1e-5
    )


def test_nltk_reads_the_same_rules():
    nltk = pytest.importorskip("nltk", reason="nltk is an oracle and need not be installed")
    text = """S -> NP VP [0.6] | VP [0.4]
        NP -> 'the' N [1.0]
        VP -> V NP [1.0]
        N -> 'dog' [0.5] | 'cat' [0.5]
        V -> 'saw' [1.0]"""
    theirs = {(str(p.lhs()), " ".join(map(str, p.rhs()))): p.prob() for p in nltk.PCFG.fromstring(text).productions()}
    grammar = parse_grammar(text)
    names = named(grammar).symbols
    for lhs, left, right, score in zip(*grammar[1:5], strict=True):
        rhs = f"{names[left]} {names[right]}".replace("|<'the'>", "the")
        assert np.exp(score) == pytest.approx(theirs[names[lhs], rhs])
    # Without the added symbols NLTK reads what is written here.
    written = format_grammar(grammar).replace("|", "/").replace(" / ", " | ").replace("%7C<%27the%27>", "THE")
    assert len(nltk.PCFG.fromstring(written.split("\n", 1)[1]).productions()) == len(theirs) + 1


def test_the_atis_grammar_loads_and_is_valid(data_dir):
    grammar = read_grammar(data_dir / "grammars" / "atis.cfg")
    assert grammar.log_unary is not None
    assert (len(named(grammar).words), int(jnp.isfinite(grammar.log_unary).sum())) == (925, 487)
    assert grammar.log_root.shape[0] < 2100
    assert named(grammar).symbols[int(grammar.log_root.argmax())] == "SIGMA"
    assert grammar_faults(grammar) == []


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_atis_sentences_have_the_published_numbers_of_parses(data_dir):
    grammar = read_grammar(data_dir / "grammars" / "atis.cfg")
    ids = named(grammar).word_ids
    published = []
    for line in (data_dir / "grammars" / "atis_sentences.txt").read_text("latin-1").splitlines():
        if line and not line.startswith("#"):
            number, sentence = line.split(":", 1)
            published.append((int(number), sentence.split()))
    known = [(number, words) for number, words in published if all(word in ids for word in words)]
    assert (len(published), len(known)) == (98, 94)
    assert all(number == 0 for number, words in published if not set(words) <= set(ids))

    # With every rule of weight 1 the partition function counts derivations.
    ones = jax.tree.map(
        lambda x: jnp.where(jnp.isfinite(x), 0.0, -jnp.inf) if jnp.issubdtype(x.dtype, jnp.floating) else x, grammar
    )
    for k in range(0, len(known), 16):
        tokens, lengths = np.zeros((16, 22), np.int32), np.ones(16, np.int32)
        for row, (_, words) in enumerate(known[k : k + 16]):
            tokens[row, : len(words)], lengths[row] = [ids[word] for word in words], len(words)
        counts = np.exp(log_partition(ones, jnp.asarray(tokens), jnp.asarray(lengths)))[: len(known) - k]
        np.testing.assert_allclose(counts, [number for number, _ in known[k : k + 16]], rtol=1e-9)
