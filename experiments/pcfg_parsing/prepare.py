"""From a configuration to what is trained on and measured: grammar, held-out masks, parsed sentences.

Everything is a function of the configuration, and is made again at every start.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.pcfg_parsing.config import PcfgParsingConfig, Target
from experiments.pcfg_parsing.corpus import Source, load_grammar
from experiments.pcfg_parsing.examples import ParsedSentences, ProbeTask, probe_tasks
from jaxft.core.rng import stream
from jaxft.core.types import TokenBatch
from jaxft.data.pcfg_corpus import CorpusLayout, encode_corpus, hidden_words, mask_corpus, sample_corpus
from jaxft.structure.inside_outside import inside, inside_outside
from jaxft.structure.masked_words import masked_word_posterior
from jaxft.structure.parses import parse_mask
from jaxft.structure.pcfg import PCFG, SparsePCFG, num_nonterminals
from jaxft.structure.sampling import Samples, SamplingTables, sampling_tables

CHART_CELLS = 2**22
"""Cells of the charts, rules and words at once: a treebank grammar of thousands of rules takes gigabytes beyond."""

MOST_SENTENCES = 64
"""Sentences parsed at once: all that is parsed shares one program."""

UNIGRAM_SENTENCES = 4096


class Heldout(NamedTuple):
    """Held-out sentences with fixed masks, and what the grammar knows of the hidden words."""

    batch: TokenBatch
    rows: Int[np.ndarray, "m"]
    """Sentence of each hidden word."""
    columns: Int[np.ndarray, "m"]
    """Its place among the tokens of the batch."""
    log_bayes: Float[np.ndarray, "m v"]
    """Exact posterior of the hidden word given all that is shown, its length included."""
    bayes_loss_nats: float
    """Mean entropy of the posterior: no model's expected loss is less."""
    unigram_loss_nats: float
    """Expected loss of the frequencies of words: of a model that reads nothing."""
    wrong_loss_nats: float
    """Expected loss of the posterior of the grammar whose rules are all equally likely."""

    @property
    def words(self) -> int:
        """Hidden words, m."""
        return len(self.rows)


class Language(NamedTuple):
    """A grammar, where it is from, and how it is drawn from."""

    source: Source
    tables: SamplingTables


