"""BERT and RoBERTa encoders and their masked-word head, as Linen modules over stacked layer parameters.

The parameter tree is the same everywhere: ``{"encoder": ..., "mlm": ..., "classifier": ...}``, the last two where
they are needed. The leaves of ``encoder/layers`` carry a leading layer axis, so that work by layer is one batched call.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import UserError, message
from jaxft.core.types import Params, TokenBatch
from jaxft.nn.tape import TAP_AXES, tape_of


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of an encoder.

    Raises:
      UserError: A size that is not positive, or ``width`` not divisible by ``heads``; all faults in one message.

    Example:
      >>> EncoderConfig("roberta", 50265, 768, 12, 12, 3072, 514, 1, 1e-5, pad_id=1).max_tokens
      512
    """

    family: Literal["bert", "roberta"]
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_positions: int
    """Rows of the position table."""
    type_vocab_size: int
    norm_eps: float
    pad_id: int
    dropout_frac: float = 0.0
    """Dropout of embeddings, attention weights and both residual branches, where dropout is on."""
    scan_layers: bool = False
    """Compile one layer and loop over it, rather than all: less to compile, slower on CPU."""
    init_scale: float = 0.02
    """Deviation of random kernels and embeddings; a narrow model trains faster from about 1 / sqrt(width)."""

    def __post_init__(self):
        sizes = ("vocab_size", "width", "layers", "heads", "mlp_width", "max_positions", "type_vocab_size")
        faults = [f"{name}={getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if self.heads > 0 and self.width % self.heads:
            faults.append(f"width={self.width} with heads={self.heads}")
        if not 0 <= self.dropout_frac < 1:
            faults.append(f"dropout_frac={self.dropout_frac}")
        if self.family not in ("bert", "roberta"):
            faults.append(f"family={self.family!r}")
        elif not faults and self.max_tokens < 1:
            faults.append(f"max_positions={self.max_positions} with pad_id={self.pad_id}")
        if faults:
            rule = "family must be bert or roberta, sizes positive, heads divide width, 0 <= dropout_frac < 1"
            raise UserError(message("EncoderConfig", rule, ", ".join(faults), "Correct these fields"))

    @property
    def max_tokens(self) -> int:
        """Longest sequence: RoBERTa's positions start after ``pad_id``, BERT's at 0."""
        return self.max_positions - (self.pad_id + 1 if self.family == "roberta" else 0)


class Encoder(nn.Module):
    """Post-norm bidirectional transformer with learned positions: tokens to last hidden states.

    Positions are 0, 1, ... for BERT and ``cumsum(mask) * mask + pad_id`` for RoBERTa. Padding is masked as a key; rows
    of the output at padding have no meaning.

    Reference:
      Devlin et al. 2019, arXiv 1810.04805; Liu et al. 2019, arXiv 1907.11692.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch: TokenBatch, *, deterministic: bool = True) -> Float[Array, "b t d"]:
        """Hidden states of the last layer; with ``deterministic=False`` the stream ``dropout`` is drawn from."""
        config = self.config
        stack = nn.scan(
            _Layer,
            variable_axes={"params": 0, **TAP_AXES},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (flax types it as an integer alone)
            length=config.layers,
            unroll=1 if config.scan_layers else config.layers,
        )
        hidden = _Embeddings(config, deterministic, name="embeddings")(batch)
        hidden, _ = stack(config, deterministic, name="layers")(hidden, batch.attention_mask > 0)
        return hidden


class MLMHead(nn.Module):
    """Masked-word head: dense, gelu, norm, then the token table as decoder, and a bias.

    With ``label_ids`` only those rows of the decoder are multiplied out.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "*b d"],
        token_table: Float[Array, "v d"],
        *,
        label_ids: Int[Array, "c"] | None = None,
    ) -> Float[Array, "*b c"]:
        """Logits of every word, or of the words ``label_ids``."""
        bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))
        hidden = nn.gelu(_dense(self.config, self.config.width, "dense")(hidden), approximate=False)
        hidden = _norm(self.config, "norm")(hidden)
        if label_ids is None:
            logits = tape_of(self).transposed(hidden, token_table)
        else:
            logits, bias = hidden @ tape_of(self).rows(token_table, label_ids).T, bias[label_ids]
        return logits + bias.reshape((1,) * (hidden.ndim - 1) + (-1,))


