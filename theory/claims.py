"""Claims, the rules by which a claim's kind sets its status, and the one way to check a claim.

A check returns ``Evidence``; it never sets a status. The rule of the claim's kind does, alone: ``RULE_TEXTS`` has the
rules in words.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxft.core.checks import UserError, nearest, require
from jaxft.core.findings import Finding, Status
from jaxft.core.statistics import log_log_slope, mean_interval, paired_difference, rank_correlation

__all__ = ["Claim", "Evidence", "Finding", "check_claim", "controlled_claim", "judge"]

Kind = Literal["identity", "bound", "rate", "limit", "association", "ordering", "equality"]

RULE_TEXTS: Mapping[Kind, str] = {
    "identity": "the relative difference is at most the tolerance (1e-10 in float64, 1e-5 in float32)",
    "bound": "measured <= predicted + 3 stderr; the slack is reported, and a vacuous bound says so",
    "rate": "the fitted log-log slope is within the tolerance of the predicted one; >= 5 points over >= 1.5 decades",
    "limit": "the error falls with size within noise, and the last point is below the tolerance",
    "association": "the rank correlation has the predicted sign, and its interval excludes 0",
    "ordering": "predicted is the greater of a pair, measured the lesser; the interval of their difference excludes 0",
    "equality": "the difference is at most the tolerance + 3 stderr; inconclusive when 3 stderr exceed the tolerance",
}
"""What holds for a claim of each kind to hold."""

EXACT_KINDS = ("identity", "bound")
"""Kinds whose violation is an error in the code or in the theorem, never bad luck."""

STDERRS = 3.0
"""Standard errors of grace that a noisy measurement gets."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one seed of a check saw.

    identity, bound, equality: ``predicted`` and ``measured`` (arrays for identities). rate, limit, association:
    ``measured`` against ``x`` (step sizes, widths, ...). ordering: ``predicted`` is the greater member of the pair,
    ``measured`` the lesser.
    """

    measured: Any
    predicted: Any = 0.0
    x: Any = None
    stderr: float = 0.0
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unmet: tuple[str, ...] = ()
    """Preconditions that the measurement found not to hold: the status is then inconclusive."""


Check = Callable[[int], Evidence]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One prediction of a paper, how to test it, and the same test with one assumption broken."""

    id: str
    statement: str
    source: str
    kind: Kind
    check: Check
    control: Check
    control_breaks: str
    """The assumption that the control breaks."""
    tolerance: float | None = None
    """``None`` means that of the kind (identity) or that the kind needs none (bound, association, ordering)."""
    slope: float | None = None
    """Predicted exponent of a rate."""
    sign: float = 1.0
    """Predicted sign of an association."""
    vacuous_above: float | None = None
    """A bound beyond this value says nothing."""
    seeds: int = 1
    max_seeds: int = 1
    """A noisy check adds seeds up to this number while its rule cannot speak."""

    def __post_init__(self):
        where = "Claim"
        require(self.kind in RULES, where, "unknown kind", self.kind, nearest(self.kind, RULES))
        needs = {"rate": ("slope", "tolerance"), "limit": ("tolerance",), "equality": ("tolerance",)}
        absent = [name for name in needs.get(self.kind, ()) if getattr(self, name) is None]
        require(not absent, where, f"a {self.kind} needs {' and '.join(absent)}", None, "State it")
        enough = {"ordering": 3, "equality": 1}.get(self.kind, 1)
        require(self.seeds >= enough, where, f"a claim of kind {self.kind} needs >= {enough} seeds", self.seeds, "Add")
        object.__setattr__(self, "max_seeds", max(self.seeds, self.max_seeds))


def controlled_claim(
    paper: str,
    name: str,
    statement: str,
    source: str,
    kind: Kind,
    check: Callable[..., Evidence],
    control: Mapping[str, Any],
    breaks: str,
    **options: Any,
) -> Claim:
    """A claim ``paper/name`` whose control is the same check with options that break an assumption."""
    broken = functools.partial(check, **control)
    return Claim(f"{paper}/{name}", statement, source, kind, check, broken, breaks, **options)


class Verdict(NamedTuple):
    """What a rule says of the evidence."""

    predicted: float
    measured: float
    stderr: float
    tolerance: float
    status: Status
    note: str = ""


