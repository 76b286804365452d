"""The claims of kernel_finetuning: each holds, its control is violated, and faults of the code under it show."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import TokenBatch
from jaxft.kernels import (
    empirical_ntk,
    feature_drift,
    kernel_gradient_descent,
    lora_kernel,
    ntk_parametrization_preconditioner,
    output_derivative,
    output_jacobian,
    random_projection,
)
from jaxft.kernels.contraction import contract
from jaxft.train import cross_entropy, make_optimizer
from theory.claims import check_claim
from theory.kernel_finetuning import (
    CLAIMS,
    THRESHOLDS,
    Diagnostics,
    chi_size,
    gram,
    gram_cases,
    gram_costs,
    kernel_verdict,
    paper_verdict,
    projections,
    prompts,
    residuals,
    steps,
    trajectories,
    widths,
)

BY_NAME = {claim.id.removeprefix("kernel_finetuning/"): claim for claim in CLAIMS}
PROMPT = ("chi-prompt", "kernel-drift-prompt", "linearization-prompt", "permuted-labels")
TOY = [name for name in BY_NAME if name not in PROMPT]


@pytest.fixture
def claim_modules():
    return (steps, trajectories, residuals, projections, widths, gram, gram_cases, gram_costs)


@pytest.mark.parametrize("name", TOY)
def test_claim_holds_and_its_control_is_violated(name):
    assert check_claim(BY_NAME[name]).status == "holds"
    assert check_claim(BY_NAME[name], control=True).status == "violated"


@pytest.mark.parametrize("name", TOY)
def test_claim_holds_at_other_seeds(name):
    assert check_claim(BY_NAME[name], first_seed=100).status == "holds"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPT)
def test_prompt_claim_holds_and_its_control_is_violated(name):
    assert check_claim(BY_NAME[name]).status == "holds"
    assert check_claim(BY_NAME[name], control=True).status == "violated"


def _negated(function):
    return lambda *args, **options: -function(*args, **options)


def _transposed_outputs(*args, **options):
    return jax.tree.map(lambda kernel: jnp.swapaxes(kernel, 1, 3), empirical_ntk(*args, **options))


def _halved(*args, **options):
    return jax.tree.map(lambda kernel: 0.5 * kernel, empirical_ntk(*args, **options))


def _transposed_points(*args, **options):
    """The kernel of the columns' points with the sign on the rows: another orientation."""
    kernel = empirical_ntk(*args, **options)
    if options.get("kernel") != "asymmetric_signgd":
        return kernel
    f, params, x, *rest = args
    y = rest[0] if rest else x
    turned = empirical_ntk(f, params, y, x, **options)
    return jnp.moveaxis(turned, turned.ndim // 2, 0) if turned.ndim == 2 else jnp.transpose(turned, (2, 3, 0, 1))


def _symmetric_signs(*args, **options):
    if options.get("kernel") == "asymmetric_signgd":
        options["kernel"] = "signgd"
    return empirical_ntk(*args, **options)


def _scaled_features(*args, **options):
    return jnp.sqrt(2.0) * random_projection(*args, **options)


def _first_half(gradient, size, **options):
    """A projection that reads half of the gradient."""
    return random_projection(jax.tree.map(lambda leaf: leaf.at[leaf.shape[0] // 2 :].set(0), gradient), size, **options)


def _scaled_lora(f, params, x, **options):
    return lora_kernel(f, params, x, **{**options, "scale": 1.1})


def _variance_without_trace(f, params, x, *, rank, adapted):
    """The first term alone: the sum over matrices of |M_i M_j^T|^2 / rank."""
    jacobian = jax.tree.leaves(output_jacobian(f, params, x, param_mask=adapted))
    products = [jnp.einsum("ncab,mdeb->ncmdae", j, j) for j in jacobian]
    return sum(jnp.sum(p**2, axis=(4, 5)) for p in products) / rank


def _without_biases(params):
    return jax.tree.map(lambda p: p if p.ndim > 1 else 0 * p, ntk_parametrization_preconditioner(params))


def _neighbours(classes):
    return np.eye(classes)[:, :-1] - np.eye(classes)[:, 1:]


def _squared_drift(*args, **options):
    return feature_drift(*args, **options) ** 2


def _without_sign(*args, sign=False, **options):
    return kernel_gradient_descent(*args, **options)


def _uncoupled_outputs(*args, **options):
    """A kernel of one output at a time: what an NTK that ignores the other logits would be."""
    kernel: Any = empirical_ntk(*args, **options)
    return kernel * jnp.eye(kernel.shape[1])[None, :, None, :]


def _without_preconditioner(*args, kernel="sgd", preconditioner=None, **options):
    return empirical_ntk(*args, **options)


def _one_sign_too_many(*args):
    return contract(*args) + 1


def _without_sqrt(moment, *, eps):
    return jax.tree.map(lambda v: 1 / (v + eps), moment)


def _without_eps(moment, *, eps):
    return jax.tree.map(lambda v: 1 / jnp.sqrt(v), moment)


def _without_momentum(*args, b1, **options):
    return kernel_gradient_descent(*args, **options)


def _without_bias_correction(*args, b1, learning_rate, steps, **options):
    rates = learning_rate * (1 - b1 ** np.arange(1.0, steps + 1)) if b1 else learning_rate
    rates = jnp.asarray(rates) if b1 else rates
    return kernel_gradient_descent(*args, b1=b1, learning_rate=rates, steps=steps, **options)


def _all_examples(*args, batches, **options):
    return kernel_gradient_descent(*args, **options)


def _sgd_for_adam(name, learning_rate, **options):
    if name == "adam":
        return make_optimizer("sgd", learning_rate)
    return make_optimizer(name, learning_rate, **options)


def _sign_for_adam(name, learning_rate, **options):
    return make_optimizer("sign", learning_rate) if name == "adam" else make_optimizer(name, learning_rate, **options)


FAULTS = {
    "kernel of the wrong sign": ("empirical_ntk", _negated(empirical_ntk), ("sgd-step", "adam-ntk")),
    "kernel with its outputs transposed": ("empirical_ntk", _transposed_outputs, ("sgd-step", "adam-ntk")),
    "kernel without a factor": (
        "empirical_ntk",
        _halved,
        ("sgd-step", "adam-ntk", "linearization-residual", "gram-float64", "gram-float32", "gram-padding"),
    ),
    "kernel that does not couple outputs": (
        "empirical_ntk",
        _uncoupled_outputs,
        ("sgd-step", "adam-ntk", "linearization-residual"),
    ),
    "kernel without preconditioner": ("empirical_ntk", _without_preconditioner, ("adam-ntk",)),
    "preconditioner without square root": ("adam_preconditioner", _without_sqrt, ("adam-ntk",)),
    "preconditioner without eps": ("adam_preconditioner", _without_eps, ("adam-ntk",)),
    "kernel descent without momentum": ("kernel_gradient_descent", _without_momentum, ("adam-ntk",)),
    "kernel descent without bias correction": ("kernel_gradient_descent", _without_bias_correction, ("adam-ntk",)),
    "kernel descent on all examples": ("kernel_gradient_descent", _all_examples, ("adam-ntk",)),
    "sign kernel with the sign on the other side": (
        "empirical_ntk",
        _transposed_points,
        ("sign-step", "asymmetric-sign-one-example", "young-adam-kernel"),
    ),
    "symmetric sign kernel": ("empirical_ntk", _symmetric_signs, ("sign-step", "asymmetric-sign-one-logit")),
    "kernel descent without sign": ("kernel_gradient_descent", _without_sign, ("asymmetric-sign-one-example",)),
    "contrasts that are differences of neighbours": ("contrast_basis", _neighbours, ("contrast-basis",)),
    "projection of features too long": ("random_projection", _scaled_features, ("projection-mean",)),
    "projection of half of the gradient": ("random_projection", _first_half, ("projection-mean", "projection-error")),
    "adapters with a scale": ("lora_kernel", _scaled_lora, ("lora-mean", "lora-variance")),
    "variance without one of its terms": ("lora_kernel_variance", _variance_without_trace, ("lora-variance",)),
    "rates of the biases forgotten": ("ntk_parametrization_preconditioner", _without_biases, ("infinite-width",)),
    "drift of the gradients squared": ("feature_drift", _squared_drift, ("feature-drift-residual",)),
    "sgd in place of adam": (
        "make_optimizer",
        _sgd_for_adam,
        ("first-adam-step", "first-adam-step-sign", "constant-gradient"),
    ),
    "sign descent in place of adam": ("make_optimizer", _sign_for_adam, ("first-adam-step",)),
    "sums of signs off by one": ("contract", _one_sign_too_many, ("gram-signs",)),
    "network in place of its tangent": ("linearize", lambda f, params: f, ("adam-ntk",)),
    "output derivative of the wrong sign": ("output_derivative", _negated(output_derivative), ("sgd-step",)),
}


@pytest.mark.parametrize(
    ("fault", "name"),
    [  # one claim a fault is enough for the fast suite: each compiles its programs anew
        pytest.param(fault, name, marks=[pytest.mark.slow] if i else [])
        for fault, (_, _, names) in FAULTS.items()
        for i, name in enumerate(names)
    ],
)
def test_claim_is_violated_by_a_fault_of_the_code(patched, fault, name):
    patched(*FAULTS[fault][:2])
    assert check_claim(BY_NAME[name]).status == "violated"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_kernels_of_all_parameters_equal_those_of_dense_gradients(x64, seed):
    evidence = gram.factored_kernels(seed, cases=("label words",), only=(".",))
    np.testing.assert_allclose(evidence.measured, evidence.predicted, rtol=0, atol=1e-12)
    assert evidence.setting["compared"] == sum(map(len, gram_cases.COMPUTED.values())) - len(
        gram_cases.COMPUTED["auto"]
    )


def test_memory_of_tiles_grows_by_the_columns_of_the_kernel_alone():
    sizes = gram_costs.ALLOTTED[:2]
    few, many = (gram_costs.memory(size, "tiled")[0] for size in sizes)
    columns = sizes[1].columns - sizes[0].columns
    assert 0 < many - few <= 3 * sizes[0].rows * columns * len(gram_costs.LABELS) ** 2 * 4


def measures_of(accuracy, prompt, head, loss=0.2):
    table = {"prompt": prompt, "head": head, "swapped": head, "probe": prompt}

    def measures(seed, arm):
        return {
            "accuracy": accuracy,
            "chi": table[arm] + 0.01 * seed,
            "log_kernel_drift": table[arm] + 0.01 * seed,
            "linearization_gap": 0.0,
            "loss": loss,
        }

    return measures


def test_prompt_claim_compares_prompt_with_head(monkeypatch):
    monkeypatch.setattr(prompts, "tuning_measures", measures_of(0.9, 0.2, 0.5))
    claim = BY_NAME["chi-prompt"]
    assert (check_claim(claim).status, check_claim(claim, control=True).status) == ("holds", "violated")
    monkeypatch.setattr(prompts, "tuning_measures", measures_of(0.9, 0.5, 0.2))
    assert check_claim(claim).status == "violated"


def test_network_that_does_not_solve_the_prompted_task_is_no_evidence(monkeypatch):
    monkeypatch.setattr(prompts, "tuning_measures", measures_of(0.6, 0.2, 0.5))
    finding = check_claim(BY_NAME["chi-prompt"])
    assert finding.status == "inconclusive"
    assert "natural task (zero-shot accuracy 0.60" in finding.setting["note"]


def test_arms_that_did_not_reach_the_loss_are_no_evidence_on_drift(monkeypatch):
    monkeypatch.setattr(prompts, "tuning_measures", measures_of(0.9, 0.2, 0.5, loss=0.4))
    finding = check_claim(BY_NAME["kernel-drift-prompt"])
    assert finding.status == "inconclusive"
    assert "equal training loss (reached 0.40 nats" in finding.setting["note"]
    assert check_claim(BY_NAME["chi-prompt"]).status == "holds"


@pytest.mark.slow
def test_swapped_label_words_do_not_pass(monkeypatch):
    def swapped(tokenizer, words):
        return tuple(reversed(label_word_ids(tokenizer, words)))

    label_word_ids = prompts.label_word_ids
    monkeypatch.setattr(prompts, "label_word_ids", swapped)
    for cached in (prompts.tuning, prompts.tuning_measures):
        monkeypatch.setattr(prompts, cached.__name__, functools.cache(cached.__wrapped__))
    evidence = prompts.prompt_below_head(0, "chi")
    assert evidence.measured > 0.5
    assert evidence.unmet


@pytest.mark.slow
def test_probe_starts_nearer_to_the_labels_than_a_fresh_head():
    chi = {arm: prompts.prompt_below_head(0, "chi", prompt=arm, head="probe") for arm in ("head", "probe")}
    assert chi["probe"].measured < 0.9 * chi["head"].measured


def test_arms_are_tuned_until_the_loss_is_reached():
    x = jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.8, -0.3], [-0.7, -0.4]])
    ids = jnp.zeros((4, 1), jnp.int32)
    batch = TokenBatch(ids, ids, ids, jnp.arange(4))
    labels = jnp.array([1, 0, 1, 0])

    def f(params, inputs):
        return 20 * x[inputs.mask_position] @ params

    params = jnp.zeros((2, 2))
    with jax.numpy_dtype_promotion("standard"):
        tuned, loss = prompts._tuned(f, params, batch, labels)
        again, _ = prompts._tuned(f, tuned, batch, labels)
    assert abs(float(loss) - float(cross_entropy(f(tuned, batch), labels))) < 1e-6
    assert float(cross_entropy(f(params, batch), labels)) > prompts.TUNED_LOSS
    assert float(cross_entropy(f(tuned, batch), labels)) <= prompts.TUNED_LOSS
    np.testing.assert_array_equal(again, tuned)


def test_chi_size_is_the_mean_of_the_largest_derivative():
    outputs, labels = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0])
    softmax = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    expected = np.abs(softmax - np.eye(3)[labels]).max(axis=1).mean()
    np.testing.assert_allclose(chi_size(jnp.asarray(outputs), jnp.asarray(labels)), expected, rtol=1e-5)


