"""Nothing reads a whole store: how many rows come out, by which indexes, and how fast it is at a million."""

from __future__ import annotations

import json
import re

import pytest
from sqlalchemy import event, func, select, text

from harness.store.catalogue import measured_in
from harness.store.store import Store
from harness.store.tables import catalogue, cells, effects, items, kernels, records, samples, variants
from harness.testing.large_store import main, make_store

pytest.importorskip("streamlit")

VARIANTS, RECORDS = 250, 50_000
MOST_ROWS = 12_000  # of which the catalogue is 4,000
WHOLE = re.compile(r"SCAN (?:(?:records|samples|items|kernels|[xyzab])\b|cells(?! USING))")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "results.db"
    make_store(path, VARIANTS, RECORDS)
    return path


@pytest.fixture
def watched(monkeypatch):
    """What is asked of stores that are opened from now on: the statements, and how many rows came out."""
    asked, rows = {}, []
    opened = Store.open_readonly

    def count(_cursor, row):
        rows.append(1)
        return row

    def open_watched(target):
        store = opened(target)
        event.listen(store.engine, "connect", lambda raw, _: setattr(raw, "row_factory", count))

        @event.listens_for(store.engine, "before_cursor_execute")
        def note(_connection, _cursor, statement, parameters, _context, _many):
            asked[statement] = parameters

        return store

    monkeypatch.setattr(Store, "open_readonly", open_watched)
    return asked, rows


def plans(path, asked):
    """How SQLite answers each statement that reads."""
    with Store.open_readonly(path) as store, store.engine.connect() as connection:
        for statement, parameters in list(asked.items()):
            if statement.lstrip().startswith(("SELECT", "WITH")):
                found = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                yield statement, [row[3] for row in found]


# --- the store ----------------------------------------------------------------------------------


def test_it_has_as_many_rows_as_were_asked_for_and_of_every_kind(path):
    with Store.open_readonly(path) as store, store.reading() as connection:
        counted = {
            table.name: connection.scalar(select(func.count()).select_from(table))
            for table in (variants, records, effects, samples, items, kernels)
        }
        assert (counted["variants"], counted["records"]) == (VARIANTS, RECORDS)
        assert min(counted.values()) > 0
        statuses = set(connection.scalars(select(cells.c.status).distinct()))
        assert statuses == {"ok", "oom", "timeout", "not_applicable"}
        again = select(cells.c.key).group_by(cells.c.key).having(func.count() > 1)
        assert connection.execute(again).first() is not None
        assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []


def test_its_catalogue_is_what_its_records_say(path):
    with Store.open_readonly(path) as store, store.reading() as connection:
        entries = {tuple(row) for row in connection.execute(select(catalogue))}
        assert entries == measured_in(connection, cells.c.id > 0)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "small.db"
    assert main([str(file), "--variants", "3", "--records", "40"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 40
    assert main([str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([str(tmp_path / "other.db"), "--variants", "3", "--records", "2"]) == 2
    assert "at least one variant, and one record for each" in capsys.readouterr().err


# --- the pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "address"),
    [
        ("overview", {"by": "decode_latency · b1-p512-g64", "family": "quantization"}),
        ("overview", {"by": "acc · hellaswag", "q": "gptq", "status": "ok", "sweep": "1"}),
        ("pareto", {"quality": "acc · hellaswag", "third": "weight_bytes · b1-p512-g64"}),
        ("compare", {}),
        ("sweep", {"sweep": "1", "status": "oom"}),
    ],
)
def test_a_page_reads_only_what_it_shows_and_by_indexes(view, address, path, watched, monkeypatch):
    from streamlit.testing.v1 import AppTest

    asked, rows = watched
    monkeypatch.setenv("HARNESS_DB", str(path))
    app = AppTest.from_string(
        f"from harness_dashboard.views import {view}\n{view}.render()", default_timeout=60
    )
    for key, value in address.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, [error.value for error in app.exception]
    assert len(app.dataframe[0].value) > 0
    assert 0 < len(rows) < MOST_ROWS, "rows came out of the store that are not on the page"
    for statement, plan in plans(path, asked):
        whole = [line for line in plan if WHOLE.match(line)]
        assert whole == [], f"{statement}\n{plan}"


def test_a_query_without_an_index_would_be_found(path, watched):
    asked, _ = watched
    with Store.open_readonly(path) as store, store.reading() as connection:
        connection.execute(select(records.c.value).where(records.c.value > 1)).first()
    [(_, plan)] = plans(path, asked)
    assert any(WHOLE.match(line) for line in plan)


@pytest.mark.slow
@pytest.mark.browser
def test_a_million_records(tmp_path):
    """The first page in 2 s, any filter in 1 s, and the server in 1 GB; on 2 cores that do nothing else."""
    pytest.importorskip("playwright.sync_api")
    from tests.dashboard.speed import FILTERS, measure

    path = tmp_path / "million.db"
    assert main([str(path), "--variants", "5000", "--records", "1000000"]) == 0
    found = measure(path)
    assert found["Overview first"]["seconds"] < 2, found
    assert max(found[f"filter {label}"]["seconds"] for label, _ in FILTERS) < 1, found
    assert found["server"]["mb"] < 1000, found
