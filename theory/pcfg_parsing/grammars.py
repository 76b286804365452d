"""The random grammar and the sentences on which exact statements are checked, and the form that all claims have.

Every seed has the same rules with other probabilities, so that all that is compiled is compiled once. Broken grammars
are data too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream
from jaxft.structure import PCFG, Marginals, brute_force, inside_outside
from jaxft.structure.enumeration import Enumeration
from theory.claims import controlled_claim

PAPER = "arXiv 2303.08117"
NONTERMINALS, PRETERMINALS, WORDS, TOKENS = 3, 4, 6, 7
LENGTHS = np.array([7, 6, 5, 4, 3, 2, 1, 5], np.int32)
SETTING = {"nonterminals": NONTERMINALS, "preterminals": PRETERMINALS, "words": WORDS, "lengths": LENGTHS.tolist()}

RULES = (
    ((3, 4), (5, 6), (3, 1), (0, 4), (1, 2)),
    ((4, 5), (3, 6), (6, 0), (2, 5), (0, 2)),
    ((5, 3), (6, 4), (4, 2), (1, 3), (2, 1)),
)
"""Children of the rules of each nonterminal: two that end, one with a word on each side, one without a word."""
ENDING_FRAC = 0.5
"""Mass of the rules that end: derivations then end with probability 1."""

FAST_COMPILATION = {"xla_backend_optimization_level": 0}
"""All programs here are tiny and run a few times: optimising them would cost more than it saves."""
compiled = functools.partial(jax.jit, compiler_options=FAST_COMPILATION)


class Toy(NamedTuple):
    """A grammar and eight sentences of up to seven words."""

    grammar: PCFG
    tokens: jax.Array
    lengths: jax.Array
    log_terms: jax.Array
    """Log score of each preterminal at each word: programs take these, where a claim changes them."""


@functools.cache
def toy(seed: int) -> Toy:
    """Every word can be any preterminal, and a sentence of one word is the word of a preterminal."""
    draw = host_stream(seed, "grammar")
    a = NONTERMINALS + PRETERMINALS
    rule = np.zeros((NONTERMINALS, a, a))
    for parent, children in enumerate(RULES):
        ends, others = draw.dirichlet(np.ones(2)), draw.dirichlet(np.ones(len(children) - 2))
        left, right = np.array(children).T
        rule[parent, left, right] = np.concatenate([ENDING_FRAC * ends, (1 - ENDING_FRAC) * others])
    emit = draw.dirichlet(np.full(WORDS, 0.15), PRETERMINALS) * 0.98 + 0.02 / WORDS
    root = np.concatenate([0.9 * draw.dirichlet(np.ones(NONTERMINALS)), 0.1 * draw.dirichlet(np.ones(PRETERMINALS))])
    tokens = host_stream(seed, "sentences").integers(WORDS, size=(len(LENGTHS), TOKENS)).astype(np.int32)
    with np.errstate(divide="ignore"):
        grammar = PCFG(jnp.asarray(np.log(root)), jnp.asarray(np.log(rule)), jnp.asarray(np.log(emit)))
    log_terms = np.moveaxis(np.log(emit)[:, tokens], 0, 2)
    return Toy(grammar, jnp.asarray(tokens), jnp.asarray(LENGTHS), jnp.asarray(log_terms))


def other_grammar(seed: int) -> PCFG:
    """A grammar of the same rules with other probabilities."""
    return toy(seed + 1000).grammar


def swap_children(grammar: PCFG) -> PCFG:
    """The grammar of reversed sentences: every rule A -> B C becomes A -> C B."""
    return grammar._replace(log_rule=jnp.asarray(np.swapaxes(np.asarray(grammar.log_rule), 1, 2)))


def unseen_words(grammar: PCFG) -> PCFG:
    """The grammar with one word alone, whose trees are those of its own with the words summed out."""
    return grammar._replace(log_emit=jnp.zeros((PRETERMINALS, 1)))


@functools.cache
def enumerated(seed: int) -> tuple[Enumeration, ...]:
    """All derivations of each sentence of the toy."""
    case = toy(seed)
    return tuple(
        brute_force(case.grammar, row[:n]) for row, n in zip(np.asarray(case.tokens), LENGTHS.tolist(), strict=True)
    )


@compiled
def posteriors(grammar: PCFG, log_terms: jax.Array, lengths: jax.Array) -> Marginals:
    """Log Z, posteriors and expected rule counts, by the library's explicit outside pass."""
    return inside_outside(grammar, log_terms, lengths, counts=True)


def flat(*parts: Any) -> np.ndarray:
    """All numbers, on the host."""
    return np.concatenate([np.ravel(np.asarray(part, float)) for part in parts])


def to_padded(arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Arrays of several sizes in the corners of one array of zeros."""
    padded = np.zeros((len(arrays), *shape))
    for row, array in zip(padded, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return padded


make_claim = functools.partial(controlled_claim, "pcfg_parsing")
