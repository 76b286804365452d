"""Treebank files to trees; a grammar with its lexicon read off trees; sentences to the numbers of its words."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxft.core.checks import require
from jaxft.structure.binarize import BinarizationScheme, to_binary
from jaxft.structure.pcfg import SparsePCFG, SymbolNames, num_nonterminals
from jaxft.structure.trees import Tree, parse_trees

_SUFFIXES = ("ing", "ed", "ly", "ion", "er", "est", "al", "ity", "ous", "s")
UNKNOWN = "<unk>"
PATTERNS = ("*.mrg", "*.ptb")


class Coverage(NamedTuple):
    """How much of a treebank a grammar knows."""

    tokens: float
    """Fraction of the words that are in the lexicon themselves, not by a class."""
    rules: float
    """Fraction of the rules used, unary ones included, that have a positive probability."""
    emissions: float
    """Fraction of the words that their tag emits, after unknown words became classes."""
    derivable: float
    """Fraction of the trees that have a positive probability."""
    sentences: int
    unknown_words: tuple[str, ...]
    """Words outside the lexicon, the frequent ones first."""


def read_treebank(paths: str | Path | Sequence[str | Path], *, pattern: str | Sequence[str] = PATTERNS) -> list[Tree]:
    """The trees of files or folders, as they stand there.

    Args:
      paths: A file, a folder, or several of these.
      pattern: Names of the files to read in a folder and beneath it, in alphabetical order.

    Returns:
      The trees. Penn Treebank files wrap each in a bracket without label, see ``clean_tree``.

    Raises:
      UserError: Paths that do not exist, a folder without such files, a file without a tree, or a fault of form, with
        the file and the line.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = pathlib.Path(folder, "wsj_0001.mrg").write_text("( (S (NP (PRP We)) (VP (VBP eat))) )")
      ...     print(*read_treebank(folder))
      ( (S (NP (PRP We)) (VP (VBP eat))))
    """
    where = "read_treebank"
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    missing = [str(path) for path in given if not path.exists()]
    require(bool(given) and not missing, where, "paths must exist", missing or "none", "Check the path")
    trees: list[Tree] = []
    for path in given:
        files = sorted({file for glob in patterns for file in path.rglob(glob)}) if path.is_dir() else [path]
        step = "Pass pattern=... as the files are called"
        require(bool(files), where, f"a folder must hold {' or '.join(patterns)}", f"none in {path}", step)
        for file in files:
            found = list(parse_trees(_decode(file.read_bytes()), source=str(file)))
            require(
                bool(found), where, "a file must hold a tree", f"none in {file}", "Check that it is a treebank file"
            )
            trees += found
    return trees


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def word_class(word: str) -> str:
    """The class that stands for an unknown word: capital, digits, hyphen, suffix.

    Example:
      >>> [word_class(word) for word in ("Dvorak", "walking", "1,234.5", "mid-1990s", "zyx")]
      ['<unk-C>', '<unk-ing>', '<unk-N>', '<unk-N-H-s>', '<unk>']
    """
    marks = []
    if word[:1].isupper():
        marks.append("CC" if len(word) > 1 and word.isupper() else "C")
    if any(c.isdigit() for c in word):
        marks.append("N")
    if "-" in word[1:-1]:
        marks.append("H")
    lower = word.lower()
    suffix = next((end for end in _SUFFIXES if lower.endswith(end) and len(lower) > len(end) + 2), None)
    if suffix is not None and lower[-2:] != "ss":
        marks.append(suffix)
    return f"<unk-{'-'.join(marks)}>" if marks else UNKNOWN


def treebank_grammar(
    trees: Iterable[Tree],
    *,
    scheme: BinarizationScheme | None = None,
    min_count: int = 2,
    unknown: Literal["classes", "single"] | None = "classes",
    rule_smoothing: float = 0.0,
    emit_smoothing: float = 0.0,
) -> SparsePCFG:
    r"""The maximum-likelihood grammar of a treebank.

    Of the trees made binary, $P(A \to BC) = (n(A \to BC) + \lambda) / \sum$ over the rules of $A$ that occur, and
    $P(w \mid T) = (n(T, w) + \mu) / \sum$ over all words. The probability of rules that never occur stays 0.

    Args:
      trees: Cleaned trees (``clean_tree``), words under preterminals.
      scheme: How they are made binary; ``None`` means ``BinarizationScheme()``: chains collapsed, branching to the
        right, one child of memory. With ``unaries="keep"`` chains are rules of ``log_unary``.
      min_count: Words that occur less often become unknown words.
      unknown: ``classes``: those become their ``word_class``; ``single``: all one; ``None``: all words are kept.
      rule_smoothing: $\lambda$.
      emit_smoothing: $\mu$. Above 0 every preterminal can emit every word.

    Returns:
      The grammar, with names; symbols, words and rules in alphabetical order. A label used above words and above
      constituents is two symbols of one name.

    Raises:
      UserError: No trees, labels the scheme cannot mark, a negative option, or chains kept that form a cycle of one.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> grammar = treebank_grammar([parse_tree("(S (NP (PRP we)) (VP (VBP eat) (NP (NN tea))))")], unknown=None)
      >>> grammar.names.nonterminals, grammar.names.preterminals
      (('S', 'VP'), ('NP+NN', 'NP+PRP', 'VBP'))
    """
    where = "treebank_grammar"
    smallest = min(min_count, rule_smoothing, emit_smoothing)
    require(smallest >= 0, where, "counts and smoothing must be 0 or more", smallest, "Pass 0 for none")
    known = ("classes", "single", None)
    require(unknown in known, where, f"unknown must be one of {known}", unknown, "Choose one")
    scheme = scheme or BinarizationScheme()
    counts = _Counts()
    for number, tree in enumerate(trees):
        advice = "Leave out what clean_tree emptied"
        require(tree is not None, where, f"tree {number} must be a tree", "None", advice)
        _count(to_binary(tree, scheme), counts)
    require(bool(counts.roots), where, "a grammar must be read off trees", "none", "Pass one or more")
    words = Counter()
    for (_, word), n in counts.emissions.items():
        words[word] += n
    kept = {word for word, n in words.items() if unknown is None or n >= min_count}
    emissions: Counter = Counter()
    for (tag, word), n in counts.emissions.items():
        emissions[tag, word if word in kept else word_class(word) if unknown == "classes" else UNKNOWN] += n
    vocabulary = {word for _, word in emissions} | ({UNKNOWN} if unknown else set())
    return _to_grammar(counts, emissions, sorted(vocabulary), rule_smoothing, emit_smoothing)


class _Counts:
    """Occurrences in binary trees. A symbol is (whether a preterminal, label): nonterminals are sorted first."""

    def __init__(self):
        self.roots: Counter[tuple[bool, str]] = Counter()
        self.rules: Counter[tuple[tuple[bool, str], ...]] = Counter()
        self.emissions: Counter[tuple[str, str]] = Counter()


def _count(tree: Tree, counts: _Counts) -> None:
    counts.roots[tree.is_preterminal, tree.label] += 1
    for node in tree.subtrees():
        children = [child for child in node.children if isinstance(child, Tree)]
        if node.is_preterminal:
            counts.emissions[node.label, str(node.children[0])] += 1
        else:
            counts.rules[(False, node.label), *((child.is_preterminal, child.label) for child in children)] += 1


def _to_grammar(
    counts: _Counts, emissions: Counter, vocabulary: list[str], rule_smoothing: float, emit_smoothing: float
) -> SparsePCFG:
    tags = sorted({tag for tag, _ in emissions})
    above = sorted({rule[0][1] for rule in counts.rules})
    number = {(False, label): i for i, label in enumerate(above)}
    number |= {(True, label): len(above) + i for i, label in enumerate(tags)}
    column = {word: i for i, word in enumerate(vocabulary)}
    root = np.zeros(len(number))
    for symbol, n in counts.roots.items():
        root[number[symbol]] = n
    emit = np.full((len(tags), len(vocabulary)), float(emit_smoothing))
    for (tag, word), n in emissions.items():
        emit[number[True, tag] - len(above), column[word]] += n
    chains = np.zeros((len(above), len(number)))
    totals: dict[int, float] = defaultdict(float)
    binary: list[tuple[int, int, int, float]] = []
    for rule, n in counts.rules.items():
        lhs, *children = (number[symbol] for symbol in rule)
        totals[lhs] += n + rule_smoothing
        if len(children) == 1:
            chains[lhs, children[0]] = n + rule_smoothing
        else:
            binary.append((lhs, children[0], children[1], n + rule_smoothing))
    binary.sort()
    mass = np.array([totals[i] for i in range(len(above))])
    rules = np.array([rule[:3] for rule in binary], np.int32).reshape(-1, 3)
    scores = np.array([rule[3] for rule in binary]) / mass[rules[:, 0]]
    chains /= mass.reshape(-1, 1)
    _require_open_chains(chains, above)
    lhs, left, right = (jnp.asarray(axis) for axis in rules.T)
    names = SymbolNames(above, tags, vocabulary)
    log_unary = _log(chains) if chains.any() else None
    emit_rows = emit / emit.sum(axis=1, keepdims=True)
    return SparsePCFG(_log(root / root.sum()), lhs, left, right, _log(scores), _log(emit_rows), log_unary, names)


def _require_open_chains(chains: np.ndarray, labels: list[str]) -> None:
    """Counts of finite trees leave every cycle an exit; one may still be smaller than rounding."""
    square = chains[:, : len(labels)]
    radius = float(np.abs(np.linalg.eigvals(square)).max()) if square.any() else 0.0
    step = 'Use BinarizationScheme(unaries="collapse")'
    got = f"spectral radius {radius:.6g}"
    require(radius < 1 - 1e-6, "treebank_grammar", "chains of unary rules must form no cycle of mass 1", got, step)


def _log(p: np.ndarray) -> jnp.ndarray:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(p), jnp.result_type(float))


def encode_words(grammar: SparsePCFG, words: Sequence[str]) -> Int[np.ndarray, "t"]:
    """Numbers of the words of a sentence; of an unknown word that of its class, or of ``<unk>``.

    A class that no training word had falls back to the class without its suffix, hyphen or digits, and so on.

    Args:
      grammar: A grammar with names, as of ``treebank_grammar``.
      words: The sentence.

    Returns:
      The numbers.

    Raises:
      UserError: A grammar without names, or unknown words where the grammar has no word for them (all are listed).

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> grammar = treebank_grammar([parse_tree("(S (NP (PRP we)) (VP (VBP eat) (NP (NN tea))))")], min_count=1)
      >>> [grammar.names.words[i] for i in encode_words(grammar, ["we", "drink", "tea"])]
      ['we', '<unk>', 'tea']
    """
    names, advice = _names("encode_words", grammar), "Pass a list of words, as of sentence.split()"
    require(not isinstance(words, str), "encode_words", "a sentence is a list of words", "one string", advice)
    numbers = [_word_number(names, word) for word in words]
    unknown = sorted({word for word, i in zip(words, numbers, strict=True) if i is None})
    rule, step = "words must be in the lexicon", "Read the grammar with unknown words, or leave the sentence out"
    require(not unknown, "encode_words", rule, f"{len(unknown)} that are not: {', '.join(unknown[:8])}", step)
    return np.array([i for i in numbers if i is not None], np.int32)


def encode_sentences(
    grammar: SparsePCFG, sentences: Sequence[Sequence[str]], *, length: int | None = None
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]:
    """Sentences as one padded array of word numbers, and their lengths.

    Args:
      grammar: A grammar with names.
      sentences: Words of each.
      length: Width of the array; ``None`` means the longest sentence.

    Returns:
      Numbers of the words, 0 beyond the end, and lengths.

    Raises:
      UserError: Unknown words where the grammar has no word for them, or a sentence longer than ``length``.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> grammar = treebank_grammar([parse_tree("(S (A a) (B b))")], unknown=None)
      >>> tokens, lengths = encode_sentences(grammar, [["a", "b"], ["b"]])
      >>> tokens.tolist(), lengths.tolist()
      ([[0, 1], [1, 0]], [2, 1])
    """
    lengths = np.array([len(words) for words in sentences], np.int32)
    longest = int(lengths.max(initial=0))
    width = longest if length is None else length
    require(longest <= width, "encode_sentences", "length must hold each sentence", f"{longest} in {width}", "Raise it")
    tokens = np.zeros((len(sentences), width), np.int32)
    for row, words in zip(tokens, sentences, strict=True):
        row[: len(words)] = encode_words(grammar, words)
    return tokens, lengths


def _names(where: str, grammar: SparsePCFG) -> SymbolNames:
    names = grammar.names or SymbolNames((), (), ())
    require(grammar.names is not None, where, "the grammar must have names", "none", "Make it with treebank_grammar")
    return names


def _word_number(names: SymbolNames, word: str) -> int | None:
    if word in names.word_ids:
        return names.word_ids[word]
    parts = word_class(word)[1:-1].split("-")
    # From the whole class to <unk>, one mark less at a time.
    options = [f"<{'-'.join(parts[:end])}>" for end in range(len(parts), 0, -1)]
    return next((names.word_ids[option] for option in options if option in names.word_ids), None)


def coverage(grammar: SparsePCFG, trees: Iterable[Tree], *, scheme: BinarizationScheme | None = None) -> Coverage:
    """How much of other trees a grammar knows.

    Args:
      grammar: Of ``treebank_grammar``.
      trees: Cleaned trees.
      scheme: The scheme that the grammar was read with.

    Returns:
      Fractions of words, rules, emissions and trees.

    Raises:
      UserError: No trees, or a grammar without names.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> grammar = treebank_grammar([parse_tree("(S (A a) (B b))")], min_count=1)
      >>> coverage(grammar, [parse_tree("(S (A a) (B c))")])[:4]
      (0.5, 1.0, 0.5, 0.0)
    """
    names, s = _names("coverage", grammar), num_nonterminals(grammar)
    number = {(False, label): i for i, label in enumerate(names.nonterminals)}
    number |= {(True, label): s + i for i, label in enumerate(names.preterminals)}
    chains = None if grammar.log_unary is None else np.isfinite(np.asarray(grammar.log_unary))
    listed = np.isfinite(np.asarray(grammar.log_rule))
    rules = {tuple(rule) for rule in np.stack([np.asarray(x) for x in grammar[1:4]], axis=1)[listed].tolist()}
    emit, root = np.isfinite(np.asarray(grammar.log_emit)), np.isfinite(np.asarray(grammar.log_root))
    unknown: Counter[str] = Counter()
    seen, kept, derivable, total = Counter(), Counter(), 0, 0
    for tree in trees:
        counts = _Counts()
        _count(to_binary(tree, scheme or BinarizationScheme()), counts)
        fine = all(symbol in number and root[number[symbol]] for symbol in counts.roots)
        for rule, n in counts.rules.items():
            ids = tuple(number.get(symbol, -1) for symbol in rule)
            single = len(ids) == 2 and chains is not None and min(ids) >= 0 and bool(chains[ids])
            known = single or (len(ids) == 3 and ids in rules)
            seen["rule"] += n
            kept["rule"] += n * known
            fine &= known
        for (tag, word), n in counts.emissions.items():
            column, row = _word_number(names, word), number.get((True, tag))
            emitted = column is not None and row is not None and bool(emit[row - s, column])
            seen["word"] += n
            kept["word"] += n * (word in names.word_ids)
            kept["emission"] += n * emitted
            fine &= emitted
            if word not in names.word_ids:
                unknown[word] += n
        derivable, total = derivable + fine, total + 1
    require(total > 0, "coverage", "there must be a tree", "none", "Pass one or more")
    rule_frac = kept["rule"] / seen["rule"] if seen["rule"] else 1.0
    known, emitted = kept["word"] / seen["word"], kept["emission"] / seen["word"]
    words = tuple(word for word, _ in unknown.most_common())
    return Coverage(known, rule_frac, emitted, derivable / total, total, words)
