"""Around the pages, in a real browser: sign-in, downloads, themes, the keyboard."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("playwright")

from harness_dashboard.theme import DARK, GRAPHIC_CONTRAST, LIGHT, TEXT_CONTRAST, contrast

from tests.dashboard.browsing import (
    CHART,
    FLAGS,
    TABLE,
    chromium,
    free_port,
    save,
    visit,
    wait_until_up,
)
from tests.dashboard.filling import HOSTILE, SIMULATED, VARIANTS

pytestmark = pytest.mark.browser

TOKEN = "correct-horse-battery-staple"
LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "file:")


@pytest.fixture(scope="module")
def server(filled_path, tmp_path_factory):
    """A server with a token, as the command line starts it."""
    output = tmp_path_factory.mktemp("server") / "output.txt"
    port = free_port()
    environment = {**os.environ, "HARNESS_DASHBOARD_TOKEN": TOKEN}
    line = [sys.executable, "-m", "harness", "dashboard", "--db", str(filled_path), "--port", str(port)]
    with output.open("w") as said:
        process = subprocess.Popen(line, env=environment, stdout=said, stderr=said)
    try:
        wait_until_up(process, port)
        check_child(process.pid)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=20)
    assert code == 0
    assert "sign in with the token" in output.read_text()
    assert TOKEN not in output.read_text()
    assert "Traceback" not in output.read_text()


def check_child(pid):
    """The server itself is not told the token, neither in its command line nor in its environment."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for told in ("cmdline", "environ"):
        content = Path(f"/proc/{child}/{told}").read_bytes()
        assert content
        assert TOKEN.encode() not in content


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def guarded(browser):
    """Contexts from which nothing but this machine can be reached, and what they tried to reach."""
    strangers = []

    def guard(route):
        if route.request.url.startswith(LOCAL):
            route.continue_()
        else:
            strangers.append(route.request.url)
            route.abort()

    def make(**settings):
        context = browser.new_context(accept_downloads=True, **settings)
        context.route("**/*", guard)
        return context

    yield make
    assert strangers == []


@pytest.fixture(scope="module")
def signed_in(guarded, server):
    """A context that has given the token, by the same form but without drawing it."""
    context = guarded()
    answer = context.request.post(f"{server}/sign-in", form={"token": TOKEN, "next": "/sign-in"})
    assert answer.ok
    yield context
    context.close()


@pytest.fixture
def page(signed_in):
    with watched(signed_in) as page:
        yield page


@contextmanager
def watched(context):
    page, problems = context.new_page(), []
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert problems == []


def test_nothing_is_shown_before_the_sign_in(server, guarded):
    context = guarded()
    with watched(context) as page:
        check_sign_in(page, server)
    context.close()


