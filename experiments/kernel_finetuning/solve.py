"""Classifiers from the kernels of a starting point, their hyper-parameters picked on dev, and a control."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.kernel_finetuning.config import KernelFinetuningConfig, Solver, Solving
from experiments.kernel_finetuning.measure import ASYMMETRIC, FLIPPED, Start
from experiments.kernel_finetuning.prepare import Unit
from jaxft.data.kshot import permute_labels
from jaxft.kernels import (
    asymmetric_lssvm,
    asymmetric_lssvm_predict,
    kernel_alignment,
    kernel_logistic_predict,
    kernel_logistic_regression,
    kernel_ridge_predict,
    kernel_ridge_regression,
    label_complexity,
)
from jaxft.train import accuracy, cross_entropy


def solve_kernel(unit: Unit, start: Start, name: str, config: KernelFinetuningConfig) -> dict[str, Any]:
    """The classifier that is best on dev, of those that tie the one of least loss: its settings and test accuracy."""
    pool, labels = unit.pool, jnp.asarray(unit.pool.labels)
    candidates = _asymmetric if name == ASYMMETRIC else _symmetric
    best: dict[str, Any] = {}
    best_score = (-1.0, 0.0)
    for settings, logits in candidates(unit, start, name, config.solving):
        dev = logits[pool.dev], labels[pool.dev]
        score = float(accuracy(*dev)), -float(cross_entropy(*dev))
        if score > best_score:
            best_score = score
            on_test = float(accuracy(logits[pool.test], labels[pool.test]))
            best = {"accuracy_dev": score[0], "accuracy": on_test, **settings}
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
        for (i, scale), (ridge, found) in itertools.product(enumerate(solving.f0_scales), solved.items()):
            logits, rank, converged = found
            if not converged[i]:  # Newton's method stopped short of the minimum
                continue
            size = on_train.shape[0] * on_train.shape[1]
            settings = {"solver": solver, "ridge": ridge, "f0_scale": scale, "rank": int(rank[i]), "size": size}
            yield settings, logits[i]


# Compiled once a ridge: Newton's method dispatched one by one would be compiled in every call.
@functools.partial(jax.jit, static_argnames=("solver", "ridge"))
def _classify(
    kernel: Array, on_train: Array, labels: Array, f0: Array, scales: Array, *, solver: Solver, ridge: float
) -> tuple[Array, Array, Array]:
    """Logits of all examples for every scale of the initial outputs, the ranks of the kernel, and what converged."""
    targets = jax.nn.one_hot(labels, kernel.shape[1])

    def at(scale: Array) -> tuple[Array, Array, Array]:
        start = scale * f0
        if solver == "logistic":
            fit = kernel_logistic_regression(on_train, labels, ridge=ridge, f0=start[: len(labels)])
            return kernel_logistic_predict(fit, kernel, start), fit.rank, fit.converged
        solution = kernel_ridge_regression(on_train, targets, ridge=ridge, f0=start[: len(labels)])
        return kernel_ridge_predict(solution, kernel, start), solution.rank, jnp.asarray(True)

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


def permutation_control(unit: Unit, start: Start, name: str, config: KernelFinetuningConfig) -> dict[str, float]:
    """What a kernel makes of the training labels, and of the same labels permuted.

    Alignment and complexity of both; test accuracy of ridge regression without the initial outputs, by the ridge that
    is best on dev for the true labels.
    """
    pool, on_train = unit.pool, _on_train(unit, start, name)
    both = {
        "": np.asarray(unit.train.labels),
        "_permuted": permute_labels(np.asarray(unit.train.labels), seed=unit.split),
    }
    targets = jnp.stack([jax.nn.one_hot(labels, on_train.shape[1]) for labels in both.values()])
    targets = targets - targets.mean(axis=1, keepdims=True)
    kernel, labels = jnp.asarray(start.kernels[name]), jnp.asarray(pool.labels)

    solved = {ridge: _regress(kernel, on_train, targets, ridge=ridge) for ridge in config.solving.ridges}
    ridge = max(solved, key=lambda r: float(accuracy(solved[r][0, pool.dev], labels[pool.dev])))
    found: dict[str, float] = {"ridge": ridge}
    for i, (suffix, given) in enumerate(both.items()):
        found[f"alignment{suffix}"] = float(kernel_alignment(on_train, jnp.asarray(given)))
        found[f"complexity{suffix}"] = float(label_complexity(on_train, jnp.asarray(given)))
        found[f"accuracy{suffix}"] = float(accuracy(solved[ridge][i, pool.test], labels[pool.test]))
    return found


@functools.partial(jax.jit, static_argnames="ridge")
def _regress(kernel: Array, on_train: Array, targets: Array, *, ridge: float) -> Array:
    """Outputs of all examples by ridge regression on every set of targets."""
    return jax.vmap(lambda y: kernel_ridge_predict(kernel_ridge_regression(on_train, y, ridge=ridge), kernel))(targets)


def _on_train(unit: Unit, start: Start, name: str) -> Array:
    """The kernel of the training examples, made symmetric.

    Batches of two shapes round differently, and the sign of a gradient that is 0 but for rounding differs with them.
    """
    kernel = jnp.asarray(start.kernels[name][unit.pool.train])
    return (kernel + jnp.transpose(kernel, (2, 3, 0, 1))) / 2
