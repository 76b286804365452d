"""Which parameters are trained: masks over a parameter tree, by the names of its leaves.

A mask is a tree of Python bools like the parameters. Every kernel takes one as ``param_mask``: its gradients are those
of the true leaves, the others are constants. ``SUBSETS`` names the ones of the literature.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxft.core.checks import nearest, path_name, require
from jaxft.core.trees import tree_partition
from jaxft.core.types import Params

SUBSETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "all": {},
    "bitfit": {"only": (r"(^|/)(bias|b)(/value)?$",)},
    "without_embeddings": {"without": (r"(^|/)(embeddings?|embed|wte|wpe|token_embedding)(/|$)",)},
    "head": {"only": (r"^(classifier|mlm|head|lm_head)(/|$)",)},
    "adapters": {"only": (r"(^|/)(adapters?|lora|lora_[abAB])(/|$)",)},
}
"""Name -> regular expressions over leaf paths ``a/b/0``: biases (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199),
everything but the embeddings, the output head alone, adapters alone. Names are those of Linen, or of an NNX state."""


def parameter_mask(
    params: Params, subset: str | None = None, *, only: Sequence[str] = (), without: Sequence[str] = ()
) -> PyTree:
    """Mask of the leaves whose path matches.

    Args:
      params: Parameters, or their shapes.
      subset: A name of ``SUBSETS``, instead of patterns.
      only: Regular expressions, searched in leaf paths such as ``encoder/layers/mlp/in/bias``; a leaf that matches one
        is in. None given: all are in.
      without: Leaves that match one of these are out.

    Returns:
      A tree of bools like ``params``.

    Raises:
      UserError: An unknown subset, a subset and patterns at once, a pattern that matches no leaf, or no leaf left.

    Example:
      >>> import jax.numpy as jnp
      >>> parameter_mask({"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, "bitfit")
      {'dense': {'bias': True, 'kernel': False}}
    """
    where = "parameter_mask"
    if subset is not None:
        require(subset in SUBSETS, where, "unknown subset", repr(subset), nearest(subset, SUBSETS))
        require(not (only or without), where, "a subset goes without patterns", "both", "Pass one of them")
        only, without = SUBSETS[subset].get("only", ()), SUBSETS[subset].get("without", ())
    text = [name for name, patterns in (("only", only), ("without", without)) if isinstance(patterns, str)]
    require(
        not text, where, "patterns must be a sequence", f"a string for {' and '.join(text)}", 'Write only=["bias$"]'
    )
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    idle = [p for p in (*only, *without) if not any(re.search(p, name) for name in names)]
    shown = f"none for {', '.join(idle)} among {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    require(
        not idle,
        where,
        "every pattern must match a leaf of params",
        shown,
        "Give patterns, as only=[...], that fit the names of your parameters",
    )

    def is_in(name: str) -> bool:
        return (not only or any(re.search(p, name) for p in only)) and not any(re.search(p, name) for p in without)

    chosen = [is_in(name) for name in names]
    require(any(chosen), where, "the mask must leave a parameter", "none", "Give fewer patterns in without")
    return jax.tree.unflatten(jax.tree.structure(params), chosen)


def split_params(where: str, params: Params, param_mask: PyTree | None) -> tuple[Params, Params]:
    """Trained and frozen leaves, each with ``None`` in the place of the other.

    Raises:
      UserError: The mask is no tree of bools like ``params``; the leaves it has too many or too few are named.
    """
    if param_mask is None:
        _require_floats(where, params)
        return params, jax.tree.map(lambda _: None, params)
    given = not isinstance(param_mask, str)
    require(
        given, where, "param_mask must be a tree of bools", repr(param_mask), "Make it with parameter_mask(params, ...)"
    )
    flags, leaves = (
        {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(t)} for t in (param_mask, params)
    )
    strange = sorted(flags.keys() ^ leaves.keys())
    same = jax.tree.structure(param_mask) == jax.tree.structure(params)
    found = [f"{n} ({'mask' if n in flags else 'params'} alone)" for n in strange[:5]] or ["another nesting"]
    advice = "Make it with parameter_mask(params, ...)"
    require(same, where, "param_mask must have the tree of params", ", ".join(found), advice)
    other = [name for name, flag in flags.items() if not isinstance(flag, bool | np.bool_)]
    require(not other, where, "param_mask must hold Python bools", ", ".join(other[:5]), advice)
    require(any(flags.values()), where, "param_mask must leave a parameter", "none", advice)
    trained, frozen = tree_partition(params, param_mask)
    _require_floats(where, trained)
    return trained, frozen


def _require_floats(where: str, trained: Params) -> None:
    kinds = [(path_name(p), jnp.result_type(leaf)) for p, leaf in jax.tree_util.tree_leaves_with_path(trained)]
    other = [f"{name} of {dtype}" for name, dtype in kinds if not jnp.issubdtype(dtype, jnp.inexact)]
    rule = "trained parameters must be floats"
    require(not other, where, rule, ", ".join(other[:5]), "Leave these leaves out by a param_mask")
