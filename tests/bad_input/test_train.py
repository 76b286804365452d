import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core.checks import UserError
from jaxft.train import (
    Checkpoints,
    accuracy,
    adafactor_preconditioner,
    adam_ntk,
    cross_entropy,
    fit,
    fully_shard,
    init_fit,
    init_state,
    make_optimizer,
    make_schedule,
    make_segment,
    mse,
    second_moment,
    shard_examples,
)

W = jnp.zeros(2)


def one_device_mesh(name):
    return jax.make_mesh((1,), (name,), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="module")
def segment():
    return make_segment(lambda w, x: x @ w, cross_entropy, optax.sgd(0.1))


@pytest.fixture(scope="module")
def state():
    return init_state(W, optax.sgd(0.1))


@pytest.mark.parametrize("objective", [cross_entropy, mse, accuracy])
@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (jnp.zeros((2, 3)), jnp.array([0]), r"labels \[b\], got logits \(2, 3\) and labels \(1,\)"),
        (jnp.zeros((2, 3, 1)), jnp.array([0, 1]), r"must be \[b, c\] or \[b\]"),
        (jnp.zeros((0, 3)), jnp.zeros(0, int), r"must be \[b, c\] or \[b\]"),
        (jnp.zeros((2, 3)), jnp.array([0.0, 1.0]), "labels must be integers, got float32"),
        (jnp.zeros((2, 3)), jnp.array([0, 3]), r"labels must lie in 0\.\.2, got 0\.\.3\. Map label words"),
        (jnp.zeros(2), jnp.array([-1, 1]), r"labels must lie in 0\.\.1, got -1\.\.1"),
    ],
)
def test_objective_names_what_does_not_fit(objective, logits, labels, said):
    with pytest.raises(UserError, match=f"^{objective.__name__}: .*{said}"):
        objective(logits, labels)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"got neither a second moment nor a warmup\. Pass second_moment=.* or warmup >= 1"),
        ({"warmup": 2, "second_moment": W}, "got a second moment and a warmup"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
        ({"warmup": 1, "b1": 1.0}, r"b1, b2 must lie in \[0, 1\)"),
    ],
)
def test_adam_ntk_needs_one_source_of_its_second_moment(options, said):
    with pytest.raises(UserError, match=said):
        adam_ntk(0.1, **options)


def test_adam_ntk_refuses_a_moment_of_another_model():
    with pytest.raises(UserError, match="shapes of the parameters"):
        adam_ntk(0.1, second_moment=jnp.ones(3)).init(W)
    with pytest.raises(UserError, match="structure of the parameters"):
        adam_ntk(0.1, second_moment={"a": W}).init(W)


def test_second_moment_needs_one_adam_state_that_has_seen_a_step():
    with pytest.raises(UserError, match=r"one optax\.adam state, got 0\. Pass the state of a run"):
        second_moment(optax.sgd(0.1, momentum=0.9).init(W), b2=0.999)
    with pytest.raises(UserError, match=r"one optax\.adam state, got 2"):
        second_moment(optax.chain(optax.adam(0.1), optax.adam(0.1)).init(W), b2=0.999)
    with pytest.raises(UserError, match=r"must have taken a step, got count 0"):
        second_moment(optax.adam(0.1).init(W), b2=0.999)


def test_adafactor_preconditioner_needs_factored_moments_of_the_same_parameters():
    with pytest.raises(UserError, match=r"one optax\.adafactor state, got 0"):
        adafactor_preconditioner(optax.adam(0.1).init(W), W)
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    _, state = tx.update(W, tx.init(W), W)
    with pytest.raises(UserError, match=r"another tree\. Pass the parameters of the same run"):
        adafactor_preconditioner(state, {"a": W})
    with pytest.raises(UserError, match="moments must fit the parameters"):
        adafactor_preconditioner(state, jnp.ones((7, 9)))


