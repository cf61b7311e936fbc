"""Every page through Streamlit's own test runner: no server, no browser."""

from __future__ import annotations

import json
import socket

import pytest

pytest.importorskip("streamlit")

from harness_dashboard import launch, page, queries
from harness_dashboard.access import Address
from streamlit.testing.v1 import AppTest

from harness.errors import ConfigError, MissingExtra, StoreError
from harness.records import CellKind, CellResult, Record, Status
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep
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


def board(app):
    return table(app).set_index("method")


def choose(app, kind, label, value):
    [widget] = [each for each in getattr(app, kind) if each.label == label]
    widget.set_value(value).run()
    assert not app.exception, [error.value for error in app.exception]


def test_the_overview_lists_every_variant(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch)
    assert [figure.value for figure in app.metric] == ["15", "50", "44", "6"]
    shown = table(app)
    assert len(shown) == 15
    assert "decode_latency · b1-p512-g64 [ms]" in shown
    assert "acc · hellaswag [%]" in shown
    assert set(shown["marks"]) == {"", "simulated", "synthetic"}
    assert board(app).loc["moe", "cells"] == "✕ 1 oom"
    assert set(board(app).loc["baseline", "cells"]) == {"✓ 5 ok", "– 1 not_applicable, ✓ 1 ok"}


def test_the_board_is_ranked_and_compared_by_one_figure(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch, model=MODEL, by="decode_latency · b1-p512-g64")
    shown = table(app)
    assert shown["#"].tolist() == list(range(1, 13))
    assert shown["method"].tolist()[:2] == ["smoothquant+gptq", "gptq:bits=4"]
    row = board(app).loc["smoothquant+gptq"]
    assert row["against the baseline"].startswith("0.5 [0.49")
    assert row["verdict"].startswith("▲ ")
    assert row["verdict"].endswith("x faster")
    assert len(row["readings"]) == 12
    assert board(app).loc["baseline", "verdict"] == ""
    choose(app, "selectbox", "Order", "worst first")
    assert table(app)["method"].tolist()[0] == "wanda:sparsity=0.5"
    assert app.query_params["order"] == "worst first"
    choose(app, "selectbox", "Ranked by", "acc · hellaswag")
    row = board(app).loc["magnitude"]
    assert row["verdict"] == "▼ worse"
    assert row["p"] < 0.01
    assert row["against the baseline"].endswith("points")


def test_every_figure_can_be_compared_at_once(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch, all="1")
    found = table(app, 1)
    assert {"▲", "▼", "≈", "="} == {verdict[:1] for verdict in found["verdict"]} - {""}
    assert len(set(found["figure"])) == 6


def test_a_long_list_comes_in_pages(filled_path, monkeypatch):
    monkeypatch.setattr("harness_dashboard.views.overview._SIZES", ("4", "25"))
    app = draw("overview", filled_path, monkeypatch, by="method")
    first = table(app)["method"].tolist()
    assert len(first) == 4
    assert "1 to 4 of 15 variants" in app.caption[0].value
    choose(app, "selectbox", "Page", "2")
    assert app.query_params["page"] == "2"
    assert table(app)["#"].tolist() == [5, 6, 7, 8]
    assert "page" in app.query_params
    choose(app, "text_input", "Search", "GPTQ")
    assert table(app)["#"].tolist() == [1, 2, 3, 4], "another list begins at its first page"
    assert app.query_params["q"] == "GPTQ"


def test_what_was_measured_again_has_a_history(tmp_path, monkeypatch):
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
        store.write_variant(sweep, variant_row("rtn", (("rtn", {}),), "quantization", key="v"))
        for value in (0.5, 0.75):
            result = CellResult("c", "v", Status.OK, records=(Record("acc", value, "fraction"),))
            store.write_cell(sweep, result, kind=CellKind.TASK, task="t", scenario=None)
    app = draw("overview", path, monkeypatch)
    assert [list(each) for each in table(app)["history"]] == [[0.5, 0.75]]
    assert table(app)["acc · t [%]"].tolist() == [75.0]


def test_filters_come_from_the_address(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch, model=MODEL, family=["pruning", "attention"])
    assert set(table(app)["method"]) == {"wanda:sparsity=0.5", "magnitude", "window-attention"}
    assert table(app)["verdict"].astype(bool).any(), "the baseline takes part though a filter hides it"


def test_what_is_chosen_goes_to_the_address(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch)
    choose(app, "multiselect", "Families", ["pruning"])
    assert app.query_params["family"] == "pruning"
    assert len(table(app)) == 2
    choose(app, "multiselect", "Families", [])
    assert "family" not in app.query_params
    assert len(table(app)) == 15


