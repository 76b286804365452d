"""What a user of functions with taps is told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxft.core.types import TokenBatch
from jaxft.nn import EncoderConfig, init_encoder, make_features
from jaxft.nn.factored import linen_outputs
from jaxft.nn.token_outputs import make_token_log_probs

CONFIG = EncoderConfig("bert", 9, 4, 1, 2, 8, 5, 2, 1e-12, pad_id=0)
PARAMS = init_encoder(CONFIG, key=jax.random.key(0))
IDS = jnp.array([[1, 2, 3]])
BATCH = TokenBatch(IDS, IDS * 0 + 1, IDS * 0, jnp.array([1]))
DENSE, X = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, jnp.ones((1, 3))
LAYER = linen_outputs(nn.Dense(2))

CASES = {
    "a tap of another name": (
        lambda: LAYER.tapped(DENSE, X, {"Dense/dens.0": jnp.zeros((1, 2))}),
        r"linen_outputs: taps must be some .*, got \['Dense/dens.0'\]. Did you mean Dense/dense.0",
    ),
    "a tap where there is none": (
        lambda: make_features(CONFIG).tapped(PARAMS, BATCH, {"Dense/dense.0": jnp.zeros((1, 2))}),
        "make_features: taps must be some of those",
    ),
    "a tap of another shape": (
        lambda: LAYER.tapped(DENSE, X, {"Dense/dense.0": jnp.zeros((2, 2))}),
        r"a tap must have the shape of its output, got Dense/dense.0: \(2, 2\) for \(1, 2\)",
    ),
    "collections that change": (
        lambda: linen_outputs(nn.Dense(2), mutable=["batch_stats"])(DENSE, X),
        "Tape.apply: collections must be constant, got mutable. Leave the option out",
    ),
    "no head": (lambda: make_token_log_probs(CONFIG)(PARAMS, BATCH), "make_token_log_probs: params must hold 'mlm'"),
    "special tokens of another vocabulary": (
        lambda: make_token_log_probs(CONFIG, special_ids=[0, 9]),
        r"make_token_log_probs: special_ids must lie in \[0, 9\), got \(0, 9\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, words = CASES[case]
    with pytest.raises(ValueError, match=words):
        call()
