"""Outputs of an encoder token by token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.checks import require
from jaxft.core.types import Params, TokenBatch
from jaxft.nn.factored import Factored, factored
from jaxft.nn.outputs import _hidden, _word_logits
from jaxft.nn.tape import Tape
from jaxft.nn.transformer import EncoderConfig


def make_token_log_probs(config: EncoderConfig, *, special_ids: Sequence[int] = ()) -> Factored:
    r"""Log-probability of every token of the input at its own position, through the masked-word head.

    Entry t of an example is $\log p(x_t \mid x)$. As outputs of a kernel they make it ``[n, t, m, t']``, a kernel of
    tokens. No token is masked: the encoder sees the token whose probability it gives, so that the sum over t is no
    pseudo-likelihood, for which an example takes a copy with a mask in the place of every token.

    Args:
      config: The encoder; ``params`` must hold ``encoder`` and ``mlm``.
      special_ids: Tokens that count like padding: their entry is 0, and so is its gradient.

    Returns:
      ``f(params, batch)`` of shape ``[b, t]``, 0 at padding.

    Raises:
      UserError: An id that leaves the vocabulary; from the function as ``make_mlm_logits``.

    Example:
      >>> from jaxft.nn.transformer import init_encoder
      >>> config = EncoderConfig("bert", 9, 4, 1, 2, 8, 5, 2, 1e-12, pad_id=0)
      >>> params = init_encoder(config, key=jax.random.key(0), mlm=True)
      >>> ids = jnp.array([[1, 2, 3]])
      >>> batch = TokenBatch(ids, jnp.array([[1, 1, 0]]), ids * 0, jnp.array([0]))
      >>> (make_token_log_probs(config, special_ids=[1])(params, batch) < 0).tolist()
      [[False, True, False]]

    Reference:
      Salazar et al. 2020, arXiv 1910.14659, section 2 (the pseudo-likelihood, with masks).
    """
    where = "make_token_log_probs"
    special = tuple(int(i) for i in special_ids)
    inside = all(0 <= i < config.vocab_size for i in special)
    rule = f"special_ids must lie in [0, {config.vocab_size})"
    require(inside, where, rule, special, "Use the tokenizer of this checkpoint")

    def f(params: Params, batch: TokenBatch, tape: Tape, *, dropout_key: Array | None = None) -> Float[Array, "b t"]:
        hidden = _hidden(where, config, params, batch, tape, dropout_key, head="mlm")
        logits = _word_logits(config, params, hidden, tape)
        ids = jnp.asarray(batch.input_ids)
        own = jnp.take_along_axis(logits, ids[:, :, None], axis=-1)[:, :, 0]
        counted = jnp.asarray(batch.attention_mask) > 0
        for token in special:
            counted &= ids != token
        return jnp.where(counted, own - jax.nn.logsumexp(logits, axis=-1), 0)

    return factored(f)
