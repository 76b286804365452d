import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.conv import VGG16_WIDTHS, ConvConfig, make_convnet
from jaxft.nn.convolution import same_convolution

DRAW = np.random.default_rng(0)
RICH = ConvConfig((3, "pool", 4, 2, "pool"), 5, hidden=(6,), use_bias=True, norm=True, activation="gelu")
SHAPE = (9, 6, 2)  # odd, so that a pool leaves a row out
BATCHES = jnp.asarray(DRAW.normal(size=(3, 4, *SHAPE)), jnp.float32)
RICH_LEAVES = {
    "conv_0": {"kernel": (3, 3, 2, 3), "bias": (3,)},
    "conv_1": {"kernel": (3, 3, 3, 4), "bias": (4,)},
    "conv_2": {"kernel": (3, 3, 4, 2), "bias": (2,)},
    "norm_0": dict.fromkeys(("scale", "bias", "mean", "var"), (3,)),
    "norm_1": dict.fromkeys(("scale", "bias", "mean", "var"), (4,)),
    "norm_2": dict.fromkeys(("scale", "bias", "mean", "var"), (2,)),
    "dense_0": {"kernel": (2 * 1 * 2, 6), "bias": (6,)},
    "output": {"kernel": (6, 5), "bias": (5,)},
}


def shapes(tree):
    return jax.tree.map(jnp.shape, tree, is_leaf=lambda x: isinstance(x, jax.Array))


def random_params(net, shape):
    """Every leaf away from where ``init`` puts it; variances positive."""
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.3 * draw.normal(size=x.shape), net.init(jax.random.key(0), shape))
    for name, leaves in params.items():
        if name.startswith("norm"):
            leaves["var"] = 0.5 + leaves["var"] ** 2
    return jax.tree.map(jnp.asarray, params)


def doubled(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


NET = make_convnet(RICH)
PARAMS = random_params(NET, SHAPE)
compiled = jax.jit(NET.f, static_argnames="train")
statistics = jax.jit(NET.statistics, static_argnames="exact")


def test_leaves_are_those_of_the_docstring():
    assert shapes(NET.init(jax.random.key(0), SHAPE)) == RICH_LEAVES
    three = make_convnet(ConvConfig((32, 32, 32), 10)).init(jax.random.key(0), (28, 28, 1))
    assert shapes(three) == {
        "conv_0": {"kernel": (3, 3, 1, 32)},
        "conv_1": {"kernel": (3, 3, 32, 32)},
        "conv_2": {"kernel": (3, 3, 32, 32)},
        "output": {"kernel": (28 * 28 * 32, 10)},
    }


def test_vgg16_has_its_thirteen_convolutions():
    net = make_convnet(ConvConfig(VGG16_WIDTHS, 10))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), (32, 32, 3)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 14_710_464 + 512 * 10
    assert sum(name.startswith("conv") for name in params) == 13


def test_kernels_start_with_variance_two_over_fan_in():
    params = make_convnet(ConvConfig((64,), 9)).init(jax.random.key(0), (4, 4, 16))
    assert abs(float(params["conv_0"]["kernel"].var()) * 9 * 16 / 2 - 1) < 0.05
    assert abs(float(params["output"]["kernel"].var()) * 16 * 64 - 1) < 0.05


def loops(params, x):
    """One image through conv - norm - relu - pool - dense, entry by entry."""
    kernel, (height, width, _) = params["conv_0"]["kernel"], x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    norm = {name: np.asarray(leaf) for name, leaf in params["norm_0"].items()}
    maps = np.zeros((height, width, kernel.shape[-1]))
    for i, j in np.ndindex(height, width):
        z = np.einsum("hwi,hwio->o", padded[i : i + 3, j : j + 3], kernel) + params["conv_0"]["bias"]
        maps[i, j] = np.maximum((z - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"], 0)
    pooled = [
        maps[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1)) for i in range(height // 2) for j in range(width // 2)
    ]
    return np.concatenate(pooled) @ params["output"]["kernel"] + params["output"]["bias"]


def test_equals_loops_over_pixels(x64):
    net = make_convnet(ConvConfig((3, "pool"), 4, use_bias=True, norm=True))
    params = doubled(random_params(net, (5, 4, 2)))
    x = DRAW.normal(size=(2, 5, 4, 2))
    np.testing.assert_allclose(net.f(params, jnp.asarray(x)), [loops(params, image) for image in x], rtol=1e-10)


def torch_net(torch, params, config):
    """The same net of torch layers, in double precision, its statistics loaded."""
    layers, i = [], 0
    for width in config.widths:
        if width == "pool":
            layers.append(torch.nn.MaxPool2d(2))
            continue
        kernel, norm = params[f"conv_{i}"]["kernel"], params[f"norm_{i}"]
        conv, batch = torch.nn.Conv2d(*kernel.shape[2:], 3, padding="same"), torch.nn.BatchNorm2d(width, momentum=None)
        conv.weight.data = torch.tensor(np.transpose(kernel, (3, 2, 0, 1)))
        conv.bias.data = torch.tensor(np.array(params[f"conv_{i}"]["bias"]))
        batch.weight.data, batch.bias.data = (torch.tensor(np.array(norm[n])) for n in ("scale", "bias"))
        batch.running_mean, batch.running_var = (torch.tensor(np.array(norm[n])) for n in ("mean", "var"))
        layers += [conv, batch, torch.nn.GELU()]
        i += 1
    channels, area = config.channels[-1], params["dense_0"]["kernel"].shape[0] // config.channels[-1]
    first = np.asarray(params["dense_0"]["kernel"]).reshape(area, channels, -1).transpose(1, 0, 2)
    kernels = [first.reshape(area * channels, -1), np.asarray(params["output"]["kernel"])]
    dense = []
    for kernel, name in zip(kernels, ("dense_0", "output"), strict=True):
        layer = torch.nn.Linear(*kernel.shape)
        layer.weight.data = torch.tensor(kernel.T.copy())
        layer.bias.data = torch.tensor(np.array(params[name]["bias"]))
        dense.append(layer)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), dense[0], torch.nn.GELU(), dense[1])


