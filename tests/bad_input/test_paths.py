"""What a user reads who gives paths something else than two points of one model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.geometry import (
    eval_path,
    fit_curve,
    init_curve,
    linear_path,
    loss_plane,
    polychain,
    slerp_path,
)

A, B = {"w": jnp.zeros(2), "b": jnp.zeros(3)}, {"w": jnp.ones(2), "b": jnp.ones(3)}


def loss(params, batch):
    return jnp.sum(params["w"] ** 2) + 0 * batch.sum()


@pytest.mark.parametrize("make", [linear_path, slerp_path, init_curve])
@pytest.mark.parametrize(
    ("b", "text"),
    [
        ({"w": jnp.ones(3), "b": jnp.ones(3)}, "w: float32[2] and float32[3]"),
        ({"w": jnp.ones(2), "c": jnp.ones(3)}, "b: only in a; c: only in b"),
        ({"w": jnp.ones(2), "b": jnp.array([1, jnp.nan, 2])}, "b must be finite, got NaN or infinity in b"),
        ({"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3)}, "w: float32[2] and bfloat16[2]"),
    ],
)
def test_ends_that_do_not_match(make, b, text):
    with pytest.raises(ValueError, match=r"trees must match|must be finite") as error:
        make(A, b)
    assert text in str(error.value)


def test_leaves_of_integers():
    with pytest.raises(ValueError, match=r"a must have float leaves, got step. Pass the float leaves alone"):
        linear_path({"step": jnp.array(1)}, {"step": jnp.array(2)})


def test_an_empty_tree():
    with pytest.raises(ValueError, match="a must have leaves, got an empty tree"):
        linear_path({}, {})


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan")])
def test_t_outside_the_path(t):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        linear_path(A, B)(t)


def test_values_of_t_outside_the_path():
    with pytest.raises(ValueError, match=r"eval_path: t must lie in \[0, 1\], got 0 to 2"):
        eval_path(loss, linear_path(A, B), jnp.zeros((1, 1)), ts=np.array([0.0, 2.0]))
    with pytest.raises(ValueError, match="ts must rise"):
        eval_path(loss, linear_path(A, B), jnp.zeros((1, 1)), ts=np.array([1.0, 0.0]))


def test_several_values_of_t_at_once():
    with pytest.raises(ValueError, match=r"t must be a scalar, got shape \(2,\). Use jax.vmap"):
        linear_path(A, B)(jnp.array([0.0, 1.0]))


def test_knots():
    with pytest.raises(ValueError, match="knots must rise from 0 to 1"):
        polychain([A, B, A], knots=np.array([0.0, 0.9, 0.8]))
    with pytest.raises(ValueError, match="there must be a knot a point"):
        polychain([A, B], knots=np.array([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="knots must rise from 0 to 1"):  # in float32, that is
        polychain([A, B, A], knots=np.array([0.0, 1 - 1e-10, 1.0]))
    with pytest.raises(ValueError, match="a path needs two points, got 1"):
        polychain([A])


def test_a_curve_without_bends():
    with pytest.raises(ValueError, match="n_bends must not be negative, got -1"):
        init_curve(A, B, n_bends=-1)
    with pytest.raises(ValueError, match="needs interior points"):
        fit_curve(loss, linear_path(A, B), jnp.zeros((1, 1)), tx=optax.sgd(0.1), steps=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="family must be bezier or polychain, got 'spline'"):
        init_curve(A, B, family="spline")  # pyright: ignore[reportArgumentType]


def test_a_fit_that_diverges_names_its_step():
    with pytest.raises(ValueError, match=r"the loss must stay finite, got .* at step [1-9]"):
        fit_curve(
            lambda p, _: jnp.exp(jnp.sum(p["w"] ** 2)),
            init_curve(A, B),
            jnp.zeros((1, 1)),
            tx=optax.sgd(1e4),
            steps=20,
            key=jax.random.key(0),
        )


def test_batches_and_inner():
    with pytest.raises(ValueError, match="must share a leading axis"):
        eval_path(loss, linear_path(A, B), {"x": jnp.zeros((1, 1)), "y": jnp.zeros((2, 1))})
    with pytest.raises(ValueError, match="inner must be auto, map, vmap or a positive number, got 'scan'"):
        eval_path(loss, linear_path(A, B), jnp.zeros((1, 1)), inner="scan")
    with pytest.raises(ValueError, match="path must be a function of t, got dict"):
        eval_path(loss, A, jnp.zeros((1, 1)))  # pyright: ignore[reportArgumentType]


def test_losses_that_are_no_scalars():
    line = init_curve(A, B)

    def fit(loss_fn):
        fit_curve(loss_fn, line, jnp.zeros((1, 1)), tx=optax.sgd(0.1), steps=1, key=jax.random.key(0))

    with pytest.raises(ValueError, match=r"eval_path: .* a dict of scalars, got loss \(2,\). Take means"):
        eval_path(lambda p, _: p["w"], line, jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"fit_curve: .* a dict of scalars, got loss \(2,\). Take means"):
        fit(lambda p, _: p["w"])
    with pytest.raises(ValueError, match="fit_curve: loss_fn must return a scalar or a dict with loss, got error"):
        fit(lambda p, batch: {"error": loss(p, batch)})


def test_a_plane_through_points_on_a_line():
    with pytest.raises(ValueError, match="three points must span a plane"):
        loss_plane(loss, A, B, linear_path(A, B)(0.25), jnp.zeros((1, 1)))
