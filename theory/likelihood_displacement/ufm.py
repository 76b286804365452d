"""The unconstrained-features model: hidden states that nothing ties together, as the paper's theorems suppose.

Its parameters are a pool of hidden states, one for each distinct prefix, and the unembedding. An example is a
``ResponseBatch`` whose columns are places in the pool, so that all that the library does with examples and a function
``f(params, batch)`` can be done here. Draws differ in numbers, never in shapes: every program is compiled once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.rng import host_stream
from jaxft.core.types import CausalTokens, Params, ResponseBatch
from jaxft.tuning.objectives import LOSSES, loss_slopes, preference_loss
from theory.claims import Claim, controlled_claim

PAPER = "arXiv 2410.08847"
VOCABULARY, WIDTH, LENGTH = 11, 6, 5
OTHERS = 3
"""Responses z besides the chosen and the rejected one."""
BETA = 0.1
FAST_COMPILATION = {"xla_backend_optimization_level": 0}
"""All programs here are tiny and run a few times: optimising them would cost more than it saves."""
compiled = functools.partial(jax.jit, compiler_options=FAST_COMPILATION)


STANDARD = functools.partial(jax.numpy_dtype_promotion, "standard")
"""Promotion as the library needs it where it asks for float32 at least."""


class Loss(NamedTuple):
    """A loss of the table with its options."""

    name: str
    options: dict[str, Any]
    beta: float = BETA
    sft_weight: float = 0.0

    def terms(self, log_probs: Array, reference: Array, lengths: Array) -> Float[Array, "n"]:
        """What a run minimises the mean of: the loss and the term of the likelihood."""
        values = self.values(log_probs, reference, lengths)
        return values - self.sft_weight * log_probs[:, 0] if self.sft_weight else values

    def values(self, log_probs: Array, reference: Array, lengths: Array) -> Float[Array, "n"]:
        """Loss of each example, from log-probabilities ``[n, 2]`` of chosen and rejected."""
        with STANDARD():
            return preference_loss(self.name, log_probs, reference, lengths, beta=self.beta, **self.options)

    def slopes(self, log_probs: Array, reference: Array, lengths: Array) -> Float[Array, "n 2"]:
        """Derivatives of each example's loss by its two log-probabilities."""
        with STANDARD():
            return loss_slopes(self.name, log_probs, reference, lengths, beta=self.beta, **self.options)


VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "gpo": ({"f": "exponential"}, {"f": "squared"}),
    "slic": ({"delta": 5.0},),
    "kto": ({"kl": 0.5},),
}
"""Options under which a loss is taken, where they are not the defaults."""


def losses_of(*families: str) -> tuple[Loss, ...]:
    """Every loss of these families of the table, with its variants."""
    names = [name for name, loss in LOSSES.items() if loss.family in families]
    return tuple(Loss(name, options) for name in names for options in VARIANTS.get(name, ({},)))


class Instance(NamedTuple):
    """Hidden states and an unembedding with examples; stacked ones have a leading axis of instances."""

    params: Params
    """``hidden [u, d]``, the pool, and ``unembedding [v, d]``."""
    batch: ResponseBatch
    """Columns are places in the pool; the first response is the chosen one, the second the rejected one."""
    reference: Any
    """Log-probabilities ``[n, 2]`` of the two under a reference model, drawn besides."""


