r"""How a function hands over the factors of its gradients: the protocol between models and kernels.

The gradient of one example's output in a weight matrix is a product of two small arrays. Where the network computes
$y_t = x_t W$ at the tokens t, it is $\sum_t x_t \otimes \partial f / \partial y_t$. A *tap* is an array of zeros
that is added to such a $y$: differentiated in its taps a network gives every $\partial f / \partial y$ in one backward
pass, and nothing is as large as W. Three kinds of use of a leaf are told apart:

===============  ==========================  =====================================================================
``dense``        $y_t = x_t W$               the record is x, ``[*l, ..., d_in]``; the leaf is ``[*l, d_in, d_out]``
``transposed``   $y_t = x_t W^\top$          the record is x, ``[*l, ..., d_in]``; the leaf is ``[*l, d_out, d_in]``
``rows``         $y_t = W_{i_t}$             the record is the indices i, ``[*l, ...]``; the leaf is ``[*l, v, d]``
===============  ==========================  =====================================================================

The tap has the shape of y. Axes of the leaf other than the stacked layers ``l`` may be split further (heads, say), as
long as it reshapes to what stands above; the axes ``...`` between, tokens for instance, are summed over. A leaf may be
used several times, as the token table is that is also the decoder: every use has a tap of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array

from jaxft.core.types import Inputs, OutputFn, Params

TapKind = Literal["dense", "transposed", "rows"]


class Tap(NamedTuple):
    """One use of a leaf, as shapes tell it."""

    leaf: str
    """Path of the leaf, as ``jaxft.core.checks.path_name`` writes it."""
    kind: TapKind
    shape: tuple[int, ...]
    """Of the tap, for the inputs that were asked about."""
    dtype: Any


@runtime_checkable
class FactoredFn(Protocol):
    """An output function ``f(params, x)`` that also knows its taps.

    A leaf without a tap is no fault: its gradients are then taken whole. A leaf with a tap must have one for each of
    its uses, since the gradient of a use without one is lost (``jaxft.kernels.factor_check`` looks for that).
    """

    def __call__(self, params: Params, x: Inputs, **options: Any) -> Array:
        """Outputs ``[n]`` or ``[n, c]``, each row of its example alone."""
        ...

    def taps(self, params: Params, x: Inputs) -> dict[str, Tap]:
        """The taps by name, from shapes alone."""
        ...

    def tapped(self, params: Params, x: Inputs, taps: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Outputs with the taps added where they belong, and the record of every tap by the same names.

        Names that ``taps`` leaves out are neither added nor recorded.
        """
        ...


@dataclasses.dataclass(frozen=True)
class MappedOutputs:
    """``g(f(params, x))``, with the taps of ``f``."""

    f: FactoredFn
    g: Callable[[Array], Array]

    def __call__(self, params: Params, x: Inputs, **options: Any) -> Array:
        """The mapped outputs; options, such as the key of dropout, go to ``f``."""
        return self.g(self.f(params, x, **options))

    def taps(self, params: Params, x: Inputs) -> dict[str, Tap]:
        """Those of ``f``."""
        return self.f.taps(params, x)

    def tapped(self, params: Params, x: Inputs, taps: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The mapped outputs, and the records of ``f``."""
        out, records = self.f.tapped(params, x, taps)
        return self.g(out), records


def map_outputs(f: OutputFn, g: Callable[[Array], Array]) -> OutputFn:
    """``g(f(params, x))``; it has the taps of ``f`` where ``f`` has any.

    Args:
      f: Outputs of a batch.
      g: A map of them, example by example.

    Returns:
      The composed function.

    Example:
      >>> import jax.numpy as jnp
      >>> map_outputs(lambda w, x: x @ w, lambda out: -out)(jnp.ones(2), jnp.array([[1.0, 2.0]])).tolist()
      [-3.0]
    """
    return MappedOutputs(f, g) if isinstance(f, FactoredFn) else lambda params, x, **options: g(f(params, x, **options))
