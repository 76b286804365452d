"""Who gains: where preference tuning takes the probability of the chosen response to, predicted and measured."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import nearest, require
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.tuning.directions import changes_along, flow_direction, log_distribution

Ranking = Literal["rate", "mass"]
RANKINGS = ("rate", "mass")


class TokenFlow(NamedTuple):
    """What happens to every token of a vocabulary: rates per unit of time (or of step), or changes."""

    log_change: Float[Array, "n v"]
    r"""Of $\ln p(z)$."""
    mass_change: Float[Array, "n v"]
    r"""Of $p(z)$; sums to 0 over tokens (to first order $p(z)$ times the other)."""
    gainers: Int[Array, "n top"]
    """Tokens ranked by what they gain, the first most; the last of them may lose, where few gain."""
    losers: Int[Array, "n top"]
    """Tokens ranked by what they lose, likewise."""


def who_gains(
    logits_fn: OutputFn,
    log_probs_fn: OutputFn,
    params: Params,
    batch: Inputs,
    slopes: Float[Array | np.ndarray, "n s"],
    *,
    followed: Inputs | None = None,
    top: int = 10,
    by: Ranking = "rate",
    batch_size: int | None = None,
    **direction: Any,
) -> TokenFlow:
    r"""Every token's predicted rate under preference tuning on a batch, ranked: where the chosen response's mass goes.

    $\tfrac{d}{dt} \ln p(z) = \nabla \ln p(z) \cdot v$ with v the direction of the batch's mean loss, for all z at once
    by one forward derivative. For an example's own effect pass a batch of it alone. Rates are of logarithms: tokens of
    vanishing probability may lead them, and ``by="mass"`` ranks by $p(z)$ times the rate.

    Args:
      logits_fn: Logits ``[n, v]`` at the place that is followed, as of ``jaxft.nn.make_first_token_logits``.
      log_probs_fn: Log-probabilities ``[n, r]`` of the responses.
      params: Parameters.
      batch: Examples that are trained on.
      slopes: Their loss slopes, as of ``loss_slopes``.
      followed: Examples whose distributions are followed; ``None`` means those of the batch.
      top: Tokens in a ranking, or as many as there are.
      by: ``"rate"`` or ``"mass"``.
      batch_size: Examples at a time; ``None`` means all.
      **direction: Options of ``flow_direction``: ``rule``, ``preconditioner``, ``transform``, ``opt_state``,
        ``param_mask``.

    Returns:
      Rates per unit of time (per step with a transform), and the rankings.

    Raises:
      UserError: An unknown ranking, ``top`` below 1, logits in another shape, and as ``flow_direction``.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 5 and, for a batch, theorem 9, with features that are not free.
    """
    where = "who_gains"
    _require_ranking(where, by)
    update = flow_direction(log_probs_fn, params, batch, slopes, batch_size=batch_size, **direction)
    followed = batch if followed is None else followed
    log_probs, rates = changes_along(where, logits_fn, True, params, followed, update, batch_size)
    return _ranked(where, rates, jnp.exp(log_probs) * rates, top, by)


def mass_flow(
    before: Float[Array | np.ndarray, "n v"],
    after: Float[Array | np.ndarray, "n v"],
    *,
    top: int = 10,
    by: Ranking = "mass",
) -> TokenFlow:
    """Where probability went: the measured counterpart of ``who_gains``.

    Args:
      before: Logits or log-probabilities of every token before training.
      after: After it.
      top: Tokens in a ranking, or as many as there are.
      by: ``"rate"``, by the change of the logarithm, or ``"mass"``.

    Returns:
      Changes, and the rankings.

    Raises:
      UserError: Shapes that do not fit, an unknown ranking, ``top`` below 1.

    Example:
      >>> flow = mass_flow(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]])), top=1)
      >>> flow.gainers.tolist(), flow.losers.tolist(), round(float(flow.mass_change[0, 1]), 3)
      ([[1]], [[0]], 0.25)
    """
    where = "mass_flow"
    _require_ranking(where, by)
    fits = np.ndim(before) == 2 and np.shape(before) == np.shape(after)
    shapes = f"{np.shape(before)} and {np.shape(after)}"
    require(fits, where, "needs [n, v] before and after", shapes, "Follow the same tokens")
    old, new = (log_distribution(jnp.asarray(x)) for x in (before, after))
    return _ranked(where, new - old, jnp.exp(new) - jnp.exp(old), top, by)


def _ranked(where: str, log_change: Array, mass_change: Array, top: int, by: Ranking) -> TokenFlow:
    require(top >= 1, where, "top must be at least 1", top, "Ask for 10 tokens, say")
    top = min(top, log_change.shape[1])
    key = log_change if by == "rate" else mass_change
    gainers, losers = (jax.lax.top_k(side, top)[1] for side in (key, -key))
    return TokenFlow(log_change, mass_change, gainers, losers)


def _require_ranking(where: str, by: Any) -> None:
    require(by in RANKINGS, where, "unknown ranking", repr(by), nearest(str(by), RANKINGS))
