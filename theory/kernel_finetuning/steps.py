"""Claims on single steps: what one step of SGD, of sign descent and of Adam does to parameters and outputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_axpy
from jaxft.core.types import Params
from jaxft.kernels import empirical_ntk, output_derivative
from jaxft.train import cross_entropy, make_optimizer
from theory.claims import Evidence
from theory.kernel_finetuning.toys import Toy, binary_cross_entropy, f_binary, f_toy, flat, make_claim, toy

LEARNING_RATES = np.logspace(-4, -2, 6)
"""Step sizes over which one step is compared with its first-order prediction."""

EPSILONS = np.logspace(-2, -14, 7)
ADAM_RATE = 0.05
STEPS = 20
DECAYS = np.array([[0.9, 0.999], [0.0, 0.5], [0.5, 0.9]])
"""Pairs (b1, b2) of Adam."""


def sgd_step_error(seed: int, *, shuffled: bool = False) -> Evidence:
    r"""Relative error of $-\eta K(x, X) \chi / n$ as a prediction of what one step does to test outputs.

    The control reads the kernel against the wrong training examples.
    """
    errors = _sgd_step_errors(toy(seed), jnp.int32(shuffled))
    return Evidence(errors, x=LEARNING_RATES, setting={"network": "6-8-8-3 tanh", "examples": 8})


@jax.jit
def _sgd_step_errors(t: Toy, shift: jax.Array) -> jax.Array:
    """Errors by learning rate, with the kernel's columns shifted by so many examples."""
    kernel = empirical_ntk(f_toy, t.params, t.x_test, jnp.roll(t.x, shift, axis=0))
    chi = output_derivative(cross_entropy, f_toy(t.params, t.x), t.labels)
    predicted = -jnp.tensordot(kernel, chi, axes=2) / len(t.labels)
    direction = jax.tree.map(jnp.negative, jax.grad(t.loss)(t.params))
    return _step_errors(lambda p: f_toy(p, t.x_test), t.params, direction, predicted)


def sign_step_error(seed: int, *, shuffled: bool = False) -> Evidence:
    r"""Relative error of $-\eta K(x, x_1) \operatorname{sign} \chi_1$ as a prediction of a sign step on one example.

    One output; K is the asymmetric sign kernel. The control reads it against another training example.
    """
    errors = _sign_step_errors(toy(seed), jnp.int32(shuffled))
    return Evidence(errors, x=LEARNING_RATES, setting={"network": "6-8-8-2 tanh, logit difference", "examples": 1})


@jax.jit
def _sign_step_errors(t: Toy, read: jax.Array) -> jax.Array:
    """Errors by learning rate, with the kernel's column that of example ``read``, the step that of example 0."""
    x, labels = t.x[:1], t.binary_labels[:1]
    kernel = empirical_ntk(f_binary, t.params, t.x_test, t.x[read][None], kernel="asymmetric_signgd")
    chi = output_derivative(binary_cross_entropy, f_binary(t.params, x), labels)
    grads = jax.grad(lambda p: binary_cross_entropy(f_binary(p, x), labels))(t.params)
    direction = jax.tree.map(lambda g: -jnp.sign(g), grads)
    return _step_errors(lambda p: f_binary(p, t.x_test), t.params, direction, -kernel @ jnp.sign(chi))


def _step_errors(
    outputs: Callable[[Params], jax.Array], params: Params, direction: Params, predicted: jax.Array
) -> jax.Array:
    """Relative errors of ``rate * predicted`` as the change of outputs by a step of ``rate * direction``."""
    before = outputs(params)

    def error(rate: jax.Array) -> jax.Array:
        actual = outputs(tree_axpy(rate, direction, params)) - before
        return jnp.linalg.norm(actual - rate * predicted) / jnp.linalg.norm(rate * predicted)

    return jax.lax.map(error, jnp.asarray(LEARNING_RATES))


def first_adam_step(seed: int, *, late: bool = False, eps: float = 1e-3) -> Evidence:
    r"""Update of Adam from a fresh state against $-\eta\, g / (|g| + \epsilon)$; the control takes its second step."""
    updates, grads = _adam_updates(toy(seed), jnp.full(len(EPSILONS), eps), jnp.asarray(late))
    predicted = jax.tree.map(lambda g: -ADAM_RATE * g / (jnp.abs(g) + eps), grads)
    return Evidence(flat(jax.tree.map(lambda leaf: leaf[0], updates)), flat(predicted), setting={"eps": eps})


