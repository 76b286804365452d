"""What a user of ``jaxft.kernels`` is told."""

import jax
import jax.numpy as jnp
import pytest

from jaxft import kernels


def network(w, x):
    return x @ w


W, X = jnp.ones((3, 2)), jnp.ones((4, 3))
FLAT = {"a": jnp.ones(3), "b": jnp.zeros(())}

NTK = {
    "unknown kernel": (lambda: kernels.empirical_ntk(network, W, X, kernel="sdg"), "Did you mean sgd"),  # pyright: ignore[reportCallIssue, reportArgumentType]
    "no examples axis": (lambda: kernels.empirical_ntk(network, W, jnp.float32(1)), "leading axis of examples"),
    "rows differ": (lambda: kernels.empirical_ntk(network, W, {"a": X, "b": X[:2]}), "leading axis of examples"),
    "three axes": (lambda: kernels.empirical_ntk(lambda w, x: (x @ w)[..., None], W, X), r"\(4,\) or \(4, c\)"),
    "pooled batch": (lambda: kernels.empirical_ntk(lambda w, x: (x @ w).sum(0), W, X), "one row an example"),
    "block of 0": (lambda: kernels.empirical_ntk(network, W, X, block_size=0), "at least 1"),
    "nan parameters": (lambda: kernels.empirical_ntk(lambda p, x: x @ p["w"], {"w": W * jnp.nan}, X), "infinity in w"),
    "no preconditioner": (lambda: kernels.empirical_ntk(network, W, X, kernel="preconditioned"), "goes with"),
    "stray preconditioner": (lambda: kernels.empirical_ntk(network, W, X, preconditioner=W), "only with it"),
    "other tree": (
        lambda: kernels.empirical_ntk(network, W, X, kernel="preconditioned", preconditioner=W[:2]),
        "tree and shapes of params",
    ),
    "unknown method": (lambda: kernels.empirical_ntk(network, W, X, method="ntpv"), "Did you mean ntvp"),  # pyright: ignore[reportCallIssue, reportArgumentType]
    "sign on both sides": (
        lambda: kernels.empirical_ntk(network, W, X, kernel="signgd", method="ntvp"),
        'got signgd. Use method="contraction"',
    ),
    "mask of another tree": (
        lambda: kernels.empirical_ntk(lambda p, x: x @ p["w"], {"w": W}, X, param_mask={"w": True, "lora_a": True}),
        r"lora_a \(mask alone\). Make it with parameter_mask",
    ),
    "mask of arrays": (lambda: kernels.empirical_ntk(network, W, X, param_mask=W > 0), "must hold Python bools"),
    "name of a mask": (lambda: kernels.empirical_ntk(network, W, X, param_mask="bitfit"), "got 'bitfit'. Make it with"),
    "integer parameters": (
        lambda: kernels.empirical_ntk(lambda p, x: x @ p["w"], {"w": W, "steps": jnp.ones(2, int)}, X),
        "steps of int32",
    ),
    "infinite preconditioner": (
        lambda: kernels.empirical_ntk(network, W, X, kernel="preconditioned", preconditioner=W / 0),
        "an eps above 0",
    ),
    "no examples": (lambda: kernels.empirical_ntk(network, W, X[:0]), "there must be an example"),
    "mask of nothing": (lambda: kernels.empirical_ntk(network, W, X, param_mask=False), "must leave a parameter"),
    "infinite gradient": (
        lambda: kernels.empirical_ntk(lambda p, x: jnp.sqrt(jnp.abs(x)) @ p["a"] + jnp.sqrt(p["b"]), FLAT, X),
        "NaN or infinity in b at example 0",
    ),
    "overflowing kernel": (lambda: kernels.empirical_ntk(network, W, 1e30 * X), "an overflow of finite gradients"),
    "batch statistics": (
        lambda: kernels.empirical_ntk(lambda w, x: x @ w - (x @ w).mean(0, keepdims=True), W, jnp.eye(4, 3)),
        "must not depend on the rest of its batch, got a relative change of 1 with another example beside it",
    ),
    "share of a mean": (
        lambda: kernels.empirical_ntk(lambda w, x: x @ w / len(x), W, X),
        "from a batch of one to a batch of two. Evaluate with stored statistics",
    ),
    "negative preconditioner": (
        lambda: kernels.empirical_ntk(network, W, X, kernel="preconditioned", preconditioner=-W),
        "non-negative",
    ),
}


