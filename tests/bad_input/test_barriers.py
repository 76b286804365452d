"""What a user of barriers, feature connectivity, simplexes and merging is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import geometry

A, B = ({"low": {"w": jnp.full((2, 3), x)}, "high": {"w": jnp.full((3,), x)}} for x in (0.0, 1.0))
WIDER = {"low": {"w": jnp.ones((2, 4))}, "high": {"w": jnp.ones(3)}}
BROKEN = jax.tree.map(lambda x: x * jnp.nan, A)
X = jnp.ones((2, 5, 2))


def loss_fn(params, x):
    return ((x @ params["low"]["w"]) @ params["high"]["w"]).mean()


def two(params, x):
    return {"nll": loss_fn(params, x), "error": loss_fn(params, x)}


def per_example(params, x):
    return (x @ params["low"]["w"]) @ params["high"]["w"]


BARRIERS = {
    "one point": (lambda: geometry.loss_barrier(jnp.ones(1)), r"loss_barrier: .* got shape \(1,\). Put t on the last"),
    "a number": (lambda: geometry.convexity_gap(jnp.float32(1)), "convexity_gap: losses must hold both ends"),
    "t of another length": (lambda: geometry.loss_barrier(jnp.ones(3), t=np.ones(4)), r"\(4,\) and \(3,\)"),
    "t that stands still": (lambda: geometry.loss_barrier(jnp.ones(3), t=np.array([0, 0.5, 0.5])), "t must rise"),
    "baseline": (lambda: geometry.loss_barrier(jnp.ones(3), baseline="cord"), "got 'cord'. Did you mean chord"),  # pyright: ignore[reportArgumentType]
    "one model": (lambda: geometry.pairwise_barriers(loss_fn, [A], X), "there must be two models, got 1"),
    "no model": (lambda: geometry.pairwise_barriers(loss_fn, [], X), "there must be a point, got none"),
    "other models": (
        lambda: geometry.pairwise_barriers(loss_fn, [A, B, WIDER], X),
        r"low/w: float32\[2,3\] and float32\[2,4\]",
    ),
    "nan": (lambda: geometry.pairwise_barriers(loss_fn, [A, BROKEN], X), "NaN or infinity in high/w, low/w"),
    "one point a line": (lambda: geometry.pairwise_barriers(loss_fn, [A, B], X, points=1), "got 1 points"),
    "losses by example": (
        lambda: geometry.pairwise_barriers(per_example, [A, B], X),
        r"a dict of scalars, got loss \(5,\). Take means",
    ),
    "which metric": (lambda: geometry.pairwise_barriers(two, [A, B], X), "got error, nll. Pass metric"),
    "unknown metric": (lambda: geometry.pairwise_barriers(two, [A, B], X, metric="eror"), "Did you mean error"),
    "aligned to another model": (
        lambda: geometry.pairwise_barriers(loss_fn, [A, B], X, align=lambda a, b: WIDER),
        "trees must match, got low/w",
    ),
    "both": (lambda: geometry.cluster_barriers(np.zeros((2, 2)), clusters=1, threshold=1.0), "clusters and threshold"),
    "neither": (lambda: geometry.cluster_barriers(np.zeros((2, 2))), "got neither. Pass one"),
    "not square": (lambda: geometry.cluster_barriers(np.zeros((2, 3)), clusters=1), r"must be \(m, m\), got \(2, 3\)"),
    "not symmetric": (lambda: geometry.cluster_barriers(np.arange(4.0).reshape(2, 2), clusters=1), "be symmetric"),
    "diverged": (lambda: geometry.cluster_barriers(np.full((2, 2), np.nan), clusters=1), "must be finite"),
    "many groups": (lambda: geometry.cluster_barriers(np.zeros((2, 2)), clusters=3), "clusters must be 1 to 2, got 3"),
}

STABILITY = {
    "no checkpoints": ([], {}, "there must be a checkpoint"),
    "steps in disorder": ([(5, A), (2, B)], {}, r"steps must rise, got \[5, 2\]"),
    "an only child": ([(0, A)], {"children": 1}, "got 1. Raise children"),
    "metric of a scalar": ([(0, A)], {"metric": "error"}, "unknown metric, got 'error'. Known: loss"),
}

LAYERS = {
    "other trees": (lambda: geometry.leafwise_path(A, WIDER, ["low"]), r"low/w: float32\[2,3\]"),
    "no leaf": (lambda: geometry.leafwise_path(A, B, ["lo"]), "a leaf must move, got none. Paths are like"),
    "beginnings as a string": (lambda: geometry.leafwise_path(A, B, "low"), "got the string 'low'. Put it in brackets"),
    "beyond the leaves moved": (lambda: geometry.leafwise_path(A, B, ["low"])(1.5), r"t must lie in \[0, 1\], got 1.5"),
    "features alone": (
        lambda: geometry.feature_connectivity(lambda p, x: x, A, B, X[0]),  # pyright: ignore[reportArgumentType]
        "units_fn must return a mapping, got ShapeDtypeStruct",
    ),
    "empty layer": (
        lambda: geometry.layerwise_barriers(loss_fn, A, B, X, layers={"head": ["classifier"]}),
        "every layer must have a leaf, got head",
    ),
    "stack of nothing": (
        lambda: geometry.layerwise_barriers(loss_fn, A, B, X, stacked="layers"),
        "must begin the path of a leaf, got layers",
    ),
    "stacks of several depths": (
        lambda: geometry.layerwise_barriers(lambda p, x: loss_fn(p["m"], x), {"m": A}, {"m": B}, X, stacked="m"),
        r"one number of layers, got \[\(2,\), \(3,\)\]",
    ),
    "features of a batch": (
        lambda: geometry.feature_connectivity(lambda p, x: {"mean": loss_fn(p, x)}, A, B, X[0]),
        "leading axis of examples",
    ),
    "t beyond the end": (
        lambda: geometry.feature_connectivity(lambda p, x: {}, A, B, X[0], ts=np.array([0.5, 1.5])),
        r"t must lie in \[0, 1\]",
    ),
}

VERTICES = jax.tree.map(lambda a, b: jnp.stack([a, b]), A, B)


def fit(**options):
    options = {"tx": optax.sgd(0.1), "steps": 1, "key": jax.random.key(0)} | options
    loss = options.pop("loss_fn", loss_fn)
    return geometry.fit_simplex(loss, options.pop("vertices", VERTICES), X, **options)


SIMPLEXES = {
    "one model, not stacked": (lambda: geometry.log_volume({"w": jnp.ones(2), "b": jnp.float32(1)}), "leading axis"),
    "weights": (lambda: geometry.simplex_point(VERTICES, jnp.ones(3) / 3), r"there must be 2 weights, got \(3,\)"),
    "vertices of integers": (lambda: geometry.log_volume({"w": jnp.arange(4).reshape(2, 2)}), "float leaves, got w"),
    "losses by example": (lambda: fit(loss_fn=per_example), r"fit_simplex: .* got loss \(5,\). Take means"),
    "a loss that diverges": (lambda: fit(loss_fn=lambda p, x: jnp.nan * loss_fn(p, x)), "finite, got nan at step 0"),
    "vertices in a list": (lambda: fit(vertices=[A, B]), "must be one tree, .* got a list. Pass stack_points"),
    "no samples": (lambda: geometry.sample_simplex(VERTICES, key=jax.random.key(0), n=0), "vertices and n must be"),
    "no such vertex": (lambda: fit(faces=((0, 2),)), "distinct vertices 0 to 1"),
    "a vertex twice": (lambda: fit(faces=((1, 1),)), "distinct vertices 0 to 1"),
    "faces of two sizes": (lambda: fit(faces=((0,), (0, 1))), r"of one size, got \[1, 2\]"),
    "too few samples": (lambda: fit(faces=((0,), (1,)), samples=1), "a sample, got 1 for 2. Raise samples"),
    "penalty on volume": (lambda: fit(log_volume_weight=-1.0), "must not be negative"),
    "no steps": (lambda: fit(steps=0), "steps must be positive, got 0"),
    "start elsewhere": (lambda: fit(init=WIDER), r"low/w: float32\[2,3\] and float32\[2,4\]"),
    "nan": (lambda: fit(vertices=jax.tree.map(lambda x: x * jnp.nan, VERTICES)), "vertices must be finite"),
}

ADAPTERS = {"w": {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2))}}
WIDE = {"w": {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 2))}}
DEEP = {"w": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 2))}}
STEPS = {"w": jnp.ones(2), "step": jnp.array(3)}

MERGING = {
    "other trees": (lambda: geometry.interpolate(A, WIDER, 0.5), r"low/w: float32\[2,3\]"),
    "leaves of integers": (lambda: geometry.interpolate(STEPS, STEPS, 0.5), "a must have float leaves, got step"),
    "average of integers": (lambda: geometry.weighted_average([STEPS]), "a model must have float leaves, got step"),
    "task of integers": (lambda: geometry.task_arithmetic(STEPS, [STEPS]), "base must have float leaves, got step"),
    "profile of integers": (lambda: geometry.layer_profile(STEPS, STEPS, {"": 0.5}), "float leaves, got step"),
    "nothing to average": (lambda: geometry.weighted_average([]), "there must be a model"),
    "one weight": (lambda: geometry.weighted_average([A, B], [1.0]), "got 1 for 2"),
    "weights of another sum": (
        lambda: geometry.weighted_average([A, B], [0.1, 1.0]),
        "must sum to 1, got 1.1. Say normalize=True or normalize=False",
    ),
    "weights of sum 0": (lambda: geometry.weighted_average([A, B], [1, -1], normalize=True), "must not sum to 0"),
    "a task alone": (
        lambda: geometry.task_arithmetic(A, B),  # pyright: ignore[reportArgumentType]
        "must be a list of models, got one tree. Pass .model.",
    ),
    "no tasks": (lambda: geometry.task_arithmetic(A, []), "there must be a fine-tuned model"),
    "scales": (lambda: geometry.task_arithmetic(A, [B], [1.0, 2.0]), "got 2 for 1"),
    "task of another model": (lambda: geometry.task_vector(A, WIDER), r"low/w: float32\[2,3\]"),
    "idle pattern": (lambda: geometry.layer_profile(A, B, {"": 0.5, "attn": 1.0}), "got attn. Paths are like high/w"),
    "forgotten leaf": (lambda: geometry.layer_profile(A, B, {"low": 0.5}), "got none for high/w. Pass default="),
    "t of another depth": (
        lambda: geometry.layer_profile(A, B, {"low": jnp.ones(5)}, default=0.0),
        r"got \(5,\) for low/w \(2, 3\)",
    ),
    "space": (lambda: geometry.interpolate_adapters(ADAPTERS, ADAPTERS, 0.5, space="factor"), "Did you mean factors"),  # pyright: ignore[reportArgumentType]
    "adapters of other leaves": (lambda: geometry.interpolate_adapters(ADAPTERS, {}, 0.5), "same leaves, got w in one"),
    "adapters of other shapes": (lambda: geometry.interpolate_adapters(ADAPTERS, WIDE, 0.5), "must have one shape"),
    "factors of other ranks": (
        lambda: geometry.interpolate_adapters(ADAPTERS, DEEP, 0.5, space="factors"),
        r"w/lora_a: float32\[3,1\] and float32\[3,2\]",
    ),
}


GROUPS = {"barriers": BARRIERS, "layers": LAYERS, "simplexes": SIMPLEXES, "merging": MERGING}


@pytest.mark.parametrize(("group", "case"), [(group, case) for group, cases in GROUPS.items() for case in cases])
def test_user_is_told_what_is_wrong(group, case):
    call, said = GROUPS[group][case]
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("case", STABILITY)
def test_instability_analysis_says_what_is_wrong(case):
    checkpoints, options, said = STABILITY[case]
    options = {"metric": "loss"} | options
    with pytest.raises(ValueError, match=said):
        geometry.instability_analysis(lambda p, step, key: p, loss_fn, checkpoints, X, key=jax.random.key(0), **options)


def test_children_that_do_not_match_or_diverged_are_named():
    for child, said in ((WIDER, "got low/w"), (BROKEN, "children of step 3 must be finite")):
        with pytest.raises(ValueError, match=said):
            geometry.instability_analysis(
                lambda p, step, key, child=child: child, loss_fn, [(3, A)], X, key=jax.random.key(0), metric="loss"
            )


def test_faults_of_shape_are_found_under_jit():
    with pytest.raises(ValueError, match="losses must hold both ends"):
        jax.jit(geometry.loss_barrier)(jnp.ones(1))
    with pytest.raises(ValueError, match="there must be 2 weights"):
        jax.jit(geometry.simplex_point)(VERTICES, jnp.ones(3))