@pytest.mark.oracle
@pytest.mark.parametrize("train", [False, True])
def test_equals_torch_with_gradients(train, x64):
    torch = pytest.importorskip("torch", reason="the oracle of this test is torch")
    params, x = doubled(PARAMS), BATCHES[0].astype(jnp.float64)
    theirs = torch_net(torch, params, RICH).train(train)
    out = theirs(torch.tensor(np.transpose(x, (0, 3, 1, 2))))
    (out**2).sum().backward()
    ours, pull = jax.vjp(jax.jit(lambda p: NET.f(p, x, train=train)), params)
    (grads,) = pull(2 * ours)
    np.testing.assert_allclose(ours, out.detach().numpy(), rtol=1e-9, atol=1e-12)
    for i, layer in enumerate(m for m in theirs if isinstance(m, torch.nn.Conv2d)):
        np.testing.assert_allclose(
            grads[f"conv_{i}"]["kernel"], layer.weight.grad.permute(2, 3, 1, 0), rtol=1e-8, atol=1e-10
        )
    for i, layer in enumerate(m for m in theirs if isinstance(m, torch.nn.BatchNorm2d)):
        np.testing.assert_allclose(grads[f"norm_{i}"]["scale"], layer.weight.grad, rtol=1e-8, atol=1e-10)


def test_training_ignores_stored_statistics_and_gives_them_no_gradient():
    moved = jax.tree_util.tree_map_with_path(lambda p, x: x + 1 if p[-1].key in ("mean", "var") else x, PARAMS)
    assert jnp.array_equal(compiled(PARAMS, BATCHES[0], train=True), compiled(moved, BATCHES[0], train=True))
    assert not jnp.allclose(compiled(PARAMS, BATCHES[0]), compiled(moved, BATCHES[0]), atol=1e-2)
    grads = jax.jit(jax.grad(lambda p: (NET.f(p, BATCHES[0], key=jax.random.key(0)) ** 2).sum()))(PARAMS)
    stored = [(n, leaf) for n in ("norm_0", "norm_1", "norm_2") for leaf in ("mean", "var")]
    assert not any(grads[n][leaf].any() for n, leaf in stored)
    assert all(grads[n]["scale"].any() for n in ("norm_0", "norm_1", "norm_2"))


def test_statistics_of_the_first_norm_are_those_of_all_images_at_once(x64):
    params, batches = doubled(PARAMS), BATCHES.astype(jnp.float64)
    found = statistics(params, batches)
    images = batches.reshape(-1, *SHAPE)
    first = make_convnet(ConvConfig((3,), 5, use_bias=True, kernel_size=3))
    z = first.units(
        {"conv_0": params["conv_0"], "output": {"kernel": jnp.zeros((162, 5)), "bias": jnp.zeros(5)}}, images
    )
    raw = z["channels_0"]
    np.testing.assert_allclose(found["norm_0"]["mean"], raw.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(found["norm_0"]["var"], (raw**2).mean((0, 1, 2)) - raw.mean((0, 1, 2)) ** 2, rtol=1e-10)
    kept = lambda tree: {n: {k: v for k, v in x.items() if k not in ("mean", "var")} for n, x in tree.items()}  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, kept(found), kept(params))))


def test_statistics_of_one_batch_make_evaluation_equal_training():
    for exact in (False, True):
        params = statistics(PARAMS, BATCHES[:1], exact=exact)
        np.testing.assert_allclose(
            compiled(params, BATCHES[0]), compiled(PARAMS, BATCHES[0], train=True), rtol=2e-4, atol=1e-5
        )


