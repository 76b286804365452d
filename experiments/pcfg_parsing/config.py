"""Settings of the experiment and its presets."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

ProbeKind = Literal["linear", "mlp"]
Target = Literal["marginal", "constituency", "depth", "label"]

MODEL = re.compile(r"A(\d+)L(\d+)")
"""The paper's names of models: A12L6 has 12 heads a layer and 6 layers."""

LENGTH_LIMIT = 512


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where sentences come from: a grammar, from which they are sampled."""

    grammar: Path | None = None
    """Text file of a grammar; the embedded English-like one by default."""
    treebank: Path | None = None
    """Folder of bracketed trees from which a grammar is read, in place of a grammar file."""
    files: tuple[str, ...] = ("*.mrg", "*.ptb")
    """Names of its files, such as wsj_00*."""
    held_out: tuple[str, ...] = ()
    """Names of those that the grammar is not read from: their trees are parsed with it."""
    parsed_length: int = 40
    """Longest held-out sentence that is parsed, in words."""
    markov: int = 1
    """Siblings that a label of the binarised treebank remembers."""
    min_count: int = 2
    """Words of the treebank seen less often are unknown words."""
    max_length: int = 20
    """Longest sentence, in words: the corpus has the grammar's law given that a sentence is no longer."""
    sentences: int = 32_768
    """Distinct sentences for training; where training reads no more than these, each is read once."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        bad = []
        if self.grammar is not None and self.treebank is not None:
            bad.append("grammar, treebank: give one of them")
        bad += [f"{name}: {path} does not exist" for name, path in self._paths() if not path.exists()]
        if self.held_out and self.treebank is None:
            bad.append("held_out: names files of a treebank. Pass --corpus.treebank")
        if not self.files:
            bad.append("files: needs at least one name")
        if not 3 <= self.max_length <= LENGTH_LIMIT:
            bad.append(f"max_length: must lie in 3..{LENGTH_LIMIT}, got {self.max_length}")
        sizes = ("sentences", "parsed_length")
        bad += [f"{name}: must be positive, got {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        bad += [f"{name}: must not be negative, got {n}" for name, n in self._counts() if n < 0]
        return bad

    def _paths(self) -> list[tuple[str, Path]]:
        given = (("grammar", self.grammar), ("treebank", self.treebank))
        return [(name, path) for name, path in given if path is not None]

    def _counts(self) -> list[tuple[str, int]]:
        return [("markov", self.markov), ("min_count", self.min_count)]


@dataclasses.dataclass(frozen=True)
class Training:
    """Pre-training of a masked model, by AdamW."""

    steps: int = 2000
    batch_size: int = 64
    event_every: int = 250
    """Steps between events: the gap to the Bayes loss, and a checkpoint."""
    learning_rate: float = 3e-3
    warmup_frac: float = 0.06
    weight_decay: float = 0.01
    masking: Literal["mask", "bert"] = "mask"
    """What stands at a hidden word: the mask token always, or as in BERT in 80 of 100 cases."""
    mask_frac: float = 0.15
    sharding: Literal["replicated", "full"] = "replicated"
    """Placement of the training state where there are several devices."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        sizes = ("steps", "batch_size", "event_every", "learning_rate")
        bad = [f"{name}: must be positive, got {getattr(self, name)}" for name in sizes if getattr(self, name) <= 0]
        if not 0 <= self.warmup_frac < 1:
            bad.append(f"warmup_frac: must lie in [0, 1), got {self.warmup_frac}")
        if self.weight_decay < 0:
            bad.append(f"weight_decay: must not be negative, got {self.weight_decay}")
        return bad + ([] if 0 < self.mask_frac <= 1 else [f"mask_frac: must lie in (0, 1], got {self.mask_frac}"])


