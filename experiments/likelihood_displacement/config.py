"""Settings of the experiment and its presets."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jaxft.core.checks import nearest
from jaxft.data.requests import COMPLIANCE_OPENINGS, REFUSAL_OPENINGS
from jaxft.lab.decoder_pretraining import DecoderPretrainingConfig
from jaxft.tuning.losses import ALIASES, LOSSES

Part = Literal["single", "percentiles", "unalignment"]
Moved = Literal["all", "blocks"]
Optimizer = Literal["sgd", "rmsprop", "adam"]
Score = Literal["ches", "ches_normalized", "exact", "rate", "edit", "last_hidden", "length"]
Arm = Literal["dpo", "filtered", "random", "sft", "dpop"]

COMPARISON = re.compile(r"[^>]*[^>\s][^>]*>[^>]*[^>\s][^>]*")
POOLED = ("kto",)
"""Losses that need responses to other prompts."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Preference tuning, in all parts."""

    loss: str = "sigmoid"
    """Of ``jaxft.tuning.losses.LOSSES``."""
    beta: float = 0.1
    batch_size: int = 16
    """Pairs a step, where there are several."""
    accumulate: int = 1
    """Equal parts of a batch whose gradients are averaged, to hold one part at a time."""
    lora_rank: int = 0
    """Of adapters on the matrices of the layers, which alone are trained; 0 trains the parameters themselves."""
    sharding: Literal["replicated", "full"] = "replicated"
    """Placement of the training state where there are several devices."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        bad = _not_positive(self, ("beta", "batch_size", "accumulate"))
        known = [*LOSSES, *ALIASES]
        if self.loss not in known:
            bad.append(f"loss: {self.loss!r} is unknown. {nearest(self.loss, known)}")
        if self.loss in POOLED:
            bad.append(f"loss: {self.loss} needs responses to other prompts, and not pairs alone. Take another")
        if self.accumulate > 0 and self.batch_size % self.accumulate:
            bad.append(f"accumulate: must divide batch_size {self.batch_size}, got {self.accumulate}")
        if self.lora_rank < 0:
            bad.append(f"lora_rank: must not be negative, got {self.lora_rank}")
        return bad


@dataclasses.dataclass(frozen=True)
class Single:
    """One prompt and two answers of one token each, step by step."""

    comparisons: tuple[str, ...] = ("no>never", "yes>sure", "yes>no")
    """Preferred answer > other answer."""
    similar: tuple[str, ...] = ("no>never", "yes>sure")
    """Those of the comparisons whose answers mean the same."""
    prompts: int = 4
    arms: tuple[Moved, ...] = ("all", "blocks")
    """What is trained: all parameters, or the layers alone, with both token tables and the last norm frozen."""
    optimizers: tuple[Optimizer, ...] = ("sgd", "rmsprop", "adam")
    sgd_rate: float = 1e-2
    rmsprop_rate: float = 2e-5
    adam_rate: float = 1e-4
    steps: int = 100
    sft_steps: int = 60
    """Steps of supervised tuning on the preferred answer beforehand, by Adam; 0 for a model that answers as it is."""
    sft_rate: float = 1e-3
    sft_prompts: int = 128

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        positive = (
            "prompts",
            "sgd_rate",
            "rmsprop_rate",
            "adam_rate",
            "steps",
            "sft_rate",
            "sft_prompts",
        )
        bad = _not_positive(self, positive)
        if self.sft_steps < 0:
            bad.append(f"sft_steps: must not be negative, got {self.sft_steps}")
        bad += _lists(self, ("comparisons", "arms", "optimizers"))
        shaped = [c for c in self.comparisons if COMPARISON.fullmatch(c)]
        bad += [f"comparisons: must read preferred>other, got {c!r}" for c in self.comparisons if c not in shaped]
        same = [c for c in shaped if len({side.strip() for side in c.split(">")}) == 1]
        bad += [f"comparisons: the two answers must differ, got {c!r}" for c in same]
        bad += [f"similar: must be among comparisons, got {c!r}" for c in self.similar if c not in self.comparisons]
        return bad


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Subsets of pairs around percentiles of a score, each tuned on by itself."""

    scores: tuple[Score, ...] = ("ches", "ches_normalized", "exact", "rate", "edit", "last_hidden", "length")
    percentiles: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    pool: int = 384
    """Pairs that are scored; with a file of pairs at most as many as it holds."""
    size: int = 48
    """Pairs of a subset."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Pools and batches."""
    steps: int = 20
    learning_rate: float = 1e-4
    optimizer: Optimizer = "rmsprop"

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        bad = _not_positive(self, ("pool", "size", "steps", "learning_rate"))
        bad += _lists(self, ("scores", "percentiles", "seeds"))
        bad += [f"percentiles: must lie in [0, 100], got {p}" for p in self.percentiles if not 0 <= p <= 100]
        bad += [f"seeds: must not be negative, got {seed}" for seed in self.seeds if seed < 0]
        if self.size > self.pool:
            bad.append(f"size: must be at most pool {self.pool}, got {self.size}")
        return bad


