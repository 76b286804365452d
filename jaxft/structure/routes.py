"""The ways to run inside and outside over a grammar, and which of them to take.

All give the same numbers, as long as the probabilities of the symbols of a span are in the range of the floats (in
float32 within a factor of 1e-38 of the largest): what is less probable is 0, save in ``log``. ``scaled`` multiplies
matrices of scaled probabilities, ``log`` adds in log space and so bears any range, ``sparse`` goes rule by rule,
``low_rank`` works in the components of a low-rank grammar.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft.core.checks import is_concrete, nearest, require
from jaxft.structure import dense, low_rank, rule_trees, sparse
from jaxft.structure.chart import Recursion
from jaxft.structure.dense import NEVER
from jaxft.structure.pcfg import PCFG, Grammar, LowRankPCFG, SparsePCFG, num_nonterminals, to_dense, to_sparse
from jaxft.structure.semirings import FLOOR, LOG, as_element

Method = Literal["auto", "scaled", "log", "sparse", "low_rank"]

DENSE_BYTES = 2 * 2**30
"""Rules as one tensor may take so much."""
TRACED_BYTES = 64 * 2**20
"""Up to this size a sparse grammar whose lists are traced is made dense."""
GATHER_COST = 40.0
"""Operations of a matrix product in the time of one operation of the sparse route, on a CPU."""


class Route(NamedTuple):
    """One way to run a chart over a grammar of its kind."""

    kind: Callable[[Any], Any]
    """Makes the grammar one of the kind that the route works on."""
    recursion: Recursion
    setup: Callable[[Any, Array, int, Any], tuple[Any, Any]]
    """``setup(grammar, log_terms, chunks, groups)``: context and values of width 1."""
    view: Callable[[Any], tuple[Array, Array]]
    """From values to (p, s): p ``[b, t, widths, s]``, s ``[b, t, widths]``, a constant of differentiation."""
    sensitivity: Callable[[Any, Any, Any], Array]
    """``sensitivity(context, values, d_values)``: the derivative by p of every span, as p."""


def _setup_log(grammar: PCFG, log_terms: Array, chunks: int, _):
    rule, words = as_element(LOG, grammar.log_rule), as_element(LOG, log_terms)
    unary = None if grammar.log_unary is None else as_element(LOG, grammar.log_unary)
    return rule_trees.prepare(LOG, rule, words, unary, chunks=chunks)


def _view_log(values):
    top = jax.lax.stop_gradient(values[0].max(axis=3))
    p = jnp.where(values[0] > FLOOR / 2, jnp.exp(values[0] - top[..., None]), 0)
    return p, jnp.where(top > FLOOR / 2, top, NEVER)


def _sensitivity_log(_, values, d_values):
    p = _view_log(values)[0]
    return jnp.where(p > 0, d_values[0] / jnp.where(p > 0, p, 1), 0)


ROUTES: Mapping[str, Route] = {
    "scaled": Route(
        to_dense,
        dense.RECURSION,
        lambda grammar, log_terms, chunks, _: dense.prepare(grammar, log_terms, chunks=chunks),
        lambda values: values,
        lambda _, values, d_values: d_values[0],
    ),
    "log": Route(to_dense, rule_trees.make_recursion(LOG), _setup_log, _view_log, _sensitivity_log),
    "sparse": Route(
        to_sparse,
        sparse.RECURSION,
        lambda grammar, log_terms, chunks, groups: sparse.prepare(grammar, groups, log_terms, chunks=chunks),
        lambda values: (jnp.moveaxis(values[0], 0, 3), values[1]),
        lambda _, values, d_values: jnp.moveaxis(d_values[0], 0, 3),
    ),
    "low_rank": Route(
        lambda grammar: grammar,
        low_rank.RECURSION,
        lambda grammar, log_terms, chunks, _: low_rank.prepare(grammar, log_terms),
        lambda values: (values[0], values[3]),
        lambda context, values, d_values: low_rank.total_derivative(context, d_values),
    ),
}


class Plan(NamedTuple):
    """A route, why it was taken, and what it costs."""

    method: str
    reason: str
    flops: float
    """Operations of the inside pass; inside, outside and expected rule counts are about four times as many."""
    bytes: float
    """Of chart, rules and word tables, held through both passes."""

    def __str__(self) -> str:
        return f"{self.method}: {self.reason}; {self.flops / 1e9:.3g} GFLOP inside, {self.bytes / 2**20:.3g} MiB"


def explain(grammar: Grammar, *, batch: int, tokens: int, method: Method = "auto") -> Plan:
    r"""Which route a batch takes, why, and what the inside pass costs.

    Dense: $n^2 t^3 / 3 + n^3 t^2 + 4 n^2 q t + 2 n q^2 t$ operations a sentence, for n nonterminals and q preterminals.
    Sparse: $u t^3 / 3 + 2 R t^2$ for u pairs of children and R rules. Low rank: $r t^3 / 3 + 3 n r t^2$.

    Args:
      grammar: The grammar.
      batch: Sentences.
      tokens: Words of the longest.
      method: A route, or ``auto``.

    Returns:
      The plan.

    Raises:
      UserError: The route is unknown, or does not fit the grammar; a grammar without nonterminals, or in float16.

    Example:
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> explain(random_pcfg(jax.random.key(0), 3, 4, 6), batch=2, tokens=10).method
      'scaled'
    """
    known = get_args(Method)
    require(method in known, "explain", "method must be a route", repr(method), nearest(str(method), known))
    step = "Put one with a unary rule above the preterminals"
    require(num_nonterminals(grammar) > 0, "explain", "a grammar must have a nonterminal", "none", step)
    dtype = grammar.log_root.dtype
    rule = "scores must be able to hold 1e30"
    require(float(jnp.finfo(dtype).max) > 1e30, "explain", rule, dtype, "Use float32")
    costs = _costs(grammar, batch, tokens)
    if method == "auto":
        method, reason = _choose(grammar, costs)
    else:
        reason = "asked for"
        _require_fits(grammar, method)
    return Plan(method, reason, *costs[method])


def _choose(grammar: Grammar, costs: Mapping[str, tuple[float, float]]) -> tuple[Method, str]:
    if isinstance(grammar, LowRankPCFG):
        return "low_rank", "the grammar is given by its components"
    if not isinstance(grammar, SparsePCFG):
        return "scaled", "the grammar is dense"
    if _dense_bytes(grammar) > DENSE_BYTES:
        return "sparse", f"its rules as a tensor would take {_dense_bytes(grammar) / 2**30:.1f} GiB"
    if not is_concrete((grammar.lhs, grammar.left, grammar.right)):
        size, advice = _dense_bytes(grammar), "Close over the grammar instead of passing it to jit, or call without jit"
        rule = "the lists of rules of a large grammar must be concrete"
        require(
            size <= TRACED_BYTES, "inside_outside", rule, f"traced ones, {size / 2**20:.0f} MiB as a tensor", advice
        )
        return "scaled", "its lists of rules are traced, and it is small"
    ratio = costs["sparse"][0] * GATHER_COST / costs["scaled"][0]
    if ratio < 1:
        return "sparse", f"rule by rule takes {ratio:.2g} of the time of matrix products over all possible rules"
    return (
        "scaled",
        f"rule by rule would take {ratio:.2g} times as long as matrix products over all possible rules",
    )


def _require_fits(grammar: Grammar, method: Method) -> None:
    where = "inside_outside"
    fits = method != "low_rank" or isinstance(grammar, LowRankPCFG)
    require(fits, where, "method low_rank needs a LowRankPCFG", type(grammar).__name__, "Use method='auto'")
    if method in ("scaled", "log") and isinstance(grammar, SparsePCFG):
        size = _dense_bytes(grammar)
        rule = f"the rules as one tensor must fit {DENSE_BYTES / 2**30:.0f} GiB for method {method}"
        require(size <= DENSE_BYTES, where, rule, f"{size / 2**30:.1f} GiB", "Use method='sparse'")


def _dense_bytes(grammar: Grammar) -> int:
    a = grammar.log_root.shape[0]
    return num_nonterminals(grammar) * a * a * grammar.log_root.dtype.itemsize


def _costs(grammar: Grammar, b: int, t: int) -> dict[str, tuple[float, float]]:
    """Operations of the inside pass and bytes, by route."""
    n, q = num_nonterminals(grammar), grammar.log_emit.shape[0]
    size = grammar.log_root.dtype.itemsize
    chart = 4.0 * b * t * (t + 1) * n * size
    words = 4 * n * n * q * t + 2 * n * q * q * t
    inside = b * (n * n * t**3 / 3 + n**3 * t * t + words)
    table = _dense_bytes(grammar) + 2 * b * t * n * n * size
    terms = b * t * t / 4 * n * n * size  # in log space the sum over splits holds its terms
    costs = {"scaled": (inside, chart + table), "log": (inside, chart + table + terms)}
    if isinstance(grammar, SparsePCFG):
        rules = grammar.lhs.shape[0]
        pairs = min(rules, n * n)
        costs["sparse"] = b * (pairs * t**3 / 3 + 2 * rules * t * t), chart + b * t * t / 2 * pairs * size
    elif isinstance(grammar, LowRankPCFG):
        r = grammar.log_head.shape[1]
        costs["low_rank"] = b * (r * t**3 / 3 + 3 * n * r * t * t), chart * (1 + 2 * r / n)
    else:
        rules = n * (n + q) ** 2
        costs["sparse"] = b * (n * n * t**3 / 3 + 2 * rules * t * t), chart + b * t * t / 2 * n * n * size
    return costs
