"""Claims on the order of hidden units: what it does not change, what it does to lines, and how it is found."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import relu

from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec
from jaxft.geometry.barriers import loss_barrier
from jaxft.geometry.matching import weight_matching
from jaxft.geometry.path_loss import eval_path
from jaxft.geometry.paths import linear_path
from jaxft.geometry.permutations import apply_permutation, random_permutation
from jaxft.geometry.repair import repair
from jaxft.geometry.unit_statistics import unit_moments
from theory.claims import Evidence
from theory.mode_connectivity.networks import (
    SETTING,
    batches,
    data,
    f,
    flat,
    hidden_preactivations,
    loss,
    make_claim,
    mlp_units,
    trained,
)

REBASIN = "Ainsworth et al. 2022, arXiv 2209.04836"
HIDDEN, WIDTH, POINTS, RESTARTS = 2, 16, 11, 4
SPEC = mlp_units(HIDDEN)
NETWORK = {**SETTING, "network": f"{HIDDEN} hidden layers of {WIDTH}, ReLU", "restarts": RESTARTS}
CELLS = (200, 202)
"""Midpoints of cells on the two axes of the square: no point lies on an axis or a diagonal."""
LEAK = 0.01


def _pair(seed: int) -> tuple[Params, Params]:
    a, b = trained(seed, hidden=HIDDEN, width=WIDTH)
    return a, b


def _drawn(seed: int, params: Params) -> dict[str, jax.Array]:
    return random_permutation(params, SPEC, key=stream(jax.random.key(seed), "permutation"))


def _matched(seed: int, a: Params, b: Params) -> Params:
    return weight_matching(a, b, SPEC, key=stream(jax.random.key(seed), "matching"), restarts=RESTARTS).params


def _barrier(seed: int, a: Params, b: Params) -> float:
    """Of the loss over its chord on the straight line."""
    found = eval_path(loss, linear_path(a, b), batches(seed), points=POINTS)
    return float(loss_barrier(found.values["loss"], t=found.t))


def outputs_of_permuted(seed: int, *, forgotten: bool = False) -> Evidence:
    """Outputs of a trained network against those with its units permuted; the control leaves the biases in place."""
    a, _ = _pair(seed)
    leaves = tuple(entry for entry in SPEC.leaves if not (forgotten and entry[0].endswith("bias")))
    moved = apply_permutation(a, PermutationSpec(leaves), _drawn(seed, a))
    x = data(seed).x
    return Evidence(np.asarray(f(moved, x)), np.asarray(f(a, x)), setting=NETWORK)


def recovered_copy(seed: int, *, unmatched: bool = False) -> Evidence:
    """A network against what weight matching makes of a permuted copy; the control permutes the copy at random."""
    a, _ = _pair(seed)
    copy = apply_permutation(a, SPEC, _drawn(seed, a))
    found = apply_permutation(copy, SPEC, _drawn(seed + 1, a)) if unmatched else _matched(seed, a, copy)
    return Evidence(flat(found), flat(a), setting=NETWORK)


def barrier_of_copy(seed: int, *, unmatched: bool = False) -> Evidence:
    """Barrier between a network and a permuted copy of it, matched; the control does not match."""
    a, _ = _pair(seed)
    copy = apply_permutation(a, SPEC, _drawn(seed, a))
    barrier = _barrier(seed, a, copy if unmatched else _matched(seed, a, copy))
    return Evidence(barrier, 1e-12, setting={**NETWORK, "points": POINTS})


def matched_barrier(seed: int, *, shuffled: bool = False) -> Evidence:
    """Barrier between two networks before and after matching.

    The control starts with the matched pair, and puts a random assignment in the place of the matching.
    """
    a, b = _pair(seed)
    after = _matched(seed, a, b)
    before, after = (after, apply_permutation(after, SPEC, _drawn(seed, a))) if shuffled else (b, after)
    setting = {**NETWORK, "points": POINTS}
    return Evidence(_barrier(seed, a, after), _barrier(seed, a, before), setting=setting)


def repaired_statistics(seed: int, *, unrepaired: bool = False) -> Evidence:
    """Means and deviations of the units of a midpoint after REPAIR, against the means of those of the ends."""
    a, b = _pair(seed)
    x = data(seed).x
    middle = jax.tree.map(lambda p, q: (p + q) / 2, a, b)
    if not unrepaired:
        middle = repair(hidden_preactivations, middle, a, b, SPEC, x)

    def statistics(params: Params) -> np.ndarray:
        moments = unit_moments(hidden_preactivations, params, x)
        return flat([(mean, jnp.sqrt(variance)) for mean, variance in moments.values()])

    return Evidence(statistics(middle), (statistics(a) + statistics(b)) / 2, setting=NETWORK)


def rebasin_counterexample() -> tuple[Params, Params]:
    """Two networks of two hidden layers of two units, both right on all of the square but its axes."""
    top = {"kernel": jnp.array([[-1.0], [-1.0]])}
    a = {
        "Dense_0": {"kernel": jnp.array([[-1.0, 0.0], [0.0, -1.0]]), "bias": jnp.array([1.0, 0.0])},
        "Dense_1": {"kernel": jnp.array([[-1.0, 0.0], [0.0, 1.0]]), "bias": jnp.array([1.0, 0.0])},
        "Dense_2": top,
    }
    b = {
        "Dense_0": {"kernel": jnp.eye(2), "bias": jnp.array([0.0, 1.0])},
        "Dense_1": {"kernel": jnp.array([[1.0, 0.0], [0.0, -1.0]]), "bias": jnp.array([0.0, 1.0])},
        "Dense_2": top,
    }
    return a, b


def counterexample_accuracies(seed: int, *, leak: float = 0.0) -> Evidence:
    """Accuracies of the two ends, and the least on the line for each of the four permutations of the second network.

    The label is 1 where the first coordinate is negative and the second positive; a network says 1 where its output is
    not negative. The control has a leaky activation.
    """
    del seed  # nothing is random
    a, b = rebasin_counterexample()
    ends = _accuracies(a, b, jnp.asarray(leak))[jnp.array([0, -1])]
    orders = [dict(zip(SPEC.groups, order, strict=True)) for order in itertools.product(_ORDERS, repeat=HIDDEN)]
    least = [_accuracies(a, apply_permutation(b, SPEC, order), jnp.asarray(leak)).min() for order in orders]
    setting = {"inputs": "midpoints of {} x {} cells".format(*CELLS), "points": 21}
    return Evidence(flat(ends, least), np.array([1.0, 1.0, *[0.75] * len(orders)]), setting=setting)


_ORDERS = (np.array([0, 1]), np.array([1, 0]))


@jax.jit
def _accuracies(a: Params, b: Params, leak: jax.Array) -> jax.Array:
    """Accuracy at 21 points of the line."""
    first, second = ((2 * jnp.arange(n) + 1) / n - 1 for n in CELLS)
    x = jnp.stack(jnp.meshgrid(first, second), axis=-1).reshape(-1, 2)
    labels = (x[:, 0] < 0) & (x[:, 1] > 0)

    def at(t: jax.Array) -> jax.Array:
        params, z = linear_path(a, b)(t), x
        for i in range(HIDDEN):
            z = z @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None]
            z = relu(z) - leak * relu(-z)
        return jnp.mean((z @ params[f"Dense_{HIDDEN}"]["kernel"] >= 0)[:, 0] == labels)

    return jax.lax.map(at, jnp.linspace(0, 1, 21))


CLAIMS = (
    make_claim(
        "permuted-outputs",
        "Permuting the hidden units of a layer with all that belongs to them leaves outputs as they are.",
        f"{REBASIN}, section 2",
        "identity",
        outputs_of_permuted,
        {"forgotten": True},
        "biases stay in place",
        seeds=3,
    ),
    make_claim(
        "recovered-permutation",
        "Weight matching of a network with a permuted copy of itself finds the permutation.",
        f"{REBASIN}, section 3.2",
        "identity",
        recovered_copy,
        {"unmatched": True},
        "a random assignment in place of the matching",
        tolerance=0.0,
        seeds=3,
    ),
    make_claim(
        "permuted-copy-barrier",
        "Matching removes the barrier on the straight line between a network and a permuted copy of itself.",
        f"{REBASIN}, section 3.2",
        "bound",
        barrier_of_copy,
        {"unmatched": True},
        "no matching",
        seeds=3,
    ),
    make_claim(
        "matched-barrier",
        "Matching lowers the barrier on the straight line between two networks trained from different starts.",
        f"{REBASIN}, section 5",
        "ordering",
        matched_barrier,
        {"shuffled": True},
        "a random assignment in place of the matching",
        seeds=3,
        max_seeds=8,
    ),
    make_claim(
        "re-basin-counterexample",
        "Two networks without error exist such that on the line from the one to any permutation of the other the "
        "accuracy falls to that of saying 0 everywhere, 3/4.",
        f"{REBASIN}, appendix A.6",
        "identity",
        counterexample_accuracies,
        {"leak": LEAK},
        "a leaky activation: the ends err",
    ),
    make_claim(
        "repair-statistics",
        "After REPAIR the units of a midpoint have the means of the means and deviations at the ends.",
        "Jordan et al. 2022, arXiv 2211.08403, section 3",
        "identity",
        repaired_statistics,
        {"unrepaired": True},
        "no REPAIR",
        seeds=2,
    ),
)
