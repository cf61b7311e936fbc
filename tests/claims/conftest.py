"""An empty store a test: copied, because laying out the schema takes longer than most tests."""

from __future__ import annotations

import shutil

import pytest

from harness.store.store import Store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("empty") / "results.db"
    Store.open(path).close()
    return path


@pytest.fixture
def store(empty_store, tmp_path):
    path = tmp_path / "results.db"
    shutil.copy(empty_store, path)
    with Store.open(path) as store:
        yield store
