"""Writes infinite_mlp.npz: inputs, and the kernels that neural-tangents gives of them, a pair a case.

Run where neural-tangents is installed: ``python tests/oracles/make_infinite.py``.
"""

from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

CASES: dict[str, dict] = {
    "relu": {"hidden_layers": 2},
    "relu_deep": {"hidden_layers": 5},
    "erf": {"hidden_layers": 2, "activation": "erf"},
    "gelu": {"hidden_layers": 2, "activation": "gelu"},
    "erf_scaled": {"hidden_layers": 2, "activation": "erf", "w_std": 1.4, "b_std": 0.3},
    "relu_standard": {"hidden_layers": 2, "parameterization": "standard", "widths": (512, 1024)},
}


def make() -> dict[str, np.ndarray]:
    """Everything that the file holds."""
    from jaxft.kernels.infinite import infinite_mlp_kernels

    draw = np.random.default_rng(0).normal
    x, y = draw(size=(3, 4)), draw(size=(2, 4))
    arrays = {"x": x, "y": y, "made_with": np.array(f"neural-tangents {version('neural-tangents')}")}
    with jax.enable_x64(True):
        for case, options in CASES.items():
            for side, columns in (("xy", jnp.asarray(y)), ("xx", None)):
                kernels = infinite_mlp_kernels(jnp.asarray(x), columns, **options)
                arrays |= {f"{case}/{side}/{name}": np.asarray(k) for name, k in kernels._asdict().items()}
    return arrays


if __name__ == "__main__":
    arrays: dict = make()
    np.savez_compressed(Path(__file__).parent / "infinite_mlp.npz", **arrays)
