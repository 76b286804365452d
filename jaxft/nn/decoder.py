"""Decoders of five families, GPT-2, GPT-NeoX, Llama, OLMo and OLMo-2, as Linen modules over stacked layer parameters.

The parameter tree is ``{"decoder": ..., "unembedding": {"table": [v, d]}}``, the second where the token table is not
also the unembedding. The leaves of ``decoder/layers`` carry a leading layer axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.checks import UserError, message, nearest
from jaxft.core.precision import accumulator
from jaxft.core.types import CausalTokens, Params
from jaxft.nn.rope import RopeScaling, rope_frequencies, rope_turns, turned
from jaxft.nn.tape import TAP_AXES, tape_of

Family = Literal["gpt2", "gpt_neox", "llama", "olmo", "olmo2"]
Activation = Literal["gelu", "gelu_tanh", "silu"]

_BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**_BIASES, "activation": "gelu_tanh", "tied": True},
    "gpt_neox": {**_BIASES, "activation": "gelu", "rope_frac": 0.25, "parallel_residual": True},
    "llama": {"norm_eps": 1e-6},
    "olmo": {},
    "olmo2": {},
}
"""What the published models of a family have in common, where it is not the default of a ``DecoderConfig``."""
GATED = ("llama", "olmo", "olmo2")
"""Families whose MLP is a product of two branches."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
}
_ATTENTIONS = ("plain", "cudnn")
_DTYPES = (None, "bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder; ``decoder_config`` fills in what a family has in common.

    The family decides where norms stand and of what kind they are, whether positions are learned (GPT-2) or rotary,
    and whether the MLP is gated; all else is a field.

    Raises:
      UserError: A size that is not positive, sizes that do not divide, an unknown name; all faults in one message.

    Example:
      >>> DecoderConfig("llama", 32000, 64, 2, 4, 2, 16, 128, 256).kv_heads
      2
    """

    family: Family
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values, each shared by ``heads / kv_heads`` heads of queries."""
    head_width: int
    mlp_width: int
    max_positions: int
    """Longest text: rows of the position table, or for rotary positions what the model was made for, not enforced."""
    norm_eps: float = 1e-5
    tied: bool = False
    """Whether the token table is also the unembedding."""
    rope_theta: float = 10000.0
    rope_frac: float = 1.0
    """Share of every head, from its start, that is turned."""
    rope_scaling: RopeScaling | None = None
    activation: Activation = "silu"
    parallel_residual: bool = False
    """Whether the MLP reads what attention reads, rather than what attention left (GPT-NeoX)."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float | None = None
    """Largest magnitude of queries, keys and values, before they are turned."""
    scan_layers: bool = False
    """Compile one layer and loop over it, rather than all: less to compile, slower on CPU."""
    remat: bool = False
    """Compute every layer again on the way back, to keep in memory its input alone."""
    init_scale: float = 0.02
    """Deviation of random kernels and tables; a narrow model trains faster from about 1 / sqrt(width)."""
    attention: Literal["plain", "cudnn"] = "plain"
    """``cudnn`` holds no scores: on NVIDIA GPUs, in bfloat16 or float16, without forward derivatives (``jax.jvp``)."""
    dtype: str | None = None
    """In which to compute; ``None`` is that of the parameters. Norms, softmax and logits are float32 at least."""

    def __post_init__(self):
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        positive = (*sizes, "norm_eps", "rope_theta", "init_scale")
        faults = [f"{name}={getattr(self, name)}" for name in positive if not getattr(self, name) > 0]
        known = {"family": FAMILIES, "activation": _ACTIVATIONS, "attention": _ATTENTIONS, "dtype": _DTYPES}
        faults += [
            f"{name}={getattr(self, name)!r}" for name, those in known.items() if getattr(self, name) not in those
        ]
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            faults.append(f"heads={self.heads} with kv_heads={self.kv_heads}")
        if self.family != "gpt2" and (not 0 < self.rope_frac <= 1 or not self.rope_width or self.rope_width % 2):
            faults.append(f"rope_frac={self.rope_frac} with head_width={self.head_width}")
        if self.family == "gpt2" and self.rope_scaling is not None:
            faults.append("rope_scaling with learned positions")
        if self.parallel_residual and self.family != "gpt_neox":
            faults.append(f"parallel_residual with family={self.family!r}")
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            faults.append(f"clip_qkv={self.clip_qkv}")
        if faults:
            rule = (
                f"family must be one of {', '.join(FAMILIES)}, activation one of {', '.join(_ACTIVATIONS)}, "
                f"attention one of {', '.join(_ATTENTIONS)}, numbers "
                "positive, kv_heads divide heads, the rotary part of a head even, parallel_residual GPT-NeoX's alone"
            )
            raise UserError(message("DecoderConfig", rule, ", ".join(faults), "Correct these fields"))

    @property
    def rope_width(self) -> int:
        """Coordinates of a head that are turned."""
        return int(self.head_width * self.rope_frac)


def decoder_config(
    family: Family,
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
    max_positions: int,
    **fields: Any,
) -> DecoderConfig:
    """A config with what the published models of a family have in common, and otherwise the defaults.

    Args:
      family: Of the decoder.
      vocab_size: Tokens.
      width: Of the hidden states.
      layers: Number of them.
      heads: Of queries; of keys and values as many, unless ``kv_heads`` says otherwise.
      mlp_width: Of the MLP's inside.
      max_positions: Longest text.
      **fields: Any other field of ``DecoderConfig``; ``head_width`` is else ``width // heads``.

    Returns:
      The config.

    Raises:
      UserError: An unknown field, a width that the heads do not divide; or as ``DecoderConfig``.

    Example:
      >>> decoder_config("gpt2", vocab_size=9, width=8, layers=1, heads=2, mlp_width=16, max_positions=8).activation
      'gelu_tanh'
    """
    where, known = "decoder_config", {field.name for field in dataclasses.fields(DecoderConfig)}
    unknown = [name for name in fields if name not in known]
    if unknown:
        hint = nearest(unknown[0], known)
        raise UserError(message(where, "fields must be those of a DecoderConfig", ", ".join(unknown), hint))
    if "head_width" not in fields and (heads < 1 or width % heads):
        rule = "heads must divide width where head_width is left out"
        raise UserError(message(where, rule, f"heads={heads} with width={width}", "Pass head_width"))
    heads_of = {"kv_heads": heads, "head_width": width // max(heads, 1)}
    merged = {**heads_of, **FAMILIES.get(family, {}), **fields}
    return DecoderConfig(
        family,
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=mlp_width,
        max_positions=max_positions,
        **merged,
    )


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, T columns of them; a column of segment 0 is empty."""

    key: Float[Array, "l b T g e"]
    value: Float[Array, "l b T g e"]
    segment_ids: Int[Array, "b T"]


class Decoder(nn.Module):
    """Causal transformer: tokens to hidden states after the final norm, those that the unembedding multiplies.

    Token i attends to token j where j <= i, j is no padding, and j is in the trunk or in the segment of i. States at
    padding are finite and have no meaning.

    Reference:
      GPT-2: Radford et al. 2019; GPT-NeoX: Black et al. 2022, arXiv 2204.06745; Llama: Touvron et al. 2023, arXiv
      2302.13971; OLMo: Groeneveld et al. 2024, arXiv 2402.00838; OLMo-2: arXiv 2501.00656.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: CausalTokens) -> Float[Array, "b t d"]:
        """Hidden states."""
        return _states(self.config, tokens, None, keep=False)[0]


class CachedDecoder(nn.Module):
    """``Decoder`` for tokens that follow those of a cache, with the same parameters."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, tokens: CausalTokens, cache: KeyValueCache | None
    ) -> tuple[Float[Array, "b t d"], KeyValueCache]:
        """Hidden states of the tokens, and their own keys and values, not those of the cache."""
        hidden, (key, value) = _states(self.config, tokens, cache, keep=True)
        return hidden, KeyValueCache(key, value, tokens.segment_ids)


