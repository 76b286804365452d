"""Masked-word examples as BERT and RoBERTa make them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxft.core.checks import require
from jaxft.core.rng import host_stream


def mask_tokens(
    input_ids: Int[np.ndarray, "n t"],
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
    seed: int,
    name: str = "masking",
    mask_frac: float = 0.15,
    salient_ids: Sequence[int] = (),
) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "n t"]]:
    """Hides a part of the tokens, and says which words stood there.

    Of the chosen positions 80 % become the mask token, 10 % a random ordinary word, 10 % stay as they are. Every
    sequence with an ordinary word has at least one chosen position.

    Args:
      input_ids: Token ids.
      mask_id: Id of the mask token.
      vocab_size: Number of ids.
      special_ids: Ids that are never chosen and never drawn: padding, separators, the mask itself.
      seed: Seed.
      name: Name of the random stream: another name, other masks.
      mask_frac: Expected part of the ordinary tokens that is chosen.
      salient_ids: Words that are chosen wherever they stand.

    Returns:
      The ids with masks, and the labels: the hidden id where a position was chosen, -1 elsewhere.

    Raises:
      UserError: ``mask_frac`` outside (0, 1], or ids outside the vocabulary.

    Example:
      >>> ids = np.array([[1, 5, 6, 7, 2]])
      >>> masked, labels = mask_tokens(ids, mask_id=3, vocab_size=8, special_ids=[0, 1, 2, 3, 4], seed=0)
      >>> bool((np.where(labels >= 0, labels, masked) == ids).all())
      True

    Reference:
      Devlin et al. 2019, arXiv 1810.04805, section 3.1; salient words: Guu et al. 2020, arXiv 2002.08909.
    """
    where = "mask_tokens"
    require(0 < mask_frac <= 1, where, "mask_frac must lie in (0, 1]", mask_frac, "BERT uses 0.15")
    inside = bool(input_ids.size > 0 and input_ids.min() >= 0 and input_ids.max() < vocab_size)
    require(inside, where, f"ids must lie in [0, {vocab_size})", "others, or none", "Encode with this vocabulary")
    rng = host_stream(seed, name)
    ordinary = ~np.isin(input_ids, special_ids)
    # The lowest score of a sequence is always chosen: a sequence without a label would teach nothing.
    score = np.where(ordinary, rng.random(input_ids.shape), np.inf)
    score = np.where(ordinary & np.isin(input_ids, salient_ids), -1.0, score)
    chosen = ordinary & ((score < mask_frac) | (score == score.min(axis=1, keepdims=True)))
    words = np.setdiff1d(np.arange(vocab_size), special_ids)
    action = rng.random(input_ids.shape)
    masked = np.where(chosen & (action < 0.8), mask_id, input_ids)
    masked = np.where(chosen & (action >= 0.9), rng.choice(words, size=input_ids.shape), masked)
    return masked.astype(input_ids.dtype), np.where(chosen, input_ids, -1).astype(input_ids.dtype)
