"""Grammars as text, in the form of NLTK: read to arrays, with long and mixed rules taken apart exactly, and written."""

import re
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from jaxft.core.checks import UserError, message, require
from jaxft.structure.cfg import Rule, fresh_name, rules_to_pcfg
from jaxft.structure.pcfg import Grammar, SparsePCFG, num_nonterminals, to_sparse
from jaxft.structure.validate import unary_spectral_radius

_ARROW = re.compile(r"\s*(?:->|→)\s*")
_ITEM = re.compile(
    r"""(?P<word>"[^"]*"|'[^']*')|\[\s*(?P<weight>[0-9][0-9.eE+-]*|\.[0-9][0-9.eE+-]*)\s*\]|(?P<bar>\|)|(?P<symbol>[^\s|"'\[\]]+)"""
)
_COMMENT = re.compile(r"""^((?:[^"'#]|"[^"]*"|'[^']*')*)#.*$""")
_ESCAPED = re.compile(r"""[\s|"'\[\]#%→\\]|(?<=-)>""")


def parse_grammar(text: str, *, source: str = "<string>", normalize: bool = False) -> SparsePCFG:
    r"""The grammar of a text.

    A line is ``S -> NP VP [0.8] | VP [0.2]`` or ``N -> "dog" | 'cat'``; a backslash at its end continues it, ``#``
    begins a comment, ``%start S`` names the start symbol (otherwise the parent of the first rule). ``%7C`` in a symbol
    is the character of that code. Without any weight in the text, the alternatives of each symbol are equally likely.

    The distribution over sentences and trees is that of the text; ``unbinarize`` takes the symbols added here out of a
    tree. In rules of three or more the pair that occurs in most rules becomes a symbol of one rule, ``|<B-C>``, until
    all have two; a word within a longer rule gets a preterminal of its own, ``|<'w'>``; the words of a symbol that has
    other rules too get a preterminal ``A|<words>`` under it. A rule ``A -> B`` is a unary rule, closed exactly in
    inference.

    Args:
      text: The grammar.
      source: Name of the text in errors.
      normalize: Divide the weights of each symbol by their sum, so that any positive weights will do.

    Returns:
      The grammar, with names.

    Raises:
      UserError: A fault of form or an empty right side, with ``source:line``; symbols without rules; weights that are
        missing from some rules, or do not sum to one within 1e-4 (all listed); unary rules whose cycles have mass 1.

    Example:
      >>> grammar = parse_grammar('''
      ...     S -> NP VP [1.0]        # the start symbol
      ...     NP -> "dogs" [0.5] | "the" N [0.5]
      ...     VP -> "sleep" [1.0]
      ...     N -> "cat" [1.0]
      ... ''')
      >>> grammar.names.nonterminals, grammar.names.preterminals, grammar.names.words
      (('S', 'NP'), ('VP', 'N', "|<'the'>", 'NP|<words>'), ('dogs', 'the', 'sleep', 'cat'))

    Reference:
      Song et al. 2008, Better binarization for the CKY parsing, section 4 (the choice of pairs).
    """
    start, rules = _read_rules(text, source)
    _require_defined(rules, start, source)
    grammar = rules_to_pcfg(start or rules[0].lhs, rules, _probabilities(rules, source, normalize))
    radius = unary_spectral_radius(grammar)
    rule, step = "unary rules must form no cycle of mass 1", "Give a symbol of the cycle another rule"
    require(radius < 1 - 1e-6, "parse_grammar", rule, f"{source}: spectral radius {radius:.6g}", step)
    return grammar


def read_grammar(path: str | Path, *, normalize: bool = False) -> SparsePCFG:
    """The grammar of a file: UTF-8, or Latin-1 where that fails. See ``parse_grammar``.

    Args:
      path: The file.
      normalize: Divide the weights of each symbol by their sum.

    Returns:
      The grammar.

    Raises:
      UserError: No such file, or what ``parse_grammar`` refuses, with the file and the line.
    """
    path = Path(path)
    require(path.is_file(), "read_grammar", "the grammar must be a file", path, "Check the path")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return parse_grammar(text, source=str(path), normalize=normalize)


