"""Paths between points of a parameter space: lines, arcs, chains of segments, Bézier curves, arc length.

A path is any function of t in [0, 1] to a parameter tree. A ``Curve`` is one that is linear in control points, which
are stacked on axis 0 of every leaf: one tree serves every architecture, and jit, vmap and gradients pass through it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.core.checks import (
    is_concrete,
    leading_size,
    path_name,
    require,
    require_finite,
    require_matching,
)
from jaxft.core.trees import tree_norm, tree_sub, tree_vdot
from jaxft.core.types import Params

Path = Callable[[Any], Params]
"""``path(t)``: the point at t in [0, 1]."""

Family = Literal["bezier", "polychain"]

POINTS = 61
"""Points of a path that is looked at, as in Garipov et al. 2018."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    r"""The path $\theta(t) = \sum_k w_k(t)\, c_k$ of control points $c_k$.

    ``bezier``: Bernstein weights $w_k(t) = \binom{n}{k} t^k (1 - t)^{n - k}$. ``polychain``: the hat functions of the
    knots, so that the curve is straight from each control point to the next. At t = 0 and t = 1 it is the first and the
    last control point, exactly.

    Reference:
      Garipov et al. 2018, arXiv 1802.10026, section 3.2. Their ``num_bends`` counts the end points too.
    """

    control: Params
    """Control points, stacked on axis 0 of every leaf."""
    family: Family = dataclasses.field(metadata={"static": True})
    knots: Float[Array, "points"] | None = None
    """Where a polychain has its control points, from 0 to 1; None: equally far apart."""

    @property
    def n_points(self) -> int:
        """Number of control points, both ends included."""
        return np.shape(jax.tree.leaves(self.control)[0])[0]

    @property
    def n_bends(self) -> int:
        """Number of interior control points."""
        return self.n_points - 2

    def weights(self, t: Any) -> Float[Array, "points"]:
        """Weight of every control point at t; they sum to 1."""
        t = checked_parameter("Curve", t)
        if self.family == "bezier":
            # The recurrence of Pascal's triangle: exact at both ends, and with a finite derivative there.
            w = jnp.ones((1,), t.dtype)
            for _ in range(self.n_points - 1):
                w = jnp.pad((1 - t) * w, (0, 1)) + jnp.pad(t * w, (1, 0))
            return w
        index, u = self._segment(t)
        hat = jnp.zeros((self.n_points,), t.dtype)
        return hat.at[index].set(1 - u).at[index + 1].set(u)

    def __call__(self, t: Any) -> Params:
        """The point at t, in the dtypes of the control points; it is summed in float32 or better."""
        return jax.tree.map(lambda x, c: x.astype(jnp.result_type(c)), self.unrounded(t), self.control)

    def unrounded(self, t: Any) -> Params:
        """The point at t as it is summed: in float32, or the dtype of the control points if that is wider."""
        t = checked_parameter("Curve", t)
        if self.family == "bezier":
            weights = self.weights(t)
            return jax.tree.map(lambda c: _mix(list(c), list(weights)), self.control)
        index, u = self._segment(t)
        return jax.tree.map(lambda c: _mix([c[index], c[index + 1]], [1 - u, u]), self.control)

    def _segment(self, t: Array) -> tuple[Array, Array]:
        """Number of the segment that t lies on, and how far along it t is."""
        knots = jnp.linspace(0, 1, self.n_points, dtype=t.dtype) if self.knots is None else self.knots.astype(t.dtype)
        index = jnp.clip(jnp.searchsorted(knots, t, side="right") - 1, 0, self.n_points - 2)
        return index, (t - knots[index]) / (knots[index + 1] - knots[index])


def stack_points(points: Sequence[Params]) -> Params:
    """Points of one model, stacked on axis 0 of every leaf.

    Raises:
      UserError: No points, or points that do not match; the leaves are named.

    Example:
      >>> stack_points([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].shape
      (2, 2)
    """
    require(len(points) > 0, "stack_points", "there must be a point", "none", "Pass one or more parameter trees")
    for i, point in enumerate(points[1:], 1):
        require_matching("stack_points", points[0], point, names=("point 0", f"point {i}"))
    return jax.tree.map(lambda *x: jnp.stack(x), *points)


def unstack_points(stacked: Params) -> list[Params]:
    """The list that ``stack_points`` made one tree of.

    Example:
      >>> len(unstack_points({"w": jnp.zeros((3, 2))}))
      3
    """
    count = leading_size("unstack_points", stacked)
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


def linear_path(a: Params, b: Params) -> Curve:
    """The straight line (1 - t) a + t b.

    Args:
      a: Point at t = 0.
      b: Point at t = 1.

    Returns:
      The path.

    Raises:
      UserError: The trees do not match (the leaves are listed), or a point is not finite or has leaves of integers.

    Example:
      >>> linear_path({"w": jnp.zeros(2)}, {"w": jnp.ones(2)})(0.25)["w"].tolist()
      [0.25, 0.25]
    """
    require_ends("linear_path", a, b)
    return Curve(stack_points([a, b]), "polychain")


def polychain(points: Sequence[Params], *, knots: Float[Array | np.ndarray, "points"] | None = None) -> Curve:
    """Straight segments from each point to the next.

    Args:
      points: Two or more points of one model.
      knots: t of every point, rising from 0 to 1; equally far apart by default.

    Returns:
      The path.

    Raises:
      UserError: Fewer than two points, points that do not match or are not finite, or knots that do not rise from 0
        to 1.

    Example:
      >>> path = polychain([{"w": jnp.array([x])} for x in (0.0, 1.0, 0.0)])
      >>> path(0.5)["w"].tolist(), path(0.75)["w"].tolist()
      ([1.0], [0.5])
    """
    where = "polychain"
    require(len(points) >= 2, where, "a path needs two points", len(points), "Pass both ends")
    for point in points:
        _check_point(where, point)
    if knots is None:
        return Curve(stack_points(points), "polychain")
    require(np.shape(knots) == (len(points),), where, "there must be a knot a point", np.shape(knots), "Pass as many")
    knots = jnp.asarray(knots, jnp.result_type(float))
    if is_concrete(knots):
        steps = np.diff(np.asarray(knots))  # of what the path will use: float64 may rise where float32 does not
        rises = bool((steps > 0).all()) and float(knots[0]) == 0 and float(knots[-1]) == 1
        require(rises, where, "knots must rise from 0 to 1", np.asarray(knots).tolist(), "Sort and rescale them")
    return Curve(stack_points(points), "polychain", knots)


def init_curve(a: Params, b: Params, *, n_bends: int = 1, family: Family = "bezier") -> Curve:
    """A curve to be fitted: its control points lie on the straight line, equally far apart.

    Args:
      a: Point at t = 0.
      b: Point at t = 1.
      n_bends: Interior control points. A Bézier curve has degree ``n_bends + 1``, a polychain that many segments.
      family: ``bezier`` or ``polychain``.

    Returns:
      The curve; its image is the line from a to b.

    Raises:
      UserError: As of ``linear_path``; a negative number of bends; an unknown family.

    Example:
      >>> init_curve({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, n_bends=3).control["w"][:, 0].tolist()
      [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    require_ends("init_curve", a, b)
    require(n_bends >= 0, "init_curve", "n_bends must not be negative", n_bends, "Pass the number of interior points")
    known = family in ("bezier", "polychain")
    require(known, "init_curve", "family must be bezier or polychain", repr(family), "Pass one of them")
    line = linear_path(a, b)
    inner = [line(k / (n_bends + 1)) for k in range(1, n_bends + 1)]
    return Curve(stack_points([a, *inner, b]), family)


def slerp_path(a: Params, b: Params, *, by_leaf: bool = False) -> Path:
    r"""The arc $(\sin((1 - t) \Omega)\, a + \sin(t \Omega)\, b) / \sin \Omega$, with $\Omega$ the angle of a and b.

    Norms go from that of a to that of b. Where a and b are parallel (or one is 0) the arc is the line. Opposite points
    have no arc of their own: there the line is taken too.

    Args:
      a: Point at t = 0.
      b: Point at t = 1.
      by_leaf: Every leaf on an arc of its own, rather than the whole tree as one vector.

    Returns:
      The path.

    Raises:
      UserError: As of ``linear_path``.

    Example:
      >>> point = slerp_path({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])})(0.5)
      >>> [round(float(x), 4) for x in point["w"]]
      [0.7071, 0.7071]

    Reference:
      Shoemake 1985, "Animating rotation with quaternion curves".
    """
    require_ends("slerp_path", a, b)
    a, b = jax.tree.map(jnp.asarray, (a, b))
    return jax.tree_util.Partial(_arcs if by_leaf else _arc, a, b)


def _arc(a: Params, b: Params, t: Any) -> Params:
    t, wide_a, wide_b = checked_parameter("slerp_path", t), widened(a), widened(b)
    product = tree_norm(wide_a) * tree_norm(wide_b)
    cosine = tree_vdot(wide_a, wide_b) / jnp.where(product > 0, product, 1)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    curved = (jnp.abs(cosine) < 1 - 1e-6) & (product > 0)
    sine = jnp.where(curved, jnp.sin(angle), 1)
    t = t.astype(angle.dtype)
    w = jnp.where(curved, jnp.sin((1 - t) * angle) / sine, 1 - t), jnp.where(curved, jnp.sin(t * angle) / sine, t)
    return jax.tree.map(lambda p, q: _mix([p, q], list(w)).astype(p.dtype), a, b)


def _arcs(a: Params, b: Params, t: Any) -> Params:
    return jax.tree.map(lambda x, y: _arc(x, y, t), a, b)


def arc_length(path: Path, *, ts: Float[Array | np.ndarray, "points"] | None = None) -> Float[Array, "points"]:
    """Length of a path from its start to each t, summed over chords.

    Curves are measured before rounding to the dtype of their points: in bfloat16 a line would be a staircase, longer
    than the line. Other paths are measured as they are.

    Args:
      path: The path; its last length over the first chord of the ends is the length ratio.
      ts: Rising values of t; 61 from 0 to 1 by default. A polychain is measured exactly where its knots are among them.

    Returns:
      Lengths, the first of them 0. Two points are held at a time.

    Raises:
      UserError: t outside [0, 1].

    Example:
      >>> float(arc_length(linear_path({"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}))[-1])
      5.0
    """
    ts = checked_parameters("arc_length", ts)
    # A plain function compiled here would be kept, with the points it closes over, for no second use.
    return _lengths(path, ts) if split_path(path)[1] else _compiled_lengths(path, ts)


def _lengths(path: Path, ts: Float[Array, "points"]) -> Float[Array, "points"]:
    def at(t: Array) -> Params:
        return widened(path.unrounded(t) if isinstance(path, Curve) else path(t))

    def step(last: Params, t: Array) -> tuple[Params, Array]:
        point = at(t)
        return point, tree_norm(tree_sub(point, last))

    _, chords = jax.lax.scan(step, at(ts[0]), ts[1:])
    return jnp.concatenate([jnp.zeros((1,), chords.dtype), jnp.cumsum(chords)])


_compiled_lengths = jax.jit(_lengths)


def reparametrise(path: Path, *, points: int = 257) -> Path:
    """The same path at constant speed: s in [0, 1] is the part of the length that lies behind.

    Args:
      path: A curve, or any other path.
      points: Chords (less one) by which a path is measured; a polychain is exact.

    Returns:
      A polychain with other knots, or a path that looks t up by arc length.

    Raises:
      UserError: Fewer than 2 points, or a path of length 0.

    Example:
      >>> bent = polychain([{"w": jnp.array([x])} for x in (0.0, 3.0, 4.0)])
      >>> reparametrise(bent)(0.75)["w"].tolist()
      [3.0]
    """
    where = "reparametrise"
    require(points >= 2, where, "it takes 2 or more points", points, "Raise points")
    chain = path if isinstance(path, Curve) and path.family == "polychain" else None
    uneven = None if chain is None else chain.knots
    ts = jnp.linspace(0, 1, points if chain is None else chain.n_points) if uneven is None else uneven
    lengths = arc_length(path, ts=ts)
    if is_concrete(lengths):
        require(float(lengths[-1]) > 0, where, "the path must have a length", 0.0, "Pass two points")
    s = lengths / lengths[-1]
    # Control points that coincide leave a polychain without knots of its own.
    if chain is not None and is_concrete(s) and bool((jnp.diff(s) > 0).all()):
        return dataclasses.replace(chain, knots=s.at[0].set(0.0).at[-1].set(1.0))
    tree, plain = split_path(path)
    at_length = _at_length if plain is None else functools.partial(_at_length, plain)
    return jax.tree_util.Partial(at_length, *(() if plain else (tree,)), s, ts.astype(s.dtype))


def _at_length(path: Path, lengths: Array, ts: Array, at: Any) -> Params:
    return path(jnp.interp(checked_parameter("reparametrise", at).astype(lengths.dtype), lengths, ts))


def split_path(path: Path) -> tuple[Any, Path | None]:
    """A path for a compiled function: as a tree of arrays that are passed, or as a function that is compiled in.

    Example:
      >>> curve = linear_path({"w": jnp.zeros(2)}, {"w": jnp.ones(2)})
      >>> split_path(curve) == (curve, None), split_path(abs) == (None, abs)
      (True, True)
    """
    return (None, path) if jax.tree_util.all_leaves([path]) else (path, None)


def checked_parameters(where: str, ts: Any, points: int = POINTS) -> Float[Array, "points"]:
    """Values of t as an array, rising and in [0, 1]; ``points`` of them, equally far apart, where None is passed."""
    if ts is None:
        require(points >= 2, where, "a path is looked at from both ends", f"{points} points", "Pass points >= 2")
        return jnp.linspace(0, 1, points)
    shape = np.shape(ts)
    require(len(shape) == 1 and shape[0] > 0, where, "ts must be a vector", f"shape {shape}", "Pass values of t")
    if is_concrete(ts):
        values = np.asarray(ts)
        inside, shown = ((values >= 0) & (values <= 1)).all(), f"{values.min():g} to {values.max():g}"
        require(bool(inside), where, "t must lie in [0, 1]", shown, "A path ends at its end points; rescale t")
        require(bool((np.diff(values) >= 0).all()), where, "ts must rise", "values that fall", "Sort them")
    return jnp.asarray(ts, jnp.result_type(float))


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype that sums are taken in: float32, or a wider one of the operands.

    Example:
      >>> accumulation_dtype(jnp.bfloat16).__name__, accumulation_dtype(jnp.float32).__name__
      ('float32', 'float32')
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def widened(params: Params) -> Params:
    """All leaves in one dtype: that of sums over the widest of them.

    Example:
      >>> [x.dtype.name for x in widened([jnp.ones(2, jnp.bfloat16), jnp.ones(2)])]
      ['float32', 'float32']
    """
    dtypes = [accumulation_dtype(jnp.result_type(x)) for x in jax.tree.leaves(params)]
    dtype = max(dtypes, key=lambda d: jnp.finfo(d).bits)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def checked_parameter(where: str, t: Any) -> Float[Array, ""]:
    """One value of t as an array, if it is a scalar in [0, 1]."""
    shape = np.shape(t)
    require(shape == (), where, "t must be a scalar", f"shape {shape}", "Use jax.vmap or jax.lax.map over t")
    if is_concrete(t):
        require(0 <= float(t) <= 1, where, "t must lie in [0, 1]", f"{float(t):g}", "A path ends at its end points")
    return jnp.asarray(t, jnp.result_type(float))


def _mix(points: list[Array], weights: list[Array]) -> Array:
    """Weighted sum of arrays: products of elements, since a matrix product may round to bfloat16 on accelerators.

    In the dtype that sums are taken in.
    """
    dtype = accumulation_dtype(points[0].dtype)
    total = weights[0].astype(dtype) * points[0].astype(dtype)
    for point, weight in zip(points[1:], weights[1:], strict=True):
        total = total + weight.astype(dtype) * point.astype(dtype)
    return total


def require_ends(where: str, a: Params, b: Params, *, names: tuple[str, str] = ("a", "b")) -> None:
    """Raises unless two points are of one model, finite, and of floats alone."""
    require_matching(where, a, b, names=names)
    _check_point(where, a, names[0])
    _check_point(where, b, names[1])


def _check_point(where: str, point: Params, name: str = "every point") -> None:
    require_floats(where, point, name)
    require_finite(where, point, name)


def require_floats(where: str, params: Params, name: str) -> None:
    """Raises unless a tree has leaves, all of them of floats; those that are not are named."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    require(bool(leaves), where, f"{name} must have leaves", "an empty tree", "Pass the parameters of a model")
    bad = [path_name(p) for p, x in leaves if not jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    advice = "Pass the float leaves alone (core.trees.tree_partition) and put the others back"
    require(not bad, where, f"{name} must have float leaves", ", ".join(bad[:5]), advice)
