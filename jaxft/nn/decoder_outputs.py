"""Output functions ``f(params, batch)`` of a decoder: hidden states, logits and log-probabilities of responses.

Each builder returns a pure function which hands over the factors of its gradients (``jaxft.core.factors``). Those of a
``ResponseBatch`` do not depend on its layout: packed, padded left and padded right give the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import UserError, is_concrete, message, require
from jaxft.core.precision import accumulator
from jaxft.core.types import CausalTokens, Params, ResponseBatch
from jaxft.nn.decoder import Decoder, DecoderConfig, unembedding_table
from jaxft.nn.factored import Factored, factored
from jaxft.nn.tape import PLAIN, Tape


def make_hidden_states(config: DecoderConfig) -> Factored:
    """Hidden states after the final norm, those that the unembedding multiplies.

    Args:
      config: The decoder.

    Returns:
      ``f(params, tokens)`` of shape ``[b, t, d]``, tokens being ``CausalTokens``; rows at padding have no meaning.

    Raises:
      UserError: From the function: the parameters or the tokens do not fit the model.

    Example:
      >>> from jaxft.nn.decoder import decoder_config, init_decoder
      >>> config = decoder_config("gpt2", vocab_size=9, width=8, layers=1, heads=2, mlp_width=16, max_positions=8)
      >>> ids = jnp.array([[1, 2, 3]])
      >>> tokens = CausalTokens(ids, ids * 0 + 1, jnp.arange(3)[None])
      >>> make_hidden_states(config)(init_decoder(config, key=jax.random.key(0)), tokens).shape
      (1, 3, 8)
    """

    def f(params: Params, tokens: CausalTokens, tape: Tape) -> Float[Array, "b t d"]:
        return _hidden("make_hidden_states", config, params, tokens, tape)

    return factored(f)


def make_next_token_logits(config: DecoderConfig) -> Factored:
    """Logits of the whole vocabulary for the token after every token, in float32 at least.

    Args:
      config: The decoder.

    Returns:
      ``f(params, tokens)`` of shape ``[b, t, v]``, tokens being ``CausalTokens``; rows at padding have no meaning.

    Raises:
      UserError: As ``make_hidden_states``.
    """

    def f(params: Params, tokens: CausalTokens, tape: Tape) -> Float[Array, "b t v"]:
        hidden = _hidden("make_next_token_logits", config, params, tokens, tape)
        return _logits(config, params, hidden, tape)

    return factored(f)


def make_response_states(config: DecoderConfig) -> Factored:
    r"""Hidden states $h_{x, y_{<k}}$ that predict the tokens of responses.

    The first is that of the last token of the prompt, the last that before the last token of the response.

    Args:
      config: The decoder.

    Returns:
      ``f(params, batch)`` of shape ``[n, r, k, d]``, batch being a ``ResponseBatch``; 0 where its mask is 0.

    Raises:
      UserError: From the function: the parameters or the batch do not fit the model.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, definition 2.
    """

    def f(params: Params, batch: ResponseBatch, tape: Tape) -> Float[Array, "n r k d"]:
        states = _response_states("make_response_states", config, params, batch, tape)
        return jnp.where(_counted(batch)[..., None], states, 0)

    return factored(f)


def make_first_token_logits(config: DecoderConfig) -> Factored:
    """Logits of the whole vocabulary after the last token of the prompt, in float32 at least.

    Args:
      config: The decoder.

    Returns:
      ``f(params, batch)`` of shape ``[n, v]``, batch being a ``ResponseBatch``.

    Raises:
      UserError: As ``make_response_states``.
    """

    def f(params: Params, batch: ResponseBatch, tape: Tape) -> Float[Array, "n v"]:
        first = batch._replace(
            source=batch.source[:, :1, :1], targets=batch.targets[:, :1, :1], mask=batch.mask[:, :1, :1]
        )
        states = _response_states("make_first_token_logits", config, params, first, tape)
        return _logits(config, params, states[:, 0, 0], tape)

    return factored(f)


def make_response_token_log_probs(config: DecoderConfig, *, chunk: int | None = None) -> Factored:
    r"""Log-probability of every token of the responses, $\ln \pi(y_k \mid x, y_{<k})$.

    Only the states that predict a token of a response are multiplied by the unembedding.

    Args:
      config: The decoder.
      chunk: Tokens that are multiplied by the unembedding at a time, once more on the way back, so that no logits
        but theirs are held; ``None`` holds all, ``[n r k, v]``. It does not apply while taps are recorded, which are
        as large as the logits.

    Returns:
      ``f(params, batch)`` of shape ``[n, r, k]`` in float32 at least, batch being a ``ResponseBatch``; 0 where its mask
      is 0.

    Raises:
      UserError: ``chunk`` is not positive; from the function as ``make_response_states``.

    Example:
      >>> from jaxft.nn.decoder import decoder_config, init_decoder
      >>> config = decoder_config("gpt2", vocab_size=9, width=8, layers=1, heads=2, mlp_width=16, max_positions=8)
      >>> ids = jnp.array([[[1, 2, 3, 4]]])
      >>> tokens = CausalTokens(ids, ids * 0 + 1, jnp.arange(4)[None, None])
      >>> batch = ResponseBatch(tokens, jnp.array([[[1, 2]]]), ids[:, :, 2:], jnp.array([[[1, 1]]]))
      >>> make_response_token_log_probs(config)(init_decoder(config, key=jax.random.key(0)), batch).shape
      (1, 1, 2)
    """
    where = "make_response_token_log_probs"
    _check_chunk(where, chunk)

    def f(params: Params, batch: ResponseBatch, tape: Tape) -> Float[Array, "n r k"]:
        return _response_token_log_probs(where, config, params, batch, tape, chunk)

    return factored(f)


def make_response_log_probs(config: DecoderConfig, *, chunk: int | None = None) -> Factored:
    r"""Log-probability of the responses, $\ln \pi(y \mid x) = \sum_k \ln \pi(y_k \mid x, y_{<k})$.

    Args:
      config: The decoder.
      chunk: As in ``make_response_token_log_probs``.

    Returns:
      ``f(params, batch)`` of shape ``[n, r]`` in float32 at least, batch being a ``ResponseBatch``.

    Raises:
      UserError: As ``make_response_token_log_probs``.
    """
    where = "make_response_log_probs"
    _check_chunk(where, chunk)

    def f(params: Params, batch: ResponseBatch, tape: Tape) -> Float[Array, "n r"]:
        return _response_token_log_probs(where, config, params, batch, tape, chunk).sum(axis=-1)

    return factored(f)


TOKENIZER = "Use the tokenizer of this checkpoint"


def _hidden(
    where: str, config: DecoderConfig, params: Params, tokens: CausalTokens, tape: Tape
) -> Float[Array, "b t d"]:
    _check_params(where, config, params)
    _check_tokens(where, config, tokens, axes="bt")
    tokens = CausalTokens(*map(jnp.asarray, tokens))
    return tape.apply(Decoder(config), params["decoder"], tokens, at="decoder")


def _logits(config: DecoderConfig, params: Params, hidden: Float[Array, "*n d"], tape: Tape) -> Float[Array, "*n v"]:
    table = unembedding_table(config, params)
    return tape.transposed(hidden, table, out_dtype=accumulator(hidden.dtype))


def _counted(batch: ResponseBatch) -> Array:
    return jnp.asarray(batch.mask) > 0


def _response_states(
    where: str, config: DecoderConfig, params: Params, batch: ResponseBatch, tape: Tape
) -> Float[Array, "n r k d"]:
    """States at ``source``; where the mask is 0 that of some token."""
    _check_params(where, config, params)
    _check_responses(where, config, batch)
    n, s, t = batch.tokens.input_ids.shape
    rows = CausalTokens(*(jnp.asarray(x).reshape(n * s, t) for x in batch.tokens))
    hidden = tape.apply(Decoder(config), params["decoder"], rows, at="decoder").reshape(n, s * t, -1)
    # Plain indexing would give the last state for a column beyond.
    at = hidden.at[jnp.arange(n)[:, None, None], jnp.asarray(batch.source)]
    return at.get(mode="fill", fill_value=jnp.nan)


def _response_token_log_probs(
    where: str, config: DecoderConfig, params: Params, batch: ResponseBatch, tape: Tape, chunk: int | None
) -> Float[Array, "n r k"]:
    states, counted = _response_states(where, config, params, batch, tape), _counted(batch)
    # One axis of tokens: a product with the table, and no loop over examples.
    flat, targets = states.reshape(-1, states.shape[-1]), jnp.asarray(batch.targets).reshape(-1)
    if chunk is None or chunk >= flat.shape[0] or tape is not PLAIN:
        log_probs = _target_log_probs(_logits(config, params, flat, tape), targets)
    else:
        log_probs = _chunked_log_probs(config, params, flat, targets, chunk)
    # A token outside the vocabulary has log-probability NaN; the factor makes its gradient NaN too.
    known = (targets >= 0) & (targets < config.vocab_size) | ~counted.reshape(-1)
    log_probs = log_probs * jnp.where(known, 1.0, jnp.nan).astype(log_probs.dtype)
    return jnp.where(counted, log_probs.reshape(counted.shape), 0)


def _target_log_probs(logits: Float[Array, "n v"], targets: Int[Array, "n"]) -> Float[Array, "n"]:
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def _chunked_log_probs(
    config: DecoderConfig, params: Params, states: Float[Array, "n d"], targets: Int[Array, "n"], chunk: int
) -> Float[Array, "n"]:
    size, wide = states.shape[0], accumulator(states.dtype)
    # The chunks' gradients by the table are summed in its type.
    table = unembedding_table(config, params).astype(wide)
    missing = -size % chunk
    states = jnp.pad(states, ((0, missing), (0, 0))).reshape(-1, chunk, states.shape[-1])
    targets = jnp.pad(targets, (0, missing)).reshape(-1, chunk)

    @jax.checkpoint
    def of_chunk(states, targets):
        return _target_log_probs(PLAIN.transposed(states, table, out_dtype=wide), targets)

    return jax.lax.map(lambda pair: of_chunk(*pair), (states, targets)).reshape(-1)[:size]


def _check_chunk(where: str, chunk: int | None) -> None:
    rule = "chunk must be None or a positive number of tokens"
    require(chunk is None or chunk > 0, where, rule, chunk, "Pass 1024, say")


def _check_params(where: str, config: DecoderConfig, params: Params) -> None:
    advice = "Load a checkpoint, or call init_decoder, with this config"
    require("decoder" in params, where, "params must hold 'decoder'", f"only {sorted(params)}", advice)
    rule = f"params must hold {'no ' if config.tied else ''}'unembedding' where config.tied is {config.tied}"
    require(("unembedding" in params) != config.tied, where, rule, f"only {sorted(params)}", advice)


def _check_tokens(where: str, config: DecoderConfig, tokens: CausalTokens, *, axes: str) -> None:
    rule, advice = (
        "tokens must be a jaxft.core.types.CausalTokens",
        f"Pass CausalTokens({', '.join(CausalTokens._fields)})",
    )
    require(isinstance(tokens, CausalTokens), where, rule, type(tokens).__name__, advice)
    shapes = [np.shape(x) for x in tokens]
    rule = f"input_ids, segment_ids and positions must be [{', '.join(axes)}] alike, and none of these 0"
    fits = len(shapes[0]) == len(axes) and 0 not in shapes[0] and shapes == shapes[:1] * 3
    require(fits, where, rule, f"shapes {shapes}", "Give a single row a leading axis of 1")
    if not is_concrete(tokens):
        return
    # Concrete even where the parameters are traced.
    _check_range(where, "input_ids", tokens.input_ids, config.vocab_size, TOKENIZER)
    _check_range(where, "segment_ids", tokens.segment_ids, None, "Mark padding by 0")
    longest = config.max_positions if config.family == "gpt2" else None
    _check_range(where, "positions", tokens.positions, longest, "Truncate the prompt or the response")


def _check_responses(where: str, config: DecoderConfig, batch: ResponseBatch) -> None:
    fields = ", ".join(ResponseBatch._fields)
    rule, advice = "a batch must be a jaxft.core.types.ResponseBatch", f"Pass ResponseBatch({fields})"
    require(isinstance(batch, ResponseBatch), where, rule, type(batch).__name__, advice)
    _check_tokens(where, config, batch.tokens, axes="nst")
    n, s, t = np.shape(batch.tokens.input_ids)
    shapes = [np.shape(x) for x in batch[1:]]
    rule = f"source, targets and mask must be [n, r, k] alike, n = {n} as in the tokens, and none of these 0"
    fits = len(shapes[0]) == 3 and shapes[0][0] == n and 0 not in shapes[0] and shapes == shapes[:1] * 3
    require(fits, where, rule, f"shapes {shapes}", "Pass one response or more an example")
    if not is_concrete(batch[1:]):
        return
    _check_range(where, "source", batch.source, s * t, "Count columns through the rows of an example end to end")
    _check_range(where, "targets", batch.targets, config.vocab_size, TOKENIZER)


def _check_range(where: str, name: str, values: Array | np.ndarray, limit: int | None, advice: str) -> None:
    low, high = int(np.min(np.asarray(values))), int(np.max(np.asarray(values)))
    if low < 0 or (limit is not None and high >= limit):
        rule = f"{name} must lie in [0, {limit})" if limit is not None else f"{name} must be 0 or more"
        raise UserError(message(where, rule, f"from {low} to {high}", advice))
