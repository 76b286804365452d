"""Claims on many steps: outputs of the tangent model under an optimiser, and kernel descent."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream
from jaxft.core.types import Params
from jaxft.kernels import (
    contrast_basis,
    contrast_logits,
    contrast_loss,
    empirical_ntk,
    kernel_gradient_descent,
    linearize,
    output_derivative,
)
from jaxft.train import (
    adam_preconditioner,
    cross_entropy,
    init_state,
    make_optimizer,
    make_segment,
    mse,
    second_moment,
)
from theory.claims import Evidence
from theory.kernel_finetuning.toys import Toy, binary_cross_entropy, f_binary, f_toy, flat, make_claim, toy

RATE = 0.05
ADAM_EPS = 1e-4
B2 = 0.999
STEPS = 20
MOMENTA = (0.0, 0.9)
EPSILONS = np.logspace(-2, -14, 7)


def adam_ntk_trajectory(seed: int, *, frozen: bool = True) -> Evidence:
    r"""Outputs of the tangent model trained by Adam-NTK against kernel descent with $J P J^\top$.

    Without and with momentum, on minibatches, on train and test points. The control trains with Adam, whose second
    moment moves.
    """
    t, batches = toy(seed), jnp.asarray(host_stream(seed, "batches").integers(8, size=(STEPS, 4)))
    predicted, measured = _kernel_outputs(t, batches), _trained_outputs(t, batches, frozen)
    return Evidence(flat(measured), flat(predicted), setting={"steps": STEPS, "b1": list(MOMENTA)})


def _frozen_moment(t: Toy) -> Params:
    return jax.tree.map(lambda g: g**2 + 1e-3, jax.grad(t.loss)(t.params))


@jax.jit
def _kernel_outputs(t: Toy, batches: jax.Array) -> list[jax.Array]:
    """Outputs on train and test points after the last step of kernel descent, for each momentum."""
    both, n = jnp.concatenate([t.x, t.x_test]), len(t.labels)
    preconditioner = adam_preconditioner(_frozen_moment(t), eps=ADAM_EPS)
    kernel = empirical_ntk(f_toy, t.params, both, t.x, kernel="preconditioned", preconditioner=preconditioner)
    outputs = f_toy(t.params, both)
    options: dict[str, Any] = {"learning_rate": RATE, "steps": STEPS, "batches": batches}
    options |= {"kernel_test": kernel[n:], "f0_test": outputs[n:]}
    paths = [
        kernel_gradient_descent(kernel[:n], outputs[:n], t.labels, cross_entropy, b1=b1, **options) for b1 in MOMENTA
    ]
    return [jnp.concatenate([path.train[-1], jnp.asarray(path.test)[-1]]) for path in paths]


@functools.partial(jax.jit, static_argnums=2)
def _trained_outputs(t: Toy, batches: jax.Array, frozen: bool) -> list[jax.Array]:
    """The same outputs of the tangent model, trained by Adam-NTK or (not ``frozen``) by Adam."""
    f_lin, trained = linearize(f_toy, t.params), []
    options: dict[str, Any] = {"second_moment": _frozen_moment(t)} if frozen else {}
    for b1 in MOMENTA:
        with jax.numpy_dtype_promotion("standard"):  # as optax needs
            tx = make_optimizer("adam_ntk" if frozen else "adam", RATE, b1=b1, eps=ADAM_EPS, **options)
            state, _ = make_segment(f_lin, cross_entropy, tx)(init_state(t.params, tx), t.x, t.labels, batches)
        trained.append(f_lin(state.params, jnp.concatenate([t.x, t.x_test])))
    return trained


def sign_trajectory(seed: int, *, batch_size: int = 1) -> Evidence:
    r"""Outputs of one logit of the tangent model under sign descent, one example a step, against kernel descent.

    The kernel is the asymmetric one and the step $-\eta K(x, x_t) \operatorname{sign} \chi_t$. The control takes two
    examples a step, and their mean of sign steps: the sign of a sum is not the sum of signs.
    """
    batches = host_stream(seed, "batches").integers(8, size=(STEPS, batch_size))
    predicted, measured = _sign_outputs(toy(seed), jnp.asarray(batches))
    return Evidence(np.asarray(measured), np.asarray(predicted), setting={"steps": STEPS, "examples": batch_size})


@jax.jit
def _sign_outputs(t: Toy, batches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Last outputs on train and test points, of kernel descent and of the trained tangent model."""
    both, n = jnp.concatenate([t.x, t.x_test]), len(t.labels)
    kernel = empirical_ntk(f_binary, t.params, both, t.x, kernel="asymmetric_signgd")
    outputs = f_binary(t.params, both)
    options: dict[str, Any] = {"learning_rate": RATE, "steps": STEPS, "batches": batches, "sign": True}
    options |= {"kernel_test": kernel[n:], "f0_test": outputs[n:]}
    path = kernel_gradient_descent(kernel[:n], outputs[:n], t.binary_labels, binary_cross_entropy, **options)
    predicted = jnp.concatenate([path.train[-1], jnp.asarray(path.test)[-1]])
    f_lin = linearize(f_binary, t.params)
    params = _sign_descent(f_lin, binary_cross_entropy, t, t.binary_labels, batches)
    return predicted, f_lin(params, both)