def first_adam_step_sign(seed: int, *, late: bool = False) -> Evidence:
    r"""Largest distance of Adam's first step from $-\eta \operatorname{sign} g$ where g is not 0, as eps falls."""
    updates, grads = _adam_updates(toy(seed), jnp.asarray(EPSILONS), jnp.asarray(late))
    gradient = flat(grads)
    moving = np.abs(gradient) > 1e-6
    steps = [flat(jax.tree.map(lambda leaf, i=i: leaf[i], updates)) / ADAM_RATE for i in range(len(EPSILONS))]
    errors = [float(np.abs(step + np.sign(gradient))[moving].max()) for step in steps]
    return Evidence(errors, x=1 / EPSILONS, setting={"zero_gradient_frac": float((gradient == 0).mean())})


@jax.jit
def _adam_updates(t: Toy, epsilons: jax.Array, late: jax.Array) -> tuple[Params, Params]:
    """The update that Adam makes at the toy's parameters for each eps, and the gradient it is made of.

    ``late`` gives Adam a step elsewhere first.
    """
    grads = jax.grad(t.loss)(t.params)
    elsewhere = jax.grad(t.loss)(jax.tree.map(lambda a: -a, t.params))

    def update(eps: jax.Array) -> Params:
        tx = make_optimizer("adam", ADAM_RATE, eps=eps)
        state = tx.init(t.params)
        _, second = tx.update(elsewhere, state, t.params)
        state = jax.tree.map(lambda a, b: jnp.where(late, a, b), second, state)
        return tx.update(grads, state, t.params)[0]

    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        return jax.vmap(update)(epsilons), grads


def constant_gradient(seed: int, *, turning: bool = False) -> Evidence:
    r"""Updates of Adam with eps = 0 under a constant gradient, against $-\eta \operatorname{sign} g$ at every step.

    Entries of gradient 0, where the update is 0/0, are left out. The control lets the gradient change its size.
    """
    updates, grads = _constant_updates(toy(seed), jnp.asarray(turning))
    gradient, rows = flat(grads), len(DECAYS) * STEPS
    measured = np.concatenate([np.reshape(leaf, (rows, -1)) for leaf in jax.tree.leaves(updates)], axis=1)
    moving = gradient != 0
    predicted = np.broadcast_to(-ADAM_RATE * np.sign(gradient[moving]), (rows, moving.sum()))
    return Evidence(measured[:, moving], predicted, setting={"steps": STEPS, "eps": 0.0, "decays": DECAYS.tolist()})


@jax.jit
def _constant_updates(t: Toy, turning: jax.Array) -> tuple[Params, Params]:
    """Adam's updates by decays and step, and the gradient of the first."""
    grads = jax.grad(t.loss)(t.params)

    def run(decays):
        tx = make_optimizer("adam", ADAM_RATE, b1=decays[0], b2=decays[1], eps=0.0)

        def step(state, count):
            size = jnp.where(turning, 1 + 0.5 * jnp.sin(count.astype(jnp.float64)), 1.0)
            updates, state = tx.update(jax.tree.map(lambda g: size * g, grads), state, t.params)
            return state, updates

        return jax.lax.scan(step, tx.init(t.params), jnp.arange(STEPS))[1]

    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        return jax.lax.map(run, jnp.asarray(DECAYS)), grads


CLAIMS = (
    make_claim(
        "sgd-step",
        "One SGD step moves test outputs by -eta K chi / n, with a relative error linear in eta.",
        "section 3",
        "rate",
        sgd_step_error,
        {"shuffled": True},
        "kernel against other training examples",
        slope=1.0,
        tolerance=0.05,
        seeds=3,
    ),
    make_claim(
        "sign-step",
        "One sign step on one example moves one output by -eta K sign(chi), K the asymmetric sign kernel, with a "
        "relative error linear in eta.",
        "section 3",
        "rate",
        sign_step_error,
        {"shuffled": True},
        "kernel against another training example",
        slope=1.0,
        tolerance=0.05,
        seeds=3,
    ),
    make_claim(
        "first-adam-step",
        "The first step of Adam is -eta g / (|g| + eps).",
        "section 3",
        "identity",
        first_adam_step,
        {"late": True},
        "the state has seen another gradient",
        seeds=3,
    ),
    make_claim(
        "first-adam-step-sign",
        "As eps tends to 0, the first step of Adam tends to the sign step wherever the gradient is not 0.",
        "section 3",
        "limit",
        first_adam_step_sign,
        {"late": True},
        "the state has seen another gradient",
        tolerance=1e-6,
        seeds=3,
    ),
    make_claim(
        "constant-gradient",
        "Under a constant gradient every step of Adam is the sign step, whatever its decays.",
        "cf. section 3",
        "identity",
        constant_gradient,
        {"turning": True},
        "the gradient changes its size",
        seeds=3,
    ),
)
