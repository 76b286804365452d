"""What a user of convolutional nets and of dropout is told."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft.nn.conv import ConvConfig, make_convnet
from jaxft.nn.mlp import make_mlp, make_mlp_units

NET = make_convnet(ConvConfig((2, "pool", 3), 4, norm=True))
PARAMS = NET.init(jax.random.key(0), (6, 6, 1))
X = jnp.ones((5, 6, 6, 1))
OTHER: Any = "rel"
FLAT: Any = (6, 6)
LESS = {name: leaves for name, leaves in PARAMS.items() if name != "conv_1"}

CASES = {
    "no convolution": (lambda: ConvConfig(("pool",), 4), r"widths=\('pool',\)"),
    "unknown marker": (lambda: ConvConfig((4, OTHER), 4), r"widths=\(4, 'rel'\)"),
    "several faults": (
        lambda: ConvConfig((4,), 0, hidden=(0,), kernel_size=0),
        r"hidden=\(0,\), classes=0, kernel_size=0",
    ),
    "unknown activation": (lambda: ConvConfig((4,), 4, activation=OTHER), "Did you mean relu"),
    "dropout of 1": (lambda: ConvConfig((4,), 4, dropout_frac=1.0), r"in \[0, 1\): one number, or one each of the 1"),
    "too few fractions": (lambda: ConvConfig((4, 4), 4, hidden=(3,), dropout_frac=(0.1, 0.2)), "each of the 3 hidden"),
    "shape without channels": (
        lambda: NET.init(jax.random.key(0), FLAT),
        r"\(height, width, channels\), got \(6, 6\)",
    ),
    "too many pools": (
        lambda: NET.init(jax.random.key(0), (6, 1, 1)),
        "2 pixels or more a side for 1 pools, got 6 x 1",
    ),
    "no channel axis": (lambda: NET.f(PARAMS, X[..., 0]), r"got float32 \(5, 6, 6\)\. .*a last axis of 1"),
    "bytes": (lambda: NET.f(PARAMS, X.astype(jnp.uint8)), r"got uint8 .*Divide pixels by 255"),
    "small images": (lambda: NET.f(PARAMS, X[:, :1]), "2 pixels or more a side"),
    "images of another size": (
        lambda: NET.f(PARAMS, X[:, :4]),
        r"output/kernel: \(27, 4\) where \(18, 4\) is expected",
    ),
    "colour": (lambda: NET.f(PARAMS, jnp.ones((5, 6, 6, 3))), r"conv_0/kernel: \(3, 3, 1, 2\) where \(3, 3, 3, 2\)"),
    "missing layer": (lambda: NET.units(LESS, X), r"conv_1/kernel: missing where \(3, 3, 2, 3\)"),
    "a bias too many": (lambda: NET.f(PARAMS | {"extra": jnp.ones(2)}, X), r"extra: \(2,\) where none is expected"),
    "batches not stacked": (
        lambda: NET.statistics(PARAMS, X),
        r"\[n_batches, b, height, width, channels\], got float32",
    ),
    "batches with labels": (
        lambda: NET.statistics(PARAMS, (X[None], jnp.ones((1, 5)))),
        "statistics: batches must be images .*, got tuple. Stack batches of one size; without the labels",
    ),
    "dropout of an MLP": (lambda: make_mlp((4, 2), dropout_frac=-0.1), r"make_mlp: dropout_frac must be in \[0, 1\)"),
    "fractions of an MLP": (lambda: make_mlp((4, 2), dropout_frac=(0.1, 0.1)), "one each of the 1 hidden layers"),
    "units of no net": (lambda: make_mlp_units(()), r"make_mlp_units: widths must be one or more positive integers"),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, words = CASES[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_images_of_another_size_are_refused_under_jit():
    with pytest.raises(ValueError, match="output/kernel"):
        jax.jit(NET.f)(PARAMS, X[:, :4])
