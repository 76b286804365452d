r"""What a masked language model should say: the posterior of hidden words under a grammar, and its Bayes loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import require
from jaxft.structure.inside_outside import inside_outside
from jaxft.structure.pcfg import Grammar
from jaxft.structure.routes import Method


def masked_word_posterior(
    grammar: Grammar,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"] | None = None,
    *,
    mask: Bool[Array, "b t"],
    method: Method = "auto",
) -> Float[Array, "b t v"]:
    r"""Exact $P(w_i = w \mid w_{-M})$ at every position, from one pass with the masked words summed out.

    $$ P(w_i = w \mid w_{-M}) = \sum_X \mu(X, i)\, \frac{P(X \to w)}{\sum_{w'} P(X \to w')} \quad (i \in M) $$

    with $\mu$ the posterior of the preterminals given the words that are seen and the length. It is the optimum of the
    masked language-model objective on sentences of the grammar. With several masks a row is the marginal of one word.

    Args:
      grammar: The grammar.
      tokens: Word numbers; what stands at masked positions is ignored.
      lengths: Words of each sentence; ``None`` means all.
      mask: Positions M whose words are hidden.
      method: As ``inside``.

    Returns:
      Distributions over words; at seen positions all mass is on the word seen, behind the end and where the seen words
      are impossible all are 0.

    Raises:
      UserError: As ``inside``.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> grammar, words = random_pcfg(jax.random.key(0), 2, 2, 3), jnp.array([[0, 1, 2]])
      >>> posterior = masked_word_posterior(grammar, words, mask=jnp.array([[False, True, False]]))
      >>> round(float(posterior[0, 1].sum()), 5), posterior[0, 2].tolist()
      (1.0, [0.0, 0.0, 1.0])

    Reference:
      Zhao et al. 2023, arXiv 2303.08117, section 3.3 (Inside-Outside is optimal for masked language modelling).
    """
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask, bool)
    found = inside_outside(grammar, tokens, lengths, mask=mask, method=method)
    # A preterminal without a word has no posterior to share out.
    has_word = (grammar.log_emit > -jnp.inf).any(axis=1, keepdims=True)
    emissions = jax.nn.softmax(jnp.where(has_word, grammar.log_emit, 0), axis=1)
    hidden = jnp.einsum("btq,qv->btv", found.tag, emissions, precision="highest")
    words = jnp.arange(grammar.log_emit.shape[1], dtype=tokens.dtype)
    exists = found.tag.sum(axis=2, keepdims=True) > 0.5  # a word of a sentence that has a parse
    seen = ((tokens[..., None] == words[None, None]) & exists).astype(hidden.dtype)
    return jnp.where(mask[..., None], hidden, seen)


def bayes_loss(posterior: Float[Array, "b t v"], mask: Bool[Array, "b t"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The least masked language-model loss: mean entropy of the posterior over masked positions, in nats.

    Args:
      posterior: From ``masked_word_posterior``.
      mask: The masked positions.

    Returns:
      The mean over all masked positions, and its standard error over sentences.

    Raises:
      UserError: The shapes do not fit.

    Example:
      >>> even = jnp.full((2, 1, 4), 0.25)
      >>> [round(float(x), 4) for x in bayes_loss(even, jnp.ones((2, 1), bool))]  # log 4
      [1.3863, 0.0]
    """
    fits = posterior.shape[:2] == mask.shape
    require(fits, "bayes_loss", "mask must be [b, t] of posterior", f"{mask.shape}, {posterior.shape}", "Pass both")
    return _mean_over_masked(jax.scipy.special.entr(posterior).sum(axis=2), mask)


def excess_loss(
    posterior: Float[Array, "b t v"], log_model: Float[Array, "b t v"], mask: Bool[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""What a model's loss exceeds the Bayes loss by: mean $\mathrm{KL}(P \,\|\, \text{model})$ over masked positions.

    Never negative. Of far less variance than the difference of two losses measured on the hidden words.

    Args:
      posterior: From ``masked_word_posterior``.
      log_model: Log probabilities that the model gives to the words.
      mask: The masked positions.

    Returns:
      The mean over all masked positions in nats, and its standard error over sentences.

    Raises:
      UserError: The shapes do not fit.

    Example:
      >>> even = jnp.full((2, 1, 4), 0.25)
      >>> float(excess_loss(even, jnp.log(even), jnp.ones((2, 1), bool))[0])
      0.0
    """
    fits = posterior.shape[:2] == mask.shape and posterior.shape == log_model.shape
    got = f"{posterior.shape}, {log_model.shape}, {mask.shape}"
    require(fits, "excess_loss", "shapes must be [b, t, v] twice and [b, t]", got, "Pass log probabilities of words")
    cross = jnp.where(posterior > 0, -posterior * log_model, 0).sum(axis=2)
    return _mean_over_masked(cross - jax.scipy.special.entr(posterior).sum(axis=2), mask)


def _mean_over_masked(values: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> tuple[Array, Array]:
    """Mean over masked positions; the error is that of a ratio of two means over sentences."""
    counts = mask.sum(axis=1).astype(values.dtype)
    sums = jnp.where(mask, values, 0).sum(axis=1)
    total = jnp.maximum(counts.sum(), 1)
    mean = sums.sum() / total
    return mean, jnp.sqrt(jnp.sum((sums - mean * counts) ** 2)) / total
