r"""Where a log-probability meets the unembedding W: gradients in W, and what the table says of two tokens.

With $h_k$ the state that predicts token $y_k$ and $p_k = \operatorname{softmax}(W h_k)$,
$\nabla_W \ln \pi(y) = \sum_k (e_{y_k} - p_k) h_k^\top$. Nothing here holds a number for every token of a response and
every word at once: the vocabulary goes by in chunks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, require
from jaxft.core.precision import accumulator

HELD = 2**22
"""Numbers of a chunk of the vocabulary, where nothing else is asked for: 16 MiB in float32."""


class UnembeddingDecomposition(NamedTuple):
    """Lengths of the two parts of $W_+ - W_-$."""

    parallel: Float[Array, "*n"]
    """Of its projection onto $W_+$."""
    orthogonal: Float[Array, "*n"]
    """Of the rest."""


def unembedding_decomposition(
    table: Float[Array | np.ndarray, "v d"],
    chosen: Int[Array | np.ndarray, "*n"],
    rejected: Int[Array | np.ndarray, "*n"],
) -> UnembeddingDecomposition:
    r"""Lengths of the projection of $W_+ - W_-$ onto $W_+$ and of what is orthogonal to it.

    A large orthogonal part pulls up tokens that are along it, not the chosen one. For pairs of single tokens.

    Args:
      table: The unembedding W.
      chosen: Ids of chosen tokens.
      rejected: Ids of rejected tokens.

    Returns:
      Both lengths, not signed, in float32 at least.

    Raises:
      UserError: Shapes that do not fit, or (concrete) ids outside the vocabulary.

    Example:
      >>> table = jnp.array([[2.0, 0.0], [1.0, 3.0]])
      >>> found = unembedding_decomposition(table, jnp.array(0), jnp.array(1))
      >>> float(found.parallel), float(found.orthogonal)
      (1.0, 3.0)

    Reference:
      Razin et al. 2025, arXiv 2410.08847, table 13.
    """
    where = "unembedding_decomposition"
    same = np.shape(chosen) == np.shape(rejected)
    require(same, where, "tokens must come in pairs", (np.shape(chosen), np.shape(rejected)), "Pass as many of each")
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        require_ids(where, name, ids, table.shape[0])
    rows = jnp.asarray(table)
    rows = rows.astype(accumulator(rows.dtype))
    up, difference = rows[chosen], rows[chosen] - rows[rejected]
    along = jnp.sum(difference * up, axis=-1) / jnp.sum(up * up, axis=-1)
    rest = difference - along[..., None] * up
    return UnembeddingDecomposition(jnp.abs(along) * jnp.linalg.norm(up, axis=-1), jnp.linalg.norm(rest, axis=-1))


def unembedding_gram(
    states: Float[Array, "*n r k d"],
    targets: Int[Array | np.ndarray, "*n r k"],
    mask: Int[Array | np.ndarray, "*n r k"],
    table: Float[Array, "v d"],
    *,
    length_normalize: bool = False,
    chunk: int | None = None,
) -> Float[Array, "*n r r"]:
    r"""Inner products of the gradients of log-probabilities in the unembedding, from hidden states alone.

    $\langle \nabla_W \ln \pi(y), \nabla_W \ln \pi(y') \rangle
    = \sum_{k, k'} \langle e_{y_k} - p_k, e_{y'_{k'}} - p'_{k'} \rangle \langle h_k, h'_{k'} \rangle$: exact for any
    network, whatever else depends on the parameters. Of a tied table it is the part that goes through the unembedding.
    Logits that are more than $W h$ (a bias is no fault; a cap or a temperature is) are not covered.

    Args:
      states: States that predict the tokens, as ``jaxft.nn.make_response_states`` gives them.
      targets: The tokens.
      mask: 1 at tokens.
      table: The unembedding W.
      length_normalize: Whether each gradient is divided by the tokens of its response.
      chunk: Words at a time; ``None`` means as many as 2**22 numbers hold. Memory: a few times ``r k * chunk`` numbers,
        ``r (k + d) * chunk`` where the tokens ``r k`` outnumber d, whatever n and v are. Where all words fit, logits
        are made once rather than twice.

    Returns:
      The Gram matrix of every example, in float32 at least.

    Raises:
      UserError: Shapes that do not fit, a chunk below 1, or (concrete) tokens outside the vocabulary.

    Example:
      >>> states, ids = jnp.ones((1, 2, 1, 1)), jnp.array([[[0], [1]]])
      >>> unembedding_gram(states, ids, jnp.ones_like(ids), jnp.zeros((2, 1))).tolist()
      [[[0.5, -0.5], [-0.5, 0.5]]]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorem 6 (the coefficients).
    """
    kind, r = accumulator(states.dtype), states.shape[-3]

    def of_one(one: Example) -> Array:
        weights = response_weights(one.mask, kind, length_normalize=length_normalize)
        products = error_products(one, weights)

        def add(total: Array, probs: Array, rows: Array, words: Array) -> Array:
            return total + products(probs, words)

        return over_vocabulary(one, table, add, jnp.zeros((r, r), kind), chunk)

    return over_examples("unembedding_gram", of_one, states, targets, mask, table, chunk)


def error_products(one: "Example", weights: Float[Array, "r k"]) -> Callable[[Array, Array], Array]:
    """What the words of a chunk add to the Gram matrix, from their probabilities ``[r, k, c]`` and numbers."""
    r, k, d = one.states.shape
    few = r * k <= d
    states = jnp.einsum("rkd,sjd->rksj", one.states, one.states, precision="highest") if few else one.states

    def of_words(probs: Array, words: Array) -> Array:
        errors = (one_hot(one.targets, words, probs.dtype) - probs) * weights[:, :, None]
        if few:  # Coefficients, before products of states.
            errors = jnp.einsum("rkc,sjc->rksj", errors, errors, precision="highest")
            return jnp.einsum("rksj,rksj->rs", errors, states, precision="highest")
        grads = jnp.einsum("rkc,rkd->rcd", errors, states, precision="highest")  # of rows of W
        return jnp.einsum("rcd,scd->rs", grads, grads, precision="highest")

    return of_words


class Example(NamedTuple):
    """One example: states in the type that sums are taken in, tokens and mask as integers."""

    states: Float[Array, "r k d"]
    targets: Int[Array, "r k"]
    mask: Int[Array, "r k"]


def over_examples(
    where: str,
    of_one: Callable[[Example], Any],
    states: Array,
    targets: Any,
    mask: Any,
    table: Array,
    chunk: int | None,
) -> Any:
    """Checks the arrays, and maps ``of_one`` over their leading axes, an example at a time."""
    shape = states.shape[:-1]
    fits = states.ndim >= 3 and np.shape(targets) == np.shape(mask) == shape and table.shape[1:] == states.shape[-1:]
    shapes = f"{states.shape}, {np.shape(targets)}, {np.shape(mask)} and {table.shape}"
    rule = "states must be [*n, r, k, d], targets and mask [*n, r, k], the table [v, d]"
    require(fits, where, rule, shapes, "Take them from one ResponseBatch and one network")
    require(chunk is None or chunk >= 1, where, "chunk must be at least 1", chunk, "Leave it out, or use 8192")
    require_ids(where, "targets", targets, table.shape[0])
    kind = accumulator(states.dtype)
    flat = [jnp.reshape(jnp.asarray(a), (-1, *a.shape[len(shape) - 2 :])) for a in (states, targets, mask)]

    def prepared(one: list[Array]) -> Any:
        states = jnp.where(one[2][..., None] > 0, one[0], 0).astype(kind)
        return of_one(Example(states, one[1].astype(jnp.int32), (one[2] > 0).astype(jnp.int32)))

    out = jax.lax.map(prepared, flat)
    return jax.tree.map(lambda a: a.reshape(*shape[:-2], *a.shape[1:]), out)


def over_vocabulary(
    one: Example, table: Array, add: Callable[[Any, Array, Array, Array], Any], start: Any, chunk: int | None
) -> Any:
    """``total = add(total, probs [r, k, c], rows [c, d], words [c])`` for the words of every chunk.

    Words that a chunk shares with the one before have probability 0, row 0 and number -1 there.
    """
    v, kind, (r, k, d) = table.shape[0], one.states.dtype, one.states.shape
    fits = HELD // (r * (k if r * k <= d else k + d))
    count = -(-v // min(v, chunk or max(1, fits)))
    size = -(-v // count)

    def piece(i: Array) -> tuple[Array, Array, Array]:
        first = jnp.minimum(i * size, v - size)
        words = first + jnp.arange(size, dtype=i.dtype)
        new = words >= i * size
        rows = jax.lax.dynamic_slice_in_dim(table, first, size).astype(kind)
        logits = jnp.einsum("rkd,cd->rkc", one.states, rows, precision="highest")
        words = jnp.where(new, words, -1)
        return jnp.where(new[None, None], logits, -jnp.inf), jnp.where(new[:, None], rows, 0), words

    def normaliser(sums: Array, i: Array) -> tuple[Array, None]:
        return jnp.logaddexp(sums, jax.nn.logsumexp(piece(i)[0], axis=-1)), None

    def step(total: Any, i: Array) -> tuple[Any, None]:
        logits, rows, words = piece(i)
        return add(total, jnp.exp(logits - sums[:, :, None]), rows, words), None

    chunks = jnp.arange(count, dtype=jnp.int32)
    if count == 1:  # The logits are then made once.
        logits, rows, words = piece(chunks[0])
        return add(start, jax.nn.softmax(logits, axis=-1), rows, words)
    sums, _ = jax.lax.scan(normaliser, jnp.full(one.targets.shape, -jnp.inf, kind), chunks)
    return jax.lax.scan(step, start, chunks)[0]


def one_hot(targets: Int[Array, "r k"], words: Int[Array, "c"], kind: Any) -> Float[Array, "r k c"]:
    """1 where a token is the word."""
    return (targets[:, :, None] == words[None, None]).astype(kind)


def response_weights(mask: Int[Array, "*r k"], kind: Any, *, length_normalize: bool) -> Float[Array, "*r k"]:
    """1 at tokens, or one over their number."""
    weights = (mask > 0).astype(kind)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1) if length_normalize else weights


def require_ids(where: str, name: str, ids: Any, count: int) -> None:
    """Raises unless concrete ids lie in the vocabulary."""
    if not is_concrete(ids):
        return
    values = np.asarray(ids)
    inside = values.size == 0 or (int(values.min()) >= 0 and int(values.max()) < count)
    shown = "none" if values.size == 0 else f"{int(values.min())}..{int(values.max())}"
    advice = "Use the tokenizer of the checkpoint"
    require(inside, where, f"{name} must lie in 0..{count - 1}", shown, advice)
