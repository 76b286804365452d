"""The embedded default checkpoints, pre-trained once and cached: here a masked language model of generated reviews.

They are kept as checkpoint folders like published ones (``config.json``, ``model.safetensors``, ``tokenizer.json``), so
that the same code reads both. The decoder of generated requests stands in ``decoder_pretraining``.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import stream
from jaxft.core.types import Params, TokenBatch
from jaxft.data.batching import batch_indices
from jaxft.data.masking import mask_tokens
from jaxft.data.readers import Example
from jaxft.data.reviews import review_corpus, review_tokenizer
from jaxft.data.tasks import get_task
from jaxft.data.tokenization import TextTokenizer, encode_plain, label_word_ids, make_text_tokenizer, pad
from jaxft.lab.devices import cache_dir
from jaxft.nn import EncoderConfig, init_encoder, make_mlm_logits, save_encoder
from jaxft.train import init_state, make_optimizer, make_schedule, make_segment, masked_cross_entropy

MAX_TOKENS = 40
"""Rows of the position table; reviews with their prompt are shorter."""

MASKINGS = 4
"""Different maskings of every sentence."""


@dataclasses.dataclass(frozen=True)
class PretrainingConfig:
    """Size and training of the embedded model."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 6e-3
    sentences: int = 4000
    positive_frac: float = 0.5
    """Part of the corpus that praises; away from one half the cloze is biased, which fine-tuning then corrects."""
    seed: int = 0

    def faults(self) -> list[str]:
        """All faults, for the command line."""
        sizes = [f"{f.name} must be positive" for f in dataclasses.fields(self) if getattr(self, f.name) <= 0]
        sizes = [fault for fault in sizes if not fault.startswith("seed")]
        if self.positive_frac > 1:
            sizes.append(f"positive_frac must be at most 1, got {self.positive_frac}")
        return sizes + ([] if self.width % max(self.heads, 1) == 0 else ["heads must divide width"])


def pretrain_reviews(config: PretrainingConfig) -> tuple[EncoderConfig, Params, TextTokenizer, np.ndarray]:
    """Trains a masked language model on generated reviews, from scratch.

    Args:
      config: Sizes and training.

    Returns:
      The encoder's configuration, its parameters with the masked-word head, the tokenizer, and the loss of every step
      in nats a hidden word.
    """
    tokenizer = make_text_tokenizer(review_tokenizer())
    sentences = review_corpus(size=config.sentences, seed=config.seed, positive_frac=config.positive_frac)
    encoded = encode_plain(tokenizer, [Example(s, None, 0) for s in sentences], max_tokens=MAX_TOKENS, token_types=2)
    batch, _ = pad(encoded)
    vocab_size = tokenizer.tokenizer.get_vocab_size()
    encoder = EncoderConfig(
        family="bert",
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        mlp_width=4 * config.width,
        max_positions=MAX_TOKENS,
        type_vocab_size=2,
        norm_eps=1e-12,
        pad_id=tokenizer.pad_id,
        init_scale=config.width**-0.5,
    )
    special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.unk_id]
    maskings = [
        mask_tokens(
            np.asarray(batch.input_ids),
            mask_id=tokenizer.mask_id,
            vocab_size=vocab_size,
            special_ids=special,
            seed=config.seed,
            name=f"masking {copy}",
            salient_ids=label_word_ids(tokenizer, get_task("reviews").label_words),
        )
        for copy in range(MASKINGS)
    ]
    masked, labels = (jnp.asarray(np.concatenate(parts)) for parts in zip(*maskings, strict=True))
    repeated = [jnp.asarray(np.concatenate([leaf] * MASKINGS)) for leaf in batch]
    inputs = TokenBatch(*repeated)._replace(input_ids=masked)
    tx, segment = _trainer(encoder, config.learning_rate, config.steps)
    key = stream(jax.random.key(config.seed), "pretraining")
    state = init_state(init_encoder(encoder, key=key, mlm=True), tx)
    index = batch_indices(len(labels), config.batch_size, seed=config.seed, name="pretraining", stop=config.steps)
    state, losses = segment(state, inputs, labels, jnp.asarray(index))
    return encoder, state.params, tokenizer, np.asarray(losses)


def review_checkpoint(config: PretrainingConfig) -> Path:
    """The folder of the pre-trained model, made on first use.

    Args:
      config: Sizes and training: another configuration, another folder.

    Returns:
      A checkpoint folder in the user's cache folder. It appears whole or not at all: a killed process, or two at a
      time, leave no broken one.
    """

    def make(folder: Path) -> np.ndarray:
        encoder, params, tokenizer, losses = pretrain_reviews(config)
        save_encoder(folder, encoder, params)
        tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
        return losses

    return cached_checkpoint("reviews", config, make, source=__file__)


def cached_checkpoint(name: str, config: Any, make: Callable[[Path], np.ndarray], *, source: str) -> Path:
    """The folder of an embedded model, made on first use; whole, or not at all.

    Args:
      name: What the folder is called, before a hash of configuration and source.
      config: Dataclass that says how the model is made: another configuration, another folder.
      make: Writes the checkpoint into the folder that it is given, and returns the losses of its training.
      source: File that makes the model; with the code of the layers below, a change of it makes another folder.

    Returns:
      The folder, in the user's cache folder. A killed process, or two at a time, leave no broken one.
    """
    text = json.dumps(dataclasses.asdict(config), sort_keys=True) + _source_version(source)
    folder = cache_dir() / "pretrained" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    losses = make(temporary)
    summary = {"config": dataclasses.asdict(config), "last_loss_nats": float(losses[-20:].mean())}
    (temporary / "pretraining.json").write_text(json.dumps(summary, indent=2) + "\n")
    try:
        temporary.rename(folder)
    except OSError:  # another process was first; its folder is as good
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
    return folder


@functools.cache
def _trainer(encoder: EncoderConfig, learning_rate: float, steps: int):
    """Optimiser and compiled segment, kept so that a second seed does not compile again."""
    schedule = make_schedule(learning_rate, steps, kind="linear", warmup_frac=0.1)
    tx = make_optimizer("adam", schedule)
    return tx, make_segment(make_mlm_logits(encoder), masked_cross_entropy, tx)


def _source_version(source: str) -> str:
    """Changes when the code that makes the corpus or the model changes, so that a cached model is never stale."""
    root = Path(__file__).parents[1]
    files = sorted(path for part in ("core", "data", "nn", "train") for path in (root / part).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*files, Path(source)])).hexdigest()