def load_language(config: PcfgParsingConfig) -> Language:
    """Reads the grammar, so that its faults are known before a run is made.

    Raises:
      UserError: The grammar or treebank is faulty, or has no sentences up to the greatest length.
    """
    source = load_grammar(config.corpus)
    return Language(source, sampling_tables(source.grammar, config.corpus.max_length))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that training and measuring need."""

    source: Source
    tables: SamplingTables
    heldout: Heldout
    train: ParsedSentences
    """Sentences that probes are fitted to."""
    test: ParsedSentences
    tasks: dict[Target, ProbeTask]

    @property
    def grammar(self) -> PCFG | SparsePCFG:
        """The grammar of all sentences."""
        return self.source.grammar

    @property
    def layout(self) -> CorpusLayout:
        """How words become tokens of a network."""
        return CorpusLayout(words=self.grammar.log_emit.shape[1])


def prepare(config: PcfgParsingConfig, language: Language) -> Prepared:
    """Draws the sentences of evaluation and probes, and parses them exactly."""
    source, tables = language
    grammar = source.grammar
    probing = config.probing
    sizes = (probing.test_sentences, probing.train_sentences, config.evaluation_sentences, UNIGRAM_SENTENCES)
    # All in one draw: to compile it takes longer than to draw.
    drawn = sample_corpus(tables, seed=config.seed, size=sum(sizes), name="evaluation")
    ends = np.cumsum(sizes)
    parts = [jax.tree.map(lambda x, i=i, j=j: x[i:j], drawn) for i, j in zip(ends - sizes, ends, strict=True)]
    test, train = (parsed_sentences(grammar, part) for part in parts[:2])
    tasks = probe_tasks(train, test, probing, seed=config.seed)
    heldout = held_out(grammar, parts[2], parts[3], config)
    return Prepared(source, tables, heldout, train, test, tasks)


def parsed_sentences(grammar: PCFG | SparsePCFG, drawn: Samples) -> ParsedSentences:
    """Sentences with their trees and exact span posteriors."""
    tokens, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
    t = tokens.shape[1]
    wide = np.arange(t + 1)[None, None] - np.arange(t)[None, :, None] >= 2
    gold = np.asarray(parse_mask(drawn.parses, t)) & wide
    labels = np.full(gold.shape, -1)
    spans, valid = np.asarray(drawn.parses.spans), np.asarray(drawn.parses.valid)
    b, node = np.nonzero(valid & (spans[..., 1] - spans[..., 0] >= 2))
    labels[b, spans[b, node, 0], spans[b, node, 1]] = np.asarray(drawn.parses.labels)[b, node]
    marginals = np.where(wide, exact_marginals(grammar, tokens, lengths), 0)
    return ParsedSentences(tokens, lengths, gold, labels, marginals)


def exact_marginals(
    grammar: PCFG | SparsePCFG, tokens: Int[np.ndarray, "b t"], lengths: Int[np.ndarray, "b"]
) -> Float[np.ndarray, "b i j"]:
    """Probability that each span of two words or more is a constituent, whatever its label."""
    return np.concatenate([_span_posterior(grammar, *part)[:n] for n, part in in_chunks(grammar, tokens, lengths)])


# Not compiled here: with the rules of a sparse grammar traced there would be the dense route alone.
def _span_posterior(grammar: PCFG | SparsePCFG, words: Array, sizes: Array) -> Float[Array, "b i j"]:
    span = inside_outside(grammar, words, sizes).span
    if grammar.log_unary is None:
        return span.sum(axis=3)
    # A chain of unary rules is several nodes over one span, of which the last alone branches.
    log_alpha = inside(grammar, words, sizes).log_alpha()
    alpha = jnp.exp(log_alpha - jnp.maximum(log_alpha.max(axis=3, keepdims=True), -1e30))
    branching = alpha - alpha @ jnp.exp(grammar.log_unary[:, : num_nonterminals(grammar)]).T
    return (span * jnp.where(alpha > 0, branching / jnp.where(alpha > 0, alpha, 1), 0)).sum(axis=3)


def masked_posterior(
    grammar: PCFG | SparsePCFG,
    tokens: Int[np.ndarray, "b t"],
    lengths: Int[np.ndarray, "b"],
    mask: Bool[np.ndarray, "b t"],
) -> Float[np.ndarray, "m v"]:
    """Exact posterior of every masked word, in the order of ``np.nonzero(mask)``."""
    found = []
    for n, (words, sizes, hidden) in in_chunks(grammar, tokens, lengths, mask):
        posterior = masked_word_posterior(grammar, words, sizes, mask=hidden)
        found.append(np.asarray(posterior)[:n][np.asarray(hidden)[:n]])
    return np.concatenate(found)


def in_chunks(grammar: PCFG | SparsePCFG, *arrays: np.ndarray) -> Iterator[tuple[int, list[Array]]]:
    """Rows of arrays, a few at a time, and how many are new: the last part is filled up, so that all have one shape."""
    b, t = arrays[0].shape
    cells = t * (t * num_nonterminals(grammar) + grammar.log_rule.size + grammar.log_emit.shape[1])
    size = min(MOST_SENTENCES, max(1, CHART_CELLS // cells))
    for first in range(0, b, size):
        rows = np.minimum(np.arange(first, first + size), b - 1)
        yield min(size, b - first), [jnp.asarray(x[rows]) for x in arrays]


def held_out(grammar: PCFG | SparsePCFG, drawn: Samples, others: Samples, config: PcfgParsingConfig) -> Heldout:
    """Held-out sentences, whose masks are the same for every network; a hidden word is always the mask token.

    The frequencies of words are those of other sentences.
    """
    tokens, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
    layout = CorpusLayout(words=grammar.log_emit.shape[1])
    batch, labels = mask_corpus(
        encode_corpus(tokens, lengths, layout),
        layout,
        key=stream(jax.random.key(config.seed), "held-out masks"),
        mask_frac=config.training.mask_frac,
    )
    rows, columns = np.nonzero(np.asarray(labels) >= 0)
    mask = np.asarray(hidden_words(labels, layout, tokens.shape[1]))
    bayes, wrong = (masked_posterior(g, tokens, lengths, mask) for g in (grammar, equal_rules(grammar)))
    words = np.asarray(others.tokens)[np.arange(tokens.shape[1])[None] < np.asarray(others.lengths)[:, None]]
    unigram = np.bincount(words, minlength=bayes.shape[1]) + 1.0
    log_bayes, log_wrong = (np.log(np.maximum(p, 1e-30)).astype(np.float32) for p in (bayes, wrong))
    return Heldout(
        batch,
        rows,
        columns,
        log_bayes,
        expected_loss(log_bayes, log_bayes),
        expected_loss(log_bayes, np.log(unigram / unigram.sum())[None]),
        expected_loss(log_bayes, log_wrong),
    )


def expected_loss(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Mean over rows of the cross-entropy of q under p, in nats."""
    return float(-(np.exp(log_p.astype(np.float64)) * log_q.astype(np.float64)).sum(axis=1).mean())


def equal_rules(grammar: PCFG | SparsePCFG) -> PCFG | SparsePCFG:
    """The same rules, those of each parent equally likely: a grammar that knows what is possible, not how often."""
    if isinstance(grammar, SparsePCFG):
        rules = jax.ops.segment_sum(jnp.exp(0 * grammar.log_rule), grammar.lhs, num_nonterminals(grammar))
        return grammar._replace(log_rule=-jnp.log(rules)[grammar.lhs])
    there = jnp.isfinite(grammar.log_rule)
    rules = jnp.maximum(there.sum(axis=(1, 2), keepdims=True), 1).astype(grammar.log_rule.dtype)
    return grammar._replace(log_rule=jnp.where(there, -jnp.log(rules), -jnp.inf))


def gap_to_bayes(log_model: Float[np.ndarray, "m v"], heldout: Heldout) -> tuple[float, float]:
    r"""Mean over hidden words of $\mathrm{KL}(\text{Bayes} \Vert \text{model})$ in nats, and its standard error.

    The expected loss of the model on these sentences and masks is the Bayes loss and this gap: no word is drawn, so
    that the gap is known far better than either loss, and cannot be negative.
    """
    p = np.exp(heldout.log_bayes.astype(np.float64))
    kl = (p * (heldout.log_bayes.astype(np.float64) - log_model.astype(np.float64))).sum(axis=1)
    mean = float(kl.mean())
    counts = np.bincount(heldout.rows)
    residual = np.bincount(heldout.rows, weights=kl) - mean * counts
    return mean, float(np.sqrt((residual**2).sum()) / counts.sum())
