"""Output functions ``f(params, batch)`` of an encoder: logits of words, prompts and classes, and features.

Each builder returns a pure function, each row of whose output depends on its example alone, and which hands over the
factors of its gradients (``jaxft.core.factors``). Dropout is off unless the function is given ``dropout_key``.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import UserError, is_concrete, message, require
from jaxft.core.types import Params, TokenBatch
from jaxft.nn.factored import factored
from jaxft.nn.tape import Tape
from jaxft.nn.transformer import Encoder, EncoderConfig, MLMHead

Pooling = Literal["first", "mean"]
BatchFn = Callable[..., Array]
"""``f(params, batch, *, dropout_key=None)``."""


def make_mlm_logits(config: EncoderConfig) -> BatchFn:
    """Logits of the whole vocabulary at every token.

    Args:
      config: The encoder; ``params`` must hold ``encoder`` and ``mlm``.

    Returns:
      ``f(params, batch)`` of shape ``[b, t, v]``.

    Raises:
      UserError: From the closure: a head is missing, or the batch does not fit the model.

    Example:
      >>> import jax
      >>> from jaxft.nn.transformer import init_encoder
      >>> config = EncoderConfig("bert", 9, 4, 1, 2, 8, 5, 2, 1e-12, pad_id=0)
      >>> params = init_encoder(config, key=jax.random.key(0), mlm=True)
      >>> ids = jnp.array([[1, 2, 3]])
      >>> make_mlm_logits(config)(params, TokenBatch(ids, ids * 0 + 1, ids * 0, jnp.array([1]))).shape
      (1, 3, 9)
    """
    where = "make_mlm_logits"

    def f(params: Params, batch: TokenBatch, tape: Tape, *, dropout_key: Array | None = None) -> Float[Array, "b t v"]:
        hidden = _hidden(where, config, params, batch, tape, dropout_key, head="mlm")
        return _word_logits(config, params, hidden, tape)

    return factored(f)


def make_prompt_logits(config: EncoderConfig, label_ids: Sequence[int]) -> BatchFn:
    """Logits of the label words at the mask token of a prompt, through the masked-word head.

    Equal to ``make_mlm_logits`` gathered at ``mask_position`` and ``label_ids``, at the cost of c decoder rows.

    Args:
      config: The encoder; ``params`` must hold ``encoder`` and ``mlm``.
      label_ids: Token id of the label word of each class.

    Returns:
      ``f(params, batch)`` of shape ``[b, c]``.

    Raises:
      UserError: ``label_ids`` is empty, repeats an id, or leaves the vocabulary; from the closure as
        ``make_mlm_logits``.

    Reference:
      Gao et al. 2021, arXiv 2012.15723, section 3.
    """
    where = "make_prompt_logits"
    labels = _labels(where, config, label_ids)

    def f(params: Params, batch: TokenBatch, tape: Tape, *, dropout_key: Array | None = None) -> Float[Array, "b c"]:
        hidden = _at_mask(_hidden(where, config, params, batch, tape, dropout_key, head="mlm"), batch)
        return _word_logits(config, params, hidden, tape, jnp.asarray(labels))

    return factored(f)


def make_tied_logits(config: EncoderConfig, label_ids: Sequence[int]) -> BatchFn:
    """Inner products of the hidden state at the mask token with the label words' embeddings.

    For checkpoints that come without a masked-word head; there is no head and no bias.

    Args:
      config: The encoder; ``params`` must hold ``encoder``.
      label_ids: Token id of the label word of each class.

    Returns:
      ``f(params, batch)`` of shape ``[b, c]``.

    Raises:
      UserError: As ``make_prompt_logits``.
    """
    where = "make_tied_logits"
    labels = _labels(where, config, label_ids)

    def f(params: Params, batch: TokenBatch, tape: Tape, *, dropout_key: Array | None = None) -> Float[Array, "b c"]:
        hidden = _at_mask(_hidden(where, config, params, batch, tape, dropout_key), batch)
        return hidden @ tape.rows(params["encoder"]["embeddings"]["token"], labels).T

    return factored(f)


def make_features(config: EncoderConfig, *, pooling: Pooling = "first") -> BatchFn:
    """One vector a sequence: the last hidden state at the first token, or its mean over the unpadded tokens.

    Args:
      config: The encoder; ``params`` must hold ``encoder``.
      pooling: ``"first"`` or ``"mean"``.

    Returns:
      ``f(params, batch)`` of shape ``[b, d]``.

    Raises:
      UserError: Unknown ``pooling``. From the closure: the batch does not fit the model.
    """
    where = "make_features"
    _check_pooling(where, pooling)

    def f(params: Params, batch: TokenBatch, tape: Tape, *, dropout_key: Array | None = None) -> Float[Array, "b d"]:
        return _pool(_hidden(where, config, params, batch, tape, dropout_key), batch, pooling)

    return factored(f)


def make_class_logits(config: EncoderConfig, *, pooling: Pooling = "first") -> BatchFn:
    """Linear classifier on pooled features: ``features @ kernel + bias``, with no pooler layer between.

    Args:
      config: The encoder; ``params`` must hold ``encoder`` and ``classifier``.
      pooling: ``"first"`` or ``"mean"``.

    Returns:
      ``f(params, batch)`` of shape ``[b, c]``.

    Raises:
      UserError: As ``make_features``; from the closure: there is no classifier.
    """
    where = "make_class_logits"
    _check_pooling(where, pooling)

    def f(params: Params, batch: TokenBatch, tape: Tape, *, dropout_key: Array | None = None) -> Float[Array, "b c"]:
        hidden = _hidden(where, config, params, batch, tape, dropout_key, head="classifier")
        head = params["classifier"]
        return tape.dense(_pool(hidden, batch, pooling), head["kernel"]) + head["bias"][None]

    return factored(f)


HEAD_SOURCES = {
    "mlm": "Load a checkpoint with mlm='require', or use make_tied_logits",
    "classifier": "Add params['classifier'] = init_classifier(width, classes, key=key)",
}


def _hidden(
    where: str,
    config: EncoderConfig,
    params: Params,
    batch: TokenBatch,
    tape: Tape,
    dropout_key: Array | None,
    head: str = "",
) -> Float[Array, "b t d"]:
    if head:
        require(head in params, where, f"params must hold '{head}'", f"only {sorted(params)}", HEAD_SOURCES[head])
    _check_batch(where, config, batch)
    rngs, off = None if dropout_key is None else {"dropout": dropout_key}, dropout_key is None
    return tape.apply(Encoder(config), params["encoder"], batch, at="encoder", deterministic=off, rngs=rngs)


def _word_logits(
    config: EncoderConfig, params: Params, hidden: Array, tape: Tape, label_ids: Array | None = None
) -> Array:
    table = params["encoder"]["embeddings"]["token"]
    return tape.apply(MLMHead(config), params["mlm"], hidden, table, at="mlm", label_ids=label_ids)


def _pool(hidden: Float[Array, "b t d"], batch: TokenBatch, pooling: Pooling) -> Float[Array, "b d"]:
    if pooling == "first":
        return hidden[:, 0]
    weights = (batch.attention_mask > 0).astype(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


def _at_mask(hidden: Float[Array, "b t d"], batch: TokenBatch) -> Float[Array, "b d"]:
    return hidden[jnp.arange(hidden.shape[0]), batch.mask_position]


def _labels(where: str, config: EncoderConfig, label_ids: Sequence[int]) -> np.ndarray:
    ids = [int(i) for i in label_ids]
    inside = all(0 <= i < config.vocab_size for i in ids)
    rule = f"label_ids must be one or more distinct ids in [0, {config.vocab_size})"
    require(bool(ids) and inside and len(set(ids)) == len(ids), where, rule, ids, "Pass one label word a class")
    return np.asarray(ids)


def _check_pooling(where: str, pooling: str) -> None:
    require(pooling in ("first", "mean"), where, "pooling must be 'first' or 'mean'", repr(pooling), "Pass one of them")


def _check_batch(where: str, config: EncoderConfig, batch: TokenBatch) -> None:
    rule, advice = "a batch must be a jaxft.core.types.TokenBatch", f"Pass TokenBatch({', '.join(TokenBatch._fields)})"
    require(isinstance(batch, TokenBatch), where, rule, type(batch).__name__, advice)
    shapes = [np.shape(x) for x in batch]
    b, t = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    rule = "a batch must be input_ids, attention_mask, token_type_ids [b, t] and mask_position [b], b and t positive"
    fits = bool(b and t) and shapes == [(b, t)] * 3 + [(b,)]
    require(fits, where, rule, f"shapes {shapes}", "Give a single example a leading axis of 1")
    longest = config.max_tokens
    require(
        t <= longest, where, f"a sentence must fit the model's {longest} tokens", f"{t} tokens", "Truncate the batch"
    )
    if not is_concrete(batch):
        return
    limits = {"input_ids": config.vocab_size, "token_type_ids": config.type_vocab_size, "mask_position": t}
    # Concrete even where the parameters are traced.
    ranges = {
        name: (int(np.min(np.asarray(x))), int(np.max(np.asarray(x))))
        for name, x in batch._asdict().items()
        if name in limits
    }
    faults = [
        f"{name} from {low} to {high}, not in [0, {limits[name]})"
        for name, (low, high) in ranges.items()
        if low < 0 or high >= limits[name]
    ]
    if faults:
        rule = "ids must lie in the tables of the model"
        raise UserError(message(where, rule, "; ".join(faults), "Use the tokenizer of this checkpoint"))
