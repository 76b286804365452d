import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from jaxft.lab.figures import draw_drift
from jaxft.lab.figures_paths import draw_matrix, draw_paths, draw_plane
from jaxft.lab.figures_style import CONTROL, save_figure

T = np.linspace(0, 1, 5)
MATRIX = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]])


def paths():
    series = [("line", T, 1 + T * (1 - T)), ("shuffled", T, 2 + T)]
    return draw_paths(series, quantity="loss (nats)", levels={"certificate": 3.5}, control=["shuffled"], log=True)


def plane(height=4.0):
    x, y = np.linspace(0, 4, 5), np.linspace(0, height, 3)
    values = 0.1 + x[None] + 10 * y[:, None]
    return draw_plane(
        x, y, values, quantity="loss", points={"A": (0.0, 0.0), "B": (4.0, 0.0)}, paths={"line": ([0, 4], [0, 0])}
    )


def matrix(**options):
    return draw_matrix([("before", MATRIX), ("after", MATRIX / 2)], ["a", "b", "c"], quantity="barrier", **options)


def test_equal_data_are_equal_bytes(tmp_path):
    for folder in ("one", "two"):
        with matplotlib.rc_context({"lines.linewidth": 9} if folder == "two" else {}):
            for name, drawing in (("paths", paths()), ("plane", plane()), ("matrix", matrix())):
                save_figure(*drawing, tmp_path / folder, name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
    assert len(one) == 9
    assert one == two


def test_paths_share_a_panel_with_the_certificate_as_a_level_and_the_control_grey():
    drawing = paths()
    axes = drawing.figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert to_hex(lines["shuffled"].get_color()) == CONTROL.lower()
    np.testing.assert_allclose(np.asarray(lines["line"].get_ydata()), 1 + T * (1 - T))
    assert set(np.asarray(lines["certificate"].get_ydata()).tolist()) == {3.5}
    assert axes.get_yscale() == "log"
    assert drawing.table["t"][-1] is None
    assert drawing.table["value"][-1] == 3.5
    assert drawing.table["label"].count("line") == 5


def test_plane_table_is_the_grid_row_by_row_then_paths_and_points():
    table = plane().table
    rows = list(zip(table["label"], table["x"], table["y"], table["value"], strict=True))
    assert rows[6] == ("grid", 1.0, 2.0, 0.1 + 1 + 20)
    assert rows[15:] == [("line", 0, 0, None), ("line", 4, 0, None), ("A", 0, 0, None), ("B", 4, 0, None)]


@pytest.mark.parametrize(("height", "aspect"), [(4.0, 1.0), (0.4, "auto")])
def test_flat_plane_is_stretched(height, aspect):
    assert plane(height).figure.axes[0].get_aspect() == aspect


def test_matrix_is_put_in_order_of_groups_with_lines_between_them():
    drawing = matrix(groups=[1, 0, 1], bars=("accuracy", [0.1, 0.2, 0.3]))
    before, _, bars = drawing.figure.axes[:3]
    assert [t.get_text() for t in before.get_yticklabels()] == ["b", "a", "c"]
    np.testing.assert_array_equal(before.get_images()[0].get_array(), MATRIX[np.ix_([1, 0, 2], [1, 0, 2])])
    columns = [np.asarray(line.get_xdata()).tolist() for line in before.get_lines()]
    assert [0.5, 0.5] in columns
    assert [1.5, 1.5] not in columns
    np.testing.assert_allclose([bar.get_extents().width > 0 for bar in bars.patches], [True] * 3)
    np.testing.assert_allclose(bars.dataLim.x1, 0.3)
    table = drawing.table
    assert table["row"][:3] == ["b", "b", "b"]
    assert table["value"][:3] == [0.0, 1.0, 2.0]
    assert table["panel"][-1] == "accuracy"
    assert table["value"][-3:] == [0.2, 0.1, 0.3]


def test_matrices_are_on_one_scale_and_holes_are_allowed():
    holed = MATRIX.copy()
    holed[0, 2] = np.nan
    drawing = draw_matrix([("a", holed), ("b", MATRIX / 2)], list("abc"), quantity="barrier")
    assert [axes.get_images()[0].get_clim() for axes in drawing.figure.axes[:2]] == [(0, 4), (0, 4)]
    apart = matrix(one_scale=False)
    assert [axes.get_images()[0].get_clim() for axes in apart.figure.axes[:2]] == [(0, 4), (0, 2)]


def test_bar_that_reaches_zero_does_not_set_the_range_of_a_logarithmic_axis():
    values = np.array([[1e-6, 1.0], [2.0, 1.0]])
    axes = draw_drift([("a", [1, 10], values)], quantity="q", log=True, log_abscissa=True).figure.axes[0]
    np.testing.assert_allclose(axes.get_ylim()[0], 0.08, rtol=1e-5)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "10"]
