"""Linear probes: what a linear map reads off a representation."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Int

from jaxft.core.checks import require, require_finite
from jaxft.core.types import Params


def fit_linear_probe(
    features: Float[Array, "n d"], labels: Int[Array, "n"], *, classes: int, l2: float = 1e-2
) -> Params:
    r"""Multinomial logistic regression: the minimum of cross-entropy plus $\tfrac{\lambda}{2} \lVert W \rVert^2$.

    Solved by L-BFGS in float64 on features scaled to unit mean square, so that ``l2`` means the same for every
    representation; the returned map applies to the features as given.

    Args:
      features: Representations.
      labels: Class of each example.
      classes: Number of classes, c.
      l2: Regularisation of the weights, > 0, which makes the minimum unique up to a shift of the biases; the biases
        are not regularised.

    Returns:
      ``{"kernel": [d, c], "bias": [c]}`` in the dtype of ``features``: a linear head.

    Raises:
      UserError: ``l2`` not positive, non-finite features, or labels outside the classes.

    Example:
      >>> probe = fit_linear_probe(jnp.array([[1.0], [2.0], [-1.0]]), jnp.array([1, 1, 0]), classes=2)
      >>> bool(probe["kernel"][0, 1] > probe["kernel"][0, 0])
      True

    Reference:
      Malladi et al. 2023, arXiv 2210.05643, section 6: the head of standard fine-tuning starts at this solution.
    """
    where = "fit_linear_probe"
    require(l2 > 0, where, "l2 must be positive", l2, "Use 1e-2 or choose it on a dev set")
    require_finite(where, features, "features")
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    inside = bool(len(y) == len(x) > 0 and y.min() >= 0 and y.max() < classes)
    require(inside, where, f"labels must be one of 0..{classes - 1} an example", y.tolist()[:10], "Check the classes")
    scale = float(np.sqrt(np.mean(x**2))) or 1.0
    design, target = x / scale, np.eye(classes)[y]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = flat[:-classes].reshape(-1, classes), flat[-classes:]
        logits = design @ kernel + bias
        logits -= logits.max(axis=1, keepdims=True)
        log_z = np.log(np.exp(logits).sum(axis=1))
        value = float((log_z - logits[np.arange(len(y)), y]).mean() + l2 / 2 * (kernel**2).sum())
        chi = (np.exp(logits - log_z[:, None]) - target) / len(y)
        return value, np.concatenate([(design.T @ chi + l2 * kernel).ravel(), chi.sum(axis=0)])

    start = np.zeros((x.shape[1] + 1) * classes)
    options = {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-9}
    flat = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    head = {"kernel": flat[:-classes].reshape(-1, classes) / scale, "bias": flat[-classes:]}
    return jax.tree.map(lambda a: jnp.asarray(a, features.dtype), head)
