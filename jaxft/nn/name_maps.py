"""Where each tensor of a Hugging Face file lives in the parameter tree: rules, read in both directions, and encoders'.

A file stores a layer's tensors one by one and its linear maps as ``[out, in]``; the tree stacks layers on axis 0 and
has ``[in, out]``. A file may also hold queries, keys and values in one tensor, which the tree keeps apart.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: ``{i}`` in ``name`` runs over the layers, which the leaves stack."""

    name: str
    """Name in the file, without the family's prefix."""
    paths: tuple[str, ...]
    """Leaves of the tree, as ``encoder/embeddings/token``: one, or those that the file holds fused."""
    transpose: bool = False
    groups: int = 1
    """Fused leaves alternate this often along the last axis: once by whole blocks, or once for each head."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its leaves, its index on their layer axis, and how it is stored.

    Example:
      >>> entry = Entry(("query", "key"), None, groups=2)
      >>> [x.tolist() for x in entry.split(np.arange(8))]
      [[0, 1, 4, 5], [2, 3, 6, 7]]
      >>> entry.join(entry.split(np.arange(8))).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """

    paths: tuple[str, ...]
    layer: int | None
    transpose: bool = False
    groups: int = 1

    def split(self, stored: np.ndarray) -> list[np.ndarray]:
        """The leaves' parts of a stored tensor, in the order of ``paths``."""
        x = stored.T if self.transpose else stored
        if len(self.paths) == 1:
            return [x]
        parts = x.reshape(*x.shape[:-1], self.groups, len(self.paths), -1)
        return [parts[..., i, :].reshape(*x.shape[:-1], -1) for i in range(len(self.paths))]

    def join(self, parts: Iterable[np.ndarray]) -> np.ndarray:
        """The tensor to store, of the leaves' parts: the inverse of ``split``."""
        parts = list(parts)
        x = parts[0]
        if len(parts) > 1:
            x = np.stack([part.reshape(*part.shape[:-1], self.groups, -1) for part in parts], axis=-2)
            x = x.reshape(*parts[0].shape[:-1], -1)
        # The writer stores memory as it lies, so that a transposed view must be copied.
        return np.ascontiguousarray(x.T if self.transpose else x)

    def stored_shape(self, leaves: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Shape in the file, of the shapes of all leaves."""
        shapes = [leaves[path] if self.layer is None else leaves[path][1:] for path in self.paths]
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return shape[::-1] if self.transpose else shape


def linear_rules(name: str, *paths: str, bias: bool = True, transpose: bool = True, groups: int = 1) -> list[Rule]:
    """Rules of a linear map, of several fused ones where several paths are given.

    Args:
      name: Its name in the file.
      paths: Nodes of the tree that hold ``kernel``, and ``bias``.
      bias: Whether there is one.
      transpose: Whether the file has ``[out, in]``.
      groups: As in ``Rule``.

    Returns:
      One rule or two.

    Example:
      >>> [rule.name for rule in linear_rules("dense", "mlp/in")]
      ['dense.weight', 'dense.bias']
    """
    rules = [Rule(f"{name}.weight", tuple(f"{path}/kernel" for path in paths), transpose, groups)]
    return rules + ([Rule(f"{name}.bias", tuple(f"{path}/bias" for path in paths), False, groups)] if bias else [])


def norm_rules(name: str, path: str, *, bias: bool = True) -> list[Rule]:
    """Rules of the parameters of a norm.

    Example:
      >>> [rule.paths for rule in norm_rules("norm", "decoder/final_norm", bias=False)]
      [('decoder/final_norm/scale',)]
    """
    scale = Rule(f"{name}.weight", (f"{path}/scale",))
    return [scale, Rule(f"{name}.bias", (f"{path}/bias",))] if bias else [scale]


def expand_rules(rules: Iterable[Rule], layers: int) -> dict[str, Entry]:
    """Every tensor that the rules speak of, by its name in the file, layers in order.

    Example:
      >>> list(expand_rules(norm_rules("h.{i}.norm", "layers/norm", bias=False), 2))
      ['h.0.norm.weight', 'h.1.norm.weight']
    """
    entries = {}
    for rule in rules:
        for i in range(layers) if "{i}" in rule.name else (None,):
            entries[rule.name.format(i=i)] = Entry(rule.paths, i, rule.transpose, rule.groups)
    return entries


@dataclasses.dataclass(frozen=True)
class NameMap:
    """The naming of a family."""

    prefix: str
    """Before the encoder's names; absent from files of the bare encoder."""
    mlm: tuple[Rule, ...]
    tied: dict[str, str]
    """Copies of other tensors that some files store: name to name."""
    encoder_class: str
    mlm_class: str


LAYER = "encoder.layer.{i}"
ENCODER_RULES = (
    Rule("embeddings.word_embeddings.weight", ("encoder/embeddings/token",)),
    Rule("embeddings.position_embeddings.weight", ("encoder/embeddings/position",)),
    Rule("embeddings.token_type_embeddings.weight", ("encoder/embeddings/token_type",)),
    *norm_rules("embeddings.LayerNorm", "encoder/embeddings/norm"),
    *linear_rules(f"{LAYER}.attention.self.query", "encoder/layers/attention/query"),
    *linear_rules(f"{LAYER}.attention.self.key", "encoder/layers/attention/key"),
    *linear_rules(f"{LAYER}.attention.self.value", "encoder/layers/attention/value"),
    *linear_rules(f"{LAYER}.attention.output.dense", "encoder/layers/attention/output"),
    *norm_rules(f"{LAYER}.attention.output.LayerNorm", "encoder/layers/attention_norm"),
    *linear_rules(f"{LAYER}.intermediate.dense", "encoder/layers/mlp/in"),
    *linear_rules(f"{LAYER}.output.dense", "encoder/layers/mlp/out"),
    *norm_rules(f"{LAYER}.output.LayerNorm", "encoder/layers/mlp_norm"),
)

TOKEN_TABLE = "embeddings.word_embeddings.weight"
FAMILIES = {
    "bert": NameMap(
        prefix="bert.",
        mlm=(
            *linear_rules("cls.predictions.transform.dense", "mlm/dense"),
            *norm_rules("cls.predictions.transform.LayerNorm", "mlm/norm"),
            Rule("cls.predictions.bias", ("mlm/bias",)),
        ),
        tied={"cls.predictions.decoder.weight": TOKEN_TABLE, "cls.predictions.decoder.bias": "cls.predictions.bias"},
        encoder_class="BertModel",
        mlm_class="BertForMaskedLM",
    ),
    "roberta": NameMap(
        prefix="roberta.",
        mlm=(
            *linear_rules("lm_head.dense", "mlm/dense"),
            *norm_rules("lm_head.layer_norm", "mlm/norm"),
            Rule("lm_head.bias", ("mlm/bias",)),
        ),
        tied={"lm_head.decoder.weight": TOKEN_TABLE, "lm_head.decoder.bias": "lm_head.bias"},
        encoder_class="RobertaModel",
        mlm_class="RobertaForMaskedLM",
    ),
}

IGNORED = re.compile(
    r"embeddings\.(position_ids|token_type_ids)"  # constants that older files store
    r"|pooler\..*|cls\.seq_relationship\..*"  # next-sentence head
    r"|classifier\..*|qa_outputs\..*"  # task heads, which the caller initialises anew
    r"|mlp\.dense\..*|contrastive_head\..*"  # contrastive heads
)
"""Names, without prefix, that have no place in the tree and are passed over."""

OLD_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}
"""What files converted from TensorFlow call the parameters of a norm."""


