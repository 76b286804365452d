"""Kernels of networks at a point of parameter space, over any ``f(params, x)``.

Kernels: ``ntk`` (empirical kernels in memory; the table of them is in ``methods``), ``kernel_blocks`` (those that
outgrow it), ``products`` (with a vector, matrix-free), ``masks`` (which parameters count), ``contrast`` (C - 1 outputs
of C logits), ``projections`` and ``lora`` (through random maps), ``infinite`` (wide limit). How: ``plan`` (costs and
choice), ``features`` (factors of gradients), ``contraction``, ``jacobian``; ``store`` and ``block_loop`` (on disk).
Solvers: ``regression`` (kernel ridge regression), ``logistic`` (kernel logistic regression), ``lssvm`` (for asymmetric
kernels), ``dynamics`` (discrete kernel descent). Diagnostics: ``linearization`` (how far a fine-tuned network left its
tangent space), ``alignment`` (kernel and labels), ``one_step`` (what one step should do, and does).
"""

from jaxft.kernels.alignment import kernel_alignment, label_complexity
from jaxft.kernels.contrast import contrast_basis, contrast_logits, contrast_loss, logit_difference
from jaxft.kernels.dynamics import KernelTrajectory, kernel_gradient_descent
from jaxft.kernels.infinite import (
    InfiniteKernels,
    arccosine_kernels,
    infinite_mlp_kernels,
    ntk_parametrization_preconditioner,
)
from jaxft.kernels.jacobian import output_jacobian
from jaxft.kernels.kernel_blocks import KernelBlock, kernel_blocks
from jaxft.kernels.linearization import (
    KernelDrift,
    feature_drift,
    kernel_drift,
    linearization_gap,
    linearize,
    output_derivative,
)
from jaxft.kernels.logistic import KernelLogistic, kernel_logistic_predict, kernel_logistic_regression
from jaxft.kernels.lora import lora_kernel, lora_kernel_variance
from jaxft.kernels.lssvm import AsymmetricLSSVM, asymmetric_lssvm, asymmetric_lssvm_predict
from jaxft.kernels.masks import SUBSETS, parameter_mask
from jaxft.kernels.ntk import empirical_ntk
from jaxft.kernels.one_step import OneStep, one_step_prediction
from jaxft.kernels.plan import LeafPlan, Plan
from jaxft.kernels.preconditioners import RankOne
from jaxft.kernels.products import ntk_vector_product
from jaxft.kernels.projections import ProjectedKernel, projected_kernel, random_projection
from jaxft.kernels.regression import KernelRidge, kernel_ridge_predict, kernel_ridge_regression
from jaxft.kernels.store import StoredKernels, StoreWarning, open_kernel_store

__all__ = [
    "SUBSETS",
    "AsymmetricLSSVM",
    "InfiniteKernels",
    "KernelBlock",
    "KernelDrift",
    "KernelLogistic",
    "KernelRidge",
    "KernelTrajectory",
    "LeafPlan",
    "OneStep",
    "Plan",
    "ProjectedKernel",
    "RankOne",
    "StoreWarning",
    "StoredKernels",
    "arccosine_kernels",
    "asymmetric_lssvm",
    "asymmetric_lssvm_predict",
    "contrast_basis",
    "contrast_logits",
    "contrast_loss",
    "empirical_ntk",
    "feature_drift",
    "infinite_mlp_kernels",
    "kernel_alignment",
    "kernel_blocks",
    "kernel_drift",
    "kernel_gradient_descent",
    "kernel_logistic_predict",
    "kernel_logistic_regression",
    "kernel_ridge_predict",
    "kernel_ridge_regression",
    "label_complexity",
    "linearization_gap",
    "linearize",
    "logit_difference",
    "lora_kernel",
    "lora_kernel_variance",
    "ntk_parametrization_preconditioner",
    "ntk_vector_product",
    "one_step_prediction",
    "open_kernel_store",
    "output_derivative",
    "output_jacobian",
    "parameter_mask",
    "projected_kernel",
    "random_projection",
]
