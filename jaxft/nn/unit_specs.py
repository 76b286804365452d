"""Where the hidden units of our models lie: specs for permutations, dropout of units and paths."""

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxft.core.checks import require
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, UnitAxis, make_permutation_spec, named_leaves
from jaxft.nn.transformer import EncoderConfig


def mlp_spec(params: Params) -> PermutationSpec:
    """Hidden units of an MLP of ``make_mlp``, as the groups ``hidden_0``, ``hidden_1``, ....

    Args:
      params: Parameters ``{"Dense_0": {"kernel": ..., "bias": ...}, "Dense_1": ...}``, or their shapes; biases may be
        missing.

    Returns:
      The spec.

    Raises:
      UserError: There is no layer ``Dense_0``, or leaves of other layers.

    Example:
      >>> import jax
      >>> from jaxft.nn.mlp import make_mlp
      >>> init, _ = make_mlp((16, 8, 2))
      >>> mlp_spec(init(jax.random.key(0), 3)).groups
      ('hidden_0', 'hidden_1')
    """
    where, shapes = "mlp_spec", _shapes(params)
    layers = _numbered(shapes, "Dense")
    _require_known(
        where, shapes, layers, r"Dense_\d+", "Dense_0, Dense_1, ...", "Describe it with make_permutation_spec"
    )
    axes = dict[str, list[UnitAxis]]()
    for i, (layer, following) in enumerate(itertools.pairwise(layers)):
        _produce(axes, shapes, layer, f"hidden_{i}")
        _read(axes, shapes, following, f"hidden_{i}")
    return make_permutation_spec({path: tuple(found) for path, found in axes.items()})


def conv_spec(params: Params) -> PermutationSpec:
    """Channels and dense hidden units of a net of ``make_convnet``: ``channels_0``, ..., then ``hidden_0``, ....

    The statistics of a norm lie with its scale and bias. The first dense layer reads every channel once for each
    position of the last map.

    Args:
      params: Parameters with the leaves ``conv_i``, ``norm_i``, ``dense_j`` and ``output``, or their shapes.

    Returns:
      The spec.

    Raises:
      UserError: No convolution or no output layer, or leaves of other layers.

    Example:
      >>> params = {"conv_0": {"kernel": np.zeros((3, 3, 1, 4))}, "output": {"kernel": np.zeros((9 * 4, 10))}}
      >>> conv_spec(params).of_group("channels_0", reads=True)
      (('output/kernel', UnitAxis(units='channels_0', axis=0, reads=True, outer=9, inner=1, stacked=False)),)
    """
    where, shapes = "conv_spec", _shapes(params)
    convs, dense = _numbered(shapes, "conv"), _numbered(shapes, "dense")
    layers = [*convs, *dense, *(["output"] if "output/kernel" in shapes else [])]
    pattern = r"(conv|norm|dense)_\d+|output"
    _require_known(where, shapes, convs, pattern, "conv_i, norm_i, dense_j, output", "Pass params of make_convnet")
    require(
        layers[-1] == "output", where, "there must be an output layer", sorted(shapes), "Pass params of make_convnet"
    )
    axes = dict[str, list[UnitAxis]]()
    for layer, following in itertools.pairwise(layers):
        kind, number = layer.split("_")
        group = f"{'channels' if kind == 'conv' else 'hidden'}_{number}"
        _produce(axes, shapes, layer, group)
        if kind == "conv":
            _produce(axes, shapes, f"norm_{number}", group)
        _read(axes, shapes, following, group, after=layer)
    return make_permutation_spec({path: tuple(found) for path, found in axes.items()})


