"""What a user of the infinite-width kernels is told."""

import sys

import jax
import jax.numpy as jnp
import pytest

from jaxft.kernels.infinite import arccosine_kernels, infinite_mlp_kernels, ntk_parametrization_preconditioner
from jaxft.kernels.neural_tangents_shim import load_neural_tangents

X = jnp.ones((3, 2))


def infinite(x=X, y=None, *, hidden_layers=2, **options):
    return infinite_mlp_kernels(x, y, hidden_layers=hidden_layers, **options)


INFINITE = {
    "vector": (lambda: infinite(jnp.ones(3)), "matrices of one width, got shapes"),
    "no rows": (lambda: infinite(jnp.ones((0, 2))), "one example a row"),
    "other width": (lambda: infinite(X, jnp.ones((2, 5))), "matrices of one width"),
    "nan": (lambda: infinite(X * jnp.nan), "must be finite"),
    "zero row": (lambda: infinite(X, X * 0), "rows of x and y must not be 0"),
    "negative depth": (lambda: infinite(hidden_layers=-1), "non-negative integer, got -1"),
    "half a layer": (lambda: infinite(hidden_layers=0.5), "non-negative integer"),  # pyright: ignore[reportArgumentType]
    "no closed form": (lambda: infinite(activation="tanh"), "closed form, got 'tanh'. Known: erf, gelu, relu"),
    "slip of the pen": (lambda: infinite(activation="rellu"), "Did you mean relu?"),
    "no variance": (lambda: infinite(w_std=0.0), "w_std must be positive"),
    "negative bias": (lambda: infinite(b_std=-1.0), "b_std must be non-negative"),
    "unknown rates": (lambda: infinite(parameterization="ntc"), "Did you mean ntk?"),
    "no widths": (lambda: infinite(parameterization="standard"), "widths go with"),
    "stray widths": (lambda: infinite(widths=(5, 5)), "only with it, got 'ntk', widths"),
    "output width": (lambda: infinite(parameterization="standard", widths=(5, 5, 1)), "must be 2 positive"),
    "empty layer": (lambda: infinite(parameterization="standard", widths=(5, 0)), "one a hidden layer"),
}


@pytest.mark.parametrize("case", INFINITE)
def test_infinite_kernels_say_what_is_wrong(case):
    call, said = INFINITE[case]
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)
    assert str(error.value).startswith("infinite_mlp_kernels: ")


def test_missing_package_is_an_import_error_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "neural_tangents", None)
    monkeypatch.setattr("jaxft.kernels.infinite.load_neural_tangents", load_neural_tangents.__wrapped__)
    before = set(sys.modules)
    with pytest.raises(ImportError, match=r"infinite_mlp_kernels: needs neural-tangents, got .*\. Run pip install"):
        infinite()
    assert not {name for name in set(sys.modules) - before if name.startswith(("jax.util", "neural_tangents"))}


CLOSED = {
    "vector": (lambda: arccosine_kernels(jnp.ones(3), hidden_layers=1), "matrices of one width"),
    "zero row": (lambda: arccosine_kernels(X * 0, hidden_layers=1), "must not be 0"),
    "infinity": (lambda: arccosine_kernels(X / 0, hidden_layers=1), "must be finite"),
    "negative depth": (lambda: arccosine_kernels(X, hidden_layers=-1), "non-negative"),
    "shapes under jit": (lambda: jax.jit(lambda x: arccosine_kernels(x, hidden_layers=1))(X[0]), "of one width"),
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_form_says_what_is_wrong(case):
    call, said = CLOSED[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("arccosine_kernels: ")


@pytest.mark.parametrize("params", [{"scale": X[0]}, {"Conv_0": {"kernel": jnp.ones((3, 2, 2))}}, X])
def test_preconditioner_refuses_what_is_no_dense_layer(params):
    with pytest.raises(ValueError, match="ntk_parametrization_preconditioner: leaves must be a kernel"):
        ntk_parametrization_preconditioner(params)
