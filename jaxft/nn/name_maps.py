"""Where each tensor of a Hugging Face file lives in the parameter tree: tables of rules, read in both directions.

A file stores a layer's tensors one by one and its linear maps as ``[out, in]``; the tree stacks layers on axis 0 and
has ``[in, out]``.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: ``{i}`` in ``name`` runs over the layers, which ``path`` stacks."""

    name: str
    """Name in the file, without the family's prefix."""
    path: str
    """Leaf of the tree, as ``encoder/embeddings/token``."""
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its leaf, its index on the leaf's layer axis, whether it is stored transposed."""

    path: str
    layer: int | None
    transpose: bool


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


def _linear(name: str, path: str) -> tuple[Rule, Rule]:
    return Rule(f"{name}.weight", f"{path}/kernel", transpose=True), Rule(f"{name}.bias", f"{path}/bias")


def _norm(name: str, path: str) -> tuple[Rule, Rule]:
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


LAYER = "encoder.layer.{i}"
ENCODER_RULES = (
    Rule("embeddings.word_embeddings.weight", "encoder/embeddings/token"),
    Rule("embeddings.position_embeddings.weight", "encoder/embeddings/position"),
    Rule("embeddings.token_type_embeddings.weight", "encoder/embeddings/token_type"),
    *_norm("embeddings.LayerNorm", "encoder/embeddings/norm"),
    *_linear(f"{LAYER}.attention.self.query", "encoder/layers/attention/query"),
    *_linear(f"{LAYER}.attention.self.key", "encoder/layers/attention/key"),
    *_linear(f"{LAYER}.attention.self.value", "encoder/layers/attention/value"),
    *_linear(f"{LAYER}.attention.output.dense", "encoder/layers/attention/output"),
    *_norm(f"{LAYER}.attention.output.LayerNorm", "encoder/layers/attention_norm"),
    *_linear(f"{LAYER}.intermediate.dense", "encoder/layers/mlp/in"),
    *_linear(f"{LAYER}.output.dense", "encoder/layers/mlp/out"),
    *_norm(f"{LAYER}.output.LayerNorm", "encoder/layers/mlp_norm"),
)

TOKEN_TABLE = "embeddings.word_embeddings.weight"
FAMILIES = {
    "bert": NameMap(
        prefix="bert.",
        mlm=(
            *_linear("cls.predictions.transform.dense", "mlm/dense"),
            *_norm("cls.predictions.transform.LayerNorm", "mlm/norm"),
            Rule("cls.predictions.bias", "mlm/bias"),
        ),
        tied={"cls.predictions.decoder.weight": TOKEN_TABLE, "cls.predictions.decoder.bias": "cls.predictions.bias"},
        encoder_class="BertModel",
        mlm_class="BertForMaskedLM",
    ),
    "roberta": NameMap(
        prefix="roberta.",
        mlm=(
            *_linear("lm_head.dense", "mlm/dense"),
            *_norm("lm_head.layer_norm", "mlm/norm"),
            Rule("lm_head.bias", "mlm/bias"),
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
      Entry(path='encoder/layers/mlp/out/kernel', layer=1, transpose=True)
    """
    entries = {}
    for rule in ENCODER_RULES + (FAMILIES[family].mlm if mlm else ()):
        stacked = "{i}" in rule.name
        for i in range(layers) if stacked else (None,):
            entries[rule.name.format(i=i)] = Entry(rule.path, i, rule.transpose)
    return entries
