from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.train import (
    OBJECTIVES,
    adam_ntk,
    adam_preconditioner,
    init_state,
    make_optimizer,
    make_schedule,
    make_segment,
    second_moment,
    sign_descent,
)
from jaxft.train.transforms import OPTIMIZERS

N, C, STEPS, ETA, EPS = 4, 3, 12, 0.05, 1e-3
ALL = jnp.tile(jnp.arange(N), (STEPS, 1))


def update_of(tx: optax.GradientTransformation, grads: Any, state: Any) -> tuple[Any, Any]:
    """One update and the state after it."""
    return tx.update(grads, state, grads)


class Linear:
    """A model that is linear in its parameters, ``f(w) = f0 + J w``, with a pytree of two leaves."""

    def __init__(self):
        rng = np.random.default_rng(2)
        self.jacobian = rng.normal(size=(N * C, 11))
        self.start = rng.normal(size=11)
        self.moment = rng.uniform(0.1, 4.0, size=11)
        self.labels = np.array([0, 2, 1, 1])

    def tree(self, w):
        return {"a": jnp.asarray(w[:5]), "b": jnp.asarray(w[5:]).reshape(2, 3)}

    def flat(self, tree):
        return np.concatenate([np.asarray(tree["a"]), np.asarray(tree["b"]).ravel()])

    def f(self, params, rows):
        w = jnp.concatenate([params["a"], params["b"].ravel()])
        return (rows.reshape(-1, 11) @ w).reshape(-1, C)

    def chi(self, f, objective):
        """Output derivative of the mean objective, by numpy."""
        f = f.reshape(N, C)
        onehot = np.eye(C)[self.labels]
        p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
        return (((f if objective == "mse" else p) - onehot) / N).ravel()

    def train(self, tx, objective, state=None, steps=STEPS):
        """Outputs after each step of real training."""
        segment = make_segment(self.f, OBJECTIVES[objective], tx)
        state = init_state(self.tree(self.start), tx) if state is None else state
        rows = jnp.asarray(self.jacobian).reshape(N, C, 11)
        outputs = []
        for k in range(steps):
            state, _ = segment(state, rows, jnp.asarray(self.labels), ALL[k : k + 1])
            outputs.append(self.jacobian @ self.flat(state.params))
        return state, np.stack(outputs)


@pytest.fixture(scope="module")
def linear():
    return Linear()


def kernel_descent(linear, objective, preconditioner, *, b1, f, momentum, taken):
    """f <- f - eta K s / (1 - b1^t) with K = J P J^T; ``momentum`` is what J P m_0 adds, decaying by b1 a step."""
    kernel = linear.jacobian @ np.diag(preconditioner) @ linear.jacobian.T
    s, outputs = np.zeros(N * C), []
    for k in range(1, STEPS + 1):
        s = b1 * s + (1 - b1) * linear.chi(f, objective)
        momentum = b1 * momentum
        f = f - ETA * (kernel @ s + momentum) / (1 - b1 ** (taken + k))
        outputs.append(f)
    return np.stack(outputs)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_frozen_adam_is_kernel_descent(linear, objective, b1, x64):
    tx = adam_ntk(ETA, b1=b1, eps=EPS, second_moment=linear.tree(linear.moment))
    _, measured = linear.train(tx, objective)
    p = linear.flat(adam_preconditioner(linear.tree(linear.moment), eps=EPS))
    f = linear.jacobian @ linear.start
    predicted = kernel_descent(linear, objective, p, b1=b1, f=f, momentum=np.zeros(N * C), taken=0)
    np.testing.assert_allclose(measured, predicted, rtol=1e-10, atol=1e-10)
    assert np.abs(measured - f).max() > 0.1
    unpreconditioned = kernel_descent(linear, objective, np.ones(11), b1=b1, f=f, momentum=np.zeros(N * C), taken=0)
    assert np.abs(measured - unpreconditioned).max() > 1e-2


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_after_warmup_momentum_starts_from_the_first_moment(linear, objective, x64):
    b1, b2, warmup = 0.9, 0.99, 5
    tx = adam_ntk(ETA, b1=b1, b2=b2, eps=EPS, warmup=warmup)
    adam = optax.adam(ETA, b1=b1, b2=b2, eps=EPS)
    warm, _ = linear.train(adam, objective, steps=warmup)
    _, measured = linear.train(tx, objective, steps=warmup + STEPS - 5)
    p = linear.flat(adam_preconditioner(second_moment(warm.opt_state, b2=b2), eps=EPS))
    m = linear.flat(optax.tree.get(warm.opt_state, "mu"))
    f = linear.jacobian @ linear.flat(warm.params)
    momentum = linear.jacobian @ (p * m)
    predicted = kernel_descent(linear, objective, p, b1=b1, f=f, momentum=momentum, taken=warmup)
    np.testing.assert_allclose(measured[warmup:], predicted[: STEPS - 5], rtol=1e-10, atol=1e-10)
    without = kernel_descent(linear, objective, p, b1=b1, f=f, momentum=0 * momentum, taken=warmup)
    assert np.abs(measured[warmup:] - without[: STEPS - 5]).max() > 1e-3