def sign_trajectory_of_logits(seed: int, *, logits: int = 1) -> Evidence:
    r"""The same for one logit or several, moved by $-\eta \sum_c K_c(x, x_t) \operatorname{sign} \chi_{t,c}$.

    With one logit this is sign descent. The control takes the three logits of a classifier: the sign of
    $\sum_c \chi_c \nabla f_c$ does not split over c.
    """
    batches = host_stream(seed, "batches").integers(8, size=(STEPS, 1))
    predicted, measured = _sign_outputs_of_logits(toy(seed), jnp.asarray(batches), logits)
    return Evidence(np.asarray(measured), np.asarray(predicted), setting={"steps": STEPS, "logits": logits})


@functools.partial(jax.jit, static_argnums=2)
def _sign_outputs_of_logits(t: Toy, batches: jax.Array, logits: int) -> tuple[jax.Array, jax.Array]:
    f, loss, labels = f_toy, cross_entropy, t.labels
    if logits == 1:
        labels, loss = t.binary_labels, lambda outputs, y: binary_cross_entropy(outputs[:, 0], y)
        f = lambda p, x: f_binary(p, x)[:, None]  # noqa: E731
    kernel, outputs = empirical_ntk(f, t.params, t.x, kernel="asymmetric_signgd"), f(t.params, t.x)

    def step(outputs, index):
        chi = output_derivative(loss, outputs[index], labels[index])
        return outputs - RATE * jnp.tensordot(kernel[:, :, index], jnp.sign(chi), axes=2), None

    predicted, _ = jax.lax.scan(step, outputs, batches)
    f_lin = linearize(f, t.params)
    return predicted, f_lin(_sign_descent(f_lin, loss, t, labels, batches), t.x)


def _sign_descent(f: Any, loss: Any, t: Toy, labels: jax.Array, batches: jax.Array) -> Params:
    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        tx = make_optimizer("sign", RATE)
        return make_segment(f, loss, tx)(init_state(t.params, tx), t.x, labels, batches)[0].params


def young_adam_kernel(seed: int, *, older: bool = False) -> Evidence:
    r"""Distance of $|\chi_1|$ times Adam's kernel from the asymmetric sign kernel, when Adam has seen one gradient.

    In the column of the example it has seen, as eps falls. With $\hat v = (\chi_1 \nabla f(x_1))^2$ the step
    $\chi_1 J P \nabla f(x_1)$ is $\operatorname{sign} \chi_1 \, K(x, x_1)$. The control's state has seen another
    example's gradient as well.
    """
    errors = _young_adam_errors(toy(seed), jnp.asarray(older))
    return Evidence(errors, x=1 / EPSILONS, setting={"network": "6-8-8-2 tanh, logit difference", "examples": 1})


