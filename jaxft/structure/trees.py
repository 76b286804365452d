"""Constituency trees: brackets in and out, spans and the way back from them, drawings.

A tree is a label and its children; a child is a tree or a word. Nothing here recurses, so depth is not limited.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxft.core.checks import UserError, message, require

T = TypeVar("T")
_TOKEN = re.compile(r"\(|\)|\n|[^\s()]+")


class Span(NamedTuple):
    """A constituent over the words [start, end)."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, eq=False)
class Tree:
    """A constituent: its label and its children, trees or words."""

    label: str
    children: "tuple[Tree | str, ...]"

    def __post_init__(self):
        require(
            len(self.children) > 0, "Tree", "a constituent must have a child", f"none under {self.label!r}", "Add one"
        )

    @property
    def is_preterminal(self) -> bool:
        """Whether the only child is a word."""
        return len(self.children) == 1 and isinstance(self.children[0], str)

    def subtrees(self) -> Iterator["Tree"]:
        """All constituents, parents first, left to right."""
        stack: list[Tree] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend([child for child in reversed(node.children) if isinstance(child, Tree)])

    def leaves(self) -> list[str]:
        """The words.

        Example:
          >>> parse_tree("(S (NP (PRP we)) (VP (VBP walk)))").leaves()
          ['we', 'walk']
        """
        return [word for word, _ in _tagged_leaves(self)]

    def tags(self) -> list[str]:
        """Label directly above each word.

        Example:
          >>> parse_tree("(S (NP (PRP we)) (VP (VBP walk)))").tags()
          ['PRP', 'VBP']
        """
        return [tag for _, tag in _tagged_leaves(self)]

    def height(self) -> int:
        """Edges from the root down to the farthest word."""
        return fold_tree(self, lambda node, heights: 1 + max(heights), lambda word: 0)

    def __str__(self) -> str:
        return fold_tree(self, lambda node, children: f"({node.label} {' '.join(children)})", lambda word: word)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"parse_tree({str(self)!r})"


def fold_tree(tree: Tree, combine: Callable[[Tree, list[Any]], T], leaf: Callable[[str], Any]) -> T:
    """A value of a tree from the values of its children, bottom up.

    Args:
      tree: The tree.
      combine: From a constituent and the values of its children to its value.
      leaf: From a word to its value.

    Returns:
      The value at the root.

    Example:
      >>> fold_tree(parse_tree("(S (A a) (B b))"), lambda node, sizes: 1 + sum(sizes), lambda word: 0)
      3
    """
    stack: list[tuple[Tree, list[Any]]] = [(tree, [])]
    while True:
        node, values = stack[-1]
        if len(values) < len(node.children):
            child = node.children[len(values)]
            if isinstance(child, str):
                values.append(leaf(child))
            else:
                stack.append((child, []))
            continue
        value = combine(node, values)
        stack.pop()
        if not stack:
            return value
        stack[-1][1].append(value)


def parse_tree(text: str, *, source: str = "<string>") -> Tree:
    """The one tree of a bracketed string.

    Args:
      text: Such as ``(S (NP (PRP we)) (VP (VBP walk)))``.
      source: Name of the text in errors.

    Returns:
      The tree.

    Raises:
      UserError: No tree, several, or a fault of form, with its line.

    Example:
      >>> print(parse_tree("(S (NP we)  (VP walk))"))
      (S (NP we) (VP walk))
    """
    trees = list(parse_trees(text, source=source))
    require(
        len(trees) == 1, "parse_tree", "the text must hold one tree", f"{len(trees)} in {source}", "Use parse_trees"
    )
    return trees[0]


