"""The inside and the outside pass of one route over a batch, with the derivatives of log Z that posteriors are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.structure.chart import inside_pass, outside_pass, width_one
from jaxft.structure.dense import NEVER, scaled_words
from jaxft.structure.pcfg import Grammar
from jaxft.structure.routes import ROUTES
from jaxft.structure.sparse import SparseRules
from jaxft.structure.unary import unary_closure


class BatchInput(NamedTuple):
    """What the passes work on."""

    grammar: Grammar
    """Of the kind of the route."""
    groups: SparseRules | None
    log_terms: Float[Array, "b t q"]
    lengths: Int[Array, "b"]


class Passes(NamedTuple):
    """What both passes leave; derivatives are those of log Z."""

    log_z: Float[Array, "b"]
    p: Float[Array, "b t widths s"]
    scale: Float[Array, "b t widths"]
    sensitivity: Float[Array, "b t widths s"]
    d_grammar: Grammar
    d_root: Float[Array, "b a"]
    d_terms: Float[Array, "b t q"]


def both_passes(x: BatchInput, name: str, chunks: int) -> Passes:
    """Runs the route ``name`` up and down."""
    route = ROUTES[name]
    (context, leaves), pull_setup = jax.vjp(
        lambda grammar, log_terms: route.setup(grammar, log_terms, chunks, x.groups), x.grammar, x.log_terms
    )
    chart = inside_pass(route.recursion, chunks, context, leaves)
    p, scale = route.view(chart.values)

    def read(root: Array, log_terms: Array, values) -> Array:
        return log_partition_of_chart(root, log_terms, *route.view(values), x.lengths)

    log_z, pull_read = jax.vjp(read, roots_of_batch(x), x.log_terms, chart.values)
    d_root, d_words, d_values = pull_read(jnp.ones_like(log_z))
    d_context, d_values = outside_pass(route.recursion, chunks, context, chart, d_values)
    d_grammar, d_more = pull_setup((d_context, width_one(route.recursion, d_values)))
    sensitivity = route.sensitivity(context, chart.values, d_values)
    log_unary = getattr(x.grammar, "log_unary", None)
    if log_unary is not None:
        # That of the top symbol of a span, so far; a chain of unary rules has others below it.
        star = unary_closure(log_unary).star
        sensitivity = jnp.einsum("btwa,as->btws", sensitivity, star, precision="highest")
    return Passes(log_z, p, scale, sensitivity, d_grammar, d_root, d_words + d_more)


def roots_of_batch(x: BatchInput) -> Float[Array, "b a"]:
    """The root distribution of each sentence, so that its derivative is kept apart."""
    return jnp.broadcast_to(x.grammar.log_root[None], (len(x.lengths), *x.grammar.log_root.shape))


def log_partition_of_chart(
    log_root: Float[Array, "b a"], log_terms: Array, p: Array, scale: Array, lengths: Int[Array, "b"]
) -> Float[Array, "b"]:
    """Log probability of each sentence from the span that is all of it."""
    s = p.shape[3]
    root, first = jnp.exp(log_root), lengths[:, None]
    top = jnp.take_along_axis(p[:, 0], first[..., None], axis=1)[:, 0]
    top_scale = jnp.take_along_axis(scale[:, 0], first, axis=1)[:, 0]
    words, word_scale = scaled_words(log_terms[:, :1])
    word_scale = jnp.where(lengths == 1, word_scale[:, 0], 2 * NEVER)  # preterminals are roots of single words alone
    base = jnp.maximum(top_scale, word_scale)
    total = (root[:, :s] * top).sum(axis=1) * jnp.exp(top_scale - base)
    total += (root[:, s:] * words[:, 0]).sum(axis=1) * jnp.exp(word_scale - base)
    possible = (total > 0) & (lengths > 0)
    return jnp.where(possible, jnp.log(jnp.where(possible, total, 1)) + base, -jnp.inf)
