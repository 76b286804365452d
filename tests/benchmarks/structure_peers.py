"""What the structure benchmark is measured against: torch-struct, NLTK, and a CKY in plain jax, differentiated.

SynJax and discodop are not here: the first is on no package index, the C sources that the second publishes do not
compile for Python 3.11 (``longintrepr.h``).
"""

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.structure import PCFG, SparsePCFG
from jaxft.structure.pcfg import num_nonterminals

__all__ = ["log_partition_by_scan", "marginals_by_scan", "nltk_grammar", "nltk_sampler", "torch_struct_cfg"]

IMPOSSIBLE = -1e30


def log_partition_by_scan(grammar: PCFG, terms, extra):
    """Log partition of full-length sentences: one scan over widths, padded splits, all symbols alike.

    Args:
      grammar: Rules as one tensor.
      terms: Log scores of the preterminals, ``[b, t, q]``.
      extra: Added to the log inside probability of each span, ``[b, t, t + 1, a]``: its gradient are the posteriors.
    """
    b, t, _ = terms.shape
    a = grammar.log_root.shape[0]
    s = a - terms.shape[2]
    rule = jnp.exp(grammar.log_rule).reshape(s, a * a)
    words = jnp.concatenate([jnp.full((b, t, s), IMPOSSIBLE), terms], axis=2)
    chart = jnp.full((b, t, t + 1, a), IMPOSSIBLE).at[:, :, 1].set(words + extra[:, :, 1])
    start, split = jnp.arange(t)[:, None], jnp.arange(1, t)[None]

    def step(chart, width):
        possible = ((split < width) & (start + width <= t))[None, :, :, None]
        left = jnp.where(possible, chart[:, :, 1:t], IMPOSSIBLE)
        right = chart[:, jnp.minimum(start + split, t - 1), jnp.maximum(width - split, 0)]
        top_left = jax.lax.stop_gradient(left.max(axis=3))
        top_right = jax.lax.stop_gradient(jnp.maximum(right.max(axis=3), IMPOSSIBLE))
        base = (top_left + top_right).max(axis=2)
        weight = jnp.exp(top_left + top_right - base[..., None])[..., None]
        pairs = jnp.einsum(
            "bikx,biky->bixy", jnp.exp(left - top_left[..., None]) * weight, jnp.exp(right - top_right[..., None])
        )
        value = pairs.reshape(b, t, a * a) @ rule.T
        inside = (start[:, 0] + width <= t)[None, :, None]
        log_value = jnp.where(inside, jnp.log(jnp.where(inside, value, 1)) + base[..., None], IMPOSSIBLE)
        column = jnp.concatenate([log_value, jnp.full((b, t, a - s), IMPOSSIBLE)], axis=2)
        column += jax.lax.dynamic_index_in_dim(extra, width, 2, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(chart, column, width, 2), None

    chart, _ = jax.lax.scan(step, chart, jnp.arange(2, t + 1))
    return jax.nn.logsumexp(chart[:, 0, t, :s] + grammar.log_root[:s][None], axis=1)


@jax.jit
def marginals_by_scan(grammar: PCFG, terms):
    """Posteriors of spans (by start and width) and words and expected counts of rules, all by ``jax.grad``."""
    b, t, _ = terms.shape
    extra = jnp.zeros((b, t, t + 1, grammar.log_root.shape[0]))
    both = jax.grad(
        lambda rule, extra: log_partition_by_scan(grammar._replace(log_rule=rule), terms, extra).sum(), (0, 1)
    )
    return both(grammar.log_rule, extra)


def torch_struct_cfg(grammar: PCFG, tokens) -> Callable[[], Any]:
    """torch-struct's distribution of full-length sentences; it shares no rules, so each has a copy of its own."""
    import torch
    from torch_struct import SentCFG

    b = len(tokens)
    terms = torch.tensor(np.array(jnp.moveaxis(grammar.log_emit[:, tokens], 0, 2)))
    rules = torch.tensor(np.array(grammar.log_rule))[None].repeat(b, 1, 1, 1)
    roots = torch.tensor(np.array(grammar.log_root[: num_nonterminals(grammar)]))[None].repeat(b, 1)

    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SentCFG((terms, rules, roots))

    return make


def nltk_grammar(grammar: SparsePCFG, words: Sequence[str] | None = None):
    """The grammar as NLTK has it; of the lexicon the given words alone, and what they leave of a mass as one word."""
    from nltk.grammar import PCFG as NLTKGrammar
    from nltk.grammar import Nonterminal, ProbabilisticProduction

    names = grammar.names
    assert names is not None
    top, symbols = Nonterminal("*top*"), [Nonterminal(name) for name in names.symbols]
    s = num_nonterminals(grammar)
    root = np.exp(np.asarray(grammar.log_root, np.float64))
    made = [ProbabilisticProduction(top, [symbols[i]], prob=root[i]) for i in np.flatnonzero(root)]
    rules = (np.asarray(x).tolist() for x in (grammar.lhs, grammar.left, grammar.right))
    scores = np.exp(np.asarray(grammar.log_rule, np.float64)).tolist()
    made += [
        ProbabilisticProduction(symbols[parent], [symbols[left], symbols[right]], prob=p)
        for parent, left, right, p in zip(*rules, scores, strict=True)
    ]
    emit = np.exp(np.asarray(grammar.log_emit, np.float64))
    kept = range(len(names.words)) if words is None else sorted({names.words.index(word) for word in words})
    for tag, row in enumerate(emit):
        used = [i for i in kept if row[i] > 0]
        made += [ProbabilisticProduction(symbols[s + tag], [names.words[i]], prob=row[i]) for i in used]
        rest = row.sum() - row[used].sum()
        if rest > 1e-9:
            made.append(ProbabilisticProduction(symbols[s + tag], ["*rest*"], prob=rest))
    return NLTKGrammar(top, made)


def nltk_sampler(grammar, *, seed: int) -> Callable[[int], list[str] | None]:
    """Draws a sentence by expanding NLTK's productions at random; one that grows beyond a length is given up at once.

    NLTK itself lists sentences in order and does not draw them; the productions are looked up and weighted beforehand.
    """
    generator = random.Random(seed)
    choices: dict[Any, tuple[list[Any], list[float]]] = {}
    for production in grammar.productions():
        children, weights = choices.setdefault(production.lhs(), ([], []))
        children.append(production.rhs())
        weights.append((weights[-1] if weights else 0.0) + production.prob())

    def draw(longest: int) -> list[str] | None:
        stack, words = [grammar.start()], []
        while stack:
            if len(stack) + len(words) > longest:
                return None
            symbol = stack.pop()
            if isinstance(symbol, str):
                words.append(symbol)
            else:
                children, weights = choices[symbol]
                stack.extend(reversed(generator.choices(children, cum_weights=weights)[0]))
        return words

    return draw
