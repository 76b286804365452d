r"""Fitting the scores of a grammar to sentences: expectation maximisation, and what gradient descent needs.

A grammar is a set of distributions: of the root, of the words of each preterminal, of the rules of each nonterminal
(binary and unary ones share it), and for one of low rank of the components of each nonterminal and of the children of
each component. A step of EM sets each to the expected relative frequencies under the grammar as it is:

$$ P(A \to BC) \leftarrow \frac{\mathbb{E}[\#(A \to BC)]}{\mathbb{E}[\#A]}. $$

The expected counts are the gradient of log Z. They add up over batches, so that a corpus of any size is one step.

Reference:
  Lari and Young 1990, The estimation of stochastic context-free grammars using the inside-outside algorithm, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import require
from jaxft.structure.inside_outside import Words, log_partition
from jaxft.structure.pcfg import Grammar, LowRankPCFG, SparsePCFG, num_nonterminals
from jaxft.structure.routes import Method


class ExpectedCounts(NamedTuple):
    """Sufficient statistics of one step: sums over the sentences that have a parse."""

    uses: dict[str, Array]
    """Expected number of uses, by the name of the grammar's array."""
    log_z: Float[Array, "b"]
    """Log probability of each sentence."""


def expected_counts(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
) -> ExpectedCounts:
    """How often the trees of a batch are expected to use each rule, unary rule, emission and root.

    For a grammar of low rank the uses of its components. In the arrays of the grammar whatever the route.

    Args:
      grammar: The grammar.
      words: As ``inside``; with scores of preterminals there are no counts of emissions.
      lengths: As ``inside``.
      mask: As ``inside``; masked words are counted as the grammar expects them.
      method: As ``inside``.

    Returns:
      The counts; a sentence without a parse adds none.

    Raises:
      UserError: As ``inside``.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> found = expected_counts(random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2]]))
      >>> {name: round(float(uses.sum()), 4) for name, uses in found.uses.items()}
      {'log_emit': 3.0, 'log_root': 1.0, 'log_rule': 2.0}
    """

    def total(scores: dict[str, Array]) -> tuple[Array, Array]:
        log_z = log_partition(grammar._replace(**scores), words, lengths, mask=mask, method=method)
        return jnp.where(log_z > -jnp.inf, log_z, 0).sum(), log_z

    uses, log_z = jax.grad(total, has_aux=True)(_scores(grammar))
    return ExpectedCounts({name: jnp.maximum(x, 0) for name, x in uses.items()}, log_z)


def reestimate(grammar: Grammar, uses: dict[str, Array], *, smoothing: float = 0.0) -> Grammar:
    """The grammar with every distribution set to relative frequencies; one without counts keeps its values.

    Args:
      grammar: The grammar that the counts were expected under.
      uses: Counts by the name of the grammar's array, as ``expected_counts`` gives them; sums over batches.
      smoothing: Added to the count of everything that has a score above minus infinity.

    Returns:
      The new grammar; what was absent stays absent.

    Raises:
      UserError: Smoothing below 0, or counts of other arrays.
    """
    scores = _scores(grammar)
    shapes = [{name: x.shape for name, x in tree.items()} for tree in (scores, uses)]
    rule = "counts must have the arrays of the grammar"
    require(shapes[0] == shapes[1], "reestimate", rule, shapes[1], f"Pass {shapes[0]}")
    require(smoothing >= 0, "reestimate", "smoothing must not be negative", smoothing, "Pass 0 or more")
    counts = {
        name: uses[name] + jnp.where(x > -jnp.inf, jnp.asarray(smoothing, x.dtype), 0) for name, x in scores.items()
    }
    totals = _over_rows(grammar, counts)

    def frequencies(count: Array, row: Array, old: Array) -> Array:
        return jnp.where(row > 0, jnp.log(count / jnp.where(row > 0, row, 1)), old)

    return grammar._replace(**{name: frequencies(counts[name], totals[name], x) for name, x in scores.items()})


def em_step(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    smoothing: float = 0.0,
    method: Method = "auto",
) -> tuple[Grammar, Float[Array, "b"]]:
    """One step of expectation maximisation on a batch.

    The likelihood of the sentences never falls (with ``smoothing`` it is the likelihood with a Dirichlet prior that
    does not). A sentence without a parse is left out, and never gets one, since what is absent stays absent.

    Args:
      grammar: The grammar.
      words: As ``inside``; with scores of preterminals the emissions keep their values.
      lengths: As ``inside``.
      mask: As ``inside``.
      smoothing: As ``reestimate``.
      method: As ``inside``.

    Returns:
      The new grammar, and the log probability of each sentence under the old one.

    Raises:
      UserError: As ``inside``, or smoothing below 0.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> grammar, words = random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2], [0, 1, 0]])
      >>> better, before = em_step(grammar, words)
      >>> bool(em_step(better, words)[1].sum() > before.sum())
      True
    """
    uses, log_z = expected_counts(grammar, words, lengths, mask=mask, method=method)
    return reestimate(grammar, uses, smoothing=smoothing), log_z


