"""Claims on flows over time: what moves decides whether the chosen response falls, how far, and whether for good."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize

from jaxft.core.rng import host_stream
from theory.claims import Evidence
from theory.likelihood_displacement.flows import (
    CLOCK,
    LOSSES_IN_TIME,
    Flow,
    Pair,
    Trained,
    closed_form,
    constructed_pair,
    integrated,
    margin,
    measured_rate,
    rate_by_clock,
)
from theory.likelihood_displacement.ufm import make_claim

GAPS = (6.0, 4.0, 2.0, 1.0, -1.0)
"""<Wz - W+, W+ - W-> is three times as much."""
MODES: tuple[Trained, ...] = ("both", "hidden", "unembedding")
MARGINS = (5.0, 10.0, 26.0, 63.0, 90.0)
TOLERANCES = 10.0 ** -np.arange(4, 12)
RANDOM_PAIRS, RANDOM_GAIN = 6, 30.0
RARE = 10.0 ** -np.arange(1, 7)
"""1 - pi(y+) at the start."""
SLACK_NATS, VISIBLE_NATS = 1e-9, 1e-3
"""What the solver may err by, and what counts as a fall."""


def turned_pair(seed: int) -> Pair:
    """The constructed pair in a random position: all inner products are the same."""
    pair = constructed_pair(GAPS[0])
    turn, _ = np.linalg.qr(host_stream(seed, "turn").normal(size=(len(pair.hidden),) * 2))
    return Pair(pair.table @ turn, pair.hidden @ turn)


def at_clock(pair: Pair, clock: float, trained: Trained = "both") -> Pair:
    """The closed form at one time."""
    return closed_form(pair, np.array([clock]), trained=trained)[0]


def clock_at(pair: Pair, level: float, trained: Trained = "both") -> float:
    """When the closed form has this margin."""
    latest = 5.0 if trained == "both" else 100.0
    return root(lambda t: margin(at_clock(pair, t, trained)) - level, 0.0, latest)


def root(function: Callable[[float], float], low: float, high: float, *, tolerance: float = 1e-14) -> float:
    """Where a function of one number is 0."""
    found: Any = scipy.optimize.brentq(function, low, high, xtol=tolerance)
    return float(found)


def at_margins(pair: Pair, trained: Trained) -> np.ndarray:
    """Log-probabilities of the closed form at every margin that flows are read off at."""
    return log_probs([at_clock(pair, clock_at(pair, level, trained), trained) for level in MARGINS])


def log_probs(pairs: list[Pair]) -> np.ndarray:
    """Of all tokens, pair by pair."""
    return np.stack([pair.log_probs() for pair in pairs])


def solver(seed: int, *, fixed: bool = False) -> Evidence:
    """Error of the solver's log-probabilities as its tolerance falls; the control is the closed form with W fixed."""
    pair = turned_pair(seed)
    exact = at_margins(pair, "hidden" if fixed else "both")
    found = [log_probs(integrated(pair, CLOCK, MARGINS, tolerance=t).pairs) for t in TOLERANCES]
    halved = log_probs(integrated(pair, CLOCK, MARGINS, tolerance=TOLERANCES[-1] / 2).pairs)
    setting = {"margins": MARGINS, "change by halving the last tolerance": float(np.abs(halved - found[-1]).max())}
    return Evidence([float(np.abs(x - exact).max()) for x in found], x=1 / TOLERANCES, setting=setting)


def one_path(seed: int, *, fixed: bool = False) -> Evidence:
    """Log-probabilities at given margins under several losses, in their own time, against the closed form.

    The control is the closed form with W fixed.
    """
    pair, found, exact, calls = turned_pair(seed), [], [], {}
    for mode in MODES:
        closed = at_margins(pair, "hidden" if fixed else mode)
        for loss in LOSSES_IN_TIME:
            flow = integrated(pair, loss, MARGINS, trained=mode)
            calls[f"{loss.name}, {mode}"] = flow.calls
            found.append(log_probs(flow.pairs))
            exact.append(closed)
    return Evidence(np.stack(found), np.stack(exact), setting={"margins": MARGINS, "gradients": calls})


@functools.cache
def phase_flow(gap: float, trained: Trained) -> Flow:
    """The flow of DPO's loss from the constructed pair."""
    return integrated(constructed_pair(gap), LOSSES_IN_TIME[1], MARGINS, trained=trained)


