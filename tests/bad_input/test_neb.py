"""What a user of bands and of trees of minima is told."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.geometry.auto_neb import auto_neb
from jaxft.geometry.minimax_tree import minimax_tree
from jaxft.geometry.neb import fit_neb
from jaxft.geometry.paths import init_curve, polychain

A, B, C = ({"w": jnp.full(2, x)} for x in (0.0, 1.0, 2.0))
BATCHES, TX = jnp.zeros((1, 3)), optax.sgd(0.1)
INF = np.inf


def loss(params, batch):
    return (params["w"] ** 2).sum()


def fit(a=A, b=B, batches=BATCHES, loss_fn=loss, **options):
    return fit_neb(loss_fn, a, b, batches, **{"tx": TX, "steps": 2, **options})


FIT = {
    "no steps": (lambda: fit(steps=0), "steps must be positive, got 0"),
    "no pivots": (lambda: fit(pivots=0), "a band needs pivots, got 0"),
    "loose spring": (lambda: fit(spring=0.0), "Leave it out for the string method"),
    "climbs too late": (lambda: fit(climb_after=3), "got 3. Pass 0 to 2, or None"),
    "same ends": (lambda: fit(b=A), "the ends must differ"),
    "no batches": (lambda: fit(batches=BATCHES[:0]), "there must be an example"),
    "rows for a loss": (lambda: fit(loss_fn=lambda p, x: p["w"]), r"dict of scalars, got loss \(2,\)"),
    "a loss of another name": (lambda: fit(loss_fn=lambda p, x: {"nll": loss(p, x)}), "a dict with loss, got nll"),
    "steps too long": (
        lambda: fit(loss_fn=lambda p, x: (p["w"] ** 4).sum(), tx=optax.sgd(1e4), steps=9, spring=1.0),
        "at step 4. Lower the learning rate",
    ),
    "start elsewhere": (lambda: fit(start=polychain([A, B, C])), "start must go from a to b"),
    "start of another model": (
        lambda: fit(start=polychain([{"v": jnp.zeros(2)}, {"v": jnp.ones(2)}, {"v": jnp.ones(2)}])),
        "w: only in a; v: only in start",
    ),
    "curved start": (lambda: fit(start=init_curve(A, B)), "got bezier with 1 interior points"),
}


@pytest.mark.parametrize("case", FIT)
def test_band_says_what_is_wrong(case):
    call, said = FIT[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("fit_neb: ")


@pytest.mark.parametrize("case", ["another shape", "not finite"])
def test_ends_that_are_no_points_of_one_model_are_named(case):
    end, said = {"another shape": (jnp.ones(3), "w: float32"), "not finite": (jnp.ones(2) * jnp.nan, "in w")}[case]
    with pytest.raises(ValueError, match=said):
        fit(b={"w": end})


AUTO = {
    "no cycles": ({"schedule": []}, "schedule must have a cycle"),
    "negative insertions": ({"insertions": -1}, "insertions must not be negative"),
    "negative threshold": ({"threshold": -0.1}, "threshold must not be negative"),
    "no samples": ({"samples": 0}, "samples must be positive"),
}


@pytest.mark.parametrize("case", AUTO)
def test_cycles_say_what_is_wrong(case):
    options, said = AUTO[case]
    with pytest.raises(ValueError, match=f"auto_neb: {said}"):
        auto_neb(loss, A, B, BATCHES, **{"schedule": [(TX, 2)], **options})


TREES = {
    "a row": (np.zeros((1, 2)), "square matrix"),
    "nothing": (np.zeros((0, 0)), "square matrix"),
    "one half": (np.array([[0.0, 1.0], [INF, 0.0]]), "Fill both halves"),
    "nan": (np.array([[0.0, np.nan], [np.nan, 0.0]]), "Use inf where no path is known"),
    "no floor": (np.array([[0.0, -INF], [-INF, 0.0]]), "above -inf"),
    "saddle below a minimum": (np.array([[3.0, 1.0], [1.0, 0.0]]), r"got pair \(0, 1\)"),
}


@pytest.mark.parametrize("case", TREES)
def test_tree_says_what_is_wrong(case):
    saddles, said = TREES[case]
    with pytest.raises(ValueError, match=said) as error:
        minimax_tree(saddles)
    assert str(error.value).startswith("minimax_tree: ")