def normalize_scores(grammar: Grammar) -> Grammar:
    """The grammar of arbitrary scores: every distribution is the softmax of its row.

    So that scores can be the parameters of gradient descent. Minus infinity stays; a row of nothing else too.

    Args:
      grammar: Scores in the arrays of a grammar.

    Returns:
      A grammar whose distributions sum to 1.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> scores = random_pcfg(jax.random.key(0), 2, 2, 3)._replace(log_emit=jnp.zeros((2, 3)))
      >>> [round(p, 4) for p in jnp.exp(normalize_scores(scores).log_emit[0]).tolist()]
      [0.3333, 0.3333, 0.3333]
    """
    scores = _scores(grammar)
    top = jax.lax.stop_gradient(_over_rows(grammar, scores, largest=True))
    top = {name: jnp.where(x > -jnp.inf, x, 0) for name, x in top.items()}
    totals = _over_rows(grammar, {name: jnp.exp(x - top[name]) for name, x in scores.items()})
    safe = {name: jnp.where(x > 0, x, 1) for name, x in totals.items()}
    return grammar._replace(**{name: x - top[name] - jnp.log(safe[name]) for name, x in scores.items()})


def log_likelihood_loss(
    grammar: Grammar, words: Words, lengths: Int[Array, "b"] | None = None, *, method: Method = "auto"
) -> tuple[Float[Array, ""], Bool[Array, "b"]]:
    r"""Negative log-likelihood in nats a word, over the sentences that have a parse, $-\sum \log Z / \sum$ words.

    Args:
      grammar: The grammar; ``normalize_scores`` makes one of free parameters.
      words: As ``inside``.
      lengths: As ``inside``.
      method: As ``inside``.

    Returns:
      The loss (0 where no sentence has a parse), and which have one.

    Raises:
      UserError: As ``inside``.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> scores, words = random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2]])
      >>> loss = lambda g: log_likelihood_loss(normalize_scores(g), words)[0]
      >>> step = jax.tree.map(lambda x, d: x - 0.1 * d, scores, jax.grad(loss)(scores))
      >>> bool(loss(step) < loss(scores))
      True
    """
    log_z = log_partition(grammar, words, lengths, method=method)
    parsable = log_z > -jnp.inf
    sizes = jnp.full(words.shape[:1], words.shape[1]) if lengths is None else jnp.asarray(lengths)
    total = jnp.where(parsable, sizes, 0).sum()
    nats = jnp.where(parsable, log_z, 0).sum()
    return -nats / jnp.maximum(total, 1).astype(log_z.dtype), parsable


def _scores(grammar: Grammar) -> dict[str, Array]:
    return {name: x for name, x in grammar._asdict().items() if name.startswith("log_") and x is not None}


def _over_rows(grammar: Grammar, values: dict[str, Array], *, largest: bool = False) -> dict[str, Array]:
    """Sum or maximum over the distribution that each value belongs to, in shapes that go with the values."""
    along = jnp.max if largest else jnp.sum
    found = {name: along(values[name], axis=-1, keepdims=True) for name in ("log_root", "log_emit")}
    if isinstance(grammar, LowRankPCFG):
        names = ("log_head", "log_left", "log_right")
        return found | {name: along(values[name], axis=-1, keepdims=True) for name in names}
    rule, unary, s = values["log_rule"], values.get("log_unary"), num_nonterminals(grammar)
    if isinstance(grammar, SparsePCFG):
        by_parent = jax.ops.segment_max if largest else jax.ops.segment_sum
        parent = by_parent(rule, grammar.lhs, num_segments=s)
    else:
        parent = along(rule, axis=(1, 2))
    if unary is not None:
        # A nonterminal rewrites by either kind of rule.
        parent = along(jnp.stack([parent, along(unary, axis=1)]), axis=0)
        found["log_unary"] = parent[:, None]
    return found | {"log_rule": parent[grammar.lhs] if isinstance(grammar, SparsePCFG) else parent.reshape(s, 1, 1)}