def test_what_the_store_does_not_offer_is_not_chosen(filled_path, monkeypatch):
    app = draw("overview", filled_path, monkeypatch, method="no-such-method", sweep="77", page="9", by="x")
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
        store.write_variant(sweep, variant_row("new", (("new", {}),), "other", key="new"))
        result = CellResult("new", "new", Status.OK, records=(Record("acc", 0.5, "fraction"),))
        store.write_cell(sweep, result, kind=CellKind.TASK, task="hellaswag", scenario=None)
    app.run()
    assert "new" in set(table(app)["method"])


# --- the other pages --------------------------------------------------------------------------


def test_pareto_offers_quality_and_cost_of_one_model(filled_path, monkeypatch):
    app = draw("pareto", filled_path, monkeypatch)
    by_label = {each.label: each for each in app.selectbox}
    assert by_label["Vertical"].value == "token_perplexity · wikitext"
    assert by_label["Vertical"].options[0] == "quality: token_perplexity · wikitext"
    assert by_label["Horizontal"].options[0] == "memory: weight_bytes · b1-p512-g64"
    assert len(app.get("plotly_chart")) == 1
    assert table(app)["method"].tolist()[0] == "gptq:bits=3"
    choose(app, "selectbox", "Vertical", "acc · hellaswag")
    assert app.query_params["quality"] == "acc · hellaswag"


def test_pareto_takes_a_third_figure_and_logarithms(filled_path, monkeypatch):
    app = draw("pareto", filled_path, monkeypatch, third="decode_latency · b1-p512-g64", log_x="1")
    drawn = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert drawn["layout"]["xaxis"]["type"] == "log"
    assert drawn["layout"]["yaxis"]["type"] == "linear"
    assert "Pareto front of all three" in {trace["name"] for trace in drawn["data"]}
    assert "decode_latency · b1-p512-g64 [ms]" in table(app)
    choose(app, "toggle", "Vertical logarithmic", True)
    assert app.query_params["log_y"] == "1"


def test_pareto_names_what_a_logarithmic_axis_cannot_show(tmp_path, monkeypatch):
    path = tmp_path / "zero.db"
    with Store.open(path) as store:
        sweep = add_sweep(store)
        for method, kl, size in (("baseline", 0.0, 2.0), ("gptq", 0.1, 1.0)):
            records = Record("mean_kl", kl, "nats"), Record("bits_per_byte", size, "bits/byte")
            add_cell(store, sweep, method, *records, task="t")
    address = {"quality": "mean_kl · t", "cost": "bits_per_byte · t"}
    app = draw("pareto", path, monkeypatch, **address)
    assert not any(each.value.startswith("Not drawn") for each in app.text)
    app = draw("pareto", path, monkeypatch, **address, log_y="1")
    [told] = [each.value for each in app.text if each.value.startswith("Not drawn")]
    assert told.endswith(": baseline")


def test_pareto_flags_points_of_different_devices(tmp_path, monkeypatch):
    path = tmp_path / "two.db"
    with Store.open(path) as store:
        for name, seconds in (("a GPU", 0.010), ("another GPU", 0.001)):
            sweep = add_sweep(store, device_name=name)
            for method, factor in (("baseline", 1.0), ("gptq", 0.9)):
                about = {"scenario": "b1-p8-g8", "device_name": name}
                latency = Record("decode_latency", seconds * factor, "s")
                add_cell(store, sweep, method, latency, Record("weight_bytes", 8.0 * factor, "B"), **about)
    address = {"quality": "decode_latency · b1-p8-g8", "cost": "weight_bytes · b1-p8-g8"}
    app = draw("pareto", path, monkeypatch, **address)
    assert "same conditions" in app.warning[0].value
    flagged = table(app, 0)
    assert set(flagged["figure"]) == set(address.values())
    assert set(flagged["what"]) == {"device"}
    assert flagged["values"][0] == "a GPU in sweep 1; another GPU in sweep 2"
    app = draw("pareto", path, monkeypatch, **address, device="a GPU")
    assert not app.warning, "all of one device"


def test_pareto_draws_several_models_apart(filled_path, monkeypatch):
    both = {"on": [MODEL, SHAPE], "cost": "weight_bytes · b1-p512-g64"}
    app = draw("pareto", filled_path, monkeypatch, quality="decode_latency · b1-p512-g64", **both)
    assert len(app.get("plotly_chart")) == 2
    assert set(table(app)["model"]) == {MODEL, SHAPE}
    app = draw("pareto", filled_path, monkeypatch, quality="acc · hellaswag", **both)
    assert len(app.get("plotly_chart")) == 1
    assert f"{SHAPE}: no variant" in app.text[-1].value


