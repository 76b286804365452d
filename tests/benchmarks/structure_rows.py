"""The rows of the structure benchmark: a work, and the routes to it.

A route builds its input, and then is a function without arguments, called again and again. Random grammars are dense,
of 30 nonterminals, 60 preterminals and 200 words unless a row says otherwise.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_cast
from jaxft.data.treebank import encode_sentences, read_treebank, treebank_grammar
from jaxft.structure import (
    LowRankPCFG,
    clean_tree,
    explain,
    inside,
    inside_outside,
    length_distribution,
    mbr_parse,
    random_pcfg,
    sample_sentences,
    sampling_tables,
    to_dense,
    to_sparse,
    viterbi,
)
from jaxft.structure.pcfg import SymbolNames
from tests.benchmarks import structure_peers as peers
from tests.benchmarks.routes import Route, Row, Run


def make_row(name: str, *, quick: bool) -> Row:
    """A row by its name; growth has a module of its own."""
    if name == "treebank":
        return _treebank(quick)
    if name == "sampling":
        return _sampling(quick)
    if name == "low-rank":
        return _low_rank(*(12, 18, 6, 2, 8) if quick else (200, 300, 64, 4, 20))
    if name == "dense":
        return _dense(*(4, 8, 3, 4, 9) if quick else (8, 40, 30, 60, 200))
    return _long(*(2, 12, 3, 4, 9) if quick else (32, 80, 30, 60, 200))


def _problem(b: int, t: int, s: int, q: int, v: int):
    return random_pcfg(jax.random.key(0), s, q, v), jax.random.randint(jax.random.key(1), (b, t), 0, v)


def _posteriors(grammar, tokens, **options: Any) -> Run:
    return lambda: inside_outside(grammar, tokens, **options)


def _exact_spans(grammar, tokens, **options: Any) -> np.ndarray:
    """Posteriors of spans in float64."""
    with jax.enable_x64(True):
        return np.asarray(inside_outside(tree_cast(grammar, jnp.float64), tokens, chunks=2, **options).span)


def _dense(b: int, t: int, s: int, q: int, v: int) -> Row:
    grammar, tokens = _problem(b, t, s, q, v)

    def worst(spans) -> float:
        return float(np.abs(np.asarray(spans, np.float64) - _exact_spans(grammar, tokens)).max())

    def by_scan() -> Run:
        terms = jnp.moveaxis(grammar.log_emit[:, tokens], 0, 2)
        return lambda: peers.marginals_by_scan(grammar, terms)

    def scan_error(found) -> float:
        by_width = np.asarray(found[1])[..., :s]
        spans = np.zeros((b, t, t + 1, s))
        for i in range(t):
            spans[:, i, i + 1 :] = by_width[:, i, 1 : t + 1 - i]
        return worst(spans)

    def torch(count: int, what: str) -> Callable[[], Run]:
        def start() -> Run:
            make = peers.torch_struct_cfg(grammar, tokens[:count])
            return lambda: getattr(make(), what)

        return start

    def torch_error(found) -> float:
        by_width = found[-1].detach().numpy()  # at [width - 2, start]
        exact = _exact_spans(grammar, tokens)[: len(by_width)]
        pairs = [(by_width[:, w - 2, i], exact[:, i, i + w]) for w in range(2, t + 1) for i in range(t - w + 1)]
        return float(max(np.abs(found - wanted).max() for found, wanted in pairs))

    few = max(1, b // 4)
    part = f"{few} sentences, times {b // few}; the peak is that of {few}"
    marginals = "span and tag marginals, rule counts"
    return Row(
        f"{b} sentences of {t} words",
        f"{s} nonterminals, {q} preterminals, {v} words",
        {
            f"ours: {marginals}": Route(lambda: _posteriors(grammar, tokens, counts=True), lambda x: worst(x.span)),
            "ours: span and tag marginals": Route(lambda: _posteriors(grammar, tokens), lambda x: worst(x.span)),
            "ours: log Z": Route(lambda: lambda: inside(grammar, tokens).log_z),
            "ours, log space: span and tag marginals": Route(
                lambda: _posteriors(grammar, tokens, method="log"), lambda x: worst(x.span)
            ),
            f"plain jax, differentiated: {marginals}": Route(by_scan, scan_error),
            f"torch-struct: {marginals}": Route(
                torch(few, "marginals"), torch_error, lambda: few / b, part, needs="torch_struct", gib=b * t**2 * 5e-4
            ),
            "torch-struct: log Z": Route(
                torch(few, "partition"), None, lambda: few / b, part, needs="torch_struct", gib=b * t**2 * 2e-4
            ),
            f"torch-struct, {b} at once: {marginals}": Route(
                torch(b, "marginals"), torch_error, note="all at once", needs="torch_struct", gib=b * t**2 * 1.6e-3
            ),
        },
        "SynJax, published elsewhere, not of this run: 12.8 CPU-s and 1132 MB for the marginals of 8 sentences of 40 "
        "words.",
    )


def _long(b: int, t: int, s: int, q: int, v: int) -> Row:
    grammar, tokens = _problem(b, t, s, q, v)

    def worst(found) -> float:
        return float(np.abs(np.asarray(found.span, np.float64) - _exact_spans(grammar, tokens)).max())

    return Row(
        f"{b} sentences of {t} words",
        f"{s} nonterminals, {q} preterminals, {v} words",
        {
            "ours: span and tag marginals, rule counts": Route(
                lambda: _posteriors(grammar, tokens, counts=True), lambda x: worst(x)
            ),
            "ours: span and tag marginals": Route(lambda: _posteriors(grammar, tokens), lambda x: worst(x)),
            "ours: log Z": Route(lambda: lambda: inside(grammar, tokens).log_z),
        },
        "torch-struct's memory grows with sentences and the square of words: see above for 8 of 40 words.",
    )


def _treebank(quick: bool) -> Row:
    title = "Grammar of a treebank"
    found = os.environ.get("JAXFT_DATA")
    if not found or not Path(found, "treebank").is_dir():
        return Row(title, "", {}, skip="the environment variable JAXFT_DATA names no folder with a treebank")
    length, count = (10, 2) if quick else (25, 8)
    cleaned = (clean_tree(tree) for tree in read_treebank(Path(found, "treebank")))
    trees = [tree for tree in cleaned if tree is not None]
    if quick:
        trees = trees[:600]
    grammar = treebank_grammar(trees)
    sentences = [words for tree in trees if len(words := tree.leaves()) == length][:count]
    tokens = jnp.asarray(encode_sentences(grammar, sentences)[0])
    assert grammar.names is not None
    names = grammar.names.words
    few = min(2, count)

    def ours() -> Run:
        def run():
            posteriors = inside_outside(grammar, tokens)
            return posteriors, mbr_parse(posteriors.span, tag=posteriors.tag)

        return run

    def worst(found) -> float:
        return float(np.abs(np.asarray(found[0].span, np.float64) - _exact_spans(grammar, tokens)).max())

    def nltk() -> Run:
        from nltk.parse import ViterbiParser

        jobs = []
        for row in np.asarray(tokens[:few]).tolist():
            words = [names[i] for i in row]
            jobs.append((ViterbiParser(peers.nltk_grammar(grammar, words), max_time=float("inf")), words))
        return lambda: [next(iter(parser.parse(words))).logprob() * np.log(2) for parser, words in jobs]

    def differs(scores) -> float:
        best = np.asarray(viterbi(grammar, tokens[:few]).score)
        return float(np.abs(np.asarray(scores) / best - 1).max())

    sizes = f"{len(grammar.names.nonterminals)} nonterminals, {len(grammar.names.preterminals)} preterminals"
    dense = len(grammar.log_root) ** 2 * len(grammar.names.nonterminals) * 4 / 1e9
    part = f"{few} sentences, times {count // few}; the lexicon cut to the words of the sentence"
    return Row(
        title,
        f"{sizes}, {len(grammar.log_rule)} rules, {len(names)} words; {count} sentences of {length} words; "
        f"{explain(grammar, batch=count, tokens=length)}; as one tensor the rules would take {dense:.2g} GB",
        {
            "ours: marginals and MBR parses": Route(ours, worst),
            "ours: marginals and rule counts": Route(
                lambda: lambda: (inside_outside(grammar, tokens, counts=True),), worst
            ),
            "ours: log Z": Route(lambda: lambda: inside(grammar, tokens).log_z),
            "ours: best tree": Route(lambda: lambda: viterbi(grammar, tokens).score[:few], differs),
            "NLTK ViterbiParser: best tree": Route(nltk, differs, lambda: few / count, part, needs="nltk"),
        },
        "Of best trees the error is that of the log-probability against ours, relative. discodop could not be "
        "measured: its C sources do not compile for this Python.",
    )


def _low_rank(s: int, q: int, rank: int, b: int, t: int) -> Row:
    keys = jax.random.split(jax.random.key(0), 5)
    a, v = s + q, 200

    def rows_of(key, count: int, size: int):
        return jnp.log(jax.random.dirichlet(key, jnp.ones(size), (count,)))

    root = jnp.concatenate([rows_of(keys[0], 1, s)[0], jnp.full(q, -jnp.inf)])
    factors = rows_of(keys[1], s, rank), rows_of(keys[2], rank, a), rows_of(keys[3], rank, a)
    grammar = LowRankPCFG(root, *factors, rows_of(keys[4], q, v))
    tokens = jax.random.randint(jax.random.key(1), (b, t), 0, v)

    def worst(found) -> float:
        return float(np.abs(np.asarray(found.span, np.float64) - _exact_spans(grammar, tokens)).max())

    def dense() -> Run:
        expanded = to_dense(grammar)
        return lambda: inside_outside(expanded, tokens)

    return Row(
        f"Low rank: {a} symbols, rank {rank}",
        f"{s} nonterminals, {q} preterminals; {b} sentences of {t} words, span and tag marginals",
        {
            "ours, low rank": Route(lambda: _posteriors(grammar, tokens), worst),
            "ours, the rules as one tensor": Route(dense, worst),
        },
    )


def _sampling(quick: bool) -> Row:
    s, q, v, num, longest = (3, 4, 9, 50, 20) if quick else (30, 60, 200, 20_000, 60)
    names = SymbolNames(*([f"{k}{i}" for i in range(size)] for k, size in (("N", s), ("P", q), ("w", v))))
    grammar = random_pcfg(jax.random.key(0), s, q, v, rules_per_nonterminal=min(20, s * q), terminating_frac=0.55)
    grammar = to_sparse(grammar)._replace(names=names)
    law = np.exp(np.asarray(length_distribution(grammar, longest), np.float64))
    length = 2 + int(np.abs(np.log(np.maximum(law[2:], 1e-30) / 1e-3)).argmin())
    tried = 50 if quick else 20_000

    def ours() -> Run:
        tables = []

        def run():
            if not tables:
                tables.append(sampling_tables(grammar, length))
            return sample_sentences(tables[0], key=jax.random.key(2), num=num, lengths=length)

        return run

    def free() -> Run:
        tables = sampling_tables(grammar, longest)
        return lambda: sample_sentences(tables, key=jax.random.key(2), num=num)

    def nltk() -> Run:
        draw = peers.nltk_sampler(peers.nltk_grammar(grammar), seed=0)
        return lambda: [draw(length) for _ in range(tried)]

    def wrong_lengths(found) -> float:
        return float((np.asarray(found.lengths) != length).mean())

    def rate_error(found) -> float:
        hits = sum(words is not None and len(words) == length for words in found)
        expected = law[length] * tried
        return abs(hits - expected) / expected**0.5

    return Row(
        f"{num:,} sentences of exactly {length} words",
        f"{s} nonterminals, {q} preterminals, {len(grammar.log_rule)} rules; P(length {length}) = {law[length]:.2g}",
        {
            "ours, conditioned on the length": Route(ours, wrong_lengths, note="error: sentences of another length"),
            f"ours, any length up to {longest}": Route(free),
            "NLTK's productions at random, others rejected": Route(
                nltk,
                rate_error,
                lambda: tried * law[length] / num,
                f"{tried:,} draws, extrapolated by P; error: hits from the expected, in standard errors",
                needs="nltk",
            ),
        },
        "The first call of ours holds the tables.",
    )
