r"""A Kernel-Based View of Language Model Fine-Tuning (Malladi et al. 2023, arXiv 2210.05643): claims and controls.

Exact statements are checked on a small tanh network (``toys``): single steps (``steps``), many steps
(``trajectories``), what a residual does (``residuals``), subspaces (``projections``) and width (``widths``). That
kernels made from factors are exact (``gram``) and what they cost (``gram_costs``) is checked on tiny encoders, the
statements on prompts on a masked language model pre-trained here (``prompts``). ``verdicts`` says when a run counts as
a kernel method.
"""

from theory.kernel_finetuning import gram, gram_costs, projections, prompts, residuals, steps, trajectories, widths
from theory.kernel_finetuning.prompts import (
    CHI_PROMPT,
    KERNEL_DRIFT_PROMPT,
    LINEARIZATION_PROMPT,
    NATURAL_ACCURACY,
    PERMUTED_LABELS,
)
from theory.kernel_finetuning.verdicts import (
    PAPER_THRESHOLDS,
    THRESHOLDS,
    UNMOVED,
    Diagnostics,
    chi_size,
    kernel_verdict,
    paper_verdict,
)

__all__ = [
    "CHI_PROMPT",
    "CLAIMS",
    "KERNEL_DRIFT_PROMPT",
    "LINEARIZATION_PROMPT",
    "NATURAL_ACCURACY",
    "PAPER_THRESHOLDS",
    "PERMUTED_LABELS",
    "THRESHOLDS",
    "UNMOVED",
    "Diagnostics",
    "chi_size",
    "kernel_verdict",
    "paper_verdict",
]

CLAIMS = (
    *steps.CLAIMS,
    *trajectories.CLAIMS,
    *residuals.CLAIMS,
    *projections.CLAIMS,
    *widths.CLAIMS,
    *gram.CLAIMS,
    *gram_costs.CLAIMS,
    *prompts.CLAIMS,
)
