"""Convolutional nets whose whole point is one tree of parameters, statistics of the norms among them.

Leaves, for convolution i, dense hidden layer j and the linear output layer:

- ``conv_i/kernel`` ``[height, width, in, out]`` and, with biases, ``conv_i/bias`` ``[out]``;
- with norms, ``norm_i/scale``, ``norm_i/bias``, ``norm_i/mean`` and ``norm_i/var`` ``[out]``;
- ``dense_j/kernel`` ``[in, out]`` and ``dense_j/bias``; ``output/kernel`` and ``output/bias``.

The first dense kernel reads the last map flattened as ``[height, width, channels]``, channels fastest. Groups of units
are ``channels_i`` and ``hidden_j``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import nearest, require
from jaxft.core.rng import stream
from jaxft.core.types import KeyedOutputFn, Params
from jaxft.core.units import named_leaves
from jaxft.nn.convolution import same_convolution
from jaxft.nn.dropout import drop_fractions, dropout
from jaxft.nn.mlp import ACTIVATIONS, Activation

VGG16_WIDTHS: tuple[int | Literal["pool"], ...] = (
    *(64, 64, "pool"),
    *(128, 128, "pool"),
    *(256, 256, 256, "pool"),
    *(512, 512, 512, "pool"),
    *(512, 512, 512, "pool"),
)
"""Convolutions of VGG-16: 32x32 images end as one position of 512 channels. Simonyan & Zisserman, arXiv 1409.1556."""

Pixels = Float[Array | np.ndarray, "..."]
"""Images ``[n, height, width, channels]``, or batches of them."""


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """Shape of a convolutional net; the defaults are those of the three-layer net of arXiv 1906.06247.

    Example:
      >>> ConvConfig((32, 32, 32), 10).channels
      (32, 32, 32)
      >>> ConvConfig(VGG16_WIDTHS, 10, hidden=(512,), use_bias=True, norm=True, dropout_frac=0.1).fractions[-1]
      0.1
    """

    widths: tuple[int | Literal["pool"], ...]
    """Channels of each convolution; ``"pool"`` is a maximum over windows of 2x2."""
    classes: int
    hidden: tuple[int, ...] = ()
    """Widths of dense hidden layers behind the convolutions."""
    activation: Activation = "relu"
    use_bias: bool = False
    norm: bool = False
    """Whether each convolution is followed by a per-channel norm, before the activation."""
    kernel_size: int = 3
    dropout_frac: float | tuple[float, ...] = 0.0
    """Probability with which a whole channel of an example, or a dense hidden unit, is dropped: one for all, or one
    each hidden layer, convolutions first."""
    norm_eps: float = 1e-5

    def __post_init__(self):
        faults = {
            f"widths={self.widths!r}": not self.channels or not all(w == "pool" or _is_size(w) for w in self.widths),
            f"hidden={self.hidden!r}": not all(map(_is_size, self.hidden)),
            f"classes={self.classes!r}": not _is_size(self.classes),
            f"kernel_size={self.kernel_size!r}": not _is_size(self.kernel_size),
            f"norm_eps={self.norm_eps!r}": not self.norm_eps > 0,
        }
        bad = ", ".join(text for text, wrong in faults.items() if wrong)
        rule = "sizes must be positive integers, widths hold one or more beside 'pool', and norm_eps be positive"
        require(not bad, "ConvConfig", rule, bad, "Correct the fields named")
        known, said = self.activation in ACTIVATIONS, nearest(self.activation, ACTIVATIONS)
        require(known, "ConvConfig", "activation must be known", repr(self.activation), said)
        drop_fractions("ConvConfig", self.dropout_frac, len(self.channels) + len(self.hidden))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the convolutions alone."""
        return tuple(w for w in self.widths if w != "pool")

    @property
    def fractions(self) -> tuple[float, ...]:
        """Dropout of each hidden layer, convolutions first."""
        return drop_fractions("ConvConfig", self.dropout_frac, len(self.channels) + len(self.hidden))


class ConvNet(NamedTuple):
    """A convolutional net as pure functions of one parameter tree; images are ``[n, height, width, channels]``."""

    init: Callable[[Array, tuple[int, int, int]], Params]
    """``init(key, (height, width, channels))``: kernels of variance 2 / fan-in, 1 / fan-in for the output; biases 0."""
    f: KeyedOutputFn
    """``f(params, x, *, key=None, train=False)``: logits. With a key it drops channels; with a key or ``train`` the
    norms use the statistics of the batch (so that rows depend on each other), the stored ones get no gradient, and
    gradients are fastest, but there is no forward mode (``jvp``)."""
    units: Callable[[Params, Array], dict[str, Array]]
    """``units(params, x)``: what enters each activation, by group, ``[n, height, width, channels]`` or ``[n, units]``,
    norms applied with stored statistics; and the logits as ``"output"``."""
    statistics: Callable[..., Params]
    """``statistics(params, batches, *, exact=False)``: the point with ``mean`` and ``var`` of the norms re-estimated
    on ``batches`` ``[n_batches, b, height, width, channels]``."""