def _states(config: DecoderConfig, tokens: CausalTokens, cache: KeyValueCache | None, *, keep: bool) -> tuple:
    hidden = _Embeddings(config, name="embeddings")(tokens)
    turns = None
    if config.family != "gpt2":
        frequencies = rope_frequencies(config.rope_width, theta=config.rope_theta, scaling=config.rope_scaling)
        turns = rope_turns(tokens.positions, frequencies, hidden.dtype)
    segments = tokens.segment_ids
    t = segments.shape[-1]
    mask = _sees(segments, segments) & jnp.tri(t, dtype=bool)[None]
    before = None
    if cache is not None:
        mask = jnp.concatenate([_sees(segments, cache.segment_ids), mask], axis=-1)
        before = (cache.key, cache.value)
    layer = nn.remat(_Layer, prevent_cse=not config.scan_layers) if config.remat else _Layer
    stack = nn.scan(
        layer,
        variable_axes={"params": 0, **TAP_AXES},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (flax types them as integers)
        length=config.layers,
        unroll=1 if config.scan_layers else config.layers,
    )
    hidden, kept = stack(config, keep, name="layers")(hidden, mask, turns, before)
    return _norm(config, "final_norm")(hidden), kept


def _sees(queries: Int[Array, "b t"], keys: Int[Array, "b u"]) -> Bool[Array, "b t u"]:
    """Whether the segments let a query see a key."""
    query, key = queries[:, :, None], keys[:, None, :]
    return (key != 0) & ((key == 1) | (key == query))