def rising(flows: list[Flow]) -> tuple[str, ...]:
    """The precondition that a flow does not meet whose loss rises at a step."""
    return () if all((np.diff(flow.losses) <= 0).all() for flow in flows) else ("the loss falls at every step",)


def phases(_: int, *, as_hidden: bool = False) -> Evidence:
    """Whether ln pi(y+) falls below its start on the way, and whether it is there at the end, by gap and what moves.

    Predicted: with W alone never; with h alone for good, if and only if <Wz - W+, W+ - W-> > 0; with both on the way
    only, beyond the gap of ``least_gap``. The control predicts of both what holds of h alone.
    """
    found, predicted, changes, flows = [], [], {}, []
    for gap in GAPS:
        for_good = gap > 0
        expected = {"unembedding": (False, False), "hidden": (for_good, for_good), "both": (gap > LEAST_GAP, False)}
        for mode in MODES:
            flow = phase_flow(gap, mode)
            chosen = flow.log_probs[:, 0] - flow.log_probs[0, 0]
            changes[f"gap {gap:g}, {mode}"] = [float(chosen.min()), float(chosen[-1])]
            found.append([chosen.min() < -VISIBLE_NATS, chosen[-1] < -VISIBLE_NATS])
            predicted.append(expected["hidden" if as_hidden and mode == "both" else mode])
            flows.append(flow)
    setting = {"loss": "sigmoid", "lowest and last change, nats": changes, "last margin": MARGINS[-1]}
    return Evidence(np.array(found, float), np.array(predicted, float), setting=setting, unmet=rising(flows))


def turning(seed: int, *, hidden_only: bool = False) -> Evidence:
    """Margin and log-probability where ln pi(y+) turns back, by theorem 4 along the closed form and by the solver.

    The control leaves out of theorem 4 what goes through W.
    """
    pair = turned_pair(seed)
    bracket = [clock_at(pair, level) for level in (MARGINS[1], MARGINS[-1])]
    clock = root(lambda t: rate_by_clock(at_clock(pair, t), hidden_only=hidden_only), bracket[0], bracket[1])
    low = at_clock(pair, clock)
    flow = integrated(pair, CLOCK, MARGINS)
    found = flow.turns[0]
    named = {"at the start": pair, "at the lowest": found, f"at margin {MARGINS[-1]:g}": flow.pairs[-1]}
    setting = {f"pi(y+) {name}": float(np.exp(p.log_probs()[0])) for name, p in named.items()}
    measured, predicted = (np.array([margin(p), p.log_probs()[0]]) for p in (found, low))
    return Evidence(measured, predicted, setting=setting)


def least_gap(_: int, *, at_all: bool = False) -> Evidence:
    """The gap beyond which joint training brings ln pi(y+) below its start, by closed form and by the solver.

    The control takes the gap beyond which ln pi(y+) falls at all on its way.
    """
    start = constructed_pair(0.0).log_probs()[0]

    def lowest(value: Callable[[Pair], float], levels: tuple[float, float], gap: float) -> float:
        pair = constructed_pair(gap)
        found = scipy.optimize.minimize_scalar(
            lambda t: value(at_clock(pair, t)),
            bounds=[clock_at(pair, level) for level in levels],
            method="bounded",
            options={"xatol": 1e-10},
        )
        return float(found.fun)

    def below(gap: float) -> float:
        return lowest(lambda pair: pair.log_probs()[0], (6.0, 16.0), gap) - start

    def falls(gap: float) -> float:
        return lowest(rate_by_clock, (3.0, 6.0), gap)

    def measured(gap: float) -> float:
        return float(integrated(constructed_pair(gap), CLOCK, [20.0]).turns[0].log_probs()[0] - start)

    predicted = root(falls, 1.5, 3.0) if at_all else root(below, 2.6, 4.0)
    found = root(measured, 2.6, 4.0, tolerance=1e-10)
    return Evidence(np.array([found]), np.array([predicted]))


LEAST_GAP = 3.105
"""What ``least_gap`` finds, to its third digit."""


