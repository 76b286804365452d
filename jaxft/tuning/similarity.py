"""Simple measures of how alike two responses are, beside which a score of displacement has to stand."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import require
from jaxft.core.precision import accumulator


def edit_distance(
    chosen: Int[Array | np.ndarray, "*n k"],
    chosen_mask: Int[Array | np.ndarray, "*n k"],
    rejected: Int[Array | np.ndarray, "*n j"],
    rejected_mask: Int[Array | np.ndarray, "*n j"],
    *,
    normalize: bool = True,
) -> Float[Array, "*n"]:
    """Levenshtein distance of token sequences: fewest insertions, deletions and substitutions.

    A row of the table a step: within a row, the chain of insertions is a running minimum. Work k * j a pair, memory j.

    Args:
      chosen: Tokens.
      chosen_mask: 1 at tokens, which may stand at either side.
      rejected: Tokens.
      rejected_mask: Likewise.
      normalize: Whether to divide by the longer length, which gives a number from 0 to 1 (0 for two empty sequences).

    Returns:
      The distance of every pair, in float32.

    Raises:
      UserError: Shapes that do not fit.

    Example:
      >>> kitten, sitting = jnp.array([1, 2, 3, 3, 4, 5, 0]), jnp.array([6, 2, 3, 3, 2, 5, 7])
      >>> float(edit_distance(kitten, (kitten > 0).astype(int), sitting, sitting * 0 + 1, normalize=False))
      3.0

    Reference:
      Wagner and Fischer 1974, The string-to-string correction problem, JACM 21; normalised as by
      Razin et al. 2025, arXiv 2410.08847, section 5.
    """
    where = "edit_distance"
    fits = chosen.ndim >= 1 and chosen.shape == chosen_mask.shape and rejected.shape == rejected_mask.shape
    fits = fits and chosen.shape[:-1] == rejected.shape[:-1]
    shapes = f"{chosen.shape}, {chosen_mask.shape}, {rejected.shape} and {rejected_mask.shape}"
    require(fits, where, "tokens and masks must be [*n, k] and [*n, j]", shapes, "Pass as many of each")
    sides = [(jnp.asarray(a), jnp.asarray(m)) for a, m in ((chosen, chosen_mask), (rejected, rejected_mask))]
    flat = [jnp.reshape(a, (-1, a.shape[-1])).astype(jnp.int32) for side in sides for a in side]
    distance, longer = jax.vmap(_distance)(*flat)
    if normalize:
        distance = distance / jnp.maximum(longer, 1)
    return distance.reshape(chosen.shape[:-1])


def _distance(a: Array, a_mask: Array, b: Array, b_mask: Array) -> tuple[Array, Array]:
    (a, n), (b, m) = _first(a, a_mask), _first(b, b_mask)
    places = jnp.arange(b.size + 1, dtype=jnp.int32)

    def step(row: Array, new: tuple[Array, Array]) -> tuple[Array, None]:
        token, i = new
        changed = row[:-1] + (b != token).astype(jnp.int32)
        best = jnp.append(row[:1] + 1, jnp.minimum(row[1:] + 1, changed))
        best = places + jax.lax.cummin(best - places)
        return jnp.where(i < n, best, row), None

    row, _ = jax.lax.scan(step, places, (a, jnp.arange(a.size, dtype=jnp.int32)))
    return row[m].astype(jnp.float32), jnp.maximum(n, m).astype(jnp.float32)


def _first(tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Tokens before padding, in their order, and their number."""
    padding = (mask <= 0).astype(jnp.int32)
    return tokens[jnp.argsort(padding, stable=True)], (1 - padding).sum(dtype=jnp.int32)


def last_hidden_similarity(
    states: Float[Array | np.ndarray, "*n r k d"], mask: Int[Array | np.ndarray, "*n r k"]
) -> Float[Array, "*n"]:
    """Inner product of the states that predict the last token of the chosen and of the rejected response.

    Where responses end in an end-of-text token it is the state at their last word; the authors' code takes the state at
    the last token itself.

    Args:
      states: States that predict the tokens; responses beyond the second do not count.
      mask: 1 at tokens.

    Returns:
      The product of every pair, in float32 at least; 0 where a response is empty.

    Raises:
      UserError: Shapes that do not fit, or fewer than two responses.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, section 5.
    """
    where = "last_hidden_similarity"
    fits = states.ndim >= 3 and states.shape[:-1] == mask.shape and states.shape[-3] >= 2
    rule = "states must be [*n, r, k, d] and the mask [*n, r, k], with two responses"
    require(fits, where, rule, f"{states.shape} and {mask.shape}", "Take both from one ResponseBatch")
    states, tokens = jnp.asarray(states), (jnp.asarray(mask) > 0).astype(jnp.int32)
    places = jnp.arange(tokens.shape[-1], dtype=jnp.int32).reshape(*[1] * (tokens.ndim - 1), -1)
    last = jnp.argmax(tokens * (1 + places), axis=-1, keepdims=True)
    found = jnp.take_along_axis(states, last[..., None], axis=-2)[..., 0, :]
    found = jnp.where(tokens.any(axis=-1)[..., None], found, 0).astype(accumulator(states.dtype))
    return jnp.sum(found[..., 0, :] * found[..., 1, :], axis=-1)


def length_difference(mask: Int[Array | np.ndarray, "*n r k"]) -> Int[Array, "*n"]:
    """Tokens of the rejected response less those of the chosen one: what a score may owe to length alone.

    Example:
      >>> length_difference(jnp.array([[[1, 0, 0], [1, 1, 1]]])).tolist()
      [2]
    """
    shape = mask.shape
    require(len(shape) >= 2 and shape[-2] >= 2, "length_difference", "needs two responses", shape, "Pass [*n, r, k]")
    lengths = (jnp.asarray(mask) > 0).sum(axis=-1, dtype=jnp.int32)
    return lengths[..., 1] - lengths[..., 0]
