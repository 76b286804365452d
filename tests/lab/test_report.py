import io
import math

import numpy as np
import pytest

from jaxft.core.findings import Finding
from jaxft.lab import FINDING_COLUMNS, finding_rows, format_number, markdown_table, progress, rich_table, write_csv


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "value", [0.99951, 12345.678, 999.9, 1.23456e-9, -4.5678e12, 0.05, np.float32(0.1), 123456.0, 999999.9]
)
def test_numbers_are_within_half_a_unit_of_the_third_digit(value):
    shown = float(format_number(value))
    assert abs(shown - value) <= 0.5 * 10 ** (math.floor(math.log10(abs(value))) - 2) * 1.001
    assert len(format_number(value)) <= 9


def test_integers_and_words_are_shown_whole():
    assert [format_number(v) for v in (123456, np.int64(7), "holds", 0.0, float("inf"))] == [
        "123456",
        "7",
        "holds",
        "0",
        "inf",
    ]


def test_markdown_escapes_bars_and_shows_missing_cells():
    table = markdown_table([{"a": "x|y", "b": 1}, {"a": "z"}], ["a", "b"])
    assert table.splitlines()[2:] == ["| x\\|y | 1 |", "| z | – |"]
    assert table.splitlines()[1] == "| :--- | ---: |"


def test_csv_reads_back_to_the_same_numbers(tmp_path):
    values = [1 / 3, 1e-300, 123456789.123456789]
    write_csv(tmp_path / "t.csv", [{"x": v, "name": 'a, "b"'} for v in values] + [{}], ["name", "x"])
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert [float(line.rpartition(",")[2]) for line in lines[1:4]] == values
    assert lines[4] == ","
    assert lines[1].startswith('"a, ""b"""')


def test_findings_are_plain_text_off_a_terminal_and_drawn_on_one():
    findings = [Finding("width", 1.0, 1.04, 0.03, 0.1, "holds"), Finding("sign", 0.0, 2.0, 0.0, 0.1, "violated")]
    plain, drawn = io.StringIO(), Terminal()
    rich_table(finding_rows(findings), FINDING_COLUMNS, title="Findings", file=plain)
    rich_table(finding_rows(findings), FINDING_COLUMNS, title="Findings", file=drawn)
    assert "\x1b" not in plain.getvalue()
    assert plain.getvalue().splitlines()[0] == "Findings"
    assert plain.getvalue().splitlines()[2].split() == ["width", "1", "1.04", "±", "0.03", "holds"]
    assert "violated" in drawn.getvalue()
    assert "━" in drawn.getvalue()


def test_plain_progress_speaks_seldom_and_always_at_the_end():
    out = io.StringIO()
    with progress(100, "train", every_s=60.0, file=out) as advance:
        for _ in range(100):
            advance()
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train: 1/100 (1%), ")
    assert lines[1] == "train: 100/100 (100%)"


def test_resumed_progress_counts_from_where_it_was():
    out = io.StringIO()
    with progress(10, "train", done=8, file=out) as advance:
        advance(2, note="loss 0.1")
    assert out.getvalue() == "train: 10/10 (100%), loss 0.1\n"


def test_progress_draws_a_bar_on_a_terminal():
    out = Terminal()
    with progress(2, "train [x]", file=out) as advance:
        advance(note="loss 0.5")
        advance(note="loss 0.4")
    assert "2/2" in out.getvalue()
    assert "train [x]" in out.getvalue()
    assert "loss 0.4" in out.getvalue()
