"""From a configuration to what is tuned: a decoder, its prompts and preference pairs.

Everything here is checked before a run directory is made.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.likelihood_displacement.config import LikelihoodDisplacementConfig, sides
from jaxft.core.checks import require
from jaxft.core.rng import host_stream
from jaxft.core.types import OutputFn, Params, ResponseBatch
from jaxft.data.causal_tokenizer import CausalTokenizer, load_causal_tokenizer, require_vocabulary, tokenize_prompts
from jaxft.data.requests import question_prompts, request_prompts, written_preferences
from jaxft.lab.decoder_pretraining import request_checkpoint
from jaxft.nn.decoder import DecoderConfig, unembedding_table
from jaxft.nn.decoder_outputs import make_first_token_logits, make_response_log_probs, make_response_states
from jaxft.nn.pretrained_decoders import load_decoder
from jaxft.tuning.encoding import EncodedPreferences, encode_preferences
from jaxft.tuning.packing import BatchShape, batch_shape, make_response_batch, response_batch
from jaxft.tuning.preferences import PreferencePair, read_preferences


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder, its tokenizer, and what is asked of it."""

    config: DecoderConfig
    params: Params
    tokenizer: CausalTokenizer
    source: str
    embedded: bool

    # One object each, however often asked for: compiled programs are found again by it.
    @functools.cached_property
    def log_probs(self) -> OutputFn:
        """``f(params, batch)``: log-probabilities of responses, ``[n, r]``."""
        return make_response_log_probs(self.config)

    @functools.cached_property
    def states(self) -> OutputFn:
        """``f(params, batch)``: hidden states that predict them, ``[n, r, k, d]``."""
        return make_response_states(self.config)

    @functools.cached_property
    def first_logits(self) -> OutputFn:
        """``f(params, batch)``: logits of the first token, ``[n, v]``."""
        return make_first_token_logits(self.config)

    def table(self, params: Params) -> Float[Array, "v d"]:
        """The unembedding."""
        return unembedding_table(self.config, params)

    def word(self, token: int) -> str:
        """A token as text."""
        return self.tokenizer.text([token])


class Loaded(NamedTuple):
    """A model and the user's texts; ``None`` means the generated ones."""

    model: Model
    prompts: list[list[int]] | None
    """Token ids of the prompts of part single."""
    pairs: EncodedPreferences | None


class Pairs(NamedTuple):
    """Preference pairs as arrays."""

    encoded: EncodedPreferences
    batch: ResponseBatch
    lengths: Int[np.ndarray, "n 2"]

    def rows(self, index: Sequence[int] | Int[np.ndarray, "m"]) -> "Pairs":
        """Those at ``index``."""
        at = np.asarray(index)
        return Pairs(self.encoded.select(at), jax.tree.map(lambda leaf: leaf[at], self.batch), self.lengths[at])


def load(config: LikelihoodDisplacementConfig) -> Loaded:
    """The decoder and the user's files.

    Raises:
      UserError: A folder that holds no decoder, faulty files, answers that are more than a token.
    """
    embedded = config.checkpoint is None
    folder = request_checkpoint(config.pretraining) if embedded else Path(str(config.checkpoint))
    decoder = load_decoder(folder)
    tokenizer = load_causal_tokenizer(folder)
    require_vocabulary(tokenizer, decoder.config.vocab_size)
    source = "embedded decoder of generated requests" if embedded else folder.name
    model = Model(decoder.config, decoder.params, tokenizer, source, embedded)
    if "single" in config.parts:
        for comparison in config.single.comparisons:
            answer_ids(model, comparison)
    prompts = pairs = None
    if config.data.prompts is not None and "single" in config.parts:
        prompts = _read_prompts(config, model)
    if config.data.pairs is not None and set(config.parts) != {"single"}:
        pairs = _read_pairs(config, model)
    return Loaded(model, prompts, pairs)


def answer_ids(model: Model, comparison: str) -> tuple[int, int]:
    """The tokens of the preferred and of the other answer.

    Raises:
      UserError: One of them is not one token.
    """
    ids = [model.tokenizer.ids(answer) for answer in sides(comparison)]
    shown = ", ".join(f"{side!r} is {len(i)} tokens" for side, i in zip(sides(comparison), ids, strict=True))
    vocabulary = model.tokenizer.tokenizer
    known = [len(i) == 1 and vocabulary.id_to_token(i[0]) != "<unk>" for i in ids]
    unknown = ", ".join(side for side, fine in zip(sides(comparison), known, strict=True) if not fine)
    advice = "Write answers as the vocabulary has them, a leading space included"
    require(all(known), "single.comparisons", "an answer must be a token", f"{shown} (not: {unknown})", advice)
    return ids[0][0], ids[1][0]


def single_prompts(config: LikelihoodDisplacementConfig, loaded: Loaded) -> list[list[int]]:
    """Prompts of part single: first those that are tuned on, then those of supervised tuning."""
    single = config.single
    wanted = single.prompts + (single.sft_prompts if single.sft_steps else 0)
    if loaded.prompts is None:
        asked = question_prompts(size=min(wanted, 1000), seed=config.seed)
        return tokenize_prompts(loaded.model.tokenizer, [question.prompt for question in asked])
    return loaded.prompts[:wanted]


