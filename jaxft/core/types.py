"""Types and the one axis legend of the repository.

Axis names in shape annotations mean the same thing everywhere:

====  ====================================    ====  ==========================
name  axis                                    name  axis
====  ====================================    ====  ==========================
n, m  examples (rows, columns of a kernel)    d     width of a representation
b     examples of one batch                   h     attention heads
t     tokens                                  l     layers
i, j  ends of a span, half-open [i, j)        c     logits (classes)
v     vocabulary                              r     rank
s     nonterminals of a grammar               p     parameters, flattened
q     preterminals of a grammar               a     symbols: s, then q
====  ====================================    ====  ==========================
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

Params = Any
"""Pytree of float arrays: the point of a parameter space."""

Inputs = Any
"""Pytree of arrays that share a leading axis of examples."""

OutputFn = Callable[[Params, Inputs], Array]
"""``f(params, x)``: outputs of a batch of examples, ``[n]`` or ``[n, c]``; each row depends on its example alone."""

KeyedOutputFn = Callable[..., Array]
"""``f(params, x, *, key=None)``: an ``OutputFn``, and with a key a random version of it, such as one with dropout."""


@runtime_checkable
class Transform(Protocol):
    """An optax transform, or anything with its two functions: the mathematics takes one without knowing optax."""

    @property
    def init(self) -> Callable[..., Any]:
        """``init(params) -> state``."""
        ...

    @property
    def update(self) -> Callable[..., Any]:
        """``update(gradients, state, params) -> (updates, state)``."""
        ...


class TokenBatch(NamedTuple):
    """A padded batch of token sequences, the input of every encoder."""

    input_ids: Int[Array, "*b t"]
    """Token ids; padding is whatever the tokenizer pads with, and is masked."""
    attention_mask: Int[Array, "*b t"]
    """1 at tokens, 0 at padding."""
    token_type_ids: Int[Array, "*b t"]
    """Segment of each token; all 0 for models without segments."""
    mask_position: Int[Array, "*b"]
    """Index of the one mask token of a prompt; 0 where the input is no prompt."""


class Interval(NamedTuple):
    """An estimate, its standard error and a confidence interval."""

    estimate: float
    stderr: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0 (a NaN interval excludes nothing)."""
        return self.low > 0 or self.high < 0


Logits = Float[Array, "n c"]
Labels = Int[Array, "n"]
