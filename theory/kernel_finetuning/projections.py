r"""Claims on subspaces: random projections and LoRA adapters preserve the kernel, with an error that is known."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import stream
from jaxft.kernels import (
    empirical_ntk,
    lora_kernel,
    lora_kernel_variance,
    output_jacobian,
    parameter_mask,
    random_projection,
)
from theory.claims import Evidence
from theory.kernel_finetuning.toys import Toy, f_toy, make_claim, toy

SIZES = np.array([16, 32, 64, 128, 256, 512])
"""Dimensions of the projections over which the error is followed."""

DRAWS = 128
RANK = 4
LORA_DRAWS = 1024


class Sketches(NamedTuple):
    """Kernels of projected gradients by size, and the kernel they stand for."""

    exact: jax.Array
    norms: jax.Array
    """Products of the norms of the two gradients of each entry."""
    kernels: jax.Array
    """``(sizes, draws, outputs, outputs)``."""


def projection_error(seed: int, *, repeated: bool = False) -> Evidence:
    r"""Root mean square error of the kernel through a Gaussian map into k dimensions, relative to the norms, against k.

    An entry's variance is $(\lVert u \rVert^2 \lVert v \rVert^2 + \langle u, v \rangle^2) / k$. The control repeats the
    first 16 dimensions.
    """
    s = _sketches(toy(seed), jax.random.key(seed), jnp.asarray(repeated), jnp.asarray(False))
    errors = jnp.sqrt(jnp.mean(((s.kernels - s.exact[None, None]) / s.norms[None, None]) ** 2, axis=(1, 2, 3)))
    return Evidence(errors, x=SIZES, setting={"map": "Gaussian", "draws": DRAWS})


def projection_mean(seed: int, *, apart: bool = False) -> Evidence:
    r"""Coefficient of the kernel K in its projection $\hat K$: 1 on average.

    Which is $\langle \hat K, K \rangle / \lVert K \rVert^2$. The control projects the two sides by
    maps drawn independently.
    """
    s = _sketches(toy(seed), jax.random.key(seed), jnp.asarray(False), jnp.asarray(apart))
    return Evidence(_coefficients(s.kernels[-1], s.exact).mean(), 1.0, setting={"map": "Gaussian", "size": SIZES[-1]})


@jax.jit
def _sketches(t: Toy, key: jax.Array, repeated: jax.Array, apart: jax.Array) -> Sketches:
    jacobian = output_jacobian(f_toy, t.params, t.x)
    gradients = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jacobian)
    exact = empirical_ntk(f_toy, t.params, t.x).reshape(24, 24)

    def features(draw: jax.Array) -> jax.Array:
        return jax.vmap(lambda g: random_projection(g, int(SIZES[-1]), key=draw))(gradients)

    def kernels(draw: jax.Array) -> jax.Array:
        left, right = features(draw), features(jnp.where(apart, jax.random.fold_in(draw, 1), draw))
        # The first k of the features, rescaled, are a projection into k dimensions.
        order = jnp.where(repeated, jnp.arange(SIZES[-1]) % SIZES[0], jnp.arange(SIZES[-1]))
        left, right = left[:, order], right[:, order]
        return jnp.stack([left[:, :k] @ right[:, :k].T * float(SIZES[-1] / k) for k in SIZES])

    found = jax.lax.map(kernels, jax.random.split(key, DRAWS))
    return Sketches(exact, jnp.sqrt(jnp.outer(jnp.diag(exact), jnp.diag(exact))), jnp.swapaxes(found, 0, 1))


def lora_mean(seed: int, *, whole: bool = False) -> Evidence:
    r"""Coefficient of the kernel of the adapted matrices in that of LoRA adapters at their start: 1 on average.

    The control compares with the kernel of all parameters.
    """
    a = _lora(toy(seed), stream(jax.random.key(seed), "adapters"))
    coefficient = _coefficients(a.samples, a.whole if whole else a.adapted).mean()
    return Evidence(coefficient, 1.0, setting={"rank": RANK, "draws": LORA_DRAWS})


def lora_variance(seed: int, *, halved: bool = False) -> Evidence:
    r"""Variance of the entries of the LoRA kernel over draws, as a multiple of the formula.

    Which is $\sum_W (\lVert M_i M_j^\top \rVert^2 + \operatorname{tr} (M_i M_j^\top)^2) / r$. The control draws
    adapters of half the rank.
    """
    a = _lora(toy(seed), stream(jax.random.key(seed), "adapters"), RANK // 2 if halved else RANK)
    ratio = jnp.var(a.samples, axis=0, ddof=1).sum() / a.variance.sum()
    return Evidence(ratio, 1.0, setting={"rank": RANK, "draws": LORA_DRAWS})


class Adapters(NamedTuple):
    """Kernels of LoRA adapters by draw, and what they stand for; (example, output) flattened."""

    samples: jax.Array
    variance: jax.Array
    """Of one draw, exactly."""
    adapted: jax.Array
    """Kernel of the adapted matrices."""
    whole: jax.Array
    """Kernel of all parameters."""


@functools.partial(jax.jit, static_argnums=2)
def _lora(t: Toy, key: jax.Array, rank: int = RANK) -> Adapters:
    matrices = parameter_mask(t.params, only=["kernel$"])
    samples = lora_kernel(f_toy, t.params, t.x, rank=rank, key=key, adapted=matrices, draws=LORA_DRAWS).samples
    variance = lora_kernel_variance(f_toy, t.params, t.x, rank=RANK, adapted=matrices)
    adapted = empirical_ntk(f_toy, t.params, t.x, param_mask=matrices)
    whole = empirical_ntk(f_toy, t.params, t.x)
    return Adapters(samples.reshape(-1, 24, 24), *(k.reshape(24, 24) for k in (variance, adapted, whole)))


def _coefficients(samples: jax.Array, kernel: jax.Array) -> jax.Array:
    """Least-squares coefficient of a kernel in each sample."""
    return jnp.tensordot(samples, kernel, axes=2) / jnp.vdot(kernel, kernel)


CLAIMS = (
    make_claim(
        "projection-error",
        "The error of the kernel through a random projection into k dimensions falls as k^(-1/2).",
        "section 7",
        "rate",
        projection_error,
        {"repeated": True},
        "the dimensions repeat",
        slope=-0.5,
        tolerance=0.05,
        seeds=3,
        max_seeds=9,
    ),
    make_claim(
        "projection-mean",
        "The kernel through a random projection is unbiased.",
        "section 7",
        "equality",
        projection_mean,
        {"apart": True},
        "the two sides are projected independently",
        tolerance=0.05,
        seeds=3,
        max_seeds=9,
    ),
    make_claim(
        "lora-mean",
        "The kernel of LoRA adapters at their start is, on average, the kernel of the adapted matrices.",
        "section 7",
        "equality",
        lora_mean,
        {"whole": True},
        "compared with the kernel of all parameters",
        tolerance=0.1,
        seeds=3,
        max_seeds=24,
    ),
    make_claim(
        "lora-variance",
        "The variance of an entry is the sum over matrices of |M_i M_j^T|^2 + tr (M_i M_j^T)^2, over the rank.",
        "cf. section 7",
        "equality",
        lora_variance,
        {"halved": True},
        "adapters of half the rank",
        tolerance=0.1,
        seeds=3,
        max_seeds=24,
    ),
)