def judge(claim: Claim, evidence: Sequence[Evidence], *, first_seed: int = 0) -> Finding:
    """The finding of a claim, from the evidence of its seeds, by the rule of its kind.

    Args:
      claim: The claim.
      evidence: One piece a seed.
      first_seed: The first seed, for the record.

    Returns:
      The finding. An unmet precondition makes it inconclusive and says which; so does a measurement that is not
      finite.

    Raises:
      UserError: No evidence.
    """
    require(bool(evidence), "judge", "needs evidence", "none", "Run the check on at least one seed")
    verdict = RULES[claim.kind](claim, evidence)
    unmet = sorted({name for piece in evidence for name in piece.unmet})
    status, note = verdict.status, verdict.note
    if not np.isfinite([verdict.predicted, verdict.measured, verdict.stderr]).all():
        status, note = "inconclusive", "not finite"
    if unmet:
        status, note = "inconclusive", "precondition unmet: " + ", ".join(unmet)
    setting = {**evidence[0].setting, "seeds": len(evidence), **({"note": note} if note else {})}
    return Finding(
        claim=claim.id,
        predicted=verdict.predicted,
        measured=verdict.measured,
        stderr=verdict.stderr,
        tolerance=verdict.tolerance,
        status=status,
        setting=setting,
        seed=first_seed,
        precision=_precision(evidence),
    )


def check_claim(claim: Claim, *, control: bool = False, first_seed: int = 0) -> Finding:
    """Runs a claim's check (or its control) in float64 with exact matrix products, and judges it.

    Seeds are added up to ``claim.max_seeds`` while the status is inconclusive.
    """
    check = claim.control if control else claim.check
    evidence: list[Evidence] = []
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        while True:
            evidence.append(check(first_seed + len(evidence)))
            if len(evidence) < claim.seeds:
                continue
            finding = judge(claim, evidence, first_seed=first_seed)
            if finding.status != "inconclusive" or len(evidence) >= claim.max_seeds:
                return finding


def _identity(claim: Claim, evidence: Sequence[Evidence]) -> Verdict:
    differences = []
    for piece in evidence:
        predicted, measured = np.asarray(piece.predicted), np.asarray(piece.measured)
        if predicted.shape != measured.shape:
            raise UserError(f"{claim.id}: shapes {predicted.shape} and {measured.shape} of an identity differ")
        scale = max(float(np.abs(predicted).max()), np.finfo(float).tiny)
        differences.append(float(np.abs(predicted - measured).max()) / scale)
    double = all(np.asarray(piece.measured).dtype == np.float64 for piece in evidence)
    tolerance = claim.tolerance if claim.tolerance is not None else (1e-10 if double else 1e-5)
    worst = float(np.max(differences))
    return Verdict(0.0, worst, 0.0, tolerance, "holds" if worst <= tolerance else "violated")


def _bound(claim: Claim, evidence: Sequence[Evidence]) -> Verdict:
    slacks = [float(piece.predicted) + STDERRS * piece.stderr - float(piece.measured) for piece in evidence]
    worst = evidence[int(np.argmin(slacks))]
    predicted, measured = float(worst.predicted), float(worst.measured)
    vacuous = claim.vacuous_above is not None and predicted > claim.vacuous_above
    note = f"slack {predicted - measured:.3g}" + ("; the bound is vacuous" if vacuous else "")
    holds = min(slacks) >= 0
    status: Status = "violated" if not holds else "inconclusive" if vacuous else "holds"
    return Verdict(predicted, measured, worst.stderr, STDERRS * worst.stderr, status, note)


def _rate(claim: Claim, evidence: Sequence[Evidence]) -> Verdict:
    x = np.asarray(evidence[0].x, float)
    slope, tolerance = float(claim.slope or 0.0), float(claim.tolerance or 0.0)
    decades = float(np.log10(x.max() / x.min()))
    if len(x) < 5 or decades < 1.5 - 1e-9:
        note = f"{len(x)} points over {decades:.2f} decades; a rate needs 5 over 1.5"
        return Verdict(slope, float("nan"), 0.0, tolerance, "inconclusive", note)
    y = np.stack([np.asarray(piece.measured, float) for piece in evidence])
    if not (np.isfinite(y).all() and (y > 0).all()):
        return Verdict(slope, float("nan"), 0.0, tolerance, "inconclusive", "not positive and finite")
    fit = log_log_slope(x, y)
    inside = abs(fit.estimate - slope) <= tolerance
    wide = fit.high - fit.low > 2 * tolerance
    note = f"interval [{fit.low:.3g}, {fit.high:.3g}]"
    # An interval wider than the tolerance speaks only where it leaves the predicted slope out.
    excluded = fit.low > slope + tolerance or fit.high < slope - tolerance
    status: Status = "violated" if excluded or (not wide and not inside) else "inconclusive" if wide else "holds"
    return Verdict(slope, fit.estimate, fit.stderr, tolerance, status, note)


