"""Context-free rules of any length, words and symbols mixed, as the arrays of a grammar of pairs."""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxft.core.checks import require
from jaxft.structure.pcfg import SparsePCFG, SymbolNames


class Rule(NamedTuple):
    """A rule of any length, as a grammar text has it."""

    lhs: str
    rhs: tuple[tuple[bool, str], ...]
    """Each item: whether it is a word, and its text."""
    weight: float | None = None
    line: int = 0


def rules_to_pcfg(start: str, rules: Sequence[Rule], probabilities: Sequence[float]) -> SparsePCFG:
    """A grammar of rules of any length as arrays, its distribution over sentences and trees unchanged.

    In rules of three or more the pair that occurs in most rules becomes a symbol of one rule, ``|<B-C>``, until all
    have two. A word within a longer rule gets a preterminal of its own, ``|<'w'>``; the words of a symbol that has
    other rules too get a preterminal ``A|<words>`` under it, and so do those of the start symbol where no rule is of
    another kind. ``unbinarize`` takes these symbols out of a tree.

    Args:
      start: The only root.
      rules: Rules without empty right sides, each symbol with a rule of its own.
      probabilities: Of each rule; of equal rules they are added up.

    Returns:
      The grammar, with names; symbols in the order of the rules, made ones behind.

    Raises:
      UserError: A symbol without a rule.

    Example:
      >>> rules = [Rule("S", ((False, "A"), (True, "and"), (False, "A"))), Rule("A", ((True, "a"),))]
      >>> rules_to_pcfg("S", rules, [1.0, 1.0]).names.symbols
      ('S', '|<A-and>', 'A', "|<'and'>")

    Reference:
      Song et al. 2008, Better binarization for the CKY parsing, section 4 (the choice of pairs).
    """
    kinds: dict[str, set[bool]] = defaultdict(set)
    used = {text for rule in rules for word, text in rule.rhs if not word} | {start}
    missing = sorted(used - {rule.lhs for rule in rules})
    require(not missing, "rules_to_pcfg", "each symbol must have a rule", missing[:5], "Add one, or mark it as a word")
    for rule in rules:
        kinds[rule.lhs].add(len(rule.rhs) == 1 and rule.rhs[0][0])
    if all(kind == {True} for kind in kinds.values()):
        kinds[start].add(False)  # charts need a nonterminal
    # Keys are (role, text), so that a symbol made here never meets one of the text; names are made distinct after.
    upper: dict[tuple, str] = {("symbol", lhs): lhs for lhs, kind in kinds.items() if kind != {True}}
    lower: dict[tuple, str] = {("symbol", lhs): lhs for lhs, kind in kinds.items() if kind == {True}}
    binary: dict[tuple, float] = defaultdict(float)
    unary: dict[tuple, float] = defaultdict(float)
    emit: dict[tuple, float] = defaultdict(float)
    longer: list[tuple[tuple, list[tuple], float]] = []
    taken = set(kinds)
    for rule, p in zip(rules, probabilities, strict=True):
        parent = ("symbol", rule.lhs)
        (is_word, text), *others = rule.rhs
        if others:
            longer.append((parent, [("word" if word else "symbol", item) for word, item in rule.rhs], p))
        elif is_word:
            emit[parent, text] += p
        else:
            unary[parent, ("symbol", text)] += p
    for key in dict.fromkeys(item for _, items, _ in longer for item in items if item[0] == "word"):
        lower[key] = fresh_name(f"|<'{key[1]}'>", taken)
        emit[key, key[1]] = 1.0
    pairs = _reduce_to_pairs([items for _, items, _ in longer])
    for parent, items, p in longer:
        binary[parent, *items] += p
    for key, pair in pairs.items():
        upper[key] = fresh_name(f"|<{'-'.join(text for item in pair for text in _texts(item, pairs))}>", taken)
        binary[key, *pair] = 1.0
    for key in [key for key in upper if key[0] == "symbol" and True in kinds[key[1]]]:
        below = ("words", key[1])
        lower[below] = fresh_name(f"{key[1]}|<words>", taken)
        emitted = {text: emit.pop((key, text)) for parent, text in list(emit) if parent == key}
        unary[key, below] = sum(emitted.values())
        for text, p in emitted.items():
            emit[below, text] = p / unary[key, below]
    words = dict.fromkeys(text for rule in rules for word, text in rule.rhs if word)
    return _assemble(upper, lower, binary, unary, emit, list(words), ("symbol", start))


