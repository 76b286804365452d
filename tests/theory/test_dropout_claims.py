"""The claims of mode_connectivity on dropout and on noise: each holds, its control is violated, faults show."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.geometry import unit_sequences
from jaxft.geometry.dropout_line import dropout_output_variance
from jaxft.geometry.dropout_stability import dropout_stability
from jaxft.geometry.noise_stability import noise_stability
from jaxft.geometry.path_certificate import path_certificate
from theory.claims import check_claim
from theory.mode_connectivity import dropout, noise

dropout_paths = importlib.import_module("jaxft.geometry.dropout_path")  # the package has a function of that name

BY_NAME = {claim.id.removeprefix("mode_connectivity/"): claim for claim in (*dropout.CLAIMS, *noise.CLAIMS)}
TRAINS_MANY = ("epsilon-by-width", "deviation-by-width")


@pytest.fixture
def claim_modules():
    return (dropout, noise)


def test_bound_of_noise_stability_is_said_to_be_vacuous():
    finding = check_claim(BY_NAME["noise-epsilon"])
    setting = finding.setting
    assert finding.status == "inconclusive"
    assert "the bound is vacuous" in setting["note"]
    assert setting["vacuous"] is True
    assert setting["preconditions"]["smoothness >= 3 d"] is False


def _lower(*args, **options):
    found = path_certificate(*args, **options)
    return found._replace(maximum=0.99 * found.maximum, bound=jnp.minimum(found.loss_a, found.loss_b))


def _upside_down(*args, **options):
    found = dropout_stability(*args, **options)
    return found._replace(epsilon_median=1 / found.epsilon_median)


def _small(*args, **options):
    found = noise_stability(*args, **options)
    return found._replace(epsilon=1e-4 * found.epsilon, contraction=0.5 * found.contraction)


def _unscaled(chain, kept, **options):
    """Copies that are not rescaled by the units kept of the layer below."""
    moves, live = unit_sequences.moves_to_dropout(chain, kept, **options)
    plain = [
        unit_sequences.Move(m.kind, m.rows, {g: c._replace(scale=1.0) for g, c in m.columns.items()}, m.from_start)
        for m in moves
    ]
    return plain, live


FAULTS = {
    "units not relocated": ((dropout_paths,), "relocating_moves", lambda *_: [], ("flat-moves", "segments")),
    "copies into live rows": (
        (unit_sequences,),
        "_spare",
        lambda count, kept, prefer: np.roll(kept, 1),
        ("flat-moves", "certificate"),
    ),
    "copies not rescaled": ((dropout_paths,), "moves_to_dropout", _unscaled, ("certificate",)),
    "certificate too low": ((dropout,), "path_certificate", _lower, ("certificate", "theorem-1")),
    "epsilon upside down": ((dropout,), "dropout_stability", _upside_down, ("epsilon-by-training",)),
    "variance without its odds": (
        (dropout,),
        "dropout_output_variance",
        lambda hidden, kernel, dropout_frac: dropout_output_variance(hidden, kernel, dropout_frac=0.5),
        ("dropout-variance",),
    ),
    "noise epsilon too small": ((noise,), "noise_stability", _small, ("noise-epsilon", "noise-cushions")),
}


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        pytest.param(fault, name, marks=[pytest.mark.slow] if i else [])
        for fault, (*_, names) in FAULTS.items()
        for i, name in enumerate(names)
    ],
)
def test_claim_is_violated_by_a_fault_of_the_code(patched, fault, name):
    modules, function, replacement, _ = FAULTS[fault]
    patched(function, replacement, modules)
    assert check_claim(BY_NAME[name]).status == "violated"


def test_random_dropout_of_nothing_changes_nothing(x64):
    params = jax.tree.map(jnp.asarray, dropout.initial(0, "a"))
    found = dropout.deviation(params, dropout.data(0).x, jax.random.key(0), jnp.asarray(0.0), jnp.int32(1))
    np.testing.assert_allclose(found.norm, 0, atol=1e-12)
