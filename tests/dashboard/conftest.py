"""A store as a real sweep leaves it, filled once."""

from __future__ import annotations

import pytest

from harness.store.store import Store
from tests.dashboard.browsing import browsing
from tests.dashboard.filling import fill


@pytest.fixture(scope="session")
def filled_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("filled") / "results.db"
    with Store.open(path) as store:
        fill(store)
    return path


@pytest.fixture
def filled(filled_path):
    with Store.open_readonly(filled_path) as store:
        yield store


@pytest.fixture(scope="module")
def window():
    """A page of a browser for all tests of a file."""
    pytest.importorskip("playwright.sync_api")
    with browsing() as opened:
        yield opened
