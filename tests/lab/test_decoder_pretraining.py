import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import CausalTokens
from jaxft.data.causal_tokenizer import load_causal_tokenizer
from jaxft.data.requests import request_vocabulary
from jaxft.lab.decoder_pretraining import DecoderPretrainingConfig, _following, pretrain_requests, request_checkpoint
from jaxft.nn.pretrained_decoders import load_decoder

TINY = DecoderPretrainingConfig(width=16, heads=2, layers=1, steps=60, conversations=300)


@pytest.fixture(scope="module")
def made():
    return pretrain_requests(TINY)


def test_training_beats_the_uniform_distribution_over_words(made):
    *_, losses = made
    assert losses.shape == (60,)
    assert losses[-10:].mean() < np.log(len(request_vocabulary())) - 1


def test_checkpoint_holds_what_was_trained_and_its_tokenizer(made):
    config, params, tokenizer, _ = made
    folder = request_checkpoint(TINY)
    loaded, read = load_decoder(folder), load_causal_tokenizer(folder)
    assert loaded.config.vocab_size == config.vocab_size == tokenizer.get_vocab_size()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    end, pad = (tokenizer.token_to_id(name) for name in ("<end>", "<pad>"))
    assert (read.eos_ids, read.pad_id, read.bos_ids) == ((end,), pad, ())
    assert request_checkpoint(TINY) == folder


def test_each_token_is_to_predict_the_next_one_of_its_text():
    segments = jnp.array([[1, 1, 1], [1, 1, 0]])
    tokens = CausalTokens(jnp.array([[5, 6, 7], [8, 9, 0]]), segments, segments)
    assert _following(tokens).tolist() == [[6, 7, -1], [9, -1, -1]]