def token_log_probs(params: Params, batch: ResponseBatch) -> Float[Array, "n r k"]:
    """Log-probability of each token of each response, 0 beyond its end."""
    states = params["hidden"][jnp.asarray(batch.source)]
    log_probs = jax.nn.log_softmax(jnp.einsum("nrkd,vd->nrkv", states, params["unembedding"]), axis=-1)
    chosen = jnp.take_along_axis(log_probs, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return jnp.where(batch.mask > 0, chosen, 0)


def response_log_probs(params: Params, batch: ResponseBatch) -> Float[Array, "n r"]:
    """Log-probability of each response."""
    return token_log_probs(params, batch).sum(axis=-1)


def response_states(params: Params, batch: ResponseBatch) -> Float[Array, "n r k d"]:
    """The hidden states that predict the tokens of each response, 0 beyond its end."""
    return jnp.where(batch.mask[..., None] > 0, params["hidden"][batch.source], 0)


def feature_batch(source: Any, targets: Any, mask: Any) -> ResponseBatch:
    """Examples by places in the pool; no token is read."""
    unread: Any = np.zeros((len(source), 1, 1), np.int32)
    return ResponseBatch(CausalTokens(unread, unread, unread), source, targets, mask)


def drawn_instance(
    seed: int, *, examples: int = 1, length: int = LENGTH, vocabulary: int = VOCABULARY, same_first: bool = False
) -> Instance:
    """A random instance, whose responses to a prompt all differ in their first token.

    Prefixes of length 0 are the prompt's, which its responses share; all others are distinct. The pool also has the
    state behind the last token of each response, which predicts nothing.

    Args:
      seed: Of the draw.
      examples: Prompts.
      length: Most tokens of a response; lengths are drawn from 1 up to it.
      vocabulary: Tokens.
      same_first: Whether the rejected response starts with the first token of the chosen one, against what theorem 6
        supposes: they then share their second prefix.

    Returns:
      The instance.
    """
    draw = host_stream(seed, "instance", examples, length)
    n, r, k = examples, 2 + OTHERS, length
    first = np.stack([draw.permutation(vocabulary)[:r] for _ in range(n)])
    targets = draw.integers(vocabulary, size=(n, r, k))
    targets[:, :, 0] = first
    lengths = draw.integers(1, k + 1, size=(n, r))
    own = (1 + k * np.arange(r))[:, None] + np.arange(k)[None] - 1
    own = np.concatenate([np.zeros((r, 1), int), own[:, 1:]], axis=1)
    source = own[None] + (1 + r * k) * np.arange(n)[:, None, None]
    if same_first:
        targets[:, 1, 0] = targets[:, 0, 0]
        targets[:, 1, 1:2] = (targets[:, 0, 1:2] + 1) % vocabulary
        source[:, 1, 1:2] = source[:, 0, 1:2]
        lengths[:, :2] = k
    mask = (np.arange(k)[None, None] < lengths[..., None]).astype(np.int32)
    hidden = draw.normal(size=(n * (1 + r * k), WIDTH))
    table = draw.normal(size=(vocabulary, WIDTH))
    source, targets = ((x * mask).astype(np.int32) for x in (source, targets))
    batch = feature_batch(source, targets, mask)
    return Instance({"hidden": hidden, "unembedding": table}, batch, -3 * draw.random((n, 2)) * lengths[:, :2])


def shifted_by_one(instances: Instance) -> Instance:
    """Stacked instances that are read one token late: without the prompt's state, with that behind the last token."""
    batch = instances.batch
    _, n, r, k = batch.source.shape
    late = (1 + k * np.arange(r))[:, None] + np.arange(k)[None]
    source = late[None] + (1 + r * k) * np.arange(n)[:, None, None]
    shifted = batch._replace(source=jnp.asarray((source[None] * np.asarray(batch.mask)).astype(np.int32)))
    return instances._replace(batch=shifted)


def paired_anew(instances: Instance) -> Instance:
    """Stacked instances, each with the responses of its neighbour."""
    rolled = {name: jnp.roll(getattr(instances.batch, name), 1, axis=0) for name in ("source", "targets", "mask")}
    return instances._replace(batch=instances.batch._replace(**rolled))


def stacked(instances: list[Instance]) -> Instance:
    """Instances along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *instances)


def pair_of(log_probs: Array) -> Array:
    """The log-probabilities that a loss sees."""
    return log_probs[:, :2]


def pair_lengths(batch: ResponseBatch) -> Int[Array, "n 2"]:
    """Tokens of the chosen and of the rejected response."""
    return batch.mask[:, :2].sum(axis=-1)


def flow_rates(
    f: Callable[[Params, ResponseBatch], Array],
    losses: tuple[Loss, ...],
    params: Params,
    batch: ResponseBatch,
    reference: Float[Array, "n 2"],
    *,
    weights: Float[Array, "m n"] | None = None,
    scale: Callable[[Params], Params] = lambda gradient: gradient,
) -> Float[Array, "m losses n r"]:
    """Derivatives of all log-probabilities along the gradient flow of means of each loss, by autodiff.

    Args:
      f: Log-probabilities ``[n, r]``.
      losses: The losses.
      params: Where the flow is.
      batch: The examples.
      reference: Log-probabilities of the reference model.
      weights: Of the examples in each mean that is followed, over n; ``None`` is 1 once.
      scale: What is done to a gradient before the flow follows it.

    Returns:
      A derivative by weights, loss, example and response.
    """
    branches = [functools.partial(loss.terms, reference=reference, lengths=pair_lengths(batch)) for loss in losses]
    weights = jnp.ones((1, len(reference)), reference.dtype) if weights is None else weights

    def rates(index: Array, weight: Array) -> Array:
        def loss(p: Params) -> Array:
            return (weight * jax.lax.switch(index, branches, pair_of(f(p, batch)))).mean()

        direction = scale(jax.tree.map(jnp.negative, jax.grad(loss)(params)))
        return jax.jvp(lambda p: f(p, batch), (params,), (direction,))[1]

    index, row = (x.ravel() for x in jnp.meshgrid(jnp.arange(len(losses)), jnp.arange(len(weights)), indexing="xy"))
    found = jax.lax.map(lambda at: rates(at[0], weights[at[1]]), (index, row))
    return found.reshape(len(weights), len(losses), *found.shape[1:])


def all_slopes(
    losses: tuple[Loss, ...], log_probs: Float[Array, "n 2"], reference: Float[Array, "n 2"], batch: ResponseBatch
) -> Float[Array, "losses n 2"]:
    """Slopes of each loss at the same log-probabilities."""
    lengths = pair_lengths(batch)
    return jnp.stack([loss.slopes(log_probs, reference, lengths) for loss in losses])


def make_claim(
    name: str, statement: str, where: str, kind: Any, check: Callable, control: dict, breaks: str, **options: Any
) -> Claim:
    """A claim whose control is the same check with options that break an assumption.

    ``where`` is a place in the paper; "cf. ..." if the statement is derived here, from what stands there.
    """
    source = f"derived; cf. {PAPER}, {where[4:]}" if where.startswith("cf. ") else f"{PAPER}, {where}"
    return controlled_claim("likelihood_displacement", name, statement, source, kind, check, control, breaks, **options)
