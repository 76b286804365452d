r"""Inside and outside probabilities of sentences under a grammar, and the posteriors made of them.

Notation: $\alpha(A, i, j) = P(A \Rightarrow w_i \dots w_{j-1})$ is the inside and $\beta(A, i, j)$ the outside
probability, $Z$ that of the sentence, $\mu(A, i, j) = \alpha \beta / Z$ the posterior of the node. Spans are half-open.

Reference:
  Lari and Young 1990, The estimation of stochastic context-free grammars using the inside-outside algorithm; Eisner
  2016, Inside-outside and forward-backward algorithms are just backprop; Zhao et al. 2023, arXiv 2303.08117, section 2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.structure.chart import by_ends, default_chunks, require_lengths, span_chart
from jaxft.structure.dense import NEVER
from jaxft.structure.passes import BatchInput, both_passes, log_partition_of_chart, roots_of_batch
from jaxft.structure.pcfg import Grammar, SparsePCFG
from jaxft.structure.routes import ROUTES, Method, explain
from jaxft.structure.sparse import group_rules

Words = Int[Array, "b t"] | Float[Array, "b t q"]
"""Word numbers; or the log score of each preterminal at each position, for observations that are not words."""


class InsideChart(NamedTuple):
    """Inside probabilities of every span, ``p * exp(scale)``."""

    log_z: Float[Array, "b"]
    """Log probability of each sentence in nats; minus infinity where it has no parse."""
    p: Float[Array, "b t widths s"]
    """By start and width; the largest over s is 1, or all are 0."""
    scale: Float[Array, "b t widths"]

    def log_alpha(self) -> Float[Array, "b t ends s"]:
        """Log inside probabilities by start and end, minus infinity where there is none."""
        values = jnp.where(self.p > 0, jnp.log(self.p) + self.scale[..., None], -jnp.inf)
        t = values.shape[1]
        inside = jnp.arange(t + 1)[None] > jnp.arange(t)[:, None]
        return jnp.where(inside[None, :, :, None], by_ends(values), -jnp.inf)


class Marginals(NamedTuple):
    """Posteriors of the nodes of the trees of each sentence; all 0 where it has no parse."""

    log_z: Float[Array, "b"]
    span: Float[Array, "b t ends s"]
    """Of nonterminal A over [i, j) at ``[i, j, A]``. With closed unary rules the expected number of such nodes."""
    tag: Float[Array, "b t q"]
    """Of each preterminal at each word."""
    root: Float[Array, "b a"]
    """Of each symbol at the root."""
    parsable: Bool[Array, "b"]
    """Whether the sentence has a parse of a probability within range: a nonterminal or preterminal that is less likely
    than 1e-38 of the best one over its span (1e-308 in float64) counts as impossible but in the route ``log``."""
    counts: Grammar | None = None
    """Expected number of uses of every rule, emission and root, summed over the batch: in the arrays of a grammar."""


def term_scores(
    grammar: Grammar,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b t q"]:
    r"""Log score of each preterminal at each position: $\log P(X \to w)$, or with the word summed out where masked.

    Args:
      grammar: The grammar.
      tokens: Word numbers; what stands at masked positions and behind the end of a sentence is ignored.
      lengths: Words of each sentence; ``None`` means all.
      mask: Positions whose word is unknown.

    Returns:
      The scores; minus infinity behind the end.

    Raises:
      UserError: Shapes that do not fit, or (on concrete input) a word outside the vocabulary or a length outside 0..t.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> grammar = random_pcfg(jax.random.key(0), 1, 2, 3)
      >>> scores = term_scores(grammar, jnp.array([[2, 0]]), mask=jnp.array([[False, True]]))
      >>> bool((scores[0, 0] == grammar.log_emit[:, 2]).all()), abs(round(float(scores[0, 1, 0]), 5))
      (True, 0.0)
    """
    where = "term_scores"
    shape = getattr(tokens, "shape", None)
    integers = shape is not None and len(shape) == 2 and jnp.issubdtype(tokens.dtype, jnp.integer)
    require(integers, where, "tokens must be integers [b, t]", shape, "Pad sentences to one length and stack them")
    if mask is not None:
        got = np.shape(mask)
        require(got == shape, where, "mask must have the shape of tokens", got, "Pass [b, t]")
        mask = jnp.asarray(mask, bool)
    require_lengths(where, lengths, *tokens.shape)
    v = grammar.log_emit.shape[1]
    inside = _inside(lengths, *tokens.shape)
    known = inside if mask is None else inside & ~mask
    if is_concrete((tokens, known)):
        with jax.ensure_compile_time_eval():
            outside = jnp.where(known, (tokens < 0) | (tokens >= v), False)
            bad = tokens[outside][:5].tolist() if bool(outside.any()) else []
        require(not bad, where, f"words must lie in 0..{v - 1}", bad, "Map unknown words to a word of the grammar")
    scores = jnp.moveaxis(jnp.take(grammar.log_emit, jnp.where(known, tokens, 0), axis=1), 0, 2)
    if mask is not None:
        # A preterminal without a word must not make a gradient NaN.
        has_word = (grammar.log_emit > -jnp.inf).any(axis=1)
        summed = jax.nn.logsumexp(jnp.where(has_word[:, None], grammar.log_emit, 0), axis=1)
        scores = jnp.where(mask[..., None], jnp.where(has_word, summed, -jnp.inf)[None, None], scores)
    return jnp.where(inside[..., None], scores, -jnp.inf)


def word_scores(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b t q"]:
    """Checks what may be given as words, and makes scores of it: ``term_scores`` of numbers, scores as they are.

    Args:
      grammar: The grammar.
      words: Word numbers, or the log score of each preterminal at each position.
      lengths: Words of each sentence; ``None`` means all.
      mask: Positions whose word is unknown; with word numbers only.

    Returns:
      The scores in the precision of the grammar; minus infinity behind the end.

    Raises:
      UserError: As ``term_scores``, or scores of another number of preterminals, or (on concrete input) not below
        infinity.
    """
    where, q = "inside_outside", grammar.log_emit.shape[0]
    advice = "Wrap it in jnp.asarray"
    require(hasattr(words, "dtype"), where, "words must be an array", type(words).__name__, advice)
    if jnp.issubdtype(words.dtype, jnp.integer):
        return term_scores(grammar, words, lengths, mask=mask)
    advice = "Put it into the scores"
    require(mask is None, where, "a mask goes with word numbers", "scores of preterminals", advice)
    fits = words.ndim == 3 and words.shape[2] == q
    require(fits, where, f"scores of words must be [b, t, {q}]", words.shape, "Score every preterminal")
    require_lengths(where, lengths, *words.shape[:2])
    here = _inside(lengths, *words.shape[:2])[..., None]
    if is_concrete((words, lengths)):
        with jax.ensure_compile_time_eval():
            fine = not bool((here & ~(words < jnp.inf)).any())
        require(
            fine, where, "scores must be log scores, below infinity", "NaN or infinity", "Check where they are from"
        )
    return jnp.where(here, words, -jnp.inf).astype(grammar.log_root.dtype)


def inside(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
    chunks: int | None = None,
) -> InsideChart:
    """Inside probabilities of every span of a batch of sentences.

    Args:
      grammar: The grammar.
      words: Word numbers ``[b, t]``, or log scores of preterminals ``[b, t, q]``.
      lengths: Words of each sentence; ``None`` means all t.
      mask: Positions whose word is summed out.
      method: The route; ``explain`` says which ``auto`` takes.
      chunks: Chunks of widths: more run faster on long sentences and compile slower.

    Returns:
      The chart.

    Raises:
      UserError: As ``term_scores``, or the method does not fit the grammar.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> chart = inside(random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2]]))
      >>> chart.log_alpha().shape
      (1, 3, 4, 2)
    """
    x, options = _ready(grammar, words, lengths, mask, method, chunks)
    return _inside_chart(x, **options)


def log_partition(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
    chunks: int | None = None,
) -> Float[Array, "b"]:
    r"""Log probability of each sentence, $\log Z$, in nats.

    Differentiable in reverse mode, twice too: the gradient by the log scores of a grammar are the expected counts of
    its rules, that by ``words`` as scores the posterior of the preterminals. It runs the outside pass and keeps O(t²)
    values.

    Args:
      grammar: The grammar.
      words: As ``inside``.
      lengths: As ``inside``.
      mask: As ``inside``.
      method: As ``inside``.
      chunks: As ``inside``.

    Returns:
      The log probabilities; minus infinity, with gradients of 0, where there is no parse.

    Raises:
      UserError: As ``inside``.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> grammar, words = random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2]])
      >>> counts = jax.grad(lambda g: log_partition(g, words).sum())(grammar)
      >>> round(float(counts.log_rule.sum()), 4), round(float(counts.log_emit.sum()), 4)  # two rules, three words
      (2.0, 3.0)
    """
    x, options = _ready(grammar, words, lengths, mask, method, chunks)
    return _inside_chart(x, **options).log_z


def inside_outside(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
    counts: bool = False,
    chunks: int | None = None,
    mesh: Mesh | None = None,
) -> Marginals:
    r"""Posteriors of all nodes, words and (on request) rules, by an explicit outside pass.

    Args:
      grammar: The grammar.
      words: As ``inside``.
      lengths: As ``inside``.
      mask: As ``inside``.
      method: As ``inside``.
      counts: Whether to sum up the expected counts of the rules: another two products a width.
      chunks: As ``inside``.
      mesh: Splits the batch over its first axis.

    Returns:
      The posteriors.

    Raises:
      UserError: As ``inside``; or the batch does not split over the mesh.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> found = inside_outside(random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2]]))
      >>> round(float(found.span.sum()), 4)  # a binary tree of three words has two inner nodes
      2.0
    """
    x, options = _ready(grammar, words, lengths, mask, method, chunks)
    if mesh is not None:
        ways, b = mesh.shape[mesh.axis_names[0]], len(x.lengths)
        require(b % ways == 0, "inside_outside", f"the batch must split over {ways} devices", b, "Pad the batch")
        spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
        log_terms, lengths = jax.device_put((x.log_terms, x.lengths), spread)
        x = x._replace(log_terms=log_terms, lengths=lengths)
    found = _marginals(x, counts=counts, **options)
    if found.counts is None or jnp.issubdtype(words.dtype, jnp.floating):
        return found
    # The routes see scores of words; what these are made of is emissions.
    d_emit = _emission_counts(grammar, words, x.lengths, mask, found.tag)
    return found._replace(counts=found.counts._replace(log_emit=d_emit))


def span_marginals(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
) -> Float[Array, "b t ends s"]:
    r"""The posteriors $\mu(A, i, j)$ alone, at ``[b, i, j, A]``.

    Args:
      grammar: The grammar.
      words: As ``inside``.
      lengths: As ``inside``.
      mask: As ``inside``.
      method: As ``inside``.

    Returns:
      The posteriors; divided by Z, where Zhao et al. do not.
    """
    return inside_outside(grammar, words, lengths, mask=mask, method=method).span


def outside(
    grammar: Grammar,
    words: Words,
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"] | None = None,
    method: Method = "auto",
) -> Float[Array, "b t ends s"]:
    r"""Log outside probabilities $\log \beta(A, i, j)$ by start and end.

    Given where some nonterminal can make the span, and minus infinity elsewhere (in method ``log`` also for the
    nonterminals that cannot): no posterior needs it there.

    Args:
      grammar: The grammar.
      words: As ``inside``.
      lengths: As ``inside``.
      mask: As ``inside``.
      method: As ``inside``.

    Returns:
      The log outside probabilities, in nats.

    Raises:
      UserError: As ``inside``.
    """
    x, options = _ready(grammar, words, lengths, mask, method, None)
    return _log_outside(x, **options)


@functools.partial(jax.jit, static_argnames=("name", "chunks"))
def _inside_chart(x: BatchInput, *, name: str, chunks: int) -> InsideChart:
    route = ROUTES[name]
    context, leaves = route.setup(x.grammar, x.log_terms, chunks, x.groups)
    p, scale = route.view(span_chart(route.recursion, context, leaves, chunks=chunks))
    return InsideChart(log_partition_of_chart(roots_of_batch(x), x.log_terms, p, scale, x.lengths), p, scale)


@functools.partial(jax.jit, static_argnames=("name", "chunks", "counts"))
def _marginals(x: BatchInput, *, name: str, chunks: int, counts: bool) -> Marginals:
    passes = both_passes(x, name, chunks)
    used = None
    if counts:
        used = jax.tree.map(lambda d, y: y if d.dtype == jax.dtypes.float0 else d, passes.d_grammar, x.grammar)
        used = used._replace(log_root=passes.d_root.sum(axis=0))
    span = by_ends(passes.p * passes.sensitivity)
    return Marginals(passes.log_z, span, passes.d_terms, passes.d_root, passes.log_z > -jnp.inf, used)


@functools.partial(jax.jit, static_argnames=("name", "chunks"))
def _log_outside(x: BatchInput, *, name: str, chunks: int) -> Array:
    passes = both_passes(x, name, chunks)
    made = (passes.scale > NEVER / 2) & (passes.p > 0).any(axis=3)
    known = (passes.sensitivity > 0) & made[..., None]
    level = passes.log_z[:, None, None] - passes.scale
    log_beta = jnp.where(known, jnp.log(jnp.where(known, passes.sensitivity, 1)) + level[..., None], -jnp.inf)
    t = x.log_terms.shape[1]
    spans = (jnp.arange(t + 1)[None] > jnp.arange(t)[:, None])[None, :, :, None]
    return jnp.where(spans, by_ends(log_beta), -jnp.inf)


@jax.jit
def _emission_counts(grammar: Grammar, tokens: Array, lengths: Array, mask: Array | None, tag: Array) -> Array:
    """Expected emissions: posteriors of preterminals, shared over the words that a masked position may hold."""
    _, pull = jax.vjp(lambda e: term_scores(grammar._replace(log_emit=e), tokens, lengths, mask=mask), grammar.log_emit)
    return pull(tag)[0]


def _ready(
    grammar: Grammar, words: Words, lengths: Array | None, mask: Array | None, method: Method, chunks: int | None
) -> tuple[BatchInput, dict[str, Any]]:
    """Checks the input; what is computed with, and the static options: the route and its chunks."""
    where = "inside_outside"
    log_terms = word_scores(grammar, words, lengths, mask=mask)
    b, t = log_terms.shape[:2]
    require(b > 0 and t > 0, where, "there must be a sentence and room for a word", (b, t), "Pass one or more")
    plan = explain(grammar, batch=b, tokens=t, method=method)
    lengths = jnp.full(b, t, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    grammar = ROUTES[plan.method].kind(grammar)
    groups = group_rules(grammar) if isinstance(grammar, SparsePCFG) else None
    require(chunks is None or chunks >= 1, where, "chunks must be positive", chunks, "Pass 1 or more")
    chunks = default_chunks(t) if chunks is None else chunks
    return BatchInput(grammar, groups, log_terms, lengths), {"name": plan.method, "chunks": chunks}


def _inside(lengths: Array | None, b: int, t: int) -> Bool[Array, "b t"]:
    """Which positions belong to a sentence."""
    if lengths is None:
        return jnp.ones((b, t), bool)
    return jnp.arange(t, dtype=jnp.int32)[None] < jnp.asarray(lengths, jnp.int32)[:, None]
