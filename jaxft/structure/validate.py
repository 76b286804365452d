"""What is wrong with a grammar, all of it at once; and the grammar without the symbols that no derivation uses."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from jaxft.core.checks import is_concrete, require
from jaxft.structure.pcfg import PCFG, Grammar, LowRankPCFG, SparsePCFG, SymbolNames, num_nonterminals

_SHOWN = 8


def grammar_faults(grammar: Grammar, *, tolerance: float = 1e-4) -> list[str]:
    """Every fault of a concrete grammar, in words.

    Looked for are shapes that do not fit (then nothing else is), numbers that are no log probabilities, distributions
    (roots, rules of a nonterminal with its unary rules, words of a preterminal; factors of a low-rank grammar) that do
    not sum to one, children that are no symbols, rules listed twice, cycles of unary rules with mass 1 or more, symbols
    that no root reaches and symbols that derive no sentence.

    Args:
      grammar: The grammar.
      tolerance: Largest difference of a sum of probabilities from 1.

    Returns:
      The faults; empty for a valid grammar.

    Raises:
      UserError: The grammar is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> halves = jnp.log(jnp.array([[[0.0, 0.0], [0.0, 0.5]]]))
      >>> grammar_faults(PCFG(jnp.log(jnp.array([1.0, 0.0])), halves, jnp.log(jnp.ones((1, 1)))))
      ['the rules of nonterminal 0 sum to 0.5']
    """
    step = "Look at it before jit"
    require(is_concrete(grammar), "grammar_faults", "the grammar must be concrete", "a traced one", step)
    faults = _shape_faults(grammar)
    if faults:
        return faults
    faults = _number_faults(grammar) + _index_faults(grammar)
    if faults:
        return faults
    return _sum_faults(grammar, tolerance) + _cycle_faults(grammar) + _use_faults(grammar)


def require_valid(grammar: Grammar, *, where: str = "require_valid", tolerance: float = 1e-4) -> None:
    """Raises if a grammar has faults, naming all of them.

    Args:
      grammar: A concrete grammar.
      where: Function that the error speaks for.
      tolerance: Largest difference of a sum of probabilities from 1.

    Raises:
      UserError: The faults, as ``grammar_faults`` has them.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> require_valid(random_pcfg(jax.random.key(0), 2, 3, 4))
    """
    faults = grammar_faults(grammar, tolerance=tolerance)
    more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
    require(not faults, where, "the grammar must be valid", "; ".join(faults[:20]) + more, "See grammar_faults")


def unary_spectral_radius(grammar: Grammar) -> float:
    """Spectral radius of the unary rules among nonterminals: below 1, chains of them close.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> unary_spectral_radius(random_pcfg(jax.random.key(0), 2, 3, 4))
      0.0
    """
    unary = _unary(grammar)
    if unary is None or not len(unary):
        return 0.0
    return float(np.abs(np.linalg.eigvals(unary[:, : len(unary)].astype(np.float64))).max())


def reachable_symbols(grammar: Grammar) -> Bool[np.ndarray, "a"]:
    """Symbols that a derivation from a root can hold.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> reachable_symbols(random_pcfg(jax.random.key(0), 2, 1, 4)).tolist()
      [True, True, True]
    """
    s = num_nonterminals(grammar)
    parents, children = _edges(grammar)
    seen = np.isfinite(np.asarray(grammar.log_root))
    while True:
        following = seen.copy()
        following[children[seen[:s][parents]]] = True
        if (following == seen).all():
            return seen
        seen = following


def productive_symbols(grammar: Grammar) -> Bool[np.ndarray, "a"]:
    """Symbols that derive a sequence of words.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> productive_symbols(random_pcfg(jax.random.key(0), 2, 1, 4)).tolist()
      [True, True, True]
    """
    s, a = num_nonterminals(grammar), grammar.log_root.shape[0]
    unary, rules = _unary(grammar), None if isinstance(grammar, LowRankPCFG) else _binary(grammar)
    seen = np.zeros(a, bool)
    seen[s:] = np.isfinite(np.asarray(grammar.log_emit)).any(axis=1)
    while True:
        following = seen.copy()
        if rules is not None:
            lhs, left, right = rules
            following[lhs[seen[left] & seen[right]]] = True
        elif isinstance(grammar, LowRankPCFG):
            head, left, right = (np.isfinite(np.asarray(x)) for x in grammar[1:4])
            following[:s] |= (head & ((left & seen).any(axis=1) & (right & seen).any(axis=1))).any(axis=1)
        if unary is not None:
            following[:s] |= ((unary > 0) & seen).any(axis=1)
        if (following == seen).all():
            return seen
        seen = following


def prune(grammar: Grammar) -> Grammar:
    """The grammar without symbols that no root reaches or that derive no sentence, and without their rules.

    Probabilities stay as they are, so that every sentence keeps its probability and every tree its score. What a
    parent gave to removed rules is lost, as it was before: its rules may sum to less than one.

    Args:
      grammar: A concrete grammar of one of the three kinds.

    Returns:
      One of the same kind, its symbols renumbered in their old order.

    Raises:
      UserError: No sentence has a derivation.

    Example:
      >>> import jax
      >>> from jaxft.structure.pcfg import random_pcfg
      >>> grammar = random_pcfg(jax.random.key(0), 3, 3, 4)
      >>> silent = grammar.log_emit.at[0].set(-jax.numpy.inf)
      >>> prune(grammar._replace(log_emit=silent)).log_rule.shape
      (3, 5, 5)
    """
    s = num_nonterminals(grammar)
    productive = productive_symbols(grammar)
    # What is reached through rules with an unproductive child is not reached in any derivation of a sentence.
    kept = productive & reachable_symbols(_without(grammar, productive))
    advice = "Check the roots and the lexicon"
    require(bool(kept.any()), "prune", "a root must derive a sentence", "none that does", advice)
    above, below = np.flatnonzero(kept[:s]), np.flatnonzero(kept[s:])
    names = grammar.names and SymbolNames(
        [grammar.names.nonterminals[i] for i in above],
        [grammar.names.preterminals[i] for i in below],
        grammar.names.words,
    )
    log_root, log_emit = grammar.log_root[kept], grammar.log_emit[below]
    if isinstance(grammar, LowRankPCFG):
        columns = (grammar.log_left[:, kept], grammar.log_right[:, kept])
        return LowRankPCFG(log_root, grammar.log_head[above], *columns, log_emit, names)
    unary = None if grammar.log_unary is None else grammar.log_unary[above][:, kept]
    if isinstance(grammar, PCFG):
        return PCFG(log_root, grammar.log_rule[above][:, kept][:, :, kept], log_emit, unary, names)
    number = np.cumsum(kept).astype(np.int32) - 1
    rules = [np.asarray(x) for x in grammar[1:4]]
    stays = kept[rules[0]] & kept[rules[1]] & kept[rules[2]] & np.isfinite(np.asarray(grammar.log_rule))
    lhs, left, right = (jnp.asarray(number[x[stays]]) for x in rules)
    # Preterminals and nonterminals keep their order, so a nonterminal's number among symbols is that among parents.
    return SparsePCFG(log_root, lhs, left, right, grammar.log_rule[np.flatnonzero(stays)], log_emit, unary, names)


def _unary(grammar: Grammar) -> np.ndarray | None:
    unary = None if isinstance(grammar, LowRankPCFG) else grammar.log_unary
    return None if unary is None else np.exp(np.asarray(unary))


def _binary(grammar: PCFG | SparsePCFG) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parents and children of the rules of positive probability."""
    present = np.isfinite(np.asarray(grammar.log_rule))
    if isinstance(grammar, PCFG):
        lhs, left, right = np.nonzero(present)
    else:
        lhs, left, right = (np.asarray(x)[present] for x in (grammar.lhs, grammar.left, grammar.right))
    return lhs, left, right


