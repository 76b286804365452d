"""What a user of permutations, matchings and specs is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core.units import PermutationSpec, UnitAxis, make_permutation_spec
from jaxft.geometry.activation_matching import activation_matching, straight_through_matching
from jaxft.geometry.assignment import solve_assignment
from jaxft.geometry.matching import weight_matching
from jaxft.geometry.permutations import apply_permutation, check_spec, random_permutation
from jaxft.geometry.repair import repair
from jaxft.nn.transformer import EncoderConfig, init_encoder
from jaxft.nn.unit_specs import conv_spec, encoder_spec, mlp_spec

LEAVES = {"in/kernel": (UnitAxis("h", 1),), "in/bias": (UnitAxis("h", 0),), "out": (UnitAxis("h", 0, reads=True),)}
SPEC = make_permutation_spec(LEAVES)
STACKED = make_permutation_spec({"w": (UnitAxis("h", 1, stacked=True),)})
P = {"in": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "out": jnp.ones((3, 1))}
X, KEY = jnp.ones((4, 2)), jax.random.key(0)
CONFIG = EncoderConfig("bert", 9, 4, 3, 2, 8, 5, 2, 1e-12, pad_id=0)


def units(p, x):
    return {"h": x @ p["in"]["kernel"] + p["in"]["bias"][None]}


def net(p, x):
    return jnp.tanh(units(p, x)["h"]) @ p["out"]


def loss(p, x):
    return jnp.square(net(p, x)).mean()


def moved(index):
    return lambda: apply_permutation(P, SPEC, {"h": index})


PERMUTATION = {
    "unknown group": (lambda: apply_permutation(P, SPEC, {"hh": jnp.arange(3)}), "got 'hh'. Did you mean h"),
    "too short": (moved(jnp.arange(2)), r"h: int32\[2\] rather than integers \[3\]"),
    "floats": (moved(jnp.arange(3.0)), r"h: float32\[3\] rather than integers"),
    "repeated": (moved(np.array([0, 0, 2])), "repeated or missing units in h"),
    "out of range": (moved(np.array([1, 2, 3])), "repeated or missing units in h"),
    "other network": (
        lambda: apply_permutation({"in": P["in"]}, SPEC, {}),
        r"out is missing \(Known: in/bias, in/kernel\)",
    ),
    "one index for all layers": (
        lambda: apply_permutation({"w": jnp.ones((2, 3))}, STACKED, {"h": jnp.arange(3)}),
        r"int32\[3\] rather than integers \[2, 3\]",
    ),
}


@pytest.mark.parametrize("case", PERMUTATION)
def test_permutation_says_what_is_wrong(case):
    call, said = PERMUTATION[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("apply_permutation: ")


def test_shapes_are_checked_under_jit():
    with pytest.raises(ValueError, match="an index for every unit"):
        jax.jit(lambda index: apply_permutation(P, SPEC, {"h": index}))(jnp.arange(2))


def without(name):
    return make_permutation_spec({path: axes for path, axes in LEAVES.items() if path != name})


RANDOM = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), P)
CHECK = {
    "forgotten bias": (lambda: check_spec(net, RANDOM, without("in/bias"), X, key=KEY), "in/bias has an axis of 3"),
    "forgotten reader": (lambda: check_spec(net, RANDOM, without("out"), X, key=KEY), "out has an axis of 3"),
    "other paths": (
        lambda: check_spec(net, RANDOM, make_permutation_spec({"in/bais": (UnitAxis("h", 0),)}), X, key=KEY),
        "in/bais is missing .Did you mean in/bias",
    ),
    "a dict for a spec": (
        lambda: check_spec(net, RANDOM, LEAVES, X, key=KEY),  # pyright: ignore[reportArgumentType]
        "PermutationSpec, got dict. Make it by",
    ),
    "nan outputs": (lambda: check_spec(lambda p, x: net(p, x) / 0, RANDOM, SPEC, X, key=KEY), "outputs must be finite"),
}


@pytest.mark.parametrize("case", CHECK)
def test_check_says_which_group_and_what_may_be_missing(case):
    call, said = CHECK[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("check_spec: ")


OTHER = {"in": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(3)}, "top": jnp.ones(1)}
NAN = {**P, "out": P["out"] * jnp.nan}
MATCHING = {
    "other trees": (
        lambda: weight_matching(P, OTHER, SPEC, key=KEY),
        r"in/kernel: float32\[2,3\] and float32\[2,4\]; out: only in a; top: only in b",
    ),
    "nan": (lambda: weight_matching(P, NAN, SPEC, key=KEY), "NaN or infinity in b/out"),
    "spec of another network": (
        lambda: weight_matching(P, P, make_permutation_spec({"w": (UnitAxis("h", 0),)}), key=KEY),
        "w is missing",
    ),
    "unknown group": (lambda: weight_matching(P, P, SPEC, key=KEY, groups=["k"]), r"\['k'\]. It has h"),
    "one group as a string": (lambda: weight_matching(P, P, SPEC, key=KEY, groups="h1"), "got the string 'h1'"),
    "traced": (lambda: jax.jit(lambda p: weight_matching(p, P, SPEC, key=KEY).params)(P), "Call it outside of jit"),
    "no sweeps": (lambda: weight_matching(P, P, SPEC, key=KEY, max_sweeps=0), "must be positive"),
    "wrong start": (lambda: weight_matching(P, P, SPEC, key=KEY, start={"h": np.zeros(3, int)}), "repeated or missing"),
    "unknown solver": (lambda: weight_matching(P, P, SPEC, key=KEY, solver="scypi"), "Did you mean scipy"),  # pyright: ignore[reportArgumentType]
    "spec without units": (lambda: weight_matching(P, P, PermutationSpec(()), key=KEY), "has no groups"),
}


@pytest.mark.parametrize("case", MATCHING)
def test_matching_says_what_is_wrong(case):
    call, said = MATCHING[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("weight_matching: ")


def activation(function=units, spec=SPEC, p=P, **options):
    return lambda: activation_matching(function, p, p, spec, X, **options)


ACTIVATIONS = {
    "no group of the spec": (activation(lambda p, x: {"hidden": x}), r"\['hidden'\], groups \['h'\]"),
    "units first": (activation(lambda p, x: {"h": units(p, x)["h"].T}), r"h \(3, 4\) for 3 units. Return \[n, ..., u"),
    "stacked": (
        activation(lambda p, x: {"h": x @ p["w"]}, STACKED, {"w": jnp.ones((2, 3))}),
        r"must not be stacked over layers, got \['h'\]. Use weight_matching",
    ),
    "nan units": (activation(p=jax.tree.map(lambda x: x / 0, P)), "must be finite"),
    "batch of 0": (activation(batch_size=0), "batch_size must be positive"),
    "no examples": (lambda: activation_matching(units, P, P, SPEC, X[:0]), "there must be an example"),
    "not a mapping": (activation(lambda p, x: x), "must return a mapping"),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activation_matching_says_what_is_wrong(case):
    call, said = ACTIVATIONS[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("activation_matching: ")


def straight_through(**options):
    settings = {"tx": optax.sgd(0.1), "steps": 1, "key": KEY, **options}
    function = settings.pop("loss_fn", loss)
    return lambda: straight_through_matching(function, P, P, SPEC, X[None], **settings)


STRAIGHT_THROUGH = {
    "no steps": (straight_through(steps=0), "steps must be positive"),
    "infinite loss": (straight_through(loss_fn=lambda p, x: loss(p, x) / 0), "inf at step 0"),
    "loss of each example": (straight_through(loss_fn=lambda p, x: net(p, x)[:, 0]), r"a scalar .* got loss \(4,\)"),
    "two values": (straight_through(loss_fn=lambda p, x: {"l": loss(p, x), "m": loss(p, x)}), "which value to look at"),
}


@pytest.mark.parametrize("case", STRAIGHT_THROUGH)
def test_straight_through_matching_says_what_is_wrong(case):
    call, said = STRAIGHT_THROUGH[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("straight_through_matching: ")


REPAIR = {
    "no bias": (
        lambda: repair(units, P, P, P, without("in/bias"), X),
        r"group h needs scales and one bias .* got leaves \['in/kernel'\]",
    ),
    "alpha": (lambda: repair(units, P, P, P, SPEC, X, alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
    "other trees": (lambda: repair(units, OTHER, P, P, SPEC, X), "only in a; top: only in merged"),
    "nan": (
        lambda: repair(units, P, {**P, "in": {**P["in"], "bias": P["in"]["bias"] / 0}}, P, SPEC, X),
        "must be finite",
    ),
}


@pytest.mark.parametrize("case", REPAIR)
def test_repair_says_what_is_wrong(case):
    call, said = REPAIR[case]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert str(error.value).startswith("repair: ")


ASSIGNMENT = {
    "not square": (np.ones((2, 3)), r"must be square, got \(2, 3\)"),
    "a vector": (np.ones(3), r"must be square, got \(3,\)"),
    "nan": (np.full((2, 2), np.nan), "must be finite"),
    "no units": (np.ones((0, 0)), r"there must be a unit to assign, got \(0, 0\)"),
}


@pytest.mark.parametrize("case", ASSIGNMENT)
def test_assignment_says_what_is_wrong(case):
    similarity, said = ASSIGNMENT[case]
    with pytest.raises(ValueError, match=said) as error:
        solve_assignment(similarity)
    assert str(error.value).startswith("solve_assignment: ")


def test_assignment_on_the_host_is_refused_under_jit():
    with pytest.raises(ValueError, match=r'scipy works on the host, got a traced similarity\. Pass solver="optax"'):
        jax.jit(solve_assignment)(jnp.ones((2, 2)))


ENCODER = jax.eval_shape(lambda: init_encoder(CONFIG, key=KEY))
SPECS = {
    "not of make_mlp": (
        lambda: mlp_spec(P),
        "mlp_spec: layers must be Dense_0, Dense_1, ..., got also in/bias, in/kernel, out",
    ),
    "empty": (lambda: mlp_spec({}), "got none of them"),
    "an mlp": (lambda: conv_spec({"Dense_0": P["in"]}), "conv_spec: layers must be conv_i.* got also Dense_0/bias"),
    "no output": (lambda: conv_spec({"conv_0": {"kernel": jnp.ones((3, 3, 1, 2))}}), "must be an output layer"),
    "adapters": (lambda: encoder_spec({**ENCODER, "lora": {"a": X}}, CONFIG), "encoder_spec: .* got also lora/a"),
    "two axes on one": (
        lambda: make_permutation_spec({"w": (UnitAxis("a", 0), UnitAxis("b", 0))}),
        "unit axes of w must lie on axes of their own",
    ),
    "flatten that does not fit": (
        lambda: random_permutation(
            {"w": jnp.ones(3)}, make_permutation_spec({"w": (UnitAxis("a", 0, outer=2),)}), key=KEY
        ),
        r"w \(3,\) has no axis 0 of \[2, a, 1\]",
    ),
}


@pytest.mark.parametrize("case", SPECS)
def test_specs_say_what_is_wrong(case):
    call, said = SPECS[case]
    with pytest.raises(ValueError, match=said):
        call()
