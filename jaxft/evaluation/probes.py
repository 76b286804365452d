"""Probes: what a linear map, or a network of one hidden layer, reads off representations."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Float, Int

from jaxft.core.checks import nearest, require, require_finite
from jaxft.core.rng import stream
from jaxft.core.types import Params
from jaxft.nn.mlp import make_mlp
from jaxft.train.transforms import make_schedule

Objective = Literal["squared", "logistic", "cross_entropy"]


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


class Probes(NamedTuple):
    """Probes of several representations, as arrays: one function ``probe_outputs`` reads them all."""

    params: Params
    """Leaves ``[l, repeats, ...]``: a linear map or a network with one hidden layer."""
    mean: Float[Array, "l 1 d"]
    """Of the training features; a probe reads features that are centred and scaled to unit variance."""
    scale: Float[Array, "l 1 d"]
    loss: Float[Array, "l repeats"]
    """Training objective over the last tenth of the steps."""


def fit_probes(
    features: Float[Array | np.ndarray, "l n d"],
    targets: Float[Array | np.ndarray, "n c"] | Int[Array | np.ndarray, "n"],
    *,
    key: Array,
    objective: Objective = "squared",
    hidden: int | None = None,
    classes: int | None = None,
    repeats: int = 1,
    steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-3,
    execution: Literal["auto", "map", "vmap"] = "auto",
) -> Probes:
    r"""Linear probes, or probes with one hidden layer, of every layer's features, trained by AdamW in one program.

    The objective is the mean over examples of $\tfrac12 \lVert f(z) - y \rVert^2$ (``squared``), of the cross-entropy
    of $\sigma(f(z))$ with targets in [0, 1] (``logistic``), or of that of $\operatorname{softmax} f(z)$ with classes
    (``cross_entropy``); $z$ are standardised features. All layers see the same batches.

    Args:
      features: Representations of the same examples in l layers.
      targets: Numbers ``[n, c]``, or classes ``[n]`` for ``cross_entropy``.
      key: Random key of starting points and batches.
      objective: What is minimised.
      hidden: Width of the hidden layer; ``None`` is the linear probe.
      classes: Number of classes; ``None`` is the largest target and one. For ``cross_entropy`` alone.
      repeats: Probes a layer, from different starting points.
      steps: Updates.
      batch_size: Examples an update.
      learning_rate: Peak; a tenth of the steps warm up, then it falls to 0.
      weight_decay: Decoupled, of all parameters.
      execution: One probe after the other, or all at once. ``auto``: the former on CPU, where it costs less.

    Returns:
      The probes.

    Raises:
      UserError: Sizes that do not fit, targets outside the range of the objective, or features that are not finite.

    Example:
      >>> x = jnp.linspace(-1.0, 1.0, 32).reshape(1, 32, 1)
      >>> y = (x[0] > 0).astype(x.dtype)
      >>> probes = fit_probes(x, y, key=jax.random.key(0), objective="logistic", steps=200, learning_rate=0.1)
      >>> np.asarray(probe_outputs(probes, x, objective="logistic"))[0, 0, [0, 31], 0].round(1)
      array([0., 1.], dtype=float32)

    Reference:
      Hewitt and Liang 2019, arXiv 1909.03368, section 3; decoupled decay: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    where = "fit_probes"
    x, y = jnp.asarray(features), np.asarray(targets)
    _check_targets(where, x, y, objective)
    positive = {"repeats": repeats, "steps": steps, "batch_size": batch_size, "hidden": 1 if hidden is None else hidden}
    require(min(positive.values()) >= 1, where, "sizes must be positive", positive, "Pass 1 or more of each")
    known = execution in ("auto", "map", "vmap")
    require(known, where, "execution must be auto, map or vmap", repr(execution), "Leave it at auto")
    if objective == "cross_entropy":
        classes = int(y.max()) + 1 if classes is None else classes
        fits = bool(y.min() >= 0 and y.max() < classes)
        require(fits, where, f"labels must lie in 0..{classes - 1}", f"{y.min()}..{y.max()}", "Pass classes")
    outputs = classes if objective == "cross_entropy" else y.shape[1]
    widths = (outputs,) if hidden is None else (hidden, outputs)
    mode = ("map" if jax.default_backend() == "cpu" else "vmap") if execution == "auto" else execution
    y = jnp.asarray(y) if objective == "cross_entropy" else jnp.asarray(y, x.dtype)
    return _fit(x, y, key, learning_rate, weight_decay, (widths, objective, repeats, steps, batch_size, mode))


