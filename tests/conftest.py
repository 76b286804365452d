"""How the suite is run: type checks on, strict promotion where the mathematics lives, a compilation cache.

Two folders run in processes of their own, started by ``test_groups.py``: ``sharding`` (8 fake CPU devices) and
``bad_input`` (no run-time type checks: those tests see what a user sees).
"""

import gc
import os
from pathlib import Path

GROUP = os.environ.get("JAXFT_TEST_GROUP", "")
OWN_PROCESS = ("sharding", "bad_input")
HERE = Path(__file__).parent

if GROUP != "bad_input":
    from jaxtyping import install_import_hook

    install_import_hook(["jaxft", "theory", "experiments"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxft-tests"
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ.setdefault("JAXFT_CACHE", str(CACHE))

# The benchmarks import peers that need not be installed.
collect_ignore = ["benchmarks", *(name for name in OWN_PROCESS if name != GROUP)]
MOST_MAPPINGS = 20_000
STRICT = tuple(str(HERE / name) for name in ("core", "structure", "kernels", "geometry", "theory"))


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """No silent float32-float64 or int-float mixing in the packages that hold the mathematics."""
    if str(request.node.path).startswith(STRICT):
        with jax.numpy_dtype_promotion("strict"):
            yield
    else:
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_forgotten():
    """Drops compiled programs before their mappings reach the limit of a process (65530), where XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Double precision and exact matrix products, for identities."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, from ``JAXFT_DATA``."""
    folder = os.environ.get("JAXFT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("JAXFT_DATA names no folder of real data sets")
    return Path(folder).resolve()
