"""Kernels block by block, and the folder that keeps them: killed or damaged anywhere, it ends in the same kernel."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import block_files
from jaxft.kernels.block_layout import Layout
from jaxft.kernels.block_loop import KernelBlock, run_blocks
from jaxft.kernels.store import KernelStore, StoreWarning, open_kernel_store

NAMES = ("sgd", "asymmetric_signgd")
IDENTITY = {"function": "f0", "params": "a1"}
DRAW = np.random.default_rng(0).integers(-4, 5, size=(7, 3)).astype(np.float32)  # whole numbers: sums are exact
X, Y = DRAW, DRAW[::-1][:5].copy()
WEIGHTS = np.arange(-3, 3, dtype=np.float32).reshape(1, 2, 3)


class Linear:
    """Outputs whose gradients are the examples, scaled; counts what is asked of it."""

    def __init__(self, c, names=NAMES, compiled=jax.jit):
        self.c, self.names, self.calls, self.traces = c, names, [], []
        self.compiled = compiled(self._features), compiled(self._gram)

    def features(self, x):
        self.calls.append("features")
        return self.compiled[0](x)

    def gram(self, a, b):
        self.calls.append("gram")
        return self.compiled[1](a, b)

    def _features(self, x):
        self.traces.append("features")
        return (x[:, None] * WEIGHTS[:, : self.c or 1]).reshape(-1, 3)

    def _gram(self, a, b):
        self.traces.append("gram")
        return jnp.stack([a @ (jnp.sign(b) if "sign" in name else b).T for name in self.names])

    def dense(self, x, y):
        a, b = (np.asarray(x)[:, None] * WEIGHTS[:, : self.c or 1] for x in (x, y))
        full = {n: np.einsum("ncp,mdp->ncmd", a, np.sign(b) if "sign" in n else b) for n in self.names}
        return full if self.c else {n: k[:, 0, :, 0] for n, k in full.items()}

    def layout(self, rows, columns, y: np.ndarray | None = Y, *, symmetric=False):
        sizes = len(X), len(X if y is None else y)
        return Layout(self.names, sizes, self.c, (rows, columns), symmetric, np.dtype("float32"))

    def grams(self):
        return self.calls.count("gram")


def symmetric(c: int | None = 2):
    """Six blocks on and above the diagonal, of a symmetric kernel."""
    model = Linear(c, ("sgd",))
    return model, model.layout(3, 3, None, symmetric=True)


def blocks_of(model, layout, path, y=None, **options):
    store = None if path is None else KernelStore(path, layout, IDENTITY)
    return run_blocks(model.features, model.gram, X, y, layout=layout, store=store, **options)


def assembled(blocks, layout):
    """The kernels, each entry of which must come once."""
    full = {name: np.full(layout.shape, np.nan, np.float32) for name in layout.names}
    for block in blocks:
        for name, entries in block.kernels.items():
            axes = (
                (block.rows, block.columns) if layout.outputs is None else (block.rows, ..., block.columns, slice(None))
            )
            assert np.isnan(full[name][axes]).all()
            full[name][axes] = entries
    return full


def assert_equal(kernels, dense):
    assert set(kernels) == set(dense)
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(kernel, dense[name])


def assert_stored(path, dense):
    stored = open_kernel_store(path, verify=True)
    assert not stored.missing
    assert_equal(stored.kernels, dense)


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in turn"])
@pytest.mark.parametrize("kept", [True, False], ids=["stored", "unstored"])
@pytest.mark.parametrize("c", [None, 2])
def test_blocks_that_do_not_divide_make_the_dense_kernel(tmp_path, c, kept, ahead):
    model = Linear(c)
    layout = model.layout(3, 2)
    full = assembled(blocks_of(model, layout, tmp_path if kept else None, Y, ahead=ahead), layout)
    assert_equal(full, model.dense(X, Y))
    assert model.calls.count("features") == 3 + 9 - 2  # columns for each block of rows, but for the turns
    assert sorted(model.traces) == ["features", "features", "gram"]  # of 3 rows, and of 2 columns
    if kept:
        assert_stored(tmp_path, model.dense(X, Y))


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray, lambda x: {"ids": jnp.asarray(x)}])
def test_examples_may_be_any_tree_of_arrays(as_array):
    model = Linear(None)
    layout = model.layout(4, 4)
    one = lambda side: side["ids"] if isinstance(side, dict) else side  # noqa: E731
    blocks = run_blocks(lambda x: model.features(one(x)), model.gram, as_array(X), as_array(Y), layout=layout)
    assert_equal(assembled(blocks, layout), model.dense(X, Y))


@pytest.mark.parametrize("c", [None, 2])
def test_symmetric_kernels_are_computed_once_and_written_twice(tmp_path, c):
    model, layout = symmetric(c)
    assert_equal(assembled(blocks_of(model, layout, tmp_path), layout), model.dense(X, X))
    assert_stored(tmp_path, model.dense(X, X))
    assert model.grams() == 6
    assert model.calls.count("features") == 1 + 2 + 1  # no columns of the diagonal, nor at the turns


def test_the_diagonal_block_of_a_symmetric_kernel_is_symmetric_to_the_bit():
    model, layout = symmetric(None)
    uneven = lambda a, b: model.gram(a, b) + np.triu(np.ones((3, 3), np.float32), 1)[None]  # noqa: E731
    blocks = list(run_blocks(model.features, uneven, X, None, layout=layout))
    diagonal = [b.kernels["sgd"] for b in blocks if b.rows == b.columns]
    assert len(diagonal) == 3
    for k in diagonal:
        np.testing.assert_array_equal(k, k.T)


def test_columns_that_fit_one_block_are_made_once():
    model = Linear(None)
    list(blocks_of(model, model.layout(2, 5), None, Y))
    assert model.calls.count("features") == 4 + 1


@pytest.mark.parametrize("taken", range(10))
def test_left_at_any_block_it_goes_on_without_computing_one_again(tmp_path, taken):
    first, layout = symmetric()
    loop = blocks_of(first, layout, tmp_path)
    for _ in range(taken):  # of 9 blocks, 3 of them mirror images
        next(loop, None)
    del loop  # the lock goes with it
    with KernelStore(tmp_path, layout, IDENTITY) as store:
        done = [index for index in layout.indices() if store.finished(*index)]
    assert 0 <= first.grams() - len(done) <= 1  # the one begun ahead
    second, _ = symmetric()
    assert_equal(assembled(blocks_of(second, layout, tmp_path), layout), second.dense(X, X))
    assert second.grams() == 6 - len(done)
    left = [index for index in layout.indices() if index not in done]
    assert second.calls.count("features") <= len({i for i, _ in left}) + sum(i != j for i, j in left)
    assert_stored(tmp_path, second.dense(X, X))


def test_a_finished_store_computes_nothing(tmp_path):
    model, layout = symmetric()
    first, second = (assembled(blocks_of(model, layout, tmp_path), layout) for _ in range(2))
    assert_equal(first, second)
    assert model.grams() == 6


def test_the_device_has_the_next_block_while_the_last_is_written(tmp_path, monkeypatch):
    model, layout = symmetric()
    write = KernelStore.write
    monkeypatch.setattr(KernelStore, "write", lambda *args: (model.calls.append("write"), write(*args))[1])
    list(blocks_of(model, layout, tmp_path))
    events = [event for event in model.calls if event != "features"]
    assert events == ["gram", *["gram", "write"] * 5, "write"]


def test_a_block_that_the_check_refuses_is_not_stored(tmp_path):
    def refuse(block: KernelBlock):
        if block.columns.start == 3:
            raise ValueError("not finite")

    model, layout = symmetric()
    with pytest.raises(ValueError, match="not finite"):
        list(blocks_of(model, layout, tmp_path, check=refuse))
    with pytest.warns(StoreWarning, match="5 of 6 blocks are missing"):
        assert open_kernel_store(tmp_path).missing[0] == (slice(0, 3), slice(3, 6))


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
import importlib.util
spec = importlib.util.spec_from_file_location("test_store", sys.argv[3])
store = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store)
model, layout = store.symmetric()
for block in store.blocks_of(model, layout, sys.argv[1]):
    print(model.grams(), flush=True)
    time.sleep(0.2)
"""


