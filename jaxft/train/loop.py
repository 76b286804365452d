"""The compiled training loop: a segment is a scan over steps on the device, a fit is segments with events between them.

A batch is a row of example indices that is a function of the step alone, so a run that is restored in the middle
takes the same steps as one that was never stopped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.core.checks import is_concrete, leading_size, message, require
from jaxft.core.precision import accumulator
from jaxft.core.types import Inputs, KeyedOutputFn, OutputFn, Params
from jaxft.train.objectives import Objective, require_within

DATA_AXIS = "data"
"""Mesh axis over which a batch is split."""


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    """Steps taken, int32."""
    params: Params
    opt_state: Any


class FitState(NamedTuple):
    """All that ``fit`` changes, and all that a checkpoint needs to hold."""

    train: TrainState
    best_params: Params
    """Parameters of the best dev score so far; the latest ones where nothing is evaluated."""
    best_score: Float[Array, ""]
    """float32; minus infinity before the first evaluation."""
    stale: Int[Array, ""]
    """Events since the best score, int32."""


Labels = Any
"""What outputs are scored against: an array, or a pytree of arrays, whose leading axis is that of the examples."""

Segment = Callable[[TrainState, Inputs, Labels, Int[Array, "steps b"]], tuple[TrainState, Float[Array, "steps"]]]
"""``segment(state, inputs, labels, index)``: the state after one step a row of ``index``, and each step's loss."""