def necessary_condition(_: int, *, exchanged: bool = False) -> Evidence:
    r"""Least $\langle W_z - W_+, W_+ - W_- \rangle$ at which ln pi(y+) falls, as pi(y+) tends to 1 with the rest on z.

    The distance from |h|^2 = 1 (both trained) and from 0 (h alone), whichever is larger. The control exchanges them.
    """
    modes: tuple[tuple[Trained, float], ...] = (("both", 1.0), ("hidden", 0.0))
    errors, boundaries = [], {mode: [] for mode, _ in modes}
    for rare in RARE:
        for mode, expected in modes:
            gap = root(lambda g, rare=rare, mode=mode: measured_rate(peaked_pair(g, rare), mode), -50.0, 500.0)
            pair = peaked_pair(gap, rare)
            boundaries[mode].append(float((pair.table[2] - pair.table[0]) @ pair.difference))
            errors.append(abs(boundaries[mode][-1] - (1 - expected if exchanged else expected)))
    worst = np.array(errors).reshape(len(RARE), 2).max(axis=1)
    return Evidence(worst, x=1 / RARE, setting={"boundaries": boundaries, "1 - pi(y+)": RARE.tolist()})


def peaked_pair(gap: float, rare: float) -> Pair:
    """Logits 0 of y+, ln of ``rare`` of z and three times that of y-; W+ - W- has a part that h does not see."""
    e1, e2 = np.eye(2, 16)
    z = np.log(rare)
    return Pair(np.stack([0 * e2, 3 * z * e2 - 3 * e1, gap * e1 + z * e2]), e2)


def fixed_states(seed: int, *, trained: Trained = "unembedding") -> Evidence:
    """Largest fall of ln pi(y+) from an earlier value while W alone is trained; the control trains h as well.

    On the constructed pair at every gap and on random ones, under DPO's loss.
    """
    draw = host_stream(seed, "pairs")
    drawn = [Pair(draw.normal(size=(3, 16)), draw.normal(size=16) / 4) for _ in range(RANDOM_PAIRS)]
    flows = [phase_flow(gap, trained) for gap in GAPS]
    flows += [integrated(pair, LOSSES_IN_TIME[1], [margin(pair) + RANDOM_GAIN], trained=trained) for pair in drawn]
    chosen = [flow.log_probs[:, 0] for flow in flows]
    fall = max(float((np.maximum.accumulate(x) - x).max()) for x in chosen)
    setting = {"gaps": GAPS, "random pairs": RANDOM_PAIRS, "least gain, nats": min(float(x[-1] - x[0]) for x in chosen)}
    return Evidence(fall, SLACK_NATS, setting=setting, unmet=rising(flows))


CLAIMS = (
    make_claim(
        "ode-solver",
        "As its tolerance falls, the solver's flow tends to the closed form: h and W+ - W- turn into each other.",
        "cf. theorem 4",
        "limit",
        solver,
        {"fixed": True},
        "the closed form has W fixed",
        tolerance=1e-8,
    ),
    make_claim(
        "one-path",
        "All margin losses move one example along one path: log-probabilities depend on the margin reached alone.",
        "cf. section 4.1",
        "identity",
        one_path,
        {"fixed": True},
        "the closed form has W fixed",
        tolerance=1e-8,
    ),
    make_claim(
        "fixed-states",
        "With hidden states fixed, ln pi(y+) of one token never falls.",
        "theorem 4, the term with |h|^2",
        "bound",
        fixed_states,
        {"trained": "both"},
        "hidden states are trained as well",
    ),
    make_claim(
        "phases",
        "The chosen response falls for good if h alone is trained and z lies along W+ - W-, on the way only if both "
        "are and z lies far along it, never if W alone is.",
        "cf. theorem 4",
        "identity",
        phases,
        {"as_hidden": True},
        "joint training is taken for that of h alone",
        tolerance=0.0,
    ),
    make_claim(
        "turning-point",
        "In joint training ln pi(y+) turns back where theorem 4 has no rate, however low it is by then.",
        "cf. theorem 4",
        "identity",
        turning,
        {"hidden_only": True},
        "what goes through W is left out",
        tolerance=1e-7,
    ),
    make_claim(
        "least-gap",
        "Joint training brings ln pi(y+) below its start beyond a gap of z that the closed form gives.",
        "cf. theorem 4",
        "identity",
        least_gap,
        {"at_all": True},
        "it need not come below its start",
        tolerance=1e-7,
    ),
    make_claim(
        "necessary-condition",
        "As pi(y+) tends to 1 with the rest on z, it falls if <Wz - W+, W+ - W-> exceeds |h|^2, or 0 if W is fixed.",
        "cf. theorem 4",
        "limit",
        necessary_condition,
        {"exchanged": True},
        "|h|^2 where W is fixed, and 0 where it is not",
        tolerance=1e-6,
    ),
)