def test_a_killed_process_is_continued(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(root), __file__]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(4)]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert lines[0] == "2\n"
    model, layout = symmetric()
    assert_equal(assembled(blocks_of(model, layout, tmp_path), layout), model.dense(X, X))
    assert 0 < model.grams() <= 3  # three blocks and a mirror image had come
    assert_stored(tmp_path, model.dense(X, X))


class Killed(BaseException):
    """The process ends here."""


CALLS = ("pwrite", "fsync", "replace", "ftruncate", "posix_fallocate")


def interrupted(monkeypatch, before, error):
    """Lets so many system calls pass, does half of the next one if it writes, and raises."""
    passed = []
    for name in CALLS:
        real = getattr(os, name)

        def call(*args, name=name, real=real):
            if len(passed) == before:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                raise error
            passed.append(name)
            return real(*args)

        monkeypatch.setattr(block_files.os, name, call)
    return passed


def small():
    """Three blocks, one of them with a mirror image."""
    model = Linear(None, ("sgd",), compiled=lambda f: f)  # what counts is the disk
    return model, model.layout(4, 4, None, symmetric=True)


def test_killed_at_any_system_call_it_ends_in_the_same_kernel(tmp_path, monkeypatch):
    for before in range(1000):
        folder, (first, layout) = tmp_path / str(before), small()
        with monkeypatch.context() as patch:
            passed = interrupted(patch, before, Killed())
            try:
                list(blocks_of(first, layout, folder))
            except Killed:
                pass
            else:
                break
        second, _ = small()
        assert_equal(assembled(blocks_of(second, layout, folder), layout), second.dense(X, X))
        assert_stored(folder, second.dense(X, X))
        finished = passed[passed.index("posix_fallocate") :].count("ftruncate") if "posix_fallocate" in passed else 0
        assert 3 - finished <= second.grams() <= 3 - max(0, finished - 1)
    assert before > 30


