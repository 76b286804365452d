"""When a fine-tuning run is called a kernel method: our thresholds, and the paper's, which are lax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels import output_derivative
from jaxft.train import cross_entropy


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What one fine-tuning run is judged by."""

    accuracy_start: float
    accuracy: float
    """After fine-tuning."""
    accuracy_kernel: float
    """Of the kernel regression that belongs to the optimiser."""
    accuracy_linearized: float
    """Of the tangent model at the parameters that fine-tuning reached."""
    linearization_gap: float
    feature_drift: float
    kernel_drift: float


THRESHOLDS = {"linearization_gap": 0.35, "feature_drift": 0.3, "kernel_drift": 0.3, "solves_frac": 0.9}
"""Ours: the outputs, the gradients and the kernel may change by no more than a third from what the tangent says."""

PAPER_THRESHOLDS = {"solves_frac": 0.9, "recovered_frac": 0.5, "feature_drift": 2.0}
"""Those of the paper: 90 % of fine-tuning by the kernel, half of its gain by the tangent model, drift below 2."""

UNMOVED = "outputs did not move"
"""Verdict where dev preferred the parameters of the start."""

LEAST_GAIN = 0.05
"""Gain in accuracy below which the share that the tangent model recovers says nothing."""


def kernel_verdict(d: Diagnostics) -> str:
    """Whether a run is a kernel method by our thresholds: ``yes``, ``no: <what fails>``, or that nothing moved.

    Example:
      >>> kernel_verdict(Diagnostics(0.5, 0.9, 0.88, 0.9, 0.1, 0.2, 0.5))
      'no: kernel_drift'
    """
    if not np.isfinite(d.linearization_gap):
        return UNMOVED
    limits = {name: limit for name, limit in THRESHOLDS.items() if name != "solves_frac"}
    failing = [name for name, limit in limits.items() if not getattr(d, name) <= limit]
    if not d.accuracy_kernel >= THRESHOLDS["solves_frac"] * d.accuracy:
        failing.append("kernel_accuracy")
    return "yes" if not failing else "no: " + ", ".join(failing)


def paper_verdict(d: Diagnostics) -> str:
    """The verdict by the paper's thresholds, which are lax.

    Where fine-tuning gained less than ``LEAST_GAIN``, a share of the gain says nothing, and the tangent model must only
    not have lost as much.

    Example:
      >>> paper_verdict(Diagnostics(0.5, 0.9, 0.88, 0.9, 0.1, 0.2, 0.5))
      'yes'
    """
    if not np.isfinite(d.linearization_gap):
        return UNMOVED
    gain = d.accuracy - d.accuracy_start
    solves = d.accuracy_kernel >= PAPER_THRESHOLDS["solves_frac"] * d.accuracy
    recovered = d.accuracy_linearized - d.accuracy_start
    least = PAPER_THRESHOLDS["recovered_frac"] * gain if gain >= LEAST_GAIN else -LEAST_GAIN
    recovers = recovered >= least
    fixed = d.feature_drift < PAPER_THRESHOLDS["feature_drift"]
    return "yes" if solves and recovers and fixed else "no"


def chi_size(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Mean over examples of $\max_c |\chi_c|$ for cross-entropy: 0 where the network already solves the task.

    Example:
      >>> float(chi_size(jnp.zeros((4, 2)), jnp.array([0, 1, 1, 0])))
      0.5
    """
    return jnp.abs(output_derivative(cross_entropy, outputs, labels)).max(axis=1).mean()