@pytest.mark.parametrize("case", NTK)
def test_kernel_says_what_is_wrong(case):
    call, said = NTK[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("empirical_ntk: ")


def test_blocks_of_a_batch_dependent_function_are_refused_before_any_is_computed():
    with pytest.raises(ValueError, match="kernel_blocks: outputs of an example must not depend on the rest"):
        kernels.kernel_blocks(lambda w, x: x @ w / len(x), W, X)


def test_shape_faults_are_found_under_jit():
    with pytest.raises(ValueError, match="one row an example"):
        jax.jit(lambda w: kernels.empirical_ntk(lambda w, x: (x @ w).sum(0), w, X))(W)


MASK = {
    "unknown subset": (lambda: kernels.parameter_mask(FLAT, "bitfitt"), "Did you mean bitfit"),
    "subset and patterns": (lambda: kernels.parameter_mask(FLAT, "bitfit", only=["a"]), "goes without patterns"),
    "one pattern as a string": (lambda: kernels.parameter_mask(FLAT, only="a"), "a string for only. Write only="),
    "no such leaf": (lambda: kernels.parameter_mask(FLAT, "adapters"), "among a, b"),
    "nothing left": (lambda: kernels.parameter_mask(FLAT, without=["a", "b"]), "must leave a parameter"),
}


@pytest.mark.parametrize("case", MASK)
def test_mask_says_what_is_wrong(case):
    call, said = MASK[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("parameter_mask: ")


OTHERS = {
    "one class": (lambda: kernels.contrast_logits(network, 1), "classes must be at least 2"),
    "other logits": (lambda: kernels.contrast_logits(network, 3)(W, X), "must return 3 logits"),
    "scalar f": (lambda: kernels.logit_difference(lambda w, x: (x @ w)[:, 0])(W, X), "must return 2 logits"),
    "no contrasts": (
        lambda: kernels.contrast_loss(lambda f, y: f.sum(), 3)(jnp.ones((2, 3)), jnp.zeros(2, int)),
        r"\(n, 2\)",
    ),
    "other vector": (
        lambda: kernels.ntk_vector_product(network, W, X, jnp.ones(4)),
        r"outputs of y, \(4, 2\), got \(4,\)",
    ),
    "labels beyond the outputs": (
        lambda: kernels.label_complexity(jnp.ones((2, 2, 2, 2)), jnp.array([1, 2])),
        "labels must lie in 0 to 1, got 1 to 2",
    ),
    "labels of one class": (lambda: kernels.label_complexity(jnp.eye(3), jnp.zeros(3, int)), "one value alone"),
    "vector, block of 0": (
        lambda: kernels.ntk_vector_product(network, W, X, jnp.ones((4, 2)), block_size=0),
        "at least 1",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_contrasts_and_products_say_what_is_wrong(case):
    call, said = OTHERS[case]
    with pytest.raises(ValueError, match=said):
        call()


REGRESSION = {
    "not square": (lambda: kernels.kernel_ridge_regression(jnp.ones((2, 3)), jnp.ones(2)), r"\(n, n\)"),
    "other rows": (lambda: kernels.kernel_ridge_regression(jnp.eye(3), jnp.ones(2)), "match the rows"),
    "negative ridge": (lambda: kernels.kernel_ridge_regression(jnp.eye(2), jnp.ones(2), ridge=-1.0), "non-negative"),
    "asymmetric": (lambda: kernels.kernel_ridge_regression(jnp.array([[1.0, 2], [0, 1]]), jnp.ones(2)), "symmetric"),
    "nan": (lambda: kernels.kernel_ridge_regression(jnp.eye(2) * jnp.nan, jnp.ones(2)), "must be finite"),
    "transposed test kernel": (
        lambda: kernels.kernel_ridge_predict(
            kernels.kernel_ridge_regression(jnp.eye(2), jnp.ones(2)), jnp.ones((2, 3))
        ),
        "columns must be the training points",
    ),
    "f0 forgotten": (
        lambda: kernels.kernel_ridge_predict(
            kernels.kernel_ridge_regression(jnp.eye(2), jnp.ones(2), f0=jnp.ones(2)), jnp.eye(2)
        ),
        "f0 was used",
    ),
    "f0 of another shape": (
        lambda: kernels.kernel_ridge_regression(jnp.eye(2), jnp.ones(2), f0=jnp.ones(3)),
        "shape of targets",
    ),
}


@pytest.mark.parametrize("case", REGRESSION)
def test_regression_says_what_is_wrong(case):
    call, said = REGRESSION[case]
    with pytest.raises(ValueError, match=said):
        call()


def test_dynamics_and_drift_say_what_is_wrong():
    with pytest.raises(ValueError, match="go together"):
        kernels.kernel_gradient_descent(
            jnp.eye(1), jnp.zeros(1), jnp.ones(1), lambda f, y: f.sum(), learning_rate=1.0, steps=1, f0_test=jnp.ones(1)
        )
    with pytest.raises(ValueError, match="share a shape"):
        kernels.kernel_drift(jnp.eye(2), jnp.eye(3))
    with pytest.raises(ValueError, match="at least 1"):
        kernels.feature_drift(network, W, W, X, block_size=0)
