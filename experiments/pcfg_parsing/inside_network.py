"""What is inside a network: probes of its states and correlations of its attention, in one pass over the sentences."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.pcfg_parsing.attention import attention_records
from experiments.pcfg_parsing.config import PcfgParsingConfig
from experiments.pcfg_parsing.examples import ParsedSentences
from experiments.pcfg_parsing.prepare import Prepared
from experiments.pcfg_parsing.probing import probe_records
from jaxft.core.types import Params
from jaxft.data.pcfg_corpus import CorpusLayout, encode_corpus
from jaxft.evaluation.span_probes import span_index
from jaxft.nn import EncoderConfig
from jaxft.nn.capture import LayerOutputs, make_layer_outputs

READ_AT_ONCE = 64
"""Sentences a pass."""


def network_records(
    encoder: EncoderConfig, params: Params, prepared: Prepared, config: PcfgParsingConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, np.ndarray]]:
    """Probes and attention of one network.

    Args:
      encoder: The network.
      params: Its parameters, trained or not.
      prepared: Sentences and what probes are asked.
      config: Settings.

    Returns:
      A record a probe and layer, a record a head, and the marginals that the probes of each kind and layer predict
      for the test sentences, ``<kind>`` of shape ``[l, n]``.
    """
    train, _ = layer_states(encoder, params, prepared.train, prepared.layout)
    test, attention = layer_states(encoder, params, prepared.test, prepared.layout)
    states = {"train": train, "test": test}
    probes, predicted = [], {kind: [] for kind in config.probing.kinds}
    for record, found in probe_records(states, prepared.tasks, prepared.test, config.probing, seed=config.seed):
        probes.append(record)
        if record["target"] == "marginal":
            predicted[record["probe"]].append(found.astype(np.float32))
    index = span_index(prepared.test.lengths)
    heads = attention_records(attention, prepared.test.marginals, index, seed=config.seed)
    return probes, heads, {kind: np.stack(values) for kind, values in predicted.items()}


def layer_states(
    encoder: EncoderConfig, params: Params, sentences: ParsedSentences, layout: CorpusLayout
) -> tuple[np.ndarray, np.ndarray]:
    """States ``[l + 1, b, t, d]`` and attention ``[l, b, h, t, t]`` of the words, nothing being hidden.

    The boundaries are cut off, so that the weights of a word need not sum to 1.
    """
    read = _reader(encoder)
    n, t = sentences.tokens.shape
    size = READ_AT_ONCE
    hidden, attention = [], []
    for first in range(0, n, size):
        rows = np.minimum(np.arange(first, first + size), n - 1)
        out = read(params, encode_corpus(sentences.tokens[rows], sentences.lengths[rows], layout))
        words = slice(layout.boundaries, layout.boundaries + t)
        hidden.append(np.asarray(out.hidden[:, :, words]))
        attention.append(np.asarray(out.attention[:, :, :, words, words]))
    return np.concatenate(hidden, axis=1)[:, :n], np.concatenate(attention, axis=1)[:, :n]


@functools.cache
def _reader(encoder: EncoderConfig) -> Callable[..., LayerOutputs]:
    """Compiled once for all networks of a model."""
    return jax.jit(make_layer_outputs(encoder))
