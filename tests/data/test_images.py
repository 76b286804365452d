import gzip
import struct

import numpy as np
import pytest

from jaxft.data.image_files import read_idx
from jaxft.data.images import image_batches, images_from_batches, load_images, split_images

MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(256, size=(10, 4, 3), dtype=np.uint8)
LABELS = (np.arange(10) % 3).astype(np.uint8)


def idx_bytes(array, code=8):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, *splits, zipped=False, dot=False):
    """Files under MNIST's names, of the arrays above."""
    for split in splits:
        for kind, array in (("images-idx3", PIXELS), ("labels-idx1", LABELS)):
            name = f"{split}-{kind.replace('-', '.') if dot else kind}-ubyte"
            data = idx_bytes(array)
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)


def rows(images):
    """Images and labels of both splits as a set: what a split must preserve."""
    x, y = np.concatenate([images.x_train, images.x_test]), np.concatenate([images.y_train, images.y_test])
    return sorted((int(label), *pixels.ravel().tolist()) for pixels, label in zip(x, y, strict=True))


EXPECTED_ROWS = sorted(
    (int(y), *(x.astype(np.float32) / np.float32(255)).ravel().tolist()) for x, y in zip(PIXELS, LABELS, strict=False)
)


def test_digits_are_the_bundled_ones_scaled_to_one():
    images = load_images("digits")
    assert images.x_train.shape == (1437, 8, 8, 1)
    assert images.x_test.shape == (360, 8, 8, 1)
    assert (images.x_train.min(), images.x_train.max(), images.classes) == (0, 1, 10)
    assert images.x_train.dtype == np.float32
    assert images.y_train.dtype == np.int32
    assert np.bincount(np.concatenate([images.y_train, images.y_test])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip
    assert images.source == "scikit-learn digits, 360 of 1797 for testing by seed 0"


def test_a_split_keeps_every_image_with_its_label_and_is_a_function_of_the_seed():
    images, again, other = (split_images(PIXELS, LABELS, test_frac=0.25, seed=seed) for seed in (1, 1, 2))
    assert (len(images.x_train), len(images.x_test)) == (7, 3)
    assert rows(images) == EXPECTED_ROWS
    assert np.array_equal(images.x_test, again.x_test)
    assert not np.array_equal(images.x_test, other.x_test)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_a_folder_of_idx_files_keeps_the_splits_of_its_names(tmp_path, zipped, dot):
    write_mnist(tmp_path, "train", "t10k", zipped=zipped, dot=dot)
    images = load_images(tmp_path)
    np.testing.assert_array_equal(images.x_train[..., 0], PIXELS.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(images.x_test, images.x_train)
    assert images.y_test.tolist() == LABELS.tolist()
    assert images.classes == 3


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_one_idx_split_alone_is_split(tmp_path, split):
    write_mnist(tmp_path, split)
    images = load_images(str(tmp_path), test_frac=0.3)
    assert (len(images.x_train), len(images.x_test)) == (7, 3)
    assert rows(images) == EXPECTED_ROWS
    pair = load_images(
        (tmp_path / f"{split}-images-idx3-ubyte", tmp_path / f"{split}-labels-idx1-ubyte"), test_frac=0.3
    )
    assert np.array_equal(pair.x_test, images.x_test)


def test_a_gzip_file_of_several_streams_is_read_to_its_end(tmp_path):
    data = idx_bytes(PIXELS)
    (tmp_path / "a").write_bytes(gzip.compress(data[:30]) + gzip.compress(data[30:]))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), PIXELS)


@pytest.mark.parametrize(
    ("code", "dtype"), [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_every_type_of_idx_is_read_in_its_byte_order(tmp_path, code, dtype):
    array = np.array([[1, -2, 3], [4, 5, 100]]).astype(dtype)
    (tmp_path / "a").write_bytes(idx_bytes(array, code))
    found = read_idx(tmp_path / "a")
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found, array)


def test_the_mnist_test_files_have_their_known_class_counts(data_dir):
    images = load_images(data_dir / "images", seed=3)
    assert images.x_train.shape == (8000, 28, 28, 1)
    assert images.x_test.shape == (2000, 28, 28, 1)
    assert np.bincount(np.concatenate([images.y_train, images.y_test])).tolist() == MNIST_TEST_COUNTS
    assert (images.x_train.min(), images.x_train.max()) == (0, 1)


def test_npz_with_the_keys_of_keras_keeps_its_splits(tmp_path):
    colour = DRAW.integers(256, size=(6, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(6)[:, None] % 2  # CIFAR comes so
    path = tmp_path / "a.npz"
    np.savez(path, x_train=colour, y_train=labels, x_test=colour[:2], y_test=labels[:2] + 3, other=np.array([object()]))
    images = load_images(path)
    np.testing.assert_array_equal(images.x_train, colour.astype(np.float32) / np.float32(255))
    assert images.y_test.tolist() == [3, 4]
    assert images.classes == 5


def test_npz_of_floats_is_split_and_not_rescaled(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=PIXELS.astype(np.float64), y=LABELS)
    images = load_images(path, test_frac=0.5)
    assert rows(images) == sorted((int(y), *x.ravel().tolist()) for x, y in zip(PIXELS, LABELS, strict=True))


def test_batches_are_read_only_as_far_as_asked():
    def stream():
        for start in (0, 4):
            yield {"image": PIXELS[start : start + 4], "label": LABELS[start : start + 4].tolist()}
        raise AssertionError("a batch too many")

    images = images_from_batches(stream(), limit=6, test_frac=0.5)
    whole = split_images(PIXELS[:6], LABELS[:6], test_frac=0.5)
    assert rows(images) == rows(whole)
    assert images.source == "batches, 3 of 6 for testing by seed 0"
    both = images_from_batches(
        [{"img": PIXELS, "y": LABELS}], [{"img": PIXELS, "y": LABELS}], image="img", label="y", limit=7
    )
    assert (both.y_train.tolist(), both.y_test.tolist()) == (LABELS[:7].tolist(),) * 2


def test_batches_hold_the_examples_in_order():
    x, y = image_batches(PIXELS, LABELS, 5)
    np.testing.assert_array_equal(x.reshape(PIXELS.shape), PIXELS)
    assert y.tolist() == [LABELS[:5].tolist(), LABELS[5:].tolist()]
