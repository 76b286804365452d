r"""Optimisers and schedules: sign descent, and Adam with a frozen second moment (Adam-NTK).

The last makes a prediction exact. With $\hat v$ frozen, Adam is preconditioned momentum descent with
$P = \operatorname{diag}(1 / (\sqrt{\hat v} + \epsilon))$. For a model linearised at the freeze, outputs then follow
kernel descent with $K = J P J^\top$ and the same momentum in function space: with $\chi_t$ the derivative of the
objective by the outputs,
$s_t = \beta_1 s_{t-1} + (1 - \beta_1) \chi_t$ and $f \leftarrow f - \eta K s_t / (1 - \beta_1^t)$.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxft.core.checks import nearest, require

Schedule = Callable[..., Any]
"""Learning rate as a function of the number of steps taken."""


class AdamNTKState(NamedTuple):
    """State of ``adam_ntk``."""

    count: Int[Array, ""]
    """Steps taken."""
    mu: Any
    """First moment, not bias-corrected."""
    nu: Any
    """Second moment: the given one, or that of Adam, which stops moving after the warmup."""


def sign_descent(learning_rate: float | Schedule) -> optax.GradientTransformation:
    """Descent along the sign of the gradient: the update is -learning_rate * sign(g), and 0 where g is 0.

    Example:
      >>> tx = sign_descent(0.5)
      >>> tx.update(jnp.array([3.0, -1e-9, 2.0]), tx.init(jnp.zeros(3)))[0].tolist()
      [-0.5, 0.5, -0.5]
    """
    return optax.sign_sgd(learning_rate)


def adam_ntk(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    warmup: int = 0,
    second_moment: PyTree | None = None,
) -> optax.GradientTransformation:
    r"""Adam whose second moment is frozen, from a given state or after ordinary Adam steps.

    The update is $-\eta\, \hat m_t / (\sqrt{\hat v} + \epsilon)$, with $\hat m_t$ Adam's bias-corrected first moment
    and $\hat v$ held: ``second_moment``, or $\nu_w / (1 - \beta_2^w)$ after ``warmup`` $= w$ steps, which are those of
    ``optax.adam``. Weight decay is not covered: it would move outputs by more than the kernel.

    Args:
      learning_rate: Step size, or a schedule of the step count.
      b1: Decay of the first moment.
      b2: Decay of the second moment during the warmup.
      eps: Added to the square root.
      warmup: Ordinary Adam steps before the freeze.
      second_moment: Bias-corrected second moment, a pytree like the parameters (see ``preconditioners``).

    Returns:
      The optimiser. The frozen moment is part of its state, so it is saved and sharded with it.

    Raises:
      UserError: Neither or both of ``warmup`` and ``second_moment`` are given, or an option is out of range.

    Example:
      >>> tx = adam_ntk(1.0, b1=0.0, eps=0.0, second_moment=jnp.array([4.0, 1.0]))
      >>> tx.update(jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)))[0].tolist()
      [-0.5, -1.0]
    """
    where, given = "adam_ntk", second_moment is not None
    require(warmup >= 0, where, "warmup must not be negative", warmup, "Pass a number of steps")
    source = "a second moment and a warmup" if given else "neither a second moment nor a warmup"
    require(
        given != (warmup > 0),
        where,
        "the second moment must be frozen from one source",
        source,
        "Pass second_moment=second_moment(opt_state, b2=...) of an Adam run, or warmup >= 1 steps of Adam",
    )
    decays = 0 <= b1 < 1 and 0 <= b2 < 1 and eps >= 0
    require(decays, where, "b1, b2 must lie in [0, 1) and eps be >= 0", (b1, b2, eps), "See Adam's defaults")

    def init(params: PyTree) -> AdamNTKState:
        if given:
            _check_moment(where, second_moment, params)
        nu = jax.tree.map(jnp.array, second_moment) if given else optax.tree.zeros_like(params)
        return AdamNTKState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), nu)

    def update(updates: PyTree, state: AdamNTKState, params: PyTree | None = None) -> tuple[PyTree, AdamNTKState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = state.nu
        if not given:
            moved = optax.tree.update_moment_per_elem_norm(updates, nu, b2, 2)
            nu = jax.tree.map(lambda new, old: jnp.where(count <= warmup, new, old), moved, nu)
        v_hat = nu if given else optax.tree.bias_correction(nu, b2, jnp.minimum(count, warmup))
        m_hat = optax.tree.bias_correction(mu, b1, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m_hat, v_hat)
        return direction, AdamNTKState(count, mu, nu)

    frozen = optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
    return optax.chain(frozen, optax.scale_by_learning_rate(learning_rate))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "sign": sign_descent,
    "adam_ntk": adam_ntk,
}


def make_optimizer(name: str, learning_rate: float | Schedule, **options: Any) -> optax.GradientTransformation:
    """The optimiser of a name: ``sgd``, ``adam``, ``sign`` or ``adam_ntk``.

    Args:
      name: Key of ``OPTIMIZERS``.
      learning_rate: Step size, or a schedule of the step count.
      **options: Passed on, such as ``momentum``, ``b1``, ``eps`` or ``warmup``.

    Returns:
      The optax transform.

    Raises:
      UserError: An unknown name or option.

    Example:
      >>> tx = make_optimizer("sgd", 0.1, momentum=0.9)
    """
    known = name in OPTIMIZERS
    require(known, "make_optimizer", "name must be an optimiser", repr(name), nearest(name, OPTIMIZERS))
    allowed = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"learning_rate"}
    unknown = sorted(set(options) - allowed)
    hint = " ".join(f"{x}: {nearest(x, allowed)}" if allowed else "It takes none" for x in unknown)
    require(not unknown, "make_optimizer", f"{name} must be given options it has", ", ".join(unknown), hint)
    return OPTIMIZERS[name](learning_rate, **options)


def make_schedule(peak: float, steps: int, *, kind: str = "constant", warmup_frac: float = 0.0) -> Schedule:
    """Learning rate by step: a linear warmup from 0, then constant or a linear decay to 0.

    With w = round(warmup_frac * steps): peak * step / w before step w, then ``peak``, or
    peak * (steps - step) / (steps - w). The first step of a warmup has learning rate 0.

    Args:
      peak: Largest learning rate.
      steps: Length of the run.
      kind: ``"constant"`` or ``"linear"``.
      warmup_frac: Part of the run that warms up, in [0, 1).

    Returns:
      A function of the step.

    Raises:
      UserError: An unknown kind, or a number out of range; all faults at once.

    Example:
      >>> rate = make_schedule(1.0, 10, kind="linear", warmup_frac=0.2)
      >>> [float(rate(step)) for step in (0, 1, 2, 6, 10)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    faults = {
        f"kind {kind!r}": kind not in ("constant", "linear"),
        f"steps {steps}": steps < 1,
        f"warmup_frac {warmup_frac}": not 0 <= warmup_frac < 1,
    }
    bad = ", ".join(text for text, wrong in faults.items() if wrong)
    rule = "kind must be constant or linear, steps >= 1, warmup_frac in [0, 1)"
    require(not bad, "make_schedule", rule, bad, "Change the fields named")
    warm = min(round(warmup_frac * steps), steps - 1)

    def rate(step: Any) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(warm, 1)
        falling = jnp.maximum(steps - step, 0) / (steps - warm) if kind == "linear" else jnp.ones_like(step)
        return peak * jnp.where(step < warm, rising, falling)

    return rate


def _check_moment(where: str, moment: PyTree, params: PyTree) -> None:
    got = jax.tree.structure(moment) == jax.tree.structure(params)
    next_step = "Take it from a run of the same model and trainable part"
    require(got, where, "second_moment must have the structure of the parameters", "another", next_step)
    shapes = [
        (jnp.shape(v), jnp.shape(p)) for v, p in zip(jax.tree.leaves(moment), jax.tree.leaves(params), strict=True)
    ]
    wrong = [pair for pair in shapes if pair[0] != pair[1]]
    require(not wrong, where, "second_moment must have the shapes of the parameters", wrong[:3], next_step)
