"""Tables on every page: headed, explained and downloadable."""

from __future__ import annotations

import json

import pandas as pd
import pytest

pytest.importorskip("streamlit")

from harness_dashboard import tables
from streamlit.testing.v1 import AppTest

from tests.dashboard.filling import HOSTILE

VIEWS = ("overview", "pareto", "compare", "scaling", "sweep", "environment")


def draw(view, path, monkeypatch):
    monkeypatch.setenv("HARNESS_DB", str(path))
    script = f"from harness_dashboard.views import {view}\n{view}.render()"
    app = AppTest.from_string(script, default_timeout=30)
    if view == "sweep":
        app.query_params["sweep"] = "1"  # the newest has nothing to show
    app.run()
    assert not app.exception
    return app


@pytest.mark.parametrize("view", VIEWS)
def test_every_table_can_be_downloaded_and_every_heading_explains_itself(view, filled_path, monkeypatch):
    app = draw(view, filled_path, monkeypatch)
    labels = [button.proto.label for button in app.get("download_button")]
    assert labels.count("CSV") == labels.count("JSON") == len(app.dataframe) > 0
    assert labels.count("HTML") == len(app.get("plotly_chart"))
    by_name = {"compare": 3, "sweep": 1}  # tables with one column a variant, or a cell
    names = set(app.dataframe[by_name[view]].value.columns) if view in by_name else set()
    for frame in app.dataframe:
        settings = json.loads(frame.proto.columns)
        for column in set(frame.value.columns) - names:
            assert settings[column].get("help"), (view, column)


def test_headings_say_which_way_is_good():
    columns = ["decode_latency · b1-p512-g64 [ms]", "acc · hellaswag [%]", "model", "a.plugins · x [s]"]
    settings = tables.column_settings(pd.DataFrame({name: ["x"] for name in columns}))
    assert [settings[name]["label"] for name in columns] == [
        "decode_latency · b1-p512-g64 [ms] ↓",
        "acc · hellaswag [%] ↑",
        "model",
        "a.plugins · x [s]",
    ]
    assert "Lower is better." in settings[columns[0]]["help"]
    assert "help" not in settings[columns[3]]
    assert settings["model"]["pinned"]


def test_no_text_of_the_store_gets_into_a_heading_that_is_markdown():
    table = pd.DataFrame({"status": [HOSTILE], "metric": [HOSTILE], "marks": [HOSTILE], HOSTILE: ["x"]})
    for setting in tables.column_settings(table).values():
        assert "<img" not in setting.get("help", "")


def test_files_are_made_when_they_are_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr("harness_dashboard.downloads.csv_of", lambda *_, **__: made.append(1) or b"")

    def page():
        import pandas as pd
        from harness_dashboard import buttons, downloads

        buttons.csv_of = downloads.csv_of
        buttons.table_buttons(pd.DataFrame({"a": [1]}), "some")

    app = AppTest.from_function(page).run()
    assert not app.exception
    assert len(app.get("download_button")) == 2
    assert made == []


def test_two_tables_of_one_page_need_no_names():
    def page():
        import pandas as pd
        from harness_dashboard import tables

        tables.show_table(pd.DataFrame({"model": ["m"], "method": ["x"]}))
        tables.show_table(pd.DataFrame({"status": ["ok"], "n": [1]}))
        tables.show_table(pd.DataFrame({"status": ["ok"], "n": [1]}), "again")
        tables.show_table(pd.DataFrame())

    app = AppTest.from_function(page).run()
    assert not app.exception, [error.value for error in app.exception]
    assert len(app.get("download_button")) == 8
