"""What a user of image data sets is told."""

import gzip
import struct

import numpy as np
import pytest

from jaxft.data.image_files import read_idx
from jaxft.data.images import image_batches, images_from_batches, load_images, split_images

X, Y = np.zeros((6, 4, 4), np.uint8), np.arange(6) % 2


def idx(array, code=8):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


WHOLE = idx(X)
ZIPPED = gzip.compress(np.random.default_rng(0).bytes(9000))
FLIPPED = ZIPPED[:40] + bytes([ZIPPED[40] ^ 255]) + ZIPPED[41:]

FILES = {
    "truncated": (WHOLE[:50], r"must hold 112 bytes for shape \(6, 4, 4\), got 50\. The file is truncated"),
    "truncated gzip": (gzip.compress(WHOLE, mtime=0)[:-3], "112 where its gzip stream breaks off. The file is trunc"),
    "truncated header": (WHOLE[:9], "must hold 16 bytes of header, got 9"),
    "too long": (WHOLE + b"..", "must hold 112 bytes .*got 114. It is no IDX file of this shape"),
    "huge header": (bytes([0, 0, 8, 3]) + b"\xff" * 12, r"got 16\. The file is truncated"),
    "other magic": (b"PK\x03\x04rest", r"must start as an IDX file: .*, got bytes 50 4b 03 04"),
    "other type": (bytes([0, 0, 7, 1, 0, 0, 0, 0]), "must start as an IDX file.*bytes 00 00 07 01"),
    "empty": (b"", "got bytes none"),
    "damaged gzip": (FLIPPED, "must be readable, got .*Fetch the file again"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_faulty_idx_file_is_described(tmp_path, case):
    data, words = FILES[case]
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match=f"^read_idx: .*{words}"):
        read_idx(tmp_path / "t10k-images-idx3-ubyte")


FOLDERS = {
    "empty": ({}, "must hold train- or t10k-images-idx3-ubyte with the labels, .* with nothing"),
    "others": ({"cat.png": b""}, "with cat.png"),
    "no labels": ({"t10k-images-idx3-ubyte": WHOLE}, "without t10k-labels-idx1-ubyte"),
    "no images": ({"train-labels-idx1-ubyte": idx(Y.astype(np.uint8))}, "without train-images-idx3-ubyte"),
    "fewer labels": (
        {"t10k-images-idx3-ubyte": WHOLE, "t10k-labels-idx1-ubyte": idx(Y[:5].astype(np.uint8))},
        "must hold a label an image, got 6 images and 5 labels",
    ),
    "labels twice": (
        {"t10k-images-idx3-ubyte": idx(Y.astype(np.uint8)), "t10k-labels-idx1-ubyte": idx(Y.astype(np.uint8))},
        r"must be \[n, height, width\] or .*, got \(6,\)",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_faulty_folder_is_described(tmp_path, case):
    files, words = FOLDERS[case]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"load_images: .*{words}"):
        load_images(tmp_path)


NPZ = {
    "misspelt key": ({"x_train": X, "y_trian": Y, "x_test": X, "y_test": Y}, "only x_train, .*Did you mean y_trian"),
    "no key": ({"images": X, "labels": Y}, "must hold x_train, y_train, x_test, y_test, or x, y, got only images"),
    "objects": ({"x": np.array([None, "a"], object), "y": Y}, "whole npz file of plain arrays"),
    "flat": ({"x": X.reshape(6, 16), "y": Y}, r"got \(6, 16\)\. Reshape"),
    "channels first": ({"x": np.zeros((6, 3, 8, 8), np.uint8), "y": Y}, r"channels last.*transpose\(0, 2, 3, 1\)"),
    "one-hot": ({"x": X, "y": np.eye(2)[Y]}, r"must be integers \[n\], got float64 \(6, 2\)\. .*argmax"),
    "negative label": ({"x": X, "y": Y - 1}, "must be 0 or more, got -1"),
    "wide pixels": ({"x": X.astype(np.int64), "y": Y}, r"bytes \(0-255\) or floats, got int64"),
    "nan": ({"x": np.full(X.shape, np.nan), "y": Y}, "must be finite"),
    "no image": ({"x": X[:0], "y": Y[:0]}, r"must hold images, got shape \(0, 4, 4\)"),
    "two sizes": ({"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y}, r"one shape, got \(4, 4, 1\) and \(3"),
}


@pytest.mark.parametrize("case", NPZ)
def test_a_faulty_npz_is_described(tmp_path, case):
    arrays, words = NPZ[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        load_images(tmp_path / "a.npz")


def test_a_truncated_npz_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    data = (tmp_path / "a.npz").read_bytes()
    for cut in (0, 100, len(data) - 30):
        (tmp_path / "b.npz").write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"read_npz: b\.npz must be a whole npz file"):
            load_images(tmp_path / "b.npz")


ONE = {"image": X, "label": Y}
CALLS = {
    "misspelt name": (lambda: load_images("digit"), "must exist, got 'digit'. Did you mean digits?"),
    "no name": (lambda: load_images(""), "must be 'digits', a path, or a pair of paths, got ''"),
    "three files": (lambda: load_images(["a", "b", "c"]), "a pair must be two files, images and labels"),
    "share of nothing known": (lambda: split_images(X, Y, test_frac=float("nan")), r"in \(0, 1\) .*, got nan"),
    "huge labels": (lambda: split_images(X, Y.astype(np.int64) << 40), "must fit 32 bits, got 1099511627776"),
    "pairs for dicts": (lambda: images_from_batches([(X, Y)]), "must be mappings of images and labels, got tuple"),
    "no such npz": (lambda: load_images("none/a.npz"), "must exist, got 'none/a.npz'"),
    "share of 1": (lambda: split_images(X, Y, test_frac=1.0), r"in \(0, 1\) .*, got 1.0 of 6 images"),
    "nothing to train on": (lambda: split_images(X, Y, test_frac=0.9), "leave both splits an image"),
    "no batch": (lambda: images_from_batches([]), "got no batch"),
    "no such key": (
        lambda: images_from_batches([{"img": X, "label": Y}]),
        "key 'image', got only 'img', 'label'.*image=",
    ),
    "not batched": (lambda: images_from_batches([{"image": X[0, 0], "label": 1}]), "Batch the examples first"),
    "sizes differ": (lambda: images_from_batches([ONE, {"image": X[:, :3], "label": Y}]), "images of one shape"),
    "limit of 0": (lambda: images_from_batches([ONE], limit=0), "limit must be at least 1, got 0"),
    "indivisible": (
        lambda: image_batches(X, Y, 4),
        "divide the 6 images, got 4. Use 3, or trim=True to drop the last 2",
    ),
    "too large": (lambda: image_batches(X, Y, 7, trim=True), r"batch_size must be in \[1, 6\], got 7"),
    "lengths": (lambda: image_batches(X, Y[:5], 2), "one length, got 6 and 5"),
}


@pytest.mark.parametrize("case", CALLS)
def test_message(case):
    call, words = CALLS[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_file_that_is_no_archive_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(WHOLE)
    with pytest.raises(ValueError, match=r"must be a \.npz, got .*Pass \(images, labels\) for two IDX files"):
        load_images(tmp_path / "t10k-images-idx3-ubyte")
