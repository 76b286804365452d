"""Inside-Outside with less to remember: few symbols, or few dimensions a span; the approximations of large grammars.

A model of the width of BERT cannot hold the charts of a grammar of English. What it may drop is rare symbols, and the
directions of a chart's vectors that hardly vary. Both are dynamic programs here, so that error against size is measured
on many sentences at once; a restricted grammar, and one of low rank, are also weights (``inside_outside_transformer``).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import nearest, require
from jaxft.structure.inside_outside import Marginals, inside, inside_outside, term_scores
from jaxft.structure.pcfg import PCFG, SparsePCFG, SymbolNames, num_nonterminals


def frequent_symbols(
    counts: Float[Array | np.ndarray, "a"], nonterminals: int, *, keep_nonterminals: int, keep_preterminals: int
) -> np.ndarray:
    """The symbols with the largest expected counts.

    Args:
      counts: Expected number of nodes of each symbol, nonterminals first: sums of span and tag posteriors.
      nonterminals: s.
      keep_nonterminals: How many of them to keep.
      keep_preterminals: How many of the others to keep.

    Returns:
      Numbers of the kept symbols, ascending.

    Raises:
      UserError: More symbols to keep than there are, or none.

    Example:
      >>> frequent_symbols(jnp.array([3.0, 1.0, 2.0, 0.5, 4.0]), 3, keep_nonterminals=2, keep_preterminals=1).tolist()
      [0, 2, 4]
    """
    where, values = "frequent_symbols", np.asarray(counts)
    sizes = ((keep_nonterminals, nonterminals), (keep_preterminals, len(values) - nonterminals))
    for (keep, of), name in zip(sizes, ("keep_nonterminals", "keep_preterminals"), strict=True):
        require(1 <= keep <= of, where, f"{name} must lie in 1..{of}", keep, "Change it")
    kept = [np.argsort(-values[:nonterminals], kind="stable")[:keep_nonterminals]]
    kept.append(nonterminals + np.argsort(-values[nonterminals:], kind="stable")[:keep_preterminals])
    return np.sort(np.concatenate(kept))


def restrict_symbols(grammar: PCFG | SparsePCFG, kept: Int[np.ndarray, "kept"]) -> PCFG | SparsePCFG:
    """The grammar with the rules, words and roots of the kept symbols alone, their probabilities as they were.

    What is dropped counts as probability 0: nothing is renormalised, so every inside and outside probability is a lower
    bound of the full one. A sentence may lose all its parses.

    Args:
      grammar: Concrete grammar without unary rules.
      kept: Numbers of symbols, ascending, such as ``frequent_symbols`` gives.

    Returns:
      A grammar of ``len(kept)`` symbols in the same order.

    Raises:
      UserError: Unary rules, numbers that are no ascending list of symbols, or no nonterminal or no preterminal.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> small = restrict_symbols(random_pcfg(jax.random.key(0), 3, 4, 6), np.array([0, 2, 3, 5]))
      >>> small.log_rule.shape, small.log_emit.shape
      ((2, 4, 4), (2, 6))
    """
    where, s, a = "restrict_symbols", num_nonterminals(grammar), grammar.log_root.shape[0]
    plain = grammar.log_unary is None
    require(plain, where, "the grammar must have no unary rules", "log_unary", "Collapse unary chains first")
    ordered = len(kept) > 0 and kept.min() >= 0 and kept.max() < a and bool((np.diff(kept) > 0).all())
    require(ordered, where, f"kept must be ascending symbols in 0..{a - 1}", kept.tolist(), "Sort them")
    upper, lower = kept[kept < s], kept[kept >= s] - s
    both = len(upper) > 0 and len(lower) > 0
    require(both, where, "a nonterminal and a preterminal must be kept", kept.tolist(), "Keep more")
    names = grammar.names
    if names is not None:
        symbols = [names.symbols[x] for x in kept]
        names = SymbolNames(symbols[: len(upper)], symbols[len(upper) :], names.words)
    root, emit = grammar.log_root[kept], grammar.log_emit[lower]
    if isinstance(grammar, PCFG):
        return PCFG(root, grammar.log_rule[upper][:, kept][:, :, kept], emit, None, names)
    renumbered = np.full(a, -1, np.int32)
    renumbered[kept] = np.arange(len(kept))
    rules = renumbered[np.stack([np.asarray(grammar.lhs), np.asarray(grammar.left), np.asarray(grammar.right)])]
    rows = np.flatnonzero((rules >= 0).all(axis=0))
    lhs, left, right = (jnp.asarray(part[rows]) for part in rules)
    return SparsePCFG(root, lhs, left, right, grammar.log_rule[rows], emit, None, names)


def expand_marginals(found: Marginals, kept: Int[np.ndarray, "kept"], nonterminals: int, symbols: int) -> Marginals:
    """Posteriors under a restricted grammar with 0 for each symbol that it lacks.

    Args:
      found: Posteriors under ``restrict_symbols(grammar, kept)``.
      kept: The symbols kept.
      nonterminals: s of the full grammar.
      symbols: a of the full grammar.

    Returns:
      Posteriors in the shapes of the full grammar.
    """
    upper, lower = kept[kept < nonterminals], kept[kept >= nonterminals] - nonterminals

    def spread(values: Array, places: np.ndarray, size: int) -> Array:
        return jnp.zeros((*values.shape[:-1], size), values.dtype).at[..., places].set(values)

    span, tag = spread(found.span, upper, nonterminals), spread(found.tag, lower, symbols - nonterminals)
    return Marginals(found.log_z, span, tag, spread(found.root, kept, symbols), found.parsable)


def width_bases(
    grammar: PCFG,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"] | None = None,
    *,
    rank: int,
    moments: Literal["inside", "marginal"] = "marginal",
) -> Float[Array, "widths s r"]:
    r"""For each width of a span, the directions that hold most of its chart's vectors: leading eigenvectors of moments.

    ``"marginal"`` takes the second moment of the posteriors $\mu(\cdot, i, j)$, ``"inside"`` that of the inside vectors
    scaled to length 1 and weighted by how probable the span is. The latter is exact at the rank of the grammar's rule
    tensor, the former in general only at s. Of a grammar of full rank and few rules an inside vector's largest entries
    are often symbols that no tree of the sentence has there, and the former is far better.

    Args:
      grammar: The grammar.
      tokens: Sentences to take the moments of.
      lengths: Words of each.
      rank: Directions to keep, r.
      moments: Of which vectors.

    Returns:
      Orthonormal columns for each width from 0 (unused) to t.

    Raises:
      UserError: A rank outside 1..s, or unknown moments.
    """
    where, s = "width_bases", num_nonterminals(grammar)
    require(1 <= rank <= s, where, f"rank must lie in 1..{s}", rank, "Change it")
    known = ("inside", "marginal")
    require(moments in known, where, "moments must be known", repr(moments), nearest(str(moments), known))
    span = inside_outside(grammar, tokens, lengths).span
    vectors = span
    if moments == "inside":
        log_alpha = inside(grammar, tokens, lengths).log_alpha()
        peak = log_alpha.max(axis=-1, keepdims=True)
        alpha = jnp.exp(log_alpha - jnp.where(peak > -jnp.inf, peak, 0))
        size = jnp.sqrt((alpha**2).sum(axis=-1) / jnp.where(span.sum(axis=-1) > 0, span.sum(axis=-1), 1))
        vectors = jnp.where((span.sum(axis=-1) > 0)[..., None], alpha / jnp.where(size > 0, size, 1)[..., None], 0)
    _, t, ends, _ = span.shape
    width = jnp.arange(ends)[None, :] - jnp.arange(t)[:, None]
    of_width = (width[None] == jnp.arange(ends)[:, None, None]).astype(span.dtype)
    moment = jnp.einsum("wij,bijx,bijy->wxy", of_width, vectors, vectors)
    return jnp.linalg.eigh(moment)[1][:, :, ::-1][:, :, :rank]


def projected_inside_outside(
    grammar: PCFG,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"] | None = None,
    *,
    bases: Float[Array, "widths s r"],
    mask: Bool[Array, "b t"] | None = None,
) -> Marginals:
    r"""Inside-Outside that remembers r numbers a span: every vector is projected on the basis of its width.

    With $\Pi_w = U_w U_w^\top$, an inside vector of width w enters wider spans as $\Pi_w \alpha$ and an outside vector
    enters narrower ones as $\Pi_w \beta$. Posteriors are products of vectors as they are computed, before projection
    (and above 0, as an attention score with ReLU is). Exact where the bases hold all inside vectors. Elsewhere they are
    no distributions: where the projection loses most of Z, a quotient by Z may exceed 1 by far.

    Args:
      grammar: Dense grammar without unary rules. The program takes O(t³ a² + t² s a²) operations a sentence.
      tokens: Word numbers.
      lengths: Words of each sentence; ``None`` means all.
      bases: Orthonormal columns for each width from 0 to t, as ``width_bases`` gives.
      mask: Positions whose word is summed out.

    Returns:
      Posteriors, 0 where nothing is left of a sentence's probability.

    Raises:
      UserError: Bases whose widths or symbols do not fit, or unary rules.
    """
    where, (b, t), s = "projected_inside_outside", tokens.shape, num_nonterminals(grammar)
    plain = grammar.log_unary is None
    require(plain, where, "the grammar must have no unary rules", "log_unary", "Collapse unary chains first")
    fits = bases.shape[:2] == (t + 1, s)
    require(fits, where, f"bases must be [{t + 1}, {s}, r]", bases.shape, "Make them for this length and grammar")
    lengths = jnp.full(b, t, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    log_terms = term_scores(grammar, tokens, lengths, mask=mask)
    # Tilted by minus its mean log probability a word, a whole sentence has probability 1.
    log_z = inside(grammar, tokens, lengths, mask=mask).log_z
    return _program(grammar, log_terms, lengths, bases, log_z)


@jax.jit
def _program(grammar: PCFG, log_terms: Array, lengths: Array, bases: Array, log_z: Array) -> Marginals:
    """The posteriors, from the log scores of preterminals and the exact log probability of each sentence."""
    b, s = len(lengths), num_nonterminals(grammar)
    tilt = jnp.where(jnp.isfinite(log_z), -log_z / lengths.astype(log_z.dtype), 0)
    terms = jnp.exp(log_terms + tilt[:, None, None])
    rule, root = jnp.exp(grammar.log_rule), jnp.exp(grammar.log_root)
    projector = jnp.einsum("wxr,wyr->wxy", bases, bases)
    raw, stored = _inside(rule, terms, lengths, projector)
    outer, tags = _outside(rule, root, stored, lengths, projector)
    at_root = raw[lengths, jnp.arange(b), 0] * root[None]
    z = at_root.sum(axis=-1)
    scale = jnp.where(z > 0, 1 / jnp.where(z > 0, z, 1), 0)
    span = _by_ends(raw[..., :s] * outer) * scale[:, None, None, None]
    tag = terms * tags * scale[:, None, None]
    untilted = jnp.log(z) - lengths.astype(z.dtype) * tilt
    return Marginals(untilted, span, tag, at_root * scale[:, None], z > 0)


def _inside(rule: Array, terms: Array, lengths: Array, projector: Array) -> tuple[Array, Array]:
    """Inside vectors by width and start ``[w, b, i, a]``: as computed, and as projected."""
    (s, a, _), (b, t, _) = rule.shape, terms.shape
    empty = jnp.zeros((t + 1, b, t, a), terms.dtype)
    first = empty.at[1, :, :, s:].set(terms)

    def grow(w: Array, charts: tuple[Array, Array]) -> tuple[Array, Array]:
        raw, stored = charts

        def split(k: Array, pairs: Array) -> Array:
            return pairs + jnp.einsum("bix,biy->bixy", stored[k], jnp.roll(stored[w - k], -k, axis=1))

        pairs = jax.lax.fori_loop(jnp.int32(1), w, split, jnp.zeros((b, t, a, a), terms.dtype))
        value = jax.nn.relu(jnp.einsum("sxy,bixy->bis", rule, pairs))
        value = jnp.where(_fits(w, t, lengths)[..., None], value, 0)
        kept = jnp.einsum("xy,biy->bix", projector[w], value)
        return raw.at[w, :, :, :s].set(value), stored.at[w, :, :, :s].set(kept)

    return jax.lax.fori_loop(jnp.int32(2), jnp.int32(t + 1), grow, (first, first))


def _outside(
    rule: Array, root: Array, inner: Array, lengths: Array, projector: Array
) -> tuple[Array, Float[Array, "b t q"]]:
    """Outside vectors of nonterminals by width and start ``[w, b, i, s]`` as computed, and those of the tags."""
    s, (widths, b, t, a) = len(rule), inner.shape
    here = jnp.arange(t) == 0

    def shrink(step: Array, charts: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        raw, stored, _ = charts
        w = t - step
        whole = here[None] & (lengths == w)[:, None]
        value = jnp.where(whole[..., None], root[None, None], 0)

        def extend(v: Array, pairs: tuple[Array, Array]) -> tuple[Array, Array]:
            as_left = jnp.einsum("bix,biy->bixy", stored[v], jnp.roll(inner[v - w], -w, axis=1))
            as_right = jnp.einsum("bix,biy->bixy", stored[v], inner[v - w])
            return pairs[0] + as_left, pairs[1] + jnp.roll(as_right, v - w, axis=1)

        zeros = jnp.zeros((b, t, s, a), inner.dtype)
        as_left, as_right = jax.lax.fori_loop(w + 1, jnp.int32(t + 1), extend, (zeros, zeros))
        value = value + jnp.einsum("pxy,bipy->bix", rule, as_left) + jnp.einsum("pyx,bipy->bix", rule, as_right)
        value = jnp.where(_fits(w, t, lengths)[..., None], jax.nn.relu(value), 0)
        kept = jnp.einsum("xy,biy->bix", projector[w], value[..., :s])
        return raw.at[w].set(value[..., :s]), stored.at[w].set(kept), value[..., s:]

    chart = jnp.zeros((widths, b, t, s), inner.dtype)
    raw, _, tags = jax.lax.fori_loop(
        jnp.int32(0), jnp.int32(t), shrink, (chart, chart, jnp.zeros((b, t, a - s), inner.dtype))
    )
    return raw, tags


def _fits(width: Array, t: int, lengths: Array) -> Array:
    """Whether a span of this width from each start ends within each sentence, ``[b, i]``."""
    return jnp.arange(t, dtype=jnp.int32)[None] + width <= lengths[:, None]


def _by_ends(chart: Array) -> Array:
    """From ``[w, b, i, x]`` to ``[b, i, j, x]``."""
    widths, _, t, _ = chart.shape
    width = jnp.arange(widths)[None, :] - jnp.arange(t)[:, None]
    placed = chart[jnp.clip(width, 0), :, jnp.arange(t)[:, None]]  # [i, j, b, x]
    return jnp.where((width > 0)[None, ..., None], jnp.moveaxis(placed, 2, 0), 0)
