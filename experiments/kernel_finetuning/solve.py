"""Classifiers from the kernels of a starting point, their hyper-parameters picked on dev, and a control."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.kernel_finetuning.config import KernelFinetuningConfig, Solver, Solving
from experiments.kernel_finetuning.measure import ASYMMETRIC, FLIPPED, Start
from experiments.kernel_finetuning.prepare import Unit
from jaxft.core.rng import host_stream
from jaxft.kernels import (
    asymmetric_lssvm,
    asymmetric_lssvm_predict,
    kernel_alignment,
    kernel_logistic_predict,
    kernel_logistic_regression,
    kernel_ridge_predict,
    kernel_ridge_regression,
)
from jaxft.train import accuracy

COMPLEXITY_RIDGE = 1e-3
"""Ridge, relative to the norm of the kernel, at which the complexity of labels is taken: one for all kernels."""


def solve_kernel(unit: Unit, start: Start, name: str, config: KernelFinetuningConfig) -> dict[str, Any]:
    """The classifier of a kernel that is best on dev, the first of those that tie: its settings and test accuracy."""
    pool, labels = unit.pool, jnp.asarray(unit.pool.labels)
    candidates = _asymmetric if name == ASYMMETRIC else _symmetric
    best: dict[str, Any] = {}
    for settings, logits in candidates(unit, start, name, config.solving):
        on_dev = float(accuracy(logits[pool.dev], labels[pool.dev]))
        if not best or on_dev > best["accuracy_dev"]:
            on_test = float(accuracy(logits[pool.test], labels[pool.test]))
            best = {"accuracy_dev": on_dev, "accuracy": on_test, **settings}
    return best


def _symmetric(unit: Unit, start: Start, name: str, solving: Solving) -> Iterator[tuple[dict[str, Any], Array]]:
    """Settings and logits of all examples, for ridge regression on one-hot labels and for logistic regression."""
    kernel, on_train = jnp.asarray(start.kernels[name]), _on_train(unit, start, name)
    f0, scales = jnp.asarray(start.outputs), jnp.asarray(solving.f0_scales)
    for solver in solving.solvers:
        solved = {
            ridge: _classify(kernel, on_train, unit.train.labels, f0, scales, solver=solver, ridge=ridge)
            for ridge in solving.ridges
            if ridge > 0 or solver == "ridge"
        }
        for (i, scale), (ridge, (logits, rank)) in itertools.product(enumerate(solving.f0_scales), solved.items()):
            size = on_train.shape[0] * on_train.shape[1]
            settings = {"solver": solver, "ridge": ridge, "f0_scale": scale, "rank": int(rank[i]), "size": size}
            yield settings, logits[i]


# Compiled once a ridge: Newton's method dispatched one by one would be compiled in every call.
@functools.partial(jax.jit, static_argnames=("solver", "ridge"))
def _classify(
    kernel: Array, on_train: Array, labels: Array, f0: Array, scales: Array, *, solver: Solver, ridge: float
) -> tuple[Array, Array]:
    """Logits of all examples for every scale of the initial outputs, and the ranks of the kernel."""
    targets = jax.nn.one_hot(labels, kernel.shape[1])

    def at(scale: Array) -> tuple[Array, Array]:
        start = scale * f0
        if solver == "logistic":
            fit = kernel_logistic_regression(on_train, labels, ridge=ridge, f0=start[: len(labels)])
            return kernel_logistic_predict(fit, kernel, start), fit.rank
        solution = kernel_ridge_regression(on_train, targets, ridge=ridge, f0=start[: len(labels)])
        return kernel_ridge_predict(solution, kernel, start), solution.rank

    return jax.vmap(at)(scales)


def _asymmetric(unit: Unit, start: Start, name: str, solving: Solving) -> Iterator[tuple[dict[str, Any], Array]]:
    """The same for the LS-SVM of the kernel of sign descent on the difference of two logits."""
    rows, columns = jnp.asarray(start.kernels[name]), jnp.asarray(start.kernels[FLIPPED])
    u0, train = jnp.asarray(start.difference), unit.pool.train
    for scale, gamma in itertools.product(solving.f0_scales, solving.gammas):
        solution = asymmetric_lssvm(rows[train], unit.train.labels, gamma=gamma, f0=u0[train], f0_scale=scale)
        for mix in solving.mixes:
            u = asymmetric_lssvm_predict(solution, rows, columns, mix=mix, f0=u0)
            settings = {"solver": "lssvm", "gamma": gamma, "mix": mix, "f0_scale": scale}
            settings |= {"rank": int(solution.rank), "size": 2 * len(rows[train])}
            yield settings, jnp.stack([-u, u], axis=1) / 2


def permuted_labels(labels: Int[np.ndarray, "n"], *, seed: int) -> Int[np.ndarray, "n"]:
    """A permutation of labels that shares each class's examples out evenly over all classes.

    So they say nothing of the true ones, whatever the draw (with at least as many examples a class as classes).

    Example:
      >>> permuted = permuted_labels(np.array([0, 0, 0, 0, 1, 1, 1, 1]), seed=0)
      >>> np.bincount(permuted[:4]).tolist(), np.bincount(permuted[4:]).tolist()
      ([2, 2], [2, 2])
    """
    classes = np.unique(labels)
    rng, permuted = host_stream(seed, "permuted labels"), labels.copy()
    for i, c in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == c))
        permuted[members] = classes[(i + np.arange(len(members))) % len(classes)]
    return permuted


def permutation_control(unit: Unit, start: Start, name: str, config: KernelFinetuningConfig) -> dict[str, float]:
    r"""What a kernel makes of the training labels, and of the same labels permuted.

    Alignment; complexity, $\sqrt{y^\top (K + \lambda I)^{-1} y \operatorname{tr}(K) / (n c)} / \lVert y \rVert$ of
    centred one-hot labels, 1 for a kernel that relates no two outputs; test accuracy of ridge regression without the
    initial outputs, by the ridge that is best on dev for the true labels.

    Reference:
      Arora et al. 2019, arXiv 1901.08584, theorem 5.1 (the complexity, without the ridge).
    """
    pool, on_train = unit.pool, _on_train(unit, start, name)
    both = {
        "": np.asarray(unit.train.labels),
        "_permuted": permuted_labels(np.asarray(unit.train.labels), seed=unit.split),
    }
    targets = jnp.stack([jax.nn.one_hot(labels, on_train.shape[1]) for labels in both.values()])
    targets = targets - targets.mean(axis=1, keepdims=True)
    kernel, labels = jnp.asarray(start.kernels[name]), jnp.asarray(pool.labels)

    solved = {ridge: _regress(kernel, on_train, targets, ridge=ridge)[1] for ridge in config.solving.ridges}
    ridge = max(solved, key=lambda r: float(accuracy(solved[r][0, pool.dev], labels[pool.dev])))
    complexities, _ = _regress(kernel, on_train, targets, ridge=COMPLEXITY_RIDGE)
    found: dict[str, float] = {"ridge": ridge}
    for i, (suffix, given) in enumerate(both.items()):
        found[f"alignment{suffix}"] = float(kernel_alignment(on_train, jnp.asarray(given)))
        found[f"complexity{suffix}"] = float(complexities[i])
        found[f"accuracy{suffix}"] = float(accuracy(solved[ridge][i, pool.test], labels[pool.test]))
    return found


@functools.partial(jax.jit, static_argnames="ridge")
def _regress(kernel: Array, on_train: Array, targets: Array, *, ridge: float) -> tuple[Array, Array]:
    """Complexity of every set of targets, and the outputs of all examples that it leads to."""
    spread = jnp.einsum("ncnc->", on_train) / targets[0].size

    def of(y: Array) -> tuple[Array, Array]:
        solution = kernel_ridge_regression(on_train, y, ridge=ridge)
        complexity = jnp.sqrt(jnp.vdot(y, solution.dual, precision="highest") * spread) / jnp.linalg.norm(y)
        return complexity, kernel_ridge_predict(solution, kernel)

    return jax.vmap(of)(targets)


def _on_train(unit: Unit, start: Start, name: str) -> Array:
    """The kernel of the training examples, made symmetric.

    Batches of two shapes round differently, and the sign of a gradient that is 0 but for rounding differs with them.
    """
    kernel = jnp.asarray(start.kernels[name][unit.pool.train])
    return (kernel + jnp.transpose(kernel, (2, 3, 0, 1))) / 2