def _edges(grammar: Grammar) -> tuple[np.ndarray, np.ndarray]:
    """Each pair of a parent and a child of one of its rules."""
    if isinstance(grammar, LowRankPCFG):
        head, left, right = (np.isfinite(np.asarray(x)) for x in grammar[1:4])
        parents, children = np.nonzero(head.astype(np.int64) @ (left | right).astype(np.int64))
        return parents, children
    lhs, left, right = _binary(grammar)
    unary = _unary(grammar)
    above, below = np.nonzero(unary) if unary is not None else (lhs[:0], left[:0])
    return np.concatenate([lhs, lhs, above]), np.concatenate([left, right, below])


def _without(grammar: Grammar, kept: np.ndarray) -> Grammar:
    """The grammar with no rule that needs a symbol which is not kept; the symbols stay."""
    absent = -np.inf
    if isinstance(grammar, LowRankPCFG):
        left, right = (np.where(kept, np.asarray(x), absent) for x in (grammar.log_left, grammar.log_right))
        alive = np.isfinite(left).any(axis=1) & np.isfinite(right).any(axis=1)
        head = np.where(alive, np.asarray(grammar.log_head), absent)
        return grammar._replace(log_head=jnp.asarray(head), log_left=jnp.asarray(left), log_right=jnp.asarray(right))
    unary = grammar.log_unary if grammar.log_unary is None else np.where(kept, np.asarray(grammar.log_unary), absent)
    if isinstance(grammar, PCFG):
        whole = kept[:, None] & kept[None, :]
    else:
        whole = kept[np.asarray(grammar.left)] & kept[np.asarray(grammar.right)]
    scores = jnp.asarray(np.where(whole, np.asarray(grammar.log_rule), absent))
    return grammar._replace(log_rule=scores, log_unary=unary if unary is None else jnp.asarray(unary))