def parse_trees(text: str, *, source: str = "<string>") -> Iterator[Tree]:
    """All trees of a text, one after another.

    Words and labels are what stands between brackets and white space. Only the outermost bracket may lack a label, as
    in the Penn Treebank's ``( (S ...) )``: its label is then the empty string.

    Args:
      text: The brackets.
      source: Name of the text in errors.

    Yields:
      The trees, in order.

    Raises:
      UserError: Brackets that do not balance, text outside them, a constituent without label or children: each with
        ``source:line``.

    Example:
      >>> [str(tree) for tree in parse_trees("(S (A a)) (S (B b))")]
      ['(S (A a))', '(S (B b))']
    """
    line = 1
    stack: list[tuple[str | None, list[Tree | str], int]] = []

    def fault(rule: str, got: str, at: int, next_step: str = "Correct the brackets") -> UserError:
        return UserError(message("parse_trees", rule, f"{source}:{at}: {got}", next_step))

    for token in _TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token == "(":
            if stack and stack[-1][0] is None:
                if len(stack) > 1:
                    raise fault("a constituent within a tree must have a label", "two opening brackets", line)
                stack[-1] = ("", *stack[-1][1:])
            stack.append((None, [], line))
        elif not stack:
            got = "a closing bracket too many" if token == ")" else f"{token!r} outside brackets"
            raise fault("a text must be a sequence of bracketed trees", got, line)
        elif token == ")":
            label, children, start = stack.pop()
            if not children:
                got = "an empty bracket" if label is None else f"{label!r} without children"
                raise fault("a constituent must have a label and a child", got, start)
            tree = Tree(label or "", tuple(children))
            if stack:
                stack[-1][1].append(tree)
            else:
                yield tree
        elif stack[-1][0] is None:
            stack[-1] = (token, *stack[-1][1:])
        else:
            stack[-1][1].append(token)
    if stack:
        raise fault("brackets must balance", f"{len(stack)} open at the end of a tree begun here", stack[0][2])


def _tagged_leaves(tree: Tree) -> Iterator[tuple[str, str]]:
    stack: list[tuple[Tree | str, str]] = [(tree, "")]
    while stack:
        node, parent = stack.pop()
        if isinstance(node, str):
            yield node, parent
        else:
            stack.extend((child, node.label) for child in reversed(node.children))


def tree_spans(
    tree: Tree, *, unary_chains: bool = True, trivial: bool = True, preterminals: bool = False
) -> list[Span]:
    """The constituents as half-open labelled spans, parents first.

    Args:
      tree: The tree.
      unary_chains: Keep every constituent of a chain over the same words; if false, the topmost alone.
      trivial: Keep spans of one word and of the whole sentence.
      preterminals: Count the labels directly above words as constituents.

    Returns:
      The spans; two constituents with the same words and label are two spans.

    Example:
      >>> tree_spans(parse_tree("(S (NP (DT the) (NN dog)) (VP (VBZ barks)))"))
      [Span(start=0, end=3, label='S'), Span(start=0, end=2, label='NP'), Span(start=2, end=3, label='VP')]
    """
    widths: dict[int, int] = {}

    def width(node: Tree, sizes: list[int]) -> int:
        widths[id(node)] = sum(sizes)
        return sum(sizes)

    total = fold_tree(tree, width, lambda word: 1)
    found: list[Span] = []
    stack: list[tuple[Tree, int]] = [(tree, 0)]
    while stack:
        node, start = stack.pop()
        end = start + widths[id(node)]
        if (preterminals or not node.is_preterminal) and (trivial or 1 < end - start < total):
            chained = any((span.start, span.end) == (start, end) for span in found[-1:])
            if unary_chains or not chained:
                found.append(Span(start, end, node.label))
        inside = []
        for child in node.children:
            if isinstance(child, Tree):
                inside.append((child, start))
                start += widths[id(child)]
            else:
                start += 1
        stack.extend(reversed(inside))
    return found


