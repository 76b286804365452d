r"""Noise stability of a ReLU network: the quantities of which a bound on the loss of its dropout networks is made.

Kuditipudi et al. adapt the definitions of Arora et al. 2018 (layer and interlayer cushion, activation contraction,
interlayer smoothness); they are stated here as they are computed. The norm of the Jacobian is the spectral one, where
Arora et al. have the Frobenius norm. At small scale the bound lies orders of magnitude above any loss: see ``vacuous``.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

from jaxft.core.checks import is_concrete, require, require_finite
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, named_leaves
from jaxft.geometry.paths import require_floats, widened
from jaxft.geometry.unit_chain import unit_chain

LIPSCHITZ = math.sqrt(2)
"""Of cross-entropy in the logits."""

Noise = Literal["gaussian", "dropout"]


class NoiseStability(NamedTuple):
    """Quantities of a network of d layers of weights with preactivations $x^i$; extremes over examples."""

    layer_cushions: Float[Array, "layers"]
    r"""Least $\lVert A_i \phi(x^{i-1}) \rVert / (\lVert A_i \rVert_F \lVert \phi(x^{i-1}) \rVert)$; at most 1."""
    interlayer_cushions: Float[Array, "layers layers"]
    r"""Entry (i, j), i <= j: least $\lVert x^j \rVert / (\lVert J^{i,j} \rVert_2 \lVert x^i \rVert)$; 1 for i = j, and
    infinite for i > j, where there is nothing."""
    minimal_cushions: Float[Array, "layers"]
    """Least interlayer cushion from each layer up."""
    contraction: Float[Array, ""]
    r"""Largest $\lVert x^i \rVert / \lVert \phi(x^i) \rVert$ over hidden layers; at least 1."""
    smoothness: Float[Array, ""]
    r"""Least $\rho = \lVert \eta \rVert \lVert x^j \rVert / (\lVert x^i \rVert \lVert M(x^i + \eta) - J (x^i + \eta)
    \rVert)$ over i < j, examples and draws of the noise; infinite where no ReLU flips."""
    spread: Float[Array, ""]
    r"""Largest $\lVert \phi(x^i) \rVert_\infty \sqrt{h_i} / \lVert \phi(x^i) \rVert$ over hidden layers."""
    epsilon: Float[Array, ""]
    r"""$\beta c\, d^{3/2} \max_x \lVert f(x) \rVert / (h_{\min}^{1/2} \min_i \mu_i \mu_{i \to})$, up to constants and
    logarithms."""
    vacuous: Bool[Array, ""]
    """Whether epsilon is not below the baseline."""
    preconditions: dict[str, Bool[Array, ""]]
    """What theorem 2 asks for besides, and whether it holds."""


def noise_stability(
    weights: Sequence[Float[Array | np.ndarray, "_ _"]],
    x: Real[Array | np.ndarray, "n d"],
    *,
    key: Array,
    noise: Noise = "gaussian",
    noise_frac: float = 0.1,
    dropout_frac: float = 0.5,
    draws: int = 12,
    lipschitz: float = LIPSCHITZ,
    baseline: float | None = None,
) -> NoiseStability:
    r"""Cushions, contraction, smoothness and the epsilon of theorem 2, of a ReLU network without biases.

    The Jacobian of $x^i \mapsto x^j$ is the product of the kernels with the ReLU pattern of each example, hence
    $J^{i,j} x^i = x^j$. One example is held at a time, with its d (d - 1) / 2 Jacobians and their singular values:
    time grows with the cube of the width. Where no unit of a layer answers to
    an example, the contraction is infinite, and so is epsilon.

    Args:
      weights: Kernels ``[d_in, d_out]`` from the inputs to the outputs, without biases; of a parameter tree by
        ``chain_weights``.
      x: Inputs.
      key: Of the noise.
      noise: ``gaussian``: of relative norm ``noise_frac`` at every hidden layer; ``dropout``: what dropping units of
        the layer below (each with chance ``dropout_frac``) does to the preactivations.
      noise_frac: Norm of Gaussian noise over the norm of the preactivations.
      dropout_frac: p, of dropout noise and of the condition on columns.
      draws: Draws of the noise an example and layer.
      lipschitz: Constant of the loss in the outputs.
      baseline: Loss from which on epsilon says nothing; log of the number of outputs (the cross-entropy of guessing) by
        default.

    Returns:
      The quantities.

    Raises:
      UserError: Fewer than two kernels, shapes that do not follow one another, values that are not finite, options out
        of range.

    Example:
      >>> found = noise_stability([jnp.eye(2), jnp.eye(2)], jnp.array([[1.0, 1.0]]), key=jax.random.key(0))
      >>> [round(float(x), 3) for x in (*found.layer_cushions, found.contraction, found.spread)]
      [0.707, 0.707, 1.0, 1.0]

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, definitions 2-4 and theorem 2; Arora et al. 2018, arXiv 1802.05296,
      section 3.
    """
    where = "noise_stability"
    require(len(weights) >= 2, where, "a network has two kernels or more", len(weights), "Pass all kernels in order")
    shapes = [np.shape(w) for w in weights]
    follow = all(len(s) == 2 for s in shapes) and all(a[1] == b[0] for a, b in itertools.pairwise(shapes))
    require(follow, where, "kernels must be [d_in, d_out] and follow one another", shapes, "Transpose or reorder them")
    fits = len(np.shape(x)) == 2 and np.shape(x)[1] == shapes[0][0] and np.shape(x)[0] > 0
    require(fits, where, f"x must be [n, {shapes[0][0]}]", np.shape(x), "Pass examples as rows")
    require(noise_frac > 0, where, "noise_frac must be positive", noise_frac, "Pass, say, 0.1")
    require(0 < dropout_frac < 1, where, "dropout_frac must lie in (0, 1)", dropout_frac, "Pass, say, 0.5")
    require(noise in ("gaussian", "dropout"), where, "noise must be gaussian or dropout", repr(noise), "Pass one")
    require(draws > 0, where, "draws must be positive", draws, "Pass, say, 12")
    require_floats(where, list(weights), "weights")
    require_finite(where, (list(weights), x), "weights and x")
    chance = math.log(shapes[-1][1]) if baseline is None else baseline
    # In float32 or better: singular values exist in no narrower dtype, and sums would be rounded.
    *arrays, x = jax.tree.leaves(widened([*weights, jnp.asarray(x, jnp.result_type(weights[0]))]))
    found = _quantities(arrays, x, key, noise == "dropout", draws, noise_frac, dropout_frac)
    return _assembled(found, arrays, lipschitz, chance, dropout_frac)


def chain_weights(params: Params, spec: PermutationSpec) -> list[Array]:
    """Kernels of a network of dense layers without biases, in order.

    Args:
      params: Parameters.
      spec: Where the hidden units lie.

    Returns:
      Kernels ``[d_in, d_out]``.

    Raises:
      UserError: A network that is no chain of one kernel a layer, or has biases or other leaves that are not 0.

    Example:
      >>> from jaxft.core.units import UnitAxis
      >>> spec = PermutationSpec((("w", (UnitAxis("hidden", 1),)), ("v", (UnitAxis("hidden", 0, reads=True),))))
      >>> [w.shape for w in chain_weights({"v": jnp.ones((4, 1)), "w": jnp.ones((3, 4))}, spec)]
      [(3, 4), (4, 1)]
    """
    where = "chain_weights"
    chain, leaves = unit_chain(params, spec, where=where), named_leaves(params)
    kernels, used = [], set()
    for members in (*(chain.layers[g] for g in chain.groups), chain.top):
        found = [leaf for leaf in members if np.ndim(leaves[leaf.path]) == 2]
        got = [leaf.path for leaf in found]
        require(len(found) == 1, where, "a layer must have one kernel with two axes", got, "Only dense layers fit")
        used.add(found[0].path)
        produces, kernel = found[0].produces, jnp.asarray(leaves[found[0].path])
        out_axis = 1 - found[0].reads.axis if found[0].reads else produces.axis if produces else 1
        kernels.append(kernel if out_axis == 1 else kernel.T)
    others = {path: leaf for path, leaf in leaves.items() if path not in used}
    if is_concrete(others):
        bad = [path for path, leaf in others.items() if np.any(np.asarray(leaf) != 0)]
        advice = "Noise stability is defined for networks of kernels alone: train without biases"
        require(not bad, where, "leaves other than kernels must be 0", ", ".join(bad[:5]), advice)
    return kernels


@functools.partial(jax.jit, static_argnums=(3, 4))
def _quantities(
    weights: list[Array], x: Array, key: Array, dropout: bool, draws: int, noise_frac: Array, dropout_frac: Array
) -> tuple[Array, ...]:
    """Extremes over examples: cushions, interlayer cushions, contraction, smoothness, spread, largest output."""

    def one(example: tuple[Array, Array]) -> tuple[Array, ...]:
        return _of_example(weights, *example, dropout, draws, noise_frac, dropout_frac)

    keys = jax.random.split(key, x.shape[0])
    mu, between, contraction, rho, spread, size = jax.lax.map(one, (x, keys))
    return mu.min(axis=0), between.min(axis=0), contraction.max(), rho.min(), spread.max(), size.max()


def _of_example(
    weights: list[Array], x: Array, key: Array, dropout: bool, draws: int, noise_frac: Array, dropout_frac: Array
) -> tuple[Array, ...]:
    depth, norm = len(weights), jnp.linalg.norm
    pre, act = [], [x]
    for w in weights:
        pre.append(act[-1] @ w)
        act.append(jax.nn.relu(pre[-1]))
    cushions = [_ratio(norm(p), norm(w) * norm(a)) for p, w, a in zip(pre, weights, act, strict=False)]
    hidden = list(zip(pre[:-1], act[1:-1], strict=True))
    contraction = jnp.stack([jnp.where(norm(p) > 0, _ratio(norm(p), norm(a)), 0) for p, a in hidden]).max()
    sizes = [jnp.sqrt(jnp.asarray(a.size, a.dtype)) for _, a in hidden]
    spread = jnp.stack(
        [jnp.where(norm(a) > 0, s * _ratio(a.max(), norm(a)), 0) for s, (_, a) in zip(sizes, hidden, strict=True)]
    )

    between = jnp.full((depth, depth), jnp.inf, x.dtype).at[jnp.arange(depth), jnp.arange(depth)].set(1)
    rho = jnp.asarray(jnp.inf, x.dtype)
    for i in range(depth - 1):
        noise = _noise(weights, pre, act, i, jax.random.fold_in(key, i), dropout, draws, noise_frac, dropout_frac)
        jacobian = jnp.eye(pre[i].size, dtype=x.dtype)
        moved = pre[i][None] + noise
        exact = moved
        for j in range(i + 1, depth):
            jacobian = (jacobian * (pre[j - 1] > 0).astype(x.dtype)[None]) @ weights[j]
            exact = jax.nn.relu(exact) @ weights[j]
            between = between.at[i, j].set(_ratio(norm(pre[j]), norm(jacobian, ord=2) * norm(pre[i])))
            gap = norm(exact - moved @ jacobian, axis=1)
            # Without a flip of a ReLU the map is linear up to rounding.
            linear = gap <= 100 * jnp.finfo(x.dtype).eps * norm(pre[j])
            ratio = _ratio(norm(noise, axis=1) * norm(pre[j]), jnp.where(linear, 0, norm(pre[i]) * gap))
            rho = jnp.minimum(rho, ratio.min())
    return jnp.stack(cushions), between, contraction, rho, spread.max(), norm(pre[-1])


def _ratio(a: Array, b: Array) -> Array:
    """A / b, infinite where b is 0: the definitions then hold with any constant, or with none."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.inf)