class _Embeddings(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: CausalTokens) -> Float[Array, "b t d"]:
        config = self.config
        normal, rows = nn.initializers.normal(config.init_scale), tape_of(self).rows
        table = self.param("token", normal, (config.vocab_size, config.width))
        hidden = rows(table, tokens.input_ids)
        if config.family == "gpt2":
            table = self.param("position", normal, (config.max_positions, config.width))
            hidden = hidden + rows(table, tokens.positions)
        return hidden.astype(config.dtype or hidden.dtype)


class _Layer(nn.Module):
    config: DecoderConfig
    keep: bool

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "b t d"],
        mask: Bool[Array, "b t u"],
        turns: tuple[Array, Array] | None,
        cache: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array] | None]:
        config = self.config
        attention = _Attention(config, name="attention")
        attention_norm, mlp = _norm(config, "attention_norm"), _MLP(config, name="mlp")
        mlp_norm = _norm(config, "mlp_norm")
        if config.family == "olmo2":
            attended, kept = attention(hidden, mask, turns, cache)
            hidden = hidden + attention_norm(attended)
            hidden = hidden + mlp_norm(mlp(hidden))
        else:
            attended, kept = attention(attention_norm(hidden), mask, turns, cache)
            if config.parallel_residual:
                hidden = hidden + attended + mlp(mlp_norm(hidden))
            else:
                hidden = hidden + attended
                hidden = hidden + mlp(mlp_norm(hidden))
        return hidden, kept if self.keep else None


class _Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t u"],
        turns: tuple[Array, Array] | None,
        cache: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array]]:
        config = self.config
        b, t, _ = x.shape

        def projected(name, heads):
            out = _dense(config, heads * config.head_width, name, bias=config.qkv_bias)(x)
            if config.family == "olmo2" and name != "value":
                out = _RMSNorm(config.norm_eps, name=f"{name}_norm")(out)
            if config.clip_qkv is not None:
                out = jnp.clip(out, -config.clip_qkv, config.clip_qkv)
            out = out.reshape(b, t, heads, config.head_width)
            return turned(out, *turns) if turns is not None and name != "value" else out

        query = projected("query", config.heads)
        key, value = (projected(name, config.kv_heads) for name in ("key", "value"))
        kept = (key, value)
        if cache is not None:
            key, value = (jnp.concatenate(pair, axis=1) for pair in zip(cache, kept, strict=True))
        if config.attention == "cudnn":
            mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="cudnn")
        else:
            mixed = _attended(query, key, value, mask)
        mixed = mixed.reshape(b, t, config.heads * config.head_width)
        return _dense(config, config.width, "output", bias=config.output_bias)(mixed), kept


