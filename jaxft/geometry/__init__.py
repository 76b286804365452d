"""Geometry of parameter spaces: paths and what the loss does along them, symmetries, dropout stability, simplexes."""

from jaxft.geometry.curves import CurveFit, curve_gradient, fit_curve
from jaxft.geometry.loss_plane import LossPlane, loss_plane
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

__all__ = [
    "Curve",
    "CurveFit",
    "LossPlane",
    "PathLoss",
    "arc_length",
    "curve_gradient",
    "eval_path",
    "fit_curve",
    "init_curve",
    "linear_path",
    "loss_plane",
    "mean_over_batches",
    "path_ensemble",
    "polychain",
    "reparametrise",
    "slerp_path",
    "stack_points",
    "unstack_points",
]
