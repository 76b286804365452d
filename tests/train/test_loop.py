import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.train import NonFiniteLossError, cross_entropy, fit, init_fit, init_state, make_segment


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def run(problem, state=None, **options):
    """A fit of 10 steps with events of 4; returns the state and what its events saw."""
    seen = []

    def on_event(state, losses, score):
        seen.append((int(state.train.step), losses, score))
        return

    options = {"steps": 10, "event_every": 4, "on_event": on_event, "batches": problem.batches} | options
    state = init_fit(problem.state) if state is None else state
    return fit(problem.segment, state, problem.inputs, problem.labels, **options), seen


def test_segment_equals_a_python_loop_of_steps(problem):
    index = problem.batches(0, 4)
    state, losses = problem.segment(problem.state, problem.inputs, problem.labels, jnp.asarray(index))
    params, opt_state, expected = problem.state.params, problem.state.opt_state, []
    for rows in index:
        x, y = {"a": problem.inputs["a"][rows]}, problem.labels[rows]
        value, grads = jax.value_and_grad(lambda p, x=x, y=y: cross_entropy(problem.f(p, x), y))(params)
        updates, opt_state = problem.tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        expected.append(value)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, params)
    assert int(state.step) == 4
    assert state.step.dtype == jnp.int32


def test_segment_leaves_its_argument_valid(problem):
    before = jax.tree.map(np.asarray, problem.state)
    index = jnp.asarray(problem.batches(0, 4))
    first = problem.segment(problem.state, problem.inputs, problem.labels, index)
    assert equal(before, problem.state)
    assert equal(first, problem.segment(problem.state, problem.inputs, problem.labels, index))


def test_segment_runs_inside_jit(problem):
    index = jnp.asarray(problem.batches(0, 4))
    outer = jax.jit(problem.segment)(problem.state, problem.inputs, problem.labels, index)
    closed = jax.jit(lambda state: problem.segment(state, problem.inputs, problem.labels, index))(problem.state)
    inner = problem.segment(problem.state, problem.inputs, problem.labels, index)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), outer, inner)
    assert equal(outer, closed)


def test_segment_keeps_double_precision(problem, x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), problem.state.params)
    state = init_state(params, problem.tx)
    inputs = {"a": problem.inputs["a"].astype(jnp.float64)}
    state, losses = problem.segment(state, inputs, problem.labels, jnp.asarray(problem.batches(0, 4)))
    assert losses.dtype == jnp.float64
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(state.params))
    assert state.step.dtype == jnp.int32


def test_scalar_outputs_train_too():
    tx = optax.sgd(0.5)
    segment = make_segment(lambda w, x: x @ w, cross_entropy, tx)
    x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1, 0])
    state, losses = segment(init_state(jnp.zeros(2), tx), x, y, jnp.array([[0, 1]] * 5))
    assert losses[-1] < losses[0]
    assert state.params[0] > 0 > state.params[1]


def test_resume_in_the_middle_equals_an_uninterrupted_run_bitwise(problem):
    whole, events = run(problem, evaluate=problem.error)
    half, first = run(problem, evaluate=problem.error, on_event=lambda state, *_: int(state.train.step) == 4)
    assert int(half.train.step) == 4
    assert not first
    half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    resumed, rest = run(problem, half, evaluate=problem.error)
    assert equal(whole, resumed)
    assert [step for step, *_ in events] == [4, 8, 10]
    assert [step for step, *_ in rest] == [8, 10]
    assert equal([x[1:] for x in events[1:]], [x[1:] for x in rest])


def test_events_lie_on_one_grid_wherever_the_run_starts(problem):
    start = problem.segment(problem.state, problem.inputs, problem.labels, jnp.asarray(problem.batches(0, 2)))[0]
    _, events = run(problem, init_fit(start))
    assert [(step, len(losses)) for step, losses, _ in events] == [(4, 2), (8, 4), (10, 2)]


def test_a_finished_run_takes_no_step(problem):
    done, _ = run(problem)
    again, events = run(problem, done)
    assert equal(done, again)
    assert not events


def test_best_parameters_are_those_of_the_best_event(problem):
    points, scores = [], iter([0.1, 0.5, 0.5, 0.3])
    _, events = run(problem, on_event=lambda state, *_: points.append(state.train.params))
    state, _ = run(problem, evaluate=lambda _: next(scores))
    assert not events
    assert equal(state.best_params, points[0])  # the tie at the second event keeps the first
    assert float(state.best_score) == np.float32(0.5)
    assert state.best_score.dtype == jnp.float32
    assert int(state.stale) == 2


