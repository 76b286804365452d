"""Claims on charts and posteriors: each is what the list of all derivations says, whatever the route."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream
from jaxft.structure import (
    LowRankPCFG,
    Marginals,
    SparsePCFG,
    brute_force,
    inside,
    inside_outside,
    outside,
    to_dense,
    tree_entropy,
    tree_kl,
)
from theory.claims import Evidence
from theory.pcfg_parsing.grammars import (
    LENGTHS,
    NONTERMINALS,
    PAPER,
    PRETERMINALS,
    SETTING,
    TOKENS,
    Toy,
    compiled,
    enumerated,
    flat,
    make_claim,
    other_grammar,
    posteriors,
    swap_children,
    to_padded,
    toy,
)

LARI_YOUNG = "Lari and Young 1990"
FLOOR = -1e30
"""Stands for minus infinity where derivatives are taken."""


def sentence_probability(seed: int, *, swapped: bool = False) -> Evidence:
    """Log Z against enumeration; the control swaps the children of every rule."""
    case = toy(seed)
    grammar = swap_children(case.grammar) if swapped else case.grammar
    measured = np.asarray(posteriors(grammar, case.log_terms, case.lengths).log_z)
    return Evidence(measured, np.array([found.log_z for found in enumerated(seed)]), setting=SETTING)


def derivation_count(seed: int, *, forbidden: bool = False) -> Evidence:
    """Z with all scores 1 against the number of derivations; the control forbids one rule."""
    case = toy(seed)
    rule = np.where(np.isfinite(np.asarray(case.grammar.log_rule)), 0, -np.inf)
    if forbidden:
        rule[0, 0, 4] = -np.inf
    ones = case.grammar._replace(log_rule=jnp.asarray(rule), log_root=jnp.zeros_like(case.grammar.log_root))
    measured = posteriors(ones, jnp.zeros_like(case.log_terms), case.lengths).log_z
    counts = np.array([len(found.derivations) for found in enumerated(seed)], float)
    return Evidence(np.exp(np.asarray(measured)), counts, setting=SETTING)


@compiled
def _charts(case: Toy) -> tuple[jax.Array, jax.Array]:
    chart = inside(case.grammar, case.log_terms, case.lengths)
    return chart.log_alpha(), outside(case.grammar, case.log_terms, case.lengths)


def inside_and_outside(seed: int, *, closed: bool = False) -> Evidence:
    """Log inside and outside probabilities of every span of five words; the control reads spans with closed ends."""
    case, row = toy(seed), 2
    n, words = int(LENGTHS[row]), np.asarray(case.tokens[row])
    log_alpha = np.full((TOKENS, TOKENS + 1, NONTERMINALS), -np.inf)
    for symbol in range(NONTERMINALS):
        root = np.full(NONTERMINALS + PRETERMINALS, -np.inf)
        root[symbol] = 0
        grammar = case.grammar._replace(log_root=jnp.asarray(root))
        for i in range(n):
            for j in range(i + 1, n + 1):
                log_alpha[i, j, symbol] = brute_force(grammar, words[i:j]).log_z
    found = enumerated(seed)[row]
    joint = to_padded([found.spans()], log_alpha.shape)[0] * np.exp(found.log_z)
    used = joint > 0
    log_beta = np.log(np.where(used, joint, 1)) - np.where(used, log_alpha, 0)
    measured = [np.asarray(chart[row]) for chart in _charts(case)]
    if closed:
        measured = [np.roll(chart, 1, axis=1) for chart in measured]
    possible = np.isfinite(log_alpha)
    predicted = flat(possible, np.where(possible, log_alpha, 0), log_beta)
    finite = np.where(np.isfinite(measured), measured, 0)
    return Evidence(flat(np.isfinite(measured[0]), finite[0], np.where(used, finite[1], 0)), predicted, setting=SETTING)


def node_posteriors(seed: int, *, closed: bool = False) -> Evidence:
    """Posteriors of spans, tags and roots against enumeration; the control reads spans with closed ends."""
    case, found = toy(seed), enumerated(seed)
    exact = posteriors(case.grammar, case.log_terms, case.lengths)
    span = np.roll(np.asarray(exact.span), 1, axis=2) if closed else exact.span
    predicted = flat(
        to_padded([e.spans() for e in found], (TOKENS, TOKENS + 1, NONTERMINALS)),
        to_padded([e.tags() for e in found], (TOKENS, PRETERMINALS)),
        [e.roots() for e in found],
    )
    return Evidence(flat(span, exact.tag, exact.root), predicted, setting=SETTING)


def rule_counts(seed: int, *, swapped: bool = False) -> Evidence:
    """Expected uses of every rule over all sentences; the control swaps the children of every rule."""
    case = toy(seed)
    grammar = swap_children(case.grammar) if swapped else case.grammar
    measured = _counts(posteriors(grammar, case.log_terms, case.lengths))
    return Evidence(np.asarray(measured), sum(e.rules()[0] for e in enumerated(seed)), setting=SETTING)


def _counts(found: Marginals) -> Any:
    counts: Any = found.counts
    return counts.log_rule


def scores_to_marginals(seed: int, *, by_probability: bool = False) -> Evidence:
    """Derivatives of log Z of a textbook recursion against the explicit outside pass.

    The control differentiates by probabilities where it should by their logarithms.
    """
    case = toy(seed)
    node = np.zeros((len(LENGTHS), TOKENS, TOKENS + 1, NONTERMINALS + PRETERMINALS))
    position = np.arange(TOKENS)
    node[:, position, position + 1, :NONTERMINALS] = FLOOR
    node[:, position, position + 1, NONTERMINALS:] = case.log_terms
    scores = [np.maximum(np.asarray(x), FLOOR) for x in (case.grammar.log_rule, case.grammar.log_root)]
    by_rule, by_root, by_node = (np.asarray(x) for x in _gradients(*scores, node, case.lengths))
    if by_probability:
        by_rule = by_rule / np.where(by_rule > 0, np.exp(scores[0]), 1)
    exact = posteriors(case.grammar, case.log_terms, case.lengths)
    predicted = flat(_counts(exact), np.asarray(exact.root).sum(axis=0), exact.span, exact.tag)
    span, tag = by_node[..., :NONTERMINALS], by_node[:, position, position + 1, NONTERMINALS:]
    return Evidence(flat(by_rule, by_root, span, tag), predicted, setting=SETTING)


@compiled
def _gradients(rule: jax.Array, root: jax.Array, node: jax.Array, lengths: jax.Array) -> Any:
    """In reverse mode through all steps of the recursion, by the scores of rules, roots and nodes."""
    return jax.grad(_textbook_log_z, argnums=(0, 1, 2))(rule, root, node, lengths)


def _textbook_log_z(rule: jax.Array, root: jax.Array, node: jax.Array, lengths: jax.Array) -> jax.Array:
    """Summed log Z in log space, with a score for every node ``[b, i, j, a]``: of a word, or added to what it has."""
    start, end = jnp.arange(TOKENS)[:, None], jnp.arange(TOKENS + 1)[None]
    width = (end - start)[None, :, :, None]
    tall, scored = node[..., NONTERMINALS:], node[..., :NONTERMINALS]
    words = jnp.where(width == 1, tall, FLOOR)

    def grow(chart, size):
        left, right = chart[:, :, :TOKENS], chart
        pairs = left[:, :, :, None, :, None] + right[:, None, :, :, None]  # [b, i, k, j, B, C]
        pairs = jax.nn.logsumexp(pairs, axis=2)[:, :, :, None]
        value = jax.nn.logsumexp(pairs + rule[None, None, None], axis=(4, 5)) + scored
        grown = jnp.where(width == size, value, chart[..., :NONTERMINALS])
        return jnp.concatenate([grown, words], axis=3), None

    first = jnp.concatenate([jnp.full_like(scored, FLOOR), words], axis=3)
    chart, _ = jax.lax.scan(grow, first, jnp.arange(2, TOKENS + 1))
    whole = jnp.take_along_axis(chart[:, 0], lengths[:, None, None], axis=1)[:, 0]
    return jax.nn.logsumexp(whole + root[None], axis=1).sum()


RANK = 3


def routes_agree(seed: int, *, missing: bool = False) -> Evidence:
    """Posteriors by the low-rank, log-space and rule-by-rule routes against those by scaled matrix products.

    The control leaves a component out of the factors.
    """
    case, draw = toy(seed), host_stream(seed, "low rank")
    a = NONTERMINALS + PRETERMINALS
    shapes = ((NONTERMINALS, RANK), (RANK, a), (RANK, a))
    head, left, right = (np.log(draw.dirichlet(np.ones(size), rows)) for rows, size in shapes)
    factors = jnp.asarray(head), jnp.asarray(left), jnp.asarray(right)
    low = LowRankPCFG(case.grammar.log_root, *factors, case.grammar.log_emit)
    dense = to_dense(low)
    scaled = _posterior_numbers(posteriors(dense, case.log_terms, case.lengths))
    if missing:
        low = low._replace(log_head=jnp.asarray(np.where(np.arange(RANK) < RANK - 1, head, -np.inf)))
    found = [
        _by_low_rank(low, case.log_terms, case.lengths),
        _in_log_space(dense, case.log_terms, case.lengths),
        _by_rules(jnp.ravel(dense.log_rule), dense, case.log_terms, case.lengths),
    ]
    measured = np.stack([_posterior_numbers(x) for x in found])
    return Evidence(measured, np.stack([scaled] * len(found)), setting=SETTING | {"rank": RANK})


def _posterior_numbers(found: Marginals) -> np.ndarray:
    return flat(found.log_z, found.span, found.tag, found.root)


@compiled
def _by_low_rank(grammar: LowRankPCFG, log_terms: jax.Array, lengths: jax.Array) -> Marginals:
    return inside_outside(grammar, log_terms, lengths, method="low_rank")


@compiled
def _in_log_space(grammar: Any, log_terms: jax.Array, lengths: jax.Array) -> Marginals:
    return inside_outside(grammar, log_terms, lengths, method="log")


@compiled
def _by_rules(scores: jax.Array, grammar: Any, log_terms: jax.Array, lengths: jax.Array) -> Marginals:
    """With a list of all rules there can be, which the route has to know when it is compiled."""
    with jax.ensure_compile_time_eval():
        lhs, left, right = (jnp.asarray(x.ravel(), jnp.int32) for x in np.indices(grammar.log_rule.shape))
    rules = SparsePCFG(grammar.log_root, lhs, left, right, scores, grammar.log_emit)
    return inside_outside(rules, log_terms, lengths, method="sparse")


def sum_rules(seed: int, *, undivided: bool = False) -> Evidence:
    """Sums of posteriors: n - 1 spans, n tags, one root, and in all n - 1 rules a sentence.

    The control does not divide by Z.
    """
    case = toy(seed)
    found = posteriors(case.grammar, case.log_terms, case.lengths)
    sums = [np.asarray(x, float).reshape(len(LENGTHS), -1).sum(axis=1) for x in (found.span, found.tag, found.root)]
    if undivided:
        sums = [x * np.exp(np.asarray(found.log_z)) for x in sums]
    predicted = flat(LENGTHS - 1, LENGTHS, np.ones(len(LENGTHS)), (LENGTHS - 1).sum())
    return Evidence(flat(*sums, np.asarray(_counts(found)).sum()), predicted, setting=SETTING)


def crossing_spans(seed: int, *, two_trees: bool = False) -> Evidence:
    """Greatest summed posterior of two spans that cross; the control takes one of them from another grammar's trees."""
    case = toy(seed)
    first = posteriors(case.grammar, case.log_terms, case.lengths)
    second = posteriors(swap_children(case.grammar), case.log_terms, case.lengths) if two_trees else first
    ours, theirs = (np.asarray(x.span, float).sum(axis=3) for x in (first, second))
    i, j, k, m = np.indices((TOKENS, TOKENS + 1, TOKENS, TOKENS + 1))
    crossing = ((i < k) & (k < j) & (j < m)) | ((k < i) & (i < m) & (m < j))
    sums = ours[:, :, :, None, None] + theirs[:, None, None]
    return Evidence(sums[:, crossing].max(), 1 + 1e-12, setting=SETTING)


