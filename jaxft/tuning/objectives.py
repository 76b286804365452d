"""Objectives of preference tuning over log-probabilities of pairs: any loss of the table, its slopes, and its mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.core.precision import accumulator
from jaxft.tuning.losses import LOSSES, NOT_NEGATIVE, POSITIVE, PreferenceLoss, require_number, resolve_loss
from jaxft.tuning.pair_losses import Pair, PairWeights, margin_weights


def preference_loss(
    name: str,
    log_probs: Float[Array | np.ndarray, "n 2"],
    reference: Float[Array | np.ndarray, "n 2"] | None = None,
    lengths: Int[Array | np.ndarray, "n 2"] | None = None,
    *,
    beta: float | int | Array = 0.1,
    **options: Any,
) -> Float[Array, "n"]:
    r"""The loss of each pair.

    Column 0 is the chosen response, column 1 the rejected one, log-probabilities are sums over tokens. With
    $u^\pm = x^\pm - \ln\pi_{ref}(y^\pm)$, $\Delta = u^+ - u^-$ and $z = \beta\Delta$, the losses and their options are

    - ``sigmoid`` (alias ``dpo``): $-(1-\epsilon)\ln\sigma(z) - \epsilon\ln\sigma(-z)$, ``label_smoothing``
      $\epsilon = 0$, above 0 conservative DPO; ``robust``: $[-(1-\epsilon)\ln\sigma(z) + \epsilon\ln\sigma(-z)] /
      (1-2\epsilon)$, which is not bounded below; ``exo_pair``: $q\ln\frac{q}{1-\epsilon} +
      (1-q)\ln\frac{1-q}{\epsilon}$, $q = \sigma(z)$.
    - ``ipo``: $(\Delta - 1/(2\beta))^2$, the paper's form; ``ipo_mean`` (alias ``ipo_trl``): with
      $u^+/|y^+| - u^-/|y^-|$ for $\Delta$, the form of TRL, so that its beta is per token.
    - ``hinge``: $\max(0, 1 - z)$; ``slic``: $\max(0, \delta - (x^+ - x^-))$, ``delta``; ``rebel``: $(\Delta/\eta -
      (r^+ - r^-))^2$, ``eta`` and ``rewards``, a pair or an array ``[n, 2]``; ``gpo``: $f(z)$, ``f`` one of
      ``exponential``, ``hinge``, ``logistic``, ``savage``, ``squared``, ``truncated_quadratic``; ``discopop``:
      $-(1-g)\ln\sigma(z) + g e^{-z}$, $g = \sigma(z/\tau)$, ``tau``, which at its default rises with z at 0.
    - ``sigmoid_norm``: $-\ln\sigma(\beta(u^+/|y^+| - u^-/|y^-|))$; ``simpo``: $-\ln\sigma(\beta(x^+/|y^+| -
      x^-/|y^-|) - \gamma)$, ``gamma``, ``label_smoothing``.
    - ``cpo``: $-\ln\sigma(\beta(x^+ - x^-)) - \alpha x^+$, ``alpha``, ``label_smoothing``; ``rpo``: $-\ln\sigma(z) -
      \alpha x^+/|y^+|$. The paper of the latter has its alpha on the other term. ``per_token`` says whether the
      likelihood is over its length; TRL takes the mean over all tokens of a batch, which is no loss of a pair.
    - ``dpop``: $-\ln\sigma(\beta[\Delta - \lambda\max(0, -u^+)])$, ``lam``. ``sft``: $-x^+$, ``per_token``.
    - ``kto``: $w^+[1 - \sigma(\beta(u^+ - z_0))] + w^-[1 - \sigma(\beta(z_0 - u^-))]$, with the KL from the reference
      $z_0$ as ``kl``, ``desirable_weight``, ``undesirable_weight``. A pair is two examples of the paper, which means
      over each.
    - ``orpo``: $-\alpha x^+/|y^+| - \beta\ln\sigma(o^+ - o^-)$, $o = \ln\frac{p}{1-p}$ of $p = e^{x/|y|}$, ``alpha``.
    - ``sppo_hard``: $(u^+ - 1/(2\beta))^2 + (u^- + 1/(2\beta))^2$, the paper's eta being $1/\beta$; ``nca_pair``:
      $-\ln\sigma(\beta u^+) - \tfrac12\ln\sigma(-\beta u^+) - \tfrac12\ln\sigma(-\beta u^-)$; ``bco_pair``:
      $-\ln\sigma(\beta u^+ - \delta) - \ln\sigma(\delta - \beta u^-)$, the paper's running shift as ``delta``, TRL's 0.
    - ``apo_zero``: $1 - \sigma(\beta u^+) + \sigma(\beta u^-)$; ``apo_down``: $\sigma(\beta u^+) + 1 - \sigma(z)$; in
      the paper without the ones.

    Values and slopes are finite in float32 for margins up to $10^4$; ``exponential`` goes on as its tangent below
    $z = -60$. Beta is not used by ``slic``, ``rebel`` and ``sft``.

    Args:
      name: Key of ``LOSSES`` or ``ALIASES``.
      log_probs: Of the trained model.
      reference: Of the reference, for losses that have one; others ignore it.
      lengths: Tokens of the responses, for losses that have them (``uses_lengths``); others ignore them.
      beta: Strength of the reference, or the temperature of the loss.
      **options: Those of the loss.

    Returns:
      A loss a pair, in float32 or the wider type of ``log_probs``.

    Raises:
      UserError: An unknown loss or option, an option out of range, shapes that do not fit, a missing reference or
        length, or concrete values that are not finite.

    Example:
      >>> log_probs, reference = jnp.array([[-1.0, -3.0]]), jnp.array([[-2.0, -2.0]])
      >>> preference_loss("ipo", log_probs, reference, beta=0.25).tolist()
      [0.0]
      >>> preference_loss("slic", log_probs, delta=5.0).tolist()
      [3.0]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, equation 2 and appendix B; those of the losses are in ``LOSSES``.
    """
    return _values("preference_loss", name, log_probs, (reference, lengths), beta, options)


def loss_slopes(
    name: str,
    log_probs: Float[Array | np.ndarray, "n 2"],
    reference: Float[Array | np.ndarray, "n 2"] | None = None,
    lengths: Int[Array | np.ndarray, "n 2"] | None = None,
    *,
    beta: float | int | Array = 0.1,
    **options: Any,
) -> Float[Array, "n 2"]:
    r"""Derivatives of each pair's loss by its two log-probabilities.

    Training sees nothing else of a loss: $\nabla l = f_1 \nabla x^+ + f_2 \nabla x^-$ with
    $f_1 = \partial l/\partial x^+$, $f_2 = \partial l/\partial x^-$. At a kink it is one of the one-sided ones or
    their mean. What a batch shares, as the KL of ``kto``, counts as given.

    Args:
      name: Key of ``LOSSES`` or ``ALIASES``.
      log_probs: As for ``preference_loss``, and so are the others.
      reference: Of the reference.
      lengths: Tokens of the responses.
      beta: Strength of the reference.
      **options: Those of the loss.

    Returns:
      The slopes; those of a margin loss are opposite.

    Raises:
      UserError: As ``preference_loss``.

    Example:
      >>> loss_slopes("sigmoid", jnp.zeros((1, 2)), jnp.zeros((1, 2)), beta=0.5).tolist()
      [[-0.25, 0.25]]
    """
    where = "loss_slopes"
    _require_log_probs(where, log_probs)

    def total(x: Array) -> Float[Array, ""]:
        return _values(where, name, x, (reference, lengths), beta, options).sum()

    return jax.grad(total)(_wide(log_probs))


def loss_weights(
    name: str,
    log_probs: Float[Array | np.ndarray, "n 2"],
    reference: Float[Array | np.ndarray, "n 2"] | None = None,
    lengths: Int[Array | np.ndarray, "n 2"] | None = None,
    **options: Any,
) -> PairWeights:
    r"""The weights of a loss of the form $\mu(\lambda^+ x^+ - \lambda^- x^-) - \kappa x^+$, one of each a pair.

    Margin losses have $\lambda^\pm = 1, \kappa = 0$. Its slopes are $(\lambda^+\mu' - \kappa, -\lambda^-\mu')$.

    Args:
      name: A loss of the margin or the weighted family.
      log_probs: As for ``preference_loss``, and so are the others.
      reference: Of the reference.
      lengths: Tokens of the responses.
      **options: Those of the loss.

    Returns:
      The weights; they scale with what is called mu, and here beta stays in it.

    Raises:
      UserError: As ``preference_loss``, and for a loss outside both families.

    Example:
      >>> loss_weights("dpop", jnp.array([[-3.0, -1.0]]), jnp.array([[-2.0, -1.0]]), lam=4.0).chosen.tolist()
      [5.0]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, propositions 1 and 2.
    """
    where = "loss_weights"
    loss, options = resolve_loss(where, name, options)
    inside = loss.family != "outside"
    have = [known for known, line in LOSSES.items() if line.family != "outside"]
    require(inside, where, "name must be a loss that has weights", repr(name), f"These have: {', '.join(have)}")
    terms = _pair(where, name, loss, options, log_probs, reference, lengths)
    return (loss.weights or margin_weights)(terms, **_typed(where, terms, options))


class PreferenceLabels(NamedTuple):
    """What a batch of pairs is scored against; every field has the leading axis of examples."""

    reference: Float[Array | np.ndarray, "b r"] | None = None
    """Log-probabilities of the reference, computed once before training."""
    lengths: Int[Array | np.ndarray, "b r"] | None = None
    """Tokens of each response."""
    rewards: Float[Array | np.ndarray, "b 2"] | None = None
    """Of the chosen and the rejected response, for ``rebel``."""


PreferenceObjective = Callable[[Float[Array, "b r"], PreferenceLabels], Float[Array, ""]]


def make_preference_objective(
    name: str, *, beta: float | int = 0.1, sft_weight: float | int = 0.0, **options: Any
) -> PreferenceObjective:
    r"""Builds the mean of a loss over a batch, for ``make_segment``, with an SFT term $-\lambda\ln\pi(y^+)$.

    Columns beyond the first two are not trained. ``kto`` without a ``kl`` takes them for responses to other prompts,
    and estimates the KL of the batch from them: the mean of their log-ratios, no less than 0 and held constant.
    ``rebel`` takes the rewards of the labels where they have them.

    Args:
      name: Key of ``LOSSES`` or ``ALIASES``.
      beta: Strength of the reference.
      sft_weight: The lambda of the SFT term, a sum over tokens.
      **options: Those of the loss.

    Returns:
      ``objective(log_probs [b, r], PreferenceLabels)``. It is a mean over examples, so gradients may be accumulated
      over parts of a batch; a KL estimated from the batch is that of the part.

    Raises:
      UserError: An unknown loss or option, or one out of range; at a call also what ``preference_loss`` raises.

    Example:
      >>> objective = make_preference_objective("dpo", beta=0.1, sft_weight=0.01)
      >>> labels = PreferenceLabels(reference=jnp.array([[-2.0, -3.0]]))
      >>> round(float(objective(jnp.array([[-2.0, -3.0]]), labels)), 4)  # log 2 + 0.02
      0.7131

    Reference:
      Razin et al. 2025, arXiv 2410.08847, proposition 1.
    """
    where = "make_preference_objective"
    loss, _ = resolve_loss(where, name, options)
    require_number(where, "beta", beta, *POSITIVE)
    require_number(where, "sft_weight", sft_weight, *NOT_NEGATIVE)
    estimates_kl = "kl" in loss.options and options.get("kl") is None

    def objective(log_probs: Float[Array, "b r"], labels: PreferenceLabels) -> Float[Array, ""]:
        given, reference, lengths = dict(options), labels.reference, labels.lengths
        if "rewards" in loss.options and labels.rewards is not None:
            given["rewards"] = labels.rewards
        if estimates_kl:
            given["kl"] = _unmatched_kl(log_probs, reference)
        pairs = [None if x is None else x[:, :2] for x in (reference, lengths)]
        value = preference_loss(name, log_probs[:, :2], *pairs, beta=beta, **given).mean()
        return value - sft_weight * _wide(log_probs)[:, 0].mean() if sft_weight else value

    return objective


def _unmatched_kl(log_probs: Array, reference: Any) -> Array:
    columns = log_probs.shape[1] if log_probs.ndim == 2 else 2
    got = f"{columns} columns and no kl"
    advice = "Pass kl=..., or add responses to other prompts as columns 2, 3, ..."
    require(columns > 2, "make_preference_objective", "kto must be given its KL", got, advice)
    ratios = _wide(log_probs)[:, 2:] - _wide(reference)[:, 2:]
    return jax.lax.stop_gradient(jax.nn.relu(ratios.mean()))


def _values(where: str, name: str, log_probs: Any, others: tuple[Any, Any], beta: Any, options: Any) -> Array:
    """Loss of each pair; ``others`` are the reference and the lengths."""
    loss, options = resolve_loss(where, name, options)
    require_number(where, "beta", beta, *POSITIVE)
    missing = [option for option, value in options.items() if value is None]
    rule = f"{name} must be given {', '.join(missing)}"
    require(not missing, where, rule, "none", f"Pass {', '.join(f'{option}=...' for option in missing)}")
    terms = _pair(where, name, loss, options, log_probs, *others)
    of = terms.chosen_ratio - terms.rejected_ratio if loss.family == "margin" else terms
    return loss.formula(of, **_typed(where, terms, {"beta": beta, **options}))


def _pair(
    where: str, name: str, loss: PreferenceLoss, options: Any, log_probs: Any, reference: Any, lengths: Any
) -> Pair:
    """The terms of a loss, all in one type; those that it has no use for are 0 or 1."""
    _require_log_probs(where, log_probs)
    x = _wide(log_probs)
    base, tokens = jnp.zeros_like(x), jnp.ones_like(x)
    if loss.uses_reference:
        base = _given(where, name, "reference", reference, x, "Compute it once by reference_log_probs")
        _require_finite_rows(where, "reference", reference)
    if loss.uses_lengths and options.get("per_token", True):
        tokens = _given(where, name, "lengths", lengths, x, "Sum the mask of the responses")
        require_number(where, "lengths", lengths, 1.0, np.inf, ">= 1")
    ratio = x - base
    return Pair(x[:, 0], x[:, 1], ratio[:, 0], ratio[:, 1], tokens[:, 0], tokens[:, 1])


def _given(where: str, name: str, what: str, value: Any, like: Array, advice: str) -> Array:
    require(value is not None, where, f"{name} must be given {what}", "none", advice)
    rule = f"{what} must have the shape of log_probs, {like.shape}"
    require(np.shape(value) == like.shape, where, rule, np.shape(value), "Give one number a response")
    return jnp.asarray(value, like.dtype)


def _require_log_probs(where: str, log_probs: Any) -> None:
    shape, dtype = np.shape(log_probs), jnp.result_type(log_probs)
    fits = len(shape) == 2 and shape[1] == 2 and jnp.issubdtype(dtype, jnp.floating)
    advice = "Give a column of chosen and a column of rejected responses"
    require(fits, where, "log_probs must be floats [n, 2]", f"{dtype} {shape}", advice)
    _require_finite_rows(where, "log_probs", log_probs)


def _require_finite_rows(where: str, name: str, value: Any) -> None:
    """Raises where a concrete row is not finite, naming examples; silent where values are traced."""
    if is_concrete(value) and (not isinstance(value, jax.Array) or value.is_fully_addressable):
        rows = np.flatnonzero(~np.isfinite(np.asarray(value, np.float64)).all(axis=1))
        shown = f"NaN or infinity at examples {', '.join(map(str, rows[:8]))}{' and others' if rows.size > 8 else ''}"
        advice = "Check those responses and the model that scored them"
        require(not rows.size, where, f"{name} must be finite", shown, advice)


def _wide(x: Any) -> Array:
    """In float32 at least."""
    return jnp.asarray(x, accumulator(jnp.result_type(x)))


def _typed(where: str, terms: Pair, options: dict[str, Any]) -> dict[str, Any]:
    """Options with arrays in the type of the loss, and of shapes that fit; Python values as they are."""
    n = terms.chosen.shape[0]
    for option, value in options.items():
        fits = ((2,), (n, 2)) if option == "rewards" else ((), (n,))
        rule = f"{option} must have a shape of {' or '.join(map(str, fits))}"
        require(np.shape(value) in fits, where, rule, np.shape(value), "Give one number, or one a pair")
    arrays = {option: x for option, x in options.items() if isinstance(x, jax.Array | np.ndarray)}
    return options | {option: jnp.asarray(x, terms.chosen.dtype) for option, x in arrays.items()}
