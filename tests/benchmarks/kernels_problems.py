"""What the kernel benchmark is measured on: networks with random weights, examples, and their kernels in float64.

Every sentence is as long as the network reads: no padding. Kernels are ``[n, c, m, c]``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.trees import tree_cast, tree_combine, tree_partition, tree_size
from jaxft.core.types import Inputs, OutputFn, Params, TokenBatch
from jaxft.kernels import empirical_ntk, parameter_mask
from jaxft.kernels.plan import Plan
from jaxft.nn import EncoderConfig, init_classifier, init_encoder, make_class_logits, make_mlp, make_prompt_logits

LABEL_IDS = (7, 9)
KEY_BIAS = r"attention/key/bias$"
"""Softmax does not see it: its gradient is zero, and in floats noise whose sign means nothing."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder with its masked-word head, read at two label words; or with a linear head on the first token."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    tokens: int
    n: int
    m: int
    prompt: bool = True
    family: Any = "bert"
    outputs: int = 2

    @property
    def config(self) -> EncoderConfig:
        """As ``jaxft.nn`` wants it."""
        sizes = (self.vocabulary, self.width, self.layers, self.heads, 4 * self.width, self.positions)
        bert = self.family == "bert"
        return EncoderConfig(self.family, *sizes, 2 if bert else 1, 1e-12 if bert else 1e-5, pad_id=0 if bert else 1)

    def flops(self) -> float:
        """Of the tiled contraction in the matrices of the layers: passes, gradients from factors, pairs' products."""
        d, t, c = self.width, self.tokens, self.outputs
        dense, attention, examples = 12 * self.layers * d**2, 4 * self.layers * t**2 * d, self.n + self.m
        passes = (1 + c) * 2 * t * dense + (1 + 2 * c) * attention
        return examples * (passes + 2 * t * c * dense) + 2 * self.n * self.m * c**2 * dense


@dataclasses.dataclass(frozen=True)
class MLP:
    """A multilayer perceptron."""

    inputs: int
    width: int
    n: int
    m: int
    outputs: int = 2

    def flops(self) -> float:
        """Of the contraction: passes and products of pairs."""
        p = self.width * (self.inputs + self.width + self.outputs)
        return 2 * (self.n + self.m) * p * (1 + 2 * self.outputs) + 2 * self.n * self.m * self.outputs**2 * p


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, two sets of examples, and the kernel that is asked for."""

    size: Encoder | MLP
    f: OutputFn
    params: Params
    x: Inputs
    y: Inputs
    kernel: str = "sgd"
    preconditioner: Params | None = None
    param_mask: Params | None = None

    @property
    def work(self) -> str:
        """One line on the sizes."""
        return f"{_shape(self.size)}, {tree_size(self.params):,} parameters; {_counts(self.size)}"

    def split(self) -> tuple[Params, Params]:
        """The leaves of the kernel, and the others."""
        mask = jax.tree.map(lambda _: True, self.params) if self.param_mask is None else self.param_mask
        return tree_partition(self.params, mask)

    def part(self, n: int, m: int) -> "Problem":
        """That of the first rows and columns."""
        x, y = (jax.tree.map(lambda leaf, k=k: leaf[:k], side) for side, k in ((self.x, n), (self.y, m)))
        return dataclasses.replace(self, size=dataclasses.replace(self.size, n=n, m=m), x=x, y=y)

    def ours(self, **options: Any) -> np.ndarray:
        """By ``empirical_ntk``, on the host."""
        return np.asarray(self._call(**options))

    def plan(self, **options: Any) -> Plan:
        """What ``ours`` does."""
        return self._call(explain=True, **options)

    def _call(self, **options: Any) -> Any:
        options |= {"kernel": self.kernel, "preconditioner": self.preconditioner, "param_mask": self.param_mask}
        return empirical_ntk(self.f, self.params, self.x, self.y, **options)

    def error(self, kernel: np.ndarray, *, rows: int = 2, columns: int = 3) -> float:
        """Relative, of some rows and columns: from dense gradients in float64, one example at a time."""
        i, j = (
            np.unique(np.linspace(0, k - 1, few).astype(int))
            for k, few in ((self.size.n, rows), (self.size.m, columns))
        )
        exact = self._exact(i, j)
        found = np.asarray(kernel, np.float64)[i][:, :, j]
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    def _exact(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Holds the gradients of the rows, and of one column at a time."""
        signed = np.sign if self.kernel == "signgd" else np.asarray
        scales: list[Any] = [1.0] * len(jax.tree.leaves(self.params))
        if self.preconditioner is not None:
            scales = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(self.preconditioner)]
        with jax.enable_x64(True):
            trained, frozen = tree_cast(self.split(), jnp.float64)

            @jax.jit
            def jacobian(p: Params, example: Inputs) -> list[jax.Array]:
                of_one = jax.tree.map(lambda leaf: leaf[None], example)
                tree = jax.jacrev(lambda p: self.f(tree_combine(p, frozen), of_one)[0])(p)
                return [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)]

            def gradients(side: Inputs, k: int) -> list[np.ndarray]:
                example = tree_cast(jax.tree.map(lambda leaf: leaf[k], side), jnp.float64)
                return [signed(leaf) for leaf in jacobian(trained, example)]

            def column(right: list[np.ndarray]) -> list[Any]:
                return [sum(a @ (b * s).T for a, b, s in zip(one, right, scales, strict=False)) for one in left]

            left = [gradients(self.x, k) for k in i]
            return np.asarray([column(gradients(self.y, k)) for k in j]).transpose(1, 2, 0, 3)