@dataclasses.dataclass(frozen=True)
class Unalignment:
    """A decoder that refuses, tuned on preferences between its own responses, most of them two refusals."""

    arms: tuple[Arm, ...] = ("dpo", "filtered", "random", "sft", "dpop")
    """All pairs; those of lowest length-normalised CHES; as many at random; with an SFT term; by DPOP."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Of prompts, samples and batches."""
    prompts: int = 192
    held_out: int = 96
    """Further prompts, on which refusals are counted besides."""
    sampled: bool = True
    """Whether pairs are two samples of the decoder itself, refusals preferred, rather than those of the file."""
    refusals_alone: bool = False
    """Whether pairs other than two refusals are left out."""
    keep_frac: float = 0.1
    """Part of the pairs that the filter keeps."""
    steps: int = 60
    learning_rate: float = 1e-4
    optimizer: Optimizer = "rmsprop"
    sft_weight: float = 0.1
    """Weight of the log-likelihood of the preferred response, per sequence."""
    dpop_weight: float = 5.0
    new_tokens: int = 20
    """Longest response that is sampled."""
    refusals: tuple[str, ...] = REFUSAL_OPENINGS
    """What refusals begin with, in the words of the model; used to prefer and to count."""
    compliances: tuple[str, ...] = COMPLIANCE_OPENINGS

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        positive = ("prompts", "held_out", "steps", "learning_rate", "sft_weight", "dpop_weight", "new_tokens")
        bad = _not_positive(self, positive) + _lists(self, ("arms", "seeds", "refusals", "compliances"))
        bad += [f"seeds: must not be negative, got {seed}" for seed in self.seeds if seed < 0]
        if not 0 < self.keep_frac <= 1:
            bad.append(f"keep_frac: must lie in (0, 1], got {self.keep_frac}")
        return bad


