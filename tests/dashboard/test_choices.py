"""Choices and the address: it holds what differs from a page's defaults, and nothing else."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from harness.store.store import Store
from tests.dashboard.filling import MODEL, SHAPE
from tests.dashboard.pages import draw, fill_scaling

QUALITY = "acc · hellaswag"


def choices(app):
    return {each.key: each.value for kind in ("multiselect", "selectbox") for each in getattr(app, kind)}


def choose(app, key, value):
    [widget] = [
        each for kind in ("multiselect", "selectbox") for each in getattr(app, kind) if each.key == key
    ]
    widget.set_value(value).run()
    assert not app.exception, [error.value for error in app.exception]


def choose_and_take_back(app, key, value):
    before = choices(app)
    choose(app, f"choice_{key}", value)
    assert dict(app.query_params) == {key: value[0]}
    choose(app, f"choice_{key}", before[f"choice_{key}"])
    assert dict(app.query_params) == {}
    assert choices(app) == before


@pytest.mark.parametrize("view", ["overview", "pareto", "compare"])
def test_a_filter_that_is_taken_back_leaves_nothing_in_the_address(view, filled_path, monkeypatch):
    """Columns, axes and variants depend on the filters, and so do those that are chosen at first."""
    app = draw(view, filled_path, monkeypatch)
    for key, value in (("model", [SHAPE]), ("task", ["wikitext"]), ("family", ["pruning"])):
        choose_and_take_back(app, key, value)


@pytest.mark.parametrize("view", ["overview", "pareto", "compare", "sweep", "environment"])
def test_a_page_that_is_drawn_again_has_the_same_address(view, filled_path, monkeypatch):
    app = draw(view, filled_path, monkeypatch, sweep="1")
    app.run()
    assert dict(app.query_params) == {"sweep": "1"}


def test_a_choice_that_others_follow(tmp_path, monkeypatch):
    """The first line is also the first of the pair whose crossing is looked for."""
    with Store.open(tmp_path / "results.db") as store:
        fill_scaling(store)
    app = draw("scaling", tmp_path / "results.db", monkeypatch)
    lines = choices(app)["choice_line"]
    choose_and_take_back(app, "line", [lines[-1]])


def test_what_a_filter_hides_is_chosen_again_when_it_is_taken_back(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch)
    cost = choices(app)["choice_column"][0]
    for chosen in ([cost, QUALITY], [QUALITY]):
        choose(app, "choice_column", chosen)
        choose(app, "choice_model", [SHAPE])  # random weights have no quality
        assert QUALITY not in choices(app)["choice_column"]
        assert choices(app)["choice_column"], "where all of it is hidden, what is chosen at first is shown"
        choose(app, "choice_model", [])
        assert choices(app)["choice_column"] == chosen
        assert list(app.query_params) == ["column"]


def test_pareto_follows_the_filter_to_another_model(filled_path, monkeypatch):
    app = draw("pareto", filled_path, monkeypatch)
    assert choices(app)["choice_on"] == [MODEL]
    choose(app, "choice_model", [SHAPE])
    assert choices(app)["choice_on"] == [SHAPE]


def test_a_list_that_the_reader_emptied_is_in_the_address(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch)
    choose(app, "choice_column", [])
    assert dict(app.query_params) == {"column": ""}
    app = draw("overview", filled_path, monkeypatch, column="")
    assert choices(app)["choice_column"] == []
    assert dict(app.query_params) == {"column": ""}
