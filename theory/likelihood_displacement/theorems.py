"""Claims on theorems 4 to 9 and propositions 1 and 2: closed forms against derivatives along the flow, by autodiff."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theory.claims import Evidence
from theory.likelihood_displacement.rates import (
    rate_chosen,
    rate_other_token,
    rate_response,
    rate_single_token,
    rates_across_examples,
)
from theory.likelihood_displacement.ufm import (
    LENGTH,
    OTHERS,
    VOCABULARY,
    WIDTH,
    Instance,
    all_slopes,
    compiled,
    drawn_instance,
    flow_rates,
    losses_of,
    make_claim,
    pair_lengths,
    pair_of,
    paired_anew,
    response_log_probs,
    shifted_by_one,
    stacked,
)

INSTANCES = 12
EXAMPLES, FEW_TOKENS = 4, 6
"""Prompts of theorems 8 and 9, and a vocabulary in which their responses collide."""
MARGIN = losses_of("margin")
SETTING = {
    "losses": [" ".join([loss.name, *map(str, loss.options.values())]) for loss in MARGIN],
    "instances": INSTANCES,
    "vocabulary": VOCABULARY,
    "width": WIDTH,
}


class Flows(NamedTuple):
    """Instances with derivatives along the flow of every margin loss."""

    instances: Instance
    rates: jax.Array
    """By autodiff, of instance, loss, example and response."""
    slopes: jax.Array
    """Of instance, loss and example: the loss's, by the margin."""
    values: jax.Array
    """The losses themselves."""


@functools.cache
def flows(seed: int, *, examples: int = 1, length: int = LENGTH, same_first: bool = False) -> Flows:
    """Random instances and what autodiff says of them."""
    vocabulary = FEW_TOKENS if examples > 1 else VOCABULARY
    options = {"examples": examples, "length": length, "vocabulary": vocabulary, "same_first": same_first}
    instances = stacked([drawn_instance(INSTANCES * seed + i, **options) for i in range(INSTANCES)])
    return Flows(instances, *_flows(instances))


@compiled
def _flows(instances: Instance) -> tuple[jax.Array, jax.Array, jax.Array]:
    def one(case: Instance) -> tuple[jax.Array, jax.Array, jax.Array]:
        rates = flow_rates(response_log_probs, MARGIN, case.params, case.batch, case.reference)[0]
        log_probs = pair_of(response_log_probs(case.params, case.batch))
        slopes = all_slopes(MARGIN, log_probs, case.reference, case.batch)
        values = [loss.values(log_probs, case.reference, pair_lengths(case.batch)) for loss in MARGIN]
        return rates, slopes[..., 0], jnp.stack(values)

    return jax.vmap(one)(instances)


def compared(flow: Flows, measured: jax.Array, predicted: jax.Array, **setting: Any) -> Evidence:
    """Rates ``[instance, loss, ...]``, each in units of the largest of its instance and loss."""
    found, expected = (np.asarray(x).reshape(INSTANCES, len(MARGIN), -1) for x in (measured, predicted))
    scale = np.abs(found).max(axis=-1, keepdims=True)
    scale = np.where(scale > 0, scale, 1)
    setting = {**SETTING, "losses at rest": int((np.asarray(flow.slopes) == 0).sum()), **setting}
    return Evidence(found / scale, expected / scale, setting=setting)


Form = Callable[[Instance, jax.Array, jax.Array], jax.Array]
"""A closed form at one instance and loss, with the sign of the terms that a control turns."""


def of_instances(form: Form, instances: Instance, slopes: jax.Array, sign: float = 1.0) -> jax.Array:
    """A closed form at every instance and loss."""
    return _everywhere(form)(instances, slopes, jnp.asarray(sign))


@functools.cache
def _everywhere(form: Form) -> Callable[..., jax.Array]:
    return compiled(jax.vmap(jax.vmap(form, (None, 0, None)), (0, 0, None)))


def single_token(seed: int, *, sign: float = 1.0, swapped: bool = False) -> Evidence:
    """Theorem 4; the control has the wrong sign of what is not in m. ``swapped`` takes the pairs of other instances."""
    flow = flows(seed, length=1)
    instances = paired_anew(flow.instances) if swapped else flow.instances
    return compared(flow, flow.rates[:, :, 0, 0], of_instances(_theorem_4, instances, flow.slopes, sign), tokens=1)


def _theorem_4(case: Instance, slopes: jax.Array, sign: jax.Array) -> jax.Array:
    hidden, tokens = case.params["hidden"][0], case.batch.targets[0, :, 0]
    return rate_single_token(case.params["unembedding"], hidden, tokens[0], tokens[1], slopes[0], sign=sign)


def other_token(seed: int, *, as_printed: bool = False, swapped: bool = False) -> Evidence:
    """Theorem 5 for three tokens z; the control has the loss in the place of its slope, as the paper prints."""
    flow = flows(seed, length=1)
    instances = paired_anew(flow.instances) if swapped else flow.instances
    predicted = of_instances(_theorem_5, instances, flow.values if as_printed else flow.slopes)
    return compared(flow, flow.rates[:, :, 0, 2:], predicted, tokens=1, others=OTHERS)


