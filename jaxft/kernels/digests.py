"""Digests of what a kernel depends on: arrays, and the mathematics of a function.

Two runs that have the same digests compute the same kernel; a stored kernel is only ever added to by such a run.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from jaxft.core.checks import path_name
from jaxft.core.trees import tree_combine, tree_partition
from jaxft.core.types import Inputs, OutputFn, Params

DIGEST_BYTES = 16
UNTOLD = ("name", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "debug_info")
"""Parameters of operations that change no number: names, and derivative rules (the derivatives are digested)."""
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")


def tree_digest(tree: PyTree) -> str:
    """Digest of the paths, dtypes, shapes and bytes of the leaves of a tree.

    Arrays of numpy and of JAX with the same content have the same digest, wherever they lie. The kinds of the nodes do
    not count, the paths do.

    Args:
      tree: Arrays or scalars.

    Returns:
      32 hexadecimal digits.

    Example:
      >>> tree_digest({"w": np.ones(2, np.float32)}) == tree_digest({"w": jnp.ones(2)})
      True
    """
    digest = _blake2b()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(_framed(path_name(path)))
        _add_array(digest, leaf)
    return digest.hexdigest()


def function_digest(f: OutputFn, params: Params, x: Inputs) -> str:
    r"""Digest of the operations of $f(\theta, x)$ and of its gradient in the floats of $\theta$, with their constants.

    Functions written differently that come down to the same operations agree; another constant, another order of the
    operations, another derivative rule or another shape do not. What a host callback does is not seen. Another version
    of JAX may write the same function in other operations.

    Args:
      f: Outputs of a batch.
      params: Parameters, or their shapes: values do not count.
      x: Inputs, or their shapes.

    Returns:
      32 hexadecimal digits.

    Example:
      >>> w, x = jnp.ones(2), jnp.ones((1, 2))
      >>> digest = function_digest(lambda w, x: 2 * x @ w, w, x)
      >>> digest == function_digest(lambda p, inputs: 2 * inputs @ p, w, x)
      True
      >>> digest == function_digest(lambda w, x: 3 * x @ w, w, x)
      False
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), (params, x))
    floats = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), shapes[0])

    def value_and_gradient(params: Params, x: Inputs) -> Any:
        trained, rest = tree_partition(params, floats)
        out, pull = jax.vjp(lambda p: f(tree_combine(p, rest), x), trained)
        return out, pull(jnp.ones_like(out))

    digest = _blake2b()
    _add(digest, jax.make_jaxpr(value_and_gradient)(*shapes))
    return digest.hexdigest()


def problem_digests(
    f: OutputFn,
    params: Params,
    x: Inputs,
    y: Inputs | None,
    *,
    preconditioner: PyTree | None = None,
    param_mask: PyTree | None = None,
) -> dict[str, str | None]:
    """What a kernel depends on besides its settings, by name: digests, and the version of JAX.

    Args:
      f: Outputs of a batch; its digest is taken at one example.
      params: Point of linearisation.
      x: Rows.
      y: Columns; ``None`` means ``x``.
      preconditioner: As for ``empirical_ntk``.
      param_mask: As for ``empirical_ntk``.

    Returns:
      A digest for each argument, ``None`` where it is ``None``.
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)[1:]), jnp.result_type(leaf)), x)
    trees = {"params": params, "x": x, "y": y, "preconditioner": preconditioner, "param_mask": param_mask}
    digests = {name: None if tree is None else tree_digest(tree) for name, tree in trees.items()}
    return {"jax": jax.__version__, "function": function_digest(f, params, one), **digests}


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _framed(text: str) -> bytes:
    """Text after its length, so that no two sequences of texts run into the same bytes."""
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _add_array(digest: Any, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    digest.update(_framed(f"{array.dtype.name}{array.shape}"))
    # Bytes, since not every dtype of JAX has a buffer that hashlib reads; a contiguous array is not copied.
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _add(digest: Any, value: Any) -> None:
    """Adds a part of a jaxpr; what has no form but its address is told by its type alone."""
    digest.update(_framed(type(value).__name__ if not isinstance(value, list) else "tuple"))
    if isinstance(value, ClosedJaxpr):
        _add(digest, value.jaxpr)
        _add(digest, tuple(value.consts))
    elif isinstance(value, Jaxpr):
        _add_operations(digest, value)
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        _add_array(digest, value)
    elif isinstance(value, list | tuple):
        digest.update(_framed(str(len(value))))
        for item in value:
            _add(digest, item)
    elif isinstance(value, Mapping):
        _add(digest, [item for key in sorted(value, key=str) for item in (str(key), value[key])])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, str | int | float | complex | bool | None) or not callable(value):
        text = repr(value)
        digest.update(_framed("" if ADDRESS.search(text) else text))


def _add_operations(digest: Any, jaxpr: Jaxpr) -> None:
    """Adds the operations in order, variables numbered by where they are first seen."""
    numbers: dict[Any, int] = {}

    def add_atoms(atoms: Any) -> None:
        digest.update(_framed(str(len(atoms))))
        for atom in atoms:
            digest.update(_framed(_described(atom.aval)))
            if isinstance(atom, Literal):
                _add(digest, atom.val)
            else:
                digest.update(_framed(str(numbers.setdefault(atom, len(numbers)))))

    add_atoms([*jaxpr.constvars, *jaxpr.invars])
    for operation in jaxpr.eqns:
        digest.update(_framed(operation.primitive.name))
        add_atoms(operation.invars)
        _add(digest, {key: value for key, value in operation.params.items() if key not in UNTOLD})
        add_atoms(operation.outvars)
    add_atoms(jaxpr.outvars)


def _described(aval: Any) -> str:
    return f"{getattr(aval, 'dtype', type(aval).__name__)}{getattr(aval, 'shape', '')}"
