"""Depths and distances of the words of a tree, and trees made by splitting where the distance is largest."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxft.core.checks import require
from jaxft.structure.trees import Span, Tree, fold_tree, tree_from_spans


def tree_depths(tree: Tree) -> Int[np.ndarray, "t"]:
    """Edges from the root down to each word.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> tree_depths(parse_tree("(S (NP (PRP we)) (VP (VBP like) (NP (NN tea))))")).tolist()
      [3, 3, 4]
    """
    return _word_paths(tree)[0]


def _word_paths(tree: Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth of each word; depth and height of the lowest common ancestor of each two neighbours."""
    heights: dict[int, int] = {}

    def height(node: Tree, below: list[int]) -> int:
        heights[id(node)] = 1 + max(below)
        return 1 + max(below)

    fold_tree(tree, height, lambda word: 0)
    depths: list[int] = []
    gaps: list[tuple[int, int]] = []
    stack: list[tuple[Tree | str, int, tuple[int, int]]] = [(tree, 0, (0, 0))]
    while stack:
        node, depth, gap = stack.pop()
        if isinstance(node, str):
            gaps.append(gap)
            depths.append(depth)
            continue
        # The first child meets what stands before the parent; the others meet their sibling at this node.
        here = (depth, heights[id(node)])
        stack.extend((child, depth + 1, here if i else gap) for i, child in reversed(list(enumerate(node.children))))
    pairs = np.array(gaps[1:], np.int64).reshape(-1, 2)
    return np.array(depths, np.int64), pairs[:, 0], pairs[:, 1]


def common_ancestor_depths(tree: Tree) -> Int[np.ndarray, "t t"]:
    """Depth of the lowest common ancestor of each two words; on the diagonal the depth of the word itself.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> common_ancestor_depths(parse_tree("(S (NP (PRP we)) (VP (VBP like) (NP (NN tea))))")).tolist()
      [[3, 0, 0], [0, 3, 1], [0, 1, 4]]
    """
    depths, gaps, _ = _word_paths(tree)
    table = np.diag(depths)
    for i in range(len(depths) - 1):
        # The ancestor of words i and j is the highest of those between neighbours from i to j.
        table[i, i + 1 :] = table[i + 1 :, i] = np.minimum.accumulate(gaps[i:])
    return table


def tree_distances(tree: Tree) -> Int[np.ndarray, "t t"]:
    r"""Edges on the path between each two words, $d_i + d_j - 2 d_{lca(i, j)}$.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> tree_distances(parse_tree("(S (NP (PRP we)) (VP (VBP like) (NP (NN tea))))")).tolist()
      [[0, 6, 7], [6, 0, 5], [7, 5, 0]]
    """
    common = common_ancestor_depths(tree)
    depths = np.diagonal(common)
    return depths[:, None] + depths[None, :] - 2 * common


def gap_depths(tree: Tree) -> Int[np.ndarray, "gaps"]:
    """Depth of the lowest common ancestor of each two neighbouring words, one fewer than words.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> gap_depths(parse_tree("(S (NP (DT the) (NN dog)) (VP (VBZ barks)))")).tolist()
      [1, 0]
    """
    return _word_paths(tree)[1]


def syntactic_distances(tree: Tree) -> Int[np.ndarray, "gaps"]:
    """Height of the lowest common ancestor of each two neighbouring words, one fewer than words.

    Of a binary tree they determine the brackets: ``tree_from_distances`` is the inverse.

    Example:
      >>> from jaxft.structure.trees import parse_tree
      >>> syntactic_distances(parse_tree("(S (NP (DT the) (NN dog)) (VP (VBZ barks)))")).tolist()
      [2, 3]

    Reference:
      Shen et al. 2018, arXiv 1806.04168, section 3.
    """
    return _word_paths(tree)[2]


def tree_from_distances(
    words: Sequence[str],
    distances: Float[np.ndarray, "gaps"] | Int[np.ndarray, "gaps"] | Sequence[float] | Sequence[int],
    *,
    tags: Sequence[str] | None = None,
    label: str = "X",
) -> Tree:
    """The binary tree that splits at the largest distance first; of equal ones, at the leftmost.

    Args:
      words: The sentence, one word or more.
      distances: One number a gap between neighbours; larger means split earlier.
      tags: Preterminal of each word; ``None`` means ``label``.
      label: Label of the constituents.

    Returns:
      The tree.

    Raises:
      UserError: Numbers of words, tags and gaps that do not fit, or a NaN.

    Example:
      >>> print(tree_from_distances("the dog barks".split(), [2, 3]))
      (X (X (X the) (X dog)) (X barks))

    Reference:
      Shen et al. 2018, arXiv 1806.04168, algorithm 2.
    """
    values = np.asarray(distances, float)
    got = f"{values.shape} for {len(words)} words"
    require(
        values.shape == (len(words) - 1,), "tree_from_distances", "each gap needs a distance", got, "Pass words - 1"
    )
    require(not np.isnan(values).any(), "tree_from_distances", "distances must be numbers", "NaN", "Check the probe")
    return _split_tree(words, lambda i, j: i + 1 + int(values[i : j - 1].argmax()), tags, label)


def _split_tree(words: Sequence[str], split: Callable[[int, int], int], tags: Sequence[str] | None, label: str) -> Tree:
    """The binary tree in which ``split(i, j)`` begins the second child of [i, j)."""
    spans, todo = [], [(0, len(words))]
    while todo:
        i, j = todo.pop()
        if j - i > 1:
            spans.append(Span(i, j, label))
            todo += [(i, split(i, j)), (split(i, j), j)]
    if len(words) == 1:
        return Tree(tags[0] if tags else label, (words[0],))
    return tree_from_spans(words, spans, tags=tags or [label] * len(words))


def branching_tree(
    words: Sequence[str], direction: str = "right", *, tags: Sequence[str] | None = None, label: str = "X"
) -> Tree:
    """A baseline that looks at the number of words alone.

    Args:
      words: The sentence.
      direction: ``right``, ``left`` or ``balanced`` (halves, the right one larger where the number is odd).
      tags: Preterminal of each word; ``None`` means ``label``.
      label: Label of the constituents.

    Returns:
      A binary tree; of one word, its preterminal alone.

    Raises:
      UserError: An unknown direction or no words.

    Example:
      >>> print(branching_tree("a b c".split(), "left"))
      (X (X (X a) (X b)) (X c))
    """
    known = ("right", "left", "balanced")
    require(direction in known, "branching_tree", f"direction must be one of {known}", direction, "Choose one")
    splits = {"right": lambda i, j: i + 1, "left": lambda i, j: j - 1, "balanced": lambda i, j: (i + j) // 2}
    return _split_tree(words, splits[direction], tags, label)
