"""Claims on width: how little a wide network has to move, and the kernel it tends to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream, stream
from jaxft.core.trees import tree_cast, tree_norm
from jaxft.kernels import (
    arccosine_kernels,
    empirical_ntk,
    kernel_ridge_regression,
    ntk_parametrization_preconditioner,
)
from jaxft.nn import make_mlp
from theory.claims import Evidence
from theory.kernel_finetuning.toys import make_claim

WIDTHS = np.array([16, 32, 64, 128, 256, 512])
EXAMPLES = 6
INPUTS = 6


def relative_change(seed: int, *, mean_field: bool = False) -> Evidence:
    r"""Relative size of the smallest change of parameters that moves the outputs by labels +-1, against width.

    The change is $J^\top K^{-1} r$, of norm $\sqrt{r^\top K^{-1} r}$; K and the squared norm of the parameters both
    grow as the width n. The control divides the outputs by $\sqrt n$, so that K no longer grows.
    """
    changes = [_wide(seed, int(width), mean_field)[0] for width in WIDTHS]
    return Evidence(changes, x=WIDTHS, setting={"network": f"{INPUTS}-n-n-1 relu", "examples": EXAMPLES})


def distance_to_infinite_width(seed: int, *, unit_rates: bool = False) -> Evidence:
    r"""Relative distance of the empirical kernel from that of infinite width, against width.

    Matrices are trained at the rate 1 / fan-in. The control trains them at the rate 1.
    """
    errors = [_wide(seed, int(width), False)[2 if unit_rates else 1] for width in WIDTHS]
    return Evidence(errors, x=WIDTHS, setting={"network": f"{INPUTS}-n-n-1 relu", "examples": EXAMPLES})


@functools.cache
def _wide(seed: int, width: int, mean_field: bool) -> tuple[float, float, float]:
    x = jnp.asarray(host_stream(seed, "wide").normal(size=(EXAMPLES, INPUTS)))
    scale = jnp.asarray(1 / np.sqrt(width) if mean_field else 1.0)
    change, *distances = _measures(stream(jax.random.key(seed), "wide", width), x, scale, width)
    return float(change), float(distances[0]), float(distances[1])


# Run a few times, on few examples: the compiler's optimisations would cost more than they save.
@functools.partial(jax.jit, static_argnums=3, compiler_options={"xla_backend_optimization_level": 0})
def _measures(key: jax.Array, x: jax.Array, scale: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """Relative change of the parameters, and the distances of the two kernels from the one of infinite width.

    Outputs are multiplied by ``scale``.
    """
    init, f = make_mlp((width, width, 1))
    with jax.numpy_dtype_promotion("standard"):  # parameters start in float32
        params = tree_cast(init(key, INPUTS), jnp.float64)
    found = empirical_ntk(
        lambda p, z: scale * f(p, z)[:, 0],
        params,
        x,
        kernel=("sgd", "preconditioned"),
        preconditioner=ntk_parametrization_preconditioner(params),
    )
    target = jnp.where(jnp.arange(EXAMPLES) % 2 == 0, 1.0, -1.0)
    squared = jnp.vdot(target, kernel_ridge_regression(found["sgd"], target).dual)
    infinite = arccosine_kernels(x, hidden_layers=2).ntk

    def distance(kernel: jax.Array) -> jax.Array:
        return jnp.linalg.norm(kernel - infinite) / jnp.linalg.norm(infinite)

    return jnp.sqrt(squared) / tree_norm(params), distance(found["preconditioned"]), distance(found["sgd"])


CLAIMS = (
    make_claim(
        "relative-change-width",
        "The smallest relative change of parameters that moves outputs by a given amount falls as 1 / width.",
        "cf. section 5",
        "rate",
        relative_change,
        {"mean_field": True},
        "outputs divided by the square root of the width",
        slope=-1.0,
        tolerance=0.1,
        seeds=4,
        max_seeds=12,
    ),
    make_claim(
        "infinite-width",
        "The kernel of a wide network at its initialisation tends to the one of infinite width.",
        "section 5; Jacot et al. 2018, arXiv 1806.07572, theorem 1",
        "limit",
        distance_to_infinite_width,
        {"unit_rates": True},
        "matrices trained at the rate 1",
        tolerance=0.15,
        seeds=4,
        max_seeds=12,
    ),
)
