"""Peers of the preference benchmark: each returns what is to be timed."""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.types import Params
from jaxft.nn.decoder import DecoderConfig
from tests.benchmarks.preferences_problems import Pair, draw_params
from tests.benchmarks.routes import Run

__all__ = [
    "THREADS",
    "ches_batched",
    "ches_one_by_one",
    "dpo",
    "exact_ches",
    "generate",
    "logits",
    "plain_jax_gram",
    "preference_gram",
    "torch_model",
    "word_rates",
]

THREADS = 2


def torch_model(config: DecoderConfig, *, attention: str = "sdpa", dtype: str = "float32") -> Any:
    """The model of transformers with the weights of the row."""
    import torch

    from tests.benchmarks.torch_decoders import torch_decoder

    torch.set_num_threads(THREADS)
    return torch_decoder(config, draw_params(config), attention=attention, dtype=dtype)


def ches_one_by_one(config: DecoderConfig, pairs: list[Pair]) -> Run:
    """As the code of arXiv 2410.08847 does it."""
    from tests.benchmarks import torch_preferences as peer

    model = torch_model(config)
    return lambda: peer.ches_one_by_one(model, pairs).numpy()


def ches_batched(config: DecoderConfig, pairs: list[Pair], *, batch: int) -> Run:
    """Batches without logits; neighbours in length go together, as a careful user would have it."""
    from tests.benchmarks import torch_preferences as peer

    model = torch_model(config)
    order = np.argsort([len(p) + max(len(c), len(r)) for p, c, r in pairs], kind="stable")

    def run() -> np.ndarray:
        found = np.empty(len(pairs), np.float32)
        found[order] = peer.ches_batched(model, [pairs[i] for i in order], batch=batch).numpy()
        return found

    return run


def exact_ches(config: DecoderConfig, pairs: list[Pair]) -> Run:
    """Two gradients of the unembedding a pair, by hand from its states: the passes are those of one pair at a time."""
    from tests.benchmarks import torch_gradients as peer

    model = torch_model(config)
    return lambda: peer.exact_ches(model, pairs).numpy()


def preference_gram(config: DecoderConfig, pairs: list[Pair]) -> Run:
    """Two gradients a pair, and their inner products."""
    from tests.benchmarks import torch_gradients as peer

    model = torch_model(config)
    return lambda: peer.preference_gram(model, pairs).numpy()


def word_rates(config: DecoderConfig, pair: Pair, words: list[int] | None = None) -> Run:
    """The gradient of a step of DPO at the reference, and its inner products with those of words.

    Without words a forward derivative, for all of them.
    """
    from tests.benchmarks import torch_gradients as peer

    model = torch_model(config, attention="sdpa" if words else "eager")
    if words is None:
        return lambda: peer.word_rates_forward(model, pair, slope=-0.05).numpy()
    return lambda: peer.word_rates(model, pair, words, slope=-0.05).numpy()


def logits(config: DecoderConfig, ids: np.ndarray, *, attention: str = "sdpa") -> Run:
    """Of every token."""
    import torch

    model, rows = torch_model(config, attention=attention), torch.tensor(ids).long()

    @torch.inference_mode()
    def run() -> np.ndarray:
        return model(input_ids=rows, use_cache=False).logits.numpy()

    return run


def generate(config: DecoderConfig, ids: np.ndarray, *, new: int) -> Run:
    """Greedy, with its cache; no token ends a text."""
    import torch

    model, rows = torch_model(config), torch.tensor(ids).long()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}

    @torch.inference_mode()
    def run() -> np.ndarray:
        return model.generate(rows, attention_mask=torch.ones_like(rows), **options).numpy()[:, ids.shape[1] :]

    return run


def dpo(kind: str, config: DecoderConfig, pairs: list[Pair], **options: Any) -> tuple[Run, Any]:
    """A step of DPO, by hand or of TRL; and a function that returns the weights by their names."""
    from tests.benchmarks import torch_preferences as peer

    model = torch_model(config)
    if kind == "trl":
        step, _ = peer.trl_dpo(model, pairs, tempfile.mkdtemp(), **options)
    else:
        step, _ = peer.plain_dpo(model, pairs, **options)
    table, head = model.get_output_embeddings().weight, "lm_head.weight"

    def weights() -> dict[str, np.ndarray]:
        found = {name: leaf.detach().numpy() for name, leaf in model.named_parameters() if leaf is not table}
        return found | {head: table.detach().numpy()}

    return step, weights


def plain_jax_gram(f: Any, params: Params, batch: Any) -> Run:
    """Dense gradients of every response, by ``vmap`` of ``jacrev``, one pair after another."""

    @jax.jit
    def gram(p: Params, b: Any) -> jax.Array:
        def of_one(one: Any) -> jax.Array:
            jacobian = jax.jacrev(lambda p: f(p, jax.tree.map(lambda leaf: leaf[None], one))[0])(p)
            flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)]
            return jnp.stack([jnp.matmul(leaf, leaf.T, precision="highest") for leaf in flat]).sum(0)

        return jax.lax.map(of_one, b)

    return lambda: gram(params, batch)
