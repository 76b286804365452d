import csv
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from jaxft.lab import draw_agreement, draw_drift, draw_dynamics, save_figure
from jaxft.lab.figures import CONTROL, PALETTE, draw_scatter, draw_trees
from jaxft.structure.trees import parse_tree

STEPS = np.arange(5)
TREE = parse_tree("(S (N dogs) (VP (V chase) (N cats)))")


def draw_all(folder):
    series = [("prompt", STEPS, np.exp(-STEPS), np.exp(-1.1 * STEPS)), ("shuffled", STEPS, STEPS / 5, STEPS / 9)]
    drawings = {
        "dynamics": draw_dynamics(series, quantity="logit (nats)", control=["shuffled"]),
        "drift": draw_drift(
            [("SGD", STEPS, np.outer([1.0, 2.0, 6.0], STEPS + 1))], quantity="drift (fraction)", log=True
        ),
        "agreement": draw_agreement([0.5, 0.9, 0.6], [0.6, 0.8, 0.5], ["a", "b", "a"], ["sgd", "sgd", "control"]),
        "scatter": draw_scatter([("a", STEPS, STEPS), ("b", STEPS, STEPS / 2)], quantities=("x", "y"), control=["b"]),
        "trees": draw_trees([("gold", TREE), ("found", TREE)], marked=[set(), {(1, 3)}]),
    }
    for name, drawing in drawings.items():
        save_figure(*drawing, folder, name)
    return drawings


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, draw_all(folder)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_files_are_the_same_bytes_in_this_process_and_another(tmp_path, drawn):
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 20}):
        draw_all(tmp_path / "two")
    code = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_figures as t\n"
    code += "t.draw_all(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "three"), str(Path(__file__).parent)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
    first = contents(drawn[0])
    assert len(first) == 15
    assert first == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_other_data_are_other_bytes(tmp_path):
    for i, name in enumerate(("a", "b")):
        save_figure(*draw_drift([("SGD", STEPS, STEPS[None] + i)], quantity="drift"), tmp_path, name)
    for suffix in ("pdf", "png", "csv"):
        assert (tmp_path / f"a.{suffix}").read_bytes() != (tmp_path / f"b.{suffix}").read_bytes()


def test_drawing_leaves_global_state_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    save_figure(*draw_drift([("SGD", STEPS, STEPS[None])], quantity="drift"), tmp_path, "d")
    assert dict(matplotlib.rcParams) == before
    code = "import sys, jaxft.lab; print([m for m in ('matplotlib', 'rich', 'tyro', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_theory_is_a_line_measurement_markers_and_control_grey(drawn):
    lines = drawn[1]["dynamics"].figure.axes[0].get_lines()
    predicted, measured, control = lines[0], lines[1], lines[2]
    assert predicted.get_linestyle() == "-"
    assert predicted.get_marker() == "None"
    assert measured.get_linestyle() == "None"
    assert measured.get_marker() == "o"
    assert predicted.get_color() == measured.get_color()
    assert to_hex(control.get_color()) == CONTROL.lower()
    np.testing.assert_allclose(np.asarray(predicted.get_ydata()), np.exp(-STEPS))


def test_dynamics_over_another_abscissa_with_nothing_predicted():
    ranks, error = [1, 4, 16], [0.4, 0.2, 0.1]
    series = [("LoRA", ranks, error, error), ("projection", ranks, [np.nan] * 3, error)]
    axes = draw_dynamics(series, quantity="error", abscissa="rank", log_abscissa=True).figure.axes[0]
    assert axes.get_xlabel() == "rank"
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "16"]
    lines = axes.get_lines()
    np.testing.assert_allclose(np.asarray(lines[0].get_ydata()), error)
    assert np.isnan(np.asarray(lines[2].get_ydata())).all()
    np.testing.assert_allclose(np.asarray(lines[3].get_ydata()), error)


def test_drift_table_holds_mean_and_standard_error_over_seeds(drawn):
    table = drawn[1]["drift"].table
    np.testing.assert_allclose(table["mean"], 3 * (STEPS + 1))
    np.testing.assert_allclose(table["stderr"], np.std([1, 2, 6], ddof=1) / np.sqrt(3) * (STEPS + 1))
    with (drawn[0] / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["stderr"]) for row in rows] == table["stderr"]
    assert rows[0]["seeds"] == "3"


def test_one_seed_has_no_error_bar():
    drawing = draw_drift([("SGD", STEPS, np.ones((1, 5)))], quantity="drift")
    assert drawing.table["stderr"] == [None] * 5
    assert drawing.table["seeds"] == [1] * 5


def test_agreement_draws_the_diagonal_and_equal_axes(drawn):
    axes = drawn[1]["agreement"].figure.axes[0]
    diagonal = axes.get_lines()[0]
    np.testing.assert_allclose(np.asarray(diagonal.get_xdata()), np.asarray(diagonal.get_ydata()))
    assert axes.get_aspect() == 1
    assert [to_hex(line.get_color()) == CONTROL.lower() for line in axes.get_lines()[1:4]] == [False, False, True]


def test_levels_are_lines_without_a_step(drawn):
    drawing = draw_drift([("a", STEPS, STEPS[None])], quantity="loss", levels={"Bayes": 0.5, "chance": 3.0})
    assert drawing.table["label"][-2:] == ["Bayes", "chance"]
    assert drawing.table["mean"][-2:] == [0.5, 3.0]
    assert drawing.table["step"][-2:] == [None, None]
    levels = [line for line in drawing.figure.axes[0].get_lines() if line.get_label() in ("Bayes", "chance")]
    assert [set(np.asarray(line.get_ydata()).tolist()) for line in levels] == [{0.5}, {3.0}]
    assert [line.get_linestyle() for line in levels] == ["-", "--"]


def test_whole_abscissa_has_whole_ticks():
    axes = draw_drift([("a", [0, 1, 2], [[0.0, 1.0, 2.0]])], quantity="q", abscissa="layer", whole=True).figure.axes[0]
    assert axes.get_xlabel() == "layer"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_scatter_has_a_panel_a_group_on_one_scale(drawn):
    panels = drawn[1]["scatter"].figure.axes
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert [to_hex(axes.get_lines()[1].get_color()) for axes in panels] == [PALETTE[0].lower(), CONTROL.lower()]
    assert drawn[1]["scatter"].table["y"] == [*STEPS.tolist(), *(STEPS / 2).tolist()]


def test_tree_is_drawn_with_every_constituent_and_marks_in_colour(drawn):
    table = drawn[1]["trees"].table
    assert table["label"][:5] == ["S", "N", "VP", "V", "N"]
    assert list(zip(table["start"], table["end"], strict=True))[:5] == [(0, 3), (0, 1), (1, 3), (1, 2), (2, 3)]
    gold, found = drawn[1]["trees"].figure.axes
    colours = [{text.get_text(): to_hex(text.get_color()) for text in axes.texts} for axes in (gold, found)]
    assert colours[1]["VP"] == PALETTE[1].lower()
    assert colours[0]["VP"] == colours[0]["S"]
    assert {"dogs", "chase", "cats"} <= set(colours[0])