def test_warmup_is_adam_bitwise_and_then_departs(linear):
    tx, adam = adam_ntk(ETA, warmup=4), optax.adam(ETA)
    params = linear.tree(linear.start.astype(np.float32))
    ours, theirs = tx.init(params), adam.init(params)
    rng = np.random.default_rng(3)
    for step in range(6):
        grads = linear.tree(rng.normal(size=11).astype(np.float32) * (1 + step))
        a, ours = tx.update(grads, ours, params)
        b, theirs = adam.update(grads, theirs, params)
        assert np.array_equal(linear.flat(a), linear.flat(b)) == (step < 4)


def test_frozen_moment_does_not_move(linear):
    tx = adam_ntk(ETA, warmup=1)
    params = linear.tree(linear.start.astype(np.float32))
    state, moments = tx.init(params), []
    for scale in (1.0, 5.0, 7.0):
        _, state = tx.update(jax.tree.map(lambda x, s=scale: s * jnp.ones_like(x), params), state, params)
        moments.append(linear.flat(optax.tree.get(state, "nu")))
    assert (moments[0] > 0).all()
    assert np.array_equal(moments[0], moments[1])
    assert np.array_equal(moments[0], moments[2])


def test_first_adam_step_is_softened_sign(x64):
    grads, eps = jnp.array([3.0, -1e-3, 1e-9]), 1e-4
    for tx in (optax.adam(1.0, eps=eps), adam_ntk(1.0, eps=eps, warmup=1)):
        update, _ = update_of(tx, grads, tx.init(grads))
        np.testing.assert_allclose(update, -grads / (jnp.abs(grads) + eps), rtol=1e-9)


def test_constant_gradient_gives_the_sign_at_every_step(x64):
    grads = jnp.array([3.0, -1e-3, 20.0])
    for tx in (optax.adam(1.0, eps=0.0), adam_ntk(1.0, eps=0.0, warmup=3), sign_descent(1.0)):
        state = tx.init(grads)
        for _ in range(8):
            update, state = update_of(tx, grads, state)
            np.testing.assert_allclose(update, [-1.0, 1.0, -1.0], rtol=1e-9)


def test_zero_gradient_takes_no_sign_step():
    tx = sign_descent(0.5)
    assert (update_of(tx, jnp.zeros(3), tx.init(jnp.zeros(3)))[0] == 0).all()


def test_second_moment_is_found_in_nested_states_and_bias_corrected(x64):
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.masked(optax.adamw(0.1, b2=0.9), True), optax.scale(2.0))
    params = {"a": jnp.zeros(2)}
    state, nu = tx.init(params), np.zeros(2)
    for k in (1.0, 3.0):
        grads = np.array([k, -2.0])
        nu = 0.9 * nu + 0.1 * grads**2
        _, state = tx.update({"a": jnp.asarray(grads)}, state, params)
    found = second_moment(state, b2=0.9)
    np.testing.assert_allclose(found["a"], nu / (1 - 0.9**2), rtol=1e-12)
    closed = jax.jit(lambda: second_moment(state, b2=0.9))()
    np.testing.assert_allclose(closed["a"], found["a"], rtol=1e-12)
    preconditioner = adam_preconditioner(found, eps=0.5)
    np.testing.assert_allclose(preconditioner["a"], 1 / (np.sqrt(found["a"]) + 0.5), rtol=1e-12)


def test_frozen_adam_from_a_run_equals_frozen_adam_by_warmup_without_momentum(linear, x64):
    warm, _ = linear.train(optax.adam(ETA, b1=0.0, b2=0.99, eps=EPS), "mse", steps=3)
    by_warmup = linear.train(adam_ntk(ETA, b1=0.0, b2=0.99, eps=EPS, warmup=3), "mse", steps=6)[1][3:]
    tx = adam_ntk(ETA, b1=0.0, eps=EPS, second_moment=second_moment(warm.opt_state, b2=0.99))
    by_state = linear.train(tx, "mse", state=init_state(warm.params, tx), steps=3)[1]
    np.testing.assert_allclose(by_warmup, by_state, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizers_of_a_name_decrease_a_quadratic_under_jit_and_schedule(name):
    options = {"warmup": 2} if name == "adam_ntk" else {}
    tx = make_optimizer(name, make_schedule(0.05, 20, kind="linear", warmup_frac=0.1), **options)
    params, start = jnp.array([1.0, -2.0]), 5.0

    @jax.jit
    def step(params, state):
        updates, state = tx.update(2 * params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(20):
        params, state = step(params, state)
    assert float((params**2).sum()) < 0.7 * start


def test_optimizers_of_a_name_are_the_rules_they_name():
    grads = jnp.array([0.5, -4.0])
    expected = {"sgd": -0.1 * grads, "sign": -0.1 * jnp.sign(grads), "adam": -0.1 * jnp.sign(grads)}
    for name, update in expected.items():
        tx = make_optimizer(name, 0.1)
        np.testing.assert_allclose(update_of(tx, grads, tx.init(grads))[0], update, rtol=1e-5)


def test_schedules_warm_up_hold_and_decay():
    constant = make_schedule(2.0, 10, warmup_frac=0.4)
    linear = make_schedule(2.0, 10, kind="linear", warmup_frac=0.4)
    steps = np.arange(11)
    np.testing.assert_allclose([constant(k) for k in steps], 2 * np.minimum(steps / 4, 1), rtol=1e-6)
    np.testing.assert_allclose([linear(k) for k in steps], 2 * np.minimum(steps / 4, (10 - steps) / 6), rtol=1e-6)
    assert float(make_schedule(2.0, 10, kind="linear")(jnp.int32(0))) == 2.0
    assert float(linear(25)) == 0.0
