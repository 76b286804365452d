"""One small encoder of each family, all parameters random, and a padded batch for it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.types import TokenBatch
from jaxft.nn import EncoderConfig, init_classifier, init_encoder


class Small(NamedTuple):
    config: EncoderConfig
    params: dict
    batch: TokenBatch


CONFIGS = {
    "bert": EncoderConfig("bert", 23, 8, 2, 2, 12, 10, 2, 1e-12, pad_id=0, dropout_frac=0.2),
    "roberta": EncoderConfig("roberta", 23, 8, 2, 2, 12, 10, 1, 1e-5, pad_id=1, dropout_frac=0.2),
}
LENGTHS = np.array([6, 4, 1])


def make_small(family: str) -> Small:
    config = CONFIGS[family]
    draw = np.random.default_rng(0)
    params = init_encoder(config, key=jax.random.key(0), mlm=True)
    params["classifier"] = init_classifier(config.width, 3, key=jax.random.key(1))
    params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype), params)
    mask = (np.arange(6)[None] < LENGTHS[:, None]).astype(np.int32)
    ids = np.where(mask, draw.integers(3, config.vocab_size, size=(3, 6)), config.pad_id)
    types = draw.integers(config.type_vocab_size, size=(3, 6))
    arrays = (ids, mask, types, [2, 3, 0])
    return Small(config, params, TokenBatch(*(jnp.asarray(x, jnp.int32) for x in arrays)))


@pytest.fixture(scope="session", params=CONFIGS)
def small(request) -> Small:
    return make_small(request.param)


@pytest.fixture(scope="session")
def bert() -> Small:
    """For facts that do not touch what the families differ in."""
    return make_small("bert")


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Where the batch has tokens, ``[b, t]``."""
    return np.arange(6)[None] < LENGTHS[:, None]
