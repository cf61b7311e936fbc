"""The real server and a real browser: every page draws, nothing throws, text stays text."""

from __future__ import annotations

import re
import urllib.parse

import pytest

from harness.store import queries
from harness.store.store import Store
from tests.dashboard.browsing import (
    CHART,
    NARROW,
    TABLE,
    check_widths,
    choose,
    count,
    save,
    serving,
    settle,
    visit,
)
from tests.dashboard.filling import HOSTILE, MODEL, SHAPE

pytestmark = pytest.mark.browser
pytest.importorskip("streamlit")

WINDOW = {"width": 1500, "height": 1100}
TELEPHONE = {"width": NARROW, "height": 900}


@pytest.fixture(scope="module")
def url(filled_path):
    with serving(filled_path) as server:
        yield server.url


@pytest.fixture
def page(window):
    window.complaints.clear()
    window.set_viewport_size(WINDOW)
    yield window
    assert window.complaints == []


def number(page, place=0):
    return int(page.locator('[data-testid="stMetricValue"]').nth(place).inner_text())


def test_every_page_of_a_filled_store(url, page):
    page.set_viewport_size(TELEPHONE)
    visit(page, url, "Overview")
    count(page, TABLE, 1)
    page.get_by_text("1 to 15 of 15 variants").wait_for()
    check_widths(page, "Overview")
    page.set_viewport_size(WINDOW)
    page.get_by_text("Differences to the baseline in all columns").click()
    page.get_by_role("heading", name="Against the baseline").wait_for()
    count(page, TABLE, 2)
    assert "all=1" in page.url
    settle(page)
    save(page, "overview")

    page.set_viewport_size(TELEPHONE)
    visit(page, f"{url}/pareto", "Pareto")
    page.locator(CHART).wait_for()
    text = page.locator(CHART).inner_text()
    assert "Pareto front" in text
    assert "weight_bytes · b1-p512-g64 [MiB] (lower is better)" in text
    check_widths(page, "Pareto")
    page.set_viewport_size(WINDOW)
    save(page, "pareto")

    chosen = {
        "quality": "acc · hellaswag",
        "cost": "decode_latency · b8-p512-g64",
        "third": "weight_bytes · b8-p512-g64",
        "log_x": "1",
    }
    visit(page, f"{url}/pareto?{urllib.parse.urlencode(chosen)}", "Pareto")
    page.locator(CHART).wait_for()
    text = page.locator(CHART).inner_text()
    assert "acc · hellaswag [%] (higher is better)" in text
    assert "decode_latency · b8-p512-g64 [ms] (lower is better)" in text
    assert "wanda:sparsity=0.5 (simulated)" in text
    assert "Pareto front of all three" in text
    save(page, "pareto-three")

    facets = urllib.parse.urlencode(
        {"on": [MODEL, SHAPE], "quality": "decode_latency · b1-p512-g64"}, doseq=True
    )
    visit(page, f"{url}/pareto?{facets}", "Pareto")
    count(page, CHART, 2)
    save(page, "pareto-models")

    page.set_viewport_size(TELEPHONE)
    visit(page, f"{url}/compare", "Compare")
    count(page, CHART, 9)
    count(page, TABLE, 5)
    check_widths(page, "Compare")
    save(page, "compare")


def test_each_filter_goes_into_the_address_and_comes_from_it(url, page):
    for label, option, key, left in (
        ("Models", SHAPE, "model", 3),
        ("Methods", "gptq:bits=4", "method", 2),
        ("Families", "pruning", "family", 2),
        ("Devices", "NVIDIA H100 80GB HBM3", "device", 15),
        ("Tasks", "wikitext", "task", 15),
        ("Status", "✕ oom", "status", 1),
    ):
        visit(page, url, "Overview")
        choose(page, label, option)
        page.wait_for_function(f"location.search.includes('{key}=')")
        settle(page)
        assert number(page) == left
    shared = page.url
    visit(page, shared, "Overview")
    assert number(page) == 1


def test_searching_and_turning_pages(url, page):
    visit(page, url, "Overview")
    page.get_by_role("textbox", name="Search").fill("gptq llama-6m")
    page.get_by_role("textbox", name="Search").press("Enter")
    page.get_by_text("1 to 3 of 3 variants").wait_for()
    page.wait_for_function("location.search.includes('q=')")
    page.get_by_role("link", name="Pareto").click()
    page.locator(CHART).wait_for()
    page.wait_for_function("location.search.includes('q=gptq')")


def test_a_flip_is_followed_down_to_its_item(url, page):
    visit(page, f"{url}/compare?variant=1&variant=7", "Compare")
    changed = page.get_by_text(re.compile(r"\d+ of 200 items changed"))
    changed.wait_for()
    page.get_by_text('"loglikelihoods"').first.wait_for()
    assert page.get_by_text('"loglikelihoods"').count() == 2


def test_text_of_the_store_is_text(url, page, filled_path):
    """A method and an option that try to be HTML and Markdown."""
    with Store.open_readonly(filled_path) as store:
        variants = queries.variants(store).set_index("method")["variant"]
    visit(
        page, f"{url}/compare?variant={variants[HOSTILE]}&variant={variants['rtn:bits=4'].iloc[0]}", "Compare"
    )
    count(page, CHART, 7)
    page.get_by_text(HOSTILE[:28]).first.wait_for()
    save(page, "hostile-compare")
    visit(
        page,
        f"{url}/pareto?method={urllib.parse.quote(HOSTILE)}&quality=decode_latency+·+b1-p512-g64",
        "Pareto",
    )
    visit(page, f"{url}/?method={urllib.parse.quote(HOSTILE)}", "Overview")
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0


def test_filters_stay_from_page_to_page_and_in_the_address(url, page):
    visit(page, f"{url}/?family=pruning", "Overview")
    assert number(page) == 2
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("heading", name="Compare", exact=True).wait_for()
    page.wait_for_function("location.search.includes('family=pruning')")
    page.reload()
    page.get_by_role("heading", name="Compare", exact=True).wait_for()
    page.wait_for_function("location.search.includes('family=pruning')")


def test_an_empty_place(page, tmp_path):
    with serving(tmp_path / "missing.db") as server:
        visit(page, server.url, "Overview")
        assert page.get_by_text("harness sweep --methods gptq,smoothquant").is_visible()
        save(page, "missing")
