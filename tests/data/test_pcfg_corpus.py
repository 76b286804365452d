import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxft.data.english_grammar import RULES, WORDS, english_grammar
from jaxft.data.pcfg_corpus import (
    CorpusLayout,
    corpus_batch,
    encode_corpus,
    hidden_words,
    mask_corpus,
    sample_corpus,
)
from jaxft.structure.lengths import expected_length, is_consistent, length_distribution
from jaxft.structure.parses import parses_to_trees
from jaxft.structure.sampling import sampling_tables

MAX_LENGTH = 12
GRAMMAR = english_grammar()
LAYOUT = CorpusLayout(words=168)


@pytest.fixture(scope="module")
def tables():
    return sampling_tables(GRAMMAR, MAX_LENGTH)


def test_weights_of_the_english_grammar_are_percent():
    assert {sum(rules.values()) for rules in RULES.values()} == {100}
    weighted = [[float(w) for w in re.findall(r":(\d+)", words)] for words in WORDS.values() if ":" in words]
    assert {sum(weights) for weights in weighted} == {100}


def test_english_grammar_is_proper_consistent_and_as_large_as_it_says():
    np.testing.assert_allclose(np.exp(GRAMMAR.log_rule).sum(axis=(1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(GRAMMAR.log_emit).sum(axis=1), 1, rtol=1e-6)
    assert (GRAMMAR.log_rule.shape, GRAMMAR.log_emit.shape) == ((17, 37, 37), (20, 168))
    assert int(jnp.isfinite(GRAMMAR.log_rule).sum()) == 111
    assert is_consistent(GRAMMAR)
    masses = np.exp(np.asarray(length_distribution(GRAMMAR, 300), float))
    assert masses @ np.arange(301) == pytest.approx(float(expected_length(GRAMMAR)), rel=1e-3)


def test_verbs_agree_with_their_subjects(tables):
    corpus = sample_corpus(tables, seed=3, size=200)
    assert GRAMMAR.names is not None
    trees = parses_to_trees(corpus.parses, corpus.tokens, GRAMMAR.names)
    nodes = [node for tree in trees if tree is not None for node in tree.subtrees() if node.label == "S"]
    pairs = Counter(tuple(getattr(child, "label", child) for child in node.children) for node in nodes)
    clauses = {pair for pair in pairs if pair[1] in ("VPs", "VPp", "Vis", "Vip")}
    singular = {pair for pair in clauses if pair[0] in ("NPs", "Pros", "Name")}
    plural = {pair for pair in clauses if pair[0] in ("NPp", "Prop", "Np")}
    assert singular | plural == clauses
    assert {verb for _, verb in singular} == {"VPs", "Vis"}
    assert {verb for _, verb in plural} == {"VPp", "Vip"}


def test_a_corpus_is_a_function_of_seed_name_and_position(tables):
    corpus = sample_corpus(tables, seed=0, size=20)
    part = sample_corpus(tables, seed=0, size=20, start=5)
    assert (corpus.tokens[5:] == part.tokens[:15]).all()
    for other in (sample_corpus(tables, seed=1, size=20), sample_corpus(tables, seed=0, size=20, name="validation")):
        assert not (corpus.tokens == other.tokens).all()


def test_batches_are_the_same_inside_jit_and_cover_the_corpus(tables):
    make = jax.jit(lambda tables, step: corpus_batch(tables, LAYOUT, seed=0, step=step, batch_size=4))
    batch, eager = make(tables, 2), corpus_batch(tables, LAYOUT, seed=0, step=2, batch_size=4)
    jax.tree.map(np.testing.assert_array_equal, batch, eager)
    corpus = sample_corpus(tables, seed=0, size=12)
    assert (batch.samples.tokens == corpus.tokens[8:]).all()
    assert not (make(tables, 3).labels == batch.labels).all()


@pytest.mark.parametrize("boundaries", [True, False])
def test_encoding_puts_words_between_boundaries_and_pads(boundaries):
    layout = CorpusLayout(words=6, boundaries=boundaries)
    batch = encode_corpus(np.array([[5, 0, 1], [2, 9, 9]]), np.array([3, 1]), layout)
    rows = [[9, 4, 5], [6, 0, 0]]
    if boundaries:
        rows = [[2, 9, 4, 5, 3], [2, 6, 3, 0, 0]]
    assert batch.input_ids.tolist() == rows
    assert (batch.attention_mask == (batch.input_ids > 0)).all()
    assert layout.word_positions(batch.input_ids, 3).tolist()[0] == [9, 4, 5]


def test_labels_restore_the_words_and_the_rest_is_untouched(tables):
    corpus = sample_corpus(tables, seed=0, size=200)
    batch = encode_corpus(corpus.tokens, corpus.lengths, LAYOUT)
    masked, labels = mask_corpus(batch, LAYOUT, key=jax.random.key(0))
    chosen = np.asarray(labels >= 0)
    assert (np.where(chosen, labels, masked.input_ids) == batch.input_ids).all()
    assert (np.asarray(masked.input_ids)[chosen] == LAYOUT.mask_id).all()
    assert (np.asarray(batch.input_ids)[chosen] >= LAYOUT.first_word_id).all()
    assert chosen.sum(axis=1).min() >= 1
    hidden = hidden_words(labels, LAYOUT, MAX_LENGTH)
    assert hidden.sum() == chosen.sum()
    assert not bool((hidden & (jnp.arange(MAX_LENGTH).reshape(1, -1) >= corpus.lengths[:, None])).any())


def test_bert_masking_has_its_fractions():
    layout = CorpusLayout(words=50)
    batch = encode_corpus(jnp.zeros((400, 50), jnp.int32), jnp.full(400, 50), layout)
    masked, labels = mask_corpus(batch, layout, key=jax.random.key(1), mask_frac=0.3, masking="bert")
    chosen = np.asarray(labels >= 0)
    ids = np.asarray(masked.input_ids)[chosen]
    counts = [(ids == layout.mask_id).sum(), (ids == layout.first_word_id).sum(), (ids > layout.first_word_id).sum()]
    # A random word is the old one in 1 of 50.
    expected = np.array([0.8, 0.102, 0.098]) * len(ids)
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
    assert scipy.stats.binomtest(int(chosen.sum()), 400 * 50, 0.3).pvalue > 1e-3
    assert scipy.stats.chisquare(counts, np.array([0.7, 0.2, 0.1]) * len(ids)).pvalue < 1e-6
