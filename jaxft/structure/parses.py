"""Binary parses of a batch of sentences as arrays of fixed size: their spans, masks and trees.

A sentence of n words has 2n - 1 nodes, kept in pre-order: the root is node 0, the left child of node ``p`` is
``p + 1``, and its right child is ``p + 2k`` where the left child covers k words.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import require
from jaxft.structure.pcfg import SymbolNames
from jaxft.structure.trees import Tree


class Parses(NamedTuple):
    """One binary tree a sentence; nodes in pre-order, leaves included."""

    spans: Int[Array, "b nodes 2"]
    """Half-open ends [i, j) of each node; (0, 0) where there is none."""
    labels: Int[Array, "b nodes"]
    """Symbol of each node, the top one where unary rules join several: nonterminals, then preterminals."""
    valid: Bool[Array, "b nodes"]
    """Which nodes exist: the first 2n - 1, or none where a sentence has no parse."""
    score: Float[Array, "b"]
    """What the maker of the parse says it is: a log-probability, or the expected recall."""
    bottoms: Int[Array, "b nodes"] | None = None
    """Lowest symbol of each node, the one that branches or has the word; ``None``: the same as ``labels``."""


def parse_spans(parses: Parses) -> list[list[tuple[int, int, int]]]:
    """Nodes of each sentence as (label, i, j), in pre-order, the leaves included.

    Example:
      >>> spans, labels = jnp.array([[[0, 2], [0, 1], [1, 2]]]), jnp.array([[0, 1, 2]])
      >>> parse_spans(Parses(spans, labels, jnp.ones((1, 3), bool), jnp.zeros(1)))
      [[(0, 0, 2), (1, 0, 1), (2, 1, 2)]]
    """
    nodes = np.concatenate([np.asarray(parses.labels)[..., None], np.asarray(parses.spans)], axis=2)
    valid = np.asarray(parses.valid)
    return [[(a, i, j) for a, i, j in row[keep].tolist()] for row, keep in zip(nodes, valid, strict=True)]


def parses_to_trees(
    parses: Parses,
    tokens: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    names: SymbolNames,
) -> list[Tree | None]:
    """Trees with labels and words spelled out.

    Where unary rules join several symbols to one node, its top and its bottom symbol become two nodes; what the chain
    passes in between is not part of a parse.

    Args:
      parses: The parses.
      tokens: Word numbers of the sentences.
      names: Names of symbols and words.

    Returns:
      A tree a sentence; ``None`` where there is no parse.

    Raises:
      UserError: Another number of sentences than of parses, or a node without a label.

    Example:
      >>> spans, labels = jnp.array([[[0, 2], [0, 1], [1, 2]]]), jnp.array([[0, 1, 2]])
      >>> parses = Parses(spans, labels, jnp.ones((1, 3), bool), jnp.zeros(1))
      >>> names = SymbolNames(["S"], ["N", "V"], ["dogs", "bark"])
      >>> str(parses_to_trees(parses, jnp.array([[0, 1]]), names)[0])
      '(S (N dogs) (V bark))'
    """
    where = "parses_to_trees"
    sizes = f"{len(tokens)} sentences and {len(parses.labels)} parses"
    require(len(tokens) == len(parses.labels), where, "each sentence needs a parse", sizes, "Pass the parsed ones")
    tops, spans = np.asarray(parses.labels), np.asarray(parses.spans)
    labelled = bool((tops >= 0)[np.asarray(parses.valid)].all())
    require(labelled, where, "every node needs a label", "single words without one", "Pass tag= to mbr_parse")
    bottoms = tops if parses.bottoms is None else np.asarray(parses.bottoms)
    words, exists = np.asarray(tokens), np.asarray(parses.valid)[:, 0]
    return [
        _tree(top.tolist(), bottom.tolist(), span.tolist(), row.tolist(), names) if one else None
        for top, bottom, span, row, one in zip(tops, bottoms, spans, words, exists, strict=True)
    ]


def _tree(tops: list[int], bottoms: list[int], spans: list[list[int]], words: list[int], names: SymbolNames) -> Tree:
    built: dict[int, Tree] = {}
    for p in reversed(range(2 * spans[0][1] - 1)):
        i, j = spans[p]
        leaf = j - i == 1
        children = (names.words[words[i]],) if leaf else (built[p + 1], built[p + 2 * (spans[p + 1][1] - i)])
        lowest = Tree(names.symbols[bottoms[p]], children)
        built[p] = lowest if tops[p] == bottoms[p] else Tree(names.symbols[tops[p]], (lowest,))
    return built[0]


def parse_mask(
    parses: Parses, max_tokens: int, *, nonterminals: int | None = None
) -> Bool[Array, "b i j"] | Bool[Array, "b i j s"]:
    """Which spans are nodes of the parse, those of one word included.

    Args:
      parses: The parses.
      max_tokens: t; the mask has axes i in 0..t-1 and j in 0..t.
      nonterminals: s: a mask by label, of nonterminals alone; ``None``: any label.

    Returns:
      The mask.

    Example:
      >>> spans, labels = jnp.array([[[0, 2], [0, 1], [1, 2]]]), jnp.array([[0, 1, 2]])
      >>> mask = parse_mask(Parses(spans, labels, jnp.ones((1, 3), bool), jnp.zeros(1)), 2)
      >>> mask[0].astype(int).tolist()
      [[0, 1, 1], [0, 0, 1]]
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, parses.labels.shape, 0)
    ends = (rows, parses.spans[..., 0], parses.spans[..., 1])
    if nonterminals is None:
        empty = jnp.zeros((len(parses.labels), max_tokens, max_tokens + 1), bool)
        return empty.at[ends].max(parses.valid)
    empty = jnp.zeros((len(parses.labels), max_tokens, max_tokens + 1, nonterminals), bool)
    return empty.at[(*ends, parses.labels)].max(parses.valid & (parses.labels < nonterminals), mode="drop")