def _shape_faults(grammar: Grammar) -> list[str]:
    root, emit, names = grammar.log_root, grammar.log_emit, grammar.names
    if root.ndim != 1 or emit.ndim != 2 or emit.shape[0] > root.shape[0]:
        return [f"log_root {root.shape} and log_emit {emit.shape} must be [a] and [q, v] with q <= a"]
    a, (q, v) = root.shape[0], emit.shape
    s = a - q
    wanted: dict[str, tuple[int, ...]] = {}
    if isinstance(grammar, PCFG):
        wanted = {"log_rule": (s, a, a)}
    elif isinstance(grammar, SparsePCFG):
        wanted = dict.fromkeys(("lhs", "left", "right", "log_rule"), (grammar.log_rule.size,))
    else:
        rank = grammar.log_head.shape[-1]
        wanted = {"log_head": (s, rank), "log_left": (rank, a), "log_right": (rank, a)}
    if not isinstance(grammar, LowRankPCFG) and grammar.log_unary is not None:
        wanted["log_unary"] = (s, a)
    arrays = {name: getattr(grammar, name) for name in wanted}
    faults = [f"{k} must be {shape}, is {arrays[k].shape}" for k, shape in wanted.items() if arrays[k].shape != shape]
    if names is not None:
        for kind, size in (("nonterminals", s), ("preterminals", q), ("words", v)):
            listed = getattr(names, kind)
            if len(listed) != size:
                faults.append(f"{len(listed)} names of {size} {kind}")
            if len(set(listed)) < len(listed):
                faults.append(f"names of {kind} occur twice")
    return faults


def _number_faults(grammar: Grammar) -> list[str]:
    faults = []
    for name, value in grammar._asdict().items():
        if name.startswith("log_") and value is not None:
            array = np.asarray(value)
            # Rounding may leave a certain event a little above log 1.
            bad = np.isnan(array) | (array > 1e-4)
            if bad.any():
                kind = "NaN" if np.isnan(array).any() else f"a probability of {np.exp(np.float64(array.max())):.4g}"
                faults.append(f"{name} holds {kind} at {tuple(int(i) for i in np.argwhere(bad)[0])}")
    return faults