def diagnostics(**changes):
    at_limit = {"linearization_gap": 0.35, "feature_drift": 0.3, "kernel_drift": 0.3}
    accuracies = {"accuracy_start": 0.5, "accuracy": 0.8, "accuracy_kernel": 0.9 * 0.8, "accuracy_linearized": 0.8}
    return Diagnostics(**{**accuracies, **at_limit, **changes})


def test_run_at_every_threshold_is_kernel_like():
    assert kernel_verdict(diagnostics()) == "yes"


@pytest.mark.parametrize("name", ["linearization_gap", "feature_drift", "kernel_drift"])
def test_run_beyond_one_threshold_is_not_and_says_which(name):
    beyond = THRESHOLDS[name] + 1e-6
    assert kernel_verdict(diagnostics(**{name: beyond})) == f"no: {name}"


def test_verdict_lists_all_that_fails():
    verdict = kernel_verdict(diagnostics(feature_drift=1.0, kernel_drift=float("nan"), accuracy_kernel=0.7))
    assert verdict == "no: feature_drift, kernel_drift, kernel_accuracy"


def test_outputs_that_did_not_move_have_no_verdict():
    assert kernel_verdict(diagnostics(linearization_gap=float("nan"))) == "outputs did not move"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"feature_drift": 1.99}, "yes"),
        ({"feature_drift": 2.0}, "no"),
        ({"accuracy_kernel": 0.71}, "no"),
        ({"accuracy_linearized": 0.66}, "yes"),
        ({"accuracy_linearized": 0.64}, "no"),
        ({"accuracy_start": 0.76, "accuracy_linearized": 0.72}, "yes"),
        ({"accuracy_start": 0.76, "accuracy_linearized": 0.5}, "no"),
        ({"linearization_gap": 5.0, "kernel_drift": 5.0}, "yes"),
    ],
)
def test_paper_verdict_at_its_thresholds(changes, verdict):
    assert paper_verdict(diagnostics(**changes)) == verdict
