"""The real server and a real browser, for tests and for measuring."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCREENSHOTS = Path(__file__).parents[1] / "screenshots"
PICTURES_WANTED = os.environ.get("HARNESS_SCREENSHOTS") == "1"
"""Pictures are for people to look at, and a sixth of these tests' time: HARNESS_SCREENSHOTS=1 takes them."""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SERVE = """
import sys
from harness_dashboard.launch import serve
sys.exit(serve(sys.argv[1], port=int(sys.argv[2]), open_browser=False))
"""
WIDE, NARROW = 1280, 390
STICKING_OUT = """
[...document.querySelectorAll('[data-testid=stMain] *')]
.filter(each => each.getBoundingClientRect().right > innerWidth + 1
  && !each.closest('[data-testid=stDataFrame]') && !each.closest('svg')
  && getComputedStyle(each).visibility != 'hidden').map(each => each.className)
"""
CHART, TABLE = ".js-plotly-plot", "[data-testid=stDataFrame]"


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]

    def processes(self) -> list[Path]:
        """The server's processes in /proc: the command and what it started."""
        found, waiting = [], [self.process.pid]
        while waiting:
            folder = Path("/proc") / str(waiting.pop())
            found.append(folder)
            waiting += map(int, (folder / f"task/{folder.name}/children").read_text().split())
        return found

    def resident_bytes(self) -> int:
        statuses = [(folder / "status").read_text() for folder in self.processes()]
        return sum(int(status.partition("VmRSS:")[2].split()[0]) * 1024 for status in statuses)

    def cpu_s(self) -> float:
        """The processor's time since the start, which other work on the machine does not stretch."""
        fields = [(folder / "stat").read_text().rpartition(")")[2].split() for folder in self.processes()]
        ticks = sum(int(each[11]) + int(each[12]) for each in fields)
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(path: Path) -> Iterator[Server]:
    """The dashboard's server on a store; it must end well."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(path), str(port)], stdout=subprocess.DEVNULL)
    try:
        wait_until_up(process, port)
        yield Server(f"http://127.0.0.1:{port}", process)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=20)
    assert code == 0
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return
    raise AssertionError("Streamlit did not end with it")


def wait_until_up(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server that was started answers."""
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1):
                return
        except OSError:
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chromium() -> str:
    """The system's browser; a test that needs it is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


@contextmanager
def browsing(width: int = WIDE) -> Iterator[Any]:
    """A page of the system's Chromium; `complaints` holds what its console and its scripts complain of."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 1100})
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(f"script: {error}"))
        page.on("console", lambda line: record_error(page, line))
        page.on("dialog", lambda dialog: page.complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: record_stranger(page, request))
        yield page
        browser.close()


def record_error(page: Any, line: Any) -> None:
    # At first Streamlit looks for its server under the page's own path.
    probe = line.location.get("url", "").endswith(("/_stcore/health", "/_stcore/host-config"))
    if line.type == "error" and not probe:
        page.complaints.append(f"console: {line.text} ({line.location.get('url')})")


def record_stranger(page: Any, request: Any) -> None:
    if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
        page.complaints.append(f"request to {request.url}")


def visit(page: Any, url: str, heading: str) -> Any:
    """Open a page and wait until it is drawn."""
    page.goto(url)
    page.get_by_role("heading", name=heading, exact=True).wait_for(timeout=30_000)
    settle(page)
    return page


def settle(page: Any) -> None:
    """Wait until the script has run and everything is drawn."""
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    # Tables and charts come in pieces after the script has run.
    page.wait_for_function("!document.querySelector('[data-testid=stSkeleton]')")
    assert page.locator('[data-testid="stException"]').count() == 0


def choose(page: Any, label: str, option: str, kind: str = "stMultiSelect") -> None:
    """Choose an option of a list, by what the reader sees."""
    box = page.locator(f'[data-testid="{kind}"]').filter(has=page.get_by_text(label, exact=True))
    box.locator("input").click()
    box.locator("input").fill(option)  # a long list is drawn in parts
    page.get_by_role("option", name=option, exact=True).click()


def count(page: Any, selector: str, expected: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('{selector}').length == {expected}")


def resize(page: Any, width: int) -> None:
    """Make the window so wide, and wait until the page fits it: a chart follows a moment later."""
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function(f"innerWidth == {width}")
    settle(page)
    page.wait_for_function(
        "['html', 'body', '[data-testid=stMain]'].every("
        "name => document.querySelector(name).scrollWidth <= innerWidth)"
    )


def check_widths(page: Any, heading: str) -> None:
    """At both widths nothing of the page that is open sticks out, first as on a telephone.

    Tables scroll by themselves, and the parts of charts are cut by their frames.
    """
    for width in (NARROW, WIDE):
        resize(page, width)
        deadline = time.monotonic() + 20
        while wide := page.evaluate(STICKING_OUT):  # while the menu slides in, for one
            assert time.monotonic() < deadline, f"{heading} at {width} pixels: {wide}"
            page.wait_for_timeout(100)
        save(page, f"{heading.lower()}-{width}", width)


def save(page: Any, name: str, width: int = 1500) -> None:
    """A picture of the whole page in the ignored folder, where pictures are wanted."""
    if PICTURES_WANTED:
        SCREENSHOTS.mkdir(exist_ok=True)
        page.set_viewport_size({"width": width, "height": 1100})
        height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight + 20")
        page.set_viewport_size({"width": width, "height": max(900, min(height, 6000))})
        page.wait_for_timeout(250)
        page.screenshot(path=SCREENSHOTS / f"{name}.png")
        page.set_viewport_size({"width": width, "height": 1100})
