"""Stores in SQLite files and in a throw-away PostgreSQL server: tests that use `store` or `target` run on
both."""

from __future__ import annotations

import tempfile

import pytest

from harness.store.store import Store
from tests.store.server import PostgresServer, postgres_programs


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.db"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def target(request):
    """Where an empty store may be opened: a path, or the URL of a database."""
    return request.getfixturevalue({"sqlite": "path", "postgres": "url"}[request.param])


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def fresh_target(request):
    """Where nothing is yet: a path, or the URL of a database without tables."""
    return request.getfixturevalue({"sqlite": "path", "postgres": "empty_url"}[request.param])


@pytest.fixture
def store(target):
    with Store.open(target) as opened:
        yield opened


@pytest.fixture
def sqlite_store(path):
    with Store.open(path) as opened:
        yield opened


@pytest.fixture
def url(postgres_server):
    """The URL of a database that holds a store without rows."""
    name = postgres_server.new_database()
    yield postgres_server.url(name)
    postgres_server.drop(name)


@pytest.fixture
def empty_url(postgres_server):
    """The URL of a database without any table."""
    name = postgres_server.new_database(empty=True)
    yield postgres_server.url(name)
    postgres_server.drop(name)


@pytest.fixture(scope="session")
def postgres_programs_folder():
    pytest.importorskip("psycopg")
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (initdb is not found)")
    return programs


@pytest.fixture(scope="session")
def postgres_server(postgres_programs_folder):
    """A server for the whole test run."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = PostgresServer(postgres_programs_folder, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
