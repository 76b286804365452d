"""Continuations of prompts by a decoder, token by token, with a cache of keys and values."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.core.types import CausalTokens, Params
from jaxft.nn.decoder import CachedDecoder, DecoderConfig, KeyValueCache
from jaxft.nn.decoder_outputs import _check_params, _check_tokens, _logits
from jaxft.nn.tape import PLAIN


class Generation(NamedTuple):
    """Continuations; beyond the end of one its ids are ``pad_id`` and its log-probabilities 0."""

    ids: Int[Array, "b k"]
    log_probs: Float[Array, "b k"]
    """Of the tokens under the model itself, whatever the temperature and the cut-offs they were drawn with."""
    lengths: Int[Array, "b"]
    """Tokens of each, that which ended it included."""


class _Choice(NamedTuple):
    """How the next token is chosen; hashable, since a program is compiled for each."""

    greedy: bool
    top_k: int | None
    top_p: float | None


def generate(
    config: DecoderConfig,
    params: Params,
    prompts: CausalTokens,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    key: Array | None = None,
) -> Generation:
    r"""Continues every prompt by its likeliest token at each step, or by tokens drawn from the model.

    At a temperature $\tau > 0$ token z has a probability proportional to $\pi(z)^{1/\tau}$ among those that ``top_k``
    leaves, and of these ``top_p``. A row's draws depend on the key and the number of the row alone, not on the other
    rows. The prompts are read once; the loop ends when every row has. Memory besides that of the prompts' forward: keys
    and values of ``t + max_new_tokens`` tokens. Beam search and branching prompts are not covered.

    Args:
      config: The decoder.
      params: Its parameters.
      prompts: Prompts ``[b, t]`` of segment 1, padded on either side.
      max_new_tokens: Where a continuation is cut off.
      temperature: $\tau$; 0 takes the likeliest token.
      top_k: Draw from this many likeliest tokens.
      top_p: Draw from the fewest likeliest tokens whose probabilities add up to this.
      eos_ids: Tokens that end a continuation.
      pad_id: What stands beyond its end.
      key: Random key, needed where ``temperature`` is positive.

    Returns:
      The continuations.

    Raises:
      UserError: A prompt without tokens, options out of range, no key to draw with, or no room for the continuation.

    Example:
      >>> from jaxft.nn.decoder import decoder_config, init_decoder
      >>> config = decoder_config("gpt2", vocab_size=9, width=8, layers=1, heads=2, mlp_width=16, max_positions=8)
      >>> ids = jnp.array([[1, 2, 3]])
      >>> prompts = CausalTokens(ids, ids * 0 + 1, jnp.arange(3)[None])
      >>> out = generate(config, init_decoder(config, key=jax.random.key(0)), prompts, max_new_tokens=4)
      >>> out.ids.shape, out.lengths.tolist()
      ((1, 4), [4])

    Reference:
      Holtzman et al. 2020, arXiv 1904.09751, section 3.1 (``top_p``).
    """
    where = "generate"
    _check_params(where, config, params)
    _check_tokens(where, config, prompts, axes="bt")
    _check_options(where, config, temperature, top_k, top_p, (*eos_ids, pad_id), key)
    _check_room(where, config, prompts, max_new_tokens)
    choice = _Choice(temperature == 0, top_k, top_p)
    # For one token a loop over the layers takes no longer than all of them in a row, and a tenth to compile.
    config = dataclasses.replace(config, scan_layers=True, remat=False)
    # A greedy program takes a key that it does not use.
    key = jax.random.key(0) if key is None else key
    prompts = CausalTokens(*(jnp.asarray(x, jnp.int32) for x in prompts))
    ends = tuple(int(i) for i in eos_ids)
    return _generated(config, params, prompts, key, temperature, max_new_tokens, choice, ends, pad_id)


class _State(NamedTuple):
    """Of the loop: ``step`` tokens of each row are written."""

    step: Int[Array, ""]
    cache: KeyValueCache
    token: Int[Array, "b"]
    going: Bool[Array, "b"]
    out: Generation


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "choice", "eos_ids", "pad_id"))
def _generated(
    config: DecoderConfig,
    params: Params,
    prompts: CausalTokens,
    key: Array,
    temperature: float | Array,
    max_new_tokens: int,
    choice: _Choice,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Generation:
    b, t = prompts.input_ids.shape
    rows, decoder, variables = jnp.arange(b), CachedDecoder(config), {"params": params["decoder"]}

    def written(step, cache, going, out, logits):
        token = _chosen(logits, key, step, temperature, choice)
        log_prob = jax.nn.log_softmax(logits, axis=-1)[rows, token]
        out = Generation(
            out.ids.at[:, step].set(jnp.where(going, token, pad_id)),
            out.log_probs.at[:, step].set(jnp.where(going, log_prob, 0)),
            out.lengths + going,
        )
        ended = jnp.isin(token, jnp.array(eos_ids, jnp.int32))
        return _State(step + 1, cache, token, going & ~ended, out)

    def read(tokens, cache) -> tuple[Array, KeyValueCache]:
        return cast(Any, decoder.apply(variables, tokens, cache))

    def another(state):
        tokens = CausalTokens(state.token, jnp.ones_like(state.token), first + state.step - 1)
        hidden, own = read(CausalTokens(*(x[:, None] for x in tokens)), state.cache)
        cache = KeyValueCache(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, new, t + state.step - 1, axis)
                for old, new, axis in zip(state.cache, own, (2, 2, 1), strict=True)
            )
        )
        return written(state.step, cache, state.going, state.out, _logits(config, params, hidden[:, 0], PLAIN))

    hidden, cache = read(prompts, None)
    last = jnp.where(prompts.segment_ids > 0, jnp.arange(t)[None], 0).max(axis=1)
    first = prompts.positions[rows, last] + 1
    logits = _logits(config, params, hidden[rows, last], PLAIN)
    # The last token is never read: it needs no column.
    room = ((0, 0), (0, max_new_tokens - 1))
    columns = ((0, 0), *room, (0, 0), (0, 0))
    padded = (jnp.pad(cache.key, columns), jnp.pad(cache.value, columns))
    cache = KeyValueCache(*padded, jnp.pad(cache.segment_ids, room))
    zeros = jnp.zeros((b, max_new_tokens), jnp.int32)
    empty = Generation(zeros + pad_id, zeros.astype(logits.dtype), zeros[:, 0])
    state = written(jnp.int32(0), cache, jnp.ones(b, bool), empty, logits)
    return jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & s.going.any(), another, state).out


def _chosen(
    logits: Float[Array, "b v"], key: Array, step: Int[Array, ""], temperature: float | Array, choice: _Choice
) -> Int[Array, "b"]:
    if choice.greedy:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / jnp.asarray(temperature, logits.dtype)
    if choice.top_k is not None:
        lowest = jax.lax.top_k(logits, choice.top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if choice.top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it do not add up to top_p yet; the first always does.
        stays = jnp.cumsum(shares, axis=-1) - shares < choice.top_p
        lowest = jnp.where(stays, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _check_options(
    where: str,
    config: DecoderConfig,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    ids: Sequence[int],
    key: Array | None,
) -> None:
    v = config.vocab_size
    require(temperature >= 0, where, "temperature must be 0 or more", temperature, "Pass 0 for the likeliest token")
    rule, fits = f"top_k must be None or from 1 to {v}", top_k is None or 1 <= top_k <= v
    require(fits, where, rule, top_k, "Leave it out to draw from all tokens")
    rule, fits = "top_p must be None or in (0, 1]", top_p is None or 0 < top_p <= 1
    require(fits, where, rule, top_p, "Leave it out to draw from all tokens")
    rule, fits = f"eos_ids and pad_id must lie in [0, {v})", all(0 <= i < v for i in ids)
    require(fits, where, rule, list(ids), "Use the tokenizer of this checkpoint")
    rule = "a key is needed to draw tokens"
    require(temperature == 0 or key is not None, where, rule, "none", "Pass key=jax.random.key(0)")


def _check_room(where: str, config: DecoderConfig, prompts: CausalTokens, max_new_tokens: int) -> None:
    require(max_new_tokens >= 1, where, "max_new_tokens must be positive", max_new_tokens, "Pass 1 or more")
    longest = np.shape(prompts.input_ids)[1]
    if is_concrete(prompts):
        segments, positions = np.asarray(prompts.segment_ids), np.asarray(prompts.positions)
        trunk = bool((segments <= 1).all())
        require(trunk, where, "prompts must not branch", f"segment {segments.max()}", "Pass the trunk, as segment 1")
        empty = np.flatnonzero(~(segments > 0).any(axis=1)).tolist()
        require(not empty, where, "every prompt must have a token", f"none in rows {empty[:5]}", "Begin with one")
        longest = int(positions[segments > 0].max()) + 1
    if config.family == "gpt2":
        rule = f"prompt and continuation must fit the model's {config.max_positions} positions"
        got = f"{longest} and {max_new_tokens} tokens"
        fits = longest + max_new_tokens <= config.max_positions
        require(fits, where, rule, got, "Truncate the prompts, or ask for fewer tokens")
