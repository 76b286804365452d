r"""One example of one token over time: its path in closed form, and by an ODE solver on gradients of autodiff.

The margin $\langle D, h \rangle$, $D = W_+ - W_-$, is bilinear, and every margin loss moves along its gradient at
its own speed, $-\ell'$. By the clock $d\tau = -\ell' dt$ therefore $\dot D = 2 h$ and $\dot h = D$, while
$W_+ + W_-$ and all other rows of W rest:

$h(\tau) = h_0 \cosh \sqrt 2 \tau + D_0 \sinh(\sqrt 2 \tau) / \sqrt 2$,
$D(\tau) = D_0 \cosh \sqrt 2 \tau + \sqrt 2\, h_0 \sinh \sqrt 2 \tau$;

with W fixed $h = h_0 + D_0 \tau$, with h fixed $D = D_0 + 2 h_0 \tau$. In joint training the logit of $y^+$ gains like
the square of what any third token can gain: whatever $\pi(y^+)$ loses on the way, it tends to 1 as the margin grows
without end. With W fixed all logits are linear in $\tau$, and the token furthest along D ends with all probability.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.integrate import solve_ivp

from theory.likelihood_displacement.rates import rate_single_token, rate_through_unembedding
from theory.likelihood_displacement.ufm import Loss, compiled, feature_batch, response_log_probs

Trained = Literal["both", "hidden", "unembedding"]
MOVES: dict[Trained, tuple[float, float]] = {"both": (1.0, 1.0), "hidden": (1.0, 0.0), "unembedding": (0.0, 1.0)}
"""Whether h and W move."""

CLOCK = Loss("slic", {"delta": 1e3})
"""Slope -1 at any margin in reach: its time is the clock of the closed form."""
LOSSES_IN_TIME = (
    CLOCK,
    Loss("sigmoid", {}),
    Loss("ipo", {}, beta=1 / 200),
    Loss("gpo", {"f": "exponential"}),
    Loss("rebel", {"rewards": (100.0, 0.0)}),
)
"""Losses under which flows are integrated; their targets, if they have one, are at a margin of 100."""


LATEST = 1e6
"""Time by which a flow that does not reach its last margin is given up."""
WITHIN = 4
"""Times in a step of the solver at which log-probabilities are read."""


class Pair(NamedTuple):
    """An instance of one prompt: token 0 is the chosen response, 1 the rejected one, 2 the token z."""

    table: Float[np.ndarray, "v d"]
    hidden: Float[np.ndarray, "d"]

    @property
    def difference(self) -> Float[np.ndarray, "d"]:
        """W+ - W-."""
        return self.table[0] - self.table[1]

    def log_probs(self) -> Float[np.ndarray, "v"]:
        """Of all tokens."""
        logits = self.table @ self.hidden
        return logits - np.logaddexp.reduce(logits)


def constructed_pair(gap: float, *, width: int = 16) -> Pair:
    """W+ = 2 e2, W- = 2 e2 - 3 e1, Wz = gap e1 - e2 and h = e2: both responses have probability 0.488, z has 0.024."""
    e1, e2 = np.eye(2, width)
    return Pair(np.stack([2 * e2, 2 * e2 - 3 * e1, gap * e1 - e2]), e2)


def closed_form(pair: Pair, clock: Float[np.ndarray, "time"], *, trained: Trained = "both") -> list[Pair]:
    """Where the pair is by each reading of the clock.

    Args:
      pair: Its start.
      clock: Times, weighted by the slope of the loss.
      trained: What moves.

    Returns:
      The pair at each time.
    """
    root, h, d = np.sqrt(2), pair.hidden, pair.difference
    half = (pair.table[0] + pair.table[1]) / 2
    path = []
    for t in clock:
        c, s = np.cosh(root * t), np.sinh(root * t)
        hidden, difference = {
            "both": (h * c + d * s / root, d * c + root * h * s),
            "hidden": (h + d * t, d),
            "unembedding": (h, d + 2 * h * t),
        }[trained]
        rows = np.stack([half + difference / 2, half - difference / 2])
        path.append(Pair(np.concatenate([rows, pair.table[2:]]), hidden))
    return path


def margin(pair: Pair) -> float:
    """Of the pair: ln pi(y+) - ln pi(y-)."""
    return float(pair.difference @ pair.hidden)


def rate_by_clock(pair: Pair, *, hidden_only: bool = False) -> float:
    """The rate of ln pi(y+) by theorem 4, in time of the clock; ``hidden_only`` leaves out what goes through W."""
    through_both, through_table = _rates(*pair)
    return float(through_both) - (float(through_table) if hidden_only else 0.0)


@compiled
def _rates(table: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    at = table, hidden, jnp.int32(0), jnp.int32(1), jnp.asarray(-1.0, table.dtype)
    return rate_single_token(*at), rate_through_unembedding(*at)


def measured_rate(pair: Pair, trained: Trained) -> float:
    """The same by autodiff."""
    return float(_chosen_rate(*pair, jnp.int32(LOSSES_IN_TIME.index(CLOCK)), jnp.asarray(MOVES[trained])))


class Flow(NamedTuple):
    """A flow that was integrated, at the margins asked for."""

    pairs: list[Pair]
    turns: list[Pair]
    """Where ln pi(y+) turns from falling to rising."""
    losses: Float[np.ndarray, "steps"]
    """At every step of the solver, in order."""
    log_probs: Float[np.ndarray, "times v"]
    """There, and at several times within each step."""
    calls: int
    """Of the gradient."""


def integrated(
    pair: Pair, loss: Loss, margins: Sequence[float], *, trained: Trained = "both", tolerance: float = 1e-10
) -> Flow:
    """The gradient flow of a loss, by an explicit Runge-Kutta method of order 8 with error control.

    Args:
      pair: The start.
      loss: One of ``LOSSES_IN_TIME``.
      margins: Rising margins, where the pair is read off; the flow ends at the last.
      trained: What moves.
      tolerance: Relative tolerance of a step; the absolute one is the same.

    Returns:
      The flow.
    """
    v, d = pair.table.shape
    index, moves = jnp.int32(LOSSES_IN_TIME.index(loss)), jnp.asarray(MOVES[trained])

    def unpack(y: np.ndarray) -> Pair:
        return Pair(y[d:].reshape(v, d), y[:d])

    def velocity(_: float, y: np.ndarray) -> np.ndarray:
        return np.asarray(_velocity(*unpack(y), index, moves))

    def reaches(level: float) -> Callable[[float, np.ndarray], float]:
        return lambda _, y: margin(unpack(y)) - level

    def turns(_: float, y: np.ndarray) -> float:
        return float(_chosen_rate(*unpack(y), index, moves))

    events: list[Any] = [turns, *(reaches(level) for level in margins)]
    events[0].direction, events[-1].terminal = 1.0, True
    start = np.concatenate([pair.hidden, pair.table.ravel()])
    options: dict[str, Any] = {"method": "DOP853", "rtol": tolerance, "atol": tolerance, "dense_output": True}
    return _read_off(solve_ivp(velocity, (0.0, LATEST), start, events=events, **options), unpack, index)


def _read_off(found: Any, unpack: Callable[[np.ndarray], Pair], index: jax.Array) -> Flow:
    """What the solver found, with log-probabilities also within its steps."""
    reached = [margin(unpack(y)) for y in found.y.T]
    # Padded with the last, so that one program does for any number of steps up to 512.
    losses = np.asarray(_losses(jnp.asarray(np.pad(reached, (0, -len(reached) % 512), mode="edge")), index))
    steps = np.arange(len(found.t))
    times = np.interp(np.arange(0, steps[-1] + 1e-9, 1 / WITHIN), steps, found.t)
    log_probs = np.stack([unpack(y).log_probs() for y in found.sol(times).T])
    turned, *there = [[unpack(y) for y in ys] for ys in found.y_events]
    return Flow([pairs[0] for pairs in there], turned, losses[: len(reached)], log_probs, int(found.nfev))


def _direction(table: jax.Array, hidden: jax.Array, index: jax.Array, moves: jax.Array) -> jax.Array:
    grads = jax.grad(lambda p: _loss(_log_probs(p), index)[0])({"hidden": hidden, "unembedding": table})
    return -jnp.concatenate([moves[0] * grads["hidden"], moves[1] * grads["unembedding"].ravel()])


_velocity = compiled(_direction)


@compiled
def _chosen_rate(table: jax.Array, hidden: jax.Array, index: jax.Array, moves: jax.Array) -> jax.Array:
    velocity = _direction(table, hidden, index, moves)
    split = {"hidden": velocity[: len(hidden)], "unembedding": velocity[len(hidden) :].reshape(table.shape)}
    return jax.jvp(lambda p: _log_probs(p)[0, 0], ({"hidden": hidden, "unembedding": table},), (split,))[1]


def _log_probs(params: dict[str, jax.Array]) -> jax.Array:
    """Of the chosen and the rejected response, by the model on which the theorems are checked."""
    one = np.ones((1, 2, 1), np.int32)
    batch = feature_batch(0 * one, np.arange(2, dtype=np.int32)[None, :, None], one)
    return response_log_probs({**params, "hidden": params["hidden"][None]}, batch)


def _loss(log_probs: jax.Array, index: jax.Array) -> jax.Array:
    branches = [
        lambda x, loss=loss: loss.values(x, jnp.zeros_like(x), jnp.ones_like(x, jnp.int32)) for loss in LOSSES_IN_TIME
    ]
    return jax.lax.switch(index, branches, log_probs)


@compiled
def _losses(margins: jax.Array, index: jax.Array) -> jax.Array:
    return _loss(jnp.stack([margins, jnp.zeros_like(margins)], axis=1), index)