@functools.partial(jax.jit, static_argnums=5)
def _fit(x: Array, y: Array, key: Array, learning_rate: Any, weight_decay: Any, static: tuple) -> Probes:
    widths, objective, repeats, steps, batch_size, mode = static
    init, f = make_mlp(widths, activation="gelu")
    mean = x.mean(axis=1, keepdims=True)
    deviation = x.std(axis=1, keepdims=True)
    # A feature that never varies carries nothing; divided by its rounding error it would.
    scale = jnp.where(deviation > 1e-6 * (1 + jnp.abs(mean)), deviation, 1)
    tx = optax.adamw(
        lambda step: learning_rate * make_schedule(1.0, steps, kind="linear", warmup_frac=0.1)(step),
        weight_decay=weight_decay,
    )

    def loss(params: Params, z: Array, target: Array) -> Array:
        return _losses(objective, f(params, z), target).mean()

    def one(layer: Array, repeat: Array) -> tuple[Params, Array]:
        start = stream(jax.random.fold_in(key, repeat), "start")
        params = init(start, x.shape[2])

        def update(state: tuple, step: Array) -> tuple[tuple, Array]:
            params, opt_state = state
            batch_key = jax.random.fold_in(stream(jax.random.fold_in(key, repeat), "batches"), step)
            rows = jax.random.randint(batch_key, (batch_size,), 0, x.shape[1])
            z = (x[layer, rows] - mean[layer]) / scale[layer]
            value, grads = jax.value_and_grad(loss)(params, z, y[rows])
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        (params, _), losses = jax.lax.scan(update, (params, tx.init(params)), jnp.arange(steps))
        return params, losses[-max(1, steps // 10) :].mean()

    layers, numbers = (a.ravel() for a in jnp.meshgrid(jnp.arange(len(x)), jnp.arange(repeats), indexing="ij"))
    pairs = (layers, numbers)
    flat = jax.vmap(one)(*pairs) if mode == "vmap" else jax.lax.map(lambda pair: one(*pair), pairs)
    params, losses = jax.tree.map(lambda leaf: leaf.reshape(len(x), repeats, *leaf.shape[1:]), flat)
    return Probes(params, mean, scale, losses)


def probe_outputs(
    probes: Probes, features: Float[Array | np.ndarray, "l n d"], *, objective: Objective = "squared"
) -> Float[Array, "l repeats n c"]:
    """What probes say of features: numbers, probabilities (``logistic``) or logits of classes (``cross_entropy``).

    Args:
      probes: From ``fit_probes`` or ``fit_ridge_probes``.
      features: Representations in the layers that the probes were fitted to.
      objective: The objective of the fit.

    Returns:
      Outputs of every probe.

    Raises:
      UserError: Other layers or widths than those of the fit.
    """
    x = jnp.asarray(features)
    fitted = (probes.mean.shape[0], probes.mean.shape[2])
    fits = x.ndim == 3 and (x.shape[0], x.shape[2]) == fitted
    rule = f"features must be [{fitted[0]}, n, {fitted[1]}], as in the fit"
    require(fits, "probe_outputs", rule, f"shape {x.shape}", "Pass the same layers")
    return _outputs(probes, x, objective == "logistic")


@functools.partial(jax.jit, static_argnums=2)
def _outputs(probes: Probes, x: Array, squash: bool) -> Array:
    kernels = [layer["kernel"] for _, layer in sorted(probes.params.items())]
    _, f = make_mlp(tuple(kernel.shape[-1] for kernel in kernels), activation="gelu")
    z = (x - probes.mean) / probes.scale

    def of_layer(layer: tuple[Params, Array]) -> Array:
        return jax.vmap(f, in_axes=(0, None))(*layer)

    found = jax.lax.map(of_layer, (probes.params, z))
    return jax.nn.sigmoid(found) if squash else found


def fit_ridge_probes(
    features: Float[Array | np.ndarray, "l n d"], targets: Float[Array | np.ndarray, "n c"], *, l2: float = 1e-3
) -> Probes:
    r"""Linear regression of every layer's features in closed form.

    The minimum of $\tfrac1n \lVert z W + b - y \rVert^2 + \lambda \lVert W \rVert^2$ over standardised features $z$,
    solved in float64 on the host: the best that a linear probe can do, with no choice of steps or rates.

    Args:
      features: Representations of the same examples in l layers.
      targets: Numbers to be read off them.
      l2: Regularisation, > 0, which makes the solution unique; the intercept is not regularised.

    Returns:
      The probes, one a layer, for ``probe_outputs`` with the objective ``squared``.

    Raises:
      UserError: ``l2`` not positive, sizes that do not fit, or numbers that are not finite.

    Example:
      >>> x = jnp.array([[[1.0], [2.0], [4.0]]])
      >>> probes = fit_ridge_probes(x, 3 * x[0] + 1, l2=1e-9)
      >>> np.asarray(probe_outputs(probes, x))[0, 0, :, 0].round(3)
      array([ 4.,  7., 13.], dtype=float32)

    Reference:
      Hoerl and Kennard 1970, Ridge regression, Technometrics 12.
    """
    where = "fit_ridge_probes"
    require(l2 > 0, where, "l2 must be positive", l2, "Use 1e-3 or choose it on a dev set")
    x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    _check_targets(where, x, y, "squared")
    mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True)
    scale = np.where(deviation > 1e-6 * (1 + np.abs(mean)), deviation, 1)
    kernels, losses = [], []
    for layer, centre, spread in zip(x, mean, scale, strict=True):
        z = (layer - centre) / spread
        gram = z.T @ z / len(z) + l2 * np.eye(z.shape[1])
        kernels.append(np.linalg.solve(gram, z.T @ (y - y.mean(axis=0)) / len(z)))
        losses.append(((z @ kernels[-1] + y.mean(axis=0) - y) ** 2).sum(axis=1).mean() / 2)
    dtype = jnp.asarray(features).dtype
    kernel = jnp.asarray(np.stack(kernels)[:, None], dtype)
    bias = jnp.broadcast_to(jnp.asarray(y.mean(axis=0), dtype), (len(x), 1, y.shape[1]))
    params = {"Dense_0": {"kernel": kernel, "bias": bias}}
    return Probes(params, jnp.asarray(mean, dtype), jnp.asarray(scale, dtype), jnp.asarray(losses, dtype)[:, None])


def _losses(objective: Objective, outputs: Array, target: Array) -> Array:
    """Loss of each example."""
    if objective == "cross_entropy":
        return optax.softmax_cross_entropy_with_integer_labels(outputs, target)
    if objective == "logistic":
        return optax.sigmoid_binary_cross_entropy(outputs, target).sum(axis=1)
    return optax.l2_loss(outputs, target).sum(axis=1)


def _check_targets(where: str, x: Array | np.ndarray, y: np.ndarray, objective: str) -> None:
    known = objective in get_args(Objective)
    require(known, where, "objective must be known", repr(objective), nearest(objective, get_args(Objective)))
    wanted = 1 if objective == "cross_entropy" else 2
    fits = x.ndim == 3 and x.shape[2] > 0 and y.ndim == wanted and y.shape[0] == x.shape[1] > 0
    rule = f"features must be [l, n, d] and targets {'[n]' if wanted == 1 else '[n, c]'}, n the same"
    require(fits, where, rule, f"shapes {x.shape} and {y.shape}", "Keep one row an example")
    require_finite(where, x, "features")
    if objective == "cross_entropy":
        integer = np.issubdtype(y.dtype, np.integer)
        require(integer, where, "classes must be integers", y.dtype, "Pass class numbers, or another objective")
        return
    require_finite(where, y, "targets")
    inside = objective == "squared" or bool(y.min() >= 0 and y.max() <= 1)
    got = f"{y.min():.3g}..{y.max():.3g}" if y.size else "none"
    require(inside, where, "targets of the logistic objective must lie in [0, 1]", got, "Use objective='squared'")