def test_initial_point_is_a_candidate_and_is_scored_once(problem):
    scores = iter([0.9, 0.1, 0.2, 0.3])
    state, events = run(problem, evaluate=lambda _: next(scores))
    assert equal(state.best_params, problem.state.params)
    assert not equal(state.train.params, problem.state.params)
    np.testing.assert_allclose([score for *_, score in events], [0.1, 0.2, 0.3], rtol=1e-6)


def test_a_score_that_float32_rounds_down_is_no_gain_over_itself(problem):
    state, _ = run(problem, evaluate=lambda _: 0.7)
    assert int(state.stale) == 3


def test_patience_stops_and_a_stopped_run_stays_stopped(problem):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    options = {"event_every": 2, "patience": 2, "evaluate": lambda _: next(scores)}
    state, events = run(problem, **options)
    assert [step for step, *_ in events] == [2, 4, 6]
    again, events = run(problem, state, **options)
    assert not events
    assert equal(state, again)


def test_nan_score_is_never_the_best(problem):
    scores = iter([0.1, float("nan"), 0.2, float("nan")])
    state, _ = run(problem, evaluate=lambda _: next(scores))
    assert float(state.best_score) == np.float32(0.2)
    assert int(state.stale) == 1


def test_without_evaluation_the_best_parameters_are_the_latest(problem):
    state, events = run(problem)
    assert equal(state.best_params, state.train.params)
    assert all(np.isnan(score) for *_, score in events)


@pytest.mark.parametrize("bad_step", [0, 5, 9])
def test_non_finite_loss_names_its_step_before_the_event(problem, bad_step):
    poisoned = {"a": problem.inputs["a"].at[7].set(jnp.nan)}

    def batches(start, stop):
        return np.array([[7 if step == bad_step else 1, 0, 2, 3] for step in range(start, stop)])

    events = []
    with pytest.raises(NonFiniteLossError, match=rf"step {bad_step}, got nan\. .*resume") as caught:
        fit(
            problem.segment,
            init_fit(problem.state),
            poisoned,
            problem.labels,
            batches=batches,
            steps=10,
            event_every=4,
            on_event=lambda state, *_: events.append(int(state.train.step)),
        )
    assert caught.value.step == bad_step
    assert events == [k for k in (4, 8, 10) if k <= bad_step]


def test_an_update_that_breaks_parameters_at_a_segments_end_is_caught_before_the_event():
    tx = optax.sgd(1.0)
    # The loss |w|^1/2 is finite at 0, its gradient is not.
    segment = make_segment(lambda w, x: x * jnp.sqrt(w), lambda u, y: u.mean(), tx)
    state, events = init_fit(init_state(jnp.float32(0.0), tx)), []
    with pytest.raises(NonFiniteLossError, match="step 1, got parameters") as caught:
        fit(
            segment,
            state,
            jnp.ones(2),
            jnp.zeros(2, jnp.int32),
            batches=lambda start, stop: np.zeros((stop - start, 1), int),
            steps=3,
            event_every=1,
            on_event=lambda *args: events.append(args),
        )
    assert caught.value.step == 1
    assert not events


def noisy(params, x, *, key=None):
    """Outputs that a key disturbs."""
    clean = jnp.tanh(x["a"] @ params["in"] + params["bias"][None]) @ params["out"]
    return clean if key is None else clean + jax.random.normal(key, clean.shape)


def test_a_key_is_folded_with_the_step(problem):
    key, index = jax.random.key(3), problem.batches(0, 3)
    segment = make_segment(noisy, cross_entropy, problem.tx, key=key)
    state, losses = segment(problem.state, problem.inputs, problem.labels, jnp.asarray(index))
    params, opt_state = problem.state.params, problem.state.opt_state
    for step, rows in enumerate(index):
        x, y, folded = {"a": problem.inputs["a"][rows]}, problem.labels[rows], jax.random.fold_in(key, step)
        value, grads = jax.value_and_grad(lambda p, x=x, y=y, k=folded: cross_entropy(noisy(p, x, key=k), y))(params)
        updates, opt_state = problem.tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(losses[step], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, params)


