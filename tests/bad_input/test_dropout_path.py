"""What a user of the constructive path, of dropout stability and of noise stability is told."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.core.checks import UserError
from jaxft.core.units import UnitAxis, make_permutation_spec
from jaxft.geometry.dropout_line import best_dropout_line, dropout_line, dropout_output_variance
from jaxft.geometry.dropout_path import dropout_path, path_to_dropout, permute_live_units
from jaxft.geometry.dropout_stability import complement_masks, dropout_masks, dropout_params, dropout_stability
from jaxft.geometry.noise_stability import chain_weights, noise_stability
from jaxft.geometry.path_certificate import path_certificate
from jaxft.nn.transformer import EncoderConfig, init_encoder
from jaxft.nn.unit_specs import encoder_spec

LEAVES = {
    "in/kernel": (UnitAxis("first", 1),),
    "mid/kernel": (UnitAxis("first", 0, reads=True), UnitAxis("second", 1)),
    "out/kernel": (UnitAxis("second", 0, reads=True),),
}
SPEC = make_permutation_spec(LEAVES)
A = {"in": {"kernel": jnp.ones((3, 4))}, "mid": {"kernel": jnp.ones((4, 6))}, "out": {"kernel": jnp.ones((6, 2))}}
LEFT = {"first": jnp.arange(4) < 2, "second": jnp.arange(6) < 3}
RIGHT = {group: ~mask for group, mask in LEFT.items()}
CONFIG = EncoderConfig("bert", 9, 4, 3, 2, 8, 5, 2, 1e-12, pad_id=0)
KEY = jax.random.key(0)


def loss(params, x):
    return jnp.mean(x @ params["in"]["kernel"] @ params["mid"]["kernel"] @ params["out"]["kernel"])


def path(a=A, b=A, spec=SPEC, left=LEFT, right=RIGHT, **options):
    return dropout_path(a, b, spec, left, right, **options)


def with_leaf(params, layer, name, value):
    return {**params, layer: {**params[layer], name: value}}


def replaced(**leaves):
    return make_permutation_spec({**LEAVES, **{f"{name}/kernel": axes for name, axes in leaves.items()}})


RESIDUAL = replaced(
    mid=(UnitAxis("first", 0, reads=True), UnitAxis("first", 1)), out=(UnitAxis("first", 0, reads=True),)
)
SQUARE = {"in": {"kernel": jnp.ones((3, 4))}, "mid": {"kernel": jnp.ones((4, 4))}, "out": {"kernel": jnp.ones((4, 2))}}
SKIP = make_permutation_spec({**LEAVES, "skip": (UnitAxis("first", 0, reads=True),)})
LAYER_NORM = make_permutation_spec(LEAVES, normalized={"second"})


def encoder():
    params = init_encoder(CONFIG, key=KEY)
    spec = encoder_spec(params, CONFIG)
    return path_to_dropout(params, spec, dropout_masks(params, spec, key=KEY))


PATHS = {
    "shapes differ": (
        lambda: path(b=with_leaf(A, "mid", "kernel", jnp.ones((4, 5)))),
        r"mid/kernel: float32\[4,6\] and float32\[4,5\]",
    ),
    "a leaf is missing": (lambda: path(b=with_leaf(A, "out", "bias", jnp.ones(2))), "out/bias: only in params_b"),
    "not finite": (
        lambda: path(b=with_leaf(A, "mid", "kernel", A["mid"]["kernel"] * jnp.nan)),
        "infinity in mid/kernel",
    ),
    "more than half": (
        lambda: path(right={**RIGHT, "second": jnp.arange(6) < 4}),
        "masks_b must keep at most half of second, so that its copies have room, got 4 of 6",
    ),
    "nothing kept": (lambda: path(left={**LEFT, "first": jnp.zeros(4, bool)}), "mask of first must keep a unit, got 0"),
    "a layer without mask": (
        lambda: path(left={"first": LEFT["first"]}),
        "masks_a must cover every layer, got none of second",
    ),
    "mask of another size": (lambda: path(left={**LEFT, "first": jnp.ones(5, bool)}), r"got bool\[5\] for bool\[4\]"),
    "mask of numbers": (lambda: path(left={**LEFT, "first": jnp.ones(4)}), r"must be boolean.*got float32\[4\]"),
    "mask of nothing known": (lambda: path(left={**LEFT, "frist": jnp.ones(4, bool)}), "Did you mean first"),
    "layer norm": (
        lambda: path(spec=LAYER_NORM),
        "a norm runs over second, where a dead unit still moves the others. Measure dropout_stability, walk dropout_",
    ),
    "residual stream": (lambda: path(SQUARE, SQUARE, RESIDUAL), r"first reads first \(a residual stream\)"),
    "skip to the outputs": (
        lambda: path({**A, "skip": jnp.ones((4, 2))}, {**A, "skip": jnp.ones((4, 2))}, SKIP),
        "the outputs read first, second",
    ),
    "a transformer": (encoder, "a norm runs over residual, .*heads is stacked over layers.*fit a path with fit_curve"),
    "inner leaf without units": (
        lambda: path({**A, "embed": {"table": jnp.ones(3)}}, {**A, "embed": {"table": jnp.zeros(3)}}),
        "embed/table differ. Name their units",
    ),
    "unknown variant": (lambda: path(variant="sort"), "Did you mean short"),
    "traced masks": (
        lambda: jax.jit(lambda m: len(path(left=m)))(LEFT),
        "masks must be known values, got traced masks. Make the path outside jit",
    ),
    "beyond the end": (lambda: path().breakpoint(10), "between 0 and 9, got 10"),
    "t beyond 1": (lambda: path()(1.5), r"t must lie in \[0, 1\], got 1.5"),
    "t traced": (lambda: jax.jit(path())(0.5), r"Use path.curve\(\)"),
    "a spec of nothing": (lambda: path(spec=make_permutation_spec({})), "a spec without groups"),
    "repeated targets": (
        lambda: permute_live_units(A, SPEC, {"first": [0, 1], "second": [0]}, {"first": [2, 2], "second": [1]}),
        r"targets of first must be different units of 4, at most half, got \[2, 2\]",
    ),
    "live units by fractions": (
        lambda: permute_live_units(A, SPEC, {"first": [0.5], "second": [0]}, {"first": [2], "second": [1]}),
        r"live of first must be different units of 4, at most half, got \[0.5\]",
    ),
    "live units read dead ones": (
        lambda: permute_live_units(A, SPEC, {"first": [0], "second": [0]}, {"first": [2], "second": [1]}),
        "no live unit may read a dead one, got mid/kernel, out/kernel. Start where path_to_dropout ends",
    ),
    "certificate of more than half": (
        lambda: path_certificate(loss, A, A, SPEC, {**LEFT, "first": jnp.arange(4) < 3}, RIGHT, jnp.ones((1, 2, 3))),
        "path_certificate: masks_a must keep at most half of first.*got 3 of 4",
    ),
}


@pytest.mark.parametrize("case", PATHS)
def test_path_says_what_is_wrong(case):
    call, said = PATHS[case]
    with pytest.raises(UserError, match=said):
        call()


def test_faults_of_a_network_are_found_under_jit():
    with pytest.raises(UserError, match="a norm runs over second"):
        jax.jit(lambda a: path_certificate(loss, a, a, LAYER_NORM, LEFT, RIGHT, jnp.ones((1, 2, 3))))(A)


X = jnp.ones((1, 2, 3))
ONE_DRAW = {group: mask[None] for group, mask in LEFT.items()}
EYE = jnp.eye(3)

OTHERS = {
    "keep nothing": (
        lambda: dropout_masks(A, SPEC, key=KEY, keep_frac=0.1),
        "a unit of first must be kept, got 0.1 of 4",
    ),
    "keep more than all": (lambda: dropout_masks(A, SPEC, key=KEY, keep_frac=1.5), r"keep_frac must lie in \(0, 1\]"),
    "unknown group": (lambda: dropout_masks(A, SPEC, key=KEY, groups=["frist"]), "Did you mean first"),
    "drop without a mask": (
        lambda: dropout_params(A, SPEC, LEFT, groups=["second", "third"]),
        "groups must have masks",
    ),
    "no mask": (lambda: dropout_params(A, SPEC, {}), "there must be a mask"),
    "key and masks": (
        lambda: dropout_stability(loss, A, SPEC, X, key=KEY, masks=LEFT),
        "pass a key or masks, got both",
    ),
    "neither": (lambda: dropout_stability(loss, A, SPEC, X), "pass a key or masks"),
    "no draws": (lambda: dropout_stability(loss, A, SPEC, X, key=KEY, draws=0), "draws must be positive"),
    "no axis of draws": (
        lambda: dropout_stability(loss, A, SPEC, X, masks=LEFT),
        r"got bool\[4\] for \[draws\] \+ bool\[4\]",
    ),
    "groups without masks": (
        lambda: dropout_stability(loss, A, SPEC, X, masks=ONE_DRAW, groups=["frist"]),
        "groups must have masks, got 'frist'. Did you mean first",
    ),
    "draws that differ": (
        lambda: dropout_stability(loss, A, SPEC, X, masks={**ONE_DRAW, "first": jnp.ones((2, 4), bool)}),
        r"all groups must have the same draws, one or more, got \[1, 2\]",
    ),
    "no draws of masks": (
        lambda: dropout_stability(loss, A, SPEC, X, masks={g: m[:0] for g, m in ONE_DRAW.items()}),
        r"one or more, got \[0\]",
    ),
    "no masks drawn": (lambda: dropout_masks(A, SPEC, key=KEY, draws=0), "draws must be positive, got 0"),
    "a loss of another name": (
        lambda: dropout_stability(lambda p, x: {"nll": loss(p, x)}, A, SPEC, X, key=KEY),
        "dropout_stability: loss_fn must return a scalar or a dict with loss, got nll",
    ),
    "certificate of another name": (
        lambda: path_certificate(lambda p, x: {"nll": loss(p, x)}, A, A, SPEC, LEFT, RIGHT, X),
        "path_certificate: loss_fn must return a scalar or a dict with loss, got nll",
    ),
    "complement of numbers": (lambda: complement_masks({"first": jnp.ones(4)}), "mask of first must be boolean"),
    "a line of chance 1": (lambda: dropout_line(A, SPEC, LEFT, dropout_frac=1.0), "got 1.0. Pass, say"),
    "a chance of 1": (
        lambda: best_dropout_line(loss, A, SPEC, X, key=KEY, dropout_frac=1.0),
        r"dropout_frac must lie in \[0, 1\), got 1.0",
    ),
    "widths differ": (
        lambda: dropout_output_variance(jnp.ones((2, 3)), jnp.ones((4, 1)), dropout_frac=0.5),
        "hidden and kernel must share the width",
    ),
    "one kernel": (lambda: noise_stability([EYE], EYE, key=KEY), "two kernels or more"),
    "kernels transposed": (
        lambda: noise_stability([jnp.ones((4, 3)), jnp.ones((4, 2))], EYE, key=KEY),
        "follow one another",
    ),
    "inputs of another width": (lambda: noise_stability([EYE, EYE], jnp.ones((2, 4)), key=KEY), r"x must be \[n, 3\]"),
    "unknown noise": (lambda: noise_stability([EYE, EYE], EYE, key=KEY, noise="white"), "gaussian or dropout"),  # pyright: ignore[reportArgumentType]
    "biases": (
        lambda: chain_weights({**A, "bias": jnp.ones(2)}, SPEC),
        "leaves other than kernels must be 0, got bias. Noise stability is defined for networks of kernels alone",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_say_what_is_wrong(case):
    call, said = OTHERS[case]
    with pytest.raises(UserError, match=said):
        call()
