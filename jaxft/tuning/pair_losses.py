r"""Losses that treat the two responses of a pair unlike: weighted differences, and those of no such form.

Write $x^\pm = \ln\pi(y^\pm)$ and $u^\pm = x^\pm - \ln\pi_{ref}(y^\pm)$. A weighted loss is
$\mu(\lambda^+ x^+ - \lambda^- x^-) - \kappa x^+$ with weights that do not depend on the parameters, but for DPOP, whose
$\lambda^+$ takes two values. It has its weights in a function beside it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.tuning.margin_losses import sigmoid

Values = Float[Array, "n"]


class Pair(NamedTuple):
    """What a loss may look at."""

    chosen: Values
    """Log-probability of the chosen response, summed over its tokens."""
    rejected: Values
    chosen_ratio: Values
    """Less the reference's, where the loss has one."""
    rejected_ratio: Values
    chosen_length: Values
    """Tokens."""
    rejected_length: Values


class PairWeights(NamedTuple):
    r"""The form $\mu(\lambda^+ x^+ - \lambda^- x^-) - \kappa x^+$ of a loss at one point."""

    chosen: Values
    r"""$\lambda^+$."""
    rejected: Values
    r"""$\lambda^-$."""
    sft: Values
    r"""$\kappa$, the weight of the likelihood of the chosen response."""


def ipo_mean(pair: Pair, beta: Any) -> Values:
    r"""$(u^+/|y^+| - u^-/|y^-| - 1/(2\beta))^2$."""
    return (_mean_margin(pair) - 1 / (2 * beta)) ** 2


def sigmoid_norm(pair: Pair, beta: Any) -> Values:
    r"""$-\ln\sigma(\beta(u^+/|y^+| - u^-/|y^-|))$."""
    return sigmoid(_mean_margin(pair), beta, 0.0)


def simpo(pair: Pair, beta: Any, gamma: Any, label_smoothing: Any) -> Values:
    r"""$-\ln\sigma(\beta(x^+/|y^+| - x^-/|y^-|) - \gamma)$."""
    return sigmoid(_mean_margin(pair) - gamma / beta, beta, label_smoothing)


def cpo(pair: Pair, beta: Any, alpha: Any, per_token: bool, label_smoothing: Any) -> Values:
    r"""$-\ln\sigma(\beta(x^+ - x^-)) - \alpha x^+$."""
    return sigmoid(pair.chosen - pair.rejected, beta, label_smoothing) + alpha * sft(pair, beta, per_token)


def rpo(pair: Pair, beta: Any, alpha: Any, per_token: bool) -> Values:
    r"""$-\ln\sigma(\beta(u^+ - u^-)) - \alpha x^+/|y^+|$."""
    return sigmoid(pair.chosen_ratio - pair.rejected_ratio, beta, 0.0) + alpha * sft(pair, beta, per_token)


def dpop(pair: Pair, beta: Any, lam: Any) -> Values:
    r"""$-\ln\sigma(\beta[u^+ - u^- - \lambda\max(0, -u^+)])$."""
    penalised = pair.chosen_ratio - pair.rejected_ratio - lam * jax.nn.relu(-pair.chosen_ratio)
    return sigmoid(penalised, beta, 0.0)


def sft(pair: Pair, beta: Any, per_token: bool) -> Values:
    r"""$-x^+$, or $-x^+/|y^+|$."""
    del beta
    return -pair.chosen / pair.chosen_length if per_token else -pair.chosen


def margin_weights(pair: Pair, **_: Any) -> PairWeights:
    """One each: the loss is a function of the margin."""
    one = jnp.ones_like(pair.chosen)
    return PairWeights(one, one, jnp.zeros_like(one))


def mean_weights(pair: Pair, **_: Any) -> PairWeights:
    """One over the length, for differences of means over tokens."""
    return PairWeights(1 / pair.chosen_length, 1 / pair.rejected_length, jnp.zeros_like(pair.chosen))


def regularised_weights(pair: Pair, *, alpha: Any, per_token: bool, **_: Any) -> PairWeights:
    """Those of a margin and of its SFT term."""
    kappa = alpha * sft_weights(pair, per_token=per_token).sft
    return margin_weights(pair)._replace(sft=kappa)


