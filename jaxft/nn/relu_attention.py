"""Attention without softmax, by relative offset: the model class in which programs over sentences can be written.

A residual stack without norms. Scores of a head are kept as they are (``"relu"``) or choose one token (``"hard"``);
gated steps by position may follow. Consecutive layers that share their weights and differ in their offset biases alone
form a stage.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.core.checks import UserError, message, require
from jaxft.core.types import Params, TokenBatch


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """A step by position: ``x + ((x G) * (x U)) D`` (gated) or ``x + relu(x U + c) D`` (relu)."""

    kind: Literal["gated", "relu"]
    hidden: int


@dataclasses.dataclass(frozen=True)
class AttentionStage:
    """Layers that share their weights; each has offset biases of its own."""

    layers: int
    heads: int
    head_dim: int
    """Rank of a head's score matrix, the width of its queries and keys."""
    value_dim: int
    """Width of a head's values."""
    steps: tuple[FeedForward, ...] = ()
    """What follows the attention of each layer, by position."""


@dataclasses.dataclass(frozen=True)
class ReluAttentionConfig:
    """Sizes of the model.

    Raises:
      UserError: Sizes that are not positive, or an unknown kind of attention or step; all faults in one message.

    Example:
      >>> config = ReluAttentionConfig(9, 4, 5, (AttentionStage(2, 3, 1, 1), AttentionStage(1, 2, 1, 1)))
      >>> config.layers, config.heads
      (3, (3, 3, 2))
    """

    vocab_size: int
    width: int
    max_positions: int
    stages: tuple[AttentionStage, ...]
    attention: Literal["relu", "hard"] = "relu"

    def __post_init__(self):
        faults = [f"{n}={getattr(self, n)}" for n in ("vocab_size", "width", "max_positions") if getattr(self, n) < 1]
        for i, stage in enumerate(self.stages):
            sizes = {n: getattr(stage, n) for n in ("layers", "heads", "head_dim", "value_dim")}
            sizes |= {f"steps[{k}].hidden": step.hidden for k, step in enumerate(stage.steps)}
            faults += [f"stages[{i}].{name}={size}" for name, size in sizes.items() if size < 1]
            kinds = {step.kind for step in stage.steps} - {"gated", "relu"}
            faults += [f"stages[{i}] with a step of kind {kind!r}" for kind in sorted(kinds)]
        if self.attention not in ("relu", "hard"):
            faults.append(f"attention={self.attention!r}")
        if faults:
            rule = "sizes must be positive, attention relu or hard, steps gated or relu"
            raise UserError(message("ReluAttentionConfig", rule, ", ".join(faults), "Correct these fields"))

    @property
    def layers(self) -> int:
        """Layers of all stages."""
        return sum(stage.layers for stage in self.stages)

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of each layer."""
        return tuple(stage.heads for stage in self.stages for _ in range(stage.layers))


class ReluAttentionStates(NamedTuple):
    """What the model computes, layer by layer."""

    hidden: Float[Array, "l b t d"]
    """The embeddings, then the states after each layer: one more than there are layers."""
    weights: tuple[Float[Array, "l b h t t"], ...]
    """Attention weights of each stage, from queries (rows) to keys."""


class ReluAttention(nn.Module):
    r"""Residual stack with weights $a_h(i,j) = \operatorname{ReLU}(x_i^\top Q_h K_h^\top x_j + b_h[j-i])$.

    A layer adds $\sum_{h,j} a_h(i,j)\, x_j V_h O_h$ to $x_i$. Hard attention gives weight 1 to the token of the highest
    score if that is positive, and attends to nothing otherwise. Embeddings are sums of token, position and type.
    Padding is no key and its embedding is 0.
    """

    config: ReluAttentionConfig

    @nn.compact
    def __call__(self, batch: TokenBatch) -> ReluAttentionStates:
        """Hidden states and attention weights of every layer."""
        mask = batch.attention_mask > 0
        hidden = _Embeddings(self.config, name="embeddings")(batch, mask)
        states, weights = [hidden[None]], []
        for i, stage in enumerate(self.config.stages):
            outputs = _Stage(self.config, stage, name=f"stage_{i}")(states[-1][-1], mask)
            states.append(outputs[0])
            weights.append(outputs[1])
        return ReluAttentionStates(jnp.concatenate(states), tuple(weights))


class _Embeddings(nn.Module):
    config: ReluAttentionConfig

    @nn.compact
    def __call__(self, batch: TokenBatch, mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        normal, d, length = nn.initializers.normal(), self.config.width, batch.input_ids.shape[-1]
        token = self.param("token", normal, (self.config.vocab_size, d))
        position = self.param("position", normal, (self.config.max_positions, d))
        token_type = self.param("token_type", normal, (2, d))
        # jnp.take gives NaN for an id outside the table, where plain indexing would give a wrong row.
        hidden = jnp.take(token, batch.input_ids, axis=0) + jnp.take(token_type, batch.token_type_ids, axis=0)
        hidden = hidden + position[None, :length]
        return jnp.where(mask[:, :, None], hidden, jnp.zeros_like(hidden))


class _Stage(nn.Module):
    config: ReluAttentionConfig
    stage: AttentionStage

    @nn.compact
    def __call__(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> tuple[Array, Array]:
        """States after each layer ``[l, b, t, d]`` and attention weights ``[l, b, h, t, t]``."""
        stage, d = self.stage, self.config.width
        h, e, u = stage.heads, stage.head_dim, stage.value_dim
        shapes = {"query": (h, d, e), "key": (h, d, e), "value": (h, d, u), "output": (h, u, d)}
        normal = nn.initializers.normal(d**-0.5)
        projections = {name: self.param(name, normal, shape) for name, shape in shapes.items()}
        offsets = 2 * self.config.max_positions - 1
        bias = self.param("offset_bias", nn.initializers.zeros, (stage.layers, h, offsets))
        steps = [self._step_parameters(i, step) for i, step in enumerate(stage.steps)]
        t = hidden.shape[1]
        offset = jnp.arange(t)[None, :] - jnp.arange(t)[:, None] + self.config.max_positions - 1

        def layer(x: Array, layer_bias: Array) -> tuple[Array, tuple[Array, Array]]:
            scores = jnp.einsum("bthe,buhe->bhtu", *(self._project(x, projections[n]) for n in ("query", "key")))
            weights = _weights(scores + layer_bias[:, offset][None], mask, self.config.attention)
            mixed = jnp.einsum("bhtu,buhv->bthv", weights, self._project(x, projections["value"]))
            x = x + jnp.einsum("bthv,hvd->btd", mixed, projections["output"])
            for step, kernels in zip(stage.steps, steps, strict=True):
                x = _feed_forward(x, step, kernels)
            return x, (x, weights)

        return jax.lax.scan(layer, hidden, bias)[1]

    @staticmethod
    def _project(x: Array, kernel: Array) -> Array:
        return jnp.einsum("btd,hde->bthe", x, kernel)

    def _step_parameters(self, i: int, step: FeedForward) -> dict[str, Any]:
        normal, d = nn.initializers.normal(self.config.width**-0.5), self.config.width
        parameters = {"up": self.param(f"step_{i}_up", normal, (d, step.hidden))}
        if step.kind == "gated":
            parameters["gate"] = self.param(f"step_{i}_gate", normal, (d, step.hidden))
        else:
            parameters["bias"] = self.param(f"step_{i}_bias", nn.initializers.zeros, (step.hidden,))
        return parameters | {"down": self.param(f"step_{i}_down", normal, (step.hidden, d))}


def _weights(scores: Array, mask: Array, attention: str) -> Array:
    scores = jnp.where(mask[:, None, None, :], scores, jnp.zeros_like(scores))
    if attention == "relu":
        return jax.nn.relu(scores)
    chosen = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=scores.dtype)
    return jnp.where(scores > 0, chosen, jnp.zeros_like(chosen))


def _feed_forward(x: Array, step: FeedForward, kernels: dict[str, Any]) -> Array:
    up = x @ kernels["up"]
    hidden = up * (x @ kernels["gate"]) if step.kind == "gated" else jax.nn.relu(up + kernels["bias"][None, None])
    return x + hidden @ kernels["down"]


def make_relu_attention(
    config: ReluAttentionConfig,
) -> tuple[Callable[[Array], Params], Callable[[Params, TokenBatch], ReluAttentionStates]]:
    """The model as two pure functions.

    Args:
      config: Sizes. A model reads sentences of up to ``config.max_positions`` tokens; types are 0 and 1.

    Returns:
      ``init(key) -> params``, random, and ``f(params, batch)``, the states of all layers.

    Raises:
      UserError: By ``f``: a batch longer than the position table.

    Example:
      >>> init, f = make_relu_attention(ReluAttentionConfig(9, 4, 5, (AttentionStage(2, 3, 1, 1),)))
      >>> ids = jnp.ones((1, 5), jnp.int32)
      >>> states = f(init(jax.random.key(0)), TokenBatch(ids, ids, 0 * ids, ids[:, 0]))
      >>> states.hidden.shape, states.weights[0].shape
      ((3, 1, 5, 4), (2, 1, 3, 5, 5))
    """
    module = ReluAttention(config)

    def f(params: Params, batch: TokenBatch) -> ReluAttentionStates:
        tokens = batch.input_ids.shape[-1]
        rule = f"a batch may have at most {config.max_positions} positions"
        require(tokens <= config.max_positions, "relu_attention", rule, tokens, "Make a model with more max_positions")
        return cast(ReluAttentionStates, module.apply({"params": params}, batch))

    def init(key: Array) -> Params:
        ids = jnp.zeros((1, 1), jnp.int32)
        return jax.jit(module.init)(key, TokenBatch(ids, ids + 1, ids, ids[0]))["params"]

    return init, f
