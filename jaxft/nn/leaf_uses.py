"""Which leaves of the parameters a computation uses at marked places only, and at which."""

from collections.abc import Mapping
from typing import Any

from jax.extend.core import Jaxpr, Var

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "scan")
"""Primitives that hand their operands over to a jaxpr as they are, or layer by layer."""


def marked_uses(jaxpr: Jaxpr, leaves: Mapping[Any, str], mark: str) -> dict[str, str]:
    """The leaf of every mark, of leaves with marked uses alone.

    A mark is a ``jax.ad_checkpoint.checkpoint_name`` put on a leaf. A use is anything else that is made of the leaf;
    one of what a mark returns is the mark's. Leaves that enter a loop with a condition, a branch, or a function with a
    derivative of its own, or that are returned, are taken to have uses without a mark.

    Args:
      jaxpr: The computation.
      leaves: Input variables that are leaves, and their paths.
      mark: Prefix of the names that are marks.

    Returns:
      Names of marks, without the prefix, to paths of leaves.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> def f(w, v, x):
      ...     return checkpoint_name(w, "tap:a") @ x + checkpoint_name(v, "tap:b") @ x + v[0]
      >>> jaxpr = jax.make_jaxpr(f)(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones(2)).jaxpr
      >>> marked_uses(jaxpr, dict(zip(jaxpr.invars, ["w", "v"])), "tap:")
      {'a': 'w'}
    """
    found: dict[str, list[str]] = {}
    others: set[str] = set()
    _walk(jaxpr, leaves, mark, found, others)
    # A name met twice would be one tap for two places.
    others.update(leaf for at in found.values() if len(at) > 1 for leaf in at)
    return {name: at[0] for name, at in found.items() if at[0] not in others}


def _walk(jaxpr: Jaxpr, leaves: Mapping[Any, str], mark: str, found: dict[str, list[str]], others: set[str]) -> None:
    def leaf_of(atom: Any) -> str | None:
        return leaves.get(atom) if isinstance(atom, Var) else None

    for eqn in _live(jaxpr):
        operands = [leaf_of(atom) for atom in eqn.invars]
        used = {leaf for leaf in operands if leaf is not None}
        if not used:
            continue
        name = str(eqn.params.get("name", ""))
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")) if eqn.primitive.name in CALLS else None
        if eqn.primitive.name == "name" and name.startswith(mark):
            found.setdefault(name.removeprefix(mark), []).extend(used)
        elif inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            passed = {v: leaf for v, leaf in zip(inner.invars, operands, strict=True) if leaf is not None}
            if eqn.primitive.name == "scan":
                others.update(passed.pop(v) for v in _carried(eqn, inner) if v in passed)
            _walk(inner, passed, mark, found, others)
        else:
            others |= used
    others.update(leaf for leaf in map(leaf_of, jaxpr.outvars) if leaf is not None)


def _carried(eqn: Any, inner: Jaxpr) -> list[Any]:
    """Variables of a loop's body that are carried from step to step, between its constants and its slices.

    Told by ranks, since the names of the loop's parameters change with jax: a slice has one axis less inside.
    """

    def same_rank(outer: Any, inside: Any) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inside, strict=True))

    constants = same_rank(eqn.invars, inner.invars) - same_rank(eqn.outvars, inner.outvars)
    return list(inner.invars[constants : same_rank(eqn.invars, inner.invars)])


def _live(jaxpr: Jaxpr) -> list[Any]:
    """The equations whose results are used; lifted loops leave others behind."""
    needed = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if isinstance(atom, Var))
    return kept[::-1]
