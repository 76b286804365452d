"""The embedded default grammar: a small English of our own, in Chomsky normal form and without unary rules.

It has what a parser of English must tell apart: agreement of number between subject and verb across modifiers,
attachment of prepositional phrases, subject and object relatives, clauses as objects, coordination of noun phrases,
verb phrases and sentences, and words of two classes (``walks``, ``calls``, ``that``, ``sees``).
"""

import jax.numpy as jnp
import numpy as np

from jaxft.structure.pcfg import PCFG, SymbolNames

RULES = {
    "S": {"NPs VPs": 44, "NPp VPp": 40, "PP S": 8, "S CS": 8},
    "CS": {"Conj S": 100},
    "NPs": {"Ds NBs": 68, "Name": 18, "Pros": 14},
    "NPp": {"Dp NBp": 48, "NPs CNP": 7, "NPp CNP": 4, "Adj NBp": 5, "Np PP": 3, "Np RCp": 2, "Np": 17, "Prop": 14},
    "NBs": {"Adj NBs": 21, "NBs PP": 14, "NBs RCs": 8, "Ns": 57},
    "NBp": {"Adj NBp": 21, "NBp PP": 14, "NBp RCp": 8, "Np": 57},
    "VPs": {
        "Vts NPs": 25,
        "Vts NPp": 17,
        "VPs PP": 14,
        "VPs Adv": 8,
        "Vss SBAR": 8,
        "Mod VPb": 8,
        "VPs CVPs": 4,
        "Vis": 16,
    },
    "VPp": {
        "Vtp NPs": 25,
        "Vtp NPp": 17,
        "VPp PP": 14,
        "VPp Adv": 8,
        "Vsp SBAR": 8,
        "Mod VPb": 8,
        "VPp CVPp": 4,
        "Vip": 16,
    },
    "VPb": {"Vtp NPs": 29, "Vtp NPp": 21, "VPb PP": 15, "VPb Adv": 9, "Vsp SBAR": 6, "Vip": 20},
    "PP": {"P NPs": 60, "P NPp": 40},
    "RCs": {"Rel VPs": 65, "Rel SG": 35},
    "RCp": {"Rel VPp": 65, "Rel SG": 35},
    "SG": {"NPs Vts": 55, "NPp Vtp": 45},
    "SBAR": {"Comp S": 100},
    "CNP": {"Conj NPs": 60, "Conj NPp": 40},
    "CVPs": {"Conj VPs": 100},
    "CVPp": {"Conj VPp": 100},
}
"""Alternatives of each nonterminal in percent. One that is a single preterminal stands for a rule of the parent."""

WORDS = {
    "Ds": "the:40 a:25 this:7 that:5 every:6 her:6 his:6 another:5",
    "Dp": "the:45 some:12 these:8 many:8 two:6 her:6 his:6 all:5 three:4",
    "Ns": "dog cat child teacher doctor farmer sailor river house garden boat letter story song bridge market winter "
    "lamp horse neighbour village road window king walk call plan visit watch dance",
    "Np": "dogs cats children teachers doctors farmers sailors rivers houses gardens boats letters stories songs "
    "bridges markets lamps horses neighbours villages roads windows kings walks calls plans visits watches dances",
    "Adj": "tall:10 young:10 small:10 large:9 quiet:7 bright:7 tired:6 green:6 strange:6 cold:6 happy:6 broken:5 "
    "wise:4 dusty:4 famous:4",
    "Name": "anna ben clara david emma felix grace henry ida jonas",
    "Pros": "she:30 he:30 it:25 someone:8 nobody:7",
    "Prop": "they:45 we:30 both:10 others:15",
    "Vis": "sleeps waits laughs arrives walks calls sings works falls dances",
    "Vip": "sleep wait laugh arrive walk call sing work fall dance",
    "Vts": "sees:12 likes:10 finds:9 follows:8 helps:8 paints:6 visits:8 watches:8 calls:7 plans:5 answers:6 walks:4 "
    "carries:9",
    "Vtp": "see:12 like:10 find:9 follow:8 help:8 paint:6 visit:8 watch:8 call:7 plan:5 answer:6 walk:4 carry:9",
    "Vss": "says:35 thinks:25 knows:20 hopes:10 sees:10",
    "Vsp": "say:35 think:25 know:20 hope:10 see:10",
    "Mod": "will:35 can:30 may:15 must:20",
    "Adv": "often:18 slowly:15 again:17 here:15 there:15 well:10 alone:10",
    "P": "in:25 with:20 near:14 behind:10 of:12 on:10 by:5 under:4",
    "Conj": "and:80 or:20",
    "Rel": "that:50 who:50",
    "Comp": "that:85 whether:15",
}
"""Words of each preterminal with their weights; without a number all alike."""


def english_grammar() -> PCFG:
    """The embedded English grammar: 17 nonterminals, 20 preterminals, 168 words, 111 binary rules.

    A sentence has 11.51 words on average, and a derivation an entropy of 43.14 nats: 3.748 nats a word.

    Returns:
      The grammar, with names. Its root is S.

    Example:
      >>> from jaxft.structure.lengths import expected_length, grammar_entropy
      >>> grammar = english_grammar()
      >>> entropy, length = float(grammar_entropy(grammar)), float(expected_length(grammar))
      >>> f"{entropy:.2f} nats a derivation, {length:.2f} words, {entropy / length:.3f} nats a word"
      '43.14 nats a derivation, 11.51 words, 3.748 nats a word'
    """
    nonterminals, preterminals = list(RULES), list(WORDS)
    words, lexicon = _lexicon()
    number = {symbol: i for i, symbol in enumerate(nonterminals + preterminals)}
    rule = np.zeros((len(nonterminals), len(number), len(number)))
    for parent, alternatives in RULES.items():
        branching = {pair: weight for pair, weight in alternatives.items() if " " in pair}
        for pair, weight in branching.items():
            left, right = pair.split()
            for b, p_b in _realisations(left):
                for c, p_c in _realisations(right):
                    rule[number[parent], number[b], number[c]] += weight / sum(branching.values()) * p_b * p_c
    emit = np.zeros((len(preterminals), len(words)))
    for q, tag in enumerate(preterminals):
        for word, weight in lexicon[tag].items():
            emit[q, words[word]] = weight / sum(lexicon[tag].values())
    root = np.zeros(len(number))
    root[number["S"]] = 1
    with np.errstate(divide="ignore"):
        log_root, log_rule, log_emit = (np.log(x).astype(np.float32) for x in (root, rule, emit))
    names = SymbolNames(nonterminals, preterminals, list(words))
    return PCFG(jnp.asarray(log_root), jnp.asarray(log_rule), jnp.asarray(log_emit), None, names)


def _realisations(symbol: str) -> list[tuple[str, float]]:
    """A child as itself, when it branches, or as the single preterminal that it may be."""
    alternatives = RULES.get(symbol, {})
    single = [(tag, weight / sum(alternatives.values())) for tag, weight in alternatives.items() if " " not in tag]
    return [(symbol, 1.0 - sum(p for _, p in single)), *single]


def _lexicon() -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Numbers of the words, in order of appearance, and each preterminal's words with their weights."""
    words: dict[str, int] = {}
    lexicon: dict[str, dict[str, float]] = {}
    for tag, entries in WORDS.items():
        pairs = (entry.partition(":") for entry in entries.split())
        lexicon[tag] = {word: float(weight or 1) for word, _, weight in pairs}
        for word in lexicon[tag]:
            words.setdefault(word, len(words))
    return words, lexicon
