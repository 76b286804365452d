"""Random maps of gradients: means and variances against enumeration of the formulas, and adapters against autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import (
    empirical_ntk,
    lora_kernel,
    lora_kernel_variance,
    output_jacobian,
    parameter_mask,
    projected_kernel,
    random_projection,
)
from jaxft.kernels.projections import PROJECTIONS, TILE
from jaxft.nn.lora import init_lora, make_lora_outputs

SCALE = 0.5
RANK = 2


def stacked_network(params, x):
    """Two layers on a leading axis, a bias and a readout of two outputs."""
    for i in range(2):
        x = jnp.tanh(jnp.matmul(x, params["layers"][i], precision="highest") + params["bias"][None])
    return jnp.matmul(x, params["out"], precision="highest")


@pytest.fixture
def adaptable(x64):
    draw = np.random.default_rng(2).normal
    params = {"layers": draw(size=(2, 3, 3)), "bias": draw(size=3), "out": draw(size=(3, 2))}
    params = jax.tree.map(jnp.asarray, params)
    return stacked_network, params, jnp.asarray(draw(size=(3, 3))), jnp.asarray(draw(size=(2, 3)))


@pytest.fixture
def adapted(adaptable):
    return parameter_mask(adaptable[1], without=("bias",))


@pytest.fixture
def many_lora(adaptable, adapted):
    return lora_kernel(
        *adaptable, rank=RANK, key=jax.random.key(3), adapted=adapted, scale=SCALE, draws=4000, block_size=2
    )


def linear(w, x):
    return jnp.matmul(x, w, precision="highest")


def pair_of_trees():
    """Two gradients: a stack of matrices, one matrix of the shape of another leaf, a vector. One entry is large."""
    shapes = {"a": (2, 2, 3), "b": (2, 3), "c": (2, 3), "d": (2,)}
    draw = np.random.default_rng(4).normal
    pair = ({name: jnp.asarray(draw(size=shape)) for name, shape in shapes.items()} for _ in range(2))
    return tuple(tree | {"b": tree["b"].at[0, 1].set(2.5)} for tree in pair)


def dense_variance(kind, u, v, k):
    """The variances stated by ``random_projection``, one matrix at a time in numpy."""
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (u, v)]
    square, inner = (flat[0] @ flat[0]) * (flat[1] @ flat[1]), flat[0] @ flat[1]
    if kind != "two_sided":
        return (square + inner**2 - (kind == "rademacher") * 2 * (flat[0] ** 2 @ flat[1] ** 2)) / k
    total = 0.0
    for m, n in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
        for one, other in zip(*(np.reshape(z, (-1, *z.shape[-2:])) for z in (m, n) if z.ndim > 1), strict=True):
            a, b = ((one @ other.T) ** 2).sum(), ((one.T @ other) ** 2).sum()
            last = (one**2).sum() * (other**2).sum() + (one * other).sum() ** 2 + a + b
            total += (a + b + 2 * np.trace(one @ other.T @ one @ other.T)) / k + last / k**2
    return total


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_inner_products_of_features_have_the_stated_mean_and_variance(x64, kind):
    u, v = pair_of_trees()
    project = functools.partial(random_projection, kind=kind)

    @jax.jit
    @jax.vmap
    def inner(key):
        return jnp.vdot(project(u, 3, key=key), project(v, 3, key=key))

    draws = np.asarray(inner(jax.random.split(jax.random.key(5), 40_000)))
    mean = sum(float(np.vdot(a, b)) for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True))
    variance = dense_variance(kind, u, v, 3)
    squares = (draws - mean) ** 2
    assert abs(draws.mean() - mean) < 3.5 * draws.std() / 200
    assert abs(squares.mean() - variance) < 3.5 * squares.std() / 200
    # The check can tell the laws apart: the others' variances are outside its interval.
    for other in PROJECTIONS.keys() - {kind}:
        assert abs(squares.mean() - dense_variance(other, u, v, 3)) > 5 * squares.std() / 200


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_tiles_make_one_map_with_rows_of_their_own(kind):
    """The rows of the map are the projections of unit vectors; a vector is mapped by them all."""
    rows = 2 * TILE + 37
    project = jax.jit(jax.vmap(lambda u: random_projection(u, 16, key=jax.random.key(6), kind=kind)))
    vector = jnp.asarray(np.random.default_rng(7).normal(size=(1, rows)), jnp.float32)
    dense = np.asarray(project(jnp.eye(rows)))
    np.testing.assert_allclose(project(vector), np.asarray(vector) @ dense, rtol=1e-4, atol=1e-4)
    assert dense.var() * 16 == pytest.approx(1, abs=0.05)
    # Sixteen signs coincide for some rows by chance; a repeated tile would halve the number of distinct ones.
    assert len(np.unique(dense, axis=0)) > 0.95 * rows


def test_two_sided_features_keep_vectors_as_they_are(x64):
    u, _ = pair_of_trees()
    features = random_projection(u, 2, key=jax.random.key(8), kind="two_sided")
    assert features.shape == (4 * 4 + 2,)
    np.testing.assert_array_equal(features[-2:], u["d"])


def test_features_are_float32_or_wider():
    half = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    for kind in PROJECTIONS:
        assert random_projection(half, 2, key=jax.random.key(0), kind=kind).dtype == jnp.float32


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_each_draw_is_the_gram_matrix_of_projected_gradients(problem, kind):
    f, params, x, y = problem
    key = jax.random.key(9)
    ours = projected_kernel(f, params, x, y, size=3, key=key, kind=kind, draws=2, block_size=4)
    one = functools.partial(random_projection, size=3, key=jax.random.fold_in(key, 1), kind=kind)
    left, right = (jax.vmap(jax.vmap(one))(output_jacobian(f, params, side)) for side in (x, y))
    assert ours.samples.shape == (2, 7, 3, 5, 3)
    np.testing.assert_allclose(ours.samples[1], np.einsum("nck,mdk->ncmd", left, right), rtol=1e-10, atol=1e-10)


def test_mean_is_the_ntk_of_the_masked_parameters_within_its_error(problem):
    f, params, x, y = problem
    mask = parameter_mask(params, without=("in/b",))
    ours = projected_kernel(f, params, x, y, size=16, key=jax.random.key(10), draws=400, param_mask=mask)
    left, right = (output_jacobian(f, params, side, param_mask=mask) for side in (x, y))
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    exact = sum(np.einsum("ncp,mdp->ncmd", a.reshape(7, 3, -1), b.reshape(5, 3, -1)) for a, b in pairs)
    assert (np.abs(ours.kernel - exact) < 4 * ours.stderr).all()
    whole = np.asarray(empirical_ntk(f, params, x, y))
    assert (np.abs(ours.kernel - whole) > 4 * ours.stderr).any()
    spread = np.std(ours.samples, axis=0, ddof=1) / np.sqrt(400)
    np.testing.assert_allclose(ours.stderr, spread, rtol=1e-10)
    np.testing.assert_allclose(ours.kernel, np.mean(ours.samples, axis=0), rtol=1e-10, atol=1e-12)


def test_error_falls_as_one_over_the_root_of_the_size():
    x = jnp.asarray(np.random.default_rng(11).normal(size=(8, 50)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(x, np.float64).T
    norms = np.sqrt(np.diag(exact))
    sizes = np.array([8, 32, 128, 512, 2048])
    errors = []
    for size in sizes:
        samples = np.asarray(
            projected_kernel(linear, x[0], x, size=int(size), key=jax.random.key(11), draws=16).samples
        )
        errors.append((np.abs(samples - exact[None]) / np.outer(norms, norms)[None]).mean())
    slope, _ = np.polyfit(np.log(sizes), np.log(errors), 1)
    assert abs(slope + 0.5) < 0.1


def test_blocks_rows_and_more_draws_agree(problem):
    f, params, x, _ = problem
    draw = functools.partial(projected_kernel, f, params, x, size=4, key=jax.random.key(12))
    whole = draw(draws=3, block_size=7)
    np.testing.assert_allclose(draw(draws=3, block_size=3).samples, whole.samples, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(draw(y=x, draws=2, block_size=7).samples, whole.samples[:2], rtol=1e-10, atol=1e-12)
    flat = np.asarray(whole.kernel.reshape(21, 21))
    np.testing.assert_allclose(flat, flat.T, rtol=1e-12, atol=1e-12)
    assert np.linalg.eigvalsh(flat).min() > -1e-10


def test_lora_draw_is_the_ntk_of_freshly_initialised_adapters(adaptable, adapted):
    """Autodiff through the adapters, B = 0, at the A of the same key."""
    f, params, x, y = adaptable
    key = jax.random.key(13)
    ours = lora_kernel(f, params, x, y, rank=RANK, key=key, adapted=adapted, scale=SCALE, draws=2)
    f_lora = make_lora_outputs(f, params, scale=SCALE)
    for i in range(2):
        adapters = init_lora(params, adapted, rank=RANK, key=jax.random.fold_in(key, i))
        np.testing.assert_allclose(ours.samples[i], empirical_ntk(f_lora, adapters, x, y), rtol=1e-10, atol=1e-12)


def test_lora_draw_is_the_dense_sum_over_adapted_matrices(adaptable, adapted):
    """The sum of <A^T M_i, A^T M_j> by finite differences and numpy, each layer of the stack with an A of its own."""
    f, params, x, y = adaptable
    key = jax.random.key(14)
    ours = lora_kernel(f, params, x, y, rank=RANK, key=key, adapted=adapted, scale=SCALE, draws=2)
    adapters = init_lora(params, adapted, rank=RANK, key=jax.random.fold_in(key, 0))
    expected = np.zeros((3, 2, 2, 2))
    for name in ("layers", "out"):
        left, right = (finite_differences(f, params, name, side) for side in (x, y))
        a = np.asarray(adapters[name]["lora_a"])
        left, right = (np.einsum("...ir,nc...ij->nc...rj", a, m) for m in (left, right))
        expected += SCALE**2 * np.einsum("ncp,mdp->ncmd", left.reshape(3, 2, -1), right.reshape(2, 2, -1))
    np.testing.assert_allclose(ours.samples[0], expected, rtol=1e-6, atol=1e-8)
    a = np.asarray(adapters["layers"]["lora_a"])
    assert np.abs(a[0] - a[1]).min() > 1e-3


def finite_differences(f, params, name, x):
    """Gradients in one leaf, ``[n, c, ...]``."""
    leaf, columns = params[name], []
    for index in np.ndindex(leaf.shape):
        high, low = (f(params | {name: leaf.at[index].add(s * 1e-5)}, x) for s in (1.0, -1.0))
        columns.append(np.asarray(high - low) / 2e-5)
    return np.stack(columns, -1).reshape(*columns[0].shape, *leaf.shape)


def test_lora_mean_is_the_scaled_ntk_of_the_adapted_matrices_alone(adaptable, adapted, many_lora):
    f, params, x, y = adaptable
    left, right = (output_jacobian(f, params, side, param_mask=adapted) for side in (x, y))
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    exact = SCALE**2 * sum(np.einsum("ncp,mdp->ncmd", a.reshape(3, 2, -1), b.reshape(2, 2, -1)) for a, b in pairs)
    assert (np.abs(many_lora.kernel - exact) < 4 * many_lora.stderr).all()
    whole = SCALE**2 * np.asarray(empirical_ntk(f, params, x, y))
    assert (np.abs(many_lora.kernel - whole) > 4 * many_lora.stderr).any()


def test_lora_variance_is_that_of_the_draws(adaptable, adapted, many_lora):
    variance = lora_kernel_variance(*adaptable, rank=RANK, adapted=adapted, scale=SCALE)
    assert variance.shape == (3, 2, 2, 2)
    squares = np.asarray((many_lora.samples - many_lora.kernel[None]) ** 2)
    error = squares.std(axis=0) / np.sqrt(len(squares))
    assert (np.abs(squares.mean(axis=0) - variance) < 4 * error).all()
    # Tight enough to see a term that is missing: without the trace an entry with itself has half the variance.
    ratio = squares.mean(axis=0) / np.asarray(variance)
    assert abs(ratio.mean() - 1) < 0.05


def test_lora_variance_of_scalar_outputs_and_of_rows_with_themselves(adaptable, adapted):
    f, params, x, _ = adaptable
    full = lora_kernel_variance(f, params, x, x, rank=RANK, adapted=adapted, block_size=2)
    scalar = lora_kernel_variance(lambda p, z: f(p, z)[:, 0], params, x, rank=RANK, adapted=adapted)
    np.testing.assert_allclose(scalar, full[:, 0, :, 0], rtol=1e-10)


def test_float32_under_jit_and_vmap_agrees_with_float64(problem, problem32):
    f, params, x, _ = problem
    mask = parameter_mask(params, without=("in/b",))
    two = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), problem32.params)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def kernels(p, z):
        # Signs are the same draws in both precisions; an A of normals is not.
        signs = projected_kernel(f, p, z, size=4, key=jax.random.key(15), kind="rademacher", draws=2)
        low_rank = lora_kernel(f, p, z, rank=2, key=jax.random.key(15), adapted=mask, draws=2)
        return signs, low_rank, lora_kernel_variance(f, p, z, rank=2, adapted=mask)

    signs, low_rank, variance = kernels(two, problem32.x)
    assert {part.dtype for part in jax.tree.leaves((signs, low_rank, variance))} == {jnp.dtype("float32")}
    assert low_rank.kernel.shape == (2, 7, 3, 7, 3)
    exact = lora_kernel_variance(f, params, x, rank=2, adapted=mask)
    np.testing.assert_allclose(variance[0], exact, rtol=2e-4, atol=1e-5)
    expected = projected_kernel(f, params, x, size=4, key=jax.random.key(15), kind="rademacher", draws=2)
    np.testing.assert_allclose(signs.kernel[0], expected.kernel, rtol=2e-4, atol=1e-4)
