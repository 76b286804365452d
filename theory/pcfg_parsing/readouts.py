"""What the constructed transformer has computed, read off its states: products by position, and a softmax head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.types import TokenBatch
from theory.pcfg_parsing.construction import Construction


class ReadMarginals(NamedTuple):
    """Posteriors as the dynamic program gives them; all 0 where a sentence has no parse."""

    log_z: Float[Array, "b"]
    span: Float[Array, "b i j s"]
    """Of nonterminal A over [i, j): i from 0 to t - 1, j from 0 to t."""
    tag: Float[Array, "b t q"]


def read_inside(model: Construction, hidden: Float[Array, "b positions d"]) -> Float[Array, "b i j a"]:
    """Inside probabilities of all symbols over [i, j), times the tilt to the power j - i; 0 where not computed yet.

    Args:
      model: The construction.
      hidden: States after any layer, of a begin token and t words.

    Returns:
      The chart, i from 0 to t - 1 and j from 0 to t.
    """
    chart = hidden[..., model.coordinates.left][:, :-1, :, : hidden.shape[1]]
    end, start = jnp.arange(hidden.shape[1])[None, :], jnp.arange(hidden.shape[1] - 1)[:, None]
    return jnp.where((end > start)[None, :, :, None], jnp.swapaxes(chart, 2, 3), 0)


def read_marginals(model: Construction, hidden: Float[Array, "b positions d"], batch: TokenBatch) -> ReadMarginals:
    r"""Span and tag posteriors and log Z: products of inside and outside coordinates of one token.

    Every word's token holds Z, as $\sum_P \alpha(P, t-1, t) \beta(P, t-1, t)$; it is read at the first.

    Args:
      model: The construction.
      hidden: States after the last layer.
      batch: What the model has read.

    Returns:
      Posteriors (divided by Z).
    """
    at, positions = model.coordinates, hidden.shape[1]
    tag = hidden[:, 1:, at.word] * hidden[:, 1:, at.tag]
    z = tag[:, 0].sum(axis=-1)
    parsable = z > 0
    scale = jnp.where(parsable, 1 / jnp.where(parsable, z, 1), 0)[:, None, None]
    inside = read_inside(model, hidden)[..., : len(at.forward)]
    outside = jnp.swapaxes(hidden[:, :-1, at.forward], 2, 3)
    outside = jnp.pad(outside, ((0, 0), (0, 0), (2, 0), (0, 0)))[:, :, :positions]
    lengths = batch.attention_mask.sum(axis=1).astype(z.dtype) - 1
    log_z = jnp.log(z) - lengths * jnp.log(jnp.asarray(model.tilt, z.dtype))
    return ReadMarginals(log_z, inside * outside * scale[..., None], tag * scale)


def read_posterior(model: Construction, hidden: Float[Array, "b positions d"]) -> Float[Array, "b t v"]:
    """Probability of each word at each place given all *other* unmasked words: a softmax head on the last states.

    At a masked word this is the Bayes posterior of the masked-word objective; at any other the posterior that masking
    it too would give. Rows at padding, and of sentences without a parse, are 0.

    Args:
      model: The construction.
      hidden: States after the last layer.

    Returns:
      Distributions over words.
    """
    emit = jnp.exp(model.grammar.log_emit).astype(hidden.dtype)
    scores = hidden[:, 1:, model.coordinates.tag] @ emit
    known = scores.sum(axis=-1, keepdims=True) > 0
    logits = jnp.log(jnp.where(known, scores, 1))
    return jnp.where(known, jax.nn.softmax(logits, axis=-1), 0)
