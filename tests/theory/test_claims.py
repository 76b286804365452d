"""Every rule of every kind: a case that holds, one that is violated, one that is inconclusive."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from theory.claims import RULES, Claim, Evidence, check_claim, judge

NAN = float("nan")
X6 = np.logspace(-3, -1, 6)


def claim(kind, **options) -> Claim:
    never = lambda seed: Evidence(0.0)  # noqa: E731
    options.setdefault("seeds", 3 if kind == "ordering" else 1)
    return Claim("x/y", "s", "p", kind, never, never, "nothing", **options)


def noisy_rate(noise):
    return X6 * np.exp(noise * np.array([1, -1, 1, -1, 1, -1]))


CASES = {
    ("identity", "holds"): ({}, [Evidence(np.ones(3) + 1e-12, np.ones(3))]),
    ("identity", "violated"): ({}, [Evidence(np.ones(3), np.ones(3)), Evidence(np.ones(3) + 1e-9, np.ones(3))]),
    ("identity", "inconclusive"): ({}, [Evidence(np.array([NAN]), np.ones(1))]),
    ("bound", "holds"): ({}, [Evidence(1.1, 1.0, stderr=0.05)]),
    ("bound", "violated"): ({}, [Evidence(1.2, 1.0, stderr=0.05)]),
    ("bound", "inconclusive"): ({"vacuous_above": 1.0}, [Evidence(0.5, 2.0)]),
    ("rate", "holds"): ({"slope": 1.0, "tolerance": 0.1}, [Evidence(2 * X6, x=X6)]),
    ("rate", "violated"): ({"slope": 2.0, "tolerance": 0.1}, [Evidence(2 * X6, x=X6)]),
    ("rate", "inconclusive"): ({"slope": 1.0, "tolerance": 0.05}, [Evidence(noisy_rate(1.0), x=X6)]),
    ("limit", "holds"): ({"tolerance": 0.01}, [Evidence([1.0, 0.1, 0.001], x=[1, 2, 3])]),
    ("limit", "violated"): ({"tolerance": 0.01}, [Evidence([1.0, 0.001, 0.005], x=[1, 2, 3])]),
    ("limit", "inconclusive"): (
        {"tolerance": 0.01, "seeds": 2},
        [Evidence([1.0, 0.001], x=[1, 2]), Evidence([1.0, 0.015], x=[1, 2])],
    ),
    ("association", "holds"): ({"sign": -1.0}, [Evidence(-np.arange(10.0), x=np.arange(10.0))]),
    ("association", "violated"): ({"sign": 1.0}, [Evidence(-np.arange(10.0), x=np.arange(10.0))]),
    ("association", "inconclusive"): ({}, [Evidence(np.array([1.0, 3, 2, 5, 0, 4]), x=np.arange(6.0))]),
    ("ordering", "holds"): ({}, [Evidence(1.0 + 0.1 * s, 2.0) for s in range(3)]),
    ("ordering", "violated"): ({}, [Evidence(2.0 + 0.1 * s, 1.0) for s in range(3)]),
    ("ordering", "inconclusive"): ({}, [Evidence(v, 1.0) for v in (0.0, 0.9, 2.0)]),
    ("equality", "holds"): ({"tolerance": 0.1}, [Evidence(1.05, 1.0, stderr=0.01)]),
    ("equality", "violated"): ({"tolerance": 0.1}, [Evidence(1.2, 1.0, stderr=0.01)]),
    ("equality", "inconclusive"): ({"tolerance": 0.1}, [Evidence(1.0, 1.0, stderr=0.05)]),
}


def test_every_kind_has_a_case_of_every_status():
    assert set(CASES) == {(kind, status) for kind in RULES for status in ("holds", "violated", "inconclusive")}


@pytest.mark.parametrize(("kind", "status"), CASES)
def test_rule_sets_the_status(kind, status):
    options, evidence = CASES[kind, status]
    assert judge(claim(kind, **options), evidence).status == status


def test_unmet_precondition_is_inconclusive_and_named():
    good = CASES["identity", "holds"][1][0]
    finding = judge(claim("identity"), [dataclasses.replace(good, unmet=("convex loss",))])
    assert finding.status == "inconclusive"
    assert "convex loss" in finding.setting["note"]


def test_identity_tolerance_follows_the_precision():
    pair = Evidence(np.array([1 + 1e-6], np.float32), np.array([1], np.float32))
    assert judge(claim("identity"), [pair]).status == "holds"
    assert judge(claim("identity"), [Evidence(np.array([1 + 1e-6]), np.array([1.0]))]).status == "violated"


def test_identity_with_a_wrong_value_among_zeros_is_violated():
    assert judge(claim("identity"), [Evidence(np.array([0.0, 1e-3]), np.zeros(2))]).status == "violated"


def test_rate_needs_five_points_over_a_decade_and_a_half():
    options = {"slope": 1.0, "tolerance": 0.1}
    for x in (np.logspace(-3, -1, 4), np.logspace(-2, -1, 6)):
        assert judge(claim("rate", **options), [Evidence(x, x=x)]).status == "inconclusive"


def test_bound_reports_slack_and_vacuity():
    assert "slack 0.5" in judge(claim("bound"), [Evidence(0.5, 1.0)]).setting["note"]
    vacuous = judge(claim("bound", vacuous_above=1.0), [Evidence(0.5, 2.0)])
    assert "vacuous" in vacuous.setting["note"]


def test_limit_ignores_rises_within_noise_but_not_beyond():
    steady = [Evidence([1.0, 0.10 + d, 0.11 + e], x=[1, 2, 3]) for d, e in ((0.0, 0.02), (0.02, 0.0), (0.04, 0.01))]
    assert judge(claim("limit", tolerance=0.2, seeds=3), steady).status == "holds"
    rising = [Evidence([1.0, 0.10, 0.19], x=[1, 2, 3])]
    assert judge(claim("limit", tolerance=0.2), rising).status == "violated"


def test_noisy_check_adds_seeds_until_its_rule_speaks():
    values = {0: 0.9, 1: 0.2, 2: 0.8, 3: 0.5, 4: 0.6}
    seen = []

    def check(seed):
        seen.append(seed)
        return Evidence(values[seed], 1.0)

    noisy = dataclasses.replace(claim("ordering"), check=check, max_seeds=5)
    finding = check_claim(noisy)
    assert finding.status == "holds"
    assert finding.setting["seeds"] == len(seen) > 3


def test_checks_run_in_float64():
    probe = dataclasses.replace(claim("identity"), check=lambda seed: Evidence(jnp.ones(1), jnp.ones(1)))
    assert check_claim(probe).precision.startswith("float64")


def test_control_is_run_by_the_same_rule():
    both = dataclasses.replace(
        claim("identity"),
        check=lambda s: Evidence(np.ones(1), np.ones(1)),
        control=lambda s: Evidence(np.zeros(1), 1.0 * np.ones(1)),
    )
    assert (check_claim(both).status, check_claim(both, control=True).status) == ("holds", "violated")