def tree_from_spans(
    words: Sequence[str], spans: Iterable[tuple[int, int, str]], *, tags: Sequence[str] | None = None, top: str = "X"
) -> Tree:
    """The tree of a set of spans that do not cross.

    Args:
      words: The sentence, one word or more.
      spans: ``(start, end, label)``, in any order; of spans over the same words the first is the parent. A node list of
        a parse holds its preterminals as spans of one word, which then stand above the words.
      tags: Preterminal of each word, beneath all spans; ``None`` means none.
      top: Label of the root where no span covers the whole sentence.

    Returns:
      The tree.

    Raises:
      UserError: No words, a span outside the sentence or empty, or two that cross.

    Example:
      >>> print(tree_from_spans("the dog barks".split(), [(0, 2, "NP"), (0, 3, "S")], tags=["DT", "NN", "VBZ"]))
      (S (NP (DT the) (NN dog)) (VBZ barks))
    """
    where, n = "tree_from_spans", len(words)
    require(n > 0, where, "a sentence must have a word", "none", "Leave empty sentences out")
    require(tags is None or len(tags) == n, where, "each word needs a tag", f"{tags} for {n}", "Pass one a word")
    ordered = sorted((Span(int(i), int(j), str(label)) for i, j, label in spans), key=lambda span: (span[0], -span[1]))
    outside = [tuple(span) for span in ordered if not 0 <= span.start < span.end <= n]
    require(not outside, where, f"spans must be [i, j) within 0..{n}", outside[:3], "Count from 0, the end excluded")
    if not ordered or (ordered[0].start, ordered[0].end) != (0, n):
        ordered.insert(0, Span(0, n, top))
    leaves: list[Tree | str] = [word if tags is None else Tree(tags[i], (word,)) for i, word in enumerate(words)]
    open_spans: list[tuple[Span, list[Tree | str]]] = []
    following = 0
    for i in range(n + 1):
        while open_spans and open_spans[-1][0].end == i:
            span, children = open_spans.pop()
            tree = Tree(span.label, tuple(children))
            if not open_spans:
                return tree
            open_spans[-1][1].append(tree)
        while following < len(ordered) and ordered[following].start == i:
            span, following = ordered[following], following + 1
            if open_spans:
                parent = open_spans[-1][0]
                crossing = f"[{parent.start}, {parent.end}) and [{span.start}, {span.end})"
                require(span.end <= parent.end, where, "spans must not cross", crossing, "Decode a tree first")
            open_spans.append((span, []))
        open_spans[-1][1].append(leaves[i])
    raise AssertionError("the outermost span ends at the last word")


def draw_tree(tree: Tree) -> str:
    """The tree as lines of text, the root on top.

    Example:
      >>> print(draw_tree(parse_tree("(S (NP (PRP we)) (VP (VBP like) (NP (NN tea))))")))
           S
       +---+---+
      NP      VP
       |     +-+--+
      PRP   VBP  NP
       |     |    |
      we   like  NN
                  |
                 tea
    """
    lines, _, _ = fold_tree(tree, _draw_node, lambda word: ([word], len(word), len(word) // 2))
    return "\n".join(line.rstrip() for line in lines)


def _draw_node(node: Tree, blocks: list[tuple[list[str], int, int]]) -> tuple[list[str], int, int]:
    """Lines, width and the column that the parent's line meets."""
    height = max(len(lines) for lines, _, _ in blocks)
    rows = ["  ".join(lines[i] if i < len(lines) else " " * w for lines, w, _ in blocks) for i in range(height)]
    starts = np.cumsum([0] + [width + 2 for _, width, _ in blocks])
    columns = [int(start) + column for start, (_, _, column) in zip(starts, blocks, strict=False)]
    anchor = (columns[0] + columns[-1]) // 2
    # A label wider than what stands beneath pushes it to the right.
    shift = max(0, len(node.label) // 2 - anchor)
    rows, columns, anchor = [" " * shift + row for row in rows], [c + shift for c in columns], anchor + shift
    start = anchor - len(node.label) // 2
    width = max(len(rows[0]), start + len(node.label))
    line = [" "] * width
    if len(columns) > 1:
        line[columns[0] : columns[-1] + 1] = "-" * (columns[-1] + 1 - columns[0])
    for column in columns:
        line[column] = "+" if len(columns) > 1 else "|"
    if len(columns) > 1:
        line[anchor] = "+"
    head = " " * start + node.label
    return [row.ljust(width) for row in (head, "".join(line), *rows)], width, anchor