def make_convnet(config: ConvConfig) -> ConvNet:
    r"""A convolutional net: convolutions of stride 1 that keep the size of the map, pools, dense layers.

    Norms carry their statistics as leaves of the parameters, so that a path through parameters has to say what they
    are at each of its points. Training leaves them where they were (but for weight decay): re-estimate them
    afterwards, and at each point of a path. ``statistics`` pools over all batches, $\mu = E\,z$ and
    $\sigma^2 = E\,z^2 - \mu^2$. By default one pass is made in which the layers below are normalised by the statistics
    of their batch, as in training: this is exact for the first norm. With ``exact`` the layers are taken in order, one
    pass each, and all norms are exact: over the batches, what leaves a norm has mean ``bias`` and variance
    ``scale**2`` (but for ``norm_eps``). Without ``key`` and ``train``, ``f`` differentiates with respect to stored
    statistics too; train with a key.

    Args:
      config: Sizes and options.

    Returns:
      Functions ``init``, ``f``, ``units`` and ``statistics``; all can be compiled and mapped.

    Raises:
      UserError: By the functions: images of another size or dtype, or parameters of another net.

    Example:
      >>> net = make_convnet(ConvConfig((4, "pool", 6), 10, norm=True))
      >>> params = net.init(jax.random.key(0), (8, 8, 1))
      >>> batches = jax.random.uniform(jax.random.key(1), (3, 5, 8, 8, 1))
      >>> params = jax.jit(net.statistics)(params, batches)
      >>> net.f(params, batches[0]).shape, net.units(params, batches[0])["channels_1"].shape
      ((5, 10), (5, 4, 4, 6))

    Reference:
      Kuditipudi et al. 2019, arXiv 1906.06247, experiments on MNIST (the net); Ioffe & Szegedy 2015, arXiv 1502.03167,
      algorithms 1 and 2 (the norm); Garipov et al. 2018, arXiv 1802.10026 (statistics along a path).
    """

    def init(key: Array, image_shape: tuple[int, int, int]) -> Params:
        return _init(config, key, image_shape)

    def f(params: Params, x: Pixels, *, key: Array | None = None, train: bool = False) -> Float[Array, "n c"]:
        normalise = _by_batch if train or key is not None else _by_store
        return _pre_activations(config, params, jnp.asarray(x), normalise, key=key)[0]["output"]

    def units(params: Params, x: Pixels) -> dict[str, Array]:
        return _pre_activations(config, params, jnp.asarray(x), _by_store)[0]

    def statistics(params: Params, batches: Any, *, exact: bool = False) -> Params:
        array = isinstance(batches, jax.Array | np.ndarray)
        got = f"{batches.dtype} {batches.shape}" if array else type(batches).__name__
        rule = "batches must be images [n_batches, b, height, width, channels]"
        fits = array and batches.ndim == 5 and 0 not in batches.shape
        require(fits, "statistics", rule, got, "Stack batches of one size; without the labels")
        layers = tuple(range(len(config.channels))) if config.norm else ()
        for group in [(i,) for i in layers] if exact or not layers else [layers]:
            found = _pooled(config, params, jnp.asarray(batches), group, _by_store if exact else _by_batch)
            params = {**params, **{name: {**params[name], **stored} for name, stored in found.items()}}
        return params

    return ConvNet(init, f, units, statistics)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _init(config: ConvConfig, key: Array, image_shape: tuple[int, int, int]) -> Params:
    fits = len(image_shape) == 3 and all(map(_is_size, image_shape))
    rule = "image_shape must be (height, width, channels)"
    require(fits, "init", rule, image_shape, "Pass the shape of one image")
    params: dict[str, dict[str, Array]] = {}
    for path, shape in _leaf_shapes("init", config, image_shape).items():
        name, leaf = path.split("/")
        if leaf == "kernel":
            draw = jax.nn.initializers.variance_scaling(1.0 if name == "output" else 2.0, "fan_in", "normal")
            value = draw(stream(key, name), shape, jnp.float32)
        else:
            value = jnp.full(shape, float(leaf in ("scale", "var")), jnp.float32)
        params.setdefault(name, {})[leaf] = value
    return params


