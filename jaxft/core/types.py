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


class CausalTokens(NamedTuple):
    """Rows of tokens for a decoder, which may branch: a trunk, and continuations of it that do not see each other.

    Token i sees token j where j <= i and j is in the trunk or in the segment of i. An ordinary row is a trunk alone.
    """

    input_ids: Int[Array, "*b t"]
    """Token ids; at padding any id of the vocabulary."""
    segment_ids: Int[Array, "*b t"]
    """0 at padding, on whichever side; 1 in the trunk; 2, 3, ... in the branches."""
    positions: Int[Array, "*b t"]
    """Place of a token within its own text, from 0; a branch goes on from the end of the trunk."""


class ResponseBatch(NamedTuple):
    """Examples of a prompt with r responses each, laid out in s rows of tokens.

    Packed, an example is one row, the prompt as trunk and the responses as branches (s = 1); padded, it is a row a
    response (s = r). ``source`` counts columns through the s rows of an example laid end to end, from 0 to s t - 1, so
    that whoever reads it need not know the layout. Axes: n examples, s rows, t columns, r responses, k tokens of a
    response.
    """

    tokens: CausalTokens
    """Each field ``[n, s, t]``."""
    source: Int[Array, "n r k"]
    """Column whose hidden state predicts token k of the response: for the first, the last token of the prompt."""
    targets: Int[Array, "n r k"]
    """The tokens of the responses."""
    mask: Int[Array, "n r k"]
    """1 at tokens of a response, 0 beyond its end, where source and targets are 0."""


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
