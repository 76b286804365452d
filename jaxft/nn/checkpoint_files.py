"""Files of a checkpoint folder: config.json, safetensors with their headers, tokenizer files; for every kind of model.

Values are read tensor by tensor through a memory map into the stacked leaves, and become arrays of JAX leaf by leaf: a
load holds the parameters once and one leaf twice. A save holds them twice.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxft.core.checks import UserError, message, path_name, require, require_finite
from jaxft.core.types import Params
from jaxft.nn.name_maps import Entry

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16}
"""What files call the types of floats."""

Config = TypeVar("Config")
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Pretrained(Generic[Config]):
    """A model read from a folder."""

    config: Config
    params: Params
    """``{"encoder": ...}``, with ``"mlm"`` where the file holds it; ``{"decoder": ...}``, with ``"unembedding"`` where
    it is not tied."""
    raw_config: dict[str, Any]
    """config.json as it stands."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """What the header of a file says of one tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Byte of the file where its values begin."""

    def read(self) -> np.ndarray:
        """The values, mapped from the file; it must be of floats."""
        return np.memmap(self.file, np.dtype(FLOATS[self.dtype]), "r", self.offset, self.shape)


def read_json(where: str, path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      where: The function that a fault is reported by.
      path: The file.

    Returns:
      The object.

    Raises:
      UserError: There is no such file, or it is no JSON, or no object.
    """
    require(path.is_file(), where, f"needs {path.name}", f"no such file in {path.parent}", "Download the whole folder")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(message(where, f"{path} must be JSON", error, "Download the file again")) from error
    require(isinstance(value, dict), where, f"{path} must be a JSON object", type(value).__name__, "Download it again")
    return value


def is_number(x: Any, *, whole: bool) -> bool:
    """Whether a value of a JSON file is a number, true and false being none."""
    return isinstance(x, int if whole else (int, float)) and not isinstance(x, bool)