class NonFiniteLossError(FloatingPointError):
    """The loss, or what an update made of the parameters, is NaN or infinite.

    Attributes:
      step: The first bad step, counted from 0: the row of batches whose loss is not finite.
    """

    def __init__(self, step: int, got: str = "a loss that is not"):
        self.step = step
        way_out = (
            "Lower the learning rate or check the inputs, then resume from the last checkpoint, which is before it"
        )
        super().__init__(message("fit", f"the loss must be finite at step {step}", got, way_out))


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Example:
      >>> int(init_state({"w": jnp.zeros(2)}, optax.sgd(0.1)).step)
      0
    """
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def init_fit(train: TrainState) -> FitState:
    """The state of a fit that has evaluated nothing yet.

    Example:
      >>> float(init_fit(init_state({"w": jnp.zeros(2)}, optax.sgd(0.1))).best_score)
      -inf
    """
    return FitState(train, train.params, jnp.asarray(-jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))


def make_segment(
    f: OutputFn | KeyedOutputFn,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    key: Array | None = None,
    accumulate: int = 1,
    frozen: Params | None = None,
) -> Segment:
    """Builds a compiled segment: ``lax.scan`` over steps, each gathering its batch by index on the device.

    Nothing is donated: the state passed in stays valid, and memory holds two states at the end of a segment.

    Args:
      f: Outputs of a batch, ``[b, c]`` or ``[b]``.
      objective: Scalar of outputs and labels.
      tx: Optimiser.
      mesh: Splits every batch over its axis ``data``; the compiler makes data parallelism of it. Place the state by
        ``replicate`` or ``fully_shard`` first: it comes back as it was placed.
      key: For an ``f`` that draws, as for dropout: step s calls ``f(params, x, key=fold_in(key, s))``, so that the
        draw is a function of the key and the step, whether or not the run was stopped in between. Parts of a batch
        fold in their number too.
      accumulate: Parts that a batch is cut into, one after another: memory is that of a part. Gradients are averaged
        over them in float32 at least. The step is that of the whole batch for objectives that are a mean over
        examples, which ``masked_cross_entropy``, a mean over words, is not.
      frozen: Parameters that are not trained, for an ``f`` such as ``make_adapted_outputs`` gives: it is called with
        ``frozen=frozen``. They are an argument of what is compiled, not a constant in it.

    Returns:
      ``segment(state, inputs, labels, index) -> (state, losses)``; ``index`` holds a batch of example numbers a row. It
      compiles once a shape, and raises ``UserError`` where a concrete index names no example or a batch does not split.

    Raises:
      UserError: The mesh has no axis ``data``, or ``accumulate`` is below 1.

    Example:
      >>> tx = optax.sgd(0.5)
      >>> segment = make_segment(lambda w, x: x * w, lambda u, y: (u**2).mean() / 2, tx)
      >>> state = init_state(jnp.float32(1.0), tx)
      >>> state, losses = segment(state, jnp.ones(2), jnp.zeros(2, int), jnp.array([[0], [1]]))
      >>> float(state.params), losses.tolist()
      (0.25, [0.5, 0.125])
    """
    ways = 1
    if mesh is not None:
        axes = mesh.axis_names
        require(DATA_AXIS in axes, "make_segment", f"mesh must have an axis {DATA_AXIS!r}", axes, "Name it so")
        ways = mesh.shape[DATA_AXIS]
    require(accumulate >= 1, "make_segment", "accumulate must be at least 1", accumulate, "Pass a number of parts")
    loss_and_gradients = _accumulated(f, objective, mesh, key, accumulate)

    def run(state: TrainState, inputs: Inputs, labels: Labels, index: Array, fixed: Params) -> tuple[TrainState, Array]:
        def one_step(state: TrainState, rows: Array) -> tuple[TrainState, Array]:
            value, grads = loss_and_gradients(state, (inputs, labels), rows, fixed)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), value

        return jax.lax.scan(one_step, state, index)

    compiled = _placement_kept(run)

    def segment(state: TrainState, inputs: Inputs, labels: Labels, index: Array) -> tuple[TrainState, Array]:
        _check_index(leading_size("segment", (inputs, labels)), index, ways, accumulate)
        return compiled(state, inputs, labels, index, frozen)

    return segment


def _accumulated(
    f: Callable[..., Array], objective: Objective, mesh: Mesh | None, key: Array | None, parts: int
) -> Callable[[TrainState, tuple[Inputs, Labels], Array, Params], tuple[Array, Params]]:
    """Loss and gradients of the examples ``rows``, averaged over parts of them."""

    def loss(params: Params, examples: Any, key: Array | None, frozen: Params) -> Float[Array, ""]:
        given = {"key": key, "frozen": frozen}
        inputs, labels = examples
        return objective(f(params, inputs, **{k: x for k, x in given.items() if x is not None}), labels)

    def of_part(state: TrainState, examples: Any, rows: Array, key: Array | None, frozen: Params) -> Any:
        batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), examples)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))
        return jax.value_and_grad(loss)(state.params, batch, key, frozen)

    def of_batch(state: TrainState, examples: Any, rows: Array, frozen: Params) -> Any:
        drawn = None if key is None else jax.random.fold_in(key, state.step)
        if parts == 1:
            return of_part(state, examples, rows, drawn, frozen)

        def add(total: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
            number, rows = part
            own = None if drawn is None else jax.random.fold_in(drawn, number)
            one = of_part(state, examples, rows, own, frozen)
            return jax.tree.map(lambda a, x: a + x.astype(a.dtype), total, one), None

        shapes = jax.eval_shape(of_part, state, examples, rows[: len(rows) // parts], drawn, frozen)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulator(x.dtype)), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), rows.reshape(parts, -1)))
        return jax.tree.map(lambda a, x: (a / parts).astype(x.dtype), total, shapes)

    return of_batch


def fit(
    segment: Segment,
    state: FitState,
    inputs: Inputs,
    labels: Labels,
    *,
    batches: Callable[[int, int], Any],
    steps: int,
    event_every: int,
    evaluate: Callable[[Params], Any] | None = None,
    on_event: Callable[[FitState, np.ndarray, float], bool | None] | None = None,
    patience: int | None = None,
) -> FitState:
    """Trains in segments from ``state.train.step`` to ``steps``, with an event after each.

    Events lie at the multiples of ``event_every`` and at ``steps``. Calling again with a restored state takes the same
    steps, bitwise, as a run that was not stopped. The initial point is a candidate for the best.

    Args:
      segment: From ``make_segment``.
      state: From ``init_fit``, or restored.
      inputs: All training examples; batches are gathered from them.
      labels: Their labels, an array or a tree of arrays.
      batches: ``batches(start, stop)``: example numbers ``[stop - start, b]`` of steps start to stop - 1.
      steps: Steps of the whole run.
      event_every: Steps between events.
      evaluate: Dev score of parameters, higher is better; ties keep the earlier point.
      on_event: Called with the state, the segment's losses and the score (NaN without ``evaluate``); to save and to
        log. Returning True stops the fit.
      patience: Stops after this many events without gain.

    Returns:
      The state at the end.

    Raises:
      UserError: ``steps``, ``event_every`` or ``patience`` is out of range, or batches have another shape.
      NonFiniteLossError: A loss or a parameter is not finite. It is raised before ``on_event``, so the last
        checkpoint stays a good one.
    """
    _check_options(steps, event_every, patience, evaluate is not None)
    if evaluate is not None and float(state.best_score) == -np.inf:
        state = state._replace(best_score=_scalar(evaluate(state.train.params), state.best_score))
    while (start := int(state.train.step)) < steps and (patience is None or int(state.stale) < patience):
        # Segments end on one grid wherever they start, so that a resumed run sees the events of an uninterrupted one.
        stop = min((start // event_every + 1) * event_every, steps)
        index = jnp.asarray(batches(start, stop))
        rows = f"shape {index.shape} for steps {start}..{stop - 1}"
        one_row_a_step = index.ndim == 2 and index.shape[0] == stop - start
        require(one_row_a_step, "fit", "batches(start, stop) must be [stop - start, b]", rows, "Return a row a step")
        train, losses = segment(state.train, inputs, labels, index)
        losses = np.asarray(losses)
        _require_finite(start, losses, train.params)
        score = np.float32(np.nan) if evaluate is None else np.float32(evaluate(train.params))
        state = _after_event(state, train, score, evaluated=evaluate is not None)
        if on_event is not None and on_event(state, losses, float(score)):
            break
    return state


def _after_event(state: FitState, train: TrainState, score: np.float32, *, evaluated: bool) -> FitState:
    if not evaluated:
        return FitState(train, train.params, state.best_score, state.stale)
    if score > float(state.best_score):
        return FitState(train, train.params, _scalar(score, state.best_score), _scalar(0, state.stale))
    return state._replace(train=train, stale=state.stale + 1)


def _scalar(value: Any, like: Array) -> Array:
    """``value`` in the dtype and placement of ``like``: on all processes, where the state is."""
    value = np.asarray(value, like.dtype)
    return jax.device_put(value, like.sharding) if like.committed else jnp.asarray(value)


def _placement_kept(run: Callable[..., Any]) -> Callable[..., Any]:
    """``jit`` of a scan over states whose result has the shardings of the state passed in.

    Left to itself the compiler may choose others, and the next segment would be compiled anew for them.
    """
    compiled: dict[Any, Callable[..., Any]] = {}

    def call(state: TrainState, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(state)
        shardings = tuple(x.sharding if _is_placed(x) else None for x in leaves)
        if (tree, shardings) not in compiled:
            placed = jax.tree.unflatten(tree, shardings)
            compiled[tree, shardings] = jax.jit(run, out_shardings=(placed, None))
        return compiled[tree, shardings](state, *args)

    return call


def _is_placed(x: Any) -> bool:
    return isinstance(x, jax.Array) and is_concrete(x) and x.committed


@jax.jit
def _all_finite(tree: Any) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _require_finite(start: int, losses: np.ndarray, params: Params) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise NonFiniteLossError(start + int(bad[0]), f"{losses[bad[0]]}")
    # The last update has met no loss yet; saved unseen, it would make the newest checkpoint a bad one.
    if not bool(_all_finite(params)):
        raise NonFiniteLossError(start + len(losses), "parameters that are not, after the update before it")


def _check_index(examples: int, index: Array, ways: int, parts: int) -> None:
    matrix = index.ndim == 2 and 0 not in index.shape and jnp.issubdtype(index.dtype, jnp.integer)
    got = f"{index.dtype} {index.shape}"
    require(matrix, "segment", "index must be integers [steps, b]", got, "Pass a row of example numbers a step")
    rule = f"the batch must split over the {ways} devices of axis {DATA_AXIS!r}"
    if parts > 1:
        rule = f"the batch must split into {parts} parts" + (rule[rule.index(" over") :] if ways > 1 else "")
    split = index.shape[1] % (ways * parts) == 0
    require(split, "segment", rule, f"{index.shape[1]} examples", f"Use a multiple of {ways * parts}")
    require_within("segment", "index", index, examples, "Draw batches from these examples")


def _check_options(steps: int, event_every: int, patience: int | None, evaluated: bool) -> None:
    faults = {
        f"steps {steps}": steps < 0,
        f"event_every {event_every}": event_every < 1,
        f"patience {patience}": patience is not None and patience < 1,
        f"patience {patience} without evaluate": patience is not None and not evaluated,
    }
    bad = ", ".join(text for text, wrong in faults.items() if wrong)
    rule = "steps must be >= 0, event_every and patience >= 1, and patience needs evaluate"
    require(not bad, "fit", rule, bad, "Change the options named")
