r"""Centered hidden embedding similarity: which preference pairs will pull their own chosen response down.

The score (``ches_score``) is made of sums of hidden states. It stands for an exact term of the rate at which the chosen
log-probability moves, the one through the unembedding, with every coefficient set to 1; ``coefficients="exact"`` leaves
them as they are, and ``ches_terms`` gives the rest of the rate.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, leading_size, nearest, require
from jaxft.core.precision import accumulator
from jaxft.core.types import OutputFn, Params, ResponseBatch
from jaxft.tuning.unembedding import (
    Example,
    error_products,
    one_hot,
    over_examples,
    over_vocabulary,
    response_weights,
    unembedding_gram,
)

Coefficients = Literal["one", "exact"]
COEFFICIENTS = ("one", "exact")


def ches_score(
    chosen: Float[Array | np.ndarray, "*n k d"],
    chosen_mask: Int[Array | np.ndarray, "*n k"],
    rejected: Float[Array | np.ndarray, "*n j d"],
    rejected_mask: Int[Array | np.ndarray, "*n j"],
    *,
    length_normalize: bool = False,
) -> Float[Array, "*n"]:
    r"""$\langle s_+, s_- \rangle - \lVert s_+ \rVert^2$, with $s_\pm$ the sum of the states that predict a response.

    With ``length_normalize`` the sums are means: $\langle s_+, s_- \rangle / (|y_+| |y_-|) - \lVert s_+ \rVert^2 /
    |y_+|^2$. A higher score is to foretell a larger fall of the chosen log-probability; how well it does beside length
    alone is what the claims ``ches-ranks`` and ``length-beats-ches`` are about. The first state is that of the last
    token of the prompt, the last one that *before* the final token of the response. Means are taken before the inner
    product, in float32 at least, so that half-precision states of thousands of tokens do not overflow. The raw score
    grows with the square of the length: compare it with a score by length alone (``length_difference``). Of responses
    of one token each both sums are the state of the prompt and the score is 0, whatever the tokens are.

    Args:
      chosen: States that predict the tokens of the chosen response; what stands at masked places does not matter.
      chosen_mask: 1 at its tokens, on whichever side the padding is.
      rejected: Those of the rejected response.
      rejected_mask: Likewise.
      length_normalize: Whether states are averaged rather than summed.

    Returns:
      The score of every pair, in float32 at least.

    Raises:
      UserError: Shapes that do not fit.

    Example:
      >>> states, mask = jnp.array([[[1.0, 0.0], [1.0, 0.0]]]), jnp.array([[1, 1]])
      >>> ches_score(states, mask, states[:, :1], mask[:, :1]).tolist()
      [-2.0]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, definitions 2 and 3.
    """
    fits = chosen.ndim >= 2 and chosen.shape[:-2] == rejected.shape[:-2] and chosen.shape[-1] == rejected.shape[-1]
    fits = fits and (chosen.shape[:-1], rejected.shape[:-1]) == (chosen_mask.shape, rejected_mask.shape)
    shapes = f"{chosen.shape}, {chosen_mask.shape}, {rejected.shape} and {rejected_mask.shape}"
    rule = "states must be [*n, k, d] with masks [*n, k], the same n and d for both responses"
    require(fits, "ches_score", rule, shapes, "Take both from one network")
    (up, up_length), (down, down_length) = _mean_state(chosen, chosen_mask), _mean_state(rejected, rejected_mask)
    if not length_normalize:
        up, down = up * up_length[..., None], down * down_length[..., None]
    # As one product: <s+, s-> and |s+|^2 are close for similar responses, and their difference would lose digits.
    return jnp.sum(up * (down - up), axis=-1)


def _mean_state(states: Array | np.ndarray, mask: Array | np.ndarray) -> tuple[Array, Array]:
    states, tokens = jnp.asarray(states), jnp.asarray(mask) > 0
    kind = accumulator(states.dtype)
    length = jnp.sum(tokens, axis=-1, dtype=kind)
    # Chosen rather than multiplied: padding may hold NaN.
    total = jnp.sum(jnp.where(tokens[..., None], states, jnp.zeros((), states.dtype)), axis=-2, dtype=kind)
    return total / jnp.maximum(length, 1)[..., None], length


def ches_scores(
    states_fn: OutputFn,
    params: Params,
    batch: ResponseBatch,
    *,
    length_normalize: bool = False,
    coefficients: Coefficients = "one",
    table: Float[Array, "v d"] | None = None,
    chunk: int | None = None,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> Float[Array, "n"]:
    r"""Scores of a set of preference pairs: one forward pass a pair, without logits; compiled once.

    With ``coefficients="exact"`` the inner products of states are weighed by those of the errors of prediction,
    $\langle e_{y_k} - p_k, e_{y'_{k'}} - p'_{k'} \rangle$, for which ``ches_score`` has 1. The sum is then
    $\langle \nabla_W \ln \pi(y_+), \nabla_W \ln \pi(y_-) \rangle - \lVert \nabla_W \ln \pi(y_+) \rVert^2$: no proxy,
    but the very part of the rate that goes through the unembedding W. It costs a product with the table more (two, in
    chunks), and the inner products.

    Args:
      states_fn: ``f(params, batch)``, states ``[n, r, k, d]`` as of ``jaxft.nn.make_response_states``.
      params: Parameters.
      batch: The pairs, chosen response first; responses beyond the second do not count.
      length_normalize: Whether states are averaged rather than summed.
      coefficients: ``"one"``, as the paper has it, or ``"exact"``.
      table: The unembedding, for exact coefficients.
      chunk: Words at a time for exact coefficients (see ``unembedding_gram``).
      batch_size: Pairs at a time.
      mesh: Devices to spread the pairs over, by all its axes; ``None`` means no placement.

    Returns:
      The score of every pair.

    Raises:
      UserError: Fewer than two responses, unknown coefficients, exact ones without a table, a batch size below 1,
        states in another shape, (concrete) scores that are not finite.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, definitions 2 and 3, theorem 6.
    """
    where = "ches_scores"
    n = leading_size(where, batch)
    responses = batch.targets.shape[1]
    require(responses >= 2, where, "needs a chosen and a rejected response", responses, "Pass pairs")
    known = coefficients in COEFFICIENTS
    require(known, where, "unknown coefficients", repr(coefficients), nearest(str(coefficients), COEFFICIENTS))
    exact = coefficients == "exact"
    advice = "Pass table=unembedding_table(config, params), or leave both out"
    require(exact == (table is not None), where, "exact coefficients go with a table", coefficients, advice)
    require(batch_size >= 1, where, "batch_size must be at least 1", batch_size, "Use 16, or what memory allows")
    size, ways = min(n, batch_size), 1 if mesh is None else mesh.size
    size = -(-size // ways) * ways
    scores = []
    for first in range(0, n, size):
        # The last block is filled up with copies of the final example, so that one program does for all.
        rows = np.minimum(np.arange(first, first + size), n - 1)
        block = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        if mesh is not None:
            block = jax.device_put(block, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        scores.append(_block_scores(states_fn, length_normalize, chunk, params, block, table))
    found = jnp.concatenate(scores)[:n]
    if is_concrete(found) and found.is_fully_addressable:
        bad = np.flatnonzero(~np.isfinite(np.asarray(found)))
        shown = f"NaN or infinity at {len(bad)} of {n}, the first at {bad[:1].tolist()}"
        advice = "Look at that pair: ids beyond the vocabulary, or parameters that are not finite"
        require(not len(bad), where, "scores must be finite", shown, advice)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _block_scores(
    states_fn: OutputFn, normalize: bool, chunk: int | None, params: Params, batch: ResponseBatch, table: Array | None
) -> Array:
    states = states_fn(params, batch)
    expected = batch.targets.shape
    rule = f"states_fn must return states {(*expected, 'd')}"
    require(states.shape[:-1] == expected, "ches_scores", rule, states.shape, "Use make_response_states")
    states, targets, mask = states[:, :2], batch.targets[:, :2], batch.mask[:, :2]
    if table is None:
        sides = (states[:, 0], mask[:, 0], states[:, 1], mask[:, 1])
        return ches_score(*sides, length_normalize=normalize)
    gram = unembedding_gram(states, targets, mask, table, length_normalize=normalize, chunk=chunk)
    return gram[:, 0, 1] - gram[:, 0, 0]


class ChesTerms(NamedTuple):
    r"""The rate of the chosen log-probability under a margin loss l, over $-l' > 0$, with free features."""

    norms: Float[Array, "*n"]
    """m: what one's own unembedding rows give; never negative."""
    words: Float[Array, "*n"]
    """S: inner products of unembedding rows, at the first token in which the responses differ."""
    states: Float[Array, "*n"]
    """Minus the exact-coefficient score: the part through the unembedding."""
    fork: Int[Array, "*n"]
    """Tokens that both responses begin with; the theorem has 0."""

    @property
    def rate(self) -> Float[Array, "*n"]:
        """The sum of the three; where it is negative the chosen response falls."""
        return self.norms + self.words + self.states