def read_headers(
    where: str, folder: Path, plain_name: Callable[[str], str], *, auto_class: str
) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weight files, from their headers alone.

    Args:
      where: The function that a fault is reported by.
      folder: The checkpoint.
      plain_name: The name by which the rules know a tensor, of that in the file.
      auto_class: The class of transformers by which a pickle is converted.

    Returns:
      Plain name to tensor.

    Raises:
      UserError: There is no weight file, or pickles alone, a shard is missing, a file damaged, or a tensor there twice.
    """
    tensors, twice = {}, []
    for file in _weight_files(where, folder, auto_class):
        try:
            # Opening checks the header against the length of the file.
            with safetensors.safe_open(file, framework="numpy"), file.open("rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(size))
        except (safetensors.SafetensorError, OSError) as error:
            hint = "Download it again; a file of a few hundred bytes is a Git LFS pointer"
            raise UserError(message(where, f"{file} must be a whole safetensors file", error, hint)) from error
        header.pop("__metadata__", None)
        for name, said in header.items():
            plain, start = plain_name(name), 8 + size + said["data_offsets"][0]
            twice += [name] if plain in tensors else []
            tensors[plain] = StoredTensor(file, name, tuple(said["shape"]), said["dtype"], start)
    require(not twice, where, "a tensor must occur once", f"twice {some(twice)}", f"Remove stale files from {folder}")
    return tensors


def _weight_files(where: str, folder: Path, auto_class: str) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards: Any = read_json(where, folder / INDEX).get("weight_map")
        require(isinstance(shards, dict), where, f"{folder / INDEX} must hold weight_map", "none", "Download it again")
        files = [folder / name for name in sorted(set(shards.values()))]
        absent = [file.name for file in files if not file.is_file()]
        require(not absent, where, f"needs every shard of {folder / INDEX}", f"no {some(absent)}", "Download them")
        return files
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickles:
        hint = f"Convert it once by transformers: {auto_class}.from_pretrained(old).save_pretrained(new)"
        rule = "reads safetensors and never a pickle, which can run code"
        raise UserError(message(where, rule, f"{some(pickles)} in {folder}", hint))
    got = f"neither {WEIGHTS} nor {INDEX} in {folder}"
    raise UserError(message(where, "needs a weight file", got, "Download the whole folder"))


def check_headers(
    where: str,
    folder: Path,
    tensors: dict[str, StoredTensor],
    entries: dict[str, Entry],
    leaves: Shapes,
    *,
    passed_over: Callable[[str], bool],
    next_step: str = "Check that the files belong together",
) -> None:
    """Raises unless the tensors are those of ``entries``, each once and of its shape; all faults in one message.

    Args:
      where: The function that a fault is reported by.
      folder: The checkpoint.
      tensors: By plain name.
      entries: By plain name.
      leaves: Shapes of the tree's leaves.
      passed_over: Whether a tensor beyond ``entries`` may be there.
      next_step: What the user is told to do.

    Raises:
      UserError: A tensor is unknown, missing, of another shape or not of floats.
    """
    unknown = [x.name for k, x in tensors.items() if k not in entries and not passed_over(k)]
    missing = [name for name in entries if name not in tensors]
    shapes, kinds = [], []
    for name, entry in entries.items():
        if name in tensors:
            shape, got = entry.stored_shape(leaves), tensors[name]
            shapes += [f"{got.name} expected {shape} got {got.shape}"] if shape != got.shape else []
            kinds += [f"{got.name} {got.dtype}"] if got.dtype not in FLOATS else []
    groups = {"unknown": unknown, "missing": missing, "of another shape": shapes, "not of floats": kinds}
    faults = [f"{label}: {some(found)}" for label, found in groups.items() if found]
    rule = f"the tensors of {folder} must be those of its config.json"
    require(not faults, where, rule, "; ".join(faults), next_step)


def unequal_copies(tensors: dict[str, StoredTensor], copies: dict[str, str]) -> list[str]:
    """Tensors that ought to repeat others, where both are there, and do not.

    Args:
      tensors: By plain name.
      copies: Name to name.

    Returns:
      Names of the copies.
    """
    both = [(tensors[name], tensors[of]) for name, of in copies.items() if name in tensors and of in tensors]
    return [
        x.name for x, y in both if (x.shape, x.dtype) != (y.shape, y.dtype) or not np.array_equal(x.read(), y.read())
    ]


def read_tree(
    where: str,
    tensors: dict[str, StoredTensor],
    entries: dict[str, Entry],
    leaves: Shapes,
    *,
    dtype: Any = jnp.float32,
) -> Params:
    """The parameters: every tensor of ``entries`` read into its leaves.

    Args:
      where: The function that a fault is reported by.
      tensors: By plain name.
      entries: By plain name.
      leaves: Shapes of the tree's leaves.
      dtype: Of the parameters; ``None`` leaves them as they are stored, float64 aside, which becomes float32, and a
        leaf stored in several takes the widest.

    Returns:
      The tree.

    Raises:
      UserError: A value is not finite.
    """
    filled, bad = {}, []
    dtypes = _stored_dtypes(tensors, entries)
    for name, entry in entries.items():
        for path, part in zip(entry.paths, entry.split(tensors[name].read()), strict=True):
            if path not in filled:
                filled[path] = np.empty(leaves[path], dtypes[path] if dtype is None else dtype)
            target = filled[path] if entry.layer is None else filled[path][entry.layer]
            with np.errstate(over="ignore"):
                target[...] = part
            bad += [] if np.isfinite(target).all() else [tensors[name].name]
    got = f"NaN or infinity in {some(dict.fromkeys(bad))}"
    require(not bad, where, "parameters must be finite", got, "Download the file again, or train with a smaller step")
    return _to_tree(filled)


def _stored_dtypes(tensors: dict[str, StoredTensor], entries: dict[str, Entry]) -> dict[str, Any]:
    dtypes: dict[str, Any] = {}
    for name, entry in entries.items():
        stored = np.dtype("float32" if tensors[name].dtype == "F64" else FLOATS[tensors[name].dtype])
        for path in entry.paths:
            dtypes[path] = jnp.promote_types(dtypes.get(path, stored), stored)
    return dtypes


def _to_tree(leaves: dict[str, np.ndarray]) -> Params:
    tree: dict[str, Any] = {}
    for path in list(leaves):
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        # Waiting lets go of one leaf before the next is copied.
        node[last] = jax.block_until_ready(jnp.asarray(leaves.pop(path)))
    return tree


def leaf_shapes(init: Callable[..., Params]) -> Shapes:
    """Shapes of the leaves that ``init(key)`` makes, by path, without making them."""
    tree = jax.eval_shape(init, jax.random.key(0))
    return {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def check_params(where: str, params: Params, leaves: Shapes, *, next_step: str) -> None:
    """Raises unless ``params`` has these leaves and is finite; all faults in one message.

    Args:
      where: The function that a fault is reported by.
      params: The tree.
      leaves: Shapes by path.
      next_step: What the user is told to do.

    Raises:
      UserError: A leaf is missing, extra, of another shape, or not finite.
    """
    got = {path_name(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    faults = [f"extra {path}" for path in got.keys() - leaves.keys()]
    faults += [f"missing {path}" for path in leaves.keys() - got.keys()]
    faults += [f"{k} expected {s} got {got[k]}" for k, s in leaves.items() if k in got and got[k] != s]
    require(not faults, where, "params must be those of config", some(sorted(faults)), next_step)
    require_finite(where, params, "params")


def require_new_folder(where: str, folder: Path) -> None:
    """Raises if the folder is there and holds something."""
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, where, "writes into a new folder", f"{folder}, which holds something", "Name another, or remove it")


def tokenizer_files(where: str, tokenizer: str | Path | None) -> list[Path]:
    """The files to copy for a tokenizer file or the folder of a tokenizer; none for ``None``.

    Args:
      where: The function that a fault is reported by.
      tokenizer: A file or folder.

    Returns:
      The files.

    Raises:
      UserError: There are none.
    """
    if tokenizer is None:
        return []
    tokenizer = Path(tokenizer)
    if tokenizer.is_file():
        return [tokenizer]
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    require(bool(files), where, "tokenizer must be a tokenizer file or its folder", tokenizer, "Name tokenizer.json")
    return files


def file_tensors(
    leaves: dict[str, np.ndarray], entries: dict[str, Entry], file_name: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """What a file holds, of the leaves: the inverse of ``read_tree``.

    Args:
      leaves: By path.
      entries: By plain name.
      file_name: The name in the file, of the plain name.

    Returns:
      Name to tensor.
    """
    return {
        file_name(name): entry.join(leaves[p] if entry.layer is None else leaves[p][entry.layer] for p in entry.paths)
        for name, entry in entries.items()
    }


def write_folder(folder: Path, raw_config: dict[str, Any], tensors: dict[str, np.ndarray], copied: list[Path]) -> None:
    """Writes config.json, model.safetensors and copies of files; the folder appears whole or not at all.

    Args:
      folder: To be made; must not exist, or be empty.
      raw_config: What config.json is to hold.
      tensors: By the name in the file.
      copied: Files to copy.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        safetensors.numpy.save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(raw_config, indent=2) + "\n")
        for file in copied:
            shutil.copy(file, part / file.name)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def some(names: Iterable[str]) -> str:
    """The first names of many."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
