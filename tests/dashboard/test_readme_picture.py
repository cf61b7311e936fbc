"""The README's picture of the Pareto page, taken of the rows in `reference/`.

`HARNESS_PICTURES=1 pytest tests/dashboard/test_readme_picture.py` takes the one that is committed anew.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("playwright.sync_api")

from harness.store.exchange_import import import_results
from harness.store.exchange_read import read_results
from harness.store.store import Store
from tests.dashboard.browsing import CHART, SCREENSHOTS, browsing, count, serving, visit

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs/images/pareto.png"
ROWS = ROOT / "reference/quality-zoo.jsonl.gz"
VIEW = {
    "on": ["zoo:llama-6m", "zoo:opt-4m"],
    "quality": "acc · grammar",
    "cost": "weight_bytes",
    "log_x": 1,
}
MOST_BYTES = 300_000


def is_picture(path):
    """A PNG that a README can hold: its width and height in pixels."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < MOST_BYTES
    return struct.unpack(">II", content[16:24])


def test_the_committed_picture_is_small_and_shown():
    width, height = is_picture(PICTURE)
    assert 1000 <= width <= 1600
    assert height <= 1200
    assert f"({PICTURE.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text()


def test_it_can_be_taken_of_the_reference_rows(tmp_path):
    store = tmp_path / "reference.db"
    with Store.open(store) as opened:
        import_results(opened, [read_results(ROWS)])
    taken = SCREENSHOTS / "readme-pareto.png"
    SCREENSHOTS.mkdir(exist_ok=True)
    with serving(store) as server, browsing() as page:
        page.set_viewport_size({"width": 1280, "height": 900})
        visit(page, f"{server.url}/pareto?{urlencode(VIEW, doseq=True)}", "Pareto")
        count(page, CHART, 2)
        page.locator(f"{CHART} .point").first.wait_for()
        page.screenshot(path=taken)
        assert page.complaints == []
    is_picture(taken)
    if os.environ.get("HARNESS_PICTURES"):
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copy(taken, PICTURE)