def _theorem_5(case: Instance, slopes: jax.Array, _: jax.Array) -> jax.Array:
    tokens = case.batch.targets[0, :, 0]
    of = jax.vmap(rate_other_token, (None, None, 0, None, None, None))
    return of(case.params["unembedding"], case.params["hidden"][0], tokens[2:], tokens[0], tokens[1], slopes[0])


def sequences(seed: int, *, sign: float = 1.0, shifted: bool = False, same_first: bool = False) -> Evidence:
    """Theorem 6; the control reads hidden states one token late, with that behind the last token.

    ``same_first`` has responses with one first token, which the theorem excludes.
    """
    flow = flows(seed, same_first=same_first)
    instances = shifted_by_one(flow.instances) if shifted else flow.instances
    predicted = of_instances(_theorem_6, instances, flow.slopes, sign)
    return compared(flow, flow.rates[:, :, 0, 0], predicted, tokens=f"1 to {LENGTH}")


def _theorem_6(case: Instance, slopes: jax.Array, sign: jax.Array) -> jax.Array:
    arrays = read_responses(case, jnp.arange(2))
    return rate_chosen(case.params["unembedding"], *arrays, slopes[0], sign=sign)


def read_responses(case: Instance, which: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States, targets and mask of some responses to the first prompt."""
    mask = case.batch.mask[0, which]
    states = case.params["hidden"][case.batch.source[0, which]]
    return jnp.where(mask[..., None] > 0, states, 0), case.batch.targets[0, which], mask


def other_sequences(seed: int, *, swapped: bool = False, as_printed: bool = False, shifted: bool = False) -> Evidence:
    """Theorem 7 for three responses z; the control has the responses of other instances."""
    flow = flows(seed)
    instances = paired_anew(flow.instances) if swapped else flow.instances
    instances = shifted_by_one(instances) if shifted else instances
    predicted = of_instances(_theorem_7, instances, flow.values if as_printed else flow.slopes)
    return compared(flow, flow.rates[:, :, 0, 2:], predicted, tokens=f"1 to {LENGTH}", others=OTHERS)


def _theorem_7(case: Instance, slopes: jax.Array, _: jax.Array) -> jax.Array:
    def of(z: jax.Array) -> jax.Array:
        arrays = read_responses(case, jnp.stack([jnp.zeros_like(z), jnp.ones_like(z), z]))
        return rate_response(case.params["unembedding"], *arrays, slopes[0])

    return jax.vmap(of)(jnp.arange(2, 2 + OTHERS))


def across_examples(
    seed: int, *, others: bool = False, sign: float = 1.0, as_printed: bool = False, swapped: bool = False
) -> Evidence:
    """Theorem 8 and, with ``others``, 9; the controls have the wrong sign of alpha, and the loss for its slope."""
    flow = flows(seed, examples=EXAMPLES, length=1)
    instances = paired_anew(flow.instances) if swapped else flow.instances
    slopes = flow.values if as_printed else flow.slopes
    predicted = of_instances(_theorems_8_and_9, instances, slopes, sign)
    which = slice(2, None) if others else slice(0, 1)
    setting = {"tokens": 1, "examples": EXAMPLES, "vocabulary": FEW_TOKENS}
    return compared(flow, flow.rates[..., which], predicted[..., which], **setting)


def _theorems_8_and_9(case: Instance, slopes: jax.Array, sign: jax.Array) -> jax.Array:
    tokens = case.batch.targets[:, :, 0]
    hidden = case.params["hidden"][case.batch.source[:, 0, 0]]

    def of(z: jax.Array) -> jax.Array:
        table = case.params["unembedding"]
        return rates_across_examples(table, hidden, z, tokens[:, 0], tokens[:, 1], slopes, sign=sign)

    return jax.vmap(of, 1, 1)(tokens)


CLAIMS = (
    make_claim(
        "single-token",
        "The rate of ln pi(y+) is -l' (m - (1 - p+ + p-) <W+, W-> - sum_z p_z <W_z, W+ - W->).",
        "theorem 4",
        "identity",
        single_token,
        {"sign": -1.0},
        "the terms outside m have the wrong sign",
    ),
    make_claim(
        "other-token",
        "The rate of ln pi(z) is -l' (<W_z, W+ - W-> + c), where c is the same for all z.",
        "theorem 5",
        "identity",
        other_token,
        {"as_printed": True},
        "the loss in the place of its slope, as printed",
    ),
    make_claim(
        "sequences",
        "The rate of ln pi(y+) of several tokens is m, the similarity of first tokens and weighted inner products of "
        "hidden states.",
        "theorem 6",
        "identity",
        sequences,
        {"shifted": True},
        "hidden states are read one token late",
    ),
    make_claim(
        "other-sequences",
        "The rate of ln pi(z) of any response z with another first token, alike.",
        "theorem 7",
        "identity",
        other_sequences,
        {"swapped": True},
        "the pairs are those of other instances",
    ),
    make_claim(
        "across-examples",
        "Other examples add (-l_j' / n) alpha_j <h_i, h_j> to the rate of ln pi(y+).",
        "theorem 8",
        "identity",
        across_examples,
        {"sign": -1.0},
        "alpha has the wrong sign",
    ),
    make_claim(
        "other-token-across-examples",
        "They add alike to the rate of ln pi(z).",
        "theorem 9",
        "identity",
        functools.partial(across_examples, others=True),
        {"as_printed": True},
        "the loss in the place of its slope, as printed",
    ),
)
