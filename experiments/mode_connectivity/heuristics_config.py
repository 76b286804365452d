"""Settings of the language-model part: networks fine-tuned on a rule that two heuristics explain."""

import dataclasses
from typing import Literal

Lexical = Literal["preposition", "adjective", "adverb", "modal"]
SYMBOLS: dict[Lexical, str] = {"preposition": "P", "adjective": "Adj", "adverb": "Adv", "modal": "Mod"}
"""What the embedded grammar calls these classes of words."""

FEWEST_MODELS = 4
EVALUATION_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Heuristics:
    """One encoder, pre-trained on sentences of the embedded grammar and fine-tuned by several seeds.

    The label is the number of the subject of the main clause. In training it is also told by whether there is a word
    of a class; in the challenge set the two disagree.
    """

    models: int = 10
    """Fine-tuned networks, which differ in the order of their batches alone; 0 leaves this part out."""
    lexical: Lexical = "preposition"
    """Words whose presence is the lexical heuristic."""
    train_sentences: int = 1000
    telling_frac: float = 0.03
    """Part of the training sentences on which the heuristics disagree."""
    evaluation_sentences: int = 480
    """Of the held-out and of the challenge set, each."""
    corpus_sentences: int = 40_000
    max_length: int = 14
    width: int = 48
    layers: int = 2
    heads: int = 4
    pretraining_steps: int = 2000
    pretraining_batch_size: int = 64
    pretraining_learning_rate: float = 4e-3
    steps: int = 2000
    """Of fine-tuning."""
    batch_size: int = 16
    learning_rate: float = 5e-3
    least_accuracy: float = 0.9
    """On the training sentences: a network below it has learnt neither rule, and is left out."""
    points: int = 11
    """Points of the straight line between every two networks."""
    clusters: int = 2

    def faults(self) -> list[str]:
        """Everything wrong with these fields."""
        other = ("models", "telling_frac", "lexical", "least_accuracy", "points", "max_length")
        names = [f.name for f in dataclasses.fields(self) if f.name not in other]
        bad = [f"{name}: must be positive, got {getattr(self, name)}" for name in names if getattr(self, name) <= 0]
        if self.models != 0 and self.models < FEWEST_MODELS:
            bad.append(f"models: must be 0 or at least {FEWEST_MODELS}, got {self.models}")
        for name in ("train_sentences", "evaluation_sentences"):
            if getattr(self, name) % (2 * EVALUATION_BATCHES):
                bad.append(f"{name}: must be a multiple of {2 * EVALUATION_BATCHES}, got {getattr(self, name)}")
        fractions = [name for name in ("telling_frac", "least_accuracy") if not 0 <= getattr(self, name) <= 1]
        bad += [f"{name}: must lie in [0, 1], got {getattr(self, name)}" for name in fractions]
        if self.heads > 0 and self.width % self.heads:
            bad.append(f"width: must be a multiple of heads {self.heads}, got {self.width}")
        if self.points < 3:
            bad.append(f"points: must be 3 or more, got {self.points}")
        if self.max_length < 6:
            bad.append(f"max_length: must be 6 or more, got {self.max_length}")
        if 0 < self.models < self.clusters:
            bad.append(f"clusters: must be at most models {self.models}, got {self.clusters}")
        return bad


SMOKE = Heuristics(
    models=4,
    train_sentences=64,
    evaluation_sentences=32,
    corpus_sentences=2000,
    max_length=10,
    width=16,
    layers=1,
    heads=2,
    pretraining_steps=20,
    pretraining_batch_size=16,
    steps=20,
    batch_size=8,
    least_accuracy=0.0,
    points=5,
)
"""At its smallest, for tests."""
