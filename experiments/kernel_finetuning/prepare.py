"""From a configuration to what is fine-tuned: model, prompts, k-shot samples, and one output function an arm.

Everything here is checked before a run directory is made.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from experiments.kernel_finetuning.config import Arm, KernelFinetuningConfig
from jaxft.core.rng import host_stream, stream
from jaxft.core.types import OutputFn, Params, TokenBatch
from jaxft.data.batching import length_buckets
from jaxft.data.kshot import cap_test, sample_kshot
from jaxft.data.readers import Example, Splits, load_splits
from jaxft.data.reviews import review_splits
from jaxft.data.tasks import Task, get_task, with_prompt
from jaxft.data.tokenization import (
    Encoded,
    TextTokenizer,
    encode_plain,
    encode_prompt,
    label_word_ids,
    load_tokenizer,
    pad,
)
from jaxft.evaluation.probes import fit_linear_probe
from jaxft.lab.pretraining import review_checkpoint
from jaxft.nn import (
    EncoderConfig,
    init_classifier,
    load_encoder,
    make_class_logits,
    make_features,
    make_prompt_logits,
    make_tied_logits,
)

EVALUATION_BATCH = 256
"""At most: for a kernel, the features of the training examples are made again in every batch."""

PROBE_L2 = (1e-3, 1e-2, 1e-1, 1.0)
"""Regularisations of the linear probe, chosen on dev."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint."""

    encoder: EncoderConfig
    params: Params
    tokenizer: TextTokenizer
    source: str

    @property
    def has_mlm(self) -> bool:
        """Whether the checkpoint came with a masked-word head."""
        return "mlm" in self.params


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Encoded examples, padded to one length."""

    inputs: TokenBatch
    labels: Int[Array, "n"]


@dataclasses.dataclass(frozen=True)
class Pool:
    """Train, dev and test examples in one sequence: what outputs and kernels are evaluated on."""

    encoded: Encoded
    train: slice
    dev: slice
    test: slice

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        """Labels of all examples."""
        return np.asarray(self.encoded.labels)

    def evaluate(self, f: Callable[[TokenBatch], PyTree]) -> Any:
        """``f`` of every example, a tree of arrays with examples on axis 0, in batches of like length."""
        order = np.concatenate([rows for rows, _ in self._batches])

        def gather(*parts: np.ndarray) -> np.ndarray:
            out = np.empty((len(self.labels), *parts[0].shape[1:]), parts[0].dtype)
            out[order] = np.concatenate(parts)
            return out

        return jax.tree.map(gather, *[jax.device_get(f(batch)) for _, batch in self._batches])

    @functools.cached_property
    def _batches(self) -> list[tuple[np.ndarray, TokenBatch]]:
        """Example numbers and their padded batch; the last repeats an example, so that all have one size."""
        lengths = self.encoded.lengths
        size = -(-len(lengths) // -(-len(lengths) // EVALUATION_BATCH))  # like sizes: hardly an example is repeated
        batches = []
        for rows, length in length_buckets(lengths, batch_size=size, multiple=padding_multiple(lengths)):
            full = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])
            batches.append((full, _device(pad(self.encoded, full, length=length)[0])))
        return batches


@dataclasses.dataclass(frozen=True)
class Unit:
    """One starting point: a task, a k-shot sample and an arm, with everything fine-tuning needs."""

    task: str
    k: int
    split: int
    arm: Arm
    f: OutputFn
    params: Params
    train: Labelled
    dev: Labelled
    probe: Labelled
    """The test examples that are followed over training."""
    pool: Pool

    @property
    def name(self) -> str:
        """Unique in a run, and a file name."""
        return f"{self.task}-{self.k}-{self.split}-{self.arm}"

    @property
    def key(self) -> dict[str, Any]:
        """What identifies the unit in a record."""
        return {"task": self.task, "k": self.k, "split": self.split, "arm": self.arm}


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task, its examples, and the tokens of its label words."""

    task: Task
    splits: Splits
    test: list[Example]
    label_ids: tuple[int, ...]


def load_model(config: KernelFinetuningConfig) -> Model:
    """The checkpoint that the configuration names; the embedded one is pre-trained on first use."""
    folder = review_checkpoint(config.pretraining) if config.model is None else Path(config.model)
    loaded = load_encoder(folder)
    source = "embedded: a masked language model of generated reviews" if config.model is None else folder.name
    return Model(loaded.config, loaded.params, load_tokenizer(folder), source)


