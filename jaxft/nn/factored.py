"""Output functions, of Linen modules and others, that hand over the factors of their gradients."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxft.core.checks import nearest, path_name, require
from jaxft.core.factors import Tap, TapKind
from jaxft.core.types import Inputs, Params
from jaxft.nn.leaf_uses import marked_uses
from jaxft.nn.tape import MARK, PLAIN, RECORDS, TAPS, Recording, Tape


class Factored:
    """``f(params, x)`` with taps, made of ``fn(params, x, tape)``; equal to one made of the same ``fn``."""

    def __init__(self, fn: Callable[..., Array]):
        self.fn = fn
        self.__name__: str = getattr(fn, "__name__", type(fn).__name__)
        self.__qualname__: str = getattr(fn, "__qualname__", self.__name__)
        self.__doc__ = fn.__doc__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factored) and self.fn == other.fn

    def __hash__(self) -> int:
        return hash(self.fn)

    def __call__(self, params: Params, x: Inputs, **options: Any) -> Array:
        """The outputs; options, such as the key of dropout, go to ``fn``."""
        return self.fn(params, x, PLAIN, **options)

    def taps(self, params: Params, x: Inputs) -> dict[str, Tap]:
        """The taps by name, from shapes alone; those of a leaf only if every use of it has one.

        Costs one abstract evaluation.
        """

        def search(params: Params, x: Inputs) -> tuple[Array, dict[str, Any]]:
            tape = Recording()
            return self.fn(params, x, tape), tape.kept

        closed, (_, kept) = jax.make_jaxpr(search, return_shape=True)(params, x)
        named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
        names = [name for name, _ in named]
        leaves = {name: leaf for name, leaf in named if names.count(name) == 1}
        inputs = {v: name for v, name in zip(closed.jaxpr.invars, names, strict=False) if name in leaves}
        at = marked_uses(closed.jaxpr, inputs, MARK)
        taps = {
            name: Tap(at[name], cast(TapKind, name.rsplit("/", 1)[-1].split(".")[0]), zeros.shape, zeros.dtype)
            for name, zeros in kept[TAPS].items()
            if name in at
        }
        lost = {at[name] for name in at if name not in taps}
        lost |= {tap.leaf for name, tap in taps.items() if not _fits(tap, kept[RECORDS][name], leaves[tap.leaf])}
        return {name: tap for name, tap in taps.items() if tap.leaf not in lost}

    def tapped(self, params: Params, x: Inputs, taps: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Outputs with the taps added, and their records."""
        tape = Recording(taps)
        out = self.fn(params, x, tape)
        unknown = [name for name in taps if name not in tape.kept[RECORDS]]
        where, advice = (
            self.__qualname__.split(".<locals>")[0],
            nearest(unknown[0], tape.kept[RECORDS]) if unknown else "",
        )
        require(not unknown, where, "taps must be some of those that f.taps names", unknown[:5], advice)
        return out, {name: tape.kept[RECORDS][name] for name in taps}


def _fits(tap: Tap, record: Any, leaf: Any) -> bool:
    """Whether the axes before those of the matrix are those of the stack, as they must be, on tap and record."""
    between = record.shape if tap.kind == "rows" else record.shape[:-1]
    matrix = leaf.shape[-2:] if tap.kind == "rows" else (record.shape[-1], tap.shape[-1])
    stack, rest = divmod(leaf.size, math.prod(matrix))
    leading = [math.prod(between[:k]) for k in range(len(between) + 1)]
    return rest == 0 and between == tap.shape[:-1] and stack in leading


def factored(fn: Callable[..., Array]) -> Factored:
    """An output function that knows its taps, of one that hands what it does to a tape.

    Args:
      fn: ``fn(params, x, tape, **options)``: outputs ``[n]`` or ``[n, c]``, each row of its example alone. It may leave
        out of the tape what it likes: gradients of such leaves are taken whole.

    Returns:
      ``f(params, x, **options)``, a ``jaxft.core.factors.FactoredFn``.

    Example:
      >>> import jax.numpy as jnp
      >>> f = factored(lambda params, x, tape: tape.dense(x, params["kernel"]) + params["bias"][None])
      >>> params, x = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, jnp.ones((1, 3))
      >>> f(params, x).tolist(), f.taps(params, x)["dense.0"][:3]
      ([[3.0, 3.0]], ('kernel', 'dense', (1, 2)))
    """
    return Factored(fn)


def linen_outputs(
    module: nn.Module,
    *,
    select: Callable[[Any], Array] = lambda out: out,
    constants: Mapping[str, Any] | None = None,
    **options: Any,
) -> Factored:
    """Output function of any Linen module, with the taps of its ``nn.Dense``, ``nn.DenseGeneral`` and ``nn.Embed``.

    Modules made of these, such as ``nn.MultiHeadDotProductAttention``, are covered. Gradients of all other parameters,
    those of convolutions for instance, are taken whole, as are those of a matrix with a use that is not one of its
    module (a normalised weight, a kernel read by hand). Modules whose rows depend on each other are not covered.

    Args:
      module: The module; it is called with the inputs ``x``.
      select: Outputs ``[n]`` or ``[n, c]`` from what it returns.
      constants: Collections besides the parameters, such as running statistics.
      **options: Passed on to ``module.apply``, such as ``deterministic=True``.

    Returns:
      ``f(params, x)``, the parameters being those under ``"params"``.

    Example:
      >>> import jax.numpy as jnp
      >>> module, x = nn.Dense(2), jnp.ones((1, 3))
      >>> f = linen_outputs(module, select=lambda out: out[:, 0])
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> f(params, x).shape, {name: tap.leaf for name, tap in f.taps(params, x).items()}
      ((1,), {'Dense/dense.0': 'kernel'})
    """

    def outputs(params: Params, x: Inputs, tape: Tape) -> Array:
        return select(tape.apply(module, params, x, constants=constants, **options))

    return Factored(outputs)
