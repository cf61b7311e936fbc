"""The real server and a real browser: every page draws, nothing throws, text stays text."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from harness.store import queries
from harness.store.store import Store
from tests.dashboard.filling import HOSTILE

pytestmark = pytest.mark.browser
pytest.importorskip("streamlit")

CHART, TABLE = ".js-plotly-plot", "[data-testid=stDataFrame]"
SCREENSHOTS = Path(__file__).parents[1] / "screenshots"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SERVE = """
import sys
from harness_dashboard.launch import serve
sys.exit(serve(sys.argv[1], port=int(sys.argv[2]), open_browser=False))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start_server():
    processes = []

    def start(path):
        port = free_port()
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(path), str(port)])
        processes.append((process, port))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1):
                    return f"http://127.0.0.1:{port}"
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    yield start
    for process, port in processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        with pytest.raises(OSError, match="refused"):  # Streamlit ended with it
            socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.fixture
def page():
    """A page of the system's Chromium that records what its console and its scripts complain of."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1100})
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(f"script: {error}"))
        page.on("console", lambda line: record_error(page, line))
        page.on("dialog", lambda dialog: page.complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: record_stranger(page, request))
        yield page
        browser.close()


def record_error(page, line):
    # At first Streamlit looks for its server under the page's own path.
    probe = line.location.get("url", "").endswith(("/_stcore/health", "/_stcore/host-config"))
    if line.type == "error" and not probe:
        page.complaints.append(f"console: {line.text} ({line.location.get('url')})")


def record_stranger(page, request):
    if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
        page.complaints.append(f"request to {request.url}")


def visit(page, url, heading):
    page.goto(url)
    page.get_by_role("heading", name=heading, exact=True).wait_for(timeout=30_000)
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    # Tables and charts come in pieces after the script has run.
    page.wait_for_function("!document.querySelector('[data-testid=stSkeleton]')")
    assert page.locator('[data-testid="stException"]').count() == 0
    return page


def count(page, selector, expected):
    page.wait_for_function(f"document.querySelectorAll('{selector}').length == {expected}")


def save(page, name):
    SCREENSHOTS.mkdir(exist_ok=True)
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight + 20")
    page.set_viewport_size({"width": 1500, "height": max(900, min(height, 6000))})
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.set_viewport_size({"width": 1500, "height": 1100})


def test_every_page_of_a_filled_store(start_server, page, filled_path):
    url = start_server(filled_path)
    visit(page, url, "Overview")
    page.get_by_text("Against the baseline").wait_for()
    count(page, TABLE, 2)
    save(page, "overview")

    visit(page, f"{url}/pareto", "Pareto")
    page.locator(CHART).wait_for()
    text = page.locator(CHART).inner_text()
    assert "Pareto front" in text
    assert "weight_bytes · b1-p512-g64 [MiB] (lower is better)" in text
    save(page, "pareto")

    chosen = {"quality": "acc · hellaswag", "cost": "decode_latency · b8-p512-g64"}
    visit(page, f"{url}/pareto?{urllib.parse.urlencode(chosen)}", "Pareto")
    page.locator(CHART).wait_for()
    text = page.locator(CHART).inner_text()
    assert "acc · hellaswag [%] (higher is better)" in text
    assert "decode_latency · b8-p512-g64 [ms] (lower is better)" in text
    assert "wanda:sparsity=0.5 (simulated)" in text
    save(page, "pareto-chosen")

    visit(page, f"{url}/compare", "Compare")
    count(page, CHART, 6)
    count(page, TABLE, 3)
    save(page, "compare")
    assert page.complaints == []


def test_text_of_the_store_is_text(start_server, page, filled_path):
    """A method and an option that try to be HTML and Markdown."""
    with Store.open_readonly(filled_path) as store:
        variants = queries.variants(store).set_index("method")["variant"]
    url = start_server(filled_path)
    visit(
        page, f"{url}/compare?variant={variants[HOSTILE]}&variant={variants['rtn:bits=4'].iloc[0]}", "Compare"
    )
    count(page, CHART, 4)
    page.get_by_text(HOSTILE[:28]).first.wait_for()
    save(page, "hostile-compare")
    visit(page, f"{url}/?method={urllib.parse.quote(HOSTILE)}", "Overview")
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0
    assert page.complaints == []


def test_filters_stay_from_page_to_page_and_in_the_address(start_server, page, filled_path):
    url = start_server(filled_path)
    visit(page, f"{url}/?family=pruning", "Overview")
    assert page.locator('[data-testid="stMetricValue"]').first.inner_text() == "2"
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("heading", name="Compare", exact=True).wait_for()
    page.wait_for_function("location.search.includes('family=pruning')")
    page.reload()
    page.get_by_role("heading", name="Compare", exact=True).wait_for()
    page.wait_for_function("location.search.includes('family=pruning')")
    assert page.complaints == []


def test_an_empty_place(start_server, page, tmp_path):
    url = start_server(tmp_path / "missing.db")
    visit(page, url, "Overview")
    assert page.get_by_text("harness sweep --methods gptq,smoothquant").is_visible()
    save(page, "missing")
    assert page.complaints == []
