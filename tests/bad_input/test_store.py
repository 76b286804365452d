"""What a user is told of a folder of kernels that cannot be used."""

import errno
import json
import os

import numpy as np
import pytest

from jaxft.kernels.block_layout import Layout
from jaxft.kernels.block_loop import run_blocks
from jaxft.kernels.store import KernelStore, open_kernel_store

LAYOUT = Layout(("sgd",), (4, 4), None, (2, 2), True, np.dtype("float32"))
IDENTITY = {"function": "0123456789abcdef0123456789abcdef", "params": "p", "precision": "highest", "y": None}
BLOCK = {"sgd": np.ones((2, 2), np.float32)}


@pytest.fixture
def folder(tmp_path):
    """A store with one finished block."""
    with KernelStore(tmp_path / "store", LAYOUT, IDENTITY) as store:
        store.write(0, 0, BLOCK)
    return tmp_path / "store"


def refusal(path, layout=LAYOUT, identity=IDENTITY, **options):
    with pytest.raises(ValueError) as error:
        KernelStore(path, layout, identity, **options)
    return str(error.value)


OTHERS = {
    "kernels": (LAYOUT._replace(names=("signgd",)), IDENTITY, 'kernels ["sgd"] there and ["signgd"] here'),
    "examples": (LAYOUT._replace(examples=(5, 5)), IDENTITY, "examples [4, 4] there and [5, 5] here"),
    "outputs": (LAYOUT._replace(outputs=2), IDENTITY, "outputs null there and 2 here"),
    "block": (LAYOUT._replace(block=(3, 3)), IDENTITY, "block [2, 2] there and [3, 3] here"),
    "symmetric": (LAYOUT._replace(symmetric=False), IDENTITY, "symmetric true there and false here"),
    "dtype": (LAYOUT._replace(dtype=np.dtype("float64")), IDENTITY, "dtype <f4 there and <f8 here"),
    "params": (LAYOUT, IDENTITY | {"params": "q"}, "params p there and q here"),
    "precision": (LAYOUT, IDENTITY | {"precision": "default"}, "precision highest there and default here"),
    "y": (LAYOUT, IDENTITY | {"y": "d"}, "y null there and d here"),
    "long": (LAYOUT, IDENTITY | {"function": "f" * 32}, "function 0123456789ab... there and ffffffffffff... here"),
    "field more": (LAYOUT, IDENTITY | {"method": "tiled"}, "method absent there and tiled here"),
    "two": (LAYOUT, IDENTITY | {"params": "q", "y": "d"}, "params p there and q here; y null there and d here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_store_of_other_kernels_is_refused_by_the_fields_that_differ(folder, other):
    layout, identity, said = OTHERS[other]
    assert f"{folder} must hold the same kernels, got {said}. Pass another folder" in refusal(folder, layout, identity)
    KernelStore(folder, LAYOUT, IDENTITY).close()  # nothing was changed


def test_a_store_is_not_written_over(folder):
    said = refusal(folder, resume=False)
    assert f"{folder} must be empty with resume=False, got a kernel store. Pass resume=True" in said
    assert len(json.loads((folder / "journal.jsonl").read_text())) == 2


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "must be empty or a kernel store, got a folder with thesis.tex. Give the store a" in refusal(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "k").touch()
    assert f"{tmp_path / 'k'} must be a folder" in refusal(tmp_path / "k")
    assert f"{tmp_path / 'k' / 'store'} must be a folder" in refusal(tmp_path / "k" / "store")


def test_two_writers_are_one_too_many(folder):
    with KernelStore(folder, LAYOUT, IDENTITY):
        assert f"{folder} may have one writer at a time, got another process or loop" in refusal(folder)
    KernelStore(folder, LAYOUT, IDENTITY).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"format": 1}'])
def test_a_damaged_manifest_is_said(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json must"):
        open_kernel_store(folder)


def test_another_format_is_said(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    assert "must have format 1, got 9. Read it with the version of jaxft that wrote it." in refusal(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_no_store_is_not_opened(tmp_path, verify):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"must be a kernel store, got no manifest\.json there"):
            open_kernel_store(path, verify=verify)


@pytest.mark.parametrize("size", [None, 0, 100, 130])
def test_a_kernel_without_its_file_is_not_opened(folder, size):
    if size is None:
        (folder / "sgd.npy").unlink()
    else:
        (folder / "sgd.npy").write_bytes((folder / "sgd.npy").read_bytes()[:size])
    with pytest.raises(ValueError, match=r"open_kernel_store: .*must be .*sgd\.npy|sgd\.npy must be"):
        open_kernel_store(folder)


def failing(monkeypatch, name, number, *, when=lambda *args: True):
    real = getattr(os, name)

    def call(*args, **options):
        if when(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_said(folder, monkeypatch, number):
    failing(monkeypatch, "open", number, when=lambda path, flags, *_: flags & (os.O_RDWR | os.O_CREAT))
    said = f"kernel_blocks: {folder} must be writable, got {os.strerror(number)}. Pass a folder that you may write to."
    assert refusal(folder) == said


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_at_fault_keeps_what_is_finished(folder, monkeypatch, call, number):
    with KernelStore(folder, LAYOUT, IDENTITY) as store, monkeypatch.context() as patch:
        failing(patch, call, number)
        with pytest.raises(ValueError, match=os.strerror(number)) as error:
            store.write(0, 1, BLOCK)
        assert str(folder) in str(error.value)
        assert ("finished blocks are kept" in str(error.value)) == (number != errno.EIO)
    with KernelStore(folder, LAYOUT, IDENTITY) as store:
        assert [index for index in LAYOUT.indices() if store.finished(*index)] == [(0, 0)]


def test_a_disk_too_small_is_met_before_the_work(tmp_path, monkeypatch):
    failing(monkeypatch, "posix_fallocate", errno.ENOSPC)
    assert f"the disk of {tmp_path} must have room" in refusal(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_disk_that_cannot_reserve_room_is_used_all_the_same(tmp_path, monkeypatch):
    failing(monkeypatch, "posix_fallocate", errno.EOPNOTSUPP)
    with KernelStore(tmp_path, LAYOUT, IDENTITY) as store:
        store.write(0, 0, BLOCK)
        np.testing.assert_array_equal(store.read(0, 0)["sgd"], BLOCK["sgd"])


LAYOUTS = {
    "block of 0": ({"block": (0, 2)}, "block_size must be at least 1, got (0, 2)"),
    "no squares": ({"block": (2, 3)}, "blocks of symmetric kernels must be square"),
    "two sides": ({"examples": (4, 5)}, "blocks of symmetric kernels must be square"),
    "twice": ({"names": ("sgd", "sgd")}, "each once"),
    "none": ({"names": ()}, "one or more"),
    "whole numbers": ({"dtype": np.dtype("int32")}, "a float type that numpy can save, got int32. Use float32"),
}


@pytest.mark.parametrize("fault", LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused(tmp_path, fault):
    changed, said = LAYOUTS[fault]
    assert said in refusal(tmp_path / "store", LAYOUT._replace(**changed))
    assert not (tmp_path / "store").exists()


def test_what_the_loop_is_given_must_fit_the_layout():
    x = np.ones((4, 3), np.float32)

    def loop(x, gram):
        return run_blocks(lambda x: x, gram, x, None, layout=LAYOUT)

    with pytest.raises(ValueError, match=r"the layout must be that of the examples, got \(3, 3\)"):
        loop(x[:3], lambda a, b: a)
    for block in (np.ones((1, 2, 3), np.float32), np.ones((1, 2, 2))):
        with pytest.raises(ValueError, match=r"a block must be float32\[1, 2, 2\]"):
            next(loop(x, lambda a, b, block=block: block))