def test_optimizer_names_the_nearest_name_and_option():
    with pytest.raises(UserError, match=r"must be an optimiser, got 'adm'\. Did you mean adam\?"):
        make_optimizer("adm", 0.1)
    with pytest.raises(UserError, match=r"got momentun\. momentun: Did you mean momentum\?"):
        make_optimizer("sgd", 0.1, momentun=0.9)
    with pytest.raises(UserError, match="It takes none"):
        make_optimizer("sign", 0.1, b1=0.9)


def test_schedule_reports_all_faults_at_once():
    with pytest.raises(UserError, match=r"got kind 'cosine', steps 0, warmup_frac 1\.0"):
        make_schedule(0.1, 0, kind="cosine", warmup_frac=1.0)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (np.array([0, 1]), r"index must be integers \[steps, b\], got int.* \(2,\)"),
        (np.array([[0.5]]), r"index must be integers"),
        (np.array([[0, 4]]), r"index must lie in 0\.\.2, got 0\.\.4"),
        (np.array([[-1, 0]]), r"index must lie in 0\.\.2, got -1\.\.0"),
    ],
)
def test_segment_refuses_an_index_that_names_no_example(segment, state, index, said):
    with pytest.raises(UserError, match=said):
        segment(state, jnp.ones((3, 2)), jnp.zeros(3, int), jnp.asarray(index))


def test_segment_refuses_inputs_and_labels_of_different_length(segment, state):
    with pytest.raises(UserError, match="share a leading axis of examples"):
        segment(state, jnp.ones((3, 2)), jnp.zeros(4, int), jnp.array([[0]]))


def test_mesh_must_have_the_axis_that_is_split():
    mesh = one_device_mesh("model")
    for call in (
        lambda: make_segment(lambda w, x: x @ w, cross_entropy, optax.sgd(0.1), mesh=mesh),
        lambda: shard_examples(jnp.ones(2), mesh),
        lambda: fully_shard(jnp.ones(2), mesh),
    ):
        with pytest.raises(UserError, match=r"axis 'data', got \('model',\)"):
            call()


def test_fit_reports_all_faulty_options_at_once(segment, state):
    with pytest.raises(UserError, match="got steps -1, event_every 0, patience 0, patience 0 without evaluate"):
        fit(
            segment,
            init_fit(state),
            jnp.ones((3, 2)),
            jnp.zeros(3, int),
            batches=lambda start, stop: np.zeros((stop - start, 1), int),
            steps=-1,
            event_every=0,
            patience=0,
        )


def test_fit_refuses_batches_of_other_steps(segment, state):
    with pytest.raises(UserError, match=r"must be \[stop - start, b\], got shape \(3, 1\) for steps 0\.\.1"):
        fit(
            segment,
            init_fit(state),
            jnp.ones((3, 2)),
            jnp.zeros(3, int),
            batches=lambda start, stop: np.zeros((3, 1), int),
            steps=4,
            event_every=2,
        )


def test_checkpoint_of_another_structure_is_refused_naming_the_leaves(tmp_path):
    tree = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(2), "k": jax.random.key(0)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, tree)
        for like, said in [
            ({"a": tree["a"]}, "got b/c missing; b/k missing"),
            (tree | {"d": W}, "got d not in the checkpoint"),
            (tree | {"a": jnp.ones((3, 2))}, r"got a float32\[3, 2\] for float32\[2, 3\]"),
            (tree | {"a": jnp.ones((2, 3), jnp.bfloat16)}, r"got a bfloat16\[2, 3\] for float32\[2, 3\]"),
        ]:
            with pytest.raises(UserError, match=f"structure of the checkpoint, {said}\\. Build the state with"):
                checkpoints.restore(4, like)


def test_checkpoint_steps_are_saved_once_and_named_when_missing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="Saved: none"):
            checkpoints.restore(4, {"w": W})
        checkpoints.save(4, {"w": W})
        checkpoints.save(6, {"w": W})
        with pytest.raises(UserError, match="step must be above 6, the latest saved, got 6"):
            checkpoints.save(6, {"w": W})
        with pytest.raises(UserError, match=r"got 5\. Saved: 4, 6"):
            checkpoints.restore(5, {"w": W})
    with pytest.raises(UserError, match="keep must be >= 1, got 0"):
        Checkpoints(tmp_path, keep=0)