def _texts(key: tuple, pairs: dict[tuple, tuple]) -> list[str]:
    """Texts of the items that a made symbol stands for."""
    found, stack = [], [key]
    while stack:
        item = stack.pop()
        if item in pairs:
            stack.extend(reversed(pairs[item]))
        else:
            found.append(item[1])
    return found


def _reduce_to_pairs(rules: list[list[tuple]]) -> dict[tuple, tuple]:
    """Shortens the rules in place to two items each; the new items and the pairs they stand for.

    Of the pairs of neighbours in rules that are too long, the one in most rules is replaced first, of equal ones the
    first met. Equal rules are shortened alike, so that different ones stay different.
    """
    holders: dict[tuple, set[int]] = defaultdict(set)
    order: dict[tuple, int] = {}
    queue: list[tuple[int, int, tuple]] = []

    def push(pair: tuple) -> None:
        heapq.heappush(queue, (-len(holders[pair]), order.setdefault(pair, len(order)), pair))

    def neighbours(rule: list[tuple]) -> dict[tuple, None]:
        return dict.fromkeys(pairwise(rule)) if len(rule) > 2 else {}

    for i, rule in enumerate(rules):
        for pair in neighbours(rule):
            holders[pair].add(i)
    for pair in list(holders):
        push(pair)
    made: dict[tuple, tuple] = {}
    while queue:
        count, _, pair = heapq.heappop(queue)
        if -count != len(holders[pair]) or not count:
            continue
        symbol = ("pair", str(len(made)))
        made[symbol] = pair
        for i in sorted(holders[pair]):
            before = neighbours(rules[i])
            rules[i][:] = _replace_pair(rules[i], pair, symbol)
            after = neighbours(rules[i])
            for gone in before.keys() - after.keys():
                holders[gone].discard(i)
            for new in after:
                holders[new].add(i)
            for changed in dict.fromkeys([*before, *after]):
                if (changed in before) != (changed in after):
                    push(changed)
    return made


def _replace_pair(rule: list[tuple], pair: tuple, symbol: tuple) -> list[tuple]:
    """The rule with the pair replaced from the left, as long as more than two items remain."""
    found, i = [], 0
    while i < len(rule):
        if tuple(rule[i : i + 2]) == pair and len(found) + len(rule) - i > 2:
            found.append(symbol)
            i += 2
        else:
            found.append(rule[i])
            i += 1
    return found


def _assemble(
    upper: dict, lower: dict, binary: dict, unary: dict, emit: dict, words: list[str], start: tuple
) -> SparsePCFG:
    number = {key: i for i, key in enumerate([*upper, *lower])}
    column = {word: i for i, word in enumerate(words)}
    s, a = len(upper), len(number)
    root, emissions, chains = np.zeros(a), np.zeros((len(lower), len(words))), np.zeros((s, a))
    root[number[start]] = 1
    for (key, word), p in emit.items():
        emissions[number[key] - s, column[word]] = p
    for (parent, child), p in unary.items():
        chains[number[parent], number[child]] = p
    rules = np.array([[number[key] for key in rule] for rule in binary], np.int32).reshape(-1, 3)
    scores = _log(np.array(list(binary.values())))
    names = SymbolNames(list(upper.values()), list(lower.values()), words)
    lhs, left, right = (jnp.asarray(axis) for axis in rules.T)
    log_unary = _log(chains) if unary else None
    return SparsePCFG(_log(root), lhs, left, right, scores, _log(emissions), log_unary, names)


def _log(p: np.ndarray) -> jnp.ndarray:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(p), jnp.result_type(float))


def fresh_name(name: str, taken: set[str]) -> str:
    """The name, with primes until it is new."""
    while name in taken:
        name += "′"
    taken.add(name)
    return name