def answer_batch(model: Model, prompts: Sequence[list[int]], answers: Sequence[int], *, tokens: int) -> ResponseBatch:
    """Prompts with answers of one token each, the same for all."""
    responses = [[[answer] for answer in answers]] * len(prompts)
    batch = make_response_batch(prompts, responses, tokens=tokens, multiple=1, pad_id=model.tokenizer.pad_id)
    return jax.tree.map(jnp.asarray, batch)


def pair_pools(config: LikelihoodDisplacementConfig, loaded: Loaded) -> dict[int, Pairs]:
    """The pairs of part percentiles by seed, all of one shape."""
    part = config.percentiles
    if loaded.pairs is None:
        pools = {seed: _written(config, loaded.model, seed=seed) for seed in part.seeds}
    else:
        pools = {seed: _drawn(loaded.pairs, part.pool, seed=seed) for seed in part.seeds}
    shape = common_shape(list(pools.values()))
    return {seed: as_pairs(encoded, shape) for seed, encoded in pools.items()}


def request_ids(config: LikelihoodDisplacementConfig, loaded: Loaded, *, seed: int) -> tuple[list[list[int]], int]:
    """Harmful requests of part unalignment, or the prompts of the user's pairs, and how many of them are tuned on."""
    part, model = config.unalignment, loaded.model
    wanted = part.prompts + part.held_out
    if loaded.pairs is None:
        asked = request_prompts(size=min(wanted, 1000), seed=seed, harmful_frac=1.0)
        prompts = tokenize_prompts(model.tokenizer, [request.prompt for request in asked])
    else:
        distinct = list({tuple(ids): None for ids in loaded.pairs.prompts})
        order = host_stream(seed, "unalignment prompts").permutation(len(distinct))[:wanted]
        prompts = [list(distinct[i]) for i in order]
    trained = min(part.prompts, max(1, len(prompts) * part.prompts // wanted))
    return prompts, trained


def common_shape(sets: Sequence[EncodedPreferences]) -> BatchShape:
    """Sizes that hold the pairs of all sets."""
    return BatchShape(*(max(sizes) for sizes in zip(*map(batch_shape, sets), strict=True)))


def as_pairs(encoded: EncodedPreferences, shape: BatchShape) -> Pairs:
    """Pairs packed into arrays of this shape."""
    batch = response_batch(encoded, tokens=shape.tokens, response_tokens=shape.response_tokens)
    return Pairs(encoded, jax.tree.map(jnp.asarray, batch), encoded.lengths)


def encoded_texts(
    config: LikelihoodDisplacementConfig, model: Model, rows: Sequence[tuple[str, str, str]]
) -> EncodedPreferences:
    """Prompt, chosen and rejected of generated texts as token ids."""
    pairs = [PreferencePair(prompt, f" {a}", f" {b}", line, {}) for line, (prompt, a, b) in enumerate(rows, 1)]
    return encode_preferences(model.tokenizer, pairs, max_tokens=config.data.max_tokens)


def leaves_by_name(params: Params) -> dict[str, Any]:
    """Leaves by path, for a file of arrays."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def params_like(like: Params, leaves: dict[str, np.ndarray]) -> Params:
    """Leaves of a file in the tree and types of ``like``."""
    named = leaves_by_name(like)
    values = [jnp.asarray(leaves[name], leaf.dtype) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _written(config: LikelihoodDisplacementConfig, model: Model, *, seed: int) -> EncodedPreferences:
    made = written_preferences(size=min(config.percentiles.pool, 1000), seed=seed)
    return encoded_texts(config, model, [(pair.prompt, pair.chosen, pair.rejected) for pair in made])


def _drawn(pairs: EncodedPreferences, size: int, *, seed: int) -> EncodedPreferences:
    order = host_stream(seed, "pool").permutation(len(pairs))[:size]
    return pairs.select(np.sort(order))


def _read_prompts(config: LikelihoodDisplacementConfig, model: Model) -> list[list[int]]:
    path = Path(str(config.data.prompts))
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    few = config.single.prompts + bool(config.single.sft_steps)
    advice = "Add prompts, or lower --single.prompts"
    require(len(lines) >= few, f"{path}", f"needs {few} prompts or more, a line each", len(lines), advice)
    chat = config.data.chat and model.tokenizer.chat_template is not None
    asked = [[{"role": "user", "content": line}] if chat else line + "\n" for line in lines]
    ids = tokenize_prompts(model.tokenizer, asked)
    longest = max(map(len, ids))
    room = config.data.max_tokens - 2
    require(longest <= room, f"{path}", f"a prompt must have at most {room} tokens", longest, "Raise --data.max-tokens")
    return ids


def _read_pairs(config: LikelihoodDisplacementConfig, model: Model) -> EncodedPreferences:
    path = Path(str(config.data.pairs))
    read = read_preferences(path, on_fault="drop")
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}" if not config.data.chat else None
    longest = config.data.max_tokens
    encoded = encode_preferences(
        model.tokenizer,
        read.pairs,
        max_tokens=longest,
        max_prompt_tokens=max(1, longest // 2),
        chat_template=template,
        on_fault="drop",
    )
    return dataclasses.replace(encoded, dropped=sorted([*read.dropped, *encoded.dropped]))
