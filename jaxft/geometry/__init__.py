"""Geometry of parameter spaces: paths and what the loss does along them, symmetries, dropout stability, simplexes.

Everything takes ``f(params, x)`` or ``loss_fn(params, batch)`` and parameter trees. What has to be said of an
architecture, where its hidden units lie, is a ``PermutationSpec`` (``jaxft.core.units``); ``jaxft.nn.unit_specs`` has
those of our models.

Paths: ``paths`` (lines, arcs, chains, Bézier curves, their lengths), ``curves`` (fitted ones), ``neb`` and ``auto_neb``
(elastic bands), ``minimax_tree`` (the lowest paths between many minima). Losses: ``path_loss`` (along a path; the
ensemble on it), ``loss_plane``, ``barriers`` (of a path, between all pairs of models, their clusters), ``instability``
(between children of a checkpoint), ``feature_connectivity`` (of features, of one layer after another). Dropout:
``dropout_stability`` (masks, and what the loss does), ``dropout_line``, ``noise_stability``, ``dropout_path`` (the
construction of Kuditipudi et al., over ``unit_chain``, ``unit_moves`` and ``unit_sequences``) and ``path_certificate``
(its highest loss without walking it). Symmetries: ``permutations``, ``matching`` (of weights, over ``assignment``),
``activation_matching`` (of activations, and straight through), ``repair`` (over ``unit_statistics``). Regions and sums:
``simplexes``, ``merging`` (averages, task arithmetic, layer profiles).
"""

from jaxft.geometry.activation_matching import StraightThrough, activation_matching, straight_through_matching
from jaxft.geometry.assignment import solve_assignment
from jaxft.geometry.auto_neb import AutoNEBFit, auto_neb
from jaxft.geometry.barriers import BarrierMatrix, cluster_barriers, convexity_gap, loss_barrier, pairwise_barriers
from jaxft.geometry.curves import CurveFit, curve_gradient, fit_curve
from jaxft.geometry.dropout_line import (
    DropoutLine,
    bernoulli_masks,
    best_dropout_line,
    dropout_line,
    dropout_output_variance,
)
from jaxft.geometry.dropout_path import (
    DropoutPath,
    MoveCheck,
    check_moves,
    dropout_path,
    path_to_dropout,
    permute_live_units,
)
from jaxft.geometry.dropout_stability import (
    DropoutStability,
    complement_masks,
    dropout_masks,
    dropout_params,
    dropout_stability,
)
from jaxft.geometry.feature_connectivity import (
    FeatureConnectivity,
    LayerwiseBarriers,
    feature_connectivity,
    layerwise_barriers,
    leafwise_path,
)
from jaxft.geometry.instability import InstabilityAnalysis, instability_analysis, stability_onset
from jaxft.geometry.loss_plane import LossPlane, loss_plane
from jaxft.geometry.matching import Matching, weight_matching
from jaxft.geometry.merging import (
    interpolate,
    interpolate_adapters,
    layer_profile,
    task_arithmetic,
    task_vector,
    weighted_average,
)
from jaxft.geometry.minimax_tree import MinimaxTree, minimax_tree
from jaxft.geometry.neb import NEBFit, fit_neb
from jaxft.geometry.noise_stability import NoiseStability, chain_weights, noise_stability
from jaxft.geometry.path_certificate import Certificate, path_certificate
from jaxft.geometry.path_loss import PathLoss, eval_path, mean_over_batches, path_ensemble
from jaxft.geometry.paths import (
    Curve,
    arc_length,
    init_curve,
    linear_path,
    polychain,
    reparametrise,
    slerp_path,
    stack_points,
    unstack_points,
)
from jaxft.geometry.permutations import (
    apply_permutation,
    check_spec,
    compose_permutations,
    identity_permutation,
    invert_permutation,
    random_permutation,
)
from jaxft.geometry.repair import repair
from jaxft.geometry.simplexes import (
    SimplexFit,
    fit_simplex,
    log_volume,
    sample_simplex,
    simplex_ensemble,
    simplex_point,
    simplex_weights,
)
from jaxft.geometry.unit_chain import UnitChain, unit_chain
from jaxft.geometry.unit_statistics import unit_moments

__all__ = [
    "AutoNEBFit",
    "BarrierMatrix",
    "Certificate",
    "Curve",
    "CurveFit",
    "DropoutLine",
    "DropoutPath",
    "DropoutStability",
    "FeatureConnectivity",
    "InstabilityAnalysis",
    "LayerwiseBarriers",
    "LossPlane",
    "Matching",
    "MinimaxTree",
    "MoveCheck",
    "NEBFit",
    "NoiseStability",
    "PathLoss",
    "SimplexFit",
    "StraightThrough",
    "UnitChain",
    "activation_matching",
    "apply_permutation",
    "arc_length",
    "auto_neb",
    "bernoulli_masks",
    "best_dropout_line",
    "chain_weights",
    "check_moves",
    "check_spec",
    "cluster_barriers",
    "complement_masks",
    "compose_permutations",
    "convexity_gap",
    "curve_gradient",
    "dropout_line",
    "dropout_masks",
    "dropout_output_variance",
    "dropout_params",
    "dropout_path",
    "dropout_stability",
    "eval_path",
    "feature_connectivity",
    "fit_curve",
    "fit_neb",
    "fit_simplex",
    "identity_permutation",
    "init_curve",
    "instability_analysis",
    "interpolate",
    "interpolate_adapters",
    "invert_permutation",
    "layer_profile",
    "layerwise_barriers",
    "leafwise_path",
    "linear_path",
    "log_volume",
    "loss_barrier",
    "loss_plane",
    "mean_over_batches",
    "minimax_tree",
    "noise_stability",
    "pairwise_barriers",
    "path_certificate",
    "path_ensemble",
    "path_to_dropout",
    "permute_live_units",
    "polychain",
    "random_permutation",
    "repair",
    "reparametrise",
    "sample_simplex",
    "simplex_ensemble",
    "simplex_point",
    "simplex_weights",
    "slerp_path",
    "solve_assignment",
    "stability_onset",
    "stack_points",
    "straight_through_matching",
    "task_arithmetic",
    "task_vector",
    "unit_chain",
    "unit_moments",
    "unstack_points",
    "weight_matching",
    "weighted_average",
]