def check_sign_in(page, server):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda stream: asked.append(stream.url))
    page.goto(f"{server}/pareto?family=quantization")
    assert page.evaluate("document.activeElement.type") == "password"
    assert "gptq" not in page.content()
    assert not any("stcore" in each or "static" in each for each in asked)

    page.get_by_label("The token").fill("not-the-right-token-at-all")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("That is not the token.").wait_for()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    page.locator(CHART).wait_for(timeout=30_000)
    assert page.url.startswith(f"{server}/pareto")
    assert "family=quantization" in page.url

    page.reload()
    page.locator(CHART).wait_for(timeout=30_000)
    held = page.evaluate("[document.cookie, JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert "harness_dashboard" not in held[0]
    assert TOKEN not in "".join(held) + page.content() + "".join(asked)

    page.goto(f"{server}/sign-out")
    page.goto(server)
    page.get_by_label("The token").wait_for()


def downloaded(page, click):
    with page.expect_download() as waiting:
        click()
    name = waiting.value.suggested_filename
    with open(waiting.value.path(), "rb") as file:
        return name, file.read()


def found_by_hovering(page, table, text):
    """Move over the headings of a table, which are drawn on a canvas, until one explains itself so."""
    from playwright.sync_api import TimeoutError as TookTooLong

    box = table.bounding_box()
    for offset in range(40, int(box["width"]), 50):
        page.mouse.move(box["x"] + offset, box["y"] + 18)
        try:
            page.get_by_text(text).wait_for(timeout=1000)
        except TookTooLong:
            continue
        page.mouse.move(0, 0)
        return
    raise AssertionError(f"no heading says {text!r}")


def test_tables_and_figures_can_be_taken_home(server, page, guarded, tmp_path):
    visit(page, server, "Overview")
    page.locator(TABLE).first.wait_for()
    found_by_hovering(page, page.locator(TABLE).first, "Memory of all parameters and buffers")
    name, content = downloaded(page, page.get_by_role("button", name="CSV").first.click)
    assert re.fullmatch(r"harness-overview-leaderboard\.csv", name)
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
    assert len(rows) == 15
    assert {label for label, *_ in VARIANTS} <= {row["method"] for row in rows}
    assert float(rows[0]["weight_bytes · b1-p512-g64 [MiB]"]) > 0
    name, content = downloaded(page, page.get_by_role("button", name="JSON").first.click)
    assert re.fullmatch(r"harness-overview-leaderboard\.json", name)
    rows = json.loads(content)
    assert len(rows) == 15
    assert HOSTILE in {row["method"] for row in rows}

    visit(page, f"{server}/pareto?quality=acc+·+hellaswag", "Pareto")
    page.locator(CHART).wait_for()
    name, content = downloaded(page, page.get_by_role("button", name="HTML").click)
    assert re.fullmatch(r"harness-pareto-front-[\w-]+\.html", name)
    (tmp_path / name).write_bytes(content)

    camera = page.locator(f"{CHART} .modebar-btn[data-title^='Download plot']")
    page.locator(CHART).hover()
    name, content = downloaded(page, camera.click)
    assert name.endswith(".png")
    assert content.startswith(b"\x89PNG")
    page.locator("[data-testid=stRadio] label", has_text="SVG").click()
    page.wait_for_function(  # the chart is drawn anew, and for a moment there are two
        f"(all => all.length == 1 && all[0]._context?.toImageButtonOptions.format == 'svg')"
        f"(document.querySelectorAll('{CHART}'))"
    )
    page.locator(CHART).hover()
    name, content = downloaded(page, camera.click)
    assert name.endswith(".svg")
    assert content.startswith(b"<svg")
    assert SIMULATED in content.decode()

    context = guarded(offline=True)
    with watched(context) as alone:
        alone.goto(next(tmp_path.iterdir()).as_uri())
        alone.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for()
        assert "acc · hellaswag" in alone.locator(".js-plotly-plot").inner_text()
    context.close()


def rgb(text):
    return "#" + "".join(f"{int(part):02X}" for part in re.findall(r"\d+", text)[:3])


def test_pages_and_figures_follow_the_readers_theme(server, page):
    page.emulate_media(color_scheme="dark")
    visit(page, f"{server}/pareto", "Pareto")
    check_colours(page, DARK)
    save(page, "pareto-dark")
    page.emulate_media(color_scheme="light")  # as when evening turns to morning: the page is not loaded again
    check_colours(page, LIGHT)
    save(page, "pareto-light")


def texts_of(page):
    """The colours of all words in the figures; what is taken out of the page meanwhile has none."""
    return page.locator(f"{CHART} text").evaluate_all(
        "all => all.map(each => getComputedStyle(each).fill).filter(fill => fill)"
    )


def check_colours(page, theme):
    style = "getComputedStyle(document.querySelector('[data-testid=stApp]'))"
    channels = ", ".join(str(int(theme.text[place : place + 2], 16)) for place in (1, 3, 5))
    page.wait_for_function(f"{style}.color == 'rgb({channels})'")
    page.wait_for_function(
        f"(title => title && getComputedStyle(title).fill == 'rgb({channels})')"
        f"(document.querySelector('{CHART} .xtitle'))"
    )
    ground = rgb(page.evaluate(f"{style}.backgroundColor"))
    assert ground == theme.background
    # The chart is drawn anew, and for a moment some of it is still in the old colours.
    deadline = time.monotonic() + 20
    while dim := [fill for fill in set(texts_of(page)) if contrast(rgb(fill), ground) < TEXT_CONTRAST]:
        assert time.monotonic() < deadline, dim
        page.wait_for_timeout(200)
    assert len(texts_of(page)) > 10
    points = page.locator(f"{CHART} .point").evaluate_all(
        "all => all.map(each => [getComputedStyle(each).stroke, getComputedStyle(each).fill])"
    )
    assert points
    for stroke, fill in {tuple(each) for each in points}:
        colour = fill if stroke == "none" else stroke
        assert contrast(rgb(colour), ground) >= GRAPHIC_CONTRAST, colour


def test_everything_is_reached_by_the_keyboard(server, page):
    visit(page, f"{server}/pareto", "Pareto")
    page.locator(CHART).wait_for()
    reached = []
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(it => (it.getAttribute('aria-label') || it.innerText || it.tagName).trim())"
                "(document.activeElement)"
            )
        )
    order = [
        "Overview",
        "Compare",
        "Models",
        "Status",
        "Refresh",
        "Vertical",
        "Horizontal",
        "HTML",
        "CSV",
        "JSON",
    ]
    places = [next((n for n, label in enumerate(reached) if name in label), None) for name in order]
    assert None not in places, dict(zip(order, places, strict=True)) | {"reached": reached}
    assert places == sorted(places), dict(zip(order, places, strict=True))
