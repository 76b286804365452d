"""What a user of the mode connectivity experiment and of its figures is told."""

import gzip

import numpy as np
import pytest

from jaxft.core.checks import UserError
from jaxft.lab.figures_paths import draw_matrix, draw_paths, draw_plane

RUN = ["run", "mode_connectivity", "--preset", "smoke"]


CONFIGURATION = {
    "unknown key": (["--path.steps", "3"], "paths.steps"),
    "a net that is no name": (["--nets", "2by64"], "must be named <layers>x<width>, conv<layers>x<width>"),
    "a net without layers": (["--nets", "0x64"], "got '0x64'"),
    "a net without two units to keep": (["--nets", "1x2"], "must be 4 units wide or wider, got '1x2'"),
    "the same net twice": (["--nets", "1x16", "1x16"], "nets: repeats"),
    "no seed": (["--seeds"], "seeds: needs at least one"),
    "everything dropped": (["--dropout", "0", "1"], "dropout: must lie in [0, 1), got 1.0"),
    "a data file that does not exist": (["--data", "no.npz"], "data: no.npz does not exist"),
    "a net that is shown and not trained": (["--plane.net", "2x9"], "one of 1x8, 1x16, got 2x9. Set --plane.net"),
    "a dropout that is shown and not trained": (["--plane.dropout", "0.3"], "plane.dropout: must be one of"),
    "no draws": (["--stability.draws", "0"], "stability.draws: must be positive, got 0"),
    "a path of two points": (["--paths.points", "2"], "paths.points: must be 3 or more, got 2"),
    "two faults at once": (["--paths.bends", "0", "--training.steps", "0"], "training.steps: must be positive, got 0"),
    "a plane that does not reach its corners": (["--plane.margin", "-1"], "margin: must not be negative, got -1"),
    "too few networks on heuristics": (["--heuristics.models", "2"], "heuristics.models: must be 0 or at least 4"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_faulty_configuration(case, fails):
    argv, said = CONFIGURATION[case]
    assert said in fails([*RUN, *argv])


def test_faulty_images(fails, tmp_path):
    arrays = {"x": np.zeros((8, 4, 4), np.uint8), "y": np.arange(7)}
    np.savez(tmp_path / "few.npz", **arrays)
    assert "label" in fails([*RUN, "--data", str(tmp_path / "few.npz")])
    np.savez(tmp_path / "nan.npz", x=np.full((8, 4, 4), np.nan, np.float32), y=np.arange(8))
    assert "finite" in fails([*RUN, "--data", str(tmp_path / "nan.npz")])
    folder = tmp_path / "idx"
    folder.mkdir()
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (10, 4, 4))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(100)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(bytes([0, 0, 8, 1]) + (10).to_bytes(4, "big") + bytes(10))
    )
    assert "must hold 176 bytes" in fails([*RUN, "--data", str(folder)])


SQUARE = np.ones((2, 2))
DRAWINGS = {
    "no path": (lambda: draw_paths([], quantity="q"), "needs at least one path"),
    "a path of two lengths": (lambda: draw_paths([("a", [0, 1], [1.0])], quantity="q"), "for a"),
    "a plane of another shape": (lambda: draw_plane([0, 1], [0, 1, 2], SQUARE, quantity="q"), "(2, 2), (3,), (2,)"),
    "a plane with a loss of zero": (lambda: draw_plane([0, 1], [0, 1], SQUARE - 1, quantity="q"), "Clip them"),
    "no matrix": (lambda: draw_matrix([], [], quantity="q"), "needs at least one panel"),
    "a matrix of other models": (lambda: draw_matrix([("a", SQUARE)], ["x"], quantity="q"), "must be (1, 1)"),
    "groups of other models": (
        lambda: draw_matrix([("a", SQUARE)], ["x", "y"], quantity="q", groups=[1]),
        "must have 2 entries",
    ),
    "bars of other models": (
        lambda: draw_matrix([("a", SQUARE)], ["x", "y"], quantity="q", bars=("b", [1.0])),
        "must have 2 entries",
    ),
}


@pytest.mark.parametrize("case", DRAWINGS)
def test_faulty_drawing(case):
    call, said = DRAWINGS[case]
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)