def ches_terms(
    states: Float[Array, "*n r k d"],
    targets: Int[Array | np.ndarray, "*n r k"],
    mask: Int[Array | np.ndarray, "*n r k"],
    table: Float[Array, "v d"],
    *,
    chunk: int | None = None,
) -> ChesTerms:
    r"""All terms of the rate of $\ln \pi(y_+)$ if hidden states were free parameters, by which CHES was found.

    Under gradient flow on $l(\ln \pi(y_+) - \ln \pi(y_-))$ with the unembedding W and the state of every prefix
    trained, $\tfrac{d}{dt} \ln \pi(y_+) = -l' [m + S + \ldots]$ with

    $m = (1 - \pi_+) \lVert W_+ \rVert^2 + \pi_- \lVert W_- \rVert^2 + \sum_{k > c} \lVert W_{y_k} - \mu_k \rVert^2$ and
    $m + S = \langle W_+ - \mu_c, W_+ - W_- \rangle + \sum_{k > c} \lVert W_{y_k} - \mu_k \rVert^2$,

    where c is the first place at which the responses differ, $W_\pm$ and $\pi_\pm$ are those of the tokens there and
    $\mu_k$ is the mean of W under the prediction of token k of the chosen response. The theorem has responses whose
    first tokens differ; prefixes that both share add nothing to m and S. In a real network states are no free
    parameters: for that rate see ``preference_gram``.

    Args:
      states: States that predict the tokens; responses beyond the second do not count.
      targets: The tokens.
      mask: 1 at tokens; padding must follow them.
      table: The unembedding W.
      chunk: Words at a time (see ``unembedding_gram``).

    Returns:
      The terms of every pair.

    Raises:
      UserError: Fewer than two responses, and as ``unembedding_gram``.

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 6 (there $-l$ is printed for $-l'$ in one place).
    """
    where = "ches_terms"
    require(states.ndim >= 3 and states.shape[-3] >= 2, where, "needs two responses", states.shape, "Pass pairs")
    states, targets, mask = states[..., :2, :, :], targets[..., :2, :], mask[..., :2, :]
    out = over_examples(where, functools.partial(_terms_of_one, table, chunk), states, targets, mask, table, chunk)
    return ChesTerms(*out)


