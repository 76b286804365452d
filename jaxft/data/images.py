"""Labelled images as float arrays ``[n, height, width, channels]``, from scikit-learn, files or batches of dicts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.checks import nearest, require
from jaxft.core.rng import host_stream
from jaxft.data.image_files import read_idx, read_npz

_SPLIT_NAMES = ("train", "t10k")


class Images(NamedTuple):
    """A classification task on images."""

    x_train: Float[np.ndarray, "n height width channels"]
    """float32; pixels of bytes are divided by 255."""
    y_train: Int[np.ndarray, "n"]
    """int32, classes from 0."""
    x_test: Float[np.ndarray, "m height width channels"]
    y_test: Int[np.ndarray, "m"]
    classes: int
    """One more than the largest label."""
    source: str
    """What was read, and how it was split, for the record of a run."""


def load_images(
    source: str | Path | tuple[str | Path, ...] | list[str | Path], *, test_frac: float = 0.2, seed: int = 0
) -> Images:
    """Images and labels of a data set, read from this machine: nothing is downloaded.

    A source is

    - ``"digits"``: the 1,797 images of 8x8 pixels that come with scikit-learn;
    - a ``.npz`` file with ``x_train``, ``y_train``, ``x_test`` and ``y_test``, or with ``x`` and ``y``;
    - a folder of IDX files under the names of MNIST, gzipped or not: ``train-images-idx3-ubyte`` and
      ``train-labels-idx1-ubyte``, those of ``t10k``, or all four;
    - a pair of IDX files, images and labels.

    What comes without a test split is split at random by ``seed``. Bytes become floats in [0, 1]; floats are taken as
    they are, on whatever scale.

    Args:
      source: Where from.
      test_frac: Share of the test split, rounded up, where the source has none.
      seed: Of that split.

    Returns:
      Both splits, the number of classes, and where they come from.

    Raises:
      UserError: No such source, a file that is truncated or no array of images, or labels that do not fit.

    Example:
      >>> images = load_images("digits")
      >>> images.x_train.shape, images.x_test.shape, images.classes
      ((1437, 8, 8, 1), (360, 8, 8, 1), 10)
    """
    known = isinstance(source, str | Path | tuple | list) and bool(source)
    rule = "the source must be 'digits', a path, or a pair of paths"
    require(known, "load_images", rule, repr(source), "Pass one of them")
    if isinstance(source, tuple | list):
        rule = "a pair must be two files, images and labels"
        require(len(source) == 2, "load_images", rule, source, "Pass (images, labels)")
        x, y = (read_idx(path) for path in source)
        return split_images(x, y, test_frac=test_frac, seed=seed, source=f"{source[0]}, {source[1]}")
    if str(source) == "digits":
        # Costly to import, and needed for nothing else.
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        x, y = (digits.images / 16).astype(np.float32), digits.target
        return split_images(x, y, test_frac=test_frac, seed=seed, source="scikit-learn digits")
    path = Path(source)
    advice = f"{nearest(str(source), ['digits'])} Or pass a .npz file, a folder of IDX files, or a pair of them"
    require(path.exists(), "load_images", "the source must exist", repr(str(source)), advice)
    if path.is_dir():
        return _load_folder(path, test_frac, seed)
    npz = path.suffix == ".npz"
    advice = "Pass (images, labels) for two IDX files" if "idx" in path.name else "Save images and labels by np.savez"
    require(npz, "load_images", "a file must be a .npz", path, advice)
    arrays = read_npz(path)
    if len(arrays) == 2:
        return split_images(*arrays, test_frac=test_frac, seed=seed, source=str(path))
    return _join(arrays[:2], arrays[2:], str(path))


def split_images(
    x: np.ndarray, y: np.ndarray, *, test_frac: float = 0.2, seed: int = 0, source: str = "arrays"
) -> Images:
    """A task from one set of images, split at random.

    Args:
      x: Images ``[n, height, width]`` or ``[n, height, width, channels]``, bytes or floats.
      y: Labels, integers from 0.
      test_frac: Share of the test split, rounded up.
      seed: Of the split.
      source: Name for the record.

    Returns:
      Both splits, each in a random order.

    Raises:
      UserError: Arrays that are no images with labels, or a split that would be empty.

    Example:
      >>> images = split_images(np.zeros((10, 4, 4), np.uint8), np.arange(10) % 2)
      >>> images.x_train.shape, images.y_test.shape, images.classes, images.source
      ((8, 4, 4, 1), (2,), 2, 'arrays, 2 of 10 for testing by seed 0')
    """
    x, y = _checked(x, y, source)
    n, inside = len(x), 0 < test_frac < 1
    test = math.ceil(test_frac * n) if inside else 0
    rule = "test_frac must be in (0, 1) and leave both splits an image"
    require(inside and test < n, "split_images", rule, f"{test_frac} of {n} images", "Use 0.2, say")
    order = host_stream(seed, "images").permutation(n)
    held, kept = order[:test], order[test:]
    said = f"{source}, {test} of {n} for testing by seed {seed}"
    return Images(x[kept], y[kept], x[held], y[held], int(y.max()) + 1, said)


def images_from_batches(
    train: Iterable[Any],
    test: Iterable[Any] | None = None,
    *,
    limit: int | None = None,
    image: str = "image",
    label: str = "label",
    test_frac: float = 0.2,
    seed: int = 0,
) -> Images:
    """A task from batches of dicts, as of ``tfds.as_numpy(...)`` or ``dataset.with_format("numpy").iter(256)``.

    Args:
      train: Batches, each a mapping that holds images and labels; read only as far as ``limit`` asks.
      test: Batches of the test split; without them a share of ``train`` is held out.
      limit: Most images that are taken from either.
      image: Key of the images ``[b, height, width]`` or ``[b, height, width, channels]``.
      label: Key of the labels ``[b]``.
      test_frac: Share that is held out without ``test``.
      seed: Of that split.

    Returns:
      Both splits, as of ``load_images``.

    Raises:
      UserError: Missing keys, examples that are not batched, or arrays that are no images with labels.

    Example:
      >>> batches = [{"image": np.zeros((4, 2, 2, 3), np.uint8), "label": np.arange(4)}] * 5
      >>> images_from_batches(batches, limit=10).x_train.shape
      (8, 2, 2, 3)
    """
    valid = limit is None or limit > 0
    require(valid, "images_from_batches", "limit must be at least 1", limit, "Use None for all images")
    found = _collect(train, limit, image, label)
    if test is None:
        return split_images(*found, test_frac=test_frac, seed=seed, source="batches")
    return _join(found, _collect(test, limit, image, label), "batches")


def image_batches(
    x: np.ndarray | Array, y: np.ndarray | Array, batch_size: int, *, trim: bool = False
) -> tuple[np.ndarray | Array, np.ndarray | Array]:
    """Images and labels stacked into batches of one size, in their order.

    Args:
      x: Examples on axis 0.
      y: Labels.
      batch_size: Examples of a batch.
      trim: Whether the examples left over at the end are dropped; otherwise there must be none.

    Returns:
      ``x`` as ``[n_batches, batch_size, ...]`` and ``y`` likewise.

    Raises:
      UserError: ``batch_size`` does not divide the examples and ``trim`` is off, or there are too few.

    Example:
      >>> x, y = image_batches(np.zeros((10, 4, 4, 1)), np.arange(10), 3, trim=True)
      >>> x.shape, y.tolist()
      ((3, 3, 4, 4, 1), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    """
    n = len(x)
    require(len(y) == n, "image_batches", "x and y must have one length", f"{n} and {len(y)}", "Pass a label an image")
    rule = f"batch_size must be in [1, {n}]"
    require(1 <= batch_size <= n, "image_batches", rule, batch_size, "Pass more images or smaller batches")
    left = n % batch_size
    divisor = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - batch_size))
    advice = f"Use {divisor}, or trim=True to drop the last {left}"
    require(trim or not left, "image_batches", f"batch_size must divide the {n} images", batch_size, advice)
    kept = n - left
    return x[:kept].reshape(-1, batch_size, *x.shape[1:]), y[:kept].reshape(-1, batch_size, *y.shape[1:])


def _load_folder(folder: Path, test_frac: float, seed: int) -> Images:
    files = {
        (split, kind): _idx_file(folder, split, kind)
        for split in _SPLIT_NAMES
        for kind in ("images-idx3", "labels-idx1")
    }
    present = [split for split in _SPLIT_NAMES if files[split, "images-idx3"] or files[split, "labels-idx1"]]
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    rule = "a folder must hold train- or t10k-images-idx3-ubyte with the labels, gzipped or not"
    require(bool(present), "load_images", rule, f"{folder} with {inside}", "Name the folder of the IDX files")
    missing = [f"{split}-{kind}-ubyte" for (split, kind), path in files.items() if split in present and path is None]
    require(not missing, "load_images", rule, f"{folder} without {', '.join(missing)}", "Add what is missing")
    parts = [_read_split(files, split) for split in present]
    if len(parts) == 2:
        return _join(parts[0], parts[1], str(folder))
    return split_images(*parts[0], test_frac=test_frac, seed=seed, source=f"{folder} ({present[0]})")


def _read_split(files: Mapping[tuple[str, str], Path | None], split: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = (read_idx(path) for (name, _), path in files.items() if name == split and path)
    return x, y


def _idx_file(folder: Path, split: str, kind: str) -> Path | None:
    names = [f"{split}-{kind}-ubyte", f"{split}-{kind.replace('-', '.')}-ubyte"]
    found = [folder / (name + end) for name in names for end in ("", ".gz") if (folder / (name + end)).is_file()]
    return found[0] if found else None


def _join(train: Sequence[np.ndarray], test: Sequence[np.ndarray], source: str) -> Images:
    x_train, y_train = _checked(train[0], train[1], f"{source} (train)")
    x_test, y_test = _checked(test[0], test[1], f"{source} (test)")
    sizes = x_train.shape[1:], x_test.shape[1:]
    rule = "images of both splits must have one shape"
    require(sizes[0] == sizes[1], "load_images", rule, f"{sizes[0]} and {sizes[1]}", f"Check {source}")
    return Images(x_train, y_train, x_test, y_test, int(max(y_train.max(), y_test.max())) + 1, source)


def _collect(batches: Iterable[Any], limit: int | None, image: str, label: str) -> tuple[Any, Any]:
    images, labels, count, where = [], [], 0, "images_from_batches"
    for batch in batches:
        rule, kind = "batches must be mappings of images and labels", type(batch).__name__
        require(isinstance(batch, Mapping), where, rule, kind, "Pass a dict a batch, or arrays to split_images")
        for key, name in ((image, "image"), (label, "label")):
            rule = f"batches must hold the key {key!r}"
            shown = ", ".join(map(repr, batch))
            require(key in batch, where, rule, f"only {shown}", f"{nearest(key, map(str, batch))} Pass {name}=")
        x, y = np.asarray(batch[image]), np.asarray(batch[label])
        fits = x.ndim in (3, 4) and y.ndim == 1 and len(x) == len(y)
        rule = "a batch must hold images [b, height, width, channels] and labels [b]"
        require(fits, where, rule, f"{x.shape} and {y.shape}", "Batch the examples first")
        left = len(x) if limit is None else limit - count
        images.append(x[:left])
        labels.append(y[:left])
        count += len(images[-1])
        if limit is not None and count >= limit:
            break
    shapes = sorted({x.shape[1:] for x in images})
    require(len(shapes) == 1, where, "batches must hold images of one shape", shapes or "no batch", "Resize them")
    return np.concatenate(images), np.concatenate(labels)


def _checked(x: np.ndarray, y: np.ndarray, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Images as float32 with channels last, labels as int32."""
    where, x, y = "load_images", np.asarray(x), np.asarray(y)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    rule = f"images of {source} must be [n, height, width] or [n, height, width, channels]"
    require(x.ndim in (3, 4), where, rule, x.shape, "Reshape them")
    require(0 not in x.shape, where, f"{source} must hold images", f"shape {x.shape}", "Check the file")
    channels_first = x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 2, 3, 4)
    rule, advice = f"images of {source} must have their channels last", "Transpose by x.transpose(0, 2, 3, 1)"
    require(not channels_first, where, rule, x.shape, advice)
    labels = np.issubdtype(y.dtype, np.integer) and y.ndim == 1
    rule, advice = f"labels of {source} must be integers [n]", "Pass class numbers, such as one_hot.argmax(-1)"
    require(labels, where, rule, f"{y.dtype} {y.shape}", advice)
    rule = f"{source} must hold a label an image"
    require(len(x) == len(y), where, rule, f"{len(x)} images and {len(y)} labels", "Check that the files go together")
    require(int(y.min()) >= 0, where, f"labels of {source} must be 0 or more", int(y.min()), "Number classes from 0")
    rule, advice = f"labels of {source} must fit 32 bits", "Number classes from 0"
    require(int(y.max()) < 2**31, where, rule, int(y.max()), advice)
    pixels = x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)
    rule, advice = f"pixels of {source} must be bytes (0-255) or floats", "Scale them to [0, 1] as float32"
    require(pixels, where, rule, x.dtype, advice)
    x = x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)
    require(bool(np.isfinite(x).all()), where, f"pixels of {source} must be finite", "NaN or infinity", "Drop them")
    return (x if x.ndim == 4 else x[..., None]), y.astype(np.int32)
