"""A task that two rules explain: sentences on which a structural and a lexical rule agree, and others that tell.

A network is fine-tuned where both rules give the label, and asked where they do not: which of them it follows there is
no matter of its training loss. The structural rule needs the tree (the number of the subject of the main clause), the
lexical one a look at the words (whether a word of some class is there).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxft.core.checks import nearest, require
from jaxft.core.rng import host_stream
from jaxft.structure.parses import Parses
from jaxft.structure.pcfg import SymbolNames

SINGULAR = ("NPs", "Name", "Pros")
PLURAL = ("NPp", "Np", "Prop")
"""Symbols of subjects in the embedded English grammar."""


class LabelledRows(NamedTuple):
    """Sentences of a corpus, by number, with the answers of the structural rule."""

    rows: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]


class RuleSplits(NamedTuple):
    """Disjoint samples, in each of which both classes are equally frequent."""

    train: LabelledRows
    """Both rules agree, but for the sentences that tell."""
    held_out: LabelledRows
    """Both rules agree."""
    challenge: LabelledRows
    """They never do: accuracy 1 is the structural rule, 0 the lexical one."""


def main_subject_number(parses: Parses, names: SymbolNames) -> Int[np.ndarray, "b"]:
    """Whether the subject of the main clause is plural: 1, or 0 where it is singular.

    The main clause is the first of coordinated ones, and stands behind a prepositional phrase at the beginning. What
    is nearest to the verb, or comes first in the sentence, may be of the other number.

    Args:
      parses: Trees of the embedded English grammar, as ``sample_corpus`` draws them.
      names: Its names.

    Returns:
      The number; -1 where the tree is no sentence of this form.

    Raises:
      UserError: The names are those of another grammar.

    Example:
      >>> from jaxft.data.english_grammar import english_grammar
      >>> from jaxft.data.pcfg_corpus import sample_corpus
      >>> grammar = english_grammar()
      >>> corpus = sample_corpus(grammar, seed=1, size=8, max_length=8)
      >>> number = main_subject_number(corpus.parses, grammar.names)
      >>> [grammar.names.words[w] for w in corpus.tokens[0][: corpus.lengths[0]]], int(number[0])
      (['...'], ...)

    Reference:
      McCoy, Pavlick and Linzen 2019, arXiv 1902.01007 (structural and lexical heuristics);
      Linzen, Dupoux and Goldberg 2016, arXiv 1611.01368 (number of the subject across attractors).
    """
    number = _symbol_numbers("main_subject_number", names, ("S", "PP", "CS", *SINGULAR, *PLURAL))
    labels, spans = np.asarray(parses.labels), np.asarray(parses.spans)
    sentences, last = np.arange(len(labels)), labels.shape[1] - 1
    node = np.zeros(len(labels), int)
    for _ in range(labels.shape[1]):
        left = np.minimum(node + 1, last)
        words = spans[sentences, left, 1] - spans[sentences, left, 0]
        right = np.minimum(node + 2 * words, last)
        clause = labels[sentences, node] == number["S"]
        fronted = clause & (labels[sentences, left] == number["PP"])
        coordinated = clause & (labels[sentences, right] == number["CS"])
        node = np.where(fronted, right, np.where(coordinated, left, node))
    subject = labels[sentences, np.minimum(node + 1, last)]
    clause = (labels[sentences, node] == number["S"]) & np.asarray(parses.valid)[:, 0]
    plural, singular = (np.isin(subject, [number[s] for s in symbols]) for symbols in (PLURAL, SINGULAR))
    return np.where(clause & (plural | singular), plural.astype(int), -1)


def contains_symbol(parses: Parses, names: SymbolNames, symbol: str) -> Int[np.ndarray, "b"]:
    """1 where a tree has a node of this symbol, such as a preposition (``P``), and 0 elsewhere.

    Raises:
      UserError: The grammar has no such symbol.
    """
    number = _symbol_numbers("contains_symbol", names, (symbol,))[symbol]
    return ((np.asarray(parses.labels) == number) & np.asarray(parses.valid)).any(axis=1).astype(int)


def two_rule_splits(
    structural: Int[np.ndarray, "b"],
    lexical: Int[np.ndarray, "b"],
    *,
    train: int,
    held_out: int,
    challenge: int,
    telling_frac: float = 0.0,
    seed: int,
) -> RuleSplits:
    """Samples on which two rules agree, and one on which they do not.

    Args:
      structural: Class 0 or 1 by the one rule, which gives the labels; -1 leaves a sentence out.
      lexical: Class by the other.
      train: Training sentences.
      held_out: Sentences on which the rules agree.
      challenge: Sentences on which they do not.
      telling_frac: Part of the training sentences on which the rules do not agree.
      seed: Seed of the draw.

    Returns:
      The samples; halves of them are rounded down to whole sentences a class.

    Raises:
      UserError: Rules of different length, a fraction outside [0, 1], or too few sentences of a kind.

    Example:
      >>> structural, lexical = np.array([0, 1, 0, 1] * 9), np.array([0, 1, 1, 0] * 9)
      >>> splits = two_rule_splits(structural, lexical, train=4, held_out=2, challenge=6, seed=0)
      >>> (structural == lexical)[splits.train.rows].tolist(), (structural == lexical)[splits.challenge.rows].any()
      ([True, True, True, True], np.False_)
      >>> splits.train.labels.tolist()
      [0, 0, 1, 1]

    Reference:
      McCoy, Pavlick and Linzen 2019, arXiv 1902.01007, section 3.
    """
    where = "two_rule_splits"
    shapes = (structural.shape, lexical.shape)
    require(structural.ndim == 1 and len(set(shapes)) == 1, where, "rules must be [b] and [b]", shapes, "Align them")
    require(0 <= telling_frac <= 1, where, "telling_frac must lie in [0, 1]", telling_frac, "0: both rules always fit")
    told = int(train * telling_frac) // 2
    plain = train // 2 - told
    agree = {y: _drawn(structural, lexical, y, y, seed) for y in (0, 1)}
    differ = {y: _drawn(structural, lexical, y, 1 - y, seed) for y in (0, 1)}
    needs = {"agree": (agree, plain + held_out // 2), "disagree": (differ, told + challenge // 2)}
    few = [
        f"{len(rows[y])} of class {y} on which they {name}, of {wanted} wanted"
        for name, (rows, wanted) in needs.items()
        for y in (0, 1)
        if len(rows[y]) < wanted
    ]
    require(not few, where, "there must be enough sentences", "; ".join(few), "Draw a larger corpus or ask for fewer")
    split = plain + held_out // 2
    return RuleSplits(
        _labelled({y: np.concatenate([agree[y][:plain], differ[y][:told]]) for y in (0, 1)}),
        _labelled({y: agree[y][plain:split] for y in (0, 1)}),
        _labelled({y: differ[y][told : told + challenge // 2] for y in (0, 1)}),
    )


def _drawn(structural: np.ndarray, lexical: np.ndarray, y: int, other: int, seed: int) -> np.ndarray:
    kind: Bool[np.ndarray, "b"] = (structural == y) & (lexical == other)
    return host_stream(seed, "two rules", y, other).permutation(np.flatnonzero(kind))


def _labelled(rows: dict[int, np.ndarray]) -> LabelledRows:
    labels = [np.full(len(found), y) for y, found in rows.items()]
    return LabelledRows(np.concatenate(list(rows.values())), np.concatenate(labels))


def _symbol_numbers(where: str, names: SymbolNames, wanted: tuple[str, ...]) -> dict[str, int]:
    numbers = {symbol: i for i, symbol in enumerate(names.symbols)}
    missing = [symbol for symbol in wanted if symbol not in numbers]
    hint = nearest(missing[0], numbers) if missing else ""
    require(not missing, where, "the grammar must have the symbols", f"none called {', '.join(missing)}", hint)
    return numbers
