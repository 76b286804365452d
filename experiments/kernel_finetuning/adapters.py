"""How closely the kernel of LoRA adapters, and one of as many random projections, follows the kernel it estimates."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.kernel_finetuning.config import KernelFinetuningConfig
from experiments.kernel_finetuning.measure import followed_rows, gradients_at_once
from experiments.kernel_finetuning.prepare import Unit
from jaxft.core.rng import stream
from jaxft.kernels import empirical_ntk, lora_kernel, lora_kernel_variance, parameter_mask, projected_kernel

ADAPTED = "layers/.*kernel$"
"""The matrices of the encoder's layers: the leaves that get adapters."""


def adapter_errors(unit: Unit, config: KernelFinetuningConfig) -> Iterator[dict[str, Any]]:
    r"""Errors of ``lora`` and ``projection`` kernels against the kernel of the adapted matrices alone, by rank.

    An error is $\sqrt{E \lVert \hat K - K \rVert_F^2} / \lVert K \rVert_F$ over the draws, on the followed training
    examples; that of LoRA is predicted by its variance. The projection is two-sided, $A^\top M B$ of every gradient M,
    of as many features as LoRA trains numbers: a dense map of all parameters would cost parameters times features.
    """
    rows = followed_rows(unit, config)
    x = jax.tree.map(lambda leaf: leaf[rows], unit.train.inputs)
    mask = parameter_mask(unit.params, only=(ADAPTED,))
    matrices, per_rank = _adapter_sizes(unit.params, mask)
    block = gradients_at_once(unit, config.solving)
    exact = empirical_ntk(unit.f, unit.params, x, param_mask=mask, memory_bytes=config.solving.memory_bytes)
    variance = lora_kernel_variance(unit.f, unit.params, x, rank=1, adapted=mask, block_size=block)
    predicted = math.sqrt(float(variance.sum())) / float(jnp.linalg.norm(exact.ravel()))
    key, draws = stream(jax.random.key(config.seed), "adapters", unit.split), config.adapters.draws
    for rank in config.adapters.ranks:
        features = rank * per_rank
        side = max(1, round(math.sqrt(features / matrices)))
        lora = lora_kernel(
            unit.f,
            unit.params,
            x,
            rank=rank,
            key=stream(key, "lora", rank),
            adapted=mask,
            draws=draws,
            block_size=block,
        )
        projection = projected_kernel(
            unit.f,
            unit.params,
            x,
            size=side,
            key=stream(key, "projection", rank),
            kind="two_sided",
            draws=draws,
            param_mask=mask,
            block_size=block,
        )
        one_lora = {
            "method": "lora",
            "rank": rank,
            "features": features,
            "predicted_error": predicted / math.sqrt(rank),
        }
        yield one_lora | _error(lora.samples, exact)
        one_projection = {"method": "projection", "rank": rank, "features": matrices * side**2, "predicted_error": None}
        yield one_projection | _error(projection.samples, exact)


def _adapter_sizes(params: Any, mask: Any) -> tuple[int, int]:
    """Number of adapted matrices, and numbers that their adapters of rank 1 train at the start."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    stacks = [(math.prod(leaf.shape[:-2]), leaf.shape[-1]) for leaf, chosen in pairs if chosen]
    return sum(count for count, _ in stacks), sum(count * d_out for count, d_out in stacks)


def _error(samples: Array, exact: Array) -> dict[str, float]:
    """Root mean square over draws of the relative error, with its standard error."""
    draws = len(samples)
    squares = np.asarray(jnp.square(samples - exact[None]).reshape(draws, -1).sum(axis=1) / jnp.square(exact).sum())
    error = math.sqrt(squares.mean())
    return {"error": error, "stderr": float(squares.std(ddof=1)) / math.sqrt(draws) / (2 * error)}