def _limit(claim: Claim, evidence: Sequence[Evidence]) -> Verdict:
    errors = np.stack([np.asarray(piece.measured, float) for piece in evidence])
    order = np.argsort(np.asarray(evidence[0].x, float))
    errors = errors[:, order]
    mean = errors.mean(axis=0)
    noise = errors.std(axis=0, ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else np.zeros_like(mean)
    noise = np.hypot(noise, evidence[0].stderr)
    steps_noise = STDERRS * np.hypot(noise[1:], noise[:-1])
    # Rounding sets a floor under an error that has already reached it.
    falls = bool((np.diff(mean) <= steps_noise + 1e-12).all())
    tolerance = float(claim.tolerance or 0.0)
    last, stderr = float(mean[-1]), float(noise[-1])
    if falls and last + STDERRS * stderr <= tolerance:
        status: Status = "holds"
    elif not falls or last - STDERRS * stderr > tolerance:
        status = "violated"
    else:
        status = "inconclusive"
    return Verdict(0.0, last, stderr, tolerance, status, "" if falls else "the error does not fall")


def _association(claim: Claim, evidence: Sequence[Evidence]) -> Verdict:
    x = np.concatenate([np.ravel(piece.x) for piece in evidence])
    y = np.concatenate([np.ravel(piece.measured) for piece in evidence])
    if len(x) < 5:
        return Verdict(claim.sign, float("nan"), 0.0, 0.0, "inconclusive", f"{len(x)} points; needs 5")
    rho = rank_correlation(x, y)
    status: Status = "inconclusive"
    if rho.excludes_zero():
        status = "holds" if np.sign(rho.estimate) == np.sign(claim.sign) else "violated"
    return Verdict(claim.sign, rho.estimate, rho.stderr, 0.0, status, f"interval [{rho.low:.3g}, {rho.high:.3g}]")


def _ordering(_: Claim, evidence: Sequence[Evidence]) -> Verdict:
    lesser = np.array([float(piece.measured) for piece in evidence])
    greater = np.array([float(piece.predicted) for piece in evidence])
    means = float(greater.mean()), float(lesser.mean())
    if len(evidence) < 2:
        return Verdict(*means, 0.0, 0.0, "inconclusive", "one pair; needs 2")
    gap = paired_difference(lesser, greater)
    status: Status = "inconclusive"
    if gap.excludes_zero():
        status = "holds" if gap.estimate < 0 else "violated"
    return Verdict(*means, gap.stderr, 0.0, status, f"difference in [{gap.low:.3g}, {gap.high:.3g}]")


def _equality(claim: Claim, evidence: Sequence[Evidence]) -> Verdict:
    measured = np.array([float(piece.measured) for piece in evidence])
    predicted = float(np.mean([float(piece.predicted) for piece in evidence]))
    stderr = evidence[0].stderr if len(measured) == 1 else mean_interval(measured).stderr
    tolerance = float(claim.tolerance or 0.0)
    difference = abs(float(measured.mean()) - predicted)
    if STDERRS * stderr > tolerance:
        status: Status = "inconclusive"
    else:
        status = "holds" if difference <= tolerance + STDERRS * stderr else "violated"
    return Verdict(predicted, float(measured.mean()), stderr, tolerance, status)


RULES: Mapping[str, Callable[[Claim, Sequence[Evidence]], Verdict]] = {
    "identity": _identity,
    "bound": _bound,
    "rate": _rate,
    "limit": _limit,
    "association": _association,
    "ordering": _ordering,
    "equality": _equality,
}


def _precision(evidence: Sequence[Evidence]) -> str:
    stated = evidence[0].setting.get("precision")
    dtype = np.asarray(evidence[0].measured).dtype
    return str(stated or f"{dtype}, matmul highest")