def _attended(
    query: Float[Array, "b t h e"],
    key: Float[Array, "b u g e"],
    value: Float[Array, "b u g e"],
    mask: Bool[Array, "b t u"],
) -> Float[Array, "b t h e"]:
    """Values mixed with the softmax of the scores, which is taken in float32 at least."""
    b, t, h, e = query.shape
    g = key.shape[2]
    # Heads that share a key stand together, so that keys and values are not repeated; heads come before tokens, and the
    # softmax is divided after the product with the values: on CPU both ways take half the time.
    query = query.reshape(b, t, g, h // g, e).transpose(0, 2, 3, 1, 4).reshape(b, g, h // g * t, e)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    wide = accumulator(query.dtype)
    scores = e**-0.5 * jnp.einsum("bgqe,bgue->bgqu", query, key, preferred_element_type=wide)
    # A finite floor: a row that sees nothing gets uniform weights, and no gradient is NaN.
    scores = jnp.where(mask[:, None, None], scores.reshape(b, g, h // g, t, -1), jnp.finfo(wide).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = weights.reshape(b, g, h // g * t, -1)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("bgqu,bgue->bgqe", weights.astype(value.dtype), value, preferred_element_type=wide) / total
    return mixed.astype(value.dtype).reshape(b, g, h // g, t, e).transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


class _MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        config = self.config
        inside = _dense(config, config.mlp_width, "in", bias=config.mlp_bias)(x)
        if config.family in GATED:
            gate = _dense(config, config.mlp_width, "gate", bias=config.mlp_bias)(x)
            inside = _ACTIVATIONS[config.activation](gate) * inside
        else:
            inside = _ACTIVATIONS[config.activation](inside)
        return _dense(config, config.width, "out", bias=config.mlp_bias)(inside)


class _RMSNorm(nn.Module):
    """Divided by the root mean square, in float32 at least, and scaled."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(accumulator(x.dtype))
        size = jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + self.eps)
        return (wide * size * scale.astype(wide.dtype)[None, None]).astype(x.dtype)


def _dense(config: DecoderConfig, features: int, name: str, *, bias: bool) -> nn.Dense:
    normal = nn.initializers.normal(config.init_scale)
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, kernel_init=normal, name=name)


def _norm(config: DecoderConfig, name: str) -> nn.Module:
    if config.family in ("llama", "olmo2"):
        return _RMSNorm(config.norm_eps, name=name)
    # OLMo's has no parameters. The fast variance E[x^2] - E[x]^2 would cancel.
    own = config.family != "olmo"
    return nn.LayerNorm(
        config.norm_eps, dtype=config.dtype, use_scale=own, use_bias=own, use_fast_variance=False, name=name
    )


def init_decoder(config: DecoderConfig, *, key: Array) -> Params:
    """Random float32 parameters: kernels and tables normal of deviation ``config.init_scale``, biases 0, scales 1.

    Args:
      config: The decoder.
      key: Random key.

    Returns:
      ``{"decoder": ...}``, with ``"unembedding"`` where the token table is not also that.

    Example:
      >>> config = decoder_config("llama", vocab_size=9, width=8, layers=3, heads=2, mlp_width=16, max_positions=8)
      >>> params = init_decoder(config, key=jax.random.key(0))
      >>> params["decoder"]["layers"]["attention"]["query"]["kernel"].shape, params["unembedding"]["table"].shape
      ((3, 8, 8), (9, 8))
    """
    decoder_key, unembedding_key = jax.random.split(key)
    zeros = jnp.zeros((1, 1), jnp.int32)
    # Parameters do not depend on how attention is computed, which may not be possible in float32 or on this device.
    decoder = Decoder(dataclasses.replace(config, attention="plain"))
    params = {"decoder": jax.jit(decoder.init)(decoder_key, CausalTokens(zeros, zeros + 1, zeros))["params"]}
    if not config.tied:
        table = config.init_scale * jax.random.normal(unembedding_key, (config.vocab_size, config.width))
        params["unembedding"] = {"table": table}
    return params


def unembedding_table(config: DecoderConfig, params: Params) -> Float[Array, "v d"]:
    """The matrix W whose products with a hidden state are the logits: a leaf of the parameters, shared or its own."""
    return params["decoder"]["embeddings"]["token"] if config.tied else params["unembedding"]["table"]
