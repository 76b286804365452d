r"""The transformer that executes Inside-Outside: weights of an attention model as a function of a grammar.

A sentence of n words is read with a begin token: token 0 begins, token t is word t, and token t stands for the gap
after word t. A span [i, j) lies between tokens i and j, and its charts stand at both of its ends, in slots numbered
by the other end: the inside probability $\alpha(A, i, j)$ in slot j of token i and in slot i of token j, the outside
probability $\beta(A, i, j)$ likewise. Sums over split points are then dot products of two tokens' slots, and one
attention score is one entry of a chart:

$\alpha(A,i,j) = \sum_{BC,k} P(A \to BC)\, \alpha(B,i,k)\, \alpha(C,k,j)$, of tokens i and j at offset j - i;
$\beta(A,i,j) = \sum_{BC,k>j} P(B \to AC)\, \beta(B,i,k)\, \alpha(C,j,k)
+ \sum_{BC,k<i} P(B \to CA)\, \alpha(C,k,i)\, \beta(B,k,j)$, of the same two tokens.

Layers of a model for L words: one that places words and roots, L - 1 for the inside probabilities of widths 2 to L,
L - 1 for the outside probabilities of widths L - 1 to 1. All layers of a pass share their weights and differ in the
offset they attend to. A slot that is not computed yet is 0, which is what cuts the sums to the right splits.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxft.core.checks import is_concrete, nearest, require
from jaxft.core.types import Params, TokenBatch
from jaxft.nn import ReluAttentionConfig
from jaxft.structure.pcfg import PCFG, LowRankPCFG, num_nonterminals, to_dense
from theory.pcfg_parsing import hard_weights, soft_weights
from theory.pcfg_parsing.layout import Attention, Coordinates, Heads, make_coordinates


class Construction(NamedTuple):
    """A model that executes Inside-Outside, and what is needed to speak to it."""

    config: ReluAttentionConfig
    params: Params
    coordinates: Coordinates
    grammar: PCFG
    tilt: float

    @property
    def max_tokens(self) -> int:
        """Longest sentence, in words."""
        return self.config.max_positions - 1


def inside_outside_transformer(
    grammar: PCFG | LowRankPCFG,
    max_tokens: int,
    *,
    attention: Attention = "soft",
    heads: Heads = "directional",
    tilt: float = 1.0,
    dtype: Any = None,
) -> Construction:
    """The model whose forward pass is Inside-Outside, for sentences of up to ``max_tokens`` words, masked or not.

    Exact for every grammar without unary rules. What the model computes is read by ``read_marginals`` and
    ``read_posterior``. The weights take O(heads x width x head dimension) numbers: a construction for toy grammars and
    for restrictions of large ones.

    Args:
      grammar: Concrete grammar, without unary rules; of low rank for ``heads="lowrank"``.
      max_tokens: L.
      attention: ``"soft"``: an attention score is a chart's entry. ``"hard"``: heads copy a neighbour's charts, and
        gated steps multiply.
      heads: Of soft attention: two a nonterminal, one a nonterminal in the inside layers (then a step keeps either
        chart to its side), or two (inside) and four (outside) a component of the rule tensor.
      tilt: Factor on every emission. Posteriors do not depend on it; a factor near ``exp(-log_z / n)`` keeps
        probabilities of long sentences within the range of float32.
      dtype: Of the parameters; ``None`` means the grammar's.

    Returns:
      Configuration, parameters and coordinates.

    Raises:
      UserError: Unary rules, a traced grammar, no words, a tilt that is not positive, or options that do not go
        together.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> model = inside_outside_transformer(random_pcfg(jax.random.key(0), 3, 4, 6), 8)
      >>> model.config.layers, model.config.width, max(model.config.heads[1:])
      (15, 123, 6)

    Reference:
      Zhao et al. 2023, arXiv 2303.08117, which states 2L layers, |N| heads a layer and 2|N|L dimensions. Storage by
      gaps, the first layer and the counts of ``layer_count``, ``head_counts`` and ``embedding_width`` are ours.
    """
    _check(grammar, max_tokens, attention, heads, tilt)
    dense = to_dense(grammar)
    s, q = num_nonterminals(dense), dense.log_emit.shape[0]
    at = make_coordinates(s, q, max_tokens + 1, attention, heads)
    writer: Any = hard_weights if attention == "hard" else soft_weights
    stages = writer.stages(grammar, at, max_tokens, heads)
    config = ReluAttentionConfig(
        vocab_size=dense.log_emit.shape[1] + 3,
        width=at.width,
        max_positions=max_tokens + 1,
        stages=tuple(stage for stage, _ in stages),
        attention="hard" if attention == "hard" else "relu",
    )
    params = {f"stage_{i}": weights for i, (_, weights) in enumerate(stages)}
    params["embeddings"] = _embeddings(dense, at, tilt)
    dtype = dense.log_rule.dtype if dtype is None else dtype
    params = {name: {k: jnp.asarray(v, dtype) for k, v in part.items()} for name, part in params.items()}
    return Construction(config, params, at, dense, float(tilt))


def _check(grammar: PCFG | LowRankPCFG, max_tokens: int, attention: str, heads: str, tilt: float) -> None:
    where = "inside_outside_transformer"
    require(is_concrete(grammar), where, "the grammar must be concrete", "a traced one", "Build the model before jit")
    plain = getattr(grammar, "log_unary", None) is None
    require(plain, where, "the grammar must have no unary rules", "log_unary", "Collapse unary chains first")
    require(max_tokens >= 1, where, "max_tokens must be at least 1", max_tokens, "Pass the longest sentence's length")
    known = {"attention": (attention, ("soft", "hard")), "heads": (heads, ("directional", "symmetric", "lowrank"))}
    for name, (value, values) in known.items():
        require(value in values, where, f"{name} must be known", repr(value), nearest(str(value), values))
    rule = "hard attention has no choice of heads"
    require(attention == "soft" or heads == "directional", where, rule, f"heads={heads!r}", "Leave heads out")
    rule, kind = "heads='lowrank' needs a LowRankPCFG", type(grammar).__name__
    require(heads != "lowrank" or isinstance(grammar, LowRankPCFG), where, rule, kind, "Use directional heads")
    require(0 < tilt < np.inf, where, "tilt must be positive and finite", tilt, "Pass, say, exp(-log_z / n)")


def _embeddings(grammar: PCFG, at: Coordinates, tilt: float) -> dict[str, np.ndarray]:
    """Tables of tokens (words, mask, begin, padding), positions and types (1: the last word)."""
    emit = tilt * np.exp(np.asarray(grammar.log_emit, np.float64))
    words, p = emit.shape[1], len(at.position)
    token, position = np.zeros((words + 3, at.width)), np.zeros((p, at.width))
    token_type = np.zeros((2, at.width))
    token[:words, at.word] = emit.T
    token[words, at.word] = emit.sum(axis=1)
    position[np.arange(p), at.position] = 1
    token_type[1, at.last] = 1
    return {"token": token, "position": position, "token_type": token_type}


def encode_sentences(
    model: Construction,
    tokens: Int[Array | np.ndarray, "b t"],
    lengths: Int[Array | np.ndarray, "b"] | None = None,
    *,
    mask: Bool[Array | np.ndarray, "b t"] | None = None,
) -> TokenBatch:
    """Sentences as the model reads them: with a begin token, the last word marked by its type.

    Args:
      model: The construction.
      tokens: Word ids.
      lengths: Words of each sentence; ``None`` means all. What lies beyond is ignored.
      mask: Words to hide.

    Returns:
      A batch of t + 1 tokens.

    Raises:
      UserError: More words than the model reads, no words, words outside the grammar, or lengths outside 1..t.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> model = inside_outside_transformer(random_pcfg(jax.random.key(0), 2, 2, 6), 4)
      >>> encode_sentences(model, jnp.array([[5, 1, 0]]), jnp.array([2]), mask=jnp.array([[True, False, False]]))[0]
      Array([[7, 6, 1, 8]], dtype=int32)
    """
    where, (b, t), words = "encode_sentences", tokens.shape, model.grammar.log_emit.shape[1]
    rule = f"sentences must have 1 to {model.max_tokens} words"
    require(1 <= t <= model.max_tokens, where, rule, t, "Construct the model for a larger max_tokens")
    lengths = jnp.full(b, t, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    hidden = jnp.zeros((b, t), bool) if mask is None else jnp.asarray(mask)
    if is_concrete((tokens, lengths, hidden)):
        _check_words(np.asarray(tokens), np.asarray(lengths), np.asarray(hidden), words)
    here = jnp.arange(t, dtype=jnp.int32)[None]
    inside = here < lengths[:, None]
    ids = jnp.where(hidden, jnp.int32(words), jnp.asarray(tokens, jnp.int32))
    ids = jnp.where(inside, ids, jnp.int32(words + 2))
    first = jnp.zeros((b, 1), jnp.int32)
    attend, last = inside.astype(jnp.int32), (here == lengths[:, None] - 1).astype(jnp.int32)
    ids, attend = (jnp.concatenate(pair, axis=1) for pair in ((first + words + 1, ids), (first + 1, attend)))
    return TokenBatch(ids, attend, jnp.concatenate([first, last], axis=1), first[:, 0])


def _check_words(tokens: np.ndarray, lengths: np.ndarray, hidden: np.ndarray, words: int) -> None:
    where, t = "encode_sentences", tokens.shape[1]
    rule, fits = f"lengths must lie in 1..{t}", (lengths >= 1) & (lengths <= t)
    require(bool(fits.all()), where, rule, lengths.tolist(), "Drop empty sentences, or pad further")
    read = tokens[(np.arange(t)[None] < lengths[:, None]) & ~hidden]
    wrong = read[(read < 0) | (read >= words)]
    rule = f"words must be numbers in 0..{words - 1}"
    require(not wrong.size, where, rule, wrong[:5].tolist(), "Map unknown words to one of the grammar's")