def format_grammar(grammar: Grammar) -> str:
    r"""The grammar as a text that ``parse_grammar`` reads to the same distribution.

    Symbols without names are called N0, N1, ... and T0, T1, ..., words w0, w1, ...; characters that the form needs are
    written as their codes in symbols. If several symbols can be the root, a start symbol ``ROOT`` is put above them.

    Args:
      grammar: A concrete grammar of any kind. Preterminals of no rule are written too.

    Returns:
      The text, probabilities to seven digits, or 15 of a grammar in double precision.

    Raises:
      UserError: A traced grammar, or a word that holds both kinds of quotes or a line break.

    Example:
      >>> print(format_grammar(parse_grammar('S -> A A [0.25] | A [0.75]\nA -> "a" [1.0]')))
      %start S
      S -> A A [0.25] | A [0.75]
      A -> "a" [1]
    """
    sparse = to_sparse(grammar)
    symbols, words = _printed_names(sparse)
    s = num_nonterminals(sparse)
    alternatives: dict[str, list[str]] = defaultdict(list)
    digits = 15 if sparse.log_rule.dtype == np.float64 else 7

    def add(lhs: str, rhs: str, log_weight: np.ndarray | np.floating) -> None:
        if np.isfinite(log_weight):
            alternatives[lhs].append(f"{rhs} [{np.exp(np.float64(log_weight)):.{digits}g}]")

    roots = np.asarray(sparse.log_root)
    start = symbols[int(roots.argmax())]
    if np.isfinite(roots).sum() != 1 or abs(roots.max()) > 1e-6:
        start = fresh_name("ROOT", set(symbols))
        for i in np.flatnonzero(np.isfinite(roots)):
            add(start, symbols[i], roots[i])
    rules = [np.asarray(x).tolist() for x in sparse[1:4]]
    for lhs, left, right, score in zip(*rules, np.asarray(sparse.log_rule), strict=True):
        add(symbols[lhs], f"{symbols[left]} {symbols[right]}", score)
    if sparse.log_unary is not None:
        unary = np.asarray(sparse.log_unary)
        for i, j in np.argwhere(np.isfinite(unary)):
            add(symbols[i], symbols[j], unary[i, j])
    emit = np.asarray(sparse.log_emit)
    for x, w in np.argwhere(np.isfinite(emit)):
        add(symbols[s + x], words[w], emit[x, w])
    return "\n".join([f"%start {start}", *(f"{lhs} -> {' | '.join(rhs)}" for lhs, rhs in alternatives.items())])


def _fault(rule: str, source: str, line: int, got: str, next_step: str) -> UserError:
    return UserError(message("parse_grammar", rule, f"{source}:{line}: {got}", next_step))


def _read_rules(text: str, source: str) -> tuple[str | None, list[Rule]]:
    start, rules = None, []
    for line, content in _logical_lines(text):
        # A symbol may begin with an escaped character, but then its line has an arrow.
        if content.startswith("%") and not _ARROW.search(content):
            words = content.split()
            if len(words) != 2 or words[0] != "%start":
                raise _fault("a directive must be %start SYMBOL", source, line, content, "Correct the line")
            start = unquote(words[1])
            continue
        arrow = _ARROW.search(content)
        lhs = content[: arrow.start()].strip() if arrow else ""
        if arrow is None or not re.fullmatch(r"""[^\s|"'\[\]]+""", lhs):
            raise _fault("a line must be SYMBOL -> ...", source, line, content[:60], "Write one symbol and an arrow")
        rules += _alternatives(unquote(lhs), content[arrow.end() :], line, source)
    require(bool(rules), "parse_grammar", "a grammar must have a rule", f"none in {source}", "Write SYMBOL -> ...")
    return start, rules


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """Lines with content, without comments, continued ones joined, each with the number of its first."""
    found, held, begun = [], "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        match = _COMMENT.match(raw)
        content = (match[1] if match else raw).strip()
        begun = begun if held else number
        if content.endswith("\\"):
            held += content[:-1] + " "
            continue
        if (held + content).strip():
            found.append((begun, (held + content).strip()))
        held = ""
    return [*found, (begun, held.strip())] if held.strip() else found