def test_a_disk_full_at_any_system_call_loses_nothing(tmp_path, monkeypatch):
    for before in range(1000):
        folder, (first, layout) = tmp_path / str(before), small()
        with monkeypatch.context() as patch:
            passed = interrupted(patch, before, OSError(errno.ENOSPC, "No space left on device"))
            try:
                list(blocks_of(first, layout, folder))
            except ValueError as error:
                said = str(error)
            else:
                break
        assert f"the disk of {folder} must have room" in said
        if "posix_fallocate" not in passed:  # met before the work
            assert first.calls == []
            assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == []
        second, _ = small()
        assert_equal(assembled(blocks_of(second, layout, folder), layout), second.dense(X, X))
    assert before > 30


def test_after_a_full_disk_the_same_store_goes_on(tmp_path, monkeypatch):
    _, layout = small()
    block = {"sgd": np.ones((4, 4), np.float32)}
    with KernelStore(tmp_path, layout, IDENTITY) as store:
        store.write(0, 0, block)
        for before in range(1000):
            with monkeypatch.context() as patch:
                interrupted(patch, before, OSError(errno.ENOSPC, "No space left on device"))
                try:
                    store.write(0, 1, {"sgd": np.ones((4, 3), np.float32)})
                except ValueError:
                    assert store.finished(0, 0)
                    assert not store.finished(0, 1)
                else:
                    break
        assert before > 7
        store.write(1, 1, {"sgd": np.ones((3, 3), np.float32)})
    assert_stored(tmp_path, {"sgd": np.ones((7, 7), np.float32)})
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3


def test_bytes_are_on_the_disk_before_the_journal_tells_of_them(tmp_path, monkeypatch):
    _, layout = small()
    with KernelStore(tmp_path, layout, IDENTITY) as store, monkeypatch.context() as patch:
        passed = interrupted(patch, -1, Killed())
        store.write(0, 0, {"sgd": np.ones((4, 4), np.float32)})
    assert passed == [*["pwrite"] * 4, "fsync", "ftruncate", "pwrite", "fsync"]


def test_short_writes_of_the_system_are_continued(tmp_path, monkeypatch):
    model, layout = small()
    real = os.pwrite
    monkeypatch.setattr(block_files.os, "pwrite", lambda file, data, offset: real(file, data[:5], offset))
    list(blocks_of(model, layout, tmp_path))
    assert_stored(tmp_path, model.dense(X, X))


