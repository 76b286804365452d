"""Kernels of networks at a point of parameter space, over any ``f(params, x)``.

``ntk`` (empirical kernels), ``jacobian`` (what they are made of), ``regression`` (kernel ridge regression),
``dynamics`` (discrete kernel descent), ``linearization`` (how far a fine-tuned network left its tangent space).
"""

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
from jaxft.kernels.ntk import empirical_ntk
from jaxft.kernels.regression import KernelRidge, kernel_ridge_predict, kernel_ridge_regression

__all__ = [
    "KernelDrift",
    "KernelRidge",
    "KernelTrajectory",
    "empirical_ntk",
    "feature_drift",
    "kernel_drift",
    "kernel_gradient_descent",
    "kernel_ridge_predict",
    "kernel_ridge_regression",
    "linearization_gap",
    "linearize",
    "output_derivative",
    "output_jacobian",
]
