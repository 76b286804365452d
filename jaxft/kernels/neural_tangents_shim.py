"""neural-tangents 0.6.5 on a jax that has moved on since its last release.

The package reads names that jax no longer has, and asks for tensorflow in a part that nothing here needs. Importing it
through ``load_neural_tangents`` lends jax those names for the time of the import, and replaces the few functions that
call what is gone. A name that jax still has is used as it is, and jax is left as it was found.
"""

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.interpreters.ad

PLACEHOLDER = "neural_tangents.experimental"
"""The part that asks for tensorflow and tf2jax; an empty module stands in its place."""


@functools.cache
def load_neural_tangents() -> types.ModuleType:
    """The package, made to run on this jax; the work is done once.

    Returns:
      The module ``neural_tangents``: its ``stax``, ``predict`` and empirical kernels work, ``experimental`` is empty.

    Raises:
      ModuleNotFoundError: The package, or frozendict, which it needs, is not installed.
    """
    lost = _lost_names()
    with _lent(lost), lenient_numpy():
        import neural_tangents
        from neural_tangents._src import empirical, predict
    _repair_empirical(empirical, lost)
    _repair_predict(predict)
    return neural_tangents


@contextlib.contextmanager
def lenient_numpy() -> Iterator[None]:
    """What the package was written for: lenient rules of jax.numpy, no deprecations; and exact matrix products."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _lost_names() -> dict[str, dict[str, Any]]:
    """Module -> names that the package reads from it and today's jax has moved or removed."""
    kinds = ("Jaxpr", "JaxprEqn", "Literal", "Var", "Primitive")
    no_context = types.SimpleNamespace(transform_name_stack=lambda _: contextlib.nullcontext())
    return {
        "jax.core": {name: getattr(jax.extend.core, name) for name in kinds}
        # Only asked whether a type is this one; none is any more.
        | {"DShapedArray": type("DShapedArray", (), {})},
        "jax.interpreters.ad": {
            "source_info_util": no_context,
            "config": types.SimpleNamespace(jax_enable_checks=False),
            # The key of a rule: no program contains it any more.
            "zeros_like_p": jax.extend.core.Primitive("zeros_like"),
        },
        "jax.util": {"safe_map": _safe_map, "safe_zip": lambda *lists: list(zip(*lists, strict=True))},
        PLACEHOLDER: {},
    }


def _safe_map(f: Callable, *lists) -> list:
    return [f(*items) for items in zip(*lists, strict=True)]


@contextlib.contextmanager
def _lent(lost: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Adds the names that are missing, and takes them away again."""
    with contextlib.ExitStack() as undo:
        for path, names in lost.items():
            module = _module(path)
            if module is None:
                module = sys.modules[path] = types.ModuleType(path)
                undo.callback(sys.modules.pop, path)
            for name, value in names.items():
                if not hasattr(module, name):
                    setattr(module, name, value)
                    undo.callback(delattr, module, name)
        yield


def _module(path: str) -> types.ModuleType | None:
    """The module, if there is one to be used."""
    if path == PLACEHOLDER:
        return sys.modules.get(path)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return None


def _repair_empirical(empirical: Any, lost: Mapping[str, Mapping[str, Any]]) -> None:
    """Functions that call the removed internals of linearize and transpose, by public means."""
    undefined = jax.interpreters.ad.UndefinedPrimal

    def primals_out_and_pullback(fn, mode, _j_rules, _s_rules, _fwd, *primals):
        leaves, tree = jax.tree.flatten(primals)
        with jax.disable_jit():
            out, tangent_map = jax.linearize(lambda *flat: fn(*tree.unflatten(flat)), *leaves)
            program = jax.make_jaxpr(tangent_map)(*leaves)

        def pullback(*cotangents):
            rules = {"_j_rules": _j_rules, "_s_rules": _s_rules, "_fwd": _fwd}
            inputs = [undefined(v.aval) for v in program.jaxpr.invars]
            given = tuple(jax.tree.leaves(cotangents))
            found = empirical._backward_pass(
                program.jaxpr, mode=mode, consts=program.consts, primals_in=inputs, cotangents_in=given, **rules
            )
            return tree.unflatten(found)

        return out, pullback

    def transpose_of_equation(eqn, cotangent, *operands):
        if eqn is None:
            return (cotangent,)
        if isinstance(cotangent, jax.interpreters.ad.Zero):
            return (None,) * len(operands)
        slots = [i for i, operand in enumerate(operands) if isinstance(operand, undefined)]

        def apply(*unknown):
            filled = dict(zip(slots, unknown, strict=True))
            return eqn.primitive.bind(*[filled.get(i, operand) for i, operand in enumerate(operands)], **eqn.params)

        shapes = [jax.ShapeDtypeStruct(operands[i].aval.shape, operands[i].aval.dtype) for i in slots]
        found = dict(zip(slots, jax.linear_transpose(apply, *shapes)(cotangent), strict=True))
        return tuple(found.get(i) for i in range(len(operands)))

    def flops(f, optimize, *args, **options):
        cost = jax.jit(f).lower(*args, **options).cost_analysis()
        return cost["flops"] if cost else 0.0

    empirical._get_primals_out_and_pullback = primals_out_and_pullback
    empirical._eqn_vjp_fn = transpose_of_equation
    empirical._get_flops = flops
    # These two modules it reads while it runs.
    empirical.core = types.SimpleNamespace(**lost["jax.core"] | vars(jax.core))
    empirical.ad = types.SimpleNamespace(**lost["jax.interpreters.ad"] | vars(jax.interpreters.ad))


def _repair_predict(predict: Any) -> None:
    """The range of eigenvalues is called ``subset_by_index`` in today's scipy."""
    linalg = predict.sp.linalg

    def eigvalsh(matrix, eigvals):
        return linalg.eigvalsh(matrix, subset_by_index=eigvals)

    predict.sp = types.SimpleNamespace(linalg=types.SimpleNamespace(**vars(linalg) | {"eigvalsh": eigvalsh}))