def dpop_weights(pair: Pair, *, lam: Any, **_: Any) -> PairWeights:
    """The chosen response weighs more by ``lam`` while it is below its reference."""
    one = jnp.ones_like(pair.chosen)
    return PairWeights(jnp.where(pair.chosen_ratio < 0, 1 + lam, one), one, jnp.zeros_like(one))


def sft_weights(pair: Pair, *, per_token: bool, **_: Any) -> PairWeights:
    """Those of a likelihood alone."""
    one = jnp.ones_like(pair.chosen)
    return PairWeights(0 * one, 0 * one, one / pair.chosen_length if per_token else one)


def kto(pair: Pair, beta: Any, kl: Any, desirable_weight: Any, undesirable_weight: Any) -> Values:
    r"""$w^+[1 - \sigma(\beta(u^+ - z))] + w^-[1 - \sigma(\beta(z - u^-))]$, z the KL from the reference."""
    gain = jax.nn.sigmoid(beta * (kl - pair.chosen_ratio))
    return desirable_weight * gain + undesirable_weight * jax.nn.sigmoid(beta * (pair.rejected_ratio - kl))


def orpo(pair: Pair, beta: Any, alpha: Any) -> Values:
    r"""$-\alpha x^+/|y^+| - \beta\ln\sigma(\operatorname{lo}^+ - \operatorname{lo}^-)$, lo the log-odds of the mean."""
    odds = _log_odds(pair.chosen / pair.chosen_length) - _log_odds(pair.rejected / pair.rejected_length)
    return alpha * sft(pair, beta, True) - beta * jax.nn.log_sigmoid(odds)


def sppo_hard(pair: Pair, beta: Any) -> Values:
    r"""$(u^+ - 1/(2\beta))^2 + (u^- + 1/(2\beta))^2$."""
    return (pair.chosen_ratio - 0.5 / beta) ** 2 + (pair.rejected_ratio + 0.5 / beta) ** 2


def nca_pair(pair: Pair, beta: Any) -> Values:
    r"""$-\ln\sigma(\beta u^+) - \tfrac12\ln\sigma(-\beta u^+) - \tfrac12\ln\sigma(-\beta u^-)$."""
    log_s, chosen, rejected = jax.nn.log_sigmoid, beta * pair.chosen_ratio, beta * pair.rejected_ratio
    return -log_s(chosen) - 0.5 * log_s(-chosen) - 0.5 * log_s(-rejected)


def bco_pair(pair: Pair, beta: Any, delta: Any) -> Values:
    r"""$-\ln\sigma(\beta u^+ - \delta) - \ln\sigma(-(\beta u^- - \delta))$."""
    chosen, rejected = beta * pair.chosen_ratio - delta, beta * pair.rejected_ratio - delta
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def apo_zero(pair: Pair, beta: Any) -> Values:
    r"""$1 - \sigma(\beta u^+) + \sigma(\beta u^-)$."""
    return jax.nn.sigmoid(-beta * pair.chosen_ratio) + jax.nn.sigmoid(beta * pair.rejected_ratio)


def apo_down(pair: Pair, beta: Any) -> Values:
    r"""$\sigma(\beta u^+) + 1 - \sigma(\beta(u^+ - u^-))$."""
    margin = pair.chosen_ratio - pair.rejected_ratio
    return jax.nn.sigmoid(beta * pair.chosen_ratio) + jax.nn.sigmoid(-beta * margin)


def _mean_margin(pair: Pair) -> Values:
    return pair.chosen_ratio / pair.chosen_length - pair.rejected_ratio / pair.rejected_length


def _log_odds(log_p: Values) -> Values:
    """``ln(p / (1 - p))``; a p that rounds to 1 is taken one rounding below it, where its slope ends too."""
    log_p = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).eps)
    near_one = jnp.log(-jnp.expm1(log_p))
    return log_p - jnp.where(log_p < -0.5, jnp.log1p(-jnp.exp(log_p)), near_one)
