"""Claims on what has no effect on posteriors: the scale of a word, names of symbols, the direction of reading."""

import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream
from jaxft.structure import Marginals
from theory.claims import Evidence
from theory.pcfg_parsing.grammars import (
    LENGTHS,
    NONTERMINALS,
    PAPER,
    PRETERMINALS,
    SETTING,
    TOKENS,
    flat,
    make_claim,
    posteriors,
    swap_children,
    toy,
)

SOURCE = f"derived; cf. {PAPER}"


def _numbers(found: Marginals) -> np.ndarray:
    return flat(found.log_z, found.span, found.tag)


def tilted_words(seed: int, *, by_symbol: bool = False) -> Evidence:
    """Posteriors with the scores of every word moved by a number; the control moves every preterminal's by another."""
    case = toy(seed)
    there = np.arange(TOKENS)[None] < LENGTHS[:, None]
    tilts = np.where(there[..., None], host_stream(seed, "tilts").normal(size=(*there.shape, PRETERMINALS)), 0)
    tilts = tilts if by_symbol else np.broadcast_to(tilts[..., :1], tilts.shape)
    exact = posteriors(case.grammar, case.log_terms, case.lengths)
    tilted = posteriors(case.grammar, jnp.asarray(np.asarray(case.log_terms) + tilts), case.lengths)
    moved = tilted._replace(log_z=np.asarray(tilted.log_z) - tilts[..., 0].sum(axis=1))
    return Evidence(_numbers(moved), _numbers(exact), setting=SETTING)


def renamed_symbols(seed: int, *, words_kept: bool = False) -> Evidence:
    """Posteriors with symbols numbered otherwise; the control leaves the words with the old numbers."""
    case, draw = toy(seed), host_stream(seed, "names")
    upper, lower = draw.permutation(NONTERMINALS), 1 + draw.permutation(PRETERMINALS - 1)
    lower = np.append(lower, 0)  # no order is the old one
    order = np.concatenate([upper, NONTERMINALS + lower])
    root, rule, terms = (np.asarray(x) for x in (case.grammar.log_root, case.grammar.log_rule, case.log_terms))
    renamed = case.grammar._replace(
        log_root=jnp.asarray(root[order]), log_rule=jnp.asarray(rule[upper][:, order][:, :, order])
    )
    found = posteriors(renamed, jnp.asarray(terms if words_kept else terms[..., lower]), case.lengths)
    exact = posteriors(case.grammar, case.log_terms, case.lengths)
    span, tag = np.asarray(exact.span)[..., upper], np.asarray(exact.tag)[..., lower]
    return Evidence(_numbers(found), flat(exact.log_z, span, tag), setting=SETTING)


def reversed_sentences(seed: int, *, same_grammar: bool = False) -> Evidence:
    """Posteriors of reversed sentences under the grammar with swapped children; the control does not swap them."""
    case = toy(seed)
    grammar = case.grammar if same_grammar else swap_children(case.grammar)
    terms = np.array(case.log_terms)
    for row, n in zip(terms, LENGTHS.tolist(), strict=True):
        row[:n] = row[:n][::-1].copy()
    found = posteriors(grammar, jnp.asarray(terms), case.lengths)
    exact = posteriors(case.grammar, case.log_terms, case.lengths)
    span, tag = np.array(exact.span), np.array(exact.tag)
    for of_spans, of_tags, n in zip(span, tag, LENGTHS.tolist(), strict=True):
        # The span [i, j) becomes [n - j, n - i).
        of_spans[:n, 1 : n + 1] = np.swapaxes(of_spans[:n, 1 : n + 1], 0, 1)[::-1, ::-1].copy()
        of_tags[:n] = of_tags[:n][::-1].copy()
    return Evidence(_numbers(found), flat(exact.log_z, span, tag), setting=SETTING)


CLAIMS = (
    make_claim(
        "tilted-words",
        "Scaling all scores of a word scales Z and leaves every posterior as it is.",
        SOURCE,
        "identity",
        tilted_words,
        {"by_symbol": True},
        "another scale for every preterminal",
        seeds=3,
    ),
    make_claim(
        "renamed-symbols",
        "The numbering of nonterminals and preterminals has no effect.",
        SOURCE,
        "identity",
        renamed_symbols,
        {"words_kept": True},
        "words emitted under the old numbers",
        seeds=3,
    ),
    make_claim(
        "reversed-sentences",
        "Reversed sentences under the grammar with swapped children have mirrored posteriors.",
        SOURCE,
        "identity",
        reversed_sentences,
        {"same_grammar": True},
        "children not swapped",
        seeds=3,
    ),
)