def _leaf_shapes(where: str, config: ConvConfig, image_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf, by path."""
    pools = config.widths.count("pool")
    height, width, fan_in = image_shape
    rule = f"images must have {2**pools} pixels or more a side for {pools} pools"
    require(min(height, width) >= 2**pools, where, rule, f"{height} x {width}", "Pass larger images or pool less")
    kernels: dict[str, tuple[int, ...]] = {}
    for i, channels in enumerate(config.channels):
        kernels[f"conv_{i}"] = (config.kernel_size, config.kernel_size, fan_in, channels)
        fan_in = channels
    # Halving p times and rounding down is one division by 2^p.
    fan_in = (height >> pools) * (width >> pools) * fan_in
    for j, units in enumerate(config.hidden):
        kernels[f"dense_{j}"], fan_in = (fan_in, units), units
    kernels["output"] = (fan_in, config.classes)
    shapes = {f"{name}/kernel": shape for name, shape in kernels.items()}
    if config.use_bias:
        shapes |= {f"{name}/bias": shape[-1:] for name, shape in kernels.items()}
    if config.norm:
        leaves = ("scale", "bias", "mean", "var")
        shapes |= {f"norm_{i}/{leaf}": (n,) for i, n in enumerate(config.channels) for leaf in leaves}
    return shapes


Normalise = Callable[[Array, dict[str, Array]], tuple[Array, Array]]
"""From what a convolution gives and the leaves of its norm to the mean and variance that the norm uses."""


def _by_store(z: Array, leaves: dict[str, Array]) -> tuple[Array, Array]:
    return leaves["mean"], leaves["var"]


def _by_batch(z: Array, leaves: dict[str, Array]) -> tuple[Array, Array]:
    return z.mean((0, 1, 2)), z.var((0, 1, 2))


def _pre_activations(
    config: ConvConfig, params: Params, x: Array, normalise: Normalise, *, key: Array | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What enters each activation, and the logits, by group; and what enters each norm, by its name."""
    _check(config, params, x)
    activate, units, inputs, i = ACTIVATIONS[config.activation], {}, {}, 0
    for layer in config.widths:
        if layer == "pool":
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            continue
        z = _affine(x, params[f"conv_{i}"], training=normalise is _by_batch)
        if config.norm:
            inputs[f"norm_{i}"] = z
            z = _normalised(z, params[f"norm_{i}"], normalise, config.norm_eps)
        units[f"channels_{i}"] = z
        x = dropout(activate(z), config.fractions[i], key, i, shape=(len(z), 1, 1, z.shape[-1]))
        i += 1
    x = x.reshape(len(x), -1)
    for j in range(len(config.hidden)):
        z = units[f"hidden_{j}"] = _affine(x, params[f"dense_{j}"])
        x = dropout(activate(z), config.fractions[i + j], key, i + j)
    return units | {"output": _affine(x, params["output"])}, inputs


def _affine(x: Array, leaves: dict[str, Array], *, training: bool = False) -> Array:
    """A convolution that keeps the size of the map, or a matrix product, and the bias if there is one."""
    kernel, dtype = leaves["kernel"], jnp.result_type(x, leaves["kernel"])
    if kernel.ndim == 2:
        z = x @ kernel
    else:
        z = same_convolution(x.astype(dtype), kernel.astype(dtype), reverse_only=training)
    return z + jnp.expand_dims(leaves["bias"], tuple(range(z.ndim - 1))) if "bias" in leaves else z


def _normalised(z: Array, leaves: dict[str, Array], normalise: Normalise, eps: float) -> Array:
    mean, var = normalise(z, leaves)
    slope = leaves["scale"] * jax.lax.rsqrt(var + jnp.asarray(eps, var.dtype))
    wide_mean, wide_slope, wide_bias = (a[None, None, None] for a in (mean, slope, leaves["bias"]))
    return (z - wide_mean) * wide_slope + wide_bias


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _pooled(
    config: ConvConfig, params: Params, batches: Array, layers: tuple[int, ...], normalise: Normalise
) -> dict[str, dict[str, Array]]:
    """Mean and variance over all batches of what enters the norms of ``layers``, by name of the norm."""

    def moments(x: Array) -> dict[str, tuple[Array, Array]]:
        # Layers above the last one asked for are dead code to the compiler.
        inputs = _pre_activations(config, params, x, normalise)[1]
        return {f"norm_{i}": _by_batch(inputs[f"norm_{i}"], {}) for i in layers}

    found = jax.lax.map(moments, batches).items()
    # The mean variance and the variance of the means add up to E z^2 - (E z)^2, without its cancellation.
    return {name: {"mean": means.mean(0), "var": within.mean(0) + means.var(0)} for name, (means, within) in found}


def _check(config: ConvConfig, params: Params, x: Array) -> None:
    got, where = f"{x.dtype} {x.shape}", "convnet"
    fits = x.ndim == 4 and 0 not in x.shape and jnp.issubdtype(x.dtype, jnp.floating)
    rule = "x must be floating images [n, height, width, channels]"
    require(fits, where, rule, got, "Divide pixels by 255, and give grey images a last axis of 1")
    shapes = {path: jnp.shape(leaf) for path, leaf in named_leaves(params).items()}
    expected = _leaf_shapes(where, config, x.shape[1:])
    paths = sorted(p for p in expected.keys() | shapes.keys() if expected.get(p) != shapes.get(p))
    faults = [f"{p}: {shapes.get(p, 'missing')} where {expected.get(p, 'none')} is expected" for p in paths]
    shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
    rule = f"params must be those of the net for images {x.shape[1:]}"
    require(not faults, where, rule, shown, "Pass what init gave for images of this shape and this config")
