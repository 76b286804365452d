"""The parse of greatest expected recall, from posteriors of spans."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.core.checks import require
from jaxft.structure.bracketings import best_bracketing
from jaxft.structure.chart import require_lengths
from jaxft.structure.parses import Parses


def mbr_parse(
    span: Float[Array, "b t ends s"],
    lengths: Int[Array, "b"] | None = None,
    *,
    labelled: bool = True,
    tag: Float[Array, "b t q"] | None = None,
) -> Parses:
    r"""The binary tree whose spans have the greatest summed posterior: minimum Bayes risk for (labelled) recall.

    $$ T^* = \operatorname{argmax}_T \sum_{(i, j) \in T} \max_A \mu(A, i, j), \qquad j - i \ge 2, $$

    or with $\sum_A$ for the unlabelled recall. The tree need not be one of the grammar's. Posteriors may be those of a
    grammar, of several, or what a probe reads off a network. A sentence without a parse gets some tree of score 0: look
    at ``Marginals.parsable``.

    Args:
      span: $\mu$ at ``[b, i, j, A]``; one label will do.
      lengths: Words of each sentence; ``None`` means all.
      labelled: Whether labels count.
      tag: Posteriors of preterminals, to label single words; without them these have label -1.

    Returns:
      The trees, with the expected number of correct inner nodes as score.

    Raises:
      UserError: ``span`` has another shape, or lengths do not fit it.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> from jaxft.structure.inside_outside import inside_outside
      >>> found = inside_outside(random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2]]))
      >>> mbr_parse(found.span).spans[0, 0].tolist()
      [0, 3]

    Reference:
      Goodman 1996, Parsing algorithms and metrics, section 3 (labelled recall).
    """
    rule, shape = "span must be [b, t, t + 1, s], by start and end", span.shape
    fits = span.ndim == 4 and shape[2] == shape[1] + 1
    require(fits, "mbr_parse", rule, shape, "Pass Marginals.span, or add an axis of one label")
    require_lengths("mbr_parse", lengths, *shape[:2])
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    return _mbr_parse(span, lengths, tag, labelled)


@functools.partial(jax.jit, static_argnames="labelled")
def _mbr_parse(span: Array, lengths: Array | None, tag: Array | None, labelled: bool) -> Parses:
    scores = span.max(axis=3) if labelled else span.sum(axis=3)
    t = span.shape[1]
    wide = jnp.arange(t + 1)[None] - jnp.arange(t)[:, None] >= 2
    parses, _ = best_bracketing(jnp.where(wide[None], scores, 0), lengths)
    row = jnp.arange(span.shape[0])[:, None]
    start, end = parses.spans[..., 0], parses.spans[..., 1]
    inner = jnp.argmax(span[row, start, end], axis=2)
    leaf = jnp.full_like(inner, -1) if tag is None else span.shape[3] + jnp.argmax(tag[row, start], axis=2)
    labels = jnp.where(end - start >= 2, inner, leaf).astype(jnp.int32)
    return parses._replace(labels=jnp.where(parses.valid, labels, -1))
