"""What the certificate of the constructive path costs, beside evaluations of the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.core.types import Params
from jaxft.data.images import load_images
from jaxft.geometry.dropout_stability import complement_masks, dropout_masks
from jaxft.geometry.path_certificate import path_certificate
from jaxft.geometry.path_loss import mean_over_batches
from jaxft.nn import make_mlp
from jaxft.nn.unit_specs import mlp_spec
from tests.benchmarks.routes import Route, Row, Run

EVALUATIONS = 20


def certificate_row(*, quick: bool) -> Row:
    """The certificate of two random networks against 20 losses of one of them."""
    width, layers = (32, 2) if quick else (4096, 3)
    init, f = make_mlp((*[width] * layers, 10))

    def loss(params: Params, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(f(params, batch[0]), batch[1]).mean()

    def problem() -> tuple[Params, Params, Any]:
        images = load_images("digits")
        data = jnp.asarray(images.x_train).reshape(1, -1, 64), jnp.asarray(images.y_train)[None]
        return init(jax.random.key(0), 64), init(jax.random.key(1), 64), data

    def certificate() -> Run:
        a, b, data = problem()
        spec = mlp_spec(a)
        masks = dropout_masks(a, spec, key=jax.random.key(2))
        other = complement_masks(masks)
        return lambda: path_certificate(loss, a, b, spec, masks, other, data).maximum

    def evaluations() -> Run:
        a, _, data = problem()
        one = jax.jit(lambda params, data: mean_over_batches(loss, params, data)["loss"])
        return lambda: [float(one(a, data)) for _ in range(EVALUATIONS)]

    found = {f"certificate, {2 * layers + 2} losses": Route(certificate), f"{EVALUATIONS} losses": Route(evaluations)}
    sizes = f"64{f' x {width}' * layers} x 10"
    work = f"An MLP {sizes}, 1,437 images; the exact maximum of the loss on a path of {4 * layers + 1} segments"
    return Row("The certificate of a constructive path", work, found)
