"""The constructive path: its ends, its number of segments, what each move leaves as it is, and the certificate."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.units import UnitAxis, make_permutation_spec, map_named_leaves, named_leaves
from jaxft.geometry import unit_sequences
from jaxft.geometry.dropout_path import check_moves, dropout_path, path_to_dropout, permute_live_units
from jaxft.geometry.dropout_stability import complement_masks, dropout_masks, dropout_params
from jaxft.geometry.path_certificate import path_certificate
from jaxft.geometry.unit_chain import unit_chain
from jaxft.geometry.unit_moves import along
from jaxft.geometry.unit_sequences import moves_to_dropout
from jaxft.nn import make_mlp
from jaxft.nn.conv import ConvConfig, make_convnet
from jaxft.nn.unit_specs import conv_spec, mlp_spec

dropout_paths = importlib.import_module("jaxft.geometry.dropout_path")  # the package has a function of that name


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def drawn(draw, path, shape):
    """Kernels of variance 2 / fan-in; biases and scales about 0.3; variances of at least 1."""
    if path.endswith("kernel"):
        return jnp.asarray(draw.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])))
    return jnp.asarray(path.endswith("var") + 0.3 * draw.normal(size=shape) ** 2)


class Case:
    """Two random networks of one shape with biases, their spec, masks and data."""

    def __init__(self, init, f, spec_of, shape, x):
        self.f, self.x = f, x
        ends = []
        for seed in (0, 1):
            draw, shapes = np.random.default_rng(seed), jax.eval_shape(lambda key: init(key, shape), jax.random.key(0))
            params = map_named_leaves(lambda path, leaf, d=draw: drawn(d, path, leaf.shape), shapes)
            ends.append(params)
        self.a, self.b = ends
        self.spec = spec_of(self.a)
        self.masks = dropout_masks(self.a, self.spec, key=jax.random.key(2))
        self.disjoint = complement_masks(self.masks)
        self.overlapping = dropout_masks(self.a, self.spec, key=jax.random.key(3))
        self.labels = jnp.arange(x.shape[0]) % 3
        self.batches = x[None], self.labels[None]

        self.loss, self.square = self._cross_entropy, self._square  # the same objects, which are compiled once

    def _cross_entropy(self, params, batch):
        return cross_entropy(self.f(params, batch[0]), batch[1])

    def _square(self, params, batch):
        return jnp.mean((self.f(params, batch[0]) - jax.nn.one_hot(batch[1], 3, dtype=batch[0].dtype)) ** 2)


@functools.cache
def mlp(hidden, width=6):
    init, f = make_mlp((*[width] * hidden, 3), activation="gelu")
    with jax.enable_x64(True):
        return Case(init, f, mlp_spec, 4, jax.random.normal(jax.random.key(7), (8, 4), float))


@functools.cache
def conv(norm=True):
    net = make_convnet(ConvConfig((8, "pool", 8, 8), 3, hidden=(6,), use_bias=True, norm=norm))
    with jax.enable_x64(True):
        return Case(net.init, net.f, conv_spec, (4, 4, 2), jax.random.normal(jax.random.key(7), (4, 4, 4, 2), float))


@pytest.fixture
def case(x64, request):
    return request.param()


EVERY = pytest.mark.parametrize(
    "case",
    [functools.partial(mlp, 1), functools.partial(mlp, 2, 7), functools.partial(mlp, 3), conv],
    ids=["one layer", "two layers of odd width", "three layers", "convolutions, norms, pool, dense"],
    indirect=True,
)


@EVERY
@pytest.mark.parametrize("variant", ["short", "paper"])
@pytest.mark.parametrize("overlap", [False, True])
def test_path_has_its_ends_its_number_of_segments_and_its_moves(case, variant, overlap):
    masks_b = case.overlapping if overlap else case.disjoint
    path = dropout_path(case.a, case.b, case.spec, case.masks, masks_b, variant=variant)
    layers = len(case.masks)
    assert len(path) == (8 * layers + 4 if variant == "paper" else 4 * layers + (3 if overlap else 1))
    points = list(path)
    assert points[0] is case.a
    assert points[-1] is case.b
    found = check_moves(case.f, path, case.x)
    assert found.deviations.shape == (len(path),)
    assert found.deviations.max() <= 1e-10 * found.scale
    assert path.kinds.count("top") == 2 * layers + 1


def grid_losses(loss, path, batch):
    """Losses at five points of every segment, ``[segments, 5]``."""

    @jax.jit
    def on_segment(p, q):
        return jax.lax.map(
            lambda u: loss(jax.tree.map(lambda x, y: x + u * (y - x), p, q), batch), jnp.linspace(0, 1, 5)
        )

    return np.stack([on_segment(p, q) for p, q in itertools.pairwise(path)])


def check_certificate(case, loss, masks_b):
    """The certificate against a grid that is convex where the top layer moves."""
    path = dropout_path(case.a, case.b, case.spec, case.masks, masks_b)
    found = path_certificate(loss, case.a, case.b, case.spec, case.masks, masks_b, case.batches)
    grid = grid_losses(loss, path, (case.x, case.labels))
    np.testing.assert_allclose(grid.max(), found.maximum, rtol=1e-9)
    np.testing.assert_allclose([grid[0, 0], grid[-1, -1]], [found.loss_a, found.loss_b], rtol=1e-10)
    assert found.maximum <= found.bound + 1e-12
    for kind, piece in zip(path.kinds, grid, strict=True):
        chord = np.linspace(piece[0], piece[-1], 5)
        assert (piece <= chord + 1e-9).all() if kind == "top" else np.ptp(piece) < 1e-9


@EVERY
def test_certificate_is_the_maximum_over_a_fine_grid(case):
    check_certificate(case, case.loss, case.overlapping)


def test_certificate_of_a_squared_loss_with_disjoint_masks(x64):
    case = mlp(2, 7)
    check_certificate(case, case.square, case.disjoint)


@EVERY
def test_breakpoints_come_one_by_one_and_share_what_does_not_move(case):
    path = dropout_path(case.a, case.b, case.spec, case.masks, case.overlapping)
    points = list(path)
    for i in range(len(path) + 1):
        assert same(path.breakpoint(i), points[i])
    top = {leaf.path for leaf in path.chain.top} | set(path.chain.loose)
    for kind, (p, q) in zip(path.kinds, itertools.pairwise(points), strict=True):
        changed = {
            name
            for (name, x), y in zip(named_leaves(p).items(), named_leaves(q).values(), strict=True)
            if (x != y).any()
        }
        assert changed <= top if kind == "top" else not changed & set(path.chain.loose)


@EVERY
@pytest.mark.parametrize("variant", ["short", "paper"])
def test_path_to_dropout_goes_through_every_dropout_network(case, variant):
    path = path_to_dropout(case.a, case.spec, case.masks, variant=variant)
    groups = path.chain.groups
    assert len(path) == {"short": 2 * len(groups) - 1, "paper": 4 * len(groups) - 2}[variant]
    seen = [case.f(point, case.x) for kind, point in zip(("", *path.kinds), path, strict=True) if kind in ("", "top")]
    for start, got in enumerate(seen):
        want = dropout_params(case.a, case.spec, case.masks, groups=groups[len(groups) - start :])
        np.testing.assert_allclose(got, case.f(want, case.x), rtol=1e-9, atol=1e-12)
    assert len(seen) == len(groups) + 1
    if variant == "paper":
        end = named_leaves(path.breakpoint(len(path)))
        want = named_leaves(dropout_params(case.a, case.spec, case.masks))
        for group, leaves in path.chain.layers.items():
            for leaf in leaves:
                assert leaf.produces is not None
                kept = along(case.masks[group], end[leaf.path].shape, leaf.produces)
                np.testing.assert_allclose(end[leaf.path], np.where(kept, want[leaf.path], 0))


@EVERY
def test_live_units_are_permuted_in_five_flat_segments(case):
    path = path_to_dropout(case.a, case.spec, case.masks)
    end = path.breakpoint(len(path))
    _, live = moves_to_dropout(path.chain, {g: np.flatnonzero(m) for g, m in case.masks.items()})
    draw = np.random.default_rng(0)
    targets = {g: draw.permutation(path.chain.counts[g])[: len(units)] for g, units in live.items()}
    moved = permute_live_units(end, case.spec, live, targets)
    assert moved.kinds == ("dead", "switch", "dead", "switch", "dead")
    found = check_moves(case.f, moved, case.x)
    assert found.deviations.max() <= 1e-10 * found.scale
    final = named_leaves(moved.breakpoint(5))
    for group, leaves in moved.chain.layers.items():
        for leaf in leaves:
            assert leaf.produces is not None
            shape = final[leaf.path].shape
            rest = ~np.isin(np.arange(moved.chain.counts[group]), targets[group])
            assert not np.where(along(rest, shape, leaf.produces), final[leaf.path], 0).any()


def test_points_between_lie_on_segments(x64):
    case = mlp(2)
    path = dropout_path(case.a, case.b, case.spec, case.masks, case.disjoint)
    curve = path.curve()
    assert same(path(0.0), case.a)
    assert same(path(1.0), case.b)
    for t in (0.1, 4 / 9, 0.77):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), path(t), curve(t))


def test_masks_may_keep_different_numbers(x64):
    case = mlp(3)
    few = dropout_masks(case.a, case.spec, key=jax.random.key(5), keep_frac=0.34)
    for first, second in ((few, case.masks), (case.masks, few), (few, complement_masks(few))):
        path = dropout_path(case.a, case.b, case.spec, first, second)
        found = check_moves(case.f, path, case.x)
        assert found.deviations.max() <= 1e-10 * found.scale


def test_float32_moves_are_flat_to_rounding():
    case = mlp(2)
    a, b = (jax.tree.map(lambda x: x.astype(jnp.float32), p) for p in (case.a, case.b))
    path = dropout_path(a, b, case.spec, case.masks, case.overlapping)
    assert all(x.dtype == jnp.float32 for point in path for x in jax.tree.leaves(point))
    found = check_moves(case.f, path, case.x.astype(jnp.float32))
    assert found.deviations.max() <= 1e-4 * found.scale


@pytest.mark.parametrize("fault", ["rescale", "live row", "overlap"])
def test_moves_that_are_not_flat_are_seen(x64, fault, monkeypatch):
    """A scale forgotten inside, a row overwritten that is read, B's rows written over A's live ones."""
    case = mlp(2)
    if fault == "overlap":
        monkeypatch.setattr(dropout_paths, "relocating_moves", lambda *_: [])
        path = dropout_path(case.a, case.b, case.spec, case.masks, case.overlapping)
    elif fault == "live row":
        monkeypatch.setattr(unit_sequences, "_spare", lambda count, kept, prefer: np.roll(kept, 1))
        path = dropout_path(case.a, case.b, case.spec, case.masks, case.disjoint)
    else:
        path = dropout_path(case.a, case.b, case.spec, case.masks, case.disjoint)
        seen = case.f(path.breakpoint(3), case.x)
        forgotten = dropout_params(case.a, case.spec, case.masks, rescale=False)
        assert np.abs(seen - case.f(forgotten, case.x)).max() > 1e-2
        return
    found = check_moves(case.f, path, case.x)
    assert found.deviations.max() > 1e-3 * found.scale


def test_certificate_says_where_it_is_vacuous(x64):
    case = mlp(2)
    line = float(grid_losses(case.loss, (case.a, case.b), (case.x, case.labels)).max())
    args = case.loss, case.a, case.b, case.spec, case.masks, case.disjoint, case.batches
    found = path_certificate(*args, baseline=line)
    assert bool(found.vacuous) == bool(found.maximum >= line)
    assert bool(path_certificate(*args, baseline=float(found.maximum)).vacuous)
    assert not bool(path_certificate(*args, baseline=float(found.maximum) + 1e-6).vacuous)
    assert path_certificate(*args).vacuous is None


def test_certificate_under_jit_with_traced_masks_is_the_same(x64):
    case = mlp(2)

    def certify(a, b, first, second):
        return path_certificate(case.loss, a, b, case.spec, first, second, case.batches)

    args = case.a, case.b, case.masks, case.disjoint
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), certify(*args), jax.jit(certify)(*args))


def test_gated_units_are_a_chain(x64):
    """Two kernels that read one layer and give one layer: a unit is a row of both."""
    spec = make_permutation_spec(
        {
            "in": (UnitAxis("first", 1),),
            "gate": (UnitAxis("first", 0, reads=True), UnitAxis("second", 1)),
            "up": (UnitAxis("first", 0, reads=True), UnitAxis("second", 1)),
            "out": (UnitAxis("second", 0, reads=True),),
        }
    )

    def f(p, x):
        h = jnp.tanh(x @ p["in"])
        return (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["out"]

    shapes = {"in": (3, 6), "gate": (6, 4), "up": (6, 4), "out": (4, 2)}
    a, b = ({n: jnp.asarray(np.random.default_rng(s).normal(size=z)) for n, z in shapes.items()} for s in (0, 1))
    masks = dropout_masks(a, spec, key=jax.random.key(0))
    path = dropout_path(a, b, spec, masks, complement_masks(masks))
    found = check_moves(f, path, jnp.asarray(np.random.default_rng(2).normal(size=(5, 3))))
    assert len(path) == 9
    assert found.deviations.max() <= 1e-10 * found.scale


def test_layers_are_put_in_the_order_in_which_they_read():
    spec = make_permutation_spec(
        {
            "out": (UnitAxis("top", 0, reads=True),),
            "mid": (UnitAxis("top", 1), UnitAxis("bottom", 0, reads=True)),
            "in": (UnitAxis("bottom", 1),),
        }
    )
    chain = unit_chain({"out": np.zeros((4, 1)), "mid": np.zeros((6, 4)), "in": np.zeros((2, 6)), "b": 0.0}, spec)
    assert chain.groups == ("bottom", "top")
    assert chain.loose == ("b",)
