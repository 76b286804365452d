r"""The table of losses of preference tuning, a line each, and how a name and its options are read.

A loss is a function l of $x^\pm = \ln\pi(y^\pm|x)$, the log-probabilities of the chosen and the rejected response, of
those of a reference and of lengths in tokens. Its family says what is known of likelihood displacement under it:

=========  ===========================================================  ==========================================
family     form                                                         what holds
=========  ===========================================================  ==========================================
margin     $l(x^+ - x^-)$                                               the theorems of arXiv 2410.08847
weighted   $\mu(\lambda^+ x^+ - \lambda^- x^-) - \kappa x^+$            its propositions 1 and 2
outside    any other $f(x^+, x^-)$                                      rates from the Gram matrix of gradients
=========  ===========================================================  ==========================================

Losses that sort or pool a batch (AOT), reweight by likelihoods (WPO) or change the divergence are not covered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from jaxtyping import Array

from jaxft.core.checks import is_concrete, nearest, require
from jaxft.tuning import margin_losses as margin
from jaxft.tuning import pair_losses as pair
from jaxft.tuning.pair_losses import PairWeights

Family = Literal["margin", "weighted", "outside"]
Weights = Callable[..., PairWeights]
Options = Mapping[str, Any]
NONE: Options = MappingProxyType({})


@dataclass(frozen=True)
class PreferenceLoss:
    """A line of the table of losses."""

    formula: Callable[..., Array]
    """Of margins ``[n]`` in the margin family, else of a ``Pair``; then ``beta`` and the options by name."""
    family: Family
    options: Options
    """Options and their defaults; None where there is no default."""
    weights: Weights | None = None
    r"""The $\lambda^+, \lambda^-, \kappa$ of the weighted family."""
    convex: bool = True
    """As a function of the two log-probabilities together, with the options at their defaults."""
    decreasing: bool = True
    """Whether it nowhere rises with ln pi(y+) and nowhere falls with ln pi(y-).

    Of the others, all but ``discopop``, which has a bump there, and ``apo_down`` fall at the reference.
    """
    uses_reference: bool = True
    uses_lengths: bool = False
    """Where it has an option ``per_token``, while that is true."""
    source: str = ""


def _line(family: Family, formula: Any, source: str, options: Options, rest: dict[str, Any]) -> PreferenceLoss:
    return PreferenceLoss(formula, family, MappingProxyType(dict(options)), source=source, **rest)


def _margin(formula: Any, source: str, options: Options = NONE, **rest: Any) -> PreferenceLoss:
    return _line("margin", formula, source, options, rest)


def _weighted(formula: Any, weights: Weights, source: str, options: Options = NONE, **rest: Any):
    return _line("weighted", formula, source, options, {"weights": weights, "uses_lengths": True} | rest)


def _outside(formula: Any, source: str, options: Options = NONE, **rest: Any) -> PreferenceLoss:
    return _line("outside", formula, source, options, rest)


_ALONE: Any = {"uses_reference": False}
_SHAPED: Any = {"convex": False, "decreasing": False}
_REBEL: Any = {"eta": 1.0, "rewards": (1.0, 0.0)}
_SIMPO: Any = {"gamma": 0.5, "label_smoothing": 0.0}
_CPO: Any = {"alpha": 1.0, "per_token": False, "label_smoothing": 0.0}
_RPO: Any = {"alpha": 1.0, "per_token": True}
_KTO: Any = {"kl": None, "desirable_weight": 1.0, "undesirable_weight": 1.0}

_LINES = {
    "sigmoid": _margin(margin.sigmoid, "arXiv 2305.18290, equation 7", {"label_smoothing": 0.0}),
    "ipo": _margin(margin.ipo, "arXiv 2310.12036, equation 17", decreasing=False),
    "hinge": _margin(margin.hinge, "arXiv 2309.06657"),
    "slic": _margin(margin.slic, "arXiv 2305.10425", {"delta": 1.0}, **_ALONE),
    "rebel": _margin(margin.rebel, "arXiv 2404.16767, algorithm 1", _REBEL, decreasing=False),
    "gpo": _margin(margin.gpo, "arXiv 2402.05749, sections 2 and 3", {"f": "exponential"}),
    "exo_pair": _margin(margin.exo_pair, "arXiv 2402.00856, equation 16", {"label_smoothing": 1e-3}, **_SHAPED),
    "robust": _margin(margin.robust, "arXiv 2403.00409", {"label_smoothing": 0.1}),
    "discopop": _margin(margin.discopop, "arXiv 2406.08414, equation 5", {"tau": 0.05}, **_SHAPED),
    "ipo_mean": _weighted(pair.ipo_mean, pair.mean_weights, "arXiv 2310.12036, per token", decreasing=False),
    "sigmoid_norm": _weighted(pair.sigmoid_norm, pair.mean_weights, "arXiv 2305.18290, equation 7 per token"),
    "simpo": _weighted(pair.simpo, pair.mean_weights, "arXiv 2405.14734, equation 6", _SIMPO, **_ALONE),
    "cpo": _weighted(pair.cpo, pair.regularised_weights, "arXiv 2401.08417, equation 3", _CPO, **_ALONE),
    "rpo": _weighted(pair.rpo, pair.regularised_weights, "arXiv 2404.19733, section 2", _RPO),
    "dpop": _weighted(pair.dpop, pair.dpop_weights, "arXiv 2402.13228", {"lam": 50.0}, uses_lengths=False),
    "sft": _weighted(pair.sft, pair.sft_weights, "the likelihood alone", {"per_token": False}, **_ALONE),
    "kto": _outside(pair.kto, "arXiv 2402.01306, equation 7", _KTO, convex=False),
    "orpo": _outside(
        pair.orpo, "arXiv 2403.07691, equation 6", {"alpha": 1.0}, convex=False, uses_lengths=True, **_ALONE
    ),
    "sppo_hard": _outside(pair.sppo_hard, "arXiv 2405.00675, equation 4.7", decreasing=False),
    "nca_pair": _outside(pair.nca_pair, "arXiv 2402.05369", decreasing=False),
    "bco_pair": _outside(pair.bco_pair, "arXiv 2404.04656", {"delta": 0.0}),
    "apo_zero": _outside(pair.apo_zero, "arXiv 2408.06266, equation 7", convex=False),
    "apo_down": _outside(pair.apo_down, "arXiv 2408.06266, equation 8", **_SHAPED),
}

LOSSES: Mapping[str, PreferenceLoss] = MappingProxyType(_LINES)
"""Name -> loss: the margin family, then the weighted one, then those outside both."""

ALIASES: Mapping[str, str] = MappingProxyType({"dpo": "sigmoid", "ipo_trl": "ipo_mean"})
"""Other names of losses."""

POSITIVE = (float(np.nextafter(0, 1)), np.inf, "> 0")
_BELOW_HALF = float(np.nextafter(0.5, 0))
NOT_NEGATIVE = (0.0, np.inf, ">= 0")
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "alpha": NOT_NEGATIVE,
    "desirable_weight": NOT_NEGATIVE,
    "exo_pair.label_smoothing": (POSITIVE[0], _BELOW_HALF, "in (0, 0.5)"),
    "eta": POSITIVE,
    "gamma": NOT_NEGATIVE,
    "kl": NOT_NEGATIVE,
    "label_smoothing": (0.0, _BELOW_HALF, "in [0, 0.5)"),
    "lam": NOT_NEGATIVE,
    "tau": (POSITIVE[0], 1.0, "in (0, 1]"),
    "undesirable_weight": NOT_NEGATIVE,
}
"""Of numeric options, or of an option of one loss; others may be any number."""


def resolve_loss(where: str, name: str, options: Mapping[str, Any]) -> tuple[PreferenceLoss, dict[str, Any]]:
    """The loss of a name, and its options with the defaults filled in.

    Args:
      where: The function that is asked, for its errors.
      name: Key of ``LOSSES`` or ``ALIASES``.
      options: Some of the options of the loss.

    Returns:
      The line of the table, and all options.

    Raises:
      UserError: An unknown loss, naming the nearest; an unknown option, naming those it has; or one out of range.
    """
    known = {*LOSSES, *ALIASES}
    require(name in known, where, "name must be a loss", repr(name), nearest(str(name).lower(), known))
    loss = LOSSES[ALIASES.get(name, name)]
    strange = sorted(set(options) - set(loss.options))
    has = f"It has {', '.join(loss.options)}" if loss.options else "It has none"
    require(not strange, where, f"options must be those of {name}", ", ".join(strange), has)
    for option, value in options.items():
        bounds = _BOUNDS.get(f"{name}.{option}", _BOUNDS.get(option))
        if bounds is not None and value is not None:
            require_number(where, option, value, *bounds)
    f = options.get("f", "logistic")
    functions = margin.GPO_FUNCTIONS
    require(f in functions, where, "f must be a function of gpo", repr(f), nearest(str(f), functions))
    return loss, {**loss.options, **options}


def require_number(where: str, name: str, value: Any, low: float, high: float, rule: str) -> None:
    """Raises unless a number, or every entry of an array, lies in the bounds; silent where it is traced."""
    if is_concrete(value):
        inside = np.all((np.asarray(value) >= low) & (np.asarray(value) <= high))
        require(bool(inside), where, f"{name} must be {rule}", value, "Change it")