def plain_name(family: str, name: str) -> str:
    """The name of a tensor without the family's prefix and with today's suffix.

    Example:
      >>> plain_name("bert", "bert.embeddings.LayerNorm.gamma")
      'embeddings.LayerNorm.weight'
    """
    name = name.removeprefix(FAMILIES[family].prefix)
    for old, new in OLD_SUFFIXES.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def file_name(family: str, name: str, *, mlm: bool) -> str:
    """The name that the family's own class writes: files with a head have the prefix, those of the bare encoder none.

    Example:
      >>> file_name("roberta", "embeddings.word_embeddings.weight", mlm=True)
      'roberta.embeddings.word_embeddings.weight'
    """
    names = FAMILIES[family]
    is_head = any(name == rule.name for rule in names.mlm)
    return names.prefix + name if mlm and not is_head else name


def tensor_entries(family: str, layers: int, *, mlm: bool) -> dict[str, Entry]:
    """Every tensor that a file must hold, by its plain name.

    Args:
      family: ``"bert"`` or ``"roberta"``.
      layers: Layers of the encoder.
      mlm: Whether the masked-word head is among them.

    Returns:
      Plain name to entry, layers in order.

    Example:
      >>> tensor_entries("bert", 2, mlm=False)["encoder.layer.1.output.dense.weight"]
      Entry(paths=('encoder/layers/mlp/out/kernel',), layer=1, transpose=True, groups=1)
    """
    return expand_rules(ENCODER_RULES + (FAMILIES[family].mlm if mlm else ()), layers)
