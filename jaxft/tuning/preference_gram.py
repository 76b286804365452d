r"""Gram matrices of gradients of log-probabilities, and from them the rate of displacement of any loss.

For any differentiable network and any loss of the two log-probabilities, with slopes $f_\pm = \partial l / \partial \ln
\pi(y_\pm)$, gradient flow moves $\ln \pi(z)$ at the rate $-f_+ G_{z+} - f_- G_{z-}$. G is computed once, before any
training, and every loss is then arithmetic on it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxft.core.checks import is_concrete, leading_size, require
from jaxft.core.types import Inputs, OutputFn, Params
from jaxft.kernels.blocks import blocked_kernels
from jaxft.kernels.calls import MethodName, prepare
from jaxft.kernels.features import first_example
from jaxft.kernels.methods import Point, Settings


def preference_gram(
    f: OutputFn,
    params: Params,
    batch: Inputs,
    *,
    preconditioner: PyTree | None = None,
    param_mask: PyTree | None = None,
    method: MethodName = "auto",
    tile: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "n r r"]:
    r"""Inner products of the gradients of an example's log-probabilities.

    $G_{ij} = \langle \nabla \ln \pi_i, P \nabla \ln \pi_j \rangle$ for its r responses. Responses beyond chosen and
    rejected are others whose fate is asked for. No gradient is held of a leaf for which the network hands over factors
    (``jaxft.core.factors``; decoders of ``jaxft.nn`` do): an example at a time is taken through the Gram engine of
    ``jaxft.kernels.empirical_ntk``, of which this is the diagonal blocks. Inner products between examples are that
    function's.

    Args:
      f: Log-probabilities ``[n, r]`` of responses, as ``jaxft.nn.make_response_log_probs`` gives them.
      params: Parameters.
      batch: Examples, each of which is evaluated alone.
      preconditioner: The diagonal of P like ``params``, such as that of ``jaxft.train.adam_preconditioner``, entries
        ``jaxft.kernels.RankOne`` included; ``None`` means the identity, gradient descent.
      param_mask: The parameters that are trained (``jaxft.kernels.parameter_mask``); ``None`` means all.
      method: As of ``empirical_ntk``.
      tile: As of ``empirical_ntk``.
      mesh: Devices to spread examples over, by all its axes; parameters are replicated. ``None`` means no placement.

    Returns:
      A positive semi-definite matrix an example, in float32 at least.

    Raises:
      UserError: ``f`` does not return ``[n, r]``, a preconditioner or mask that does not fit, non-finite parameters or
        (concrete) inner products, and as ``empirical_ntk``.

    Example:
      >>> f = lambda w, x: jnp.stack([x @ w, -2 * (x @ w)], axis=1)
      >>> preference_gram(f, jnp.ones(2), jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
      [[[5.0, -10.0], [-10.0, 20.0]], [[1.0, -2.0], [-2.0, 4.0]]]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, proposition 2 (two responses, P = 1).
    """
    where = "preference_gram"
    n = leading_size(where, batch)
    batch = jax.tree.map(jnp.asarray, batch)
    call = prepare(
        where,
        f,
        params,
        first_example(batch),
        None,
        kernel="sgd" if preconditioner is None else "preconditioned",
        preconditioner=preconditioner,
        param_mask=param_mask,
        method=method,
        block_size=1,
        tile=tile,
        memory_bytes=None,
        accum_dtype=None,
        factor_dtype=None,
        precision="highest",
    )
    advice = "Use make_response_log_probs"
    require(not call.scalar, where, "f must return [n, r]", f"[n] for {n} examples", advice)
    gram = _grams(call.settings, mesh, call.point, batch)
    if is_concrete(gram):
        bad = np.flatnonzero(~np.isfinite(np.asarray(gram)).all(axis=(1, 2)))
        shown = f"NaN or infinity at {len(bad)} of {n}, the first at {bad[:1].tolist()}"
        require(not len(bad), where, "gradients of log-probabilities must be finite", shown, "Look at that example")
    return gram


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grams(settings: Settings, mesh: Mesh | None, point: Point, batch: Inputs) -> Float[Array, "n r r"]:
    def of_some(point: Point, some: Inputs) -> Array:
        def of_one(one: Inputs) -> Array:
            return blocked_kernels(settings, point, jax.tree.map(lambda leaf: leaf[None], one), None)[0]

        return jax.lax.map(of_one, some)

    if mesh is None:
        return of_some(point, batch)
    mesh = Mesh(mesh.devices, mesh.axis_names)  # axes of type Auto, whatever they are
    n = jax.tree.leaves(batch)[0].shape[0]
    rows = jnp.minimum(jnp.arange(-(-n // mesh.size) * mesh.size), n - 1)
    spread = PartitionSpec(mesh.axis_names)
    of_all = jax.shard_map(of_some, mesh=mesh, in_specs=(PartitionSpec(), spread), out_specs=spread, check_vma=False)
    return of_all(point, jax.tree.map(lambda leaf: leaf[rows], batch))[:n]


def displacement_rate(gram: Float[Array, "*n r r"], slopes: Float[Array | np.ndarray, "*n s"]) -> Float[Array, "*n r"]:
    r"""Rate of every response's log-probability under the flow of its own example's loss.

    $\tfrac{d}{dt} \ln \pi_i = - \sum_s f_s G_{is}$: for any loss, and for any optimiser whose P the Gram matrix holds.
    It is the rate at this instant; other examples of the batch are left out (``batch_displacement_rate`` has them).
    Sign descent has no such form: see ``predicted_changes``.

    Args:
      gram: Of ``preference_gram``.
      slopes: Derivatives of the loss by the first s log-probabilities, chosen and rejected, as of ``loss_slopes``.

    Returns:
      A rate for each response; negative for the chosen one where it is displaced.

    Raises:
      UserError: Shapes that do not fit.

    Example:
      >>> displacement_rate(jnp.array([[[1.0, 2.0], [2.0, 5.0]]]), jnp.array([[-0.5, 0.5]])).tolist()
      [[-0.5, -1.5]]

    Reference:
      Razin et al. 2025, arXiv 2410.08847, proposition 2, for slopes that are no weights of a margin.
    """
    where = "displacement_rate"
    slopes = jnp.asarray(slopes)
    fits = gram.ndim >= 2 and slopes.ndim >= 1 and slopes.shape[:-1] == gram.shape[:-2]
    fits = fits and 1 <= slopes.shape[-1] <= gram.shape[-1] == gram.shape[-2]
    rule = "needs a Gram matrix [*n, r, r] and slopes [*n, s], s <= r"
    require(fits, where, rule, f"{gram.shape} and {slopes.shape}", "Use preference_gram and loss_slopes")
    columns = gram[..., : slopes.shape[-1]]
    return -jnp.einsum("...rs,...s->...r", columns, slopes.astype(gram.dtype), precision="highest")


def batch_displacement_rate(
    kernel: Float[Array, "n r m c"], slopes: Float[Array | np.ndarray, "m s"]
) -> Float[Array, "n r"]:
    r"""Rate of every response's log-probability under the flow of the mean loss of a whole batch.

    $\tfrac{d}{dt} \ln \pi_{ir} = - \tfrac1m \sum_{j, s} K_{ir, js} f_{js}$. Without the kernel, for large sets:
    ``predicted_changes`` along ``flow_direction``.

    Args:
      kernel: ``jaxft.kernels.empirical_ntk`` of the log-probabilities, the trained examples on the last two axes.
      slopes: Derivatives of the trained examples' losses by their first s log-probabilities.

    Returns:
      A rate for each response of the examples on the first axis.

    Raises:
      UserError: Shapes that do not fit.

    Example:
      >>> kernel = jnp.array([[[[1.0, 0.5]], [[3.0, 0.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]]]).transpose(0, 2, 1, 3)
      >>> kernel.shape, batch_displacement_rate(kernel, jnp.array([[-1.0], [-1.0]])).tolist()
      ((2, 1, 2, 2), [[2.0], [0.5]])

    Reference:
      Razin et al. 2025, arXiv 2410.08847, theorems 8 and 9 (one token a response, free features).
    """
    where = "batch_displacement_rate"
    slopes = jnp.asarray(slopes)
    fits = kernel.ndim == 4 and slopes.ndim == 2 and slopes.shape[0] == kernel.shape[2]
    fits = fits and 1 <= slopes.shape[1] <= kernel.shape[3]
    rule = "needs a kernel [n, r, m, c] and slopes [m, s], s <= c"
    require(fits, where, rule, f"{kernel.shape} and {slopes.shape}", "Use empirical_ntk and loss_slopes")
    columns = kernel[..., : slopes.shape[1]]
    return -jnp.einsum("nrms,ms->nr", columns, slopes.astype(kernel.dtype), precision="highest") / slopes.shape[0]
