"""What a user of the solvers and diagnostics on given kernels is told."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.kernels import kernel_gradient_descent
from jaxft.kernels.alignment import kernel_alignment
from jaxft.kernels.logistic import kernel_logistic_predict, kernel_logistic_regression
from jaxft.kernels.lssvm import asymmetric_lssvm, asymmetric_lssvm_predict
from jaxft.kernels.one_step import one_step_prediction

K, TWO, F0 = jnp.eye(2), jnp.array([0, 1]), jnp.ones(2)
FULL = jnp.einsum("nm,cd->ncmd", jnp.eye(2), jnp.eye(3))


def logistic(kernel=K, labels=TWO, ridge=0.1, **options):
    return kernel_logistic_regression(kernel, labels, ridge=ridge, **options)


def predicted(kernel=K, f0=None):
    return kernel_logistic_predict(logistic(), kernel, f0)


LOGISTIC = {
    "not square": (lambda: logistic(jnp.ones((2, 3))), r"\(n, n\)"),
    "targets for labels": (lambda: logistic(labels=jnp.array([0.0, 1.0])), "one integer an example"),
    "other rows": (lambda: logistic(labels=jnp.array([0, 1, 0])), "one integer an example"),
    "no ridge": (lambda: logistic(ridge=0.0), "no finite minimiser"),
    "classes of a full kernel": (lambda: logistic(FULL, classes=3), "classes goes with"),
    "one class": (lambda: logistic(classes=1), "at least 2"),
    "f0 of another shape": (lambda: logistic(f0=jnp.ones((2, 1))), r"f0 must have shape \(2,\)"),
    "f0 without classes axis": (lambda: logistic(classes=3, f0=F0), r"f0 must have shape \(2, 3\)"),
    "nan": (lambda: logistic(K * jnp.nan), "must be finite"),
    "asymmetric": (lambda: logistic(jnp.array([[1.0, 2], [0, 1]])), "Use asymmetric_lssvm"),
    "indefinite": (lambda: logistic(jnp.diag(jnp.array([1.0, -0.5]))), "positive semi-definite"),
    "signs for labels": (lambda: logistic(labels=jnp.array([-1, 1])), r"in 0\.\.1, got labels from -1 to 1"),
    "third class": (lambda: logistic(labels=jnp.array([0, 2])), "or pass classes"),
    "label beyond a full kernel": (lambda: logistic(FULL, jnp.array([0, 3])), r"0\.\.2"),
    "transposed test kernel": (lambda: predicted(jnp.ones((2, 3))), "columns must be the training points"),
    "f0 forgotten": (lambda: kernel_logistic_predict(logistic(f0=F0), K), "f0 was used"),
    "f0 of other points": (lambda: predicted(f0=jnp.ones(3)), "at the new points"),
}


def lssvm(kernel=K, labels=TWO, gamma=0.5, **options):
    return asymmetric_lssvm(kernel, labels, gamma=gamma, **options)


def lssvm_predicted(rows=K, columns=K, **options):
    return asymmetric_lssvm_predict(lssvm(), rows, columns, **options)


LSSVM = {
    "several outputs": (lambda: lssvm(FULL), r"logit_difference\(f\), which has one output"),
    "not square": (lambda: lssvm(jnp.ones((2, 3))), r"\(n, n\)"),
    "targets for labels": (lambda: lssvm(labels=jnp.array([-1.0, 1.0])), "one integer an example"),
    "signs for labels": (lambda: lssvm(labels=jnp.array([-1, 1])), "Map -1 to 0"),
    "no gamma": (lambda: lssvm(gamma=0.0), "gamma must be positive"),
    "f0 of another shape": (lambda: lssvm(f0=jnp.ones(3)), "shape of labels"),
    "nan": (lambda: lssvm(K * jnp.nan), "must be finite"),
    "columns not transposed": (lambda: lssvm_predicted(jnp.ones((3, 2)), jnp.ones((3, 2))), r"k\(train, new\)"),
    "mix outside": (lambda: lssvm_predicted(mix=1.5), r"in \[0, 1\]"),
    "f0 forgotten": (lambda: asymmetric_lssvm_predict(lssvm(f0=F0), K, K), "f0 was used"),
    "f0 of other points": (lambda: lssvm_predicted(f0=jnp.ones(3)), "at the new points"),
}

ALIGNMENT = {
    "not square": (lambda: kernel_alignment(jnp.ones((2, 3)), TWO), r"\(n, n\)"),
    "other rows": (lambda: kernel_alignment(K, jnp.array([0, 1, 1])), "match the rows"),
    "integer one-hot": (lambda: kernel_alignment(K, jnp.eye(2, dtype=int)), "an integer an example"),
    "targets of other outputs": (lambda: kernel_alignment(FULL, jnp.eye(2)), "match the rows"),
    "one class": (lambda: kernel_alignment(K, jnp.array([1, 1])), "must vary"),
    "zero targets": (lambda: kernel_alignment(K, jnp.zeros(2), centered=False), "must not be 0"),
    "label beyond the kernel": (lambda: kernel_alignment(FULL, jnp.array([0, 3])), r"0\.\.2"),
    "nan": (lambda: kernel_alignment(K * jnp.nan, TWO), "must be finite"),
}


def network(w, x):
    return x @ w


def half_square(f, y):
    return 0.5 * jnp.mean((f - y) ** 2)


def one_step(f=network, w=F0, **options):
    return one_step_prediction(f, w, K, F0, K, half_square, learning_rate=0.1, **options)


ONE_STEP = {
    "unknown rule": (lambda: one_step(rule="sigsgd"), "Did you mean signgd"),  # pyright: ignore[reportArgumentType]
    "no preconditioner": (lambda: one_step(rule="preconditioned"), "goes with"),
    "stray preconditioner": (lambda: one_step(preconditioner=F0), "only with it"),
    "other tree": (lambda: one_step(rule="preconditioned", preconditioner=K), "tree and shapes of params"),
    "nan parameters": (lambda: one_step(w=F0 * jnp.nan), "params must be finite"),
    "pooled batch": (lambda: one_step(lambda w, x: (x @ w).sum()), "one row an example"),
}


def descend(f0, **options):
    return kernel_gradient_descent(K, f0, F0, half_square, learning_rate=0.1, steps=1, sign=True, **options)


DYNAMICS = {
    "sign of several outputs": (lambda: descend(jnp.ones((2, 3))), r"logit_difference\(f\), which has one output"),
    "sign with momentum": (lambda: descend(F0, b1=0.9), "without momentum"),
}

CASES = {
    f"{name}: {case}": (name, *entry)
    for name, table in {
        "kernel_logistic": LOGISTIC,
        "asymmetric_lssvm": LSSVM,
        "kernel_alignment": ALIGNMENT,
        "one_step_prediction": ONE_STEP,
        "kernel_gradient_descent": DYNAMICS,
    }.items()
    for case, entry in table.items()
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_the_function_and_says_what_is_wrong(case):
    name, call, said = CASES[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith(name)


def test_shape_faults_are_found_under_jit():
    with pytest.raises(ValueError, match="one integer an example"):
        jax.jit(lambda k: logistic(k, jnp.array([0, 1, 0])))(K)
    with pytest.raises(ValueError, match="which has one output"):
        jax.jit(lssvm)(FULL)