def encoder_spec(params: Params, config: EncoderConfig) -> PermutationSpec:
    """Units of an encoder with the heads it has: ``mlp`` and ``heads`` of each layer, and ``residual``.

    ``mlp`` (the inner units of the feed-forward layers) and ``heads`` are stacked over layers. ``residual`` (the width)
    is one group for the whole network: embeddings, norms, every layer, and the masked-word head, whose dense layer is
    held to it by the tied table. The norms run over it, so its units can be permuted, and not dropped or copied. What
    mixes within a head (any invertible map between query and key, or value and output) is not covered.

    Args:
      params: ``{"encoder": ..., "mlm": ..., "classifier": ...}``, the last two where they are there, or their shapes.
      config: The encoder.

    Returns:
      The spec.

    Raises:
      UserError: Leaves of other parts, such as LoRA factors.

    Example:
      >>> import jax
      >>> from jaxft.core.units import unit_counts
      >>> from jaxft.nn.transformer import init_encoder
      >>> config = EncoderConfig("bert", 9, 4, 3, 2, 8, 5, 2, 1e-12, pad_id=0)
      >>> params = init_encoder(config, key=jax.random.key(0))
      >>> unit_counts(params, encoder_spec(params, config))
      {'heads': 2, 'residual': 4, 'mlp': 8}
    """
    heads = {"units": "heads", "inner": config.width // config.heads, "stacked": True}
    mlp = {"units": "mlp", "stacked": True}
    table: dict[str, tuple[UnitAxis, ...]] = {}
    for name in ("query", "key", "value"):
        layer = f"encoder/layers/attention/{name}"
        table[f"{layer}/kernel"] = (UnitAxis(axis=2, **heads), UnitAxis("residual", 1, reads=True))
        table[f"{layer}/bias"] = (UnitAxis(axis=1, **heads),)
    layer = "encoder/layers/attention/output"
    table[f"{layer}/kernel"] = (UnitAxis(axis=1, reads=True, **heads), UnitAxis("residual", 2))
    table["encoder/layers/mlp/in/kernel"] = (UnitAxis("residual", 1, reads=True), UnitAxis(axis=2, **mlp))
    table["encoder/layers/mlp/in/bias"] = (UnitAxis(axis=1, **mlp),)
    table["encoder/layers/mlp/out/kernel"] = (UnitAxis(axis=1, reads=True, **mlp), UnitAxis("residual", 2))
    by_layer = ("attention/output/bias", "attention_norm/scale", "attention_norm/bias", "mlp/out/bias")
    for name in (*by_layer, "mlp_norm/scale", "mlp_norm/bias"):
        table[f"encoder/layers/{name}"] = (UnitAxis("residual", 1),)
    for name in ("token", "position", "token_type"):
        table[f"encoder/embeddings/{name}"] = (UnitAxis("residual", 1),)
    table["mlm/dense/kernel"] = (UnitAxis("residual", 0, reads=True), UnitAxis("residual", 1))
    for path in (
        "encoder/embeddings/norm/scale",
        "encoder/embeddings/norm/bias",
        "mlm/dense/bias",
        "mlm/norm/scale",
        "mlm/norm/bias",
    ):
        table[path] = (UnitAxis("residual", 0),)
    table["classifier/kernel"] = (UnitAxis("residual", 0, reads=True),)
    shapes = _shapes(params)
    unknown = sorted(set(shapes) - set(table) - {"mlm/bias", "classifier/bias"})
    rule, advice = (
        "leaves must be those of an encoder and its heads",
        "Merge LoRA, or add axes with make_permutation_spec",
    )
    require(not unknown, "encoder_spec", rule, f"also {', '.join(unknown[:5])}", advice)
    return make_permutation_spec({p: axes for p, axes in table.items() if p in shapes}, normalized={"residual"})


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in named_leaves(params).items()}


def _numbered(shapes: Mapping[str, object], name: str) -> list[str]:
    """Layers ``name_0``, ``name_1``, ... that are there, in order of their numbers."""
    found = {path.split("/")[0] for path in shapes}
    return sorted((f for f in found if re.fullmatch(rf"{name}_\d+", f)), key=lambda f: int(f.split("_")[1]))


def _require_known(
    where: str, shapes: Mapping[str, object], layers: Sequence[str], pattern: str, said: str, next_step: str
) -> None:
    unknown = sorted(path for path in shapes if not re.fullmatch(pattern, path.split("/")[0]))
    got = f"also {', '.join(unknown[:5])}" if unknown else "none of them"
    require(bool(layers) and not unknown, where, f"layers must be {said}", got, next_step)


def _produce(axes: dict[str, list[UnitAxis]], shapes: Mapping[str, tuple[int, ...]], layer: str, group: str) -> None:
    """The last axis of every leaf of a layer."""
    for path, shape in shapes.items():
        if path.startswith(f"{layer}/"):
            axes.setdefault(path, []).append(UnitAxis(group, len(shape) - 1))


def _read(
    axes: dict[str, list[UnitAxis]], shapes: Mapping[str, tuple[int, ...]], layer: str, group: str, *, after: str = ""
) -> None:
    """The last axis but one of the kernel of a layer; maps are flattened with channels fastest."""
    path = f"{layer}/kernel"
    outer = shapes[path][-2] // shapes[f"{after}/kernel"][-1] if after.startswith("conv") else 1
    axes.setdefault(path, []).append(UnitAxis(group, len(shapes[path]) - 2, reads=True, outer=max(outer, 1)))