def test_pareto_says_that_random_weights_have_no_quality(filled_path, monkeypatch):
    app = draw("pareto", filled_path, monkeypatch, on=SHAPE)
    assert any("random weights have no quality" in each.value for each in app.caption)
    assert len(app.get("plotly_chart")) == 1


def test_compare_begins_with_a_baseline(filled_path, monkeypatch):
    app = draw("compare", filled_path, monkeypatch)
    assert len(app.get("plotly_chart")) == 9, "six figures, the raw readings, kernels of two phases"
    differences, items, values, options, changed = (table(app, place) for place in range(5))
    assert options.columns[0] == "baseline"
    assert set(differences["variant"]) == set(options.columns[1:])
    assert {"McNemar", ""} == set(differences["test"])
    assert items.columns.tolist() == ["item", "first", "other", "change"]
    assert len(values) == 14
    assert values.columns.tolist()[2:] == options.columns.tolist()
    assert changed["variant"].tolist() == list(options.columns)


def test_compare_takes_the_variants_of_the_address(filled_path, monkeypatch):
    app = draw("compare", filled_path, monkeypatch, variant=["3", "6"])
    options = table(app, 3)
    assert options.columns.tolist() == ["gptq:bits=4", "wanda:sparsity=0.5"]
    assert options.loc["marks"].tolist() == ["", "simulated"]
    assert set(table(app)["variant"]) == {"wanda:sparsity=0.5 (simulated)"}
    assert table(app, 2).columns[-1] == "wanda:sparsity=0.5 (simulated)"
    app = draw("compare", filled_path, monkeypatch, variant=["3"])
    assert app.info[0].value == "Choose at least 2 variants."
    app = draw("compare", filled_path, monkeypatch, variant=["3", "no number", "77"])
    assert app.info[0].value == "Choose at least 2 variants."


def test_an_address_may_ask_for_more_than_a_page_can_show(filled_path, monkeypatch):
    app = draw("compare", filled_path, monkeypatch, variant=[*map(str, range(1, 9)), "1"])
    assert len(table(app, 3).columns) == 6
    app = draw("pareto", filled_path, monkeypatch, on=[MODEL, MODEL], q="x" * 999)
    assert app.query_params["q"] == "x" * 200


def test_compare_keeps_what_was_chosen_where_it_offers_only_some(filled_path, monkeypatch):
    monkeypatch.setattr("harness_dashboard.views.compare._OFFERED", 2)
    app = draw("compare", filled_path, monkeypatch, variant=["1", "2"], q="llama")
    assert table(app, 3).columns.tolist() == ["baseline", "rtn:bits=4"]
    [widget] = [each for each in app.multiselect if each.label.startswith("Variants")]
    assert len(widget.options) == 5, "the two, the newest two that match, and the baseline of those"
    assert any("The newest 2 of 15 variants" in each.value for each in app.caption)


def test_an_item_is_shown_with_all_that_was_kept_of_it(filled_path, monkeypatch):
    app = draw("compare", filled_path, monkeypatch, variant=["1", "7"])
    index = int(table(app, 1)["item"][1])
    choose(app, "selectbox", "Item", str(index))
    kept = [json.loads(code.value) for code in app.code if code.value.startswith("{")]
    assert [each["loglikelihoods"][0] for each in kept] == [-1.0 - index] * 2
    assert app.query_params["item"] == str(index)


def test_two_models_side_by_side_are_said_to_differ(filled_path, monkeypatch):
    with Store.open_readonly(filled_path) as store:
        about = queries.described(store, queries.matching(store, queries.Filters(), None))
    ids = about[about["family"] == "baseline"]["variant"].astype(str).tolist()
    app = draw("compare", filled_path, monkeypatch, variant=ids)
    assert all("model: " in caution for caution in table(app)["caution"])


def test_all_well(tmp_path, monkeypatch):
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        sweep = store.open_sweep(command="", config={}, manifest={}, cells_planned=1)
        store.write_variant(sweep, variant_row("rtn", (("rtn", {}),), "quantization", key="v"))
        result = CellResult("c", "v", Status.OK, records=(Record("acc", 0.5, "fraction"),))
        store.write_cell(sweep, result, kind=CellKind.TASK, task="t", scenario=None)
    app = draw("overview", path, monkeypatch)
    assert any("has a baseline with this figure" in each.value for each in app.caption)
    assert draw("compare", path, monkeypatch).info[0].value == "Choose at least 2 variants."
    assert "needs two figures" in draw("pareto", path, monkeypatch).info[0].value


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
