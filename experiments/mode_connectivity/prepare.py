"""From a configuration to what is trained on and measured. Everything is made again at every start."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.mode_connectivity.config import ModeConnectivityConfig
from experiments.mode_connectivity.networks import Network, make_network
from jaxft.core.rng import host_stream
from jaxft.data.batching import batch_indices
from jaxft.data.images import Images, image_batches, load_images

Batches = tuple[Float[Array, "n_batches b height width channels"], Int[Array, "n_batches b"]]
TestBatches = tuple[Float[Array, "n_batches m height width channels"], Int[Array, "n_batches m"]]


class Prepared(NamedTuple):
    """Images, and the batches that losses are evaluated on and curves are fitted to."""

    images: Images
    x_train: Float[Array, "n height width channels"]
    y_train: Int[Array, "n"]
    splits: tuple[Batches, TestBatches]
    """Training and test images in equally many batches, all but those left over at the end."""
    fit: Batches
    """The training images once, shuffled, in batches of the fits."""

    @property
    def train(self) -> Batches:
        """Training images in batches of evaluation."""
        return self.splits[0]

    @property
    def test(self) -> TestBatches:
        """Test images in batches of evaluation."""
        return self.splits[1]

    def network(self, name: str, dropout: float = 0.0) -> Network:
        """The network of a name for these images."""
        return make_network(name, dropout, self.image_shape, self.images.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.images.x_train.shape[1:]
        return height, width, channels


def load(config: ModeConnectivityConfig) -> Images:
    """Reads the images, so that their faults are known before a run is made.

    Raises:
      UserError: The file or folder is faulty, or the images are too small for a network.
    """
    return load_images("digits" if config.data is None else config.data, seed=config.seed)


def _some(config: ModeConnectivityConfig, split: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images of a split that losses are means over."""
    if len(x) <= config.evaluation_images:
        return x, y
    rows = np.sort(host_stream(config.seed, f"evaluation {split}").permutation(len(x))[: config.evaluation_images])
    return x[rows], y[rows]


def prepare(config: ModeConnectivityConfig, images: Images) -> Prepared:
    """Batches of the images."""
    n = len(images.x_train)
    b = min(config.paths.batch_size, n)
    rows = batch_indices(n, b, seed=config.seed, name="fit", stop=max(1, n // b))
    chosen = (
        _some(config, "training", images.x_train, images.y_train),
        _some(config, "test", images.x_test, images.y_test),
    )
    batches = min(-(-len(chosen[0][0]) // config.evaluation_batch), len(chosen[1][0]))
    train, test = (
        jax.tree.map(lambda x: x[:batches], image_batches(x, y, len(x) // batches, trim=True)) for x, y in chosen
    )
    held = (images.x_train, images.y_train), (train, test), (images.x_train[rows], images.y_train[rows])
    (x_train, y_train), splits, fit = jax.tree.map(jnp.asarray, held)
    return Prepared(images, x_train, y_train, splits, fit)
