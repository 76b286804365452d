r"""A Kernel-Based View of Language Model Fine-Tuning (Malladi et al. 2023, arXiv 2210.05643): claims and controls.

Exact statements are checked on a small tanh network with three logits; the statements on prompts, on a masked language
model of twenty thousand parameters that is pre-trained here, on generated reviews.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.rng import host_stream, stream
from jaxft.core.trees import tree_add, tree_axpy, tree_cast
from jaxft.core.types import OutputFn, Params, TokenBatch
from jaxft.data.kshot import sample_kshot
from jaxft.data.readers import Example
from jaxft.data.reviews import review_splits
from jaxft.data.tasks import get_task
from jaxft.data.tokenization import encode_plain, encode_prompt, label_word_ids, pad
from jaxft.evaluation.probes import fit_linear_probe
from jaxft.kernels import (
    empirical_ntk,
    kernel_drift,
    kernel_gradient_descent,
    kernel_ridge_regression,
    linearization_gap,
    linearize,
    output_derivative,
)
from jaxft.lab.pretraining import PretrainingConfig, pretrain_reviews
from jaxft.nn import EncoderConfig, init_classifier, make_class_logits, make_features, make_mlp, make_prompt_logits
from jaxft.train import (
    accuracy,
    adam_preconditioner,
    cross_entropy,
    init_state,
    make_optimizer,
    make_segment,
)
from theory.claims import Claim, Evidence

PAPER = "arXiv 2210.05643"
LEARNING_RATES = np.logspace(-4, -2, 6)
"""Step sizes over which one step is compared with its first-order prediction."""

RESIDUAL_SCALES = np.logspace(-3, -1, 6)
"""Parts of a residual that a step removes, over which the error of the tangent model is followed."""

EPSILONS = np.logspace(-2, -14, 7)
ADAM_RATE = 0.05
ADAM_EPS = 1e-4
ADAM_STEPS = 20
MOMENTA = (0.0, 0.9)


# With two hidden layers the kernel of a pair of inputs is not symmetric in the outputs: a transposed one shows.
_INIT, f_toy = make_mlp((8, 8, 3), activation="tanh")


class Toy(NamedTuple):
    """Random parameters of ``f_toy``, with a few labelled examples and test points."""

    params: Params
    x: jax.Array
    labels: jax.Array
    x_test: jax.Array

    def loss(self, params: Params) -> jax.Array:
        """Cross-entropy on the examples."""
        return cross_entropy(f_toy(params, self.x), self.labels)


def toy(seed: int) -> Toy:
    """Inputs of dimension 6, the last of them always 0: its weights have gradient 0, as unused words have."""
    rng = host_stream(seed, "toy")
    inputs = rng.normal(size=(13, 6)) * [1, 1, 1, 1, 1, 0]
    params = _init_toy(stream(jax.random.key(seed), "init"))
    return Toy(params, jnp.asarray(inputs[:8]), jnp.asarray(rng.integers(3, size=8)), jnp.asarray(inputs[8:]))


@jax.jit
def _init_toy(key: jax.Array) -> Params:
    with jax.numpy_dtype_promotion("standard"):  # parameters start in float32
        return tree_cast(_INIT(key, 6), jnp.float64)


def sgd_step_error(seed: int, *, shuffled: bool = False) -> Evidence:
    r"""Relative error of $-\eta K(x, X) \chi / n$ as a prediction of what one step does to test outputs.

    The control reads the kernel against the wrong training examples.
    """
    errors = _sgd_step_errors(toy(seed), jnp.int32(shuffled))
    return Evidence(errors, x=LEARNING_RATES, setting={"network": "6-8-8-3 tanh", "examples": 8})


@jax.jit
def _sgd_step_errors(t: Toy, shift: jax.Array) -> jax.Array:
    """Errors by learning rate, with the kernel's columns shifted by so many examples."""
    kernel: Any = empirical_ntk(f_toy, t.params, t.x_test, jnp.roll(t.x, shift, axis=0))
    chi = output_derivative(cross_entropy, f_toy(t.params, t.x), t.labels)
    direction = -jnp.tensordot(kernel, chi, axes=2) / len(t.labels)
    grads = jax.grad(t.loss)(t.params)
    before = f_toy(t.params, t.x_test)

    def error(rate: jax.Array) -> jax.Array:
        actual = f_toy(tree_axpy(-rate, grads, t.params), t.x_test) - before
        return jnp.linalg.norm(actual - rate * direction) / jnp.linalg.norm(rate * direction)

    return jax.lax.map(error, jnp.asarray(LEARNING_RATES))


