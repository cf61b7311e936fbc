"""What a reader takes home: complete, exact, and nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly")

import plotly.graph_objects as go
from harness_dashboard.downloads import csv_of, file_stem, html_of, json_of

from harness.untrusted import clean, spreadsheet_cell
from tests.dashboard.filling import HOSTILE

FORMULAS = [
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", "\n=1", " =1+1", "＝1+1", '=HYPERLINK("http://x")',
]  # fmt: skip


def rows_of(content):
    return list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))


def test_a_table_comes_whole():
    table = pd.DataFrame({"n": range(1000), "x": np.linspace(0, 1, 1000) / 3})
    rows = rows_of(csv_of(table))
    assert rows[0] == ["n", "x"]
    assert [float(x) for _, x in rows[1:]] == table["x"].tolist()  # every digit
    loaded = json.loads(json_of(table))
    assert loaded == [{"n": n, "x": x} for n, x in zip(table["n"], table["x"], strict=True)]


def test_numbers_stay_numbers():
    table = pd.DataFrame(
        {
            "x": [-1.5, math.nan, math.inf, 1e-30],
            "n": [-3, 0, 7, 10**15],
            "t": ["-2", "+1e5", "-0.5%", "-"],
        }
    )
    assert rows_of(csv_of(table))[1:] == [
        ["-1.5", "-3", "-2"],
        ["", "0", "+1e5"],
        ["inf", "7", "-0.5%"],
        ["1e-30", "1000000000000000", "'-"],
    ]
    assert [row["x"] for row in json.loads(json_of(table))] == [-1.5, None, "inf", 1e-30]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_is_a_formula(text):
    ([heading], [cell]) = rows_of(csv_of(pd.DataFrame({text: [text]})))
    assert heading == cell
    assert cell.startswith("'")
    assert json.loads(json_of(pd.DataFrame({"a": [text]}))) == [{"a": text}]


def test_texts_of_others_stay_in_their_cell():
    texts = [HOSTILE, 'quote " comma , line\nend', "\ud800", "ü · µs"]
    table = pd.DataFrame({"a": texts, "b": [{"x": 1}, [1], None, True]}, dtype=object)
    rows = rows_of(csv_of(table))
    assert len(rows) == 5
    assert rows[1] == [HOSTILE, '{"x":1}']
    assert rows[2][0] == 'quote " comma , line end'
    assert rows[4] == ["ü · µs", "True"]
    loaded = json.loads(json_of(table))
    assert [row["b"] for row in loaded] == [{"x": 1}, [1], None, True]
    assert loaded[0]["a"] == HOSTILE


def test_names_of_rows_come_along_where_they_are_shown():
    table = pd.DataFrame({"gptq": ["4"]}, index=["bits"])
    assert rows_of(csv_of(table, index=True)) == [["index", "gptq"], ["bits", "4"]]
    assert json.loads(json_of(table, index=True)) == [{"index": "bits", "gptq": "4"}]


def test_an_empty_table():
    assert rows_of(csv_of(pd.DataFrame({"a": []}))) == [["a"]]
    assert json.loads(json_of(pd.DataFrame({"a": []}))) == []


def test_times_and_missing_ones():
    table = pd.DataFrame({"at": [pd.Timestamp("2026-01-02 03:04:05"), pd.NaT]})
    assert rows_of(csv_of(table))[1:] == [["2026-01-02 03:04:05"], [""]]
    assert json.loads(json_of(table)) == [{"at": "2026-01-02 03:04:05"}, {"at": None}]


def test_a_figure_needs_no_network():
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="</script><script>alert(1)</script>"))
    page = html_of(figure, "harness-x").decode()
    assert "<script src=" not in page
    assert "<link" not in page
    assert "Plotly.newPlot" in page
    assert "</script><script>alert(1)" not in page
    assert figure.layout.autosize is None  # the page's own figure is left alone


@pytest.mark.parametrize(
    ("parts", "stem"),
    [
        (("overview", ""), "harness-overview"),
        (("compare", "decode_latency · b1-p512-g64"), "harness-compare-decode_latency-b1-p512-g64"),
        (("x", "../../etc/passwd"), "harness-x-etc-passwd"),
        (("x", HOSTILE), "harness-x-img-src-x-onerror-alert-1-bold-link-javascript-alert-1-x-red-red-i"),
        (("x", "a" * 500), "harness-x-" + "a" * 70),
        (("x", "CON\x00\n.html."), "harness-x-CON-html"),
    ],
)
def test_file_names_hold_nothing_but_names(parts, stem):
    assert file_stem(*parts) == stem


def test_what_a_terminal_would_obey():
    for number in [*range(32), *range(127, 160), 0x2028, 0x2029, 0x202E, 0x2066, 0xD800]:
        assert chr(number) not in clean(f"a{chr(number)}b")
    assert clean("plain · ü µ 漢字 🙂") == "plain · ü µ 漢字 🙂"


def test_cells_of_a_spreadsheet_keep_what_is_no_text():
    for value in (1, -1, -1.5, None, True, math.inf):
        assert spreadsheet_cell(value) is value
