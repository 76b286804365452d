"""Weight matching of two encoders: ours, and loops on the host over groups, layers and leaves."""

import functools
from typing import Any

import jax
import numpy as np

from jaxft.core.types import Params
from jaxft.core.units import PermutationSpec, named_leaves
from jaxft.geometry.matching import weight_matching
from jaxft.geometry.permutations import Permutation, apply_permutation, random_permutation
from jaxft.nn import EncoderConfig, init_encoder
from jaxft.nn.unit_specs import encoder_spec
from tests.benchmarks.matching_peer import match_by_loops
from tests.benchmarks.routes import Route, Row, Run

BASE = EncoderConfig("bert", 30522, 768, 12, 12, 3072, 512, 2, 1e-12, pad_id=0)
QUICK = EncoderConfig("bert", 50, 16, 2, 4, 32, 8, 2, 1e-12, pad_id=0)
WITHIN = ("heads", "mlp")
"""Groups of a layer; the residual stream is one group of all."""


@functools.cache
def problem(quick: bool, planted: bool) -> tuple[Params, Params, PermutationSpec]:
    """Two encoders of random weights; planted: the second is a mean of noise and of the first, its units permuted."""
    config = QUICK if quick else BASE
    a, b = (init_encoder(config, key=jax.random.key(seed)) for seed in (0, 1))
    spec = encoder_spec(a, config)
    if planted:
        hidden = apply_permutation(a, spec, random_permutation(a, spec, key=jax.random.key(2)))
        b = jax.tree.map(lambda p, q: (p + q) / 2, hidden, b)
    return a, b, spec


def objective(a: Params, b: Params, spec: PermutationSpec, permutation: Permutation) -> float:
    """Inner product of a and the permuted b in float64."""
    moved = named_leaves(apply_permutation(b, spec, permutation))
    pairs = [(np.asarray(leaf, np.float64), np.asarray(moved[path])) for path, leaf in named_leaves(a).items()]
    return float(sum(np.vdot(left, right) for left, right in pairs))


def make_row(*, quick: bool) -> Row:
    """Row of weight matching."""
    config = QUICK if quick else BASE

    def groups(planted: bool) -> tuple[str, ...] | None:
        return None if planted else WITHIN

    def ours(planted: bool, solver: Any = "scipy") -> Run:
        a, b, spec = problem(quick, planted)
        return lambda: (
            weight_matching(a, b, spec, key=jax.random.key(3), groups=groups(planted), solver=solver).permutation
        )

    def peer(planted: bool) -> Run:
        a, b, spec = problem(quick, planted)
        return lambda: match_by_loops(a, b, spec, groups(planted) or spec.groups, seed=0)

    def error(planted: bool, found: Permutation) -> float:
        a, b, spec = problem(quick, planted)
        return abs(objective(a, b, spec, found) / objective(a, b, spec, ours(planted)()) - 1)

    def route(make: Any, planted: bool, **options: Any) -> Route:
        return Route(
            functools.partial(make, planted, **options), functools.partial(error, planted), gib=0 if quick else 4
        )

    routes = {
        "ours, planted": route(ours, True),
        "loops with scipy, planted": route(peer, True),
        "ours, independent": route(ours, False),
        "loops with scipy, independent": route(peer, False),
    }
    work = (
        f"Encoders of {config.layers} layers, width {config.width}, {config.heads} heads and {config.mlp_width} "
        "units of the MLP in each, which are matched; planted, the residual stream too"
    )
    notes = (
        "Planted: the second encoder is the mean of a permuted copy of the first and of independent weights. "
        "Independent: weights drawn anew. The peer does what samuela/git-re-basin does, written anew in numpy. "
        "Times ours are times the first route. Error: of the inner product that is reached, relative to ours."
    )
    return Row("Weight matching", work, routes, notes)