def first_adam_step(seed: int, *, late: bool = False, eps: float = 1e-3) -> Evidence:
    r"""Update of Adam from a fresh state against $-\eta\, g / (|g| + \epsilon)$; the control takes its second step."""
    updates, grads = _adam_updates(toy(seed), jnp.full(len(EPSILONS), eps), jnp.asarray(late))
    predicted = jax.tree.map(lambda g: -ADAM_RATE * g / (jnp.abs(g) + eps), grads)
    return Evidence(_flat(jax.tree.map(lambda leaf: leaf[0], updates)), _flat(predicted), setting={"eps": eps})


def first_adam_step_sign(seed: int, *, late: bool = False) -> Evidence:
    r"""Largest distance of Adam's first step from $-\eta \operatorname{sign} g$ where g is not 0, as eps falls."""
    updates, grads = _adam_updates(toy(seed), jnp.asarray(EPSILONS), jnp.asarray(late))
    gradient = _flat(grads)
    moving = np.abs(gradient) > 1e-6
    steps = [_flat(jax.tree.map(lambda leaf, i=i: leaf[i], updates)) / ADAM_RATE for i in range(len(EPSILONS))]
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


def adam_ntk_trajectory(seed: int, *, frozen: bool = True) -> Evidence:
    r"""Outputs of the tangent model trained by Adam-NTK against kernel descent with $J P J^\top$.

    Without and with momentum, on minibatches, on train and test points. The control trains with Adam, whose second
    moment moves.
    """
    t, batches = toy(seed), jnp.asarray(host_stream(seed, "batches").integers(8, size=(ADAM_STEPS, 4)))
    predicted, measured = _kernel_outputs(t, batches), _trained_outputs(t, batches, frozen)
    return Evidence(_flat(measured), _flat(predicted), setting={"steps": ADAM_STEPS, "b1": list(MOMENTA)})


def _frozen_moment(t: Toy) -> Params:
    return jax.tree.map(lambda g: g**2 + 1e-3, jax.grad(t.loss)(t.params))


@jax.jit
def _kernel_outputs(t: Toy, batches: jax.Array) -> list[jax.Array]:
    """Outputs on train and test points after the last step of kernel descent, for each momentum."""
    both, n = jnp.concatenate([t.x, t.x_test]), len(t.labels)
    preconditioner = adam_preconditioner(_frozen_moment(t), eps=ADAM_EPS)
    kernel: Any = empirical_ntk(f_toy, t.params, both, t.x, kernel="preconditioned", preconditioner=preconditioner)
    outputs = f_toy(t.params, both)
    options: dict[str, Any] = {"learning_rate": ADAM_RATE, "steps": ADAM_STEPS, "batches": batches}
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
            tx = make_optimizer("adam_ntk" if frozen else "adam", ADAM_RATE, b1=b1, eps=ADAM_EPS, **options)
            state, _ = make_segment(f_lin, cross_entropy, tx)(init_state(t.params, tx), t.x, t.labels, batches)
        trained.append(f_lin(state.params, jnp.concatenate([t.x, t.x_test])))
    return trained


def linearization_error(seed: int, *, fixed_size: bool = False) -> Evidence:
    r"""Relative error of the tangent model after the minimum-norm step that removes a residual s r, against s.

    Fitting s r needs a change of parameters $J^\top K^{-1} s r$: the first-order change of the outputs is s r, the
    second-order one $O(s^2)$. The control removes the whole residual whatever s.
    """
    reach = np.ones_like(RESIDUAL_SCALES) if fixed_size else RESIDUAL_SCALES
    errors = _linearization_errors(toy(seed), jnp.asarray(reach))
    return Evidence(errors, x=RESIDUAL_SCALES, setting={"residual": "one-hot minus softmax"})


