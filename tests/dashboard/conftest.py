"""A store as a real sweep leaves it, filled once."""

from __future__ import annotations

import functools

import pytest

from harness.store.store import Store
from tests.dashboard.browsing import browsing
from tests.dashboard.filling import fill


@pytest.fixture(scope="session", autouse=True)
def _components_looked_for_once():
    """Each AppTest would read the metadata of all that is installed, which costs more than the page."""
    try:
        from streamlit.components.v2 import manifest_scanner
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(manifest_scanner.scan_component_manifests)
        patch.setattr(manifest_scanner, "scan_component_manifests", once)
        yield


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
