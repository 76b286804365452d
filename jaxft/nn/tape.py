r"""Where a forward function records what the gradients of its matrices are made of.

A function that hands its matrix products, its look-ups and its Linen modules to a ``Tape`` can be run in three ways:
plainly, to find its taps, and with taps (``jaxft.core.factors`` says what a tap is). Inside a Linen module every
``nn.Dense``, ``nn.DenseGeneral`` and ``nn.Embed`` is found without its doing; other products and look-ups go through
``tape_of(self)``. What is found leaves a module through two collections: an ``nn.scan`` or ``nn.vmap`` that lists them,
``variable_axes={"params": 0, **TAP_AXES}``, passes them on, and one that does not leaves its parameters without taps.
"""

import contextvars
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Integer

from jaxft.core.checks import require
from jaxft.core.factors import TapKind
from jaxft.core.types import Params

TAPS, RECORDS = "taps", "tap_records"
TAP_AXES = {TAPS: 0, RECORDS: 0}
"""The collections of a recording, for the ``variable_axes`` of ``nn.scan`` and ``nn.vmap``."""

Product = Callable[[Array], Array]
"""Output of a use as a function of its weight."""


class Tape:
    """A tape that records nothing: every method is the plain operation."""

    def dense(self, x: Float[Array, "*n d"], kernel: Float[Array, "d c"]) -> Float[Array, "*n c"]:
        """The product ``x @ kernel``; the kernel is a leaf of the parameters."""
        return self._use("dense", kernel, x, lambda w: x @ w)

    def transposed(
        self, x: Float[Array, "*n d"], table: Float[Array, "v d"], *, out_dtype: Any = None
    ) -> Float[Array, "*n v"]:
        """The product ``x @ table.T``; the table is a leaf of the parameters.

        With ``out_dtype`` the table is taken in the dtype of ``x``, and the product summed and returned in this one.
        """
        if out_dtype is None:
            return self._use("transposed", table, x, lambda w: x @ w.T)
        matmul = partial(jnp.matmul, preferred_element_type=out_dtype)
        return self._use("transposed", table, x, lambda w: matmul(x, w.T.astype(x.dtype)))

    def rows(self, table: Float[Array, "v d"], ids: Integer[Array | np.ndarray, "*n"]) -> Float[Array, "*n d"]:
        """Rows ``ids`` of a leaf of the parameters; NaN for an id outside the table."""
        # Plain indexing would give a wrong row there.
        return self._use("rows", table, ids, lambda w: jnp.take(w, ids, axis=0))

    def apply(
        self,
        module: nn.Module,
        params: Params,
        *args: Any,
        at: str = "",
        constants: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """``module.apply`` with the parameters ``params``, and what the module itself uses recorded.

        Args:
          module: Any Linen module.
          params: Its own parameters.
          *args: Arguments of its call.
          at: Prefix of the names of its taps; the class of the module where empty.
          constants: Collections besides the parameters, such as running statistics.
          **options: Passed on to ``module.apply``; not ``mutable``.

        Returns:
          What the module returns.
        """
        immutable = "mutable" not in options
        require(immutable, "Tape.apply", "collections must be constant", "mutable", "Leave the option out")
        return self._run(module, {**(constants or {}), "params": params}, args, options, at or type(module).__name__)

    def _run(self, module: nn.Module, variables: dict, args: tuple, options: dict, label: str) -> Any:
        return module.apply(variables, *args, **options)

    def _use(self, kind: TapKind, weight: Array, record: Any, product: Product, split: int = 1) -> Array:
        """Output of a use; the last ``split`` axes of it are one axis of the matrix that the weight reshapes to."""
        return product(weight)


PLAIN = Tape()


class _RecordingTape(Tape):
    """Uses get names; each leaves its record and gets its tap, or in a search leaves the zeros that a tap would be."""

    searching: bool
    label: str

    def _use(self, kind, weight, record, product, split=1):
        i = 0
        while self._has(name := f"{kind}.{i}"):
            i += 1
        if self.searching:
            # Tells the uses of a leaf that have taps from those that have none (jaxft.nn.leaf_uses).
            weight = checkpoint_name(weight, MARK + self.label + name)
        out = product(weight)
        tap = self._tap(name)
        if tap is None and not self.searching:
            self._keep(RECORDS, name, ())
            return out
        self._keep(RECORDS, name, _row_numbers(record, weight) if kind == "rows" else record.astype(out.dtype))
        shape = (*out.shape[: out.ndim - split], math.prod(out.shape[out.ndim - split :]))
        if tap is None:
            self._keep(TAPS, name, jnp.zeros(shape, out.dtype))
            return out
        rule, got = "a tap must have the shape of its output", f"{self.label}{name}: {tap.shape} for {shape}"
        require(tap.shape == shape, "tapped", rule, got, "Make it from what f.taps says")
        return out + tap.reshape(out.shape)

    def _has(self, name: str) -> bool: ...

    def _tap(self, name: str) -> Array | None: ...

    def _keep(self, collection: str, name: str, value: Any) -> None: ...


MARK = "tap:"


def _row_numbers(ids: Any, table: Array) -> Array:
    ids = jnp.asarray(ids).astype(jnp.int32)
    return jnp.where(ids < 0, ids + table.shape[-2], ids)


class Recording(_RecordingTape):
    """The tape of one call with ``taps``, or without them of a search for those there are."""

    def __init__(self, taps: Mapping[str, Array] | None = None):
        self.searching, self.label = taps is None, ""
        self.taps: Mapping[str, Array] = taps or {}
        self.kept: dict[str, dict[str, Any]] = {TAPS: {}, RECORDS: {}}
        self.labels: set[str] = set()

    def _has(self, name):
        return name in self.kept[RECORDS]

    def _tap(self, name):
        return self.taps.get(name)

    def _keep(self, collection, name, value):
        self.kept[collection][name] = value

    def _run(self, module, variables, args, options, label):
        base, i = label, 0
        while label in self.labels:
            i += 1
            label = f"{base}.{i}"
        self.labels.add(label)
        prefix = f"{label}/"
        mine = {tuple(name.removeprefix(prefix).split("/")): tap for name, tap in self.taps.items()}
        mine = {path: tap for path, tap in mine.items() if f"{prefix}{'/'.join(path)}" in self.taps}
        mutable = [TAPS, RECORDS] if self.searching else [RECORDS]
        outer = _LABEL.set(prefix)
        try:
            with nn.intercept_methods(_intercept):
                variables = {**variables, TAPS: unflatten_dict(mine)}
                out, kept = module.apply(variables, *args, mutable=mutable, **options)
        finally:
            _LABEL.reset(outer)
        for collection in mutable:
            for path, value in flatten_dict(kept.get(collection, {})).items():
                self.kept[collection][prefix + "/".join(path)] = value
        return out


_LABEL: contextvars.ContextVar[str] = contextvars.ContextVar("label")
"""Prefix of the names while a recording tape applies a module."""


class _ModuleTape(_RecordingTape):
    """Uses within a module, kept in its variables: they come out of lifted transforms as arrays, stacked by layer."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.searching = module.is_mutable_collection(TAPS)
        self.label = "".join(f"{part}/" for part in (_LABEL.get().removesuffix("/"), *module.path))

    def _has(self, name):
        return self.module.has_variable(RECORDS, name)

    def _tap(self, name):
        return self.module.get_variable(TAPS, name) if self.module.has_variable(TAPS, name) else None

    def _keep(self, collection, name, value):
        self.module.put_variable(collection, name, value)


def tape_of(module: nn.Module) -> Tape:
    """The tape that a Linen module, in its call, hands its own products and look-ups to.

    Args:
      module: The module, bound: ``self``.

    Returns:
      The tape of the call that is recorded; one that records nothing in any other call.

    Example:
      >>> import jax
      >>> class Table(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, ids):
      ...         table = self.param("table", nn.initializers.ones, (5, 3))
      ...         return tape_of(self).rows(table, ids)
      >>> Table().init_with_output(jax.random.key(0), jnp.array([4, 0]))[0].shape
      (2, 3)
    """
    recorded = _LABEL.get(None) is not None and module.is_mutable_collection(RECORDS)
    return _ModuleTape(module) if recorded else PLAIN


def _intercept(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Gives every dense and embedding module its taps."""
    module, method = context.module, context.method_name
    kind, leaf = _USES.get((type(module), method), (None, ""))
    if kind is None or not _is_ordinary(module) or (tape := tape_of(module)) is PLAIN:
        return call(*args, **kwargs)
    own = module.variables["params"]
    if not isinstance(own[leaf], Array):
        return call(*args, **kwargs)
    x = jnp.asarray(args[0] if args else next(iter(kwargs.values())))
    record, split = x, 1
    if isinstance(module, nn.DenseGeneral):
        # In the order of the input, whatever order they are named in.
        axes = sorted(axis % x.ndim for axis in ((module.axis,) if isinstance(module.axis, int) else module.axis))
        last = jnp.moveaxis(x, axes, tuple(range(-len(axes), 0)))
        record = last.reshape(*last.shape[: x.ndim - len(axes)], -1)
        split = 1 if isinstance(module.features, int) else len(module.features)
    elif kind == "rows" and module.num_embeddings == 1:
        # A table of one row is given for any id.
        record = jnp.zeros_like(x)

    def product(weight: Array) -> Array:
        again = module.clone(parent=None)
        return cast(Array, again.apply({"params": {**own, leaf: weight}}, x, method=method))

    return tape._use(kind, own[leaf], record, product, split)


# Exact classes: what a subclass computes is not known.
_USES: Mapping[tuple[type, str], tuple[TapKind, str]] = {
    (nn.Dense, "__call__"): ("dense", "kernel"),
    (nn.DenseGeneral, "__call__"): ("dense", "kernel"),
    (nn.Embed, "__call__"): ("rows", "embedding"),
    (nn.Embed, "attend"): ("transposed", "embedding"),
}


def _is_ordinary(module: Any) -> bool:
    """Whether nothing of the module's product was replaced."""
    changed = getattr(module, "dot_general", None) or getattr(module, "dot_general_cls", None)
    return not changed and not getattr(module, "batch_dims", ()) and module.promote_dtype is promote_dtype
