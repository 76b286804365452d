"""Claims on noise stability: what its quantities cannot be, and what its bound is worth on small networks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.geometry.dropout_line import best_dropout_line
from jaxft.geometry.noise_stability import NoiseStability, chain_weights, noise_stability
from theory.claims import Evidence
from theory.mode_connectivity.dropout import KEPT, WIDTHS, deviation
from theory.mode_connectivity.networks import (
    CLASSES,
    SETTING,
    batches,
    compiled,
    data,
    f,
    loss,
    make_claim,
    mlp_units,
    preactivations,
    trained,
)

HIDDEN, WIDTH, EXAMPLES, DRAWS = 2, 16, 32, 20
DROPOUT_FRAC = 0.25


def _network(seed: int) -> Params:
    (params,) = trained(seed, copies=1, width=WIDTH, hidden=HIDDEN, bias=False)
    return params


@functools.cache
def _quantities(seed: int) -> NoiseStability:
    return _measured(_network(seed), data(seed).x[:EXAMPLES], stream(jax.random.key(seed), "noise"))


@compiled
def _measured(params: Params, x: jax.Array, key: jax.Array) -> NoiseStability:
    weights = chain_weights(params, mlp_units(HIDDEN, bias=False))
    return noise_stability(weights, x, key=key, dropout_frac=DROPOUT_FRAC)


def _setting(**more: Any) -> dict[str, Any]:
    return {**SETTING, "network": f"{HIDDEN} hidden ReLU layers of {WIDTH}, no biases", "examples": EXAMPLES, **more}


class Linearised(NamedTuple):
    """Preactivations of the last layer, and their linearisation at those of the first, by example."""

    first: jax.Array
    last: jax.Array
    mapped: jax.Array
    """The Jacobian applied to the first."""
    norm: jax.Array
    """Spectral norm of the Jacobian."""


@compiled
def _linearised(params: Params, bias: jax.Array, x: jax.Array) -> Linearised:
    """With a bias in the last hidden layer and the outputs."""
    first = preactivations(params, x)[0]

    def last(z: jax.Array) -> jax.Array:
        z = jax.nn.relu(z) @ params["Dense_1"]["kernel"] + bias
        return jax.nn.relu(z) @ params["Dense_2"]["kernel"] + bias

    def one(z: jax.Array) -> Linearised:
        jacobian = jax.jacobian(last)(z)
        return Linearised(z, last(z), jacobian @ z, jnp.linalg.norm(jacobian, ord=2))

    return jax.lax.map(one, first)


def jacobians(seed: int, *, bias: float = 0.0) -> Evidence:
    """The Jacobian of the layers above, applied to the preactivations of the first, against those of the last."""
    found = _linearised(_network(seed), jnp.asarray(bias), data(seed).x[:EXAMPLES])
    return Evidence(np.asarray(found.mapped), np.asarray(found.last), setting=_setting(bias=bias))


def cushions(seed: int, *, bias: float = 0.0) -> Evidence:
    """The largest of all cushions and of the inverse of the contraction, against 1; the control adds biases."""
    found, size = _linearised(_network(seed), jnp.asarray(bias), data(seed).x[:EXAMPLES]), jnp.linalg.norm
    direct = size(found.last, axis=1) / (found.norm * size(found.first, axis=1))
    q = _quantities(seed)
    between = np.asarray(q.interlayer_cushions)[np.triu_indices(HIDDEN + 1, 1)]
    largest = [direct.max(), q.layer_cushions.max(), between.max(), 1 / q.contraction]
    return Evidence(float(np.max(largest)), 1 + 1e-9, setting=_setting(bias=bias))


def noise_epsilon(seed: int, *, scale: float = 1.0) -> Evidence:
    """Largest rise of the loss by random dropout against epsilon; the control has other outputs than were measured.

    The setting says what the bound is worth: where ``vacuous`` is true, epsilon lies above the loss of guessing.
    """
    q, params = _quantities(seed), _network(seed)
    params = {**params, "Dense_2": {"kernel": scale * params["Dense_2"]["kernel"]}}
    key = stream(jax.random.key(seed), "dropout")
    rise = float(_rises(params, batches(seed), key).max())
    facts = {name: bool(holds) for name, holds in q.preconditions.items()}
    more = {"vacuous": bool(q.vacuous), "smoothness": round(float(q.smoothness), 3), "guessing": float(np.log(CLASSES))}
    return Evidence(rise, float(q.epsilon), setting=_setting(**more, preconditions=facts, draws=DRAWS, p=DROPOUT_FRAC))


@compiled
def _rises(params: Params, batch: Any, key: jax.Array) -> jax.Array:
    spec = mlp_units(HIDDEN, bias=False)
    found = best_dropout_line(loss, params, spec, batch, key=key, dropout_frac=DROPOUT_FRAC, draws=DRAWS)
    return found.losses - loss(params, jax.tree.map(lambda a: a[0], batch))


def deviation_by_width(seed: int, *, fixed: bool = False) -> Evidence:
    """Mean change of the outputs by dropout, over the largest output, against the width of one hidden layer.

    The control keeps as many units, whatever the width.
    """
    key, x, found = stream(jax.random.key(seed), "deviation"), data(seed).x, []
    for width in WIDTHS:
        (params,) = trained(seed, copies=1, width=width)
        frac = 1 - KEPT / width if fixed else DROPOUT_FRAC
        size = jnp.linalg.norm(f(params, x), axis=1).max()
        found.append(float(deviation(params, x, key, jnp.asarray(frac), jnp.int32(1)).norm.mean() / size))
    setting = {**SETTING, "dropout": f"all but {KEPT} units on average" if fixed else DROPOUT_FRAC}
    return Evidence(np.array(found), x=np.array(WIDTHS, float), setting=setting)


CLAIMS = (
    make_claim(
        "noise-jacobian",
        "Of a ReLU network without biases, the Jacobian between layers maps preactivations to preactivations.",
        "section 4",
        "identity",
        jacobians,
        {"bias": 0.5},
        "layers have biases",
        seeds=2,
    ),
    make_claim(
        "noise-cushions",
        "Layer and interlayer cushions are at most 1, the activation contraction at least 1.",
        "definitions 2 and 3",
        "bound",
        cushions,
        {"bias": 100.0},
        "layers have biases",
        seeds=2,
    ),
    make_claim(
        "noise-epsilon",
        "Random dropout raises the loss by at most epsilon of noise stability.",
        "theorem 2, lemma 3",
        "bound",
        noise_epsilon,
        {"scale": 1e7},
        "epsilon is that of another scale of the outputs",
        vacuous_above=float(np.log(CLASSES)),
        seeds=2,
    ),
    make_claim(
        "deviation-by-width",
        "The change of the outputs by dropout falls with the width, relative to the outputs.",
        "section 4",
        "association",
        deviation_by_width,
        {"fixed": True},
        "as many units are kept, whatever the width",
        sign=-1.0,
        seeds=3,
        max_seeds=6,
    ),
)