def make_problem(size: Encoder | MLP, kernel: str = "sgd") -> Problem:
    """Random weights and examples of a size. A sign kernel leaves the biases of attention's keys out."""
    f, params, x, y = _encoder(size) if isinstance(size, Encoder) else _mlp(size)
    mask = parameter_mask(params, without=[KEY_BIAS]) if kernel == "signgd" and isinstance(size, Encoder) else None
    return Problem(size, f, params, x, y, kernel, _diagonal(params) if kernel == "preconditioned" else None, mask)


def _encoder(size: Encoder) -> tuple[OutputFn, Params, TokenBatch, TokenBatch]:
    config = size.config
    params = init_encoder(config, key=jax.random.key(0), mlm=size.prompt)
    if not size.prompt:
        params = {**params, "classifier": init_classifier(size.width, size.outputs, key=jax.random.key(1))}
    f = make_prompt_logits(config, LABEL_IDS) if size.prompt else make_class_logits(config)

    def batch(seed: int, count: int) -> TokenBatch:
        ids = jax.random.randint(jax.random.key(seed), (count, size.tokens), 2, size.vocabulary)
        position = jnp.full((count,), mask_position(size), ids.dtype)
        return TokenBatch(ids, jnp.ones_like(ids), jnp.zeros_like(ids), position)

    return f, params, batch(1, size.n), batch(2, size.m)


def mask_position(size: Encoder) -> int:
    """Of the token whose word is asked for: near the end, where a prompt has it."""
    return size.tokens - 2


def _mlp(size: MLP) -> tuple[OutputFn, Params, jax.Array, jax.Array]:
    init, f = make_mlp((size.width, size.width, size.outputs), activation="gelu")
    x, y = (jax.random.normal(jax.random.key(s), (count, size.inputs)) for s, count in ((1, size.n), (2, size.m)))
    return f, init(jax.random.key(0), size.inputs), x, y


def _diagonal(params: Params) -> Params:
    """As uneven as the preconditioner of Adam: its logarithm is normal."""
    keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(params)))
    tree = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda leaf, key: jnp.exp(jax.random.normal(key, leaf.shape)), params, tree)


def _shape(size: Encoder | MLP) -> str:
    if isinstance(size, MLP):
        return f"MLP {size.inputs} x {size.width} x {size.width} x {size.outputs} (gelu)"
    head = "masked-word head at 2 label words" if size.prompt else "linear head"
    return (
        f"Encoder ({size.layers} layers, width {size.width}, {size.tokens} tokens, {size.vocabulary:,} words), {head}"
    )


def _counts(size: Encoder | MLP) -> str:
    return f"{size.n} rows, {size.m} columns, {size.outputs} outputs"