@pytest.fixture
def finished(tmp_path):
    model, layout = symmetric(None)
    list(blocks_of(model, layout, tmp_path))
    return tmp_path, model, layout


def reopened(finished):
    """Number of blocks computed again; the kernel must be whole afterwards."""
    folder, _, layout = finished
    model, _ = symmetric(None)
    assert_equal(assembled(blocks_of(model, layout, folder), layout), model.dense(X, X))
    assert_stored(folder, model.dense(X, X))
    return model.grams()


@pytest.mark.parametrize("end", [1, 2, 30])
def test_a_torn_last_line_is_dropped_and_its_block_computed_again(finished, end):
    journal = finished[0] / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-end])
    assert reopened(finished) == 1


def test_a_damaged_line_within_the_journal_is_said_and_computed_again(finished):
    journal = finished[0] / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(['{"block": [0, "x"]}\n', *lines[1:]]))
    with pytest.warns(StoreWarning, match="1 lines of the journal cannot be read"):
        assert reopened(finished) == 1


@pytest.mark.parametrize(("entry", "block"), [((1, 5), "(0, 1)"), ((5, 1), "(0, 1)"), ((6, 6), "(2, 2)")])
def test_one_flipped_bit_is_found_said_and_its_block_computed_again(finished, entry, block):
    file = finished[0] / "sgd.npy"
    data = bytearray(file.read_bytes())
    data[len(data) - 4 * 49 + 4 * (7 * entry[0] + entry[1])] ^= 1
    file.write_bytes(data)
    with pytest.warns(StoreWarning, match="blocks are missing"):
        assert len(open_kernel_store(finished[0], verify=True).missing) == 1
    with pytest.warns(StoreWarning) as said:
        assert reopened(finished) == 1
    assert f"1 blocks do not fit their checksum ({block})" in str(said[0].message)
    assert reopened(finished) == 0


@pytest.mark.parametrize("damage", ["removed", "truncated", "header"])
def test_a_lost_file_is_computed_again(finished, damage):
    file = finished[0] / "sgd.npy"
    data = file.read_bytes()
    file.write_bytes(data[:150] if damage == "truncated" else b"\0" * 8 + data[8:])
    if damage == "removed":
        file.unlink()
    if damage == "header":  # written again, and nothing else is lost
        assert reopened(finished) == 0
    else:
        with pytest.warns(StoreWarning, match="6 blocks do not fit"):
            assert reopened(finished) == 6


def test_what_is_opened_is_a_memory_map_of_the_file(finished):
    folder, model, _ = finished
    stored = open_kernel_store(folder)
    kernel = stored.kernels["sgd"]
    assert isinstance(kernel, np.memmap)
    assert kernel.filename == folder / "sgd.npy"
    assert kernel.mode == "r"
    np.testing.assert_array_equal(np.load(folder / "sgd.npy"), model.dense(X, X)["sgd"])
    with open(folder / "sgd.npy", "r+b") as file:  # what another writes is seen: nothing was loaded
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(123).tobytes())
    assert kernel[-1, -1] == 123


def test_an_unfinished_store_tells_what_is_missing(tmp_path):
    model, layout = symmetric(None)
    loop = blocks_of(model, layout, tmp_path, ahead=False)
    next(loop)
    with pytest.warns(StoreWarning, match="5 of 6 blocks are missing"):
        stored = open_kernel_store(tmp_path)  # while it is being written
    assert stored.missing[0] == (slice(0, 3), slice(3, 6))
    np.testing.assert_array_equal(stored.kernels["sgd"][:3, :3], model.dense(X, X)["sgd"][:3, :3])
    assert stored.manifest["params"] == "a1"


def test_the_manifest_tells_what_the_kernels_came_from(finished):
    manifest = json.loads((finished[0] / "manifest.json").read_text())
    assert manifest == {
        "format": 1,
        "kernels": ["sgd"],
        "examples": [7, 7],
        "outputs": None,
        "block": [3, 3],
        "symmetric": True,
        "dtype": "<f4",
        **IDENTITY,
    }
