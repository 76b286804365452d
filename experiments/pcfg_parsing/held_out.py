"""Parsing trees that the grammar was not read from: labelled F1 of the best tree and of greatest expected recall."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxft.data.batching import length_buckets
from jaxft.data.treebank import coverage, encode_sentences
from jaxft.structure.binarize import BinarizationScheme, from_binary
from jaxft.structure.decode import mbr_parse
from jaxft.structure.derivations import viterbi
from jaxft.structure.inside_outside import inside_outside
from jaxft.structure.parse_metrics import EVALB, bracket_scores
from jaxft.structure.parses import parses_to_trees
from jaxft.structure.pcfg import SparsePCFG
from jaxft.structure.tree_distances import branching_tree
from jaxft.structure.trees import Tree

BATCH = 16
COLUMNS = ("parser", "labelled F1", "precision", "recall", "unlabelled F1", "exact match", "without a parse")
UNLABELLED = dataclasses.replace(EVALB, labelled=False)


def held_out_rows(
    grammar: SparsePCFG, trees: Sequence[Tree], scheme: BinarizationScheme, *, max_words: int
) -> list[dict[str, Any]]:
    """A row of ``COLUMNS`` for each parser, on the trees of 2 to ``max_words`` words, by the conventions of evalb."""
    gold = [tree for tree in trees if 2 <= len(tree.leaves()) <= max_words]
    found = _parses(grammar, gold, scheme)
    found["right branching"] = [branching_tree(tree.leaves(), tags=tree.tags()) for tree in gold]
    return [_row(name, predicted, gold) for name, predicted in found.items()]


def coverage_note(grammar: SparsePCFG, trees: Sequence[Tree], scheme: BinarizationScheme) -> str:
    """How much of the held-out trees the grammar knows, in words."""
    known = coverage(grammar, trees, scheme=scheme)
    return (
        f"Of the {len(trees)} held-out trees the grammar knows {known.tokens:.1%} of the words, {known.rules:.1%} of "
        f"the rules used and {known.emissions:.1%} of the words under their tag; {known.derivable:.1%} of the trees "
        "are derivable."
    )


def _parses(grammar: SparsePCFG, gold: Sequence[Tree], scheme: BinarizationScheme) -> dict[str, list[Tree | None]]:
    """Trees by parser, in the order of ``gold``; batches of like length share compiled programs."""
    found: dict[str, list[Tree | None]] = {name: [None] * len(gold) for name in ("best tree", "expected recall")}
    sentences, names = [tree.leaves() for tree in gold], grammar.names
    assert names is not None  # a grammar of a treebank
    for rows, length in length_buckets([len(words) for words in sentences], batch_size=BATCH, multiple=10):
        padded = [*rows.tolist(), *[int(rows[-1])] * (BATCH - len(rows))]
        tokens, lengths = map(jnp.asarray, encode_sentences(grammar, [sentences[r] for r in padded], length=length))
        marginals = inside_outside(grammar, tokens, lengths)
        parsed = {
            "best tree": viterbi(grammar, tokens, lengths),
            "expected recall": mbr_parse(marginals.span, lengths, tag=marginals.tag),
        }
        for name, parses in parsed.items():
            exists = parses.valid & marginals.parsable[:, None]
            for row, tree in zip(rows, parses_to_trees(parses._replace(valid=exists), tokens, names), strict=False):
                found[name][row] = None if tree is None else from_binary(tree, scheme)
    return found


def _row(name: str, predicted: Sequence[Tree | None], gold: Sequence[Tree]) -> dict[str, Any]:
    labelled = bracket_scores(predicted, gold)
    unlabelled = bracket_scores(predicted, gold, convention=UNLABELLED)
    return {
        "parser": name,
        "labelled F1": labelled.f1,
        "precision": labelled.precision,
        "recall": labelled.recall,
        "unlabelled F1": unlabelled.f1,
        "exact match": labelled.exact_match,
        "without a parse": labelled.failed,
    }
