"""Pretrained decoders: a Hugging Face folder to parameters, and back.

Reading is strict: every tensor of the file is used exactly once or is a known constant, every leaf of the tree is
filled, shapes and values are checked, and what config.json asks for and the decoder does not compute is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.checks import path_name, require
from jaxft.core.types import Params
from jaxft.nn.checkpoint_files import (
    CONFIG,
    Pretrained,
    check_headers,
    check_params,
    file_tensors,
    leaf_shapes,
    read_headers,
    read_json,
    read_tree,
    require_new_folder,
    tokenizer_files,
    unequal_copies,
    write_folder,
)
from jaxft.nn.decoder import DecoderConfig, init_decoder
from jaxft.nn.decoder_fields import read_decoder_config, write_decoder_config
from jaxft.nn.decoder_names import (
    DECODERS,
    decoder_entries,
    decoder_file_name,
    decoder_plain_name,
    is_buffer,
)

DTYPES = ("float32", "bfloat16", "float16", "as_stored")


def load_decoder(folder: str | Path, *, dtype: str = "float32") -> Pretrained[DecoderConfig]:
    """Reads ``config.json`` and ``model.safetensors`` (or its shards) of a causal language model.

    Families: ``gpt2``, ``gpt_neox`` (Pythia), ``llama``, ``olmo``, ``olmo2``. The token table may have more rows than
    the tokenizer has tokens. Dropout of the configuration is not kept; pickles are never opened. Host memory: the
    parameters once, and one leaf twice.

    Args:
      folder: The checkpoint.
      dtype: Of the parameters: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"as_stored"``.

    Returns:
      Configuration, parameters ``{"decoder": ...}``, with ``"unembedding"`` where the token table is not also that, and
      config.json as it stands.

    Raises:
      UserError: A file is missing or damaged, the model is of another kind or has what the decoder does not compute, a
        tensor is unknown, missing, of another shape or not finite, or an unembedding contradicts its tie.

    Example:
      >>> import tempfile
      >>> from jaxft.nn.decoder import decoder_config
      >>> config = decoder_config("llama", vocab_size=9, width=8, layers=1, heads=2, mlp_width=16, max_positions=8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_decoder(folder, config, init_decoder(config, key=jax.random.key(0)))
      ...     load_decoder(folder).config == config
      True
    """
    where, folder = "load_decoder", Path(folder)
    require(dtype in DTYPES, where, f"dtype must be one of {', '.join(DTYPES)}", repr(dtype), "Pass 'float32'")
    require(folder.is_dir(), where, "needs the folder of a checkpoint", folder, "Download it first")
    raw = read_json(where, folder / CONFIG)
    config = read_decoder_config(where, folder / CONFIG, raw)
    family, names = config.family, DECODERS[config.family]
    tensors = read_headers(
        where, folder, lambda name: decoder_plain_name(family, name), auto_class="AutoModelForCausalLM"
    )
    copies = {names.unembedding: names.token_table} if config.tied else {}
    entries, leaves = decoder_entries(config), _leaf_shapes(config)
    hint = "Check that the files belong together"
    if not config.tied and names.unembedding not in tensors:
        hint += f"; without {names.unembedding}, config.json must say tie_word_embeddings=true"
    check_headers(
        where,
        folder,
        tensors,
        entries,
        leaves,
        passed_over=lambda name: name in copies or is_buffer(family, name),
        next_step=hint,
    )
    untied = unequal_copies(tensors, copies)
    rule = f"a tied unembedding must be the token table {names.token_table}"
    hint = f"If it has its own, say tie_word_embeddings=false in {folder / CONFIG}"
    require(not untied, where, rule, f"another in {', '.join(untied)}", hint)
    params = read_tree(where, tensors, entries, leaves, dtype=None if dtype == "as_stored" else jnp.dtype(dtype))
    return Pretrained(config, params, raw)


def save_decoder(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: str | Path | None = None,
    raw_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that ``load_decoder`` and transformers read: config.json and model.safetensors.

    The folder appears whole or not at all. Parameters keep their precision (float64 becomes float32) and are written to
    one file. ``scan_layers``, ``remat``, ``init_scale`` and ``dtype`` of ``config`` are not stored.

    Args:
      folder: To be made; must not exist, or be empty.
      config: The decoder.
      params: Its parameters.
      tokenizer: A tokenizer file, or a folder whose tokenizer files are copied along.
      raw_config: The config.json that the decoder came from; what else it says, such as token ids, is carried along.

    Raises:
      UserError: The folder holds something, the parameters do not fit ``config`` or are not finite, the family's files
        cannot state ``config``, or there is no tokenizer where one was named.
    """
    where, folder = "save_decoder", Path(folder).resolve()
    require_new_folder(where, folder)
    hint = "Merge adapters first, leave out heads, and pass the config of these parameters"
    check_params(where, params, _leaf_shapes(config), next_step=hint)
    copied = tokenizer_files(where, tokenizer)
    leaves = {path_name(path): _storable(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    widest = jnp.result_type(*(x.dtype for x in leaves.values()))
    raw = write_decoder_config(where, config, dtype=str(widest), raw_config=raw_config)
    tensors = file_tensors(leaves, decoder_entries(config), lambda name: decoder_file_name(config.family, name))
    write_folder(folder, raw, tensors, copied)


def _leaf_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return leaf_shapes(lambda key: init_decoder(config, key=key))


def _storable(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == np.float64 else x