@jax.jit
def _linearization_errors(t: Toy, scales: jax.Array) -> jax.Array:
    f0 = f_toy(t.params, t.x)
    kernel: Any = empirical_ntk(f_toy, t.params, t.x)
    residual = -output_derivative(cross_entropy, f0, t.labels)

    def error(reach: jax.Array) -> jax.Array:
        solution = kernel_ridge_regression(kernel, f0 + reach * residual, f0=f0)
        _, pullback = jax.vjp(lambda p: f_toy(p, t.x), t.params)
        moved = tree_add(t.params, pullback(solution.dual)[0])
        # The tangent model moves by what was asked of the kernel.
        tangent = reach * residual
        return jnp.linalg.norm(f_toy(moved, t.x) - f0 - tangent) / jnp.linalg.norm(tangent)

    return jax.lax.map(error, scales)


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What one fine-tuning run is judged by."""

    accuracy_start: float
    accuracy: float
    """After fine-tuning."""
    accuracy_kernel: float
    """Of the kernel regression that belongs to the optimiser."""
    accuracy_linearized: float
    """Of the tangent model at the parameters that fine-tuning reached."""
    linearization_gap: float
    feature_drift: float
    kernel_drift: float


THRESHOLDS = {"linearization_gap": 0.35, "feature_drift": 0.3, "kernel_drift": 0.3, "solves_frac": 0.9}
"""Ours: the outputs, the gradients and the kernel may change by no more than a third from what the tangent says."""

PAPER_THRESHOLDS = {"solves_frac": 0.9, "recovered_frac": 0.5, "feature_drift": 2.0}
"""Those of the paper: 90 % of fine-tuning by the kernel, half of its gain by the tangent model, drift below 2."""

TUNED_LOSS = 0.25
"""Training loss, in nats, at which arms are compared: less fine-tuning would drift less whatever the arm."""

PRETRAINING = PretrainingConfig(width=24, heads=4, steps=1000, learning_rate=8e-3, seed=1)
"""One network for all seeds, as in the paper: what a seed draws is the examples and the fresh head.

