"""Settings of the experiment and its presets."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jaxft.core.checks import nearest
from jaxft.data.tasks import TASKS
from jaxft.lab.pretraining import PretrainingConfig
from jaxft.train import OBJECTIVES

Arm = Literal["prompt", "head", "probe"]
Optimizer = Literal["sgd", "adam", "sign"]
KernelName = Literal["sgd", "signgd", "asymmetric_signgd", "preconditioned"]
Solver = Literal["ridge", "logistic"]

KERNEL_OF: Mapping[Optimizer, KernelName] = {"sgd": "sgd", "adam": "preconditioned", "sign": "asymmetric_signgd"}
"""Optimiser -> the kernel whose descent predicts its outputs."""


PRETRAINING = PretrainingConfig(steps=1600, positive_frac=0.2)
"""A corpus that mostly complains: the cloze knows the task but is biased, so that there is something to fine-tune."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Fine-tuning. Of several learning rates the one with the best dev score counts."""

    steps: int = 96
    batch_size: int = 8
    event_every: int = 24
    """Steps between events: dev score, diagnostics, checkpoint."""
    patience: int | None = None
    """Events without gain on dev after which fine-tuning stops; none by default."""
    objective: str = "cross_entropy"
    schedule: Literal["constant", "linear"] = "constant"
    warmup_frac: float = 0.0
    sgd_rates: tuple[float, ...] = (1e-3, 1e-2)
    adam_rates: tuple[float, ...] = (2e-4,)
    sign_rates: tuple[float, ...] = (1e-4,)
    sharding: Literal["replicated", "full"] = "replicated"
    """Placement of the training state where there are several devices."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        positive = ("steps", "batch_size", "event_every")
        bad = [f"{name}: must be positive, got {getattr(self, name)}" for name in positive if getattr(self, name) < 1]
        if self.patience is not None and self.patience < 1:
            bad.append(f"patience: must be positive, got {self.patience}")
        if self.objective not in OBJECTIVES:
            bad.append(f"objective: {self.objective!r} is unknown. {nearest(self.objective, OBJECTIVES)}")
        if not 0 <= self.warmup_frac < 1:
            bad.append(f"warmup_frac: must lie in [0, 1), got {self.warmup_frac}")
        rates = {"sgd_rates": self.sgd_rates, "adam_rates": self.adam_rates, "sign_rates": self.sign_rates}
        return bad + [f"{name}: needs positive rates, got {r}" for name, r in rates.items() if not r or min(r) <= 0]


@dataclasses.dataclass(frozen=True)
class Solving:
    """Kernel classifiers. Solver, its regularisation and the use of the initial outputs are those best on dev."""

    kernels: tuple[KernelName, ...] = ("sgd", "signgd", "asymmetric_signgd", "preconditioned")
    """The asymmetric one has one output, and so is solved for two classes alone, by its own LS-SVM."""
    solvers: tuple[Solver, ...] = ("ridge", "logistic")
    """Of the symmetric kernels; kernel logistic regression takes the positive ridges."""
    ridges: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
    f0_scales: tuple[float, ...] = (0.0, 0.1, 1.0)
    gammas: tuple[float, ...] = (0.1, 0.5, 0.9, 2.0, 10.0)
    """Weights of the errors in the LS-SVM, relative to the norm of the kernel."""
    mixes: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Shares of that of its two classifiers which has the sign on the training examples."""
    memory_gib: float = 4.0
    """Memory that what is held of gradients may take; less means that more of it is computed again."""

    @property
    def memory_bytes(self) -> int:
        """The same in bytes."""
        return max(1, int(self.memory_gib * 2**30))

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        filled = ("kernels", "solvers", "ridges", "f0_scales", "gammas", "mixes")
        bad = [f"{name}: needs at least one" for name in filled if not getattr(self, name)]
        if "sgd" not in self.kernels:
            bad.append("kernels: must hold sgd, whose drift is followed")
        if any(ridge < 0 for ridge in self.ridges):
            bad.append(f"ridges: must not be negative, got {self.ridges}")
        if "logistic" in self.solvers and not any(ridge > 0 for ridge in self.ridges):
            bad.append(f"ridges: logistic regression needs a positive one, got {self.ridges}")
        if any(gamma <= 0 for gamma in self.gammas):
            bad.append(f"gammas: must be positive, got {self.gammas}")
        if any(not 0 <= mix <= 1 for mix in self.mixes):
            bad.append(f"mixes: must lie in [0, 1], got {self.mixes}")
        if not 0 < self.memory_gib < math.inf:
            bad.append(f"memory_gib: must be positive and finite, got {self.memory_gib}")
        return bad


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Kernels of LoRA adapters on the matrices of the encoder's layers, at their start."""

    ranks: tuple[int, ...] = (1, 4, 16)
    """Empty switches them off."""
    draws: int = 8
    """Independent draws of the adapters."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        bad = [f"ranks: must be positive, got {rank}" for rank in self.ranks if rank < 1]
        return bad + ([f"draws: must be 2 or more, got {self.draws}"] if self.draws < 2 else [])


@dataclasses.dataclass(frozen=True)
class KernelFinetuningConfig:
    """Is this fine-tuning run a kernel method? Malladi et al. 2023, arXiv 2210.05643."""

    model: Path | None = None
    """Checkpoint folder (BERT or RoBERTa); the embedded pre-trained model by default."""
    task: tuple[str, ...] = ("reviews",)
    data: Path | None = None
    """Folder of the data; not needed for the generated task."""
    template: str | None = None
    """Prompt in place of the task's own, as "{a} It was {mask} ."."""
    label_words: tuple[str, ...] | None = None
    k: tuple[int, ...] = (16,)
    """Training examples a class; as many again for dev."""
    splits: tuple[int, ...] = (13, 21, 42)
    """Seeds of the k-shot samples, each with its own head and batches."""
    arms: tuple[Arm, ...] = ("prompt", "head", "probe")
    """Cloze prompt; fresh linear head; head that starts at the solution of logistic regression."""
    optimizers: tuple[Optimizer, ...] = ("sgd", "adam", "sign")
    pooling: Literal["first", "mean"] = "first"
    test_cap: int = 1000
    probe_examples: int = 64
    """Test examples on which outputs are followed over training."""
    drift_examples: int = 16
    """Of these, the ones whose gradients are followed, and as many training examples, whose kernel is."""
    max_tokens: int | None = None
    """Longest input; the task's own length by default."""
    training: Training = dataclasses.field(default_factory=Training)
    solving: Solving = dataclasses.field(default_factory=Solving)
    adapters: Adapters = dataclasses.field(default_factory=Adapters)
    pretraining: PretrainingConfig = PRETRAINING
    """The embedded model; unused with --model."""
    seed: int = 0

    def faults(self) -> list[str]:
        """Everything wrong with the configuration, before anything is loaded or made."""
        bad = [f"task: {name!r} is unknown. {nearest(name, TASKS)}" for name in self.task if name not in TASKS]
        filled = ("task", "k", "splits", "arms", "optimizers")
        bad += [f"{name}: needs at least one" for name in filled if not getattr(self, name)]
        bad += [f"{name}: repeats" for name in filled if len(set(getattr(self, name))) < len(getattr(self, name))]
        real = [name for name in self.task if name != "reviews"]
        if real and self.data is None:
            bad.append(f"data: {', '.join(real)} must be read from a folder. Pass --data")
        if not real and self.data is not None:
            bad.append("data: the generated reviews read no folder. Pass --task")
        if real and self.model is None:
            bad.append("model: the embedded model knows the generated reviews alone. Pass --model")
        bad += [
            f"solving.kernels: must hold {KERNEL_OF[name]}, which {name} is compared with"
            for name in self.optimizers
            if name != "sgd" and KERNEL_OF[name] not in self.solving.kernels
        ]
        bad += [f"splits: must not be negative, got {split}" for split in self.splits if split < 0]
        if self.max_tokens is not None and self.max_tokens < 1:
            bad.append(f"max_tokens: must be positive, got {self.max_tokens}")
        if (self.template or self.label_words) and len(self.task) > 1:
            bad.append("template, label_words: one prompt cannot serve several tasks. Run them one by one")
        bad += [f"k: must be positive, got {k}" for k in self.k if k < 1]
        positive = ("test_cap", "probe_examples", "drift_examples")
        bad += [f"{name}: must be positive, got {getattr(self, name)}" for name in positive if getattr(self, name) < 1]
        return bad


PRESETS = {
    "smoke": KernelFinetuningConfig(
        splits=(13, 21),
        k=(4,),
        arms=("prompt", "head"),
        test_cap=40,
        probe_examples=16,
        drift_examples=4,
        training=Training(steps=8, event_every=4, batch_size=4),
        solving=Solving(ridges=(0.0, 0.1), f0_scales=(0.0, 1.0), gammas=(0.5, 2.0), mixes=(0.5,)),
        adapters=Adapters(ranks=(1, 4), draws=4),
        pretraining=PretrainingConfig(width=16, heads=2, steps=100),
    ),
    "cpu": KernelFinetuningConfig(),
    "accel": KernelFinetuningConfig(
        task=tuple(name for name in TASKS if name != "reviews"),
        splits=(13, 21, 42, 87, 100),
        k=(16, 64),
        training=Training(
            steps=1000,
            event_every=100,
            schedule="linear",
            warmup_frac=0.06,
            sgd_rates=(1e-3, 5e-3, 1e-2),
            adam_rates=(1e-5, 2e-5, 5e-5),
            sign_rates=(2e-6, 5e-6, 1e-5),
        ),
        solving=Solving(memory_gib=32.0),
    ),
}
