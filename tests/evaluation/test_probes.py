import jax
import jax.numpy as jnp
import numpy as np

from jaxft.evaluation.probes import fit_linear_probe


def test_probe_is_a_stationary_point_of_the_regularised_objective(x64):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(3 * rng.normal(size=(40, 5))), jnp.asarray(rng.integers(3, size=40))
    scale = jnp.sqrt((x**2).mean())

    def objective(head):
        logits = x @ head["kernel"] + head["bias"][None]
        log_p = jax.nn.log_softmax(logits)[jnp.arange(40), y]
        return -log_p.mean() + 0.05 / 2 * ((head["kernel"] * scale) ** 2).sum()

    head = fit_linear_probe(x, y, classes=3, l2=0.05)
    gradient = jax.tree.leaves(jax.grad(objective)(head))
    assert max(float(jnp.abs(g).max()) for g in gradient) < 1e-5
    assert objective(head) < objective(jax.tree.map(jnp.zeros_like, head))


def test_probe_does_not_depend_on_the_scale_of_the_features():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 4)).astype(np.float32), jnp.asarray(rng.integers(2, size=30))
    heads = [fit_linear_probe(jnp.asarray(s * x), y, classes=2) for s in (1.0, 100.0)]
    np.testing.assert_allclose(heads[0]["kernel"], 100 * heads[1]["kernel"], atol=1e-3)
    assert heads[0]["kernel"].dtype == jnp.float32
