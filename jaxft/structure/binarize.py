"""From treebank trees to binary ones and back: cleaning, chains of unary rules, binarisation with markovisation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxft.core.checks import nearest, require
from jaxft.structure.trees import Tree, fold_tree

PUNCTUATION_TAGS = (",", ".", ":", "``", "''", "-LRB-", "-RRB-", "$", "#")
"""Tags of the Penn Treebank that grammar induction leaves out."""

WRAPPERS = ("", "ROOT", "TOP")
"""Labels that wrap a sentence and are no constituent."""

INTERMEDIATE = "|<"
PARENT = "^"

Direction = Literal["right", "left", "head"]

HEAD_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "ADJP": (("last", "JJ JJR JJS VBN VBG ADJP"), ("last", "RB NN QP CD")),
    "ADVP": (("last", "RB RBR RBS ADVP"), ("first", "IN TO JJ")),
    "CONJP": (("last", "CC IN RB"),),
    "FRAG": (("first", "S NP VP PP"),),
    "INTJ": (("first", "UH INTJ"),),
    "LST": (("last", "LS CD"),),
    "NAC": (("last", "NN NNS NNP NNPS NP"),),
    "NP": (("last", "NN NNS NNP NNPS NX POS JJR"), ("first", "NP PRP"), ("last", "$ ADJP CD JJ QP DT")),
    "NX": (("last", "NN NNS NNP NNPS NX"), ("first", "NP")),
    "PP": (("first", "IN TO VBG VBN RP PP"),),
    "PRN": (("first", "S NP PP VP"),),
    "PRT": (("first", "RP"),),
    "QP": (("last", "CD NN NNS $"), ("last", "JJ RB QP")),
    "RRC": (("first", "VP NP ADVP ADJP PP"),),
    "S": (("first", "TO VP"), ("last", "S SBAR ADJP UCP NP")),
    "SBAR": (("first", "WHNP WHPP WHADVP WHADJP IN DT"), ("last", "S SQ SINV SBAR FRAG")),
    "SBARQ": (("last", "SQ S SINV SBARQ FRAG"),),
    "SINV": (("first", "VBZ VBD VBP VB MD VP S SINV"),),
    "SQ": (("first", "VBZ VBD VBP VB MD VP SQ"),),
    "UCP": (("first", "CC"),),
    "VP": (("first", "TO VBD VBN MD VBZ VB VBG VBP VP"), ("first", "ADJP NN NNS NP")),
    "WHADVP": (("last", "WRB CC"),),
    "WHNP": (("first", "WDT WP WP$ WHADJP WHPP WHNP"), ("last", "NN NNS NP")),
    "WHPP": (("first", "IN TO"),),
}
"""Where the head of a constituent stands: the first or the last child with one of the labels, rule after rule. In the
spirit of Magerman and Collins, shorter, and ours. Of other labels, and where no rule fits, the last child is the head.
"""


@dataclass(frozen=True)
class BinarizationScheme:
    """How trees are made binary. The same scheme undoes it."""

    direction: Direction = "right"
    """Which way the intermediate constituents branch; ``head``: children join the head one by one, those to its right
    first."""
    h: int | None = 1
    """Horizontal markovisation: how many of the children that an intermediate constituent covers stand in its label,
    those to be split off next; ``None``: all."""
    v: int = 1
    """Vertical markovisation: of how many levels, itself included, the label of a constituent speaks."""
    unaries: Literal["collapse", "keep"] = "collapse"
    """Chains are joined to one label (above a preterminal too), or stay."""
    joiner: str = "+"


def clean_tree(
    tree: Tree,
    *,
    remove: Collection[str] = ("-NONE-",),
    function_tags: bool = False,
    punctuation: bool = True,
    wrapper: str | None = None,
) -> Tree | None:
    """A treebank tree without traces, emptied constituents and function tags.

    Args:
      tree: A tree as read.
      remove: Preterminals that go with their words; so does every constituent left without words.
      function_tags: Keep ``-SBJ``, ``-1``, ``=2`` and the like. Labels that begin with a hyphen (``-LRB-``) stay whole.
      punctuation: Keep punctuation (``PUNCTUATION_TAGS``).
      wrapper: Label of one constituent around the whole sentence; ``None`` means none unless several would be left
        without a parent, which stay under the wrapper they had (``TOP`` if unnamed).

    Returns:
      The tree, or ``None`` if no word is left.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> print(clean_tree(parse_tree("( (S (NP-SBJ-1 (PRP We)) (VP (VBP eat) (NP (-NONE- *T*-1))) (. .)) )")))
      (S (NP (PRP We)) (VP (VBP eat)) (. .))
    """
    gone = {*remove, *(() if punctuation else PUNCTUATION_TAGS)}

    def combine(node: Tree, children: list[Tree | str | None]) -> Tree | None:
        kept = tuple(child for child in children if child is not None)
        if not kept or (node.is_preterminal and node.label in gone):
            return None
        return Tree(node.label if function_tags else strip_function_tags(node.label), kept)

    cleaned = fold_tree(tree, combine, lambda word: word)
    while cleaned is not None and cleaned.label in WRAPPERS and not cleaned.is_preterminal:
        (first, *others) = cleaned.children
        if others or isinstance(first, str):
            return Tree(wrapper or cleaned.label or "TOP", cleaned.children)
        cleaned = first
    return cleaned if cleaned is None or wrapper is None else Tree(wrapper, (cleaned,))


def strip_function_tags(label: str) -> str:
    """The category of a label.

    Example:
      >>> [strip_function_tags(label) for label in ("NP-SBJ-1", "NP=2", "-LRB-", "PRP$")]
      ['NP', 'NP', '-LRB-', 'PRP$']
    """
    return label if label.startswith(("-", "=")) else label.split("-")[0].split("=")[0]


def collapse_unaries(tree: Tree, *, joiner: str = "+", preterminals: bool = True) -> Tree:
    """Every chain of constituents over the same words as one constituent with a joined label.

    Args:
      tree: A tree whose words stand under preterminals.
      joiner: What joins the labels; may stand in no label.
      preterminals: Join chains that end in a preterminal with it; if false their last link stays.

    Returns:
      The tree. ``restore_unaries`` is the inverse.

    Raises:
      UserError: A label that holds the joiner.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> print(collapse_unaries(parse_tree("(S (VP (VB eat) (NP (NN fish))))")))
      (S+VP (VB eat) (NP+NN fish))
    """
    _require_absent("collapse_unaries", tree, joiner, "joiner")

    def combine(node: Tree, children: list[Tree | str]) -> Tree:
        (first, *others) = children
        if others or isinstance(first, str) or (first.is_preterminal and not preterminals):
            return Tree(node.label, tuple(children))
        return Tree(node.label + joiner + first.label, first.children)

    return fold_tree(tree, combine, lambda word: word)


def restore_unaries(tree: Tree, *, joiner: str = "+") -> Tree:
    """Chains of constituents from joined labels, the inverse of ``collapse_unaries``.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> print(restore_unaries(parse_tree("(S+VP (VB eat) (NP+NN fish))")))
      (S (VP (VB eat) (NP (NN fish))))
    """

    def combine(node: Tree, children: list[Tree | str]) -> Tree:
        *above, label = node.label.split(joiner)
        made = Tree(label, tuple(children))
        for name in reversed(above):
            made = Tree(name, (made,))
        return made

    return fold_tree(tree, combine, lambda word: word)


def binarize(tree: Tree, *, direction: Direction = "right", h: int | None = None, v: int = 1) -> Tree:
    """Every constituent of three or more children as a cascade of intermediate ones with two.

    An intermediate constituent of ``NP`` is called ``NP|<DT-JJ>`` after the first ``h`` children it covers on the side
    where the next is split off. With ``v`` of 2 or more, ``NP^S`` stands for an ``NP`` under ``S``; preterminals keep
    their labels. Chains stay as they are.

    Args:
      tree: A tree whose words stand under preterminals.
      direction: ``right``: the first child is split off first, ``left``: the last, ``head``: those before the head
        (``HEAD_RULES``), from the first, then those behind it, from the last.
      h: Horizontal markovisation; ``None`` means all children covered.
      v: Vertical markovisation; 1 means none.

    Returns:
      The tree. ``unbinarize`` is the inverse.

    Raises:
      UserError: An unknown direction, h < 0, v < 1, words beside constituents, or labels that hold ``|<`` or ``^``.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> print(binarize(parse_tree("(NP (DT a) (JJ b) (JJ c) (NN d))"), h=1))
      (NP (DT a) (NP|<JJ> (JJ b) (NP|<JJ> (JJ c) (NN d))))

    Reference:
      Klein and Manning 2003, Accurate unlexicalized parsing, section 2.
    """
    where, known = "binarize", ("right", "left", "head")
    require(direction in known, where, f"direction must be one of {known}", direction, nearest(str(direction), known))
    require(h is None or h >= 0, where, "h must be 0 or more, or None", h, "Pass None for all children")
    require(v >= 1, where, "v must be 1 or more", v, "Pass 1 for labels without their parents")
    for mark in (INTERMEDIATE, PARENT):
        _require_absent(where, tree, mark, "mark of binarisation")
    annotated = tree if v == 1 else _annotate_parents(tree, v)

    def combine(node: Tree, children: list[Tree | str]) -> Tree:
        if node.is_preterminal:
            return node
        mixed = [child for child in children if isinstance(child, str)]
        require(not mixed, where, "words must stand under preterminals", mixed[:3], "Give each word a tag")
        return _cascade(node.label, [child for child in children if isinstance(child, Tree)], direction, h)

    return fold_tree(annotated, combine, lambda word: word)


def _annotate_parents(tree: Tree, v: int) -> Tree:
    """Labels followed by those of v - 1 ancestors, preterminals excepted."""
    names: dict[int, str] = {}
    stack: list[tuple[Tree, tuple[str, ...]]] = [(tree, ())]
    while stack:
        node, above = stack.pop()
        names[id(node)] = node.label if node.is_preterminal else PARENT.join((node.label, *above[: v - 1]))
        stack.extend((child, (node.label, *above)) for child in node.children if isinstance(child, Tree))
    return fold_tree(tree, lambda node, children: Tree(names[id(node)], tuple(children)), lambda word: word)


def _cascade(label: str, children: Sequence[Tree], direction: Direction, h: int | None) -> Tree:
    head = {"right": len(children) - 1, "left": 0}.get(direction)
    plain = [child.label.split(PARENT)[0] for child in children]
    if head is None:
        head = head_child(label.split(PARENT)[0], plain)
    # Innermost first: the head takes up what stands behind it, then what stands before it.
    made, start, end = children[head], head, head + 1
    while (start, end) != (0, len(children)):
        from_left = end == len(children)
        start, end = (start - 1, end) if from_left else (start, end + 1)
        covered = (
            plain[start:end] if h is None else plain[start:end][:h] if from_left else plain[start:end][-h:] if h else []
        )
        name = label if (start, end) == (0, len(children)) else f"{label}{INTERMEDIATE}{'-'.join(covered)}>"
        made = Tree(name, (children[start], made) if from_left else (made, children[end - 1]))
    return made if len(children) > 1 else Tree(label, (made,))


def head_child(label: str, children: Sequence[str]) -> int:
    """Which child is the head by ``HEAD_RULES``; a label joined from a chain counts by its ends.

    Args:
      label: Label of the constituent.
      children: Labels of its children.

    Returns:
      Index of the head.

    Example:
      >>> head_child("NP", ["DT", "NN", "PP"]), head_child("VP", ["MD", "VP"]), head_child("?", ["A", "B"])
      (1, 0, 1)
    """
    outer = [child.split("+")[0] for child in children]
    for end, labels in HEAD_RULES.get(label.split("+")[-1], ()):
        places = [i for i, child in enumerate(outer) if child in labels.split()]
        if places:
            return places[0] if end == "first" else places[-1]
    return len(children) - 1


def unbinarize(tree: Tree) -> Tree:
    """The tree without intermediate constituents and without the marks of ancestors, the inverse of ``binarize``.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> print(unbinarize(parse_tree("(NP^S (DT a) (NP^S|<JJ> (JJ b) (NN c)))")))
      (NP (DT a) (JJ b) (NN c))
    """

    def combine(node: Tree, children: list[Tree | str | tuple]) -> Tree | tuple:
        flat = []
        for child in children:
            flat += child if isinstance(child, tuple) else [child]
        return tuple(flat) if INTERMEDIATE in node.label else Tree(node.label.split(PARENT)[0], tuple(flat))

    made = fold_tree(tree, combine, lambda word: word)
    # A parser may put an intermediate symbol at the root.
    return made if isinstance(made, Tree) else Tree(tree.label.split(INTERMEDIATE)[0].split(PARENT)[0], made)


def to_binary(tree: Tree, scheme: BinarizationScheme) -> Tree:
    """A cleaned tree as the scheme has it; ``from_binary`` is the inverse.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> print(to_binary(parse_tree("(S (NP (NN a)) (VB b) (. .))"), BinarizationScheme(h=0)))
      (S (NP+NN a) (S|<> (VB b) (. .)))
    """
    if scheme.unaries == "collapse":
        tree = collapse_unaries(tree, joiner=scheme.joiner)
    return binarize(tree, direction=scheme.direction, h=scheme.h, v=scheme.v)


def from_binary(tree: Tree, scheme: BinarizationScheme) -> Tree:
    """The tree that a binary one stands for.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> print(from_binary(parse_tree("(S (NP+NN a) (S|<> (VB b) (. .)))"), BinarizationScheme(h=0)))
      (S (NP (NN a)) (VB b) (. .))
    """
    flat = unbinarize(tree)
    return restore_unaries(flat, joiner=scheme.joiner) if scheme.unaries == "collapse" else flat


def _require_absent(where: str, tree: Tree, mark: str, what: str) -> None:
    held = sorted({node.label for node in tree.subtrees() if mark in node.label})
    require(not held, where, f"no label may hold the {what} {mark!r}", held[:3], "Rename the labels or choose another")