def _noise(
    weights: list[Array],
    pre: list[Array],
    act: list[Array],
    i: int,
    key: Array,
    dropout: bool,
    draws: int,
    noise_frac: Array,
    dropout_frac: Array,
) -> Float[Array, "draws d"]:
    """Noise on the preactivations of layer i. The inputs are not dropped, so the first layer has Gaussian noise."""
    if dropout and i > 0:
        kept = jax.random.bernoulli(key, 1 - dropout_frac, (draws, act[i].size))
        factor = kept.astype(act[i].dtype) / (1 - dropout_frac).astype(act[i].dtype) - 1
        return (factor * act[i][None]) @ weights[i]
    direction = jax.random.normal(key, (draws, pre[i].size), pre[i].dtype)
    length = noise_frac.astype(pre[i].dtype) * jnp.linalg.norm(pre[i])
    return length * direction / jnp.linalg.norm(direction, axis=1, keepdims=True)


def _assembled(
    found: tuple[Array, ...], weights: list[Array], lipschitz: float, baseline: float, dropout_frac: float
) -> NoiseStability:
    mu, between, contraction, rho, spread, size = found
    depth, widths = len(weights), [w.shape[1] for w in weights[:-1]]
    least = between.min(axis=1)
    constant = lipschitz * depth**1.5 / math.sqrt(min(widths))
    epsilon = jnp.asarray(constant, mu.dtype) * contraction * size / (mu * least).min()
    epsilon = jnp.where(jnp.isinf(contraction), jnp.inf, epsilon)
    # A column of A_i in the paper's layout is what one unit below feeds: a row of the kernel here.
    columns = [jnp.linalg.norm(w, axis=1).max() / jnp.linalg.norm(w) for w in weights[1:]]
    limit = jnp.asarray(math.sqrt(dropout_frac), mu.dtype)
    preconditions = {
        "smoothness >= 3 d": rho >= 3 * depth,
        "no column above sqrt(p) times the kernel": jnp.stack(columns).max() <= limit,
        "p <= 3/4": jnp.asarray(dropout_frac <= 0.75),
    }
    vacuous = ~(epsilon < jnp.asarray(baseline, epsilon.dtype))
    return NoiseStability(mu, between, least, contraction, rho, spread, epsilon, vacuous, preconditions)
