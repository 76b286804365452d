"""Likelihood displacement as it is measured: did the chosen response lose probability, and who gained it.

Arithmetic on the host, on log-probabilities before and after training.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import require


class Displacement(NamedTuple):
    """Change of the log-probabilities of chosen responses over training, in nats."""

    mean_nats: float
    """Mean change."""
    stderr: float
    """Of the mean over examples; NaN for a single one."""
    fell_frac: float
    """Fraction of the examples whose log-probability fell, whatever their loss did."""
    per_sample: Float[np.ndarray, "n"]
    """Change of each."""
    displaced: bool | None
    """Whether the mean loss fell and the mean log-probability fell too; ``None`` where no losses are given."""
    displaced_frac: float | None
    """Fraction of the examples whose own loss and log-probability both fell; ``None`` without a loss an example."""
    displaced_samples: Bool[np.ndarray, "n"] | None
    """Which these are."""


def likelihood_displacement(
    before: Float[Array | np.ndarray, "n"],
    after: Float[Array | np.ndarray, "n"],
    *,
    loss_before: float | Float[Array | np.ndarray, "*n"] | None = None,
    loss_after: float | Float[Array | np.ndarray, "*n"] | None = None,
) -> Displacement:
    r"""Likelihood displacement of chosen responses: the loss fell, and their log-probability fell with it.

    $L(\theta_f) < L(\theta_0)$ and $\operatorname{mean} \ln \pi_f(y_+ | x) < \operatorname{mean} \ln \pi_0(y_+ | x)$;
    for a single example likewise, with its own loss. A fall of log-probability while the loss rises is no displacement.
    Whether a displacement is harmless is for ``displacement_kind``.

    Args:
      before: Log-probabilities of chosen responses before training.
      after: After it.
      loss_before: The mean loss before training, or the loss of each example.
      loss_after: After it.

    Returns:
      Mean, fractions and the change of each example.

    Raises:
      UserError: Shapes that do not fit, one loss without the other, or values that are not finite.

    Example:
      >>> before, after = np.array([-1.0, -2.0]), np.array([-3.0, -1.5])
      >>> found = likelihood_displacement(before, after, loss_before=0.7, loss_after=0.1)
      >>> found.mean_nats, found.fell_frac, found.displaced
      (-0.75, 0.5, True)

    Reference:
      Razin et al. 2025, arXiv 2410.08847, definition 1.
    """
    where = "likelihood_displacement"
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    fits = before.ndim == 1 and before.shape == after.shape and len(before) > 0
    shapes = f"{before.shape} and {after.shape}"
    require(fits, where, "log-probabilities must be [n] before and after", shapes, "Measure the same examples")
    both = (loss_before is None) == (loss_after is None)
    advice = "Pass both, or neither"
    require(both, where, "losses must come before and after", "one of them", advice)
    change = after - before
    losses = [] if loss_before is None else [np.asarray(x, np.float64) for x in (loss_before, loss_after)]
    fits = all(loss.shape in ((), before.shape) for loss in losses) and len({loss.shape for loss in losses}) < 2
    shapes = " and ".join(str(loss.shape) for loss in losses)
    require(fits, where, "losses must be a mean, or one an example", shapes, "Pass the same kind before and after")
    finite = bool(np.isfinite(change).all() and all(np.isfinite(loss).all() for loss in losses))
    require(finite, where, "log-probabilities and losses must be finite", "others", "Drop responses of probability 0")
    improved = losses[1] < losses[0] if losses else None
    samples = None if improved is None or improved.ndim == 0 else improved & (change < 0)
    displaced = bool(losses[1].mean() < losses[0].mean() and change.mean() < 0) if losses else None
    return Displacement(
        float(change.mean()),
        float(change.std(ddof=1) / np.sqrt(len(change))) if len(change) > 1 else float("nan"),
        float((change < 0).mean()),
        change,
        displaced,
        None if samples is None else float(samples.mean()),
        samples,
    )


class DisplacementKind(NamedTuple):
    """Where probability went, by sets of tokens."""

    chosen_change: Float[np.ndarray, "n"]
    """Change of the probability of the chosen token."""
    gained: dict[str, Float[np.ndarray, "n"]]
    """Change of the probability of each set, the chosen token aside."""
    share: dict[str, Float[np.ndarray, "n"]]
    """Part of all probability gained by single tokens that went to tokens of the set; 0 where none was gained."""
    kind: list[str]
    """The set that gained most where the chosen token lost; "other" where words outside gained more together, "none"
    where it did not lose."""


def displacement_kind(
    before: Float[Array | np.ndarray, "n v"],
    after: Float[Array | np.ndarray, "n v"],
    chosen: Int[Array | np.ndarray, "n"],
    token_sets: Mapping[str, Sequence[int]],
) -> DisplacementKind:
    """Which of the user's sets of tokens gained what the chosen token lost: benign or catastrophic, by their meaning.

    Meaning is the user's: tokens that agree with the chosen one are a harmless place for its probability to go to,
    those that contradict it are not. Over distributions of one token, such as the first of a response.

    Args:
      before: Log-probabilities of every token before training.
      after: After it.
      chosen: The chosen token of each example.
      token_sets: Name -> ids, such as ``{"benign": [...], "catastrophic": [...]}``; sets must not overlap.

    Returns:
      Change of probability by set, and the verdict of every example.

    Raises:
      UserError: Shapes that do not fit, log-probabilities above 0 or whose sum is not 1, no sets, sets that overlap, a
        set without tokens, or an id outside the vocabulary.

    Example:
      >>> before, after = np.log([[0.6, 0.2, 0.2]]), np.log([[0.1, 0.3, 0.6]])
      >>> found = displacement_kind(before, after, np.array([0]), {"benign": [1], "catastrophic": [2]})
      >>> found.kind, round(float(found.share["catastrophic"][0]), 3)
      (['catastrophic'], 0.8)

    Reference:
      Razin et al. 2025, arXiv 2410.08847, section 3 and definition 1 (benign and catastrophic).
    """
    where = "displacement_kind"
    old, new = (probabilities(where, x) for x in (before, after))
    chosen = np.asarray(chosen)
    fits = old.shape == new.shape and chosen.shape == old.shape[:1]
    shapes = f"{old.shape}, {new.shape} and {chosen.shape}"
    require(
        fits, where, "needs [n, v] before and after and a chosen token an example", shapes, "Follow one prompt a row"
    )
    sets = {name: np.unique(np.asarray(ids, int)) for name, ids in token_sets.items()}
    _require_sets(where, sets, chosen, old.shape[1])
    rows = np.arange(len(old))
    change = new - old
    lost = change[rows, chosen].copy()
    change[rows, chosen] = 0  # the chosen token is no gainer, whichever set it is in
    gains = np.maximum(change, 0)
    total = gains.sum(axis=1)
    gained = {name: change[:, ids].sum(axis=1) for name, ids in sets.items()}
    share = {name: gains[:, ids].sum(axis=1) / np.where(total > 0, total, 1) for name, ids in sets.items()}
    outside = change.sum(axis=1) - sum(gained.values())
    names = [*gained, "other"]
    best = np.argmax(np.stack([*gained.values(), outside]), axis=0)
    kind = [names[b] if fall < 0 else "none" for b, fall in zip(best, lost, strict=True)]
    return DisplacementKind(lost, gained, share, kind)


def probabilities(where: str, log_probs: Array | np.ndarray) -> Float[np.ndarray, "n v"]:
    """Probabilities of rows of log-probabilities, which must be such.

    Raises:
      UserError: Another shape, or rows whose probabilities do not sum to 1.
    """
    log_probs = np.asarray(log_probs, np.float64)
    require(log_probs.ndim == 2, where, "log-probabilities must be [n, v]", log_probs.shape, "Follow one token a row")
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.exp(log_probs)
        sums = out.sum(axis=1)
        off = np.flatnonzero(~(np.abs(sums - 1) < 1e-2))
    shown = f"{sums[off[0]]:.3g} in row {off[0]}" if len(off) else ""
    require(
        not len(off), where, "the probabilities of a row must sum to 1", shown, "Apply jax.nn.log_softmax to logits"
    )
    return out


def _require_sets(where: str, sets: Mapping[str, np.ndarray], chosen: np.ndarray, v: int) -> None:
    empty = [name for name, ids in sets.items() if not len(ids)]
    shown = "no sets" if not sets else f"none in {', '.join(empty)}"
    require(
        bool(sets) and not empty, where, "needs sets of tokens", shown, "Pass {'benign': [...], 'catastrophic': [...]}"
    )
    reserved = sorted({"other", "none"} & set(sets))
    require(not reserved, where, "'other' and 'none' are verdicts of their own", reserved, "Name the set otherwise")
    ids = np.concatenate(list(sets.values()))
    for name, found in (("token_sets", ids), ("chosen", chosen)):
        inside = bool(found.min() >= 0 and found.max() < v)
        shown = f"{found.min()}..{found.max()}"
        require(inside, where, f"{name} must lie in 0..{v - 1}", shown, "Use the checkpoint's tokenizer")
    found, counts = np.unique(ids, return_counts=True)
    twice = found[counts > 1]
    require(not len(twice), where, "sets must not overlap", f"ids {twice[:5].tolist()} in two", "Give each to one set")
