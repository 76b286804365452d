"""The embedded decoder: a small causal language model of generated requests that refuses most harmful ones."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxft.core.rng import stream
from jaxft.core.types import CausalTokens, Params
from jaxft.data.batching import batch_indices
from jaxft.data.causal_rows import causal_tokens
from jaxft.data.requests import SPECIAL, conversation_corpus, request_tokenizer
from jaxft.lab.pretraining import cached_checkpoint
from jaxft.nn.decoder import DecoderConfig, decoder_config, init_decoder
from jaxft.nn.decoder_outputs import make_next_token_logits
from jaxft.nn.pretrained_decoders import save_decoder
from jaxft.train import init_state, make_optimizer, make_schedule, make_segment, masked_cross_entropy

PAD, _, END = SPECIAL
MAX_POSITIONS = 64


@dataclasses.dataclass(frozen=True)
class DecoderPretrainingConfig:
    """Size and training of the embedded decoder."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 4e-3
    conversations: int = 8000
    refusal_frac: float = 0.95
    """Part of the harmful requests that the corpus refuses, but for a fifth that it tolerates."""
    seed: int = 0

    def faults(self) -> list[str]:
        """All faults, for the command line."""
        names = ("width", "layers", "heads", "steps", "batch_size", "learning_rate", "conversations")
        bad = [f"{name}: must be positive, got {getattr(self, name)}" for name in names if getattr(self, name) <= 0]
        if not 0 <= self.refusal_frac <= 1:
            bad.append(f"refusal_frac: must lie in [0, 1], got {self.refusal_frac}")
        if not bad and self.width % (2 * self.heads):
            bad.append(f"width: must be divided by twice the heads, got {self.width} with heads {self.heads}")
        return bad


def pretrain_requests(config: DecoderPretrainingConfig) -> tuple[DecoderConfig, Params, Tokenizer, np.ndarray]:
    """Trains a decoder of Llama's kind on generated conversations, from scratch.

    Args:
      config: Sizes and training.

    Returns:
      The decoder's configuration, its parameters, the tokenizer, and the loss of every step in nats a token.
    """
    tokenizer = request_tokenizer()
    end = tokenizer.token_to_id(END)
    corpus = conversation_corpus(size=config.conversations, seed=config.seed, refusal_frac=config.refusal_frac)
    texts = [[*tokenizer.encode(f"{c.prompt} {c.response}").ids, end] for c in corpus]
    tokens = causal_tokens(texts, pad_id=SPECIAL.index(PAD))
    tokens, labels = jax.tree.map(jnp.asarray, (tokens, _following(tokens)))
    decoder = decoder_config(
        "llama",
        vocab_size=tokenizer.get_vocab_size(),
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        mlp_width=2 * config.width,
        max_positions=MAX_POSITIONS,
        init_scale=config.width**-0.5,
    )
    tx, segment = _trainer(decoder, config.learning_rate, config.steps)
    key = stream(jax.random.key(config.seed), "decoder pretraining")
    index = batch_indices(len(texts), config.batch_size, seed=config.seed, name="pretraining", stop=config.steps)
    state = init_state(init_decoder(decoder, key=key), tx)
    state, losses = segment(state, tokens, labels, jnp.asarray(index))
    return decoder, state.params, tokenizer, np.asarray(losses)


def request_checkpoint(config: DecoderPretrainingConfig) -> Path:
    """The folder of the pre-trained decoder with its tokenizer, made on first use (see ``cached_checkpoint``)."""

    def make(folder: Path) -> np.ndarray:
        decoder, params, tokenizer, losses = pretrain_requests(config)
        save_decoder(folder, decoder, params)
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {"pad_token": PAD, "unk_token": SPECIAL[1], "eos_token": END, "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
        return losses

    return cached_checkpoint("requests", config, make, source=__file__)


def _following(tokens: CausalTokens) -> np.ndarray:
    """The token after each, which it is to predict; -1 after the last of a text and at padding."""
    ids, real = np.asarray(tokens.input_ids), np.asarray(tokens.segment_ids) > 0
    after = np.where(real[:, 1:], ids[:, 1:], -1)
    return np.pad(after, ((0, 0), (0, 1)), constant_values=-1)


@functools.cache
def _trainer(decoder: DecoderConfig, learning_rate: float, steps: int):
    """Optimiser and compiled segment, kept so that a second seed does not compile again."""
    schedule = make_schedule(learning_rate, steps, kind="linear", warmup_frac=0.1)
    tx = make_optimizer("adam", schedule)
    return tx, make_segment(make_next_token_logits(decoder), masked_cross_entropy, tx)
