"""What parsers that know the grammar reach, and those that know nothing: the scale for what probes find."""

from collections.abc import Callable, Mapping

import numpy as np

from experiments.pcfg_parsing.examples import ParsedSentences
from experiments.pcfg_parsing.prepare import Prepared, in_chunks
from experiments.pcfg_parsing.probing import bracketing, mean_f1
from jaxft.evaluation.selectivity import agreement_by_group, mean_agreement
from jaxft.evaluation.span_probes import branching, gap_depths, span_index, split_by_depth, token_depths, token_index
from jaxft.structure.derivations import viterbi
from jaxft.structure.parses import parse_mask


def _viterbi(prepared: Prepared) -> np.ndarray:
    grammar, test = prepared.grammar, prepared.test
    return np.concatenate(
        [
            np.asarray(parse_mask(viterbi(grammar, *part), test.tokens.shape[1]))[:n]
            for n, part in in_chunks(grammar, test.tokens, test.lengths)
        ]
    )


def _right(prepared: Prepared) -> np.ndarray:
    return branching(prepared.test.lengths, tokens=prepared.test.tokens.shape[1])


def _left(prepared: Prepared) -> np.ndarray:
    return branching(prepared.test.lengths, tokens=prepared.test.tokens.shape[1], right=False)


PARSERS: Mapping[str, Callable[[Prepared], np.ndarray]] = {
    "exact marginals": lambda prepared: bracketing(prepared.test.marginals, prepared.test.lengths),
    "exact depths": lambda prepared: split_by_depth(gap_depths(prepared.test.marginals), prepared.test.lengths),
    "most likely tree": _viterbi,
    "right branching": _right,
    "left branching": _left,
}
"""Name -> the trees of the test sentences: of greatest expected recall, split by depth, Viterbi's, and baselines."""


def parser_f1(prepared: Prepared, name: str) -> float:
    """Unlabelled sentence F1 of a parser against the trees that the sentences were drawn with."""
    return mean_f1(PARSERS[name](prepared), prepared.test)


def depth_ceilings(test: ParsedSentences) -> dict[str, float]:
    """Correlation, within places, of depths in the drawn tree with their exact expectation.

    The expectation is the best prediction in mean square: the words leave the tree open, and no reader knows more.
    """
    words, gaps = token_index(test.lengths), span_index(test.lengths, proper=False, width=2)
    found = {}
    for name, depths, index in (("depth", token_depths, words), ("constituency", gap_depths, gaps)):
        expected, gold = (depths(chart)[index.sentence, index.start] for chart in (test.marginals, test.gold))
        found[name] = mean_agreement(agreement_by_group(expected, gold, index.start)).pearson
    return found