def test_resume_of_a_run_with_dropout_is_bitwise(problem):
    segments = [make_segment(noisy, cross_entropy, problem.tx, key=jax.random.key(seed)) for seed in (3, 4)]
    keyed, other = (problem._replace(segment=segment) for segment in segments)
    whole, _ = run(keyed)
    half, _ = run(keyed, on_event=lambda state, *_: int(state.train.step) == 4)
    half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    # Built anew, as after a restart.
    again = make_segment(noisy, cross_entropy, problem.tx, key=jax.random.key(3))
    resumed, _ = run(problem._replace(segment=again), half)
    assert int(half.train.step) == 4
    assert equal(whole, resumed)
    assert not equal(whole.train.params, run(other)[0].train.params)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(problem, accumulate):
    index = jnp.asarray(problem.batches(0, 4))
    tx = optax.sgd(0.3)  # Adam would blow rounding up where a gradient is near 0
    start = init_state(problem.state.params, tx)
    parts = make_segment(problem.f, cross_entropy, tx, accumulate=accumulate)
    whole, losses = make_segment(problem.f, cross_entropy, tx)(start, problem.inputs, problem.labels, index)
    state, of_parts = parts(start, problem.inputs, problem.labels, index)
    np.testing.assert_allclose(of_parts, losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), state.params, whole.params)


def test_parts_are_averaged_in_single_precision():
    # Four gradients of 1 and twelve of 2^-9: bfloat16 keeps eight bits, so that 1 + 2^-9 is 1 in it.
    small = 2.0**-9
    x = jnp.asarray([1.0, *[small] * 3] * 4, jnp.bfloat16)
    tx = optax.sgd(1.0)
    segment = make_segment(lambda w, x: x * w, lambda u, _: u.mean(), tx, accumulate=16)
    state, _ = segment(init_state(jnp.bfloat16(0.0), tx), x, jnp.zeros(16, int), jnp.arange(16)[None])
    assert state.params.dtype == jnp.bfloat16
    assert float(state.params) == float(jnp.bfloat16(-(4 + 12 * small) / 16))


def test_resume_of_an_accumulated_run_with_dropout_is_bitwise(problem):
    segment = make_segment(noisy, cross_entropy, problem.tx, key=jax.random.key(3), accumulate=2)
    accumulated = problem._replace(segment=segment)
    whole, _ = run(accumulated)
    half, _ = run(accumulated, on_event=lambda state, *_: int(state.train.step) == 4)
    resumed, _ = run(accumulated, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half))
    assert int(half.train.step) == 4
    assert equal(whole, resumed)


def test_parts_of_a_batch_draw_apart():
    tx, zeros = optax.sgd(0.0), jnp.zeros(2)

    def drawn(w, x, *, key=None):
        return w + (x if key is None else jax.random.normal(key, x.shape))

    segment = make_segment(drawn, lambda u, _: u.mean(), tx, key=jax.random.key(0), accumulate=2)
    _, losses = segment(init_state(jnp.float32(0.0), tx), zeros, zeros, jnp.array([[0, 1]]))
    of_step = jax.random.fold_in(jax.random.key(0), 0)
    first, second = (float(jax.random.normal(jax.random.fold_in(of_step, part), ())) for part in range(2))
    np.testing.assert_allclose(losses[0], (first + second) / 2, rtol=1e-6)
    assert first != second


def test_labels_may_be_a_tree(problem):
    weights = jnp.asarray(np.random.default_rng(2).uniform(size=16), jnp.float32)
    index = problem.batches(0, 1)

    def weighted(outputs, labels):
        return (labels["weight"] * outputs[:, 0]).mean() + cross_entropy(outputs, labels["class"])

    labels = {"class": problem.labels, "weight": weights}
    segment = make_segment(problem.f, weighted, problem.tx)
    _, losses = segment(problem.state, problem.inputs, labels, jnp.asarray(index))
    outputs = problem.f(problem.state.params, {"a": problem.inputs["a"][index[0]]})
    one = {name: x[index[0]] for name, x in labels.items()}
    np.testing.assert_allclose(losses[0], weighted(outputs, one), rtol=1e-6)


def test_frozen_parameters_are_an_argument_of_the_program(problem):
    frozen = {"in": problem.state.params["in"]}

    def f(params, x, *, frozen):
        return problem.f(params | frozen, x)

    params = {name: x for name, x in problem.state.params.items() if name != "in"}
    segment = make_segment(f, cross_entropy, problem.tx, frozen=frozen)
    args = (init_state(params, problem.tx), problem.inputs, problem.labels, jnp.asarray(problem.batches(0, 2)))
    state, losses = segment(*args)
    held = make_segment(lambda p, x: problem.f(p | frozen, x), cross_entropy, problem.tx)
    expected, expected_losses = held(*args)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state, expected)
    assert set(state.params) == {"bias", "out"}