def load_task(config: KernelFinetuningConfig, model: Model, name: str) -> TaskData:
    """Examples and label words of a task; every k and split is drawn once to find what cannot be drawn."""
    task = with_prompt(get_task(name), template=config.template, label_words=config.label_words)
    splits = review_splits() if name == "reviews" else load_splits(Path(str(config.data)), task)
    for k in config.k:
        for split in config.splits:
            sample_kshot(splits.train, classes=task.classes, k=k, seed=split)
    label_ids = label_word_ids(model.tokenizer, task.label_words) if "prompt" in config.arms else ()
    test = cap_test(splits.test, cap=config.test_cap)
    # In no order of the file's, since its first examples are the ones followed over training.
    test = [test[i] for i in host_stream(42, "test order").permutation(len(test))]
    data = TaskData(task, splits, test, label_ids)
    for arm in config.arms:
        encode_for(config, model, data, arm, splits.train[:1])
    return data


def encode_for(
    config: KernelFinetuningConfig, model: Model, data: TaskData, arm: Arm, examples: Sequence[Example]
) -> Encoded:
    """Examples as an arm reads them: filled into the prompt, or as they are."""
    limit = min(config.max_tokens or data.task.max_tokens, model.encoder.max_tokens)
    if arm == "prompt":
        return encode_prompt(model.tokenizer, data.task, examples, max_tokens=limit)
    types = model.encoder.type_vocab_size
    return encode_plain(model.tokenizer, examples, max_tokens=limit, token_types=types)


def make_unit(config: KernelFinetuningConfig, model: Model, data: TaskData, *, k: int, split: int, arm: Arm) -> Unit:
    """Encodes a k-shot sample for an arm and sets its head."""
    sample = sample_kshot(data.splits.train, classes=data.task.classes, k=k, seed=split)
    n, p = len(sample.train), len(sample.dev)
    encoded = encode_for(config, model, data, arm, [*sample.train, *sample.dev, *data.test])
    pool = Pool(encoded, slice(0, n), slice(n, n + p), slice(n + p, None))
    train, dev = _labelled(pool.encoded, range(n)), _labelled(pool.encoded, range(n, n + p))
    probe = _labelled(pool.encoded, range(n + p, n + p + min(config.probe_examples, len(data.test))))
    params, f = _arm(config, model, data, arm, split, train, dev)
    return Unit(data.task.name, k, split, arm, f, params, train, dev, probe, pool)


def _arm(config, model: Model, data: TaskData, arm: Arm, split: int, train: Labelled, dev: Labelled):
    """Parameters at the start and the output function."""
    if arm == "prompt":
        return model.params, prompt_outputs(model.encoder, data.label_ids, model.has_mlm)
    encoder = {"encoder": model.params["encoder"]}
    classes = data.task.classes
    if arm == "head":
        key = stream(jax.random.key(config.seed), "head", split)
        head = init_classifier(model.encoder.width, classes, key=key)
    else:
        head = _probe(jax.jit(make_features(model.encoder, pooling=config.pooling)), encoder, train, dev, classes)
    return {**encoder, "classifier": head}, class_outputs(model.encoder, config.pooling)


# Cached, so that units share their functions and nothing is compiled twice.
@functools.cache
def prompt_outputs(encoder: EncoderConfig, label_ids: tuple[int, ...], has_mlm: bool) -> OutputFn:
    """Label-word logits, through the tied input embeddings where the checkpoint has no masked-word head."""
    return make_prompt_logits(encoder, label_ids) if has_mlm else make_tied_logits(encoder, label_ids)


@functools.cache
def class_outputs(encoder: EncoderConfig, pooling: Any) -> OutputFn:
    """Logits of a linear head."""
    return make_class_logits(encoder, pooling=pooling)


def _probe(features: Callable, params: Params, train: Labelled, dev: Labelled, classes: int) -> Params:
    """The linear head of least dev loss over ``PROBE_L2``."""
    x, x_dev = features(params, train.inputs), features(params, dev.inputs)

    def dev_loss(head: Params) -> float:
        log_p = jax.nn.log_softmax(x_dev @ head["kernel"] + head["bias"][None])
        return -float(jnp.take_along_axis(log_p, dev.labels[:, None], axis=1).mean())

    heads = [fit_linear_probe(x, train.labels, classes=classes, l2=l2) for l2 in PROBE_L2]
    return min(heads, key=dev_loss)


def padding_multiple(lengths: Sequence[int]) -> int:
    """Rounding of padded lengths: coarse for long inputs, so that few shapes are compiled."""
    return 8 if max(lengths) <= 32 else 32


def _labelled(encoded: Encoded, rows: range) -> Labelled:
    multiple = padding_multiple(encoded.lengths)
    inputs, labels = pad(encoded, rows, multiple=multiple)
    return Labelled(_device(inputs), jnp.asarray(labels))


def _device(batch: TokenBatch) -> TokenBatch:
    return TokenBatch(*[jnp.asarray(leaf) for leaf in batch])