def _alternatives(lhs: str, text: str, line: int, source: str) -> list[Rule]:
    rules: list[Rule] = []
    items: list[tuple[bool, str]] = []
    weight: float | None = None
    place = 0

    def close() -> None:
        nonlocal items, weight
        if not items:
            step = "Write the sentence out in rules without empty ones"
            raise _fault("a right side must hold a symbol or a word", source, line, f"{lhs} -> nothing", step)
        rules.append(Rule(lhs, tuple(items), weight, line))
        items, weight = [], None

    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        match = _ITEM.match(text, place)
        if match is None:
            step = "Close quotes, and write weights as [0.5]"
            raise _fault(
                "a right side must be symbols, quoted words and [weights]", source, line, text[place:][:40], step
            )
        place = match.end()
        if match["bar"]:
            close()
        elif weight is not None:
            raise _fault("a weight must end its alternative", source, line, match[0], "Write | after the weight")
        elif match["weight"]:
            weight = _weight(match["weight"], source, line)
        elif match["word"] and match["word"][1:-1] == "":
            raise _fault("a word must have a letter", source, line, f"{lhs} -> {match[0]}", "Leave empty rules out")
        else:
            items.append((True, match["word"][1:-1]) if match["word"] else (False, unquote(match["symbol"])))
    close()
    return rules


def _weight(text: str, source: str, line: int) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise _fault("a weight must be a positive number", source, line, f"[{text}]", "Leave rules of weight 0 out")
    return weight


def _require_defined(rules: list[Rule], start: str | None, source: str) -> None:
    defined = {rule.lhs for rule in rules}
    used = [(text, rule.line) for rule in rules for word, text in rule.rhs if not word and text not in defined]
    missing = [f"{source}:{line}: {text}" for text, line in dict(reversed(used)).items()]
    step = "Add rules for it, or quote it if it is a word"
    require(not missing, "parse_grammar", "each symbol must have a rule", ", ".join(missing[:5]), step)
    step = "Correct %start"
    require(start is None or start in defined, "parse_grammar", "the start symbol must have a rule", start, step)


def _probabilities(rules: list[Rule], source: str, normalize: bool) -> list[float]:
    weightless = [rule for rule in rules if rule.weight is None]
    totals: dict[str, float] = defaultdict(float)
    if len(weightless) == len(rules):
        weights, normalize = [1.0] * len(rules), True
    else:
        where = ", ".join(f"{source}:{rule.line}: {rule.lhs}" for rule in weightless[:5])
        step = "Write a weight after each alternative, or none at all"
        require(not weightless, "parse_grammar", "all rules or none must have weights", f"none at {where}", step)
        weights = [rule.weight or 0.0 for rule in rules]
    for rule, weight in zip(rules, weights, strict=True):
        totals[rule.lhs] += weight
    wrong = [f"{lhs} {total:.6g}" for lhs, total in totals.items() if not normalize and abs(total - 1) > 1e-4]
    step = "Correct them, or pass normalize=True"
    got = f"{source}: sums {', '.join(wrong[:20])}"
    require(not wrong, "parse_grammar", "the weights of a symbol must sum to 1", got, step)
    return [weight / totals[rule.lhs] if normalize else weight for rule, weight in zip(rules, weights, strict=True)]


def _printed_names(grammar: SparsePCFG) -> tuple[list[str], list[str]]:
    s, (q, v) = num_nonterminals(grammar), grammar.log_emit.shape
    if grammar.names is None:
        numbered = [f"N{i}" for i in range(s)] + [f"T{i}" for i in range(q)]
        return numbered, [f'"w{i}"' for i in range(v)]
    bad = [w for w in grammar.names.words if ('"' in w and "'" in w) or "\n" in w]
    rule = "a word must not hold both kinds of quotes or a line break"
    require(not bad, "format_grammar", rule, bad[:3], "Rename the word")
    words = [f"'{word}'" if '"' in word else f'"{word}"' for word in grammar.names.words]
    taken: set[str] = set()
    escaped = [_ESCAPED.sub(lambda c: "".join(f"%{b:02X}" for b in c[0].encode()), x) for x in grammar.names.symbols]
    return [fresh_name(name, taken) for name in escaped], words
