r"""Kernels of multilayer perceptrons of infinite width, and what makes those of finite ones tend to them.

The network is that of ``jaxft.nn.make_mlp``: dense layers, kernels drawn from $N(0, \sigma_w^2 / \text{fan-in})$ and
biases from $N(0, \sigma_b^2)$ (there 1 and 0), all trained. The kernel of gradient descent on it grows with the widths;
with the matrices trained at the rate 1 / fan-in (``ntk_parametrization_preconditioner``) it has a limit.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import is_concrete, message, nearest, path_name, require, require_finite
from jaxft.core.types import Params
from jaxft.kernels.neural_tangents_shim import lenient_numpy, load_neural_tangents

ACTIVATIONS = {"erf": "Erf", "gelu": "Gelu", "relu": "Relu"}
"""Activations with a closed form, and what neural-tangents calls them; gelu is the exact one."""


class InfiniteKernels(NamedTuple):
    """Kernels of one output at infinite width; those between two outputs are 0."""

    nngp: Float[Array, "n m"]
    """Covariance of the outputs over draws of the parameters."""
    ntk: Float[Array, "n m"]
    """Neural tangent kernel."""


def infinite_mlp_kernels(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"] | None = None,
    *,
    hidden_layers: int,
    activation: Literal["erf", "gelu", "relu"] = "relu",
    w_std: float = 1.0,
    b_std: float = 0.0,
    parameterization: Literal["ntk", "standard"] = "ntk",
    widths: Sequence[int] | None = None,
) -> InfiniteKernels:
    r"""Kernels of a multilayer perceptron as its hidden widths go to infinity, by neural-tangents.

    With $\Sigma_0(x, y) = x \cdot y / d$, $\Theta_0 = 0$ and $(u, v)$ Gaussian of covariance $K_l$,

    $K_l = \sigma_w^2 \Sigma_{l-1} + \sigma_b^2, \qquad \Sigma_l = E\, \phi(u) \phi(v),$

    $\Theta_l = r_l \Sigma_{l-1} + 1 + \sigma_w^2 \, E[\phi'(u) \phi'(v)] \, \Theta_{l-1},$

    the expectation in $\Theta_l$ being that of $K_{l-1}$. $K$ and $\Theta$ of the last layer are returned. The 1 is the
    gradient of a bias, which is trained even where it starts at 0. What a matrix is trained at decides $r_l$:

    ============  =============================================================================================
    ``ntk``       rate 1 / fan-in, $r_l = 1$: the limit of ``empirical_ntk`` with ``kernel="preconditioned"`` and
                  ``ntk_parametrization_preconditioner``
    ``standard``  rate 1, $r_l$ the fan-in of layer l: no limit, but what ``empirical_ntk`` with ``kernel="sgd"``
                  is at large ``widths``, up to a relative error that vanishes as they grow
    ============  =============================================================================================

    Finite-width corrections, other activations and training away from initialisation are not covered.

    Args:
      x: Rows.
      y: Columns; ``None`` means ``x``.
      hidden_layers: Layers before the last, each followed by the activation; 0 is the linear model.
      activation: Between layers.
      w_std: Standard deviation of a kernel's entries, times the square root of its fan-in.
      b_std: Standard deviation of the biases.
      parameterization: At what rate matrices are trained.
      widths: Widths of the hidden layers; goes with ``standard``, and only with it.

    Returns:
      Both kernels, of one output.

    Raises:
      UserError: Inputs that are no matrices of one width or (concrete) not finite, or with a row of zeros where relu
        without biases has no derivative there; a negative number of layers; an unknown option; a standard deviation
        that is not positive (``w_std``) or is negative (``b_std``); widths missing, misplaced or not one positive
        integer a hidden layer.
      ImportError: neural-tangents or frozendict is not installed.

    Example:
      >>> try:
      ...     kernels = infinite_mlp_kernels(jnp.eye(2), hidden_layers=1)
      ... except ImportError:  # neural-tangents is optional
      ...     kernels = arccosine_kernels(jnp.eye(2), hidden_layers=1)
      >>> [round(float(k), 4) for k in kernels.ntk[0]]
      [2.0, 1.3296]

    Reference:
      Lee et al. 2019, arXiv 1902.06720, section 2; Sohl-Dickstein et al. 2020, arXiv 2001.07301 (rates and widths);
      Novak et al. 2019, arXiv 1912.02803 (neural-tangents).
    """
    where = "infinite_mlp_kernels"
    _check_inputs(where, x, y, hidden_layers)
    _check_options(where, activation, w_std, b_std, parameterization)
    _check_widths(where, hidden_layers, parameterization, widths)
    if activation == "relu" and b_std == 0:
        _check_rows(where, x, y)
    try:
        stax = load_neural_tangents().stax
    except ModuleNotFoundError as error:
        how = 'Run pip install -e ".[infinite]" && pip install --no-deps neural-tangents'
        raise ImportError(message(where, "needs neural-tangents", f"no package {error.name}", how)) from error

    # Its layers give $r_l$ = fan-in / s. Under ``ntk`` hidden layers of width 1 and s = d at the first make it 1.
    scale = x.shape[1] if parameterization == "ntk" else 1
    layers: list[Any] = []
    for out in (*(widths or (1,) * hidden_layers), 1):
        options = {"W_std": w_std, "b_std": b_std, "parameterization": "standard", "s": (1 if layers else scale, 1)}
        layers += [stax.Dense(out, **options), getattr(stax, ACTIVATIONS[activation])()]
    with lenient_numpy():
        _, _, kernel_fn = stax.serial(*layers[:-1])
        found = kernel_fn(x, y, ("nngp", "ntk"))
    return InfiniteKernels(found.nngp.astype(x.dtype), found.ntk.astype(x.dtype))


def arccosine_kernels(
    x: Float[Array, "n d"], y: Float[Array, "m d"] | None = None, *, hidden_layers: int
) -> InfiniteKernels:
    r"""``infinite_mlp_kernels`` for relu, in closed form and without any package.

    For $\sigma_w = 1$, $\sigma_b = 0$ and ``parameterization="ntk"``: with $\theta$ the angle of $(u, v)$ under $K$,
    $E\, \phi(u) \phi(v) = \lVert u \rVert \lVert v \rVert (\sin\theta + (\pi - \theta) \cos\theta) / 2\pi$ and
    $E\, \phi'(u) \phi'(v) = (\pi - \theta) / 2\pi$. Without a gradient where two rows are parallel,
    so for ``y=None``. In float32 the NTK of parallel rows of ``x`` and ``y`` is off by some 1e-4.

    Args:
      x: Rows, none of them 0.
      y: Columns; ``None`` means ``x``.
      hidden_layers: Layers before the last, each followed by relu.

    Returns:
      Both kernels, of one output.

    Raises:
      UserError: Inputs that are no matrices of one width or (concrete) not finite or with a row of zeros, or a negative
        number of layers.

    Example:
      >>> kernels = arccosine_kernels(jnp.eye(2), hidden_layers=1)
      >>> [round(float(k), 4) for k in kernels.nngp[0]]
      [0.25, 0.0796]

    Reference:
      Cho and Saul 2009, equations 3 to 6; Jacot et al. 2018, arXiv 1806.07572, theorem 1.
    """
    where = "arccosine_kernels"
    _check_inputs(where, x, y, hidden_layers)
    _check_rows(where, x, y)
    d = jnp.asarray(x.shape[1], x.dtype)
    other = x if y is None else y
    product = jnp.sqrt(jnp.sum(x**2, axis=1)[:, None] * jnp.sum(other**2, axis=1)[None]) / d
    nngp = jnp.matmul(x, other.T, precision="highest") / d
    if y is None:
        # Angles of exactly 0: a rounding error of eps in a cosine is one of sqrt(eps) in its angle.
        nngp = jnp.where(jnp.eye(len(x), dtype=bool), product, nngp)
    ntk = nngp + 1
    for _ in range(hidden_layers):
        sine = jnp.sqrt(jnp.maximum((product - nngp) * (product + nngp), 0))
        rest = 1 - jnp.arctan2(sine, nngp) / jnp.pi
        nngp = sine / (2 * jnp.pi) + rest / 2 * nngp
        ntk = nngp + 1 + rest / 2 * ntk
        product = product / 2
    return InfiniteKernels(nngp, ntk)


def ntk_parametrization_preconditioner(params: Params) -> PyTree:
    r"""The preconditioner under which a standard network has the kernel of the NTK parametrization.

    1 / fan-in on the matrices and 1 on the biases of dense layers. Descent on $W$ at the rate $1/n$ is descent at rate
    1 on the entries of $\sqrt n\, W$, so that for kernels drawn from $N(0, 1/n)$ this is the parametrization
    $z = W x / \sqrt n + b$ with $W$ of unit variance. Convolutions and norms are not covered.

    Args:
      params: Nested dicts whose leaves are ``kernel``, ``[in, out]``, or ``bias``, ``[out]``.

    Returns:
      A tree like ``params``, for ``empirical_ntk`` with ``kernel="preconditioned"``.

    Raises:
      UserError: Another leaf.

    Example:
      >>> layer = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> ntk_parametrization_preconditioner({"Dense_0": layer})["Dense_0"]["kernel"].tolist()
      [[0.25, 0.25], [0.25, 0.25], [0.25, 0.25], [0.25, 0.25]]

    Reference:
      Jacot et al. 2018, arXiv 1806.07572, section 3.1; Sohl-Dickstein et al. 2020, arXiv 2001.07301.
    """
    dense = {"kernel": 2, "bias": 1}

    def of_leaf(path, leaf):
        name = path_name(path[-1:])
        rule = "leaves must be a kernel [in, out] or a bias [out] of a dense layer"
        got, advice = (
            f"{path_name(path)} {jnp.shape(leaf)}",
            "Pass the parameters of make_mlp, or write the tree by hand",
        )
        require(dense.get(name) == jnp.ndim(leaf), "ntk_parametrization_preconditioner", rule, got, advice)
        return jnp.full_like(leaf, 1 / leaf.shape[0] if name == "kernel" else 1)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _check_inputs(where: str, x: Array, y: Array | None, hidden_layers: int) -> None:
    shapes = [jnp.shape(side) for side in (x, y) if side is not None]
    fits = all(len(shape) == 2 and min(shape) > 0 for shape in shapes) and len({shape[-1] for shape in shapes}) == 1
    require(fits, where, "x and y must be matrices of one width", f"shapes {shapes}", "Pass one example a row")
    rule = "hidden_layers must be a non-negative integer"
    require(
        isinstance(hidden_layers, int) and hidden_layers >= 0, where, rule, hidden_layers, "Use 0 for a linear model"
    )
    require_finite(where, (x, y), "x and y")


def _check_rows(where: str, x: Array, y: Array | None) -> None:
    sides = [side for side in (x, y) if side is not None and is_concrete(side)]
    zero = any(not np.any(np.asarray(side), axis=1).all() for side in sides)
    require(not zero, where, "rows of x and y must not be 0", "a row of zeros", "Drop it: relu has no derivative at 0")


def _check_options(where: str, activation: str, w_std: float, b_std: float, parameterization: str) -> None:
    known = nearest(activation, ACTIVATIONS)
    require(activation in ACTIVATIONS, where, "activation must have a closed form", repr(activation), known)
    require(w_std > 0, where, "w_std must be positive", w_std, "Use 1 for make_mlp")
    require(b_std >= 0, where, "b_std must be non-negative", b_std, "Use 0 for biases that start at 0")
    names = ("ntk", "standard")
    got = repr(parameterization)
    require(parameterization in names, where, "unknown parameterization", got, nearest(parameterization, names))


def _check_widths(where: str, hidden_layers: int, parameterization: str, widths: Sequence[int] | None) -> None:
    rule = 'widths go with parameterization="standard", and only with it'
    given = widths is not None
    got = f"{parameterization!r}, widths={widths}"
    require(given == (parameterization == "standard"), where, rule, got, "Pass the hidden widths, or use 'ntk'")
    fits = widths is None or (len(widths) == hidden_layers and all(w > 0 for w in widths))
    rule = f"widths must be {hidden_layers} positive integers, one a hidden layer"
    require(fits, where, rule, widths, "Leave out the outputs")
