"""Claims on propositions 1 and 2, which hold of any differentiable model: a likelihood term, and unequal weights."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_vdot
from jaxft.core.types import OutputFn
from theory.claims import Evidence
from theory.likelihood_displacement.decoders import MODELS, Model, plain
from theory.likelihood_displacement.rates import gain_of_sft, rate_weighted
from theory.likelihood_displacement.ufm import Loss, all_slopes, compiled, flow_rates, losses_of, make_claim, pair_of

SFT_WEIGHT = 0.3
REGULARISED = (Loss("sigmoid", {}), Loss("ipo", {}), Loss("rebel", {}))
WEIGHTED = losses_of("weighted")
ALL = (*REGULARISED, *(loss._replace(sft_weight=SFT_WEIGHT) for loss in REGULARISED), *WEIGHTED)


@functools.cache
def measured(name: str, seed: int) -> dict[str, np.ndarray]:
    """Of one example of a model: rates of ln pi(y+) under all losses, slopes, and the Gram matrix of gradients."""
    model = MODELS[name](seed)
    return {key: np.asarray(x) for key, x in _program(model.f)(model._replace(f=None)).items()}


@functools.cache
def _program(f: OutputFn) -> Callable[[Model], dict[str, jax.Array]]:
    return compiled(functools.partial(_measured, plain(f)))


def _measured(f: OutputFn, model: Model) -> dict[str, jax.Array]:
    params, batch, reference = model.params, model.batch, jnp.asarray(model.reference)
    log_probs = f(params, batch)
    gradients = jax.jacrev(lambda p: pair_of(f(p, batch))[0])(params)
    sides = [jax.tree.map(lambda leaf, i=i: leaf[i], gradients) for i in range(2)]
    return {
        "rates": flow_rates(f, ALL, params, batch, reference)[0, :, 0, 0],
        "slopes": all_slopes(ALL, pair_of(log_probs), reference, batch)[:, 0],
        "gram": jnp.stack([jnp.stack([tree_vdot(a, b) for b in sides]) for a in sides]),
    }


def sft_term(seed: int, *, rejected: bool = False) -> Evidence:
    """What an added likelihood term does to the rate; the control adds it for the rejected response's gradient."""
    found, predicted, n = [], [], len(REGULARISED)
    for name in MODELS:
        case = measured(name, seed)
        gain = float(gain_of_sft(jnp.asarray(case["gram"][::-1, ::-1] if rejected else case["gram"]), SFT_WEIGHT))
        found.append((case["rates"][n : 2 * n] - case["rates"][:n]) / case["gram"][0, 0])
        predicted.append(np.full(n, gain) / case["gram"][0, 0])
    setting = {"models": list(MODELS), "losses": [loss.name for loss in REGULARISED], "weight": SFT_WEIGHT}
    return Evidence(np.stack(found), np.stack(predicted), setting=setting)


def unequal_weights(seed: int, *, equal: bool = False) -> Evidence:
    """Rates under every weighted loss from that under DPO's; the control takes its weights for equal."""
    found, predicted = [], []
    for name in MODELS:
        case = measured(name, seed)
        slopes = case["slopes"][2 * len(REGULARISED) :]
        slopes = np.stack([-slopes[:, 1], slopes[:, 1]], axis=1) if equal else slopes
        unweighted, slope, norm = (jnp.asarray(x) for x in (case["rates"][0], case["slopes"][0, 0], case["gram"][0, 0]))
        rates = case["rates"][2 * len(REGULARISED) :]
        scale = np.abs(rates)
        found.append(rates / scale)
        predicted.append(np.asarray(rate_weighted(unweighted, norm, slope, jnp.asarray(slopes))) / scale)
    setting = {"models": list(MODELS), "losses": [loss.name for loss in WEIGHTED]}
    return Evidence(np.stack(found), np.stack(predicted), setting=setting)


CLAIMS = (
    make_claim(
        "sft-term",
        "Of any model, a term -lambda ln pi(y+) adds lambda |grad ln pi(y+)|^2 to the rate of ln pi(y+).",
        "proposition 1",
        "identity",
        sft_term,
        {"rejected": True},
        "the gradient is that of the rejected response",
        seeds=2,
    ),
    make_claim(
        "unequal-weights",
        "Of any model, unequal weights change the rate E of ln pi(y+) to rho E + gamma |grad ln pi(y+)|^2.",
        "proposition 2",
        "identity",
        unequal_weights,
        {"equal": True},
        "the weights are taken for equal",
        seeds=2,
    ),
)