@dataclasses.dataclass(frozen=True)
class Data:
    """Texts; the generated requests by default."""

    prompts: Path | None = None
    """A text file with a prompt a line, of which one token is asked; needed for part single of a checkpoint."""
    pairs: Path | None = None
    """Preference pairs (.jsonl or .json); needed for the other parts of a checkpoint."""
    max_tokens: int = 64
    """Longest prompt with response."""
    chat: bool = True
    """Whether prompts go through the chat template of the checkpoint, where it has one."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        named = {"prompts": self.prompts, "pairs": self.pairs}
        bad = [f"{name}: {path} does not exist" for name, path in named.items() if path and not path.is_file()]
        return bad + _not_positive(self, ("max_tokens",))


@dataclasses.dataclass(frozen=True)
class LikelihoodDisplacementConfig:
    """Preference tuning that lowers the preferred response. Razin et al. 2025, arXiv 2410.08847."""

    parts: tuple[Part, ...] = ("single", "percentiles", "unalignment")
    checkpoint: Path | None = None
    """Folder of a decoder with its tokenizer; the embedded decoder of generated requests by default."""
    data: Data = dataclasses.field(default_factory=Data)
    training: Training = dataclasses.field(default_factory=Training)
    single: Single = dataclasses.field(default_factory=Single)
    percentiles: Percentiles = dataclasses.field(default_factory=Percentiles)
    unalignment: Unalignment = dataclasses.field(default_factory=Unalignment)
    pretraining: DecoderPretrainingConfig = dataclasses.field(default_factory=DecoderPretrainingConfig)
    """The embedded decoder; unused with --checkpoint."""
    evaluation_batch: int = 64
    """Examples that are scored or sampled at once."""
    seed: int = 0

    def faults(self) -> list[str]:
        """Everything wrong with the configuration, before anything is loaded or made."""
        bad = _lists(self, ("parts",)) + _not_positive(self, ("evaluation_batch",))
        if self.checkpoint is not None and not self.checkpoint.is_dir():
            bad.append(f"checkpoint: {self.checkpoint} is no folder")
        if not self.unalignment.sampled and self.data.pairs is None:
            bad.append("unalignment.sampled: only a file of pairs holds others. Pass --data.pairs")
        read = {"prompts": "single" in self.parts, "pairs": set(self.parts) != {"single"}}
        for name, used in read.items():
            path = getattr(self.data, name)
            if self.checkpoint is None and path is not None:
                bad.append(f"data.{name}: the embedded decoder knows the generated requests alone. Pass --checkpoint")
            if self.checkpoint is not None and path is None and used:
                parts = "single" if name == "prompts" else "percentiles and unalignment"
                bad.append(f"data.{name}: parts {parts} of a checkpoint need it. Pass --data.{name} or fewer --parts")
        if self.training.lora_rank and "all" in self.single.arms and "single" in self.parts:
            bad.append("single.arms: with --training.lora-rank the layers alone are trained. Pass --single.arms blocks")
        return bad


def sides(comparison: str) -> tuple[str, str]:
    """Preferred and other answer of a comparison.

    Example:
      >>> sides("no>never")
      ('no', 'never')
    """
    chosen, rejected = comparison.split(">")
    return chosen, rejected


def _not_positive(fields: object, names: tuple[str, ...]) -> list[str]:
    return [f"{name}: must be positive, got {getattr(fields, name)}" for name in names if not getattr(fields, name) > 0]


def _lists(fields: object, names: tuple[str, ...]) -> list[str]:
    bad = [f"{name}: needs at least one" for name in names if not getattr(fields, name)]
    return bad + [f"{name}: repeats" for name in names if len(set(getattr(fields, name))) < len(getattr(fields, name))]


PRESETS: Mapping[str, LikelihoodDisplacementConfig] = {
    "smoke": LikelihoodDisplacementConfig(
        training=Training(batch_size=4),
        single=Single(
            comparisons=("no>never", "yes>no"),
            similar=("no>never",),
            prompts=2,
            optimizers=("sgd", "rmsprop"),
            steps=4,
            sft_steps=8,
            sft_prompts=8,
        ),
        percentiles=Percentiles(scores=("ches", "rate", "length"), pool=24, size=4, seeds=(0, 1), steps=2),
        unalignment=Unalignment(arms=("dpo", "filtered"), seeds=(0, 1), prompts=12, held_out=8, keep_frac=0.4, steps=2),
        pretraining=DecoderPretrainingConfig(width=16, heads=2, layers=1, steps=60, conversations=500),
        evaluation_batch=16,
    ),
    "cpu": LikelihoodDisplacementConfig(),
    "accel": LikelihoodDisplacementConfig(
        single=Single(
            comparisons=("Yes>No", "No>Never", "Sure>Yes"),
            similar=("No>Never", "Sure>Yes"),
            prompts=10,
            optimizers=("rmsprop",),
            rmsprop_rate=1e-7,
            steps=100,
            sft_rate=1e-6,
        ),
        percentiles=Percentiles(pool=5000, size=512, steps=16, learning_rate=1e-7),
        unalignment=Unalignment(
            seeds=(0, 1, 2),
            prompts=370,
            held_out=65,
            keep_frac=0.05,
            steps=36,
            learning_rate=5e-6,
            sft_weight=0.1,
            new_tokens=512,
            refusals=("I cannot", "I can't", "I can’t", "I'm sorry", "I’m sorry", "Sorry", "I am unable", "I'm unable"),
            compliances=("Sure", "Here", "Yes", "Of course", "Certainly"),
        ),
        data=Data(max_tokens=1024),
        training=Training(batch_size=32),
        evaluation_batch=32,
    ),
}
