"""Nothing can be written to a store through the dashboard's own connection: the database itself refuses."""

from __future__ import annotations

import hashlib
import shutil

import pytest

pytest.importorskip("streamlit")

from harness_dashboard import page
from sqlalchemy.exc import DBAPIError
from streamlit.testing.v1 import AppTest

WRITES = (
    "DELETE FROM records",
    "UPDATE cells SET reason = 'changed'",
    "INSERT INTO samples SELECT * FROM samples",
    "CREATE TABLE extra (x INTEGER)",
    "DROP TABLE samples",
    "PRAGMA user_version = 99",
    "REINDEX",
)


@pytest.fixture
def path(filled_path, tmp_path, monkeypatch):
    path = tmp_path / "results.db"
    shutil.copy(filled_path, path)
    monkeypatch.setenv("HARNESS_DB", str(path))
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("statement", WRITES)
def test_the_database_refuses(path, statement):
    before = digest(path)
    with page.opened() as store, store.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA query_only = OFF")  # it is not this alone that keeps it
        with pytest.raises(DBAPIError, match="attempt to write a readonly database"):
            connection.exec_driver_sql(statement)
    assert digest(path) == before


@pytest.mark.parametrize("view", ["overview", "pareto", "compare", "scaling", "sweep", "environment"])
def test_drawing_a_page_leaves_the_file_as_it_is(path, view):
    before = digest(path)
    script = f"from harness_dashboard.views import {view}\n{view}.render()"
    assert not AppTest.from_string(script, default_timeout=30).run().exception
    assert digest(path) == before
