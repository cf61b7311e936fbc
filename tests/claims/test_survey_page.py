"""The dashboard's page of claims, through Streamlit's own test runner."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("streamlit")

from harness_dashboard.views import survey
from streamlit.testing.v1 import AppTest

from harness.plugins import load_claims
from harness.store.store import Store
from harness.store.tables import sweeps
from tests.claims.rows import begin, scored

HOSTILE = "<img src=x onerror=alert(1)> **bold** :red[red]"


@pytest.fixture
def filled(store, tmp_path):
    """One claim holds, one does not, and the others have no rows."""
    sweep = begin(store, device_name=HOSTILE)
    for model in ("zoo:llama-6m", "zoo:opt-4m"):
        about = {"place": "kjv", "model": model, "device_name": HOSTILE}
        for method, rise in (("gptq:group_size=64", 0.1), ("gptq:bits=3:group_size=64", 0.5)):
            scored(store, sweep, method, rise, **about)
        for method, rise in (("rtn:group_size=64", 0.3), ("rtn:bits=3:group_size=64", 0.2)):
            scored(store, sweep, method, rise, **about)
    return tmp_path / "results.db"


def draw(path, monkeypatch, **address):
    monkeypatch.setenv("HARNESS_DB", str(path))
    app = AppTest.from_string(
        "from harness_dashboard.views import survey\nsurvey.render()", default_timeout=60
    )
    for key, value in address.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, [error.value for error in app.exception]
    return app


def texts(app):
    return [each.value for each in app.text]


def test_the_counts_are_at_the_top_and_every_claim_has_a_card(filled, monkeypatch):
    app = draw(filled, monkeypatch)
    shown = {metric.label: metric.value for metric in app.metric}
    total = len(load_claims())
    assert shown == {"✓ holds": "1", "✗ does not hold": "1", "? not decidable": str(total - 2)}
    for claim in load_claims().values():
        assert claim.says in texts(app)
    sections = [each.value.lower() for each in app.subheader]
    assert sections == [each for each in survey.SECTIONS if each in sections], "the survey's own order"


def test_a_store_that_was_made_anew_is_not_taken_for_the_old_one(tmp_path, monkeypatch):
    def fill(gptq, started_at):
        path = tmp_path / "again.db"
        path.unlink(missing_ok=True)
        with Store.open(path) as store:
            sweep = begin(store)
            with store.engine.begin() as connection:
                connection.execute(sweeps.update().values(started_at=started_at))
            for model in ("zoo:llama-6m", "zoo:opt-4m"):
                scored(store, sweep, "gptq:group_size=64", gptq, place="kjv", model=model)
                scored(store, sweep, "rtn:group_size=64", 0.3, place="kjv", model=model)
        return path

    survey._board.clear()
    first = {each.label: each.value for each in draw(fill(0.1, "2026-01-01T00:00:00"), monkeypatch).metric}
    second = {each.label: each.value for each in draw(fill(0.5, "2026-01-02T00:00:00"), monkeypatch).metric}
    assert first != second, "as many cells and records, but of another sweep"


def test_a_claim_that_does_not_hold_is_shown_with_its_numbers(filled, monkeypatch):
    app = draw(filled, monkeypatch, outcome="does_not_hold")
    assert [text for text in texts(app) if "where above 0 was claimed" in text]
    [table] = [each.value for each in app.dataframe]
    assert set(table["says"]) == {"contradicts"}
    assert len(table) == 2
    assert [each.value for each in app.subheader] == ["Post-training quantization"]


def test_section_and_device_are_in_the_address(filled, monkeypatch):
    app = draw(filled, monkeypatch, section="attention")
    assert [each.value for each in app.subheader] == ["Attention"]
    app = draw(filled, monkeypatch, board="cuda")
    assert {metric.label: metric.value for metric in app.metric}["✓ holds"] == "0"
    assert any("only decidable on cpu" in text for text in texts(app))


def test_filters_that_leave_nothing_say_so(filled, monkeypatch):
    app = draw(filled, monkeypatch, section="distillation", outcome="holds")
    assert [each.value for each in app.info] == ["No claim passes the filters."]


def test_no_text_of_the_store_reaches_markdown(filled, monkeypatch):
    app = draw(filled, monkeypatch)
    assert any(HOSTILE in text for text in texts(app))
    for element in (*app.markdown, *app.caption, *app.info, *app.title, *app.subheader):
        assert "<img" not in element.value


def test_a_missing_store_says_how_to_fill_it(tmp_path, monkeypatch):
    app = draw(tmp_path / "missing.db", monkeypatch)
    assert app.info[0].value == "There are no results to show yet."
    assert not (tmp_path / "missing.db").exists()


def test_an_empty_store_shows_the_board_undecided(store, tmp_path, monkeypatch):
    app = draw(tmp_path / "results.db", monkeypatch)
    assert {metric.label: metric.value for metric in app.metric}["? not decidable"] == str(len(load_claims()))


def test_links_lead_to_the_rows():
    claim = load_claims()["gptq-beats-rounding-at-4-bits"]
    few = urlsplit(survey.link_to_rows(claim, [3, 5]))
    assert (few.path, parse_qs(few.query)) == ("compare", {"variant": ["3", "5"]})
    many = urlsplit(survey.link_to_rows(claim, range(9)))
    assert many.path == "./"  # the Overview has no path of its own
    query = parse_qs(many.query)
    assert query["model"] == ["zoo:llama-6m", "zoo:opt-4m"]
    assert set(query["method"]) == {"baseline", "gptq:group_size=64", "rtn:group_size=64"}


def test_no_figure_without_spread_pretends_to_have_a_p_value():
    from harness.claims import Finding, Side

    exact = Finding("bytes", 8, 8, 8, "x", Side.ABOVE, 7, "exact", 1, "measurement")
    table = survey.numbers([exact])
    assert table["p"].isna().all()
    assert table["says"].tolist() == ["supports"]