@dataclasses.dataclass(frozen=True)
class Probing:
    """Probes of every layer of the trained network and of the same network before training."""

    targets: tuple[Target, ...] = ("marginal", "constituency", "depth", "label")
    """Span marginals; depth of the common ancestor of neighbours; depth of words; labels of constituents."""
    kinds: tuple[ProbeKind, ...] = ("linear", "mlp")
    """Ridge regression (softmax for labels), and a network with one hidden layer."""
    train_sentences: int = 400
    test_sentences: int = 200
    max_examples: int = 6000
    """Spans, gaps or words of the training sentences that a probe sees."""
    hidden: int = 64
    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 1e-2
    l2: float = 1e-3
    """Of ridge regression, on standardised features."""

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        sizes = ("max_examples", "hidden", "steps", "batch_size", "learning_rate", "l2")
        bad = [f"{name}: must be positive, got {getattr(self, name)}" for name in sizes if getattr(self, name) <= 0]
        few = [name for name in ("train_sentences", "test_sentences") if getattr(self, name) < 8]
        bad += [f"{name}: must be 8 or more, got {getattr(self, name)}" for name in few]
        bad += [f"{name}: needs at least one" for name in ("targets", "kinds") if not getattr(self, name)]
        return bad + ([] if "marginal" in self.targets else ["targets: must hold marginal, which the claims are about"])


@dataclasses.dataclass(frozen=True)
class PcfgParsingConfig:
    """Do masked language models parse? Zhao et al. 2023, arXiv 2303.08117."""

    models: tuple[str, ...] = ("A4L1", "A4L2", "A4L4", "A1L4")
    """Heads and layers, as the paper names them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Starting points of each model."""
    width: int = 64
    mlp_ratio: int = 4
    """Width of the layers' MLP over that of the network."""
    evaluation_sentences: int = 256
    """Held-out sentences with fixed masks, on which the loss is compared with the exact Bayes loss."""
    corpus: Corpus = dataclasses.field(default_factory=Corpus)
    training: Training = dataclasses.field(default_factory=Training)
    probing: Probing = dataclasses.field(default_factory=Probing)
    seed: int = 0
    """Of corpus, masks and probes."""

    def faults(self) -> list[str]:
        """Everything wrong with the configuration, before anything is loaded or made."""
        bad = [f"{name}: needs at least one" for name in ("models", "seeds") if not getattr(self, name)]
        bad += [f"{n}: repeats" for n in ("models", "seeds") if len(set(getattr(self, n))) < len(getattr(self, n))]
        for name in self.models:
            if not MODEL.fullmatch(name) or 0 in model_sizes(name):
                bad.append(f"models: must be A<heads>L<layers>, as A4L2, got {name!r}")
            elif self.width > 0 and self.width % model_sizes(name)[0]:
                bad.append(f"width: must be a multiple of the heads of {name}, got {self.width}")
        bad += [f"seeds: must not be negative, got {seed}" for seed in self.seeds if seed < 0]
        sizes = ("width", "mlp_ratio")
        bad += [f"{name}: must be positive, got {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if self.evaluation_sentences < 8:
            bad.append(f"evaluation_sentences: must be 8 or more, got {self.evaluation_sentences}")
        return bad


def model_sizes(name: str) -> tuple[int, int]:
    """Heads and layers of a model's name.

    Example:
      >>> model_sizes("A12L6")
      (12, 6)
    """
    found = MODEL.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else (0, 0)


PRESETS = {
    "smoke": PcfgParsingConfig(
        models=("A2L1", "A2L2"),
        seeds=(0, 1),
        width=16,
        evaluation_sentences=16,
        corpus=Corpus(max_length=10, sentences=512),
        training=Training(steps=20, batch_size=16, event_every=10),
        probing=Probing(train_sentences=24, test_sentences=16, max_examples=400, hidden=8, steps=20, batch_size=32),
    ),
    "cpu": PcfgParsingConfig(),
    "accel": PcfgParsingConfig(
        models=("A12L12", "A12L6", "A12L3", "A12L1", "A3L12", "A24L12"),
        width=768,
        evaluation_sentences=2048,
        corpus=Corpus(max_length=40, sentences=10_000_000),
        training=Training(
            steps=39_000, batch_size=256, event_every=1000, learning_rate=1e-4, warmup_frac=0.06, masking="bert"
        ),
        probing=Probing(
            train_sentences=4000, test_sentences=1000, max_examples=200_000, hidden=512, steps=4000, batch_size=512
        ),
    ),
}
