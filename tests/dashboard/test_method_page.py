"""The Method page: what plugins say, who used a method, and what it cost in quality."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest

pytest.importorskip("streamlit")

from harness_dashboard import method_catalogue, method_charts, method_data
from harness_dashboard.method_catalogue import Broken, Catalogue, MethodCard, Option
from harness_dashboard.views import method
from pydantic import Field

from harness.errors import PluginError
from harness.method import Method, Options
from harness.records import Record
from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep
from tests.dashboard.filling import HOSTILE
from tests.dashboard.pages import draw, fill_quality, texts

CARD = MethodCard(
    "gptq", "quantization", "It rounds.",
    f"It rounds.\n\nChanges: linear\nlayers. {HOSTILE}\n\nHurts: never.",
    "Somebody (2022). A paper.", "2210.17323", ("calibration",),
    (Option("bits", "integer", "2, 3, 4, 8", "4", "w_bits", "bits of a weight"),),
)  # fmt: skip
CATALOGUE = Catalogue({"gptq": CARD, "never-run": MethodCard("never-run", "other", "", "It waits.")})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("method") / "results.db"
    with Store.open(path) as store:
        fill_quality(store)
    return path


@pytest.fixture
def store(path):
    with Store.open_readonly(path) as store:
        yield store


@pytest.fixture
def installed(monkeypatch):
    """The page without the seconds that importing every plugin takes."""
    method._read_once.clear()
    monkeypatch.setattr(method, "read_catalogue", lambda: CATALOGUE)
    yield
    method._read_once.clear()


def ids_of(store, name):
    return list(method_data.used_methods(store).set_index("name").at[name, "ids"])


# --- what plugins say -------------------------------------------------------------------------


class Knobs(Options):
    bits: int = Field(default=4, ge=2, le=8, description="bits of a weight")
    share: float | None = Field(default=None, gt=0)
    layers: list[int] | str = "all"
    kind: str = Field(default="a", json_schema_extra={"enum": ["a", "b"]})
    must: bool = Field()

    aliases = {"n_bits": "bits", "share": "bits"}  # noqa: RUF012 - as plugins write it


def test_options_are_described_from_their_schema():
    described = method_catalogue._described(
        Method("knobs", Knobs, lambda model, options, context: model, needs=lambda options: ())
    )
    options = {each.name: each for each in described.options}
    assert described.needs is None
    assert options["bits"] == Option(
        "bits", "integer", "≥ 2 and ≤ 8", "4", "w_bits, wbits, n_bits", "bits of a weight"
    )
    assert (options["share"].type, options["share"].range) == ("number or none", "> 0")
    assert options["share"].default == "none"
    assert options["layers"].type == "list of integer or text"
    assert options["kind"].range == "a, b"
    assert options["must"].default == "must be given"


def test_every_installed_method_is_described():
    """In this process, where the suite has the plugins imported anyway."""
    from harness.plugins import load_plugins

    answer = json.loads(json.dumps(method_catalogue.describe_installed()))
    found = method_catalogue._catalogue(answer)
    assert list(found.methods) == list(load_plugins().methods)
    gptq = found.methods["gptq"]
    assert gptq.arxiv == "2210.17323"
    assert [title for title, _ in method_catalogue.card_parts(gptq.card)] == [
        "", "Paper", "Changes", "Needs", "Knobs", "Hurts",
    ]  # fmt: skip
    assert {each.name for each in gptq.options} >= {"bits", "group_size", "sym"}


def test_a_process_of_its_own_is_asked(monkeypatch):
    answer = {"methods": [], "broken": [{"name": "x", "error": "y"}]}

    def run(command, **_):
        assert command == [sys.executable, "-m", "harness_dashboard.method_catalogue"]
        return subprocess.CompletedProcess(command, 0, json.dumps(answer), "")

    monkeypatch.setattr(method_catalogue.subprocess, "run", run)
    assert method_catalogue.read_catalogue() == Catalogue({}, (Broken("x", "y"),))


def test_the_process_that_fails_is_one_clear_error(monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 3, "", "Traceback\nRuntimeError: no such thing")

    monkeypatch.setattr(method_catalogue.subprocess, "run", run)
    with pytest.raises(PluginError, match=r"failed \(exit code 3\): .*no such thing"):
        method_catalogue.read_catalogue()

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(method_catalogue.subprocess, "run", hang)
    with pytest.raises(PluginError, match="longer than 5 s"):
        method_catalogue.read_catalogue(5)


@pytest.mark.slow
def test_the_pages_never_import_torch():
    code = (
        "import sys\n"
        "from harness_dashboard.method_catalogue import read_catalogue\n"
        "from harness_dashboard.views import environment, method, scaling, sweep\n"
        "assert 'gptq' in read_catalogue().methods\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- what the store says ----------------------------------------------------------------------


def test_methods_in_chains_are_found(store):
    used = method_data.used_methods(store).set_index("name")
    assert used["variants"].to_dict() == {"baseline": 1, "gptq": 3, "smoothquant": 1, "unheard-of": 1}


def test_bits_and_sparsity_are_of_the_modules_that_changed(store):
    about = method_data.variants_with(store, ids_of(store, "gptq"), None).set_index("method")
    # The untouched module has 16 bits and ten times the parameters.
    assert about.at["gptq:bits=4", "bits"] == 4.25
    assert about.at["smoothquant+gptq", "bits"] == 4.5
    assert about.at["smoothquant+gptq", "options"].count("bits=4") == 2
    assert (about["ok"] == 1).all()
    other = method_data.variants_with(store, ids_of(store, "unheard-of"), None)
    assert other["sparsity"].tolist() == [0.5]


def test_the_metrics_are_scores_and_not_what_was_derived_from_them(store):
    found = method_data.quality_metrics(store, ids_of(store, "gptq"), None)
    assert found[["task", "metric", "variants"]].values.tolist() == [["grammar", "acc", 3]]


def test_the_paired_difference_counts_where_it_is_stored(store):
    about = method_data.variants_with(store, ids_of(store, "gptq"), None)
    found = method_data.against_baseline(store, about, "grammar", "acc", None)
    rows = found.merge(about[["variant", "method"]], on="variant").set_index("method")
    paired, independent = rows.loc["gptq:bits=4"], rows.loc["smoothquant+gptq"]
    assert paired[["difference", "lower", "upper"]].tolist() == [-0.02, -0.05, 0.01]
    assert paired["compared"] == "item by item"
    assert independent["compared"] == "by intervals"
    assert independent["difference"] == 0
    assert independent["upper"] == pytest.approx((0.1**2 + 0.1**2) ** 0.5)
    assert set(rows["direction"]) == {"higher"}
    assert set(rows["caution"]) == {""}


def test_other_conditions_are_said(tmp_path):
    from harness.records import Record

    with Store.open(tmp_path / "results.db") as store:
        score = Record("acc", 0.5, "fraction")
        add_cell(store, add_sweep(store), "baseline", score, task="grammar", key="b")
        other = add_sweep(store, versions={"torch": "3"}, config={"limit": 10})
        add_cell(store, other, "x", score, task="grammar", key="x")
        about = method_data.variants_with(store, [2], None)
        [row] = method_data.against_baseline(store, about, "grammar", "acc", None).to_dict("records")
    assert row["caution"] == "differ in torch version: 2.11 and 3; differ in limit of items: none and 10" or (
        row["caution"] == "differ in torch version: 3 and 2.11; differ in limit of items: 10 and none"
    )
    assert row["compared"] == "no interval"


def test_a_variant_without_a_baseline_is_not_compared(tmp_path):
    from harness.records import Record

    with Store.open(tmp_path / "results.db") as store:
        add_cell(store, add_sweep(store), "x", Record("acc", 0.5, "fraction"), task="grammar", key="x")
        about = method_data.variants_with(store, [1], None)
        assert method_data.against_baseline(store, about, "grammar", "acc", None).empty


def test_all_results_at_a_place(store):
    about = method_data.variants_with(store, ids_of(store, "gptq"), None)
    assert method_data.places_of(store, about["variant"].tolist(), None) == ["grammar"]
    found, total = method_data.results_at(store, about, "grammar", None)
    assert (len(found), total) == (4, 4)
    few, total = method_data.results_at(store, about, "grammar", None, most=2)
    assert (len(few), total) == (2, 4)
    assert few["variant"].iloc[0] == HOSTILE  # the newest


# --- the figure -------------------------------------------------------------------------------


def quality_rows(models):
    return pd.DataFrame(
        {
            "model": models, "family": "quantization", "name": HOSTILE, "options": "bits=4", "bits": 4.25,
            "sparsity": 0.5, "difference": -0.02, "lower": -0.05, "upper": 0.01, "unit": "fraction",
            "direction": "higher", "compared": "item by item", "caution": "", "simulated": True,
        }
    )  # fmt: skip


def test_one_panel_a_model_with_units_and_direction():
    figure = method_charts.quality_against(quality_rows(["a", "a", "b", HOSTILE]), "bits", "acc · grammar")
    assert [trace.x[0] for trace in figure.data] == [4.25] * 3
    assert figure.data[0].y[0] == pytest.approx(-2.0)
    assert figure.data[0].error_y.array[0] == pytest.approx(3.0)
    assert figure.data[0].marker.symbol[0] == "circle-open"  # simulated
    assert figure.layout.xaxis.title.text == "stored bits per weight [bit] (lower is better)"
    assert figure.layout.yaxis3.title.text == "difference to baseline [points] (higher is better)"
    assert all("<img" not in each.text for each in figure.layout.annotations)
    assert "<img" not in figure.data[0].hovertext[0]
    hostile = quality_rows(["a"]).assign(unit=HOSTILE, compared=HOSTILE, caution=HOSTILE)
    assert "<img" not in str(method_charts.quality_against(hostile, "bits", HOSTILE).to_dict())
    sparsity = method_charts.quality_against(quality_rows(["a"]), "sparsity", "acc · grammar")
    assert sparsity.layout.xaxis.title.text == "sparsity [%] (higher is better)"
    assert sparsity.data[0].x[0] == 50


# --- the page ---------------------------------------------------------------------------------


def test_the_page_of_an_installed_method(path, monkeypatch, installed):
    app = draw("method", path, monkeypatch, name="gptq")
    said = [each.value for each in app.text]
    assert said[0] == "quantization · needs: calibration"
    assert f"Linear layers. {HOSTILE}" in said
    assert "Somebody (2022). A paper." in said
    options, rows, results = (app.dataframe[place].value for place in range(3))
    assert options["also accepted as"].tolist() == ["w_bits"]
    assert set(rows["method"]) == {"gptq:bits=4", "smoothquant+gptq", HOSTILE}
    shown = rows.set_index("method")
    assert shown.at["gptq:bits=4", "difference ↑ [points]"] == -2.0
    assert len(results) == 4
    assert len(app.get("plotly_chart")) == 1
    assert app.code[0].value == "harness sweep --methods gptq:bits=4"
    for each in texts(app):
        assert "<img" not in each


def test_rows_of_a_method_that_is_not_installed(path, monkeypatch, installed):
    app = draw("method", path, monkeypatch, name="unheard-of")
    assert "No plugin that is installed here has this method" in app.info[0].value
    assert app.dataframe[0].value["method"].tolist() == ["unheard-of"]


def test_a_method_without_rows(path, monkeypatch, installed):
    app = draw("method", path, monkeypatch, name="never-run")
    assert app.code[-1].value == "harness sweep --methods never-run"
    assert "Nothing in this store was made with it." in app.info[0].value


def test_plugins_that_cannot_be_read_leave_the_rows(path, monkeypatch):
    method._read_once.clear()

    def refuse():
        raise PluginError("loading the plugins failed")

    monkeypatch.setattr(method, "read_catalogue", refuse)
    app = draw("method", path, monkeypatch, name="gptq")
    assert "The plugins could not be read" in app.error[0].value
    assert len(app.get("plotly_chart")) == 1


def test_the_plugins_are_read_once(path, monkeypatch):
    asked = []
    method._read_once.clear()
    monkeypatch.setattr(method, "read_catalogue", lambda: asked.append(1) or CATALOGUE)
    for name in ("gptq", "unheard-of"):
        draw("method", path, monkeypatch, name=name)
    assert len(asked) == 1
    method._read_once.clear()


def test_rows_on_random_weights_and_from_elsewhere_are_marked(tmp_path, monkeypatch, installed):
    path = tmp_path / "marks.db"
    with Store.open(path) as store:
        sweep = add_sweep(store)
        score = Record("weight_bytes", 1.0, "B")
        add_cell(store, sweep, "gptq", score, model="shape:m", synthetic=True)
        add_cell(store, sweep, "gptq", score, simulated=True)
    app = draw("method", path, monkeypatch, name="gptq")
    rows = app.dataframe[1].value
    assert dict(zip(rows["model"], rows["marks"], strict=True)) == {"shape:m": "synthetic", "m": "simulated"}
