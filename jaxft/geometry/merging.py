"""One model out of several: averages, task arithmetic, a mixing weight for every layer, low-rank adapters.

Everything here is a linear combination of leaves, computed in float32 or better and returned in the dtype of the
leaves; what the merged model is worth, ``eval_path`` and ``loss_barrier`` say. Models whose hidden units are in another
order are matched first (``weight_matching``).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import is_concrete, nearest, require, require_matching
from jaxft.core.trees import tree_sub
from jaxft.core.types import Params
from jaxft.core.units import map_named_leaves, named_leaves
from jaxft.geometry.paths import accumulation_dtype, require_floats

Weight = int | float | Float[Array | np.ndarray, ""]

Adapters = dict[str, dict[str, Array]]
"""Path of an adapted leaf -> ``lora_a [..., d_in, r]`` and ``lora_b [..., r, d_out]``."""


def interpolate(a: Params, b: Params, t: Weight) -> Params:
    """The point (1 - t) a + t b; t outside [0, 1] extrapolates.

    Args:
      a: Model at t = 0, returned exactly there.
      b: Model at t = 1, returned exactly there.
      t: Mixing weight.

    Returns:
      The mixed model.

    Raises:
      UserError: The trees do not match, or have leaves of integers; the leaves are listed.

    Example:
      >>> interpolate({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.25)["w"].tolist()
      [0.25, 0.25]
    """
    require_matching("interpolate", a, b, names=("a", "b"))
    require_floats("interpolate", a, "a")
    return jax.tree.map(lambda x, y: mix_leaves([x, y], [1 - t, t]), a, b)


def weighted_average(
    models: Sequence[Params],
    weights: Sequence[Any] | Float[Array | np.ndarray, "models"] | None = None,
    *,
    normalize: bool | None = None,
) -> Params:
    r"""The average $\sum_i w_i \theta_i$; whether the weights are divided by their sum has to be said.

    Args:
      models: Parameter trees of one model.
      weights: One each; equal by default.
      normalize: True divides the weights by their sum, False takes them as they are. None asks that they sum to 1,
        so that neither is done silently.

    Returns:
      The average.

    Raises:
      UserError: No models, models that do not match, weights of another number, or (concrete) weights that do not
        sum to 1 where ``normalize`` does not say what to do, or that sum to 0 where they are to be divided by that.

    Example:
      >>> models = [{"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}]
      >>> [float(weighted_average(models, [0.5, 1.5], normalize=x)["w"][0]) for x in (True, False)]
      [2.5, 5.0]

    Reference:
      Wortsman et al. 2022, arXiv 2203.05482 (the uniform soup).
    """
    where = "weighted_average"
    require(len(models) > 0, where, "there must be a model", "none", "Pass one or more")
    for i, model in enumerate(models[1:], 1):
        require_matching(where, models[0], model, names=("model 0", f"model {i}"))
    require_floats(where, models[0], "a model")
    weights = [1 / len(models)] * len(models) if weights is None else list(weights)
    fits = len(weights) == len(models)
    require(fits, where, "there must be a weight a model", f"{len(weights)} for {len(models)}", "Pass as many")
    if is_concrete(weights):
        total = float(sum(float(w) for w in weights))
        stated = normalize is not None or abs(total - 1) < 1e-6
        require(stated, where, "weights must sum to 1", f"{total:g}", "Say normalize=True or normalize=False")
        require(not normalize or total != 0, where, "weights to be normalized must not sum to 0", total, "Change them")
    scale = 1 / sum(weights) if normalize else 1
    return jax.tree.map(lambda *x: mix_leaves(x, [w * scale for w in weights]), *models)


def task_vector(base: Params, finetuned: Params) -> Params:
    """What fine-tuning added: ``finetuned - base``.

    Raises:
      UserError: The trees do not match; the leaves are listed.

    Example:
      >>> task_vector({"w": jnp.array([1.0])}, {"w": jnp.array([3.0])})["w"].tolist()
      [2.0]
    """
    require_matching("task_vector", base, finetuned, names=("base", "finetuned"))
    return tree_sub(finetuned, base)


def task_arithmetic(
    base: Params,
    finetuned: Sequence[Params],
    scales: Weight | Sequence[Any] | Float[Array | np.ndarray, "models"] = 1.0,
) -> Params:
    r"""Adds tasks to a model, $\theta + \sum_i s_i (\theta_i - \theta)$; a negative scale takes a task away.

    Args:
      base: The model that all were fine-tuned from.
      finetuned: Models of one task each.
      scales: One for all tasks, or one each.

    Returns:
      The edited model.

    Raises:
      UserError: No models, models that do not match, or scales of another number.

    Example:
      >>> tuned = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([1.0, 4.0])}]
      >>> task_arithmetic({"w": jnp.array([1.0, 0.0])}, tuned, [1.0, 0.5])["w"].tolist()
      [2.0, 2.0]

    Reference:
      Ilharco et al. 2023, arXiv 2212.04089, section 2.
    """
    where = "task_arithmetic"
    alone = isinstance(finetuned, Mapping)
    require(not alone, where, "finetuned must be a list of models", "one tree", "Pass [model] for one task")
    require(len(finetuned) > 0, where, "there must be a fine-tuned model", "none", "Pass one or more")
    for i, model in enumerate(finetuned):
        require_matching(where, base, model, names=("base", f"model {i}"))
    require_floats(where, base, "base")
    many = isinstance(scales, list | tuple) or np.ndim(scales) > 0
    steps: list[Any] = list(scales) if many else [scales] * len(finetuned)  # pyright: ignore[reportArgumentType]
    fits = len(steps) == len(finetuned)
    require(fits, where, "there must be a scale a model", f"{len(steps)} for {len(finetuned)}", "Pass one, or as many")
    return jax.tree.map(lambda x, *tuned: mix_leaves([x, *tuned], [1 - sum(steps), *steps]), base, *finetuned)


def layer_profile(
    a: Params,
    b: Params,
    profile: Mapping[str, Weight | Float[Array | np.ndarray, "l"]],
    *,
    default: float | None = None,
) -> Params:
    """Interpolates every layer by a weight of its own.

    Args:
      a: Model at t = 0.
      b: Model at t = 1.
      profile: Regular expression -> t, or one t a layer for leaves that stack layers on axis 0. They are searched in
        leaf paths such as ``layers/mlp/in/kernel``; the first that matches a leaf counts.
      default: t of leaves that nothing matches; without it they are an error.

    Returns:
      The mixed model.

    Raises:
      UserError: The trees do not match, a pattern that matches no leaf, leaves that no pattern matches, or a vector of
        t that does not fit the leading axis of a leaf.

    Example:
      >>> a, b = ({"attention": jnp.full(2, x), "mlp": jnp.full((2, 1), x)} for x in (0.0, 1.0))
      >>> mixed = layer_profile(a, b, {"attention": 0.5, "mlp": jnp.array([0.0, 1.0])})
      >>> mixed["attention"].tolist(), mixed["mlp"].tolist()
      ([0.5, 0.5], [[0.0], [1.0]])
    """
    where = "layer_profile"
    require_matching(where, a, b, names=("a", "b"))
    require_floats(where, a, "a")
    names = list(named_leaves(a))
    idle = [pattern for pattern in profile if not any(re.search(pattern, name) for name in names)]
    require(not idle, where, "every pattern must match a leaf", ", ".join(idle), f"Paths are like {names[0]}")
    first = {name: next((p for p in profile if re.search(p, name)), None) for name in names}
    lost = [name for name, pattern in first.items() if pattern is None]
    left = default is not None or not lost
    require(left, where, "every leaf must have a t", f"none for {', '.join(lost[:5])}", "Pass default=0.0 to keep a's")
    leaves_b = named_leaves(b)

    def mixed(name: str, x: Array) -> Array:
        pattern = first[name]
        t: Any = default if pattern is None else profile[pattern]
        if np.ndim(t):
            fits = np.ndim(t) == 1 and np.shape(x)[:1] == np.shape(t)
            shapes = f"{np.shape(t)} for {name} {np.shape(x)}"
            require(fits, where, "a vector of t must fit the layers on axis 0", shapes, "Pass one t a layer")
            t = jnp.reshape(jnp.asarray(t), (-1,) + (1,) * (np.ndim(x) - 1))
        return mix_leaves([x, leaves_b[name]], [1 - t, t])

    return map_named_leaves(mixed, a)


def interpolate_adapters(
    a: Adapters, b: Adapters, t: Weight, *, space: Literal["delta", "factors"] = "delta"
) -> Adapters:
    r"""Adapters between two sets of low-rank ones, whose change of a weight is $\Delta = A B$.

    ``delta``: adapters of the change $(1 - t) A_a B_a + t A_b B_b$, exactly, as factors of rank $r_a + r_b$: what
    interpolating the merged weights does. ``factors``: $(1 - t) A_a + t A_b$ and the same of B, of one rank r; the
    change is then quadratic in t and less by $t (1 - t) (A_a - A_b)(B_a - B_b)$, so that two sets of factors of one
    change give another in between. A scale on the change must be the same for both sets and is kept: one of the form
    alpha / r stays that of the parts, though the rank of ``delta`` is their sum.

    Args:
      a: Adapters at t = 0: path of a leaf -> ``lora_a [..., d_in, r]``, ``lora_b [..., r, d_out]``.
      b: Adapters at t = 1, of the same leaves.
      t: Mixing weight.
      space: What is interpolated.

    Returns:
      Adapters.

    Raises:
      UserError: An unknown space, adapters of other leaves, shapes that do not fit (for ``factors``, other ranks too).

    Example:
      >>> one = {"w": {"lora_a": jnp.array([[1.0]]), "lora_b": jnp.array([[1.0]])}}
      >>> flipped = {"w": {"lora_a": jnp.array([[-1.0]]), "lora_b": jnp.array([[-1.0]])}}
      >>> for space in ("delta", "factors"):
      ...     parts = interpolate_adapters(one, flipped, 0.5, space=space)["w"]
      ...     print((parts["lora_a"] @ parts["lora_b"]).tolist())
      [[1.0]]
      [[0.0]]

    Reference:
      Hu et al. 2021, arXiv 2106.09685, section 4.1 (the factors).
    """
    where = "interpolate_adapters"
    known = ("delta", "factors")
    require(space in known, where, "space must be delta or factors", repr(space), nearest(space, known))
    if space == "factors":
        require_matching(where, a, b, names=("a", "b"))
        return interpolate(a, b, t)
    differ = sorted(set(a) ^ set(b))
    require(not differ, where, "both must adapt the same leaves", f"{', '.join(differ[:5])} in one", "Drop them")

    def joined(name: str) -> dict[str, Array]:
        left, right = a[name], b[name]
        rows, columns = [
            (x["lora_a"].shape[:-1], (*x["lora_b"].shape[:-2], x["lora_b"].shape[-1])) for x in (left, right)
        ]
        require(
            rows == columns, where, f"changes of {name} must have one shape", f"{rows} and {columns}", "Adapt one W"
        )
        scaled = mix_leaves([left["lora_b"]], [1 - t]), mix_leaves([right["lora_b"]], [t])
        return {
            "lora_a": jnp.concatenate([left["lora_a"], right["lora_a"]], axis=-1),
            "lora_b": jnp.concatenate(scaled, axis=-2),
        }

    return {name: joined(name) for name in a}


def mix_leaves(leaves: Sequence[Array | np.ndarray], weights: Sequence[Any]) -> Array:
    """Weighted sum of leaves in float32 or better, in their dtype; a weight is a scalar or broadcasts."""
    kept = jnp.result_type(leaves[0])
    dtype = accumulation_dtype(kept)
    terms = [jnp.asarray(w, dtype) * jnp.asarray(x, dtype) for x, w in zip(leaves, weights, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.astype(kept)
