"""What a user of sampling, enumeration and prefix probabilities is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data import pcfg_corpus
from jaxft.structure import enumeration, lengths, parses, prefix, sampling
from jaxft.structure.pcfg import PCFG, LowRankPCFG, SymbolNames, random_pcfg

KEY = jax.random.key(0)
GRAMMAR = random_pcfg(KEY, 2, 2, 3, terminating_frac=0.6)


def branching(p: float) -> PCFG:
    """S -> S S with probability p, else X X: an even number of words."""
    rule = jnp.log(jnp.array([[[p, 0.0], [0.0, 1 - p]]]))
    return PCFG(jnp.log(jnp.array([1.0, 0.0])), rule, jnp.zeros((1, 1)))


CYCLE = branching(0.2)._replace(log_unary=jnp.log(jnp.array([[0.5, 0.0]])))
LARGE = LowRankPCFG(jnp.zeros(900), jnp.zeros((800, 2)), jnp.zeros((2, 900)), jnp.zeros((2, 900)), jnp.zeros((100, 5)))
TOKENS = jnp.zeros((1, 3), int)

CASES = {
    "odd length": (
        lambda: sampling.sample_sentences(branching(0.2), key=KEY, num=2, lengths=np.array([4, 5]), max_length=8),
        r"sentences of each length must exist, got \[5\]. Possible up to 8: 2, 4, 6, 8",
    ),
    "length beyond the tables": (
        lambda: sampling.sample_sentences(sampling.sampling_tables(GRAMMAR, 4), key=KEY, num=2, lengths=7),
        r"got \[7\]. Possible up to 4: 2, 3, 4",
    ),
    "length 0": (
        lambda: sampling.sample_sentences(GRAMMAR, key=KEY, num=1, lengths=0),
        "lengths must be positive, got 0",
    ),
    "no length": (lambda: sampling.sample_sentences(GRAMMAR, key=KEY, num=2), "lengths or max_length must be given"),
    "no sentence": (lambda: sampling.sampling_tables(branching(1.0), 5), "a sentence of at most 5 words, got none"),
    "nothing asked": (lambda: sampling.sample_sentences(GRAMMAR, key=KEY, num=0, max_length=4), "num must be at least"),
    "other tables": (
        lambda: sampling.sample_sentences(sampling.sampling_tables(GRAMMAR, 4), key=KEY, num=2, max_length=9),
        "Leave it out: 4",
    ),
    "traced grammar": (
        lambda: jax.jit(lambda g: sampling.sampling_tables(g, 4))(GRAMMAR),
        "Make the tables before jit",
    ),
    "large low-rank grammar": (lambda: sampling.sampling_tables(LARGE, 4), "must fit as a dense one, got 648000000"),
    "no greatest length": (lambda: lengths.length_log_probs(GRAMMAR, 0), "max_length must be at least 1, got 0"),
    "infinite expectation": (
        lambda: lengths.expected_length(branching(0.6)),
        "must be consistent, got spectral radius 1.2",
    ),
    "infinite entropy": (lambda: lengths.grammar_entropy(branching(0.5)), "spectral radius 1"),
    "radius of a traced grammar": (lambda: jax.jit(lengths.spectral_radius)(GRAMMAR), "Call it outside jit"),
    "endless prefixes": (lambda: prefix.prefix_log_probability(branching(0.6), TOKENS), "must be consistent"),
    "unknown word": (lambda: prefix.prefix_log_probability(GRAMMAR, TOKENS + 3), r"0..2, got \[3, 3, 3\]"),
    "one sentence": (lambda: prefix.next_word_log_probs(GRAMMAR, TOKENS[0]), "Add the axis of sentences"),
    "other lengths": (
        lambda: prefix.next_word_log_probs(GRAMMAR, TOKENS, jnp.ones(2, int)),
        r"lengths must be \[1\], one a sentence, got \(2,\)",
    ),
    "large rule tensor": (lambda: prefix.prefix_log_probability(LARGE, TOKENS), "Use a smaller grammar"),
    "too many derivations": (lambda: enumeration.brute_force(GRAMMAR, [0] * 9), "Shorten the sentence, or raise limit"),
    "empty sentence": (lambda: enumeration.brute_force(GRAMMAR, []), "one or more of 0..2"),
    "unlisted word": (lambda: enumeration.brute_force(GRAMMAR, [0, 3]), r"0..2, got \[0, 3\]"),
    "endless chains": (lambda: enumeration.brute_force(CYCLE, [0, 0]), "Pass max_chain"),
    "too many fillings": (
        lambda: enumeration.enumerated_masked_posterior(GRAMMAR, [0] * 9, [True] * 9),
        "at most 10000 fillings of the masks, got 19683",
    ),
    "other sentences": (
        lambda: parses.parses_to_trees(
            sampling.sample_sentences(GRAMMAR, key=KEY, num=2, lengths=3).parses, TOKENS, SymbolNames([], [], [])
        ),
        "1 sentences and 2 parses",
    ),
    "unknown masking": (
        lambda: pcfg_corpus.mask_corpus(
            pcfg_corpus.encode_corpus(TOKENS, jnp.array([3]), pcfg_corpus.CorpusLayout(3)),
            pcfg_corpus.CorpusLayout(3),
            key=KEY,
            masking="brt",  # pyright: ignore[reportArgumentType]
        ),
        "Did you mean bert",
    ),
    "nothing masked": (
        lambda: pcfg_corpus.mask_corpus(
            pcfg_corpus.encode_corpus(TOKENS, jnp.array([3]), pcfg_corpus.CorpusLayout(3)),
            pcfg_corpus.CorpusLayout(3),
            key=KEY,
            mask_frac=0.0,
        ),
        r"mask_frac must lie in \(0, 1\]",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_user_is_told_what_is_wrong(case):
    call, said = CASES[case]
    with pytest.raises(ValueError, match=said):
        call()
