"""Faults of permutations, matching and REPAIR are seen by the claims on them."""

import jax
import pytest

from jaxft.core.units import PermutationSpec
from jaxft.geometry.matching import weight_matching
from jaxft.geometry.permutations import apply_permutation
from jaxft.geometry.repair import repair
from theory.claims import check_claim
from theory.mode_connectivity import permutations

BY_NAME = {claim.id.removeprefix("mode_connectivity/"): claim for claim in permutations.CLAIMS}


def _producers_alone(params, spec, permutation):
    leaves = tuple((path, tuple(axis for axis in axes if not axis.reads)) for path, axes in spec.leaves)
    return apply_permutation(params, PermutationSpec(leaves), permutation)


def _furthest(a, b, spec, **options):
    """The permutation that takes b as far from a as it can."""
    return weight_matching(jax.tree.map(lambda x: -x, a), b, spec, **options)


def _one_group(a, b, spec, **options):
    return weight_matching(a, b, spec, groups=spec.groups[:1], **options)


def _first_group_alone(units_fn, merged, a, b, spec, x):
    leaves = tuple(entry for entry in spec.leaves if any(axis.units == spec.groups[0] for axis in entry[1]))
    kept = tuple((path, tuple(axis for axis in axes if axis.units == spec.groups[0])) for path, axes in leaves)
    return repair(units_fn, merged, a, b, PermutationSpec(kept), x)


def _towards_one_end(*args):
    return repair(*args, alpha=0.9)


FAULTS = {
    "readers that stay in place": ("apply_permutation", _producers_alone, "permuted-outputs"),
    "matching of the furthest": ("weight_matching", _furthest, "recovered-permutation"),
    "matching of one group": ("weight_matching", _one_group, "permuted-copy-barrier"),
    "matching that raises barriers": ("weight_matching", _furthest, "matched-barrier"),
    "repair of one layer": ("repair", _first_group_alone, "repair-statistics"),
    "repair towards one end": ("repair", _towards_one_end, "repair-statistics"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_claim_does_not_hold_with_a_fault_of_the_code(monkeypatch, fault):
    name, replacement, claim = FAULTS[fault]
    monkeypatch.setattr(permutations, name, replacement)
    assert check_claim(BY_NAME[claim]).status != "holds"