class _Embeddings(nn.Module):
    config: EncoderConfig
    deterministic: bool

    @nn.compact
    def __call__(self, batch: TokenBatch) -> Float[Array, "b t d"]:
        config = self.config
        normal = nn.initializers.normal(config.init_scale)
        token = self.param("token", normal, (config.vocab_size, config.width))
        position = self.param("position", normal, (config.max_positions, config.width))
        token_type = self.param("token_type", normal, (config.type_vocab_size, config.width))
        if config.family == "roberta":
            mask = (batch.attention_mask > 0).astype(jnp.int32)
            positions = jnp.cumsum(mask, axis=-1) * mask + config.pad_id
        else:
            positions = jnp.broadcast_to(jnp.arange(batch.input_ids.shape[-1])[None], batch.input_ids.shape)
        rows = tape_of(self).rows
        hidden = rows(token, batch.input_ids) + rows(token_type, batch.token_type_ids)
        hidden = _norm(config, "norm")(hidden + rows(position, positions))
        return nn.Dropout(config.dropout_frac, deterministic=self.deterministic)(hidden)


class _Layer(nn.Module):
    config: EncoderConfig
    deterministic: bool

    @nn.compact
    def __call__(self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> tuple[Float[Array, "b t d"], None]:
        config = self.config
        dropout = nn.Dropout(config.dropout_frac, deterministic=self.deterministic)
        attended = _Attention(config, self.deterministic, name="attention")(hidden, mask)
        hidden = _norm(config, "attention_norm")(hidden + dropout(attended))
        expanded = _MLP(config, name="mlp")(hidden)
        return _norm(config, "mlp_norm")(hidden + dropout(expanded)), None


class _Attention(nn.Module):
    config: EncoderConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        heads = self.config.heads

        def split(name):
            return _dense(self.config, d, name)(x).reshape(b, t, heads, d // heads)

        query, key, value = split("query"), split("key"), split("value")
        scores = jnp.einsum("bthe,buhe->bhtu", query, key) / (d // heads) ** 0.5
        # A finite floor: a row of padding alone gets uniform weights, and no gradient is NaN.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        weights = nn.Dropout(self.config.dropout_frac, deterministic=self.deterministic)(weights)
        mixed = jnp.einsum("bhtu,buhe->bthe", weights, value).reshape(b, t, d)
        return _dense(self.config, d, "output")(mixed)


class _MLP(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = nn.gelu(_dense(self.config, self.config.mlp_width, "in")(x), approximate=False)
        return _dense(self.config, self.config.width, "out")(x)


def _dense(config: EncoderConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.normal(config.init_scale), name=name)


def _norm(config: EncoderConfig, name: str) -> nn.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels in float32, where eps is 1e-12.
    return nn.LayerNorm(epsilon=config.norm_eps, use_fast_variance=False, name=name)


def init_encoder(config: EncoderConfig, *, key: Array, mlm: bool = False) -> Params:
    """Random float32 parameters: kernels and embeddings normal of deviation ``config.init_scale``, biases 0, scales 1.

    Args:
      config: The encoder.
      key: Random key; the same key gives the same encoder with and without the head.
      mlm: Whether to add the masked-word head.

    Returns:
      ``{"encoder": ...}``, with ``"mlm"`` where asked for.

    Example:
      >>> config = EncoderConfig("bert", 9, 4, 3, 2, 8, 5, 2, 1e-12, pad_id=0)
      >>> params = init_encoder(config, key=jax.random.key(0), mlm=True)
      >>> params["encoder"]["layers"]["attention"]["query"]["kernel"].shape, params["mlm"]["bias"].shape
      ((3, 4, 4), (9,))
    """
    encoder_key, mlm_key = jax.random.split(key)
    ids = jnp.zeros((1, 1), jnp.int32)
    batch = TokenBatch(ids, ids + 1, ids, ids[0])
    params = {"encoder": jax.jit(Encoder(config).init)(encoder_key, batch)["params"]}
    if mlm:
        table = params["encoder"]["embeddings"]["token"]
        params["mlm"] = jax.jit(MLMHead(config).init)(mlm_key, table[:1], table)["params"]
    return params


def init_classifier(width: int, classes: int, *, key: Array, scale: float = 0.02) -> Params:
    """A random linear head: kernel normal with deviation ``scale``, bias 0.

    Args:
      width: Features.
      classes: Logits.
      key: Random key.
      scale: Deviation of the kernel.

    Returns:
      ``{"kernel": [d, c], "bias": [c]}``, to stand under ``"classifier"``.

    Example:
      >>> jax.tree.map(jnp.shape, init_classifier(8, 2, key=jax.random.key(0)))
      {'bias': (2,), 'kernel': (8, 2)}
    """
    return {"kernel": scale * jax.random.normal(key, (width, classes)), "bias": jnp.zeros(classes)}
