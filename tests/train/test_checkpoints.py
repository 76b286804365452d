import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.train import Checkpoints, fit, init_fit

SAVER = """
import sys
import numpy as np
from jaxft.train import Checkpoints

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    first = (checkpoints.latest_step() or 0) + 1
    for step in range(first, first + 10_000):
        checkpoints.save(step, {"a": np.full(200_000, float(step)), "b": {"c": np.full(3, step)}})
        print(step, flush=True)
"""


class State(NamedTuple):
    key: jax.Array
    fit: object
    host: np.ndarray
    half: jax.Array


@pytest.fixture(scope="module")
def state(problem):
    odd = jnp.array([jnp.nan, -0.0, 1e-42, jnp.inf], jnp.float32).astype(jnp.bfloat16)
    return State(jax.random.split(jax.random.key(7), 3), init_fit(problem.state), np.arange(4), odd)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state)
    return folder


def bits(tree):
    """Leaves as bytes: NaN equals NaN, and -0 differs from 0."""
    keyless = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree
    )
    return [(np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(keyless)]


@pytest.mark.parametrize("abstract", [False, True])
def test_round_trip_is_bitwise_and_keeps_containers(state, saved, abstract):
    like = state
    if abstract:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state._replace(host=None))
        like = like._replace(host=state.host)
    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(3, like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert restored.key.dtype == state.key.dtype
    assert isinstance(restored.host, np.ndarray)
    assert jax.random.normal(restored.key[1]) == jax.random.normal(state.key[1])


def test_a_restored_fit_continues_bitwise(problem, tmp_path):
    def run(state, on_event=None):
        return fit(
            problem.segment,
            state,
            problem.inputs,
            problem.labels,
            batches=problem.batches,
            steps=10,
            event_every=4,
            evaluate=problem.error,
            on_event=on_event,
        )

    start = init_fit(problem.state)
    with Checkpoints(tmp_path) as checkpoints:
        whole = run(start, lambda state, *_: checkpoints.save(int(state.train.step), state))
        assert checkpoints.latest_step() == 10
        resumed = run(checkpoints.restore(4, start))
    assert bits(resumed) == bits(whole)


def test_only_the_latest_are_kept_and_the_folder_may_be_new(tmp_path):
    folder = tmp_path / "a" / "b"
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 5, 9):
            checkpoints.save(step, {"w": jnp.full(2, step)})
        assert checkpoints.latest_step() == 9
        assert checkpoints.restore(5, {"w": jnp.zeros(2, int)})["w"].tolist() == [5, 5]
    assert sorted(p.name for p in folder.iterdir() if p.name.isdigit()) == ["5", "9"]


def test_a_save_is_not_changed_by_what_the_caller_does_next(tmp_path):
    host = np.zeros(100_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": host})
        host += 1
        assert (checkpoints.restore(1, {"w": host})["w"] == 0).all()


def test_saving_is_silent(tmp_path, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(2)})
        checkpoints.restore(1, {"w": jnp.zeros(2)})
    assert capfd.readouterr() == ("", "")


def test_latest_step_restores_whole_after_kill_at_any_moment(tmp_path):
    like = {"a": np.zeros(200_000), "b": {"c": np.zeros(3, int)}}
    reached = 0
    for delay in (0.0, 0.013, 0.05, 0.11):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert saver.stdout is not None
        for _ in range(3):
            started = int(saver.stdout.readline())
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            step = checkpoints.latest_step()
            assert step is not None
            assert step >= started - 1  # a save begins only when the one before it is complete
            restored = checkpoints.restore(step, like)
        assert (restored["a"] == step).all()
        assert (restored["b"]["c"] == step).all()
        assert step > reached
        reached = step
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(reached + 1, like)  # waits until the halves of killed saves are removed
    assert not [p.name for p in tmp_path.iterdir() if "tmp" in p.name]
