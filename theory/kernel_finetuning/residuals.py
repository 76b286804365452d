"""Claims on the residual: how far from its tangent space a network is taken by what it still has to learn."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_axpy, tree_norm
from jaxft.kernels import empirical_ntk, feature_drift, kernel_ridge_regression, output_derivative
from jaxft.train import cross_entropy
from theory.claims import Evidence
from theory.kernel_finetuning.toys import Toy, f_toy, make_claim, toy

RESIDUAL_SCALES = np.logspace(-3, -1, 6)
"""Parts of a residual that a step removes, over which the errors are followed."""


def linearization_error(seed: int, *, normalized: bool = False) -> Evidence:
    r"""Relative error of the tangent model after the minimum-norm step that removes a residual s r, against s.

    Fitting s r needs a change of parameters $J^\top K^{-1} s r$: the first-order change of the outputs is s r, the
    second-order one $O(s^2)$. The control gives every step the length 1, as an optimiser that divides by the size of
    the gradient would.
    """
    return _evidence(seed, 0, normalized)


def drift_of_features(seed: int, *, normalized: bool = False) -> Evidence:
    r"""Relative change of the gradients after the same step, against s: $O(s)$, since the parameters move by $O(s)$."""
    return _evidence(seed, 1, normalized)


def _evidence(seed: int, which: int, normalized: bool) -> Evidence:
    measured = _errors(toy(seed), jnp.asarray(normalized))[which]
    return Evidence(measured, x=RESIDUAL_SCALES, setting={"residual": "one-hot minus softmax"})


@jax.jit
def _errors(t: Toy, normalized: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Error of the tangent model and mean drift of the gradients, by the part of the residual that is removed."""
    f0 = f_toy(t.params, t.x)
    kernel = empirical_ntk(f_toy, t.params, t.x)
    residual = -output_derivative(cross_entropy, f0, t.labels)

    def errors(reach: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = kernel_ridge_regression(kernel, f0 + reach * residual, f0=f0)
        _, pullback = jax.vjp(lambda p: f_toy(p, t.x), t.params)
        step = pullback(solution.dual)[0]
        scale = jnp.where(normalized, 1 / tree_norm(step), 1.0)
        moved = tree_axpy(scale, step, t.params)
        # The tangent model moves by what was asked of the kernel.
        tangent = scale * reach * residual
        gap = jnp.linalg.norm(f_toy(moved, t.x) - f0 - tangent) / jnp.linalg.norm(tangent)
        return gap, feature_drift(f_toy, t.params, moved, t.x).mean()

    return jax.lax.map(errors, jnp.asarray(RESIDUAL_SCALES))


CLAIMS = (
    make_claim(
        "linearization-residual",
        "The relative error of the tangent model is linear in the residual to be fitted.",
        "cf. theorem 5.5",
        "rate",
        linearization_error,
        {"normalized": True},
        "steps of one length",
        slope=1.0,
        tolerance=0.05,
        seeds=3,
    ),
    make_claim(
        "feature-drift-residual",
        "The relative change of the gradients is linear in the residual to be fitted.",
        "cf. theorem 5.5",
        "rate",
        drift_of_features,
        {"normalized": True},
        "steps of one length",
        slope=1.0,
        tolerance=0.05,
        seeds=3,
    ),
)
