"""Random streams by name: a draw depends on (seed, name, indices) and on nothing that ran before it."""

import zlib

import jax
import numpy as np
from jaxtyping import Array


def stream(key: Array, name: str, *indices: int) -> Array:
    """A key for the stream ``name``: ``fold_in(key, crc32(name))``, then one ``fold_in`` an index.

    ``crc32`` rather than ``hash``: the latter differs between processes.

    Example:
      >>> key = jax.random.key(0)
      >>> bool((stream(key, "init") == stream(key, "init")).all())
      True
      >>> bool((stream(key, "init") == stream(key, "batches")).all())
      False
    """
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def host_stream(seed: int, name: str, *indices: int) -> np.random.Generator:
    """A numpy generator for the stream ``name``: for shuffles and draws that the host makes.

    Example:
      >>> int(host_stream(0, "shuffle", 3).integers(1000)) == int(host_stream(0, "shuffle", 3).integers(1000))
      True
    """
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *indices])