def _index_faults(grammar: Grammar) -> list[str]:
    if not isinstance(grammar, SparsePCFG):
        return []
    s, a = num_nonterminals(grammar), grammar.log_root.shape[0]
    faults = []
    for name, limit in (("lhs", s), ("left", a), ("right", a)):
        index = np.asarray(getattr(grammar, name))
        outside = np.flatnonzero((index < 0) | (index >= limit))
        if len(outside):
            faults.append(f"{name} of rule {outside[0]} is {index[outside[0]]}, no number below {limit}")
    if not faults:
        rules = np.stack([np.asarray(x) for x in grammar[1:4]], axis=1)
        unique, counts = np.unique(rules, axis=0, return_counts=True)
        twice = [_rule_text(grammar, *rule) for rule in unique[counts > 1].tolist()]
        faults += [f"rules listed twice: {_some(twice)}"] if twice else []
    return faults


def _sum_faults(grammar: Grammar, tolerance: float) -> list[str]:
    s = num_nonterminals(grammar)
    sums = {"the roots": np.exp(np.asarray(grammar.log_root, np.float64)).sum(keepdims=True)}
    if isinstance(grammar, LowRankPCFG):
        factors = {"components of nonterminal": grammar.log_head}
        factors |= {"left children of component": grammar.log_left, "right children of component": grammar.log_right}
        sums |= {f"the {name}": np.exp(np.asarray(x, np.float64)).sum(axis=1) for name, x in factors.items()}
    else:
        scores = np.exp(np.asarray(grammar.log_rule, np.float64))
        if isinstance(grammar, PCFG):
            rules = scores.sum(axis=(1, 2))
        else:
            rules = np.bincount(np.asarray(grammar.lhs), scores, minlength=s)
        unary = _unary(grammar)
        sums["the rules of"] = rules if unary is None else rules + unary.sum(axis=1)
    sums["the words of"] = np.exp(np.asarray(grammar.log_emit, np.float64)).sum(axis=1)
    faults = []
    for what, total in sums.items():
        for i in np.flatnonzero(~(np.abs(total - 1) <= tolerance)):
            owner = {"the rules of": int(i), "the words of": int(i) + s}.get(what)
            name = _symbol(grammar, owner) if owner is not None else "" if what == "the roots" else str(i)
            faults.append(f"{what} {name}".rstrip() + f" sum to {total[i]:.6g}")
    return faults


def _cycle_faults(grammar: Grammar) -> list[str]:
    radius = unary_spectral_radius(grammar)
    if radius < 1 - 1e-6:
        return []
    unary = _unary(grammar)
    square = np.zeros((0, 0)) if unary is None else unary[:, : len(unary)]
    # The symbols of the cycle are where the leading eigenvector lives.
    values, vectors = np.linalg.eig(square)
    vector = np.abs(vectors[:, np.abs(values).argmax()])
    held = [_symbol(grammar, int(i)) for i in np.flatnonzero(vector > 1e-6 * vector.max())]
    return [f"unary rules form a cycle of mass {radius:.6g}, not below 1, through {_some(held)}"]


def _use_faults(grammar: Grammar) -> list[str]:
    faults = []
    for what, fine in (
        ("no root reaches", reachable_symbols(grammar)),
        ("no words come from", productive_symbols(grammar)),
    ):
        names = [_symbol(grammar, int(i)) for i in np.flatnonzero(~fine)]
        faults += [f"{what} {_some(names)}"] if names else []
    return faults


def _symbol(grammar: Grammar, i: int) -> str:
    if grammar.names is not None:
        return grammar.names.symbols[i]
    s = num_nonterminals(grammar)
    return f"nonterminal {i}" if i < s else f"preterminal {i - s}"


def _rule_text(grammar: Grammar, lhs: int, left: int, right: int) -> str:
    return f"{_symbol(grammar, lhs)} -> {_symbol(grammar, left)} {_symbol(grammar, right)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
