"""The networks of the experiment: pure functions of one parameter tree, and where their hidden units lie."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from experiments.mode_connectivity.config import ModeConnectivityConfig, Training, net_sizes
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, map_named_leaves, named_leaves
from jaxft.nn.conv import ConvConfig, make_convnet
from jaxft.nn.mlp import make_mlp, make_mlp_units
from jaxft.nn.unit_specs import conv_spec, mlp_spec
from jaxft.train import cross_entropy, make_segment
from jaxft.train.loop import Segment

SPLITS = ("train", "test")

Batch = tuple[Float[Array, "b height width channels"], Int[Array, "b"]]
TestBatch = tuple[Float[Array, "m height width channels"], Int[Array, "m"]]


class Network(NamedTuple):
    """A network as pure functions; the same name and images give the same object, and so the same compiled programs."""

    init: Callable[[Array], Params]
    f: Callable[..., Array]
    """``f(params, x, *, key=None)``: logits."""
    units: Callable[[Params, Array], dict[str, Array]]
    """Pre-activations by group of units."""
    spec: PermutationSpec
    hidden_layers: int
    losses: Callable[[Params, Batch], dict[str, Array]]
    """Cross-entropy (nats) and error (fraction) of a batch."""
    split_losses: Callable[[Params, tuple[Batch, TestBatch]], dict[str, Array]]
    """The same of a batch of each split: ``train_loss``, ``train_error``, ``test_loss``, ``test_error``."""
    fit_loss: Callable[[Params, Batch], Array]
    """The loss that curves are fitted to: normalised by the batch, where there are norms."""
    statistics: Callable[[Params, Any], Params] | None
    """Re-estimates the statistics of norms on the images of batches; ``None`` where there are none."""
    repairable: bool
    """Whether there are biases, by which REPAIR moves means."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of hidden units, from the input on."""
        return self.spec.groups


@functools.cache
def make_network(name: str, dropout: float, image_shape: tuple[int, int, int], classes: int) -> Network:
    """The network of a name.

    Args:
      name: As in the configuration, such as 2x256 or conv3x32.
      dropout: Probability with which hidden units, or channels, are dropped where ``f`` is given a key.
      image_shape: Height, width and channels.
      classes: Number of outputs.
    """
    kind, layers, width = net_sizes(name)
    if kind == "mlp":
        return _mlp((width,) * layers, dropout, image_shape, classes)
    widths: list[int | Literal["pool"]] = []
    for i in range(layers):
        widths += [width] if kind == "conv" else [width * 2**i, "pool"]
    norm = kind == "vgg"
    return _conv(ConvConfig(tuple(widths), classes, norm=norm, use_bias=norm, dropout_frac=dropout), image_shape)


def _mlp(hidden: tuple[int, ...], dropout: float, image_shape: tuple[int, int, int], classes: int) -> Network:
    init, f = make_mlp((*hidden, classes), dropout_frac=dropout)
    pre_activations = make_mlp_units((*hidden, classes))
    pixels = int(np.prod(image_shape))

    def of_images(params: Params, x: Array, *, key: Array | None = None) -> Array:
        return f(params, x.reshape(len(x), -1), key=key)

    def units(params: Params, x: Array) -> dict[str, Array]:
        return pre_activations(params, x.reshape(len(x), -1))

    def init_pixels(key: Array) -> Params:
        return init(key, pixels)

    spec = mlp_spec(jax.eval_shape(init_pixels, jax.random.key(0)))
    return Network(init_pixels, of_images, units, spec, len(hidden), *_losses(of_images), None, True)


def _conv(config: ConvConfig, image_shape: tuple[int, int, int]) -> Network:
    net = make_convnet(config)

    def init(key: Array) -> Params:
        return net.init(key, image_shape)

    def statistics(params: Params, batches: Any) -> Params:
        return net.statistics(params, jax.tree.leaves(batches)[0])

    spec = conv_spec(jax.eval_shape(init, jax.random.key(0)))
    layers = len(config.channels) + len(config.hidden)
    losses = _losses(net.f, in_training=functools.partial(net.f, train=True))
    return Network(init, net.f, net.units, spec, layers, *losses, statistics if config.norm else None, config.use_bias)


def _losses(f: Callable[..., Array], in_training: Callable[..., Array] | None = None) -> tuple[Any, Any, Any]:
    """``losses``, ``split_losses`` and ``fit_loss`` of a network."""

    def losses(params: Params, batch: Batch) -> dict[str, Array]:
        x, y = batch
        logits = f(params, x)
        return {"loss": cross_entropy(logits, y), "error": (logits.argmax(axis=1) != y).mean()}

    def split_losses(params: Params, batches: tuple[Batch, TestBatch]) -> dict[str, Array]:
        found = {split: losses(params, batch) for split, batch in zip(SPLITS, batches, strict=True)}
        return {f"{split}_{name}": value for split, values in found.items() for name, value in values.items()}

    def fit_loss(params: Params, batch: Batch) -> Array:
        x, y = batch
        return cross_entropy((in_training or f)(params, x), y)

    return losses, split_losses, fit_loss


# Cached, so that all seeds of a network share a program.
@functools.cache
def trainer(
    name: str, dropout: float, image_shape: tuple[int, int, int], classes: int, training: Training, mesh: Mesh | None
) -> tuple[optax.GradientTransformation, Segment]:
    """Optimiser and compiled segment; inputs are images and, for each, the number of the network in training."""
    f = make_network(name, dropout, image_shape, classes).f
    tx = optax.adam(training.learning_rate)
    # With a key the gradients of convolutions are faster, and norms use the statistics of the batch.
    key = jax.random.key(0) if dropout or net_sizes(name)[0] != "mlp" else None

    def of_numbered(params: Params, inputs: tuple[Array, Array], *, key: Array | None = None) -> Array:
        x, number = inputs
        # The draw of a step depends on the network too, and not by a constant that would need a program of its own.
        return f(params, x) if key is None else f(params, x, key=jax.random.fold_in(key, number[0]))

    return tx, make_segment(of_numbered, cross_entropy, tx, mesh=mesh, key=key)


def initial_params(network: Network, config: ModeConnectivityConfig, number: int) -> Params:
    """Random parameters of the network with this number."""
    return network.init(stream(jax.random.key(config.seed), "network", number))


def leaves_by_name(params: Params) -> dict[str, np.ndarray]:
    """Leaves by path, for a file of arrays."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}


def params_from_leaves(network: Network, leaves: Mapping[str, Any]) -> Params:
    """The tree that ``leaves_by_name`` took apart."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return map_named_leaves(lambda name, _: jnp.asarray(leaves[name]), shapes)
