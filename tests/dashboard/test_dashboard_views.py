"""Every page through Streamlit's own test runner: no server, no browser."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("streamlit")

from harness_dashboard import launch, page
from harness_dashboard.access import Address
from streamlit.testing.v1 import AppTest

from harness.errors import ConfigError, MissingExtra, StoreError
from harness.records import CellKind, CellResult, Record, Status
from harness.store.store import Store
from tests.dashboard.filling import MODEL, SHAPE, fill, variant_row

VIEWS = ("overview", "pareto", "compare")


def draw(view, path, monkeypatch, **address):
    monkeypatch.setenv("HARNESS_DB", str(path))
    app = AppTest.from_string(
        f"from harness_dashboard.views import {view}\n{view}.render()", default_timeout=30
    )
    for key, value in address.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, [error.value for error in app.exception]
    return app


def table(app, place=0):
    return app.dataframe[place].value


@pytest.mark.parametrize("view", VIEWS)
def test_a_missing_store_says_how_to_fill_it(view, tmp_path, monkeypatch):
    app = draw(view, tmp_path / "missing.db", monkeypatch)
    assert app.info[0].value == "There are no results to show yet."
    assert app.code[0].value == "harness sweep --methods gptq,smoothquant"
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.parametrize("view", VIEWS)
def test_an_empty_store_says_how_to_fill_it(view, tmp_path, monkeypatch):
    Store.open(tmp_path / "results.db").close()
    app = draw(view, tmp_path / "results.db", monkeypatch)
    assert app.info[0].value == "The store has no results yet."
    assert app.code[0].value == "harness sweep --methods gptq,smoothquant"


@pytest.mark.parametrize("view", VIEWS)
def test_something_else_than_a_store_is_said_to_be(view, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("not a database at all")
    app = draw(view, tmp_path / "notes.txt", monkeypatch)
    assert "is not a results store" in app.text[0].value


@pytest.mark.parametrize("view", VIEWS)
def test_a_sweep_without_results(view, filled_path, monkeypatch):
    app = draw(view, filled_path, monkeypatch, sweep="2")
    assert app.info[0].value == "This sweep has no results yet."


@pytest.mark.parametrize("view", VIEWS)
def test_filters_that_leave_nothing(view, filled_path, monkeypatch):
    app = draw(view, filled_path, monkeypatch, model=SHAPE, family="pruning")
    assert app.info or app.success


@pytest.mark.parametrize("view", VIEWS)
def test_no_text_of_the_store_reaches_markdown(view, filled_path, monkeypatch):
    app = draw(view, filled_path, monkeypatch, status="crashed")
    for element in (*app.markdown, *app.caption, *app.info, *app.title, *app.subheader):
        assert "<img" not in element.value


def test_the_page_cannot_write(filled_path, monkeypatch):
    monkeypatch.setenv("HARNESS_DB", str(filled_path))
    with page.opened() as store, pytest.raises(StoreError, match="read-only"):
        store.open_sweep(command="", config={}, manifest={}, cells_planned=0)


# --- overview ---------------------------------------------------------------------------------


def test_the_overview_lists_every_variant(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch)
    assert [figure.value for figure in app.metric] == ["15", "50", "44", "6"]
    shown = table(app)
    assert len(shown) == 15
    assert "decode_latency · b1-p512-g64 [ms]" in shown
    assert "acc · hellaswag [%]" in shown
    assert set(shown["marks"]) == {"", "simulated", "synthetic"}
    differences = table(app, 1)
    assert {"better", "worse", "no clear difference", "equal"} == set(differences["verdict"])


def test_filters_come_from_the_address(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch, model=MODEL, family=["pruning", "attention"])
    assert set(table(app)["method"]) == {"wanda:sparsity=0.5", "magnitude", "window-attention"}
    assert set(table(app, 1)["variant"]) == {"wanda:sparsity=0.5", "magnitude", "window-attention"}


def test_what_is_chosen_goes_to_the_address(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch)
    family = next(each for each in app.multiselect if each.label == "Families")
    family.set_value(["pruning"]).run()
    assert app.query_params["family"] == "pruning"
    assert len(table(app)) == 2
    next(each for each in app.multiselect if each.label == "Families").set_value([]).run()
    assert "family" not in app.query_params
    assert len(table(app)) == 15


def test_what_the_store_does_not_offer_is_not_chosen(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch, method="no-such-method", sweep="77")
    assert len(table(app)) == 15
    assert "method" not in app.query_params


def test_new_results_are_shown_at_once(tmp_path, monkeypatch):
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        fill(store)
    app = draw("overview", path, monkeypatch)
    assert len(table(app)) == 15
    with Store.open(path) as store:
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
        store.write_variant(sweep, variant_row("new", (("new", {}),), "other"))
        result = CellResult("new", f"{MODEL}/new", Status.OK, records=(Record("acc", 0.5, "fraction"),))
        store.write_cell(sweep, result, kind=CellKind.TASK, task="hellaswag", scenario=None)
    app.run()
    assert "new" in set(table(app)["method"])


# --- the other pages --------------------------------------------------------------------------


def test_pareto_offers_quality_and_cost_of_one_model(filled_path, monkeypatch):
    app = draw("pareto", filled_path, monkeypatch)
    by_label = {each.label: each for each in app.selectbox}
    assert by_label["Model"].value == MODEL
    assert by_label["Quality"].value == "token_perplexity · wikitext"
    assert by_label["Cost"].options[0] == "weight_bytes · b1-p512-g64"
    assert len(app.get("plotly_chart")) == 1
    assert table(app)["method"].tolist()[0] == "gptq:bits=3"
    by_label["Quality"].set_value("acc · hellaswag").run()
    assert app.query_params["quality"] == "acc · hellaswag"


def test_pareto_says_that_random_weights_have_no_quality(filled_path, monkeypatch):
    app = draw("pareto", filled_path, monkeypatch, on=SHAPE)
    assert "random weights have no quality" in app.info[0].value


def test_compare_begins_with_a_baseline(filled_path, monkeypatch):
    app = draw("compare", filled_path, monkeypatch)
    assert len(app.get("plotly_chart")) == 6
    differences, options, changed = (table(app, place) for place in range(3))
    assert options.columns[0] == "baseline"
    assert set(differences["variant"]) == set(options.columns[1:])
    assert changed["variant"].tolist() == list(options.columns)


def test_compare_takes_the_variants_of_the_address(filled_path, monkeypatch):
    app = draw("compare", filled_path, monkeypatch, variant=["3", "6"])
    options = table(app, 1)
    assert options.columns.tolist() == ["gptq:bits=4", "wanda:sparsity=0.5"]
    assert options.loc["marks"].tolist() == ["", "simulated"]
    app = draw("compare", filled_path, monkeypatch, variant=["3"])
    assert app.info[0].value == "Choose at least 2 variants."


def test_all_well(tmp_path, monkeypatch):
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
        store.write_variant(sweep, variant_row("rtn", (("rtn", {}),), "quantization", key="v"))
        result = CellResult("c", "v", Status.OK, records=(Record("acc", 0.5, "fraction"),))
        store.write_cell(sweep, result, kind=CellKind.TASK, task="t", scenario=None)
    app = draw("overview", path, monkeypatch)
    assert "no baseline" in app.info[0].value
    draw("compare", path, monkeypatch)
    draw("pareto", path, monkeypatch)


# --- starting ---------------------------------------------------------------------------------


def test_the_navigation_draws_the_first_page(filled_path, monkeypatch):
    monkeypatch.setenv("HARNESS_DB", str(filled_path))
    app = AppTest.from_file(launch.__file__.replace("launch.py", "app.py"), default_timeout=30).run()
    assert not app.exception
    assert app.title[0].value == "Overview"


def test_nothing_is_reported_home():
    line = launch.command(Address("127.0.0.1", True), 8501)
    assert "--browser.gatherUsageStats=false" in line
    assert "--server.headless=true" in line
    assert "--server.address=127.0.0.1" in line


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"port \d+ \(Address already in use\); .* --port"):
            launch.serve("results.db", port=taken.getsockname()[1], open_browser=False)


@pytest.mark.parametrize("package", ["streamlit", "plotly"])
def test_a_missing_package_names_the_pip_line(package, monkeypatch):
    monkeypatch.setattr(
        launch.importlib.util, "find_spec", lambda name: None if name == package else object()
    )
    with pytest.raises(MissingExtra, match=rf"{package} is not installed; .*\[dashboard\]"):
        launch.serve("results.db", open_browser=False)