def test_exact_statistics_give_every_norm_its_bias_and_scale(x64):
    config = dataclasses.replace(RICH, norm_eps=1e-14)
    net, params = make_convnet(config), doubled(PARAMS)
    batches = BATCHES.astype(jnp.float64)

    def after(exact):
        return net.units(net.statistics(params, batches, exact=exact), batches.reshape(-1, *SHAPE))

    units, rough = jax.jit(after, static_argnums=0)(True), jax.jit(after, static_argnums=0)(False)
    for i in range(3):
        z, norm = units[f"channels_{i}"], params[f"norm_{i}"]
        np.testing.assert_allclose(z.mean((0, 1, 2)), norm["bias"], atol=1e-10)
        np.testing.assert_allclose(z.std((0, 1, 2)), abs(norm["scale"]), rtol=1e-10)
    # The default is exact for the first norm alone.
    assert abs(rough["channels_1"].mean((0, 1, 2)) - params["norm_1"]["bias"]).max() > 1e-4


def test_statistics_can_be_mapped_over_points_of_a_path():
    other = jax.tree.map(lambda a: a[::-1], PARAMS["conv_0"])

    def at(t):
        point = PARAMS | {"conv_0": jax.tree.map(lambda a, b: (1 - t) * a + t * b, PARAMS["conv_0"], other)}
        return statistics(point, BATCHES)["norm_2"]

    mapped = jax.jit(lambda ts: jax.lax.map(at, ts))(jnp.array([0.0, 0.5]))
    for i, t in enumerate((0.0, 0.5)):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), mapped, at(t))


def test_without_norms_statistics_change_nothing():
    net = make_convnet(ConvConfig((3,), 5))
    params = net.init(jax.random.key(0), SHAPE)
    assert net.statistics(params, BATCHES) is params


def test_units_are_what_enters_the_activations():
    units = jax.jit(NET.units)(PARAMS, BATCHES[0])
    assert {group: z.shape[1:] for group, z in units.items()} == {
        "channels_0": (9, 6, 3),
        "channels_1": (4, 3, 4),
        "channels_2": (4, 3, 2),
        "hidden_0": (6,),
        "output": (5,),
    }
    maps = jax.nn.gelu(units["channels_2"], approximate=False)[:, :, :2].reshape(4, 2, 2, 1, 2, 2).max((2, 4))
    hidden = maps.reshape(4, -1) @ PARAMS["dense_0"]["kernel"] + PARAMS["dense_0"]["bias"][None]
    np.testing.assert_allclose(units["hidden_0"], hidden, rtol=1e-5, atol=1e-5)
    out = jax.nn.gelu(hidden, approximate=False) @ PARAMS["output"]["kernel"] + PARAMS["output"]["bias"][None]
    np.testing.assert_allclose(compiled(PARAMS, BATCHES[0]), out, rtol=1e-5, atol=1e-5)


def test_dropout_takes_whole_channels_of_each_example_at_its_rate():
    config = ConvConfig((3, 2), 4, dropout_frac=(0.3, 0.0))
    net = make_convnet(config)
    params = net.init(jax.random.key(0), (4, 4, 1))
    x = jnp.asarray(DRAW.normal(size=(2, 4, 4, 1)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 400)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: net.f(params, x, key=key)))(keys))
    masks = np.array(list(itertools.product([0, 1], repeat=3)))

    def dropped(mask):
        readers = params["conv_1"]["kernel"] * (mask / 0.7)[None, None, :, None]
        return net.f(params | {"conv_1": {"kernel": readers}}, x)

    possible = np.stack([jax.jit(dropped)(mask) for mask in masks.astype(np.float32)])
    gaps = np.abs(draws[:, None] - possible[None]).max(-1)  # draw, mask, example
    assert gaps.min(1).max() < 1e-4
    which = gaps.argmin(1)
    kept = masks[which].mean((0, 1))
    np.testing.assert_allclose(kept, 0.7, atol=5 * np.sqrt(0.21 / 800))
    assert (which[:, 0] != which[:, 1]).any()  # examples draw for themselves
    np.testing.assert_allclose(draws[7], net.f(params, x, key=keys[7]), atol=1e-5)


def test_images_may_be_numpy_arrays():
    np.testing.assert_array_equal(compiled(PARAMS, BATCHES[0]), compiled(PARAMS, np.asarray(BATCHES[0])))


def test_a_key_without_dropout_is_training_mode():
    np.testing.assert_array_equal(
        compiled(PARAMS, BATCHES[0], key=jax.random.key(0)), compiled(PARAMS, BATCHES[0], train=True)
    )


@pytest.mark.parametrize("size", [(3, 3), (2, 4), (1, 1), (5, 3)])
def test_derivatives_by_patches_are_those_of_the_convolution(size, x64):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = (jax.random.normal(k, (2, 5, 6, 3), jnp.float64) for k in keys[:2])
    kernel, dkernel = (jax.random.normal(k, (*size, 3, 4), jnp.float64) for k in keys[2:])

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = jax.jvp(same_convolution, (x, kernel), (dx, dkernel))
    np.testing.assert_allclose(found, jax.jvp(plain, (x, kernel), (dx, dkernel)), rtol=1e-12, atol=1e-12)
    by_reverse = [
        jax.grad(lambda x, k, f=f: (f(x, k) ** 2).sum(), (0, 1))(x, kernel)
        for f in (plain, same_convolution, functools.partial(same_convolution, reverse_only=True))
    ]
    for found in by_reverse[1:]:
        for ours, theirs in zip(found, by_reverse[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
