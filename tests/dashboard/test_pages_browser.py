"""Scaling, Method, Sweep and Environment in a real browser, the Sweep page while a real sweep runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.store.store import Store
from tests.core.stores import add_cell, add_sweep
from tests.dashboard.browsing import (
    CHART,
    NARROW,
    TABLE,
    WIDE,
    count,
    resize,
    save,
    serving,
    visit,
)
from tests.dashboard.filling import HOSTILE
from tests.dashboard.pages import add_failures, fill_quality, fill_scaling
from tests.robustness.tiny import TASK, save_model

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sweeping(tmp_path_factory):
    """A sweep that waits for the test: it is started first, because importing everything takes seconds."""
    folder = tmp_path_factory.mktemp("sweeping")
    model = save_model(folder / "model")
    command = [
        sys.executable, "-m", "harness", "sweep", "--plugin", HERE / "waiting_method.py",
        "--methods", "waiting,waiting:number=2,waiting:number=3", "--models", model, "--device", "cpu",
        "--include-path", HERE.parent / "robustness", "--tasks", TASK,
        "--prompt-lens", "4", "--new-tokens", "1", "--db", folder / "results.db",
    ]  # fmt: skip
    environment = {
        **os.environ, "WAITING_FOR": str(folder), "WAITING_SAYS": HOSTILE, "OMP_NUM_THREADS": "1",
        "HARNESS_CACHE": str(folder / "cache"),
    }  # fmt: skip
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=folder, env=environment, stdout=said, stderr=said
        )
    yield folder, process
    if process.poll() is None:
        process.kill()
    process.wait()


@pytest.fixture(scope="module")
def path(tmp_path_factory, sweeping):
    path = tmp_path_factory.mktemp("pages") / "results.db"
    with Store.open(path) as store:
        fill_quality(store)
        fill_scaling(store)
        add_failures(store, add_sweep(store, versions={"torch": HOSTILE}))
    return path


@pytest.fixture(scope="module")
def url(path):
    with serving(path) as server:
        yield server.url


@pytest.fixture
def page(window):
    window.complaints.clear()
    yield window
    assert window.complaints == []


def look(page, url, heading, name):
    """A page at both widths: nothing sticks out, nothing complains, no text of the store was obeyed."""
    page.set_viewport_size({"width": NARROW, "height": 900})
    visit(page, url, heading)
    for width in (NARROW, WIDE):
        resize(page, width)
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0
    save(page, name, WIDE)


def test_scaling(url, page):
    look(page, f"{url}/scaling", "Scaling", "scaling")
    count(page, CHART, 6)
    page.get_by_text("Both take the same time at").first.wait_for()
    assert "prefill_latency [ms] (lower is better)" in page.locator(CHART).first.inner_text()
    # A choice goes into the address, and the address brings it back.
    page.get_by_role("combobox", name="Time").click()
    page.get_by_role("option", name="decode_latency").click()
    page.wait_for_function("location.search.includes('time=decode_latency')")
    page.reload()
    page.wait_for_function("document.body.innerText.includes('decode_latency [ms]')")


def test_environment(url, page):
    look(page, f"{url}/environment", "Environment", "environment")
    count(page, TABLE, 4)
    page.get_by_role("button", name="Check the store").click()
    page.get_by_text("No damage was found.").wait_for()


def test_failures_of_a_sweep_are_text(url, page):
    look(page, f"{url}/sweep?status=crashed", "Sweep", "sweep-failures")
    assert f"crashed: {HOSTILE}" in page.locator("[data-testid=stText]").all_inner_texts()
    assert page.locator("[data-testid=stCode]").last.inner_text().strip() == HOSTILE


def test_method(url, page):
    page.goto(f"{url}/method?name=unheard-of")  # the plugins are read now, by a process of its own
    page.get_by_text("No plugin that is installed here").wait_for(timeout=120_000)
    look(page, f"{url}/method?name=gptq", "Method", "method")
    page.get_by_text("arXiv:2210.17323").first.wait_for()
    count(page, TABLE, 3)
    text = page.locator(CHART).inner_text()
    assert "stored bits per weight [bit] (lower is better)" in text
    assert "difference to baseline [points] (higher is better)" in text


# --- while a sweep runs -----------------------------------------------------------------------


def wait_for_store(folder, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "said").read_text()
        if (folder / "results.db").exists() and "[" in (folder / "said").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the sweep does not start")


def metric(page, label):
    return page.locator("[data-testid=stMetric]", has_text=label).locator("[data-testid=stMetricValue]")


def test_the_page_follows_a_sweep_that_runs(page, sweeping):
    folder, process = sweeping
    wait_for_store(folder, process)
    with serving(folder / "results.db") as server:
        follow(page, server.url, folder, process)
        page.goto("about:blank")  # or it would look for a server that has ended


def follow(page, url, folder, process):
    visit(page, f"{url}/sweep", "Sweep")
    page.get_by_role("heading", name="Sweep 1: running").wait_for()
    # The baseline's three cells; the next variant waits for this test.
    page.wait_for_function("document.body.innerText.includes('3 of 12 cells done')")
    resize(page, NARROW)
    resize(page, WIDE)
    save(page, "sweep-running")
    (folder / "1").touch()  # nobody touches the page from here on
    page.wait_for_function("document.body.innerText.includes('6 of 12 cells done')", timeout=60_000)
    assert metric(page, "Left").inner_text().endswith(" s")
    (folder / "2").touch()  # fails
    page.wait_for_function("document.body.innerText.includes('9 of 12 cells done')", timeout=60_000)
    page.wait_for_function("document.body.innerText.includes('What did not work')")
    page.locator("[data-testid=stText]", has_text=HOSTILE[:20]).first.wait_for()
    (folder / "3").touch()
    page.get_by_role("heading", name="Sweep 1: finished").wait_for(timeout=60_000)
    assert process.wait(timeout=60) == 1
    retry = page.locator("[data-testid=stCode]", has_text="--retry-failed").first.inner_text()
    assert shlex.split(retry)[:2] == ["harness", "sweep"]
    assert page.get_by_text("This part is drawn again").count() == 0
    assert page.locator("img[src='x']").count() == 0
    save(page, "sweep-finished")


def test_a_killed_sweep_is_interrupted_with_its_command(page, tmp_path):
    path = tmp_path / "results.db"
    with Store.open(path) as store:
        sweep = store.open_sweep(command="harness sweep --methods a", config={}, manifest={}, cells_planned=2)
        add_cell(store, sweep, "a", task="t", key="a")
        store.close_sweep(sweep, "interrupted")
    with serving(path) as server:
        visit(page, f"{server.url}/sweep", "Sweep")
        page.get_by_role("heading", name="Sweep 1: interrupted").wait_for()
        assert page.locator("[data-testid=stCode]").first.inner_text().strip() == "harness sweep --methods a"
        page.goto("about:blank")