Of the pre-training seeds 0, 1 and 2 it is the one of best zero-shot accuracy, since the claims presuppose a task
that the network nearly solves; the intervals speak of examples and heads, not of networks.
"""

NATURAL_ACCURACY = 0.7
"""Zero-shot accuracy above which a prompted task counts as natural: the precondition of the claims about prompts."""

UNMOVED = "outputs did not move"
"""Verdict where dev preferred the parameters of the start."""

LEAST_GAIN = 0.05
"""Gain in accuracy below which the share that the tangent model recovers says nothing."""


def kernel_verdict(d: Diagnostics) -> str:
    """Whether a run is a kernel method by our thresholds: ``yes``, ``no: <what fails>``, or that nothing moved.

    Example:
      >>> kernel_verdict(Diagnostics(0.5, 0.9, 0.88, 0.9, 0.1, 0.2, 0.5))
      'no: kernel_drift'
    """
    if not np.isfinite(d.linearization_gap):
        return UNMOVED
    limits = {name: limit for name, limit in THRESHOLDS.items() if name != "solves_frac"}
    failing = [name for name, limit in limits.items() if not getattr(d, name) <= limit]
    if not d.accuracy_kernel >= THRESHOLDS["solves_frac"] * d.accuracy:
        failing.append("kernel_accuracy")
    return "yes" if not failing else "no: " + ", ".join(failing)


def paper_verdict(d: Diagnostics) -> str:
    """The verdict by the paper's thresholds, which are lax.

    Where fine-tuning gained less than ``LEAST_GAIN``, the tangent model's share of the gain is left out.

    Example:
      >>> paper_verdict(Diagnostics(0.5, 0.9, 0.88, 0.9, 0.1, 0.2, 0.5))
      'yes'
    """
    if not np.isfinite(d.linearization_gap):
        return UNMOVED
    gain = d.accuracy - d.accuracy_start
    solves = d.accuracy_kernel >= PAPER_THRESHOLDS["solves_frac"] * d.accuracy
    recovered = d.accuracy_linearized - d.accuracy_start
    recovers = gain < LEAST_GAIN or recovered >= PAPER_THRESHOLDS["recovered_frac"] * gain
    fixed = d.feature_drift < PAPER_THRESHOLDS["feature_drift"]
    return "yes" if solves and recovers and fixed else "no"


def chi_size(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Mean over examples of $\max_c |\chi_c|$ for cross-entropy: 0 where the network already solves the task.

    Example:
      >>> float(chi_size(jnp.zeros((4, 2)), jnp.array([0, 1, 1, 0])))
      0.5
    """
    return jnp.abs(output_derivative(cross_entropy, outputs, labels)).max(axis=1).mean()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One arm of a toy task: a pre-trained network before and after fine-tuning."""

    f: OutputFn
    params: Params
    inputs: TokenBatch
    labels: jax.Array
    tuned: Params


@functools.cache
def _pretrained():
    encoder, params, tokenizer, _ = pretrain_reviews(PRETRAINING)
    # Looped layers compile in half the time, which is most of what this small network costs.
    return dataclasses.replace(encoder, scan_layers=True), params, tokenizer


@functools.cache
def _arm_outputs(encoder: EncoderConfig, label_ids: tuple[int, ...]) -> OutputFn:
    return make_prompt_logits(encoder, label_ids) if label_ids else make_class_logits(encoder)


@functools.cache
def _reviews(seed: int) -> list[Example]:
    return review_splits(seed).train


@functools.cache
def tuning(seed: int, arm: str) -> Tuning:
    """The network pre-trained on generated reviews, fine-tuned on 16 of them a class until the loss is ``TUNED_LOSS``.

    ``prompt``: the cloze; ``swapped``: the cloze with the two label words exchanged; ``head``: a fresh linear head;
    ``probe``: a head at the solution of logistic regression.
    """
    encoder, params, tokenizer = _pretrained()
    task = get_task("reviews")
    sample = sample_kshot(_reviews(seed), classes=2, k=16, seed=seed).train
    if arm in ("prompt", "swapped"):
        encoded = encode_prompt(tokenizer, task, sample)
        f = _arm_outputs(encoder, label_word_ids(tokenizer, task.label_words))
    else:
        encoded = encode_plain(tokenizer, sample, max_tokens=task.max_tokens, token_types=2)
        f = _arm_outputs(encoder, ())
    inputs, labels = jax.tree.map(jnp.asarray, pad(encoded, length=task.max_tokens))
    # To exchange the words of two classes is to exchange the labels.
    labels = 1 - labels if arm == "swapped" else labels
    if arm == "head":
        head = init_classifier(encoder.width, 2, key=stream(jax.random.key(seed), "head"))
        params = {"encoder": params["encoder"], "classifier": head}
    elif arm == "probe":
        head = fit_linear_probe(make_features(encoder)(params, inputs), labels, classes=2, l2=0.1)
        params = {"encoder": params["encoder"], "classifier": head}
    return Tuning(f, params, inputs, labels, _tuned(f, params, inputs, labels))


@functools.partial(jax.jit, static_argnums=0)
def _tuned(f: OutputFn, params: Params, inputs: TokenBatch, labels: jax.Array) -> Params:
    """Gradient descent on all examples until the training loss is at most ``TUNED_LOSS``, for 400 steps at most."""
    slope = jax.value_and_grad(lambda p: cross_entropy(f(p, inputs), labels))

    def step(carry):
        count, params, _, grads = carry
        params = tree_axpy(-0.02, grads, params)
        return count + 1, params, *slope(params)

    # The first step moves by nothing: one evaluation in the program is half of what it costs to compile two.
    start = (jnp.zeros((), jnp.int32), params, jnp.asarray(jnp.inf, jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.while_loop(lambda c: (c[2] > TUNED_LOSS) & (c[0] <= 400), step, start)[1]


def prompt_below_head(seed: int, quantity: str, *, prompt: str = "prompt", head: str = "head") -> Evidence:
    """A quantity of the cloze prompt against that of a fresh head.

    The claim is about natural tasks: a network that does not solve the prompted task before fine-tuning, with
    accuracy above 0.7, does not meet its precondition. The control exchanges which arm is natural.
    """
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        zero_shot = tuning_measures(seed, "prompt")["accuracy"]
        values = [tuning_measures(seed, arm)[quantity] for arm in (prompt, head)]
    return Evidence(
        measured=values[0],
        predicted=values[1],
        setting={
            "zero_shot_accuracy": zero_shot,
            "network": f"one, pre-training seed {PRETRAINING.seed}",
            "precision": "float32, matmul highest",
        },
        unmet=()
        if zero_shot > NATURAL_ACCURACY
        else (f"natural task (zero-shot accuracy {zero_shot:.2f}, seed {seed})",),
    )


@functools.cache
def tuning_measures(seed: int, arm: str) -> dict[str, float]:
    """What is compared between arms, each measured on the training examples."""
    t = tuning(seed, arm)
    return {k: float(v) for k, v in _measures(t.f, t.params, t.tuned, t.inputs, t.labels).items()}


# Run a few times, on few examples: the compiler's optimisations would cost more than they save.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _measures(f: OutputFn, params: Params, tuned: Params, inputs: TokenBatch, labels: jax.Array) -> dict:
    before, after = jax.lax.map(lambda p: empirical_ntk(f, p, inputs, block_size=32), _stack(params, tuned))
    outputs = f(params, inputs)
    return {
        "chi": chi_size(outputs, labels),
        "accuracy": accuracy(outputs, labels),
        "log_kernel_drift": jnp.log(kernel_drift(before, after).relative_norm),
        "linearization_gap": linearization_gap(f, params, tuned, inputs),
    }


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _claim(name: str, statement: str, where: str, kind: Any, check: Callable, control: dict, breaks: str, **options):
    """A claim whose control is the same check with options that break an assumption."""
    return Claim(
        id=f"kernel_finetuning/{name}",
        statement=statement,
        source=f"{PAPER}, {where}",
        kind=kind,
        check=check,
        control=functools.partial(check, **control),
        control_breaks=breaks,
        **options,
    )


def _prompt_claim(name: str, statement: str, where: str, quantity: str) -> Claim:
    check = functools.partial(prompt_below_head, quantity=quantity)
    control = {"prompt": "swapped", "head": "probe"}
    breaks = "swapped label words against a head at its linear probe"
    return _claim(name, statement, where, "ordering", check, control, breaks, seeds=4, max_seeds=8)


CHI_PROMPT = _prompt_claim(
    "chi-prompt",
    "Before fine-tuning, the output derivative of a prompted pre-trained network is smaller than that of a fresh head.",
    "definition 5.3",
    "chi",
)
KERNEL_DRIFT_PROMPT = _prompt_claim(
    "kernel-drift-prompt",
    "Fine-tuned to the same training loss, the log of the kernel drift is smaller for a prompt than for a fresh head.",
    "section 6",
    "log_kernel_drift",
)
LINEARIZATION_PROMPT = _prompt_claim(
    "linearization-prompt",
    "Fine-tuned to the same training loss, the tangent model errs less with a prompt than with a fresh head.",
    "section 6",
    "linearization_gap",
)

CLAIMS = (
    _claim(
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
    _claim(
        "first-adam-step",
        "The first step of Adam is -eta g / (|g| + eps).",
        "section 3",
        "identity",
        first_adam_step,
        {"late": True},
        "the state has seen another gradient",
        seeds=3,
    ),
    _claim(
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
    _claim(
        "adam-ntk",
        "A tangent model under Adam with a frozen second moment is kernel descent with J P J^T, momentum included.",
        "section 3",
        "identity",
        adam_ntk_trajectory,
        {"frozen": False},
        "the second moment moves",
        seeds=3,
    ),
    _claim(
        "linearization-residual",
        "The relative error of the tangent model is linear in the residual to be fitted.",
        "theorem 5.5",
        "rate",
        linearization_error,
        {"fixed_size": True},
        "the step does not shrink with the residual",
        slope=1.0,
        tolerance=0.05,
        seeds=3,
    ),
    CHI_PROMPT,
    KERNEL_DRIFT_PROMPT,
    LINEARIZATION_PROMPT,
)
