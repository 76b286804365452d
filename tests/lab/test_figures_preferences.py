"""What the figures of preference tuning show, and that equal data give equal bytes."""

import csv

import numpy as np
import pytest

from jaxft.core.types import Interval
from jaxft.lab.figures_preferences import (
    draw_class_rates,
    draw_mass_flow,
    draw_percentiles,
    draw_predicted_changes,
    draw_step_predictions,
)
from jaxft.lab.figures_style import save_figure

RATE = Interval(0.5, 0.1, 0.3, 0.7)
DRAWINGS = {
    "percentiles": lambda: draw_percentiles([("a", [0, 50], [[1, 2], [3, 6]]), ("b", [0, 50], [[0, 1]])], quantity="q"),
    "mass-flow": lambda: draw_mass_flow({"run": {"yes": (0.2, 0.3), "no": (-0.2, -0.3)}, "still": {"yes": (0.0, 0.0)}}),
    "steps": lambda: draw_step_predictions({"sgd": ([0, 1], [0, 2]), "adam": ([0, 1, 2], [0, 1, 3])}, quantity="q"),
    "changes": lambda: draw_predicted_changes({"sgd": {"a": ([0, 1], [0, 2]), "b": ([1], [1])}}, quantities=("x", "y")),
    "rates": lambda: draw_class_rates(
        {"refusal": {"before": [RATE] * 2, "after": [RATE]}}, quantity="q", reference="before"
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_equal_data_give_equal_bytes_and_the_table_is_what_is_shown(name, tmp_path):
    first, second = (save_figure(*DRAWINGS[name](), tmp_path / str(i), name) for i in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    with first[-1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == {"percentiles": 4, "mass-flow": 3, "steps": 5, "changes": 3, "rates": 3}[name]


def test_percentiles_show_means_over_seeds_with_their_standard_errors():
    table = DRAWINGS["percentiles"]().table
    assert table["mean"] == [2.0, 4.0, 0.0, 1.0]
    np.testing.assert_allclose(table["stderr"][:2], [1.0, 2.0])
    assert table["stderr"][2:] == [None, None]
    assert table["seeds"] == [2, 2, 1, 1]


def test_panels_share_axes_where_they_are_compared_and_not_where_runs_differ_in_size():
    compared, own = (DRAWINGS[name]().figure.axes for name in ("percentiles", "steps"))
    assert compared[0].get_ylim() == compared[1].get_ylim()
    assert own[0].get_ylim() != own[1].get_ylim()