@jax.jit
def _young_adam_errors(t: Toy, older: jax.Array) -> jax.Array:
    def grads_of(i: int) -> Params:
        one, label = t.x[i : i + 1], t.binary_labels[i : i + 1]
        return jax.grad(lambda p: binary_cross_entropy(f_binary(p, one), label))(t.params)

    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        tx = make_optimizer("adam", RATE, b2=B2)
        fresh = tx.init(t.params)
        _, after_another = tx.update(grads_of(1), fresh, t.params)
        state = jax.tree.map(lambda a, b: jnp.where(older, a, b), after_another, fresh)
        _, state = tx.update(grads_of(0), state, t.params)
        moment = second_moment(state, b2=B2)
    x = t.x[:1]
    chi = output_derivative(binary_cross_entropy, f_binary(t.params, x), t.binary_labels[:1])
    kernel = empirical_ntk(f_binary, t.params, t.x_test, x, kernel="asymmetric_signgd")
    expected = kernel @ jnp.sign(chi)

    def error(eps: jax.Array) -> jax.Array:
        diagonal = adam_preconditioner(moment, eps=eps)
        ours = empirical_ntk(f_binary, t.params, t.x_test, x, kernel="preconditioned", preconditioner=diagonal)
        return jnp.linalg.norm(ours @ chi - expected) / jnp.linalg.norm(expected)

    return jax.lax.map(error, jnp.asarray(EPSILONS))


def contrast_trajectory(seed: int, *, squared: bool = False) -> Evidence:
    r"""Kernel descent on the C - 1 contrasts $Q^\top f$ against that on all C logits, for cross-entropy.

    The control descends on the squared error of one-hot labels, which sees the sum of the logits.
    """
    predicted, measured = _contrast_outputs(toy(seed), squared)
    return Evidence(np.asarray(measured), np.asarray(predicted), setting={"steps": STEPS, "logits": 3})


@functools.partial(jax.jit, static_argnums=1)
def _contrast_outputs(t: Toy, squared: bool) -> tuple[jax.Array, jax.Array]:
    loss, basis = mse if squared else cross_entropy, contrast_basis(3)
    ends = []
    for f, objective in ((f_toy, loss), (contrast_logits(f_toy, 3), contrast_loss(loss, 3))):
        kernel, outputs = empirical_ntk(f, t.params, t.x), f(t.params, t.x)
        path = kernel_gradient_descent(kernel, outputs, t.labels, objective, learning_rate=RATE, steps=STEPS)
        ends.append(path.train[-1])
    return ends[0] @ basis, ends[1]


CLAIMS = (
    make_claim(
        "adam-ntk",
        "A tangent model under Adam with a frozen second moment is kernel descent with J P J^T, momentum included.",
        "cf. section 3",
        "identity",
        adam_ntk_trajectory,
        {"frozen": False},
        "the second moment moves",
        seeds=3,
    ),
    make_claim(
        "asymmetric-sign-one-example",
        "Sign descent of one logit of a tangent model, one example a step, is kernel descent with the asymmetric "
        "sign kernel.",
        "section 3",
        "identity",
        sign_trajectory,
        {"batch_size": 2},
        "two examples a step",
        seeds=3,
    ),
    make_claim(
        "asymmetric-sign-one-logit",
        "Sign descent of a tangent model with one logit is kernel descent with the asymmetric sign kernel.",
        "section 3",
        "identity",
        sign_trajectory_of_logits,
        {"logits": 3},
        "three logits",
        seeds=3,
    ),
    make_claim(
        "young-adam-kernel",
        "As eps tends to 0, the kernel of Adam that has seen one gradient, times |chi| of its example, tends to the "
        "asymmetric sign kernel in the column of that example.",
        "cf. section 3",
        "limit",
        young_adam_kernel,
        {"older": True},
        "the state has seen another gradient as well",
        tolerance=1e-6,
        seeds=3,
        max_seeds=12,
    ),
    make_claim(
        "contrast-basis",
        "For cross-entropy, the contrasts of C logits under kernel descent are kernel descent on the C - 1 contrasts.",
        "cf. section 3",
        "identity",
        contrast_trajectory,
        {"squared": True},
        "a loss that sees the sum of the logits",
        seeds=3,
    ),
)