@compiled
def _entropies(case: Toy) -> jax.Array:
    return tree_entropy(case.grammar, case.tokens, case.lengths)


def entropy(seed: int, *, shifted: bool = False) -> Evidence:
    """Entropy of the trees of each sentence against enumeration; the control takes that of another sentence."""
    measured = np.asarray(_entropies(toy(seed)))
    predicted = np.array([found.entropy() for found in enumerated(seed)])
    return Evidence(np.roll(measured, 1) if shifted else measured, predicted, setting=SETTING)


@compiled
def _divergences(p: Any, q: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return tree_kl(p, q, tokens, lengths)


def divergence(seed: int, *, exchanged: bool = False) -> Evidence:
    """Divergence of two grammars' trees of each sentence against enumeration; the control exchanges the grammars."""
    case, other = toy(seed), other_grammar(seed)
    pair = (other, case.grammar) if exchanged else (case.grammar, other)
    measured = np.asarray(_divergences(*pair, case.tokens, case.lengths))
    predicted = []
    for found, row, n in zip(enumerated(seed), np.asarray(case.tokens), LENGTHS.tolist(), strict=True):
        theirs = brute_force(other, row[:n])
        log_q = {d.root: d.log_prob for d in theirs.derivations}
        log_ratio = np.array([d.log_prob - log_q[d.root] for d in found.derivations])
        predicted.append((found.posterior() * log_ratio).sum() - found.log_z + theirs.log_z)
    return Evidence(measured, np.array(predicted), setting=SETTING)


CLAIMS = (
    make_claim(
        "sentence-probability",
        "Log Z is the log of the summed probabilities of all derivations.",
        LARI_YOUNG,
        "identity",
        sentence_probability,
        {"swapped": True},
        "the children of every rule swapped",
        seeds=3,
    ),
    make_claim(
        "derivation-count",
        "With all scores 0, Z is the number of derivations.",
        f"derived; cf. {LARI_YOUNG}",
        "identity",
        derivation_count,
        {"forbidden": True},
        "one rule forbidden",
    ),
    make_claim(
        "inside-and-outside",
        "Inside and outside probabilities of every span are sums over its derivations and over those of the rest.",
        f"{PAPER}; {LARI_YOUNG}",
        "identity",
        inside_and_outside,
        {"closed": True},
        "spans with closed ends",
        seeds=2,
    ),
    make_claim(
        "node-posteriors",
        "Posteriors of spans, tags and roots are the summed probabilities of the derivations that have the node.",
        f"{PAPER}; {LARI_YOUNG}",
        "identity",
        node_posteriors,
        {"closed": True},
        "spans with closed ends",
        seeds=3,
    ),
    make_claim(
        "rule-counts",
        "Expected counts of rules are means over the derivations.",
        LARI_YOUNG,
        "identity",
        rule_counts,
        {"swapped": True},
        "the children of every rule swapped",
        seeds=3,
    ),
    make_claim(
        "scores-to-marginals",
        "The derivative of log Z by the score of a rule, root or node is its expected count.",
        "Eisner 2016",
        "identity",
        scores_to_marginals,
        {"by_probability": True},
        "derivatives by probabilities in place of scores",
        seeds=3,
    ),
    make_claim(
        "routes-agree",
        "Scaled matrix products, log space, rule by rule and the factors of the rule tensor give the same posteriors.",
        f"derived; cf. {PAPER}",
        "identity",
        routes_agree,
        {"missing": True},
        "a component missing from the factors",
        seeds=2,
    ),
    make_claim(
        "sum-rules",
        "Posteriors of spans sum to n - 1, those of tags to n, of the root to 1, and expected rules to n - 1.",
        f"derived; cf. {PAPER}",
        "identity",
        sum_rules,
        {"undivided": True},
        "not divided by Z",
        seeds=3,
    ),
    make_claim(
        "crossing-spans",
        "The posteriors of two spans that cross sum to at most 1.",
        f"derived; cf. {PAPER}",
        "bound",
        crossing_spans,
        {"two_trees": True},
        "the two spans are of different trees",
        seeds=3,
    ),
    make_claim(
        "tree-entropy",
        "The entropy of the trees of a sentence is log Z minus the expected log probability of a derivation.",
        "Hwa 2004, section 3.3.1",
        "identity",
        entropy,
        {"shifted": True},
        "the entropy of another sentence",
        seeds=3,
    ),
    make_claim(
        "tree-divergence",
        "The divergence of what two grammars say of the trees of a sentence is the mean log ratio over derivations.",
        "derived; cf. Li and Eisner 2009, section 6.1",
        "identity",
        divergence,
        {"exchanged": True},
        "the grammars exchanged",
        seeds=2,
    ),
)
