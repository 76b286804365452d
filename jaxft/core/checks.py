"""Input checks, every error in one form: ``<function>: <rule>, got <what>. <next step>.``."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array


class UserError(ValueError):
    """A fault of the user's input: its message alone is shown on the command line, exit status 2."""


def message(where: str, rule: str, got: Any, next_step: str) -> str:
    """The one form of an error message.

    Example:
      >>> message("slice_rows", "count must be positive", -1, "Pass count >= 1")
      'slice_rows: count must be positive, got -1. Pass count >= 1.'
    """
    end = "" if next_step.endswith(("?", ".")) else "."
    return f"{where}: {rule}, got {got}. {next_step}{end}"


def require(condition: bool, where: str, rule: str, got: Any, next_step: str) -> None:
    """Raises ``UserError`` (a ``ValueError``) in the one message form unless ``condition`` holds.

    Conditions are decided from static values (shapes, dtypes, options), so the check works under ``jit``.
    """
    if not condition:
        raise UserError(message(where, rule, got, next_step))


def is_concrete(tree: Any) -> bool:
    """Whether no leaf is traced, so that values can be looked at."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def nonfinite_leaves(tree: Any) -> list[str]:
    """Paths of the float leaves that hold a NaN or an infinity, in tree order.

    Example:
      >>> nonfinite_leaves({"a": jnp.ones(2), "b": {"c": jnp.array([jnp.nan])}})
      ['b/c']
    """
    return failing_leaves(lambda x: jnp.isfinite(x).all(), tree)


def failing_leaves(holds: Callable[[Array], Array], tree: Any) -> list[str]:
    """Paths of the float leaves of a concrete tree for which ``holds`` is false, in tree order.

    Values are looked at even while a caller is being traced, as long as the leaves themselves are concrete.
    """
    leaves = [(path, jnp.asarray(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    with jax.ensure_compile_time_eval():
        floats = [(path, x) for path, x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
        return [path_name(path) for path, x in floats if not bool(holds(x))]


def require_finite(where: str, tree: Any, name: str) -> None:
    """Raises if a concrete leaf of ``tree`` is not finite, naming the leaves; silent under tracing."""
    if is_concrete(tree):
        bad = nonfinite_leaves(tree)
        shown = f"NaN or infinity in {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}"
        require(not bad, where, f"{name} must be finite", shown, "Check the checkpoint or the step that made it")


def path_name(path: Iterable[Any]) -> str:
    """Key path of a pytree leaf as ``a/b/0``."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


MOST_NAMED = 20
"""Known words that a hint lists."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word, or else those that are known (no more than 20 of them).

    Example:
      >>> nearest("sst3", ["sst2", "rte"])
      'Did you mean sst2?'
      >>> nearest("zzz", ["sst2", "rte"])
      'Known: rte, sst2.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    return f"Known: {', '.join(known[:MOST_NAMED])}{more}."


def leading_size(where: str, tree: Any) -> int:
    """The common length of axis 0 over all leaves of ``tree``.

    Raises:
      UserError: A leaf is a scalar, or the lengths differ.
    """
    shapes = [np.shape(x) for x in jax.tree.leaves(tree)]
    require(
        bool(shapes) and all(s for s in shapes) and len({s[0] for s in shapes}) == 1,
        where,
        "all leaves must share a leading axis of examples",
        f"shapes {shapes}",
        "Stack examples on axis 0",
    )
    require(shapes[0][0] > 0, where, "there must be an example", "none", "Pass one or more")
    return shapes[0][0]


def require_matching(where: str, a: Any, b: Any, *, names: tuple[str, str] = ("the first", "the second")) -> None:
    """Raises unless two trees have the same paths, shapes and dtypes; the message lists what differs, by path.

    Example:
      >>> require_matching("line", {"w": jnp.ones(2)}, {"w": jnp.ones(2)})
      >>> require_matching("line", {"w": jnp.ones(2)}, {"w": jnp.ones(3)})
      Traceback (most recent call last):
      ...
      jaxft.core.checks.UserError: line: trees must match, got w: float32[2] and float32[3]. Pass points of one model.
    """
    said_a, said_b = _described(a), _described(b)
    faults = [f"{p}: {said_a[p]} and {said_b[p]}" for p in said_a if p in said_b and said_a[p] != said_b[p]]
    faults += [f"{p}: only in {names[0]}" for p in said_a if p not in said_b]
    faults += [f"{p}: only in {names[1]}" for p in said_b if p not in said_a]
    shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
    require(not faults, where, "trees must match", shown, "Pass points of one model")


def _described(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(p): f"{jnp.result_type(x)}[{','.join(map(str, np.shape(x)))}]" for p, x in leaves}
