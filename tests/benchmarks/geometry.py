"""Mode connectivity: fitting curves, losses along them, matching and certificates, ours and peers side by side."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.core.types import Params
from jaxft.data.images import load_images
from jaxft.geometry import Curve, eval_path, fit_curve, stack_points
from jaxft.nn import make_mlp
from jaxft.nn.conv import ConvConfig, make_convnet
from tests.benchmarks import geometry_matching, routes
from tests.benchmarks.geometry_certificate import certificate_row
from tests.benchmarks.routes import Route, Row, Run

NOTES = (
    "A process for each route. CPU and wall seconds: medians of 5 runs after a first call, of fewer once they have "
    "taken 30 s. First call: tracing and compilation, what it takes beyond a later run. Peak: what a fresh process "
    "grows by until all runs are done. Images: the digits of scikit-learn. Curves are quadratic Bézier curves. The "
    "peer does what timgaripov/dnn-mode-connectivity does, written anew in plain PyTorch, since its files do not run "
    "on Python 3.11. float32."
)
ROWS = ("mlp-fit", "mlp-eval", "conv-fit", "conv-eval", "norm-eval", "matching", "certificate")
RATE, MOMENTUM = 0.02, 0.9
NETS = {
    "mlp": "an MLP 64 x 256 x 256 x 10",
    "conv": "3 convolutions of 32 filters, dense",
    "norm": "the same, with norms",
}


def measure(*, quick: bool, only: str | None = None) -> str:
    """The tables, each under a line that states its sizes."""
    parts = []
    for name in ROWS:
        if only in (None, name):
            print(f"{name} ...", file=sys.stderr, flush=True)
            parts.append(routes.table("geometry", name, quick=quick))
    return "\n\n".join(parts)


def make_row(name: str, *, quick: bool) -> Row:
    """A row by its name."""
    if name == "matching":
        return geometry_matching.make_row(quick=quick)
    if name == "certificate":
        return certificate_row(quick=quick)
    net, what = name.split("-")
    return _fit(net, steps=4 if quick else 300) if what == "fit" else _eval(net, points=3 if quick else 61)


@functools.cache
def _batches(size: int) -> dict[str, np.ndarray]:
    images = load_images("digits")
    count = len(images.x_train) // size
    x, y = (np.asarray(v)[: count * size] for v in (images.x_train, images.y_train))
    return {"x": x.reshape(count, size, *x.shape[1:]), "y": y.reshape(count, size)}


@functools.cache
def _net(kind: str) -> tuple[Any, Any, Curve]:
    """Outputs, statistics (or None), and a curve whose three control points are random networks."""
    keys = jax.random.split(jax.random.key(0), 3)
    if kind == "mlp":
        init, f = make_mlp((256, 256, 10))
        points = [init(key, 64) for key in keys]
        return (lambda p, x: f(p, x.reshape(len(x), -1))), None, Curve(stack_points(points), "bezier")
    net = make_convnet(ConvConfig((32, 32, 32), 10, norm=kind == "norm"))
    points = [net.init(key, (8, 8, 1)) for key in keys]
    statistics = (lambda p, batches: net.statistics(p, batches["x"])) if kind == "norm" else None
    return net.f, statistics, Curve(stack_points(points), "bezier")


@functools.cache
def _loss(kind: str, error: bool) -> Any:
    f = _net(kind)[0]

    def loss(params: Params, batch: dict[str, Any]) -> Any:
        logits = f(params, batch["x"], train=True) if kind == "conv" and not error else f(params, batch["x"])
        mean = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        wrong = jnp.mean((logits.argmax(-1) != batch["y"]).astype(jnp.float32))
        return {"loss": mean, "error": wrong} if error else mean

    return loss


def _fit(kind: str, steps: int) -> Row:
    batches, curve = jax.tree.map(jnp.asarray, _batches(128)), _net(kind)[2]
    tx, key = optax.sgd(RATE, MOMENTUM), jax.random.key(1)

    def ours() -> Curve:
        options: dict[str, Any] = {"tx": tx, "steps": steps, "key": key, "points_per_step": 1}
        return fit_curve(_loss(kind, False), curve, batches, **options).curve

    @functools.cache
    def bends() -> list[np.ndarray]:
        return _torch_leaves(kind, jax.tree.map(lambda c: c[1:2], ours().control))

    def peer(threads: int) -> Run:
        from tests.benchmarks import torch_curves as torch_peer

        torch_peer.set_threads(threads)
        draw = jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(key, step), (1,)))
        ts = np.asarray(draw(jnp.arange(steps)))[:, 0].tolist()
        data = _torch_batches(kind, 128)

        def run() -> list[np.ndarray]:
            net = torch_peer.CurveNet(jax.tree.map(np.asarray, curve.control))
            return [x.numpy() for x in torch_peer.fit(net, data, ts, learning_rate=RATE, momentum=MOMENTUM)]

        return run

    def error(found: Any) -> float:
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, bends(), strict=True))

    work = f"{NETS[kind]}; {steps} steps of SGD with momentum on batches of 128, one t a step"
    notes = "Error: the largest difference of a leaf of the fitted bend from ours, on the same batches and t."
    return Row(
        f"Fitting a curve, {kind}",
        work,
        {"ours": Route(lambda: ours), **_peers(peer, error)},
        notes,
    )


def _eval(kind: str, points: int) -> Row:
    size = 479
    batches = jax.tree.map(jnp.asarray, _batches(size))
    _, statistics, curve = _net(kind)

    def ours(inner: str = "auto", curve: Curve = curve) -> np.ndarray:
        found = eval_path(_loss(kind, True), curve, batches, points=points, inner=inner, statistics=statistics)
        return np.stack([found.values["loss"], found.values["error"]], axis=1)

    def peer(threads: int) -> Run:
        from tests.benchmarks import torch_curves as torch_peer

        torch_peer.set_threads(threads)
        data = _torch_batches(kind, size)
        net = torch_peer.CurveNet(jax.tree.map(np.asarray, curve.control))
        ts = np.linspace(0, 1, points).tolist()
        return lambda: torch_peer.evaluate(net, data, ts, norms=statistics is not None)

    @functools.cache
    def exact() -> np.ndarray:
        with jax.enable_x64(True):
            wide = Curve(jax.tree.map(lambda c: jnp.asarray(np.asarray(c), jnp.float64), curve.control), "bezier")
            data = {"x": jnp.asarray(_batches(size)["x"], jnp.float64), "y": jnp.asarray(_batches(size)["y"])}
            found = eval_path(_loss(kind, True), wide, data, points=points, statistics=statistics)
            return np.asarray(found.values["loss"])

    def error(found: np.ndarray) -> float:
        return float(np.abs(found[:, 0] / exact() - 1).max())

    count = batches["y"].size
    again = ", statistics estimated anew at each point" if statistics else ""
    work = f"{NETS[kind]}; {points} points of a curve on {count} images, loss and error{again}"
    routes_ = {
        "ours": Route(lambda: ours, error),
        "ours, all points at once (vmap)": Route(lambda: lambda: ours("vmap"), error),
        **_peers(peer, error),
    }
    return Row(f"Losses along a curve, {kind}", work, routes_, "Error: of the loss, against ours in float64.")


def _peers(start: Callable[[int], Run], error: Callable[[Any], float]) -> dict[str, Route]:
    """With two threads, and with one: products this small may lose by being split."""
    return {
        f"PyTorch, {threads} thread{'s' * (threads > 1)}": Route(
            functools.partial(start, threads), error, needs="torch"
        )
        for threads in (2, 1)
    }


def _torch_batches(kind: str, size: int) -> tuple[Any, Any]:
    import torch

    data = _batches(size)
    x = data["x"].reshape(*data["x"].shape[:2], -1) if kind == "mlp" else np.moveaxis(data["x"], -1, 2)
    return torch.tensor(np.ascontiguousarray(x)), torch.tensor(data["y"].astype(np.int64))


def _torch_leaves(kind: str, control: Params) -> list[np.ndarray]:
    """Leaves in the order and layout of the peer."""
    from tests.benchmarks import torch_curves as torch_peer

    net = torch_peer.CurveNet(jax.tree.map(lambda c: np.repeat(np.asarray(c), 3, axis=0), control))
    return [x.detach().numpy() for x in net.middle]
