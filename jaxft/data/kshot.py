"""k-shot samples: a few training and development examples a class, as the few-shot protocol draws them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxft.core.checks import require
from jaxft.core.rng import host_stream
from jaxft.data.readers import Example


class KShot(NamedTuple):
    """k examples a class to train on and k others to choose settings by, class by class."""

    train: list[Example]
    dev: list[Example]


def sample_kshot(examples: Sequence[Example], *, classes: int, k: int, seed: int) -> KShot:
    """Draws k training and k development examples of each class, no line of the split twice.

    A class has a stream of its own, so the k training examples are among those of every larger k.

    Args:
      examples: The training split.
      classes: Number of classes; labels are below it.
      k: Examples a class, in each of the two parts.
      seed: Seed of the draw.

    Returns:
      ``classes * k`` examples in each part.

    Raises:
      UserError: The split is empty, has a foreign label, or a class with fewer than 2k examples (all are listed).

    Example:
      >>> split = [Example(str(i), None, i % 2) for i in range(8)]
      >>> sample = sample_kshot(split, classes=2, k=2, seed=0)
      >>> [example.label for example in sample.train], len(set(sample.train + sample.dev))
      ([0, 0, 1, 1], 8)

    Reference:
      Gao, Fisch and Chen 2021, arXiv 2012.15723, section 3.
    """
    where = "sample_kshot"
    require(k >= 1, where, "k must be at least 1", k, "Pass k >= 1")
    require(len(examples) > 0, where, "the training split must hold examples", "none", "Check the data folder")
    foreign = sorted({example.label for example in examples if not 0 <= example.label < classes})
    require(not foreign, where, f"labels must be in [0, {classes})", foreign, "Pass the task's number of classes")
    by_class = [[e for e in examples if e.label == label] for label in range(classes)]
    short = [f"{len(members)} of class {label}" for label, members in enumerate(by_class) if len(members) < 2 * k]
    most = min(len(members) for members in by_class) // 2
    way_out = f"Pass k <= {most}" if most else "Check that the split holds every class"
    rule = f"k={k} needs {2 * k} examples of each class (train and dev)"
    require(not short, where, rule, ", ".join(short), way_out)
    train, dev = [], []
    for label, members in enumerate(by_class):
        order = host_stream(seed, "kshot", label).permutation(len(members))
        train += [members[i] for i in order[:k]]
        dev += [members[i] for i in order[k : 2 * k]]
    return KShot(train, dev)


def cap_test(examples: Sequence[Example], *, cap: int = 1000, seed: int = 42) -> list[Example]:
    """At most ``cap`` test examples: a random subset in file order, the same for every k and k-shot seed.

    Args:
      examples: The test split.
      cap: Most examples to keep.
      seed: Seed of the subset.

    Returns:
      The subset, or all where they are no more than ``cap``.

    Raises:
      UserError: The split is empty or ``cap`` is below 1.

    Example:
      >>> len(cap_test([Example(str(i), None, 0) for i in range(30)], cap=10))
      10
    """
    require(cap >= 1, "cap_test", "cap must be at least 1", cap, "Pass cap >= 1")
    require(len(examples) > 0, "cap_test", "the test split must hold examples", "none", "Check the data folder")
    if len(examples) <= cap:
        return list(examples)
    chosen = host_stream(seed, "test-cap").choice(len(examples), size=cap, replace=False)
    return [examples[i] for i in sorted(chosen)]


def permute_labels(labels: Int[np.ndarray, "n"], *, seed: int) -> Int[np.ndarray, "n"]:
    """A permutation of labels that shares each class's examples out evenly over all classes.

    So they say nothing of the true ones, whatever the draw. Where the examples of a class do not divide evenly, which
    classes get one more is random. With as many examples of every class it is a permutation.

    Args:
      labels: Class of each example.
      seed: Seed of the draw.

    Returns:
      Labels with, up to the remainders, as many examples of every pair of true and permuted class.

    Example:
      >>> permuted = permute_labels(np.array([0, 0, 0, 0, 1, 1, 1, 1]), seed=0)
      >>> np.bincount(permuted[:4]).tolist(), np.bincount(permuted[4:]).tolist()
      ([2, 2], [2, 2])
    """
    classes = np.unique(labels)
    rng, permuted = host_stream(seed, "permuted labels"), labels.copy()
    order = rng.permutation(classes)
    for i, c in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == c))
        permuted[members] = order[(i + np.arange(len(members))) % len(classes)]
    return permuted
