"""Kernels of networks at a point of parameter space, over any ``f(params, x)``.

Kernels: ``ntk`` (empirical kernels; the table of them is in ``methods``), ``products`` (with a vector, matrix-free),
``jacobian`` (what they are made of), ``masks`` (which parameters are trained), ``contrast`` (C - 1 outputs of C logits).
Solvers: ``regression`` (kernel ridge regression), ``dynamics`` (discrete kernel descent). Diagnostics:
``linearization`` (how far a fine-tuned network left its tangent space).
"""

from jaxft.kernels.contrast import contrast_basis, contrast_logits, contrast_loss, logit_difference
from jaxft.kernels.dynamics import KernelTrajectory, kernel_gradient_descent
from jaxft.kernels.jacobian import output_jacobian
from jaxft.kernels.linearization import (
    KernelDrift,
    feature_drift,
    kernel_drift,
    linearization_gap,
    linearize,
    output_derivative,
)
from jaxft.kernels.masks import SUBSETS, parameter_mask
from jaxft.kernels.ntk import empirical_ntk
from jaxft.kernels.products import ntk_vector_product
from jaxft.kernels.regression import KernelRidge, kernel_ridge_predict, kernel_ridge_regression

__all__ = [
    "SUBSETS",
    "KernelDrift",
    "KernelRidge",
    "KernelTrajectory",
    "contrast_basis",
    "contrast_logits",
    "contrast_loss",
    "empirical_ntk",
    "feature_drift",
    "kernel_drift",
    "kernel_gradient_descent",
    "kernel_ridge_predict",
    "kernel_ridge_regression",
    "linearization_gap",
    "linearize",
    "logit_difference",
    "ntk_vector_product",
    "output_derivative",
    "output_jacobian",
    "parameter_mask",
]