def _terms_of_one(table: Array, chunk: int | None, one: Example) -> tuple[Array, ...]:
    kind, (up, down) = one.states.dtype, one.targets
    weights = response_weights(one.mask, kind, length_normalize=False)
    products = error_products(one, weights)

    def add(total: tuple[Array, ...], probs: Array, rows: Array, words: Array) -> tuple[Array, ...]:
        gram, means, own = total
        seen = one_hot(one.targets, words, kind)
        gram = gram + products(probs, words)
        means = means + jnp.einsum("kc,cd->kd", probs[0], rows, precision="highest")
        # Of the chosen response's predictions: its own token's probability and the rejected response's.
        own = own + jnp.einsum("kc,rkc->rk", probs[0], seen, precision="highest")
        return gram, means, own

    k, d = one.states.shape[1:]
    start = jnp.zeros((2, 2), kind), jnp.zeros((k, d), kind), jnp.zeros((2, k), kind)
    gram, means, own = over_vocabulary(one, table, add, start, chunk)
    differs = (up != down) | (one.mask[0] != one.mask[1])
    fork = jnp.argmax(jnp.append(differs, True)).astype(jnp.int32)
    places = jnp.arange(k, dtype=jnp.int32)
    plus, minus = table[up].astype(kind), table[down].astype(kind)
    squares = weights[0] * jnp.sum((plus - means) ** 2, axis=-1)
    here = (places == fork).astype(kind) * weights[0] * weights[1]
    after = (places > fork).astype(kind) + (places == fork).astype(kind) * (1 - weights[1])  # against no token
    norms = (1 - own[0]) * jnp.sum(plus**2, axis=-1) + own[1] * jnp.sum(minus**2, axis=-1)
    both = jnp.sum((plus - means) * (plus - minus), axis=-1)
    norms, both = (jnp.sum(here * x) + jnp.sum(after * squares) for x in (norms, both))
    return norms, both - norms, gram[0, 0] - gram[0, 1], fork
