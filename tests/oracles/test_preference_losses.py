"""Losses of pairs against TRL's trainers: by a committed file everywhere, live where trl is installed."""

import importlib.util
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.tuning.losses import LOSSES
from jaxft.tuning.objectives import loss_slopes, preference_loss

HERE = Path(__file__).parent
BETAS = (0.05, 0.3, 2.0)
OURS = {
    **{f"dpo/{name}": (name, {}) for name in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard")},
    **{f"dpo/{name}": (name, {}) for name in ("apo_zero", "apo_down", "sigmoid_norm")},
    "dpo/ipo": ("ipo_mean", {}),
    "dpo/exo_pair": ("exo_pair", {"label_smoothing": 0.05}),
    "dpo/robust": ("robust", {"label_smoothing": 0.1}),
    "dpo/discopop": ("discopop", {"tau": 0.2}),
    "dpo/sft": ("sft", {"per_token": True}),
    "cpo/sigmoid": ("cpo", {"alpha": 0.0, "label_smoothing": 0.2}),
    "cpo/simpo": ("simpo", {"gamma": 0.7, "label_smoothing": 0.1}),
    "kto/kto": ("kto", {"kl": 0.6, "desirable_weight": 1.3, "undesirable_weight": 0.8}),
    "orpo/orpo": ("orpo", {"alpha": 0.0}),
}
"""Trainer and loss in TRL -> the loss here."""
SINGLE = {"dpo/exo_pair": 1e-6, "orpo/orpo": 1e-5}
"""Where TRL computes in float32 whatever it is given."""
NOT_IN_TRL = {"ipo", "slic", "rebel", "gpo", "rpo", "dpop"}


@pytest.fixture(scope="module")
def oracle():
    with np.load(HERE / "preference_losses.npz") as file:
        return dict(file)


@pytest.mark.parametrize("theirs", OURS)
def test_losses_and_slopes_equal_the_committed_ones(x64, oracle, theirs):
    name, options = OURS[theirs]
    x, reference, lengths = (jnp.asarray(oracle[k]) for k in ("x", "reference", "lengths"))
    rtol = SINGLE.get(theirs, 1e-10)
    for beta in BETAS:
        loss = preference_loss(name, x, reference, lengths, beta=beta, **options)
        np.testing.assert_allclose(loss, oracle[f"{theirs}/{beta}/loss"], rtol=rtol, atol=rtol)
        slopes = loss_slopes(name, x, reference, lengths, beta=beta, **options)
        np.testing.assert_allclose(slopes, oracle[f"{theirs}/{beta}/slopes"], rtol=rtol, atol=rtol)


def test_every_loss_is_compared_or_is_not_in_trl():
    assert {name for name, _ in OURS.values()} == set(LOSSES) - NOT_IN_TRL


@pytest.mark.oracle
@pytest.mark.slow
def test_committed_file_is_what_trl_gives_today(oracle):
    if not (importlib.util.find_spec("trl") and importlib.util.find_spec("torch")):
        pytest.skip("trl and torch are not installed")
    today = runpy.run_path(str(HERE / "make_preference_losses.py"))["make"]()
    assert set(today) == set(oracle)
    for name in set(today) - {"made_with"}:
        np.testing.assert_allclose(today[name], oracle[name], rtol=1e-6, atol=1e-9)
